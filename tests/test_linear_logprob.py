import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_cases import BIAS_TRAPS, DTYPES, as_laid_out, assert_as_exact_as_torch, off_by_8_bytes, strided, tiny_of

from fastppo.kernels import linear_logprob as room
from fastppo.kernels.linear_logprob import Head, head_logits, linear_logprob

HEADS = {
    "plain": {},
    "scaled": dict(logit_scale=0.125),
    "capped": dict(softcap=2.0),
    "scaled and capped": dict(logit_scale=3.0, softcap=30.0),
}
NAMES = ("logprob", "entropy", "dhidden", "dweight", "dbias")


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles of rows and of columns at test size."""
    monkeypatch.setattr(room, "TILE_BYTES", {"cpu": 8192, "cuda": 8192})
    monkeypatch.setattr(room, "MAX_TILE_ROWS", 8)


def inputs(N, D, V, device, *, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden_ND, weight_VD = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator)
    bias_V = torch.randn(V, generator=generator) if bias else None
    tokens_N = torch.randint(0, V, (N,), generator=generator)
    g_N, h_N = torch.randn(2, N, generator=generator)
    move = lambda x: None if x is None else x.to(device)  # noqa: E731
    return tuple(map(move, (hidden_ND, weight_VD, bias_V, tokens_N, g_N, h_N)))


def outcome(arguments, *, dtype, rounded_to, backend, temperature=1.0, **head):
    """logprob, entropy and the gradients, computed in `dtype` from inputs rounded to `rounded_to`."""
    *leaves, tokens_N, g_N, h_N = arguments
    leaves = [None if x is None else as_laid_out(x, rounded_to, dtype).requires_grad_() for x in leaves]
    made = linear_logprob(
        leaves[0], Head(leaves[1], leaves[2], **head), tokens_N, temperature=temperature, backend=backend
    )
    torch.autograd.backward(made, [g_N.to(made[0].dtype), h_N.to(made[1].dtype)])
    return [*made, *(x.grad for x in leaves if x is not None)]


def check(arguments, *, dtype, backend, slack=1, **kw):
    truth = outcome(arguments, dtype=torch.float64, rounded_to=dtype, backend="reference", **kw)
    plain = outcome(arguments, dtype=dtype, rounded_to=dtype, backend="reference", **kw)
    ours = outcome(arguments, dtype=dtype, rounded_to=dtype, backend=backend, **kw)
    for name, o, p, t in zip(NAMES, ours, plain, truth):  # noqa: B905  no bias, no dbias
        assert_as_exact_as_torch(name, o, p, t, slack * tiny_of(dtype), 3e-6)


# one token, one column; odd; past one tile of 256 columns with a ragged tail and two tiles of rows
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 37), (13, 16, 517)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
def test_matches_float64(backend, device, small_tiles, shape, dtype, head):
    check(inputs(*shape, device), dtype=dtype, backend=backend, temperature=0.7, **HEADS[head])


@pytest.mark.parametrize("bias", [False, True])
def test_real_vocabulary(backend, device, bias):
    """151,936 columns (2^7 * 1187): no power of two divides them into whole blocks."""
    if backend == "triton" and device.type == "cpu":
        pytest.skip("the interpreter takes minutes for 151,936 columns")
    check(inputs(5, 8, 151_936, device, bias=bias), dtype=torch.float32, backend=backend)


@settings(deadline=None, max_examples=20)
@given(
    N=st.integers(0, 20),
    D=st.integers(1, 9),
    V=st.one_of(st.integers(1, 40), st.sampled_from([255, 256, 257, 600])),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    head=st.sampled_from(list(HEADS)),
    temperature=st.sampled_from([1.0, 0.5]),
    layouts=st.tuples(*[st.sampled_from(["contiguous", "columns first", "every other column", "wider rows"])] * 2),
    seed=st.integers(0, 99),
)
def _any_shape(backend, device, N, D, V, dtype, bias, head, temperature, layouts, seed):
    hidden_ND, weight_VD, *rest = inputs(N, D, V, device, bias=bias, seed=seed)
    arguments = (strided(hidden_ND, layouts[0]), strided(weight_VD, layouts[1]), *rest)
    # of a few numbers in 16 bits plain torch's largest error may be small by chance
    kw = dict(dtype=dtype, temperature=temperature, slack=1 if dtype == torch.float32 else 4, **HEADS[head])
    check(arguments, backend=backend, **kw)


def test_any_shape(backend, device, small_tiles):
    _any_shape(backend, device)


@pytest.mark.parametrize("trap", BIAS_TRAPS)
def test_traps(backend, device, small_tiles, trap):
    """Logits that are all far below 0, or -infinity but for some: a whole tile may hold nothing."""
    hidden_ND, weight_VD, _, tokens_N, g_N, h_N = inputs(9, 5, 517, device)
    make, token = BIAS_TRAPS[trap]
    check(
        (hidden_ND, weight_VD, make(517).to(device), tokens_N.fill_(token % 517), g_N, h_N),
        dtype=torch.float32,
        backend=backend,
    )


def test_any_stride(backend, device, small_tiles):
    """Hidden states and a weight that are views: the same log-probs and gradients as their copies."""
    hidden_ND, weight_VD, bias_V, tokens_N, g_N, h_N = inputs(13, 5, 517, device)
    views = (torch.stack((hidden_ND, hidden_ND), 2)[..., 0], weight_VD.t().contiguous().t())
    assert not any(x.is_contiguous() for x in views)
    made = []
    for leaves in (views, (hidden_ND, weight_VD)):
        leaves = [x.detach().requires_grad_() for x in leaves]
        out = linear_logprob(leaves[0], Head(leaves[1], bias_V), tokens_N, backend=backend)
        made.append([*out, *torch.autograd.grad(out, leaves, [g_N, h_N])])
    for ours, theirs in zip(*made, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_unaligned_labels(backend, device, small_tiles):
    hidden_ND, weight_VD, bias_V, tokens_N, *upstream = inputs(13, 5, 517, device)
    made = (
        outcome((hidden_ND, weight_VD, bias_V, tokens, *upstream), dtype=torch.float32, rounded_to=torch.float32, backend=backend)
        for tokens in (tokens_N, off_by_8_bytes(tokens_N))
    )  # fmt: skip
    assert all(torch.equal(aligned, unaligned) for aligned, unaligned in zip(*made, strict=True))


def test_by_hand(backend, device):
    """hidden 1, weights 0, ln 2, bias ln 1, ln 2 -> logits 0, ln 4 -> p 1/5, 4/5; token 1."""
    hidden_ND = torch.ones(1, 1, device=device, requires_grad=True)
    weight_VD = torch.tensor([[0.0], [math.log(2)]], device=device, requires_grad=True)
    bias_V = torch.tensor([0.0, math.log(2)], device=device, requires_grad=True)
    made = linear_logprob(hidden_ND, Head(weight_VD, bias_V), torch.tensor([1], device=device), backend=backend)
    assert made.logprob_N.item() == pytest.approx(math.log(4 / 5), abs=1e-6)
    assert made.entropy_N.item() == pytest.approx(math.log(5) - 4 / 5 * math.log(4), abs=1e-6)
    made.logprob_N.sum().backward()
    assert hidden_ND.grad.item() == pytest.approx(math.log(2) / 5, abs=1e-6)
    assert weight_VD.grad[:, 0].tolist() == pytest.approx([-1 / 5, 1 / 5], abs=1e-6)
    assert bias_V.grad.tolist() == pytest.approx([-1 / 5, 1 / 5], abs=1e-6)


@pytest.mark.parametrize("need", ["hidden", "weight", "bias"])
def test_only_the_gradients_asked_for(backend, device, small_tiles, need):
    hidden_ND, weight_VD, bias_V, tokens_N, g_N, h_N = inputs(13, 5, 517, device)
    leaves = {"hidden": hidden_ND, "weight": weight_VD, "bias": bias_V}
    leaves[need].requires_grad_()
    made = linear_logprob(hidden_ND, Head(weight_VD, bias_V), tokens_N, backend=backend)
    torch.autograd.backward(made, [g_N, h_N])
    whole = outcome(
        [x.detach() for x in (hidden_ND, weight_VD, bias_V, tokens_N, g_N, h_N)],
        dtype=torch.float32,
        rounded_to=torch.float32,
        backend=backend,
    )
    wanted = whole[2 + list(leaves).index(need)]
    torch.testing.assert_close(leaves[need].grad, wanted, atol=1e-6, rtol=1e-5)
    assert all((x.grad is None) == (name != need) for name, x in leaves.items())


def test_zero_upstream_rows_cost_nothing(backend, device, small_tiles, monkeypatch):
    """Their hidden states do not reach a product: NaN in them does not spread, and fewer rows are multiplied."""
    if backend == "reference":
        pytest.skip("autograd multiplies every row")
    hidden_ND, weight_VD, _, tokens_N, g_N, h_N = inputs(13, 5, 37, device, bias=False)
    live_N = torch.arange(13, device=device) % 3 == 0
    hidden_ND[~live_N] = torch.nan
    leaves = [x.requires_grad_() for x in (hidden_ND, weight_VD)]
    made = linear_logprob(leaves[0], Head(leaves[1]), tokens_N, backend=backend)
    torch.autograd.backward(made, [g_N * live_N, h_N * live_N])
    assert (hidden_ND.grad[~live_N] == 0).all() and (hidden_ND.grad[live_N] != 0).all()
    assert weight_VD.grad.isfinite().all()


def test_no_row_has_a_gradient(backend, device):
    hidden_ND, weight_VD, bias_V, tokens_N, *_ = inputs(3, 5, 37, device)
    leaves = [x.requires_grad_() for x in (hidden_ND, weight_VD, bias_V)]
    made = linear_logprob(leaves[0], Head(*leaves[1:]), tokens_N, backend=backend)
    (made.logprob_N.sum() * 0 + made.entropy_N.sum() * 0).backward()
    assert all((x.grad == 0).all() for x in leaves)


def test_leading_dimensions_and_expanded_upstream(backend, device, small_tiles):
    hidden_ND, weight_VD, bias_V, tokens_N, *_ = inputs(12, 5, 300, device)
    hidden_BTD = hidden_ND.view(3, 4, 5)[:, :-1].requires_grad_()
    made = linear_logprob(hidden_BTD, Head(weight_VD, bias_V), tokens_N.view(3, 4)[:, 1:], backend=backend)
    assert made.logprob_N.shape == made.entropy_N.shape == (3, 3)
    (d_BTD,) = torch.autograd.grad(made.logprob_N.sum(), hidden_BTD)
    truth_BTD = hidden_BTD.detach().double().requires_grad_()
    truth = linear_logprob(truth_BTD, Head(weight_VD.double(), bias_V.double()), tokens_N.view(3, 4)[:, 1:])
    truth.logprob_N.sum().backward()
    torch.testing.assert_close(d_BTD.double(), truth_BTD.grad, atol=2e-5, rtol=0)


def test_gradcheck_of_the_reference():
    hidden_ND, weight_VD, bias_V, tokens_N, *_ = inputs(2, 3, 4, "cpu")
    leaves = [x.double().requires_grad_() for x in (hidden_ND, weight_VD, bias_V)]
    run = lambda h, w, b: tuple(linear_logprob(h, Head(w, b, 0.5, 3.0), tokens_N, temperature=0.7))  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)


def test_finite_differences(backend, device):
    """The float32 gradient against central differences of the float64 reference, soft cap, scale and bias at once."""
    arguments = inputs(3, 4, 11, device)
    ours = outcome(
        arguments, dtype=torch.float32, rounded_to=torch.float32, backend=backend, temperature=0.7, softcap=2.0
    )
    hidden_ND, weight_VD, bias_V, tokens_N, g_N, h_N = (x.double() if x.is_floating_point() else x for x in arguments)

    def loss(weight_VD):
        made = linear_logprob(hidden_ND, Head(weight_VD, bias_V, softcap=2.0), tokens_N, temperature=0.7)
        return (made.logprob_N * g_N + made.entropy_N * h_N).sum()

    for i, j in [(0, 0), (int(tokens_N[0]), 1), (10, 3)]:
        step = torch.zeros_like(weight_VD)
        step[i, j] = 1e-5
        slope = (loss(weight_VD + step) - loss(weight_VD - step)) / 2e-5
        assert ours[3][i, j].item() == pytest.approx(slope.item(), abs=2e-5)


def test_double_backward_raises(backend, device):
    if backend == "reference":
        pytest.skip("autograd differentiates the reference twice")
    hidden_ND, weight_VD, _, tokens_N, *_ = inputs(3, 5, 37, device, bias=False)
    hidden_ND.requires_grad_()
    made = linear_logprob(hidden_ND, Head(weight_VD), tokens_N, backend=backend)
    (d_ND,) = torch.autograd.grad(made.logprob_N.sum(), hidden_ND, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprob: its gradient cannot be differentiated again"):
        d_ND.sum().backward()


def test_never_makes_all_logits(device):
    """Extra memory of forward and backward beyond the gradients stays near the tile, far under the [N, V] logits."""
    if device.type != "cpu":
        pytest.skip("counts CPU allocations")
    N, D, V = 512, 16, 50_257  # logits: 98 MiB
    hidden_ND, weight_VD, _, tokens_N, g_N, h_N = inputs(N, D, V, device, bias=False)
    leaves = [x.requires_grad_() for x in (hidden_ND, weight_VD)]
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        made = linear_logprob(leaves[0], Head(leaves[1]), tokens_N, backend="cpu")
        torch.autograd.backward(made, [g_N, h_N])
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    extra = peak - 4 * (N * D + V * D)  # the gradients are results
    assert extra <= room.TILE_BYTES["cpu"] + 2**20, f"{extra / 2**20:.1f} MiB"


def test_tiles_do_not_depend_on_their_size(device, monkeypatch):
    arguments = inputs(40, 8, 1000, device)
    whole = outcome(arguments, dtype=torch.float32, rounded_to=torch.float32, backend=None)
    monkeypatch.setattr(room, "TILE_BYTES", {"cpu": 4096, "cuda": 4096})
    monkeypatch.setattr(room, "MAX_TILE_ROWS", 3)
    small = outcome(arguments, dtype=torch.float32, rounded_to=torch.float32, backend=None)
    for w, s in zip(whole, small, strict=True):
        torch.testing.assert_close(w, s, atol=1e-4, rtol=1e-5)


def test_autocast_runs_in_the_autocast_dtype(device):
    hidden_ND, weight_VD, bias_V, tokens_N, *_ = inputs(3, 5, 37, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        made = linear_logprob(hidden_ND, Head(weight_VD, bias_V), tokens_N)
    plain = linear_logprob(hidden_ND.bfloat16(), Head(weight_VD.bfloat16(), bias_V), tokens_N)
    assert torch.equal(made.logprob_N, plain.logprob_N)


def test_backward_on_another_thread(backend, device):
    hidden_ND, weight_VD, _, tokens_N, *_ = inputs(3, 5, 37, device, bias=False)
    hidden_ND.requires_grad_()
    made = linear_logprob(hidden_ND, Head(weight_VD), tokens_N, backend=backend)
    worker = threading.Thread(target=made.logprob_N.sum().backward)
    worker.start()
    worker.join()
    assert hidden_ND.grad.isfinite().all()


def test_head_is_the_models(device):
    """Gemma's order: scale, then soft cap."""
    hidden_ND, weight_VD, bias_V, *_ = inputs(3, 5, 37, device)
    logits_NV = head_logits(hidden_ND, Head(weight_VD, bias_V, 0.5, 30.0))
    wanted_NV = 30.0 * torch.tanh((hidden_ND @ weight_VD.t() + bias_V) * 0.5 / 30.0)
    torch.testing.assert_close(logits_NV, wanted_NV)


