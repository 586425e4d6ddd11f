import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_cases import BIAS_TRAPS, DTYPES, as_laid_out, assert_as_exact_as_torch, off_by_8_bytes, strided, tiny_of
from rooms import examples

from fastppo.kernels import _recycle
from fastppo.kernels import linear_ppo_loss as room
from fastppo.kernels.linear_logprob import Head, linear_logprob_reference
from fastppo.kernels.linear_ppo_loss import linear_ppo_loss
from fastppo.kernels.ppo_loss import PPOBatch, PPOLossOptions, ppo_loss_reference

NAMES = ("loss", "logprob", "entropy", "stats", "dhidden", "dvalues", "dweight", "dbias")
OPTIONS = {
    "classic": PPOLossOptions(),
    "entropy bonus": PPOLossOptions(entropy_coef=0.05, vf_coef=0.5),
    "dual clip": PPOLossOptions(dual_clip=1.5, cliprange=0.1),
}


@pytest.fixture
def small_chunks(monkeypatch):
    """Four rows of 517 float32 logits a chunk."""
    monkeypatch.setattr(room, "CHUNK_BYTES", {(kind, size): 4 * 517 * 4 for kind in ("cpu", "cuda") for size in (2, 4)})
    monkeypatch.setattr(room, "MOVE_ROWS", 2)


def inputs(N, D, V, device, *, mask="holes", bias=True, seed=0):
    """hidden, values, weight, bias, tokens and batch; old log-probs lie so that some ratios are clipped."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    hidden_ND, weight_VD, bias_V = draw(N, D), draw(V, D) * 0.5, draw(V) if bias else None
    tokens_N = torch.randint(0, V, (N,), generator=generator)
    old_N = linear_logprob_reference(hidden_ND, Head(weight_VD, bias_V), tokens_N).logprob_N + 0.3 * draw(N)
    mask_N = {
        "none": None,
        "full": torch.ones(N, dtype=torch.bool),
        "holes": torch.rand(N, generator=generator) > 0.4,
        "empty": torch.zeros(N, dtype=torch.bool),
    }[mask]
    old_values_N = draw(N)
    batch = PPOBatch(old_N, old_values_N, draw(N), draw(N), mask_N)
    move = lambda x: None if x is None else x.to(device)  # noqa: E731
    values_N = old_values_N + 0.3 * draw(N)
    return [move(x) for x in (hidden_ND, values_N, weight_VD, bias_V, tokens_N)] + [PPOBatch(*map(move, batch))]


def outcome(arguments, options, *, dtype, rounded_to, backend, upstream=1.0, head=None, **kw):
    *leaves, tokens_N, batch = arguments
    double = lambda x: x.double() if dtype == torch.float64 and x is not None and x.is_floating_point() else x  # noqa: E731
    cast = lambda x: None if x is None else as_laid_out(x, rounded_to, dtype).requires_grad_()  # noqa: E731
    hidden_ND, weight_VD, bias_V = (cast(leaves[i]) for i in (0, 2, 3))
    values_N = double(leaves[1]).clone().requires_grad_()
    made = linear_ppo_loss(
        hidden_ND,
        values_N,
        Head(weight_VD, bias_V, **(head or {})),
        tokens_N,
        PPOBatch(*map(double, batch)),
        options,
        backend=backend,
        **kw,
    )
    (made.loss * upstream).backward()
    sums = {k: v for k, v in made.stats.sums().items() if not k.endswith("_m2")}
    grads = [x.grad for x in (hidden_ND, values_N, weight_VD, bias_V) if x is not None]
    return [made.loss, made.logprob_N, made.entropy_N, torch.tensor(list(sums.values())), *grads]


def check(arguments, options, *, dtype, backend, slack=1, floor=1e-6, **kw):
    truth = outcome(arguments, options, dtype=torch.float64, rounded_to=dtype, backend="reference", **kw)
    plain = outcome(arguments, options, dtype=dtype, rounded_to=dtype, backend="reference", **kw)
    ours = outcome(arguments, options, dtype=dtype, rounded_to=dtype, backend=backend, **kw)
    for name, o, p, t in zip(NAMES, ours, plain, truth):  # noqa: B905  no bias, no dbias
        assert_as_exact_as_torch(name, o, p, t, max(slack * tiny_of(dtype), 3e-6), floor)


# one token; odd; several chunks with a ragged last one
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 37), (13, 16, 517)])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32])
def test_matches_float64(backend, device, small_chunks, shape, options, dtype):
    arguments = inputs(*shape, device)
    check(arguments, OPTIONS[options], dtype=dtype, backend=backend, upstream=-2.5, whiten=(0.1, 1.3))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_sixteen_bits_stay_near_float64(backend, device, small_chunks, dtype):
    """A ratio may fall on the other side of the clip when the logits are rounded, so: no clipping here."""
    options = PPOLossOptions(cliprange=5.0, cliprange_value=9.0, entropy_coef=0.05)
    check(inputs(13, 16, 517, device), options, dtype=dtype, backend=backend)


@pytest.mark.parametrize("mask", ["none", "full", "holes", "empty"])
def test_masks(backend, device, small_chunks, mask):
    check(inputs(13, 5, 517, device, mask=mask), OPTIONS["entropy bonus"], dtype=torch.float32, backend=backend)


@settings(deadline=None, max_examples=examples(15))
@given(
    N=st.integers(0, 14),
    V=st.one_of(st.integers(1, 40), st.sampled_from([255, 256, 300, 517])),
    mask=st.sampled_from(["none", "holes"]),
    options=st.sampled_from(list(OPTIONS)),
    bias=st.booleans(),
    head=st.sampled_from([{}, dict(softcap=3.0), dict(logit_scale=0.3)]),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(["contiguous", "columns first", "every other column", "wider rows"])] * 2),
    seed=st.integers(0, 99),
)
def _any_case(backend, device, N, V, mask, options, bias, head, dtype, layouts, seed):
    arguments = inputs(N, 4, V, device, mask=mask, bias=bias, seed=seed)
    arguments[0], arguments[2] = strided(arguments[0], layouts[0]), strided(arguments[2], layouts[1])
    options, chance = OPTIONS[options], {}
    if dtype != torch.float32:  # rounded logits may lie on the other side of a clip: see above
        options = replace(options, cliprange=5.0, cliprange_value=9.0, dual_clip=None)
        chance = dict(
            slack=4, floor=torch.finfo(dtype).eps
        )  # plain torch's error in a few numbers may be small by chance
    kw = dict(temperature=0.8, normalizer=7.0, head=head, **chance)
    check(arguments, options, dtype=dtype, backend=backend, **kw)


def test_any_case(backend, device, small_chunks):
    _any_case(backend, device)


def test_any_stride(backend, device, small_chunks):
    """Views in place of every tensor, labels that are not aligned: the same loss and gradients as their copies."""
    copies = inputs(13, 5, 517, device)
    views = [strided(copies[0], "columns first"), None, strided(copies[2], "every other column"), copies[3], None, None]
    views[1], *batch = (x.repeat_interleave(2)[::2] for x in (copies[1], *copies[5]))
    views[4], views[5] = off_by_8_bytes(copies[4]), PPOBatch(*batch)
    assert not any(x.is_contiguous() for x in (*views[:3], *batch))
    made = (
        outcome(arguments, OPTIONS["entropy bonus"], dtype=torch.float32, rounded_to=torch.float32, backend=backend)
        for arguments in (copies, views)
    )
    for name, copy, view in zip(NAMES, *made, strict=True):
        torch.testing.assert_close(view, copy, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("trap", BIAS_TRAPS)
def test_traps(backend, device, small_chunks, trap):
    """Logits that are all far below 0, or -infinity but for some; the tokens are among those that are left."""
    hidden_ND, values_N, weight_VD, _, tokens_N, batch = inputs(9, 5, 517, device)
    make, token = BIAS_TRAPS[trap]
    bias_V = make(517).to(device)
    tokens_N.fill_(token % 517)
    old_N = linear_logprob_reference(hidden_ND, Head(weight_VD, bias_V), tokens_N).logprob_N + 0.1
    arguments = (hidden_ND, values_N, weight_VD, bias_V, tokens_N, batch._replace(old_logprobs_N=old_N))
    check(arguments, OPTIONS["entropy bonus"], dtype=torch.float32, backend=backend)


def test_real_vocabulary(backend, device):
    check(inputs(4, 8, 151_936, device), OPTIONS["entropy bonus"], dtype=torch.float32, backend=backend)


def test_by_hand(backend, device):
    """p = 1/5, 4/5, token 1, old log-prob ln 0.8, A = 2, normalizer 4: ratio 1, loss -2/4 + 0.1 * 0.5 (1-3)^2 / 4."""
    hidden_ND = torch.ones(1, 1, device=device, requires_grad=True)
    weight_VD = torch.tensor([[0.0], [math.log(4)]], device=device, requires_grad=True)
    values_N = torch.ones(1, device=device, requires_grad=True)
    one = lambda x: torch.full((1,), float(x), device=device)  # noqa: E731
    batch = PPOBatch(one(math.log(0.8)), one(1), one(2), one(3))
    tokens_N = torch.ones(1, dtype=torch.int64, device=device)
    made = linear_ppo_loss(
        hidden_ND, values_N, Head(weight_VD), tokens_N, batch, PPOLossOptions(), normalizer=4.0, backend=backend
    )
    assert made.loss.item() == pytest.approx(-0.5 + 0.05, abs=1e-6)
    made.loss.backward()
    # dloss/dlogprob = -A/4 = -0.5; dlogprob/dz = (-1/5, 1/5)
    assert weight_VD.grad[:, 0].tolist() == pytest.approx([0.1, -0.1], abs=1e-6)
    assert hidden_ND.grad.item() == pytest.approx(-0.1 * math.log(4), abs=1e-6)
    assert values_N.grad.item() == pytest.approx(0.1 * (1 - 3) / 4, abs=1e-6)
    assert made.stats.sums()["count"] == 1


def test_micro_batches_add_up(backend, device, small_chunks):
    """Two halves with the whole's normalizer: losses, statistics and accumulated gradients are the whole's."""
    arguments = inputs(14, 5, 517, device)
    options, kw = OPTIONS["entropy bonus"], dict(normalizer=9.0, backend=backend)
    whole = outcome(arguments, options, dtype=torch.float32, rounded_to=torch.float32, **kw)
    hidden_ND, values_N, weight_VD, bias_V, tokens_N, batch = arguments
    leaves = [x.clone().requires_grad_() for x in (hidden_ND, values_N, weight_VD, bias_V)]
    loss, stats = 0.0, None
    for half in (slice(0, 5), slice(5, 14)):
        made = linear_ppo_loss(
            leaves[0][half],
            leaves[1][half],
            Head(*leaves[2:]),
            tokens_N[half],
            PPOBatch(*(x[half] for x in batch)),
            options,
            **kw,
        )
        made.loss.backward()
        loss, stats = loss + made.loss.item(), made.stats if stats is None else stats + made.stats
    assert loss == pytest.approx(whole[0].item(), abs=1e-6)
    sums = [v for k, v in stats.sums().items() if not k.endswith("_m2")]
    assert sums == pytest.approx(whole[3].tolist(), abs=1e-4, rel=1e-5)
    for leaf, wanted in zip(leaves, whole[4:], strict=True):
        torch.testing.assert_close(leaf.grad, wanted, atol=1e-6, rtol=1e-5)


def test_what_the_mask_drops_has_no_effect(backend, device, small_chunks):
    arguments = inputs(13, 5, 517, device)
    mask_N = arguments[5].mask_N
    clean = outcome(arguments, PPOLossOptions(), dtype=torch.float32, rounded_to=torch.float32, backend=backend)
    if backend != "reference":  # autograd multiplies NaN by zero
        arguments[0] = arguments[0].masked_fill(~mask_N[:, None], torch.nan)
    arguments[1] = arguments[1].masked_fill(~mask_N, torch.nan)
    arguments[5] = PPOBatch(*(x.masked_fill(~mask_N, torch.nan) for x in arguments[5][:4]), mask_N)
    dirty = outcome(arguments, PPOLossOptions(), dtype=torch.float32, rounded_to=torch.float32, backend=backend)
    for name, c, d in zip(NAMES, clean, dirty, strict=True):
        torch.testing.assert_close(c, d, atol=1e-7, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert (clean[1][~mask_N] == 0).all() and (clean[4][~mask_N] == 0).all() and (clean[5][~mask_N] == 0).all()


def test_clipped_tokens_leave_the_products(backend, device, small_chunks, monkeypatch):
    """With every second ratio far outside the clip range the last two products see half of the rows."""
    if backend == "reference":
        pytest.skip("autograd multiplies every row")
    hidden_ND, values_N, weight_VD, _, tokens_N, batch = inputs(12, 5, 517, device, mask="none", bias=False)
    logprob_N = linear_logprob_reference(hidden_ND, Head(weight_VD), tokens_N).logprob_N
    dead_N = torch.arange(12, device=device) % 2 == 0
    batch = batch._replace(
        old_logprobs_N=torch.where(dead_N, logprob_N - 1, logprob_N), advantages_N=batch.advantages_N.abs() + 0.1
    )
    seen, plain_add = [], room.GradientSums.add
    monkeypatch.setattr(
        room.GradientSums, "add", lambda self, i, d, *rest: (seen.append(len(d)), plain_add(self, i, d, *rest))
    )
    check_arguments = [hidden_ND, values_N, weight_VD, None, tokens_N, batch]
    check(check_arguments, PPOLossOptions(), dtype=torch.float32, backend=backend)
    assert sum(seen) == 6


@pytest.mark.parametrize("need", ["hidden", "values", "weight", "bias"])
def test_only_the_gradients_asked_for(backend, device, small_chunks, need):
    arguments = inputs(13, 5, 517, device)
    whole = outcome(arguments, PPOLossOptions(), dtype=torch.float32, rounded_to=torch.float32, backend=backend)
    hidden_ND, values_N, weight_VD, bias_V, tokens_N, batch = arguments
    leaves = {"hidden": hidden_ND, "values": values_N, "weight": weight_VD, "bias": bias_V}
    leaves[need].requires_grad_()
    made = linear_ppo_loss(
        hidden_ND, values_N, Head(weight_VD, bias_V), tokens_N, batch, PPOLossOptions(), backend=backend
    )
    made.loss.backward()
    torch.testing.assert_close(leaves[need].grad, whole[4 + list(leaves).index(need)], atol=1e-6, rtol=1e-5)


def test_no_grad_computes_the_loss_alone(backend, device, small_chunks):
    arguments = inputs(13, 5, 517, device)
    whole = outcome(arguments, PPOLossOptions(), dtype=torch.float32, rounded_to=torch.float32, backend=backend)
    hidden_ND, values_N, weight_VD, bias_V, tokens_N, batch = arguments
    with torch.no_grad():
        made = linear_ppo_loss(
            hidden_ND, values_N, Head(weight_VD, bias_V), tokens_N, batch, PPOLossOptions(), backend=backend
        )
    assert made.loss.item() == pytest.approx(whole[0].item(), abs=1e-6) and not made.loss.requires_grad


def test_second_backward_raises(backend, device):
    if backend == "reference":
        pytest.skip("autograd keeps what it needs")
    hidden_ND, values_N, weight_VD, bias_V, tokens_N, batch = inputs(3, 5, 37, device)
    hidden_ND.requires_grad_()
    made = linear_ppo_loss(
        hidden_ND, values_N, Head(weight_VD, bias_V), tokens_N, batch, PPOLossOptions(), backend=backend
    )
    made.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_ppo_loss: backward ran before"):
        made.loss.backward()


def test_double_backward_raises(backend, device):
    if backend == "reference":
        pytest.skip("autograd differentiates the reference twice")
    hidden_ND, values_N, weight_VD, bias_V, tokens_N, batch = inputs(3, 5, 37, device, mask="full")
    hidden_ND.requires_grad_()
    made = linear_ppo_loss(
        hidden_ND, values_N, Head(weight_VD, bias_V), tokens_N, batch, PPOLossOptions(), backend=backend
    )
    (d_ND,) = torch.autograd.grad(made.loss, hidden_ND, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_ppo_loss: its gradient cannot be differentiated again"):
        d_ND.sum().backward()


def test_leading_dimensions(backend, device, small_chunks):
    hidden_ND, values_N, weight_VD, bias_V, tokens_N, batch = inputs(12, 5, 517, device)
    flat = linear_ppo_loss(
        hidden_ND, values_N, Head(weight_VD, bias_V), tokens_N, batch, PPOLossOptions(), backend=backend
    )
    shaped = linear_ppo_loss(
        hidden_ND.view(3, 4, 5),
        values_N.view(3, 4),
        Head(weight_VD, bias_V),
        tokens_N.view(3, 4),
        PPOBatch(*(x.view(3, 4) for x in batch)),
        PPOLossOptions(),
        backend=backend,
    )
    assert shaped.logprob_N.shape == shaped.entropy_N.shape == (3, 4)
    assert shaped.loss.item() == pytest.approx(flat.loss.item(), abs=1e-7)


def test_gradcheck_of_the_reference():
    hidden_ND, values_N, weight_VD, bias_V, tokens_N, batch = inputs(3, 2, 4, "cpu")
    leaves = [x.double().requires_grad_() for x in (hidden_ND, values_N, weight_VD, bias_V)]
    batch = PPOBatch(*(x.double() if x.is_floating_point() else x for x in batch))
    options = PPOLossOptions(entropy_coef=0.1)
    run = lambda h, v, w, b: linear_ppo_loss(h, v, Head(w, b), tokens_N, batch, options, temperature=0.7).loss  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)


def test_same_as_the_two_rooms(device):
    """linear_logprob and ppo_loss one after the other, both with their chosen back ends."""
    arguments = inputs(13, 5, 517, device)
    ours = outcome(arguments, PPOLossOptions(), dtype=torch.float32, rounded_to=torch.float32, backend=None)
    hidden_ND, values_N, weight_VD, bias_V, tokens_N, batch = arguments
    made = linear_logprob_reference(hidden_ND, Head(weight_VD, bias_V), tokens_N)
    loss = ppo_loss_reference(made.logprob_N, values_N, batch, PPOLossOptions(), entropy_N=made.entropy_N).loss
    assert ours[0].item() == pytest.approx(loss.item(), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_bounded(device, monkeypatch, dtype):
    """Beyond the gradients: one chunk of logits, what belongs to single rows, and for bfloat16 dweight in float32 and a tile."""
    if device.type != "cpu":
        pytest.skip("counts CPU allocations")
    N, D, V, size = 256, 16, 50_257, dtype.itemsize  # float32 logits: 49 MiB
    monkeypatch.setattr(room, "CHUNK_BYTES", {("cpu", size): 2 * size * 2**20})
    monkeypatch.setattr(room.tiles, "TILE_BYTES", {"cpu": 2**19})
    _recycle.release()  # all memory is this call's own
    hidden_ND, values_N, weight_VD, _, tokens_N, batch = inputs(N, D, V, device, mask="none", bias=False)
    leaves = [x.to(dtype).requires_grad_() for x in (hidden_ND, weight_VD)]
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        made = linear_ppo_loss(
            leaves[0], values_N, Head(leaves[1]), tokens_N, batch, PPOLossOptions(entropy_coef=0.1), backend="cpu"
        )
        made.loss.backward()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    extra = peak - size * (N * D + V * D)
    accumulator_and_tile = 4 * V * D + 2**19 if size == 2 else 0
    assert extra <= 2 * size * 2**20 + accumulator_and_tile + 2**20, f"{extra / 2**20:.1f} MiB"


def test_gradients_keep_their_memory():
    """The memory of an earlier call's dweight is used again, but not while anyone holds it."""
    arguments = inputs(5, 64, 1031, "cpu", mask="none")  # dweight: 264 KB, which is kept

    def dweight(scale):
        hidden_ND, values_N, weight_VD, bias_V, tokens_N, batch = arguments
        weight_VD = weight_VD.clone().requires_grad_()
        made = linear_ppo_loss(
            scale * hidden_ND, values_N, Head(weight_VD, bias_V), tokens_N, batch, PPOLossOptions(), backend="cpu"
        )
        return torch.autograd.grad(made.loss, weight_VD)[0]

    first, second = dweight(1.0), dweight(2.0)
    kept = first.clone()
    assert not torch.equal(first, second)
    address, row = second.data_ptr(), first[3]
    del second
    third = dweight(1.0)
    assert third.data_ptr() == address and torch.equal(third, kept)
    del first, third
    dweight(3.0)
    assert torch.equal(row, kept[3])