HIDDEN_ND, WEIGHT_VD, TOKENS_N = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2).long()
BAD = {
    r"head.weight_VD must have shape \(V, 3\) for hidden_ND of shape \(2, 3\); got \(5, 4\)": dict(
        head=Head(torch.zeros(5, 4))
    ),
    r"one dtype on one device; got torch.float32 on cpu and torch.bfloat16 on cpu": dict(
        head=Head(WEIGHT_VD.bfloat16())
    ),
    r"head.bias_V must have shape \(5,\) on cpu; got \(4,\)": dict(head=Head(WEIGHT_VD, torch.zeros(4))),
    r"head.logit_scale must be positive, head.softcap positive or None; got 0.0 and None": dict(
        head=Head(WEIGHT_VD, logit_scale=0.0)
    ),
    r"head.logit_scale must be positive, head.softcap positive or None; got 1.0 and 0.0": dict(
        head=Head(WEIGHT_VD, softcap=0.0)
    ),
    r"tokens_N must be in \[0, 5\); got values from -100 to 0": dict(tokens=torch.tensor([-100, 0])),
    r"tokens_N must be torch.int64 of shape \(2,\)": dict(tokens=torch.zeros(2, 1).long()),
    r"temperature must be a positive finite number; got -1": dict(temperature=-1),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    arguments = {"hidden": HIDDEN_ND, "head": Head(WEIGHT_VD), "tokens": TOKENS_N, **BAD[message]}
    with pytest.raises(ValueError, match="linear_logprob: .*" + message):
        linear_logprob(*[arguments.pop(name) for name in ("hidden", "head", "tokens")], **arguments)


def test_token_outside_the_vocabulary(backend, device, small_tiles):
    """Never a finite number: the CPU looks and raises; a GPU does not look (that would wait), and gives NaN."""
    hidden_ND, weight_VD, *_ = inputs(3, 4, 600, device, bias=False)
    tokens_N = torch.tensor([600, 5, -1], device=device)
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"tokens_N must be in \[0, 600\); got values from -1 to 600"):
            linear_logprob(hidden_ND, Head(weight_VD), tokens_N, backend=backend)
    if backend == "triton":  # as on a GPU, past the check
        made = room.BACKEND_TABLE["triton"](hidden_ND, Head(weight_VD), tokens_N, 1.0)
        assert made.logprob_N.isnan().tolist() == [True, False, True] and made.entropy_N.isfinite().all()