def good():
    hidden_ND, values_N, weight_VD, bias_V, tokens_N, batch = inputs(2, 3, 5, "cpu")
    return dict(hidden=hidden_ND, values=values_N, head=Head(weight_VD, bias_V), tokens=tokens_N, batch=batch)


BAD = {
    r"values_N must be floating point of shape \(2,\) on cpu; got torch.float32 \(3,\)": lambda a: a.update(
        values=torch.zeros(3)
    ),
    r"batch.mask_N must be bool of shape \(2,\) on cpu; got torch.int64 \(2,\)": lambda a: a.update(
        batch=a["batch"]._replace(mask_N=torch.ones(2).long())
    ),
    r"batch.returns_N must be floating point of shape \(2,\) on cpu; got torch.int64": lambda a: a.update(
        batch=a["batch"]._replace(returns_N=torch.ones(2).long())
    ),
    r"tokens_N must be in \[0, 5\); got values from": lambda a: a.update(tokens=torch.tensor([7, 0])),
    r"head.weight_VD must have shape \(V, 3\)": lambda a: a.update(head=Head(torch.zeros(5, 2))),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    arguments = good()
    BAD[message](arguments)
    with pytest.raises(ValueError, match="linear_ppo_loss: " + message):
        linear_ppo_loss(*arguments.values(), PPOLossOptions())


def test_token_outside_the_vocabulary(backend, device):
    """A CPU looks and raises (see above); a GPU does not look, and its loss and that token's log-prob are NaN."""
    if backend != "triton":
        pytest.skip("the C++ back end and the reference run behind the check")
    hidden_ND, values_N, weight_VD, bias_V, tokens_N, batch = inputs(4, 8, 37, device, mask="none")
    tokens_N[2] = 37
    kw = dict(temperature=1.0, normalizer=None, whiten=None)
    head = Head(weight_VD, bias_V)
    made = room.BACKEND_TABLE["triton"](hidden_ND, values_N, head, tokens_N, batch, PPOLossOptions(), **kw)
    assert made.loss.isnan()
    assert made.logprob_N.isnan().tolist() == [False, False, True, False]
