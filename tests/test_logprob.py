import math

import cuda_host
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_cases import DTYPES, TRAPS, assert_as_exact_as_torch, far_apart, off_by_8_bytes, tiny_of

from fastppo.kernels import logprob as room
from fastppo.kernels.logprob import logprob, logprob_reference

# single token; odd; no power of two; a block of 2048, one more, some blocks; Qwen's vocabulary (2^7 * 1187)
SHAPES = [(1, 1), (3, 37), (5, 517), (2, 2048), (2, 2049), (3, 5001), (2, 151_936)]


def outcome(logits_NV, tokens_N, g_N, h_N, *, dtype, temperature=1.0, backend="reference", **kw):
    """logprob, entropy and dlogits of sum(g logprob + h entropy), computed in `dtype`."""
    leaf_NV = logits_NV.to(dtype).detach().clone().requires_grad_()
    if backend == "reference":
        made = logprob_reference(leaf_NV, tokens_N, temperature)
    else:
        made = logprob(leaf_NV, tokens_N, temperature=temperature, backend=backend, **kw)
    torch.autograd.backward(made, [g_N.to(made[0].dtype), h_N.to(made[1].dtype)])
    return made.logprob_N, made.entropy_N, leaf_NV.grad


def floor(logits_NV, temperature) -> float:
    """A log-prob is a difference of two numbers as large as the logits, each rounded: without fused products (at -O1, say) that is
    its error even where it is 0, at one token of one."""
    finite = logits_NV.float()[logits_NV.isfinite()].abs()
    return 2e-7 * min(64.0, max(1.0, float(finite.max()) / temperature if len(finite) else 0.0))


def check(logits_NV, tokens_N, g_N, h_N, *, dtype, temperature, backend):
    logits_NV = logits_NV.to(dtype)  # the same rounded logits for all three
    truth = outcome(logits_NV, tokens_N, g_N, h_N, dtype=torch.float64, temperature=temperature)
    plain = outcome(logits_NV, tokens_N, g_N, h_N, dtype=dtype, temperature=temperature)
    ours = outcome(logits_NV, tokens_N, g_N, h_N, dtype=dtype, temperature=temperature, backend=backend)
    for name, o, p, t in zip(("logprob", "entropy", "dlogits"), ours, plain, truth, strict=True):
        exact = (1e-6, floor(logits_NV, temperature)) if name != "dlogits" else (tiny_of(dtype), 2e-6)
        assert_as_exact_as_torch(name, o, p, t, *exact)
    assert not (ours[0] > 0).any() and not (ours[1] < 0).any()


def inputs(N, V, device, seed=0, spread=4.0):
    generator = torch.Generator().manual_seed(seed)
    logits_NV = torch.randn(N, V, generator=generator) * spread
    tokens_N = torch.randint(0, V, (N,), generator=generator)
    g_N, h_N = torch.randn(2, N, generator=generator)
    return tuple(x.to(device) for x in (logits_NV, tokens_N, g_N, h_N))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(backend, device, dtype, shape):
    check(*inputs(*shape, device), dtype=dtype, temperature=1.0, backend=backend)


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_traps(backend, device, trap, dtype):
    """The target may be a banned token: log-prob -inf, as torch's."""
    logits_NV, tokens_N, g_N, h_N = inputs(6, 517, "cpu")
    logits_NV = TRAPS[trap](logits_NV).to(dtype)
    if trap in ("bans", "one left", "late"):
        tokens_N = logits_NV.argmax(-1)
    arguments = [x.to(device) for x in (logits_NV, tokens_N, g_N, h_N)]
    check(*arguments, dtype=dtype, temperature=0.7, backend=backend)


@settings(deadline=None, max_examples=25)
@given(
    N=st.integers(0, 5),
    V=st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 517, 1000, 4097])),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([1.0, 0.3, 2.5]),
    layout=st.sampled_from(["contiguous", "drop last", "every other row", "unaligned", "columns apart", "transposed"]),
    seed=st.integers(0, 99),
)
def _strides(backend, device, N, V, dtype, temperature, layout, seed):
    logits_NV, tokens_N, g_N, h_N = inputs(N, V, device, seed)
    logits_NV = logits_NV.to(dtype)
    view_NV = {
        "contiguous": lambda: logits_NV.clone(),
        "drop last": lambda: torch.cat([logits_NV, logits_NV])[:N],
        "every other row": lambda: logits_NV.repeat_interleave(2, 0)[::2],
        "unaligned": lambda: torch.cat([logits_NV.new_zeros(1), logits_NV.reshape(-1)])[1:].view(N, V),
        "columns apart": lambda: logits_NV.repeat_interleave(2, 1)[:, ::2],
        "transposed": lambda: logits_NV.t().contiguous().t(),
    }[layout]()
    leaf_NV = view_NV.detach().requires_grad_()
    made = logprob(leaf_NV, tokens_N, temperature=temperature, backend=backend)
    torch.autograd.backward(made, [g_N, h_N])
    truth = outcome(logits_NV, tokens_N, g_N, h_N, dtype=torch.float64, temperature=temperature)
    plain = outcome(logits_NV, tokens_N, g_N, h_N, dtype=dtype, temperature=temperature)
    for name, o, p, t in zip(("logprob", "entropy", "dlogits"), (*made, leaf_NV.grad), plain, truth, strict=True):
        exact = (1e-6, floor(logits_NV, temperature)) if name != "dlogits" else (tiny_of(dtype), 2e-6)
        assert_as_exact_as_torch(name, o, p, t, *exact)


def test_any_stride(backend, device):
    _strides(backend, device)


def test_batched_view_without_last_position(backend, device):
    """logits[:, :-1] of [B, T, V], the case of every trainer: rows with two strides, and no copy of the logits."""
    logits_BTV = torch.randn(3, 5, 517, device=device)
    tokens_BT = torch.randint(0, 517, (3, 5), device=device)
    view_BTV = logits_BTV[:, :-1]
    layout = room.row_layout(view_BTV)
    assert layout == room.RowLayout(12, 4, 5 * 517, 517)
    ours = logprob(view_BTV, tokens_BT[:, 1:], backend=backend)
    truth = logprob_reference(view_BTV.double(), tokens_BT[:, 1:])
    for o, t in zip(ours, truth, strict=True):
        assert o.shape == (3, 4)
        torch.testing.assert_close(o.double(), t, atol=5e-6, rtol=0)


def test_by_hand(backend, device):
    """logits ln 1, ln 2, ln 5 -> p = 1/8, 2/8, 5/8; token 1; at temperature 1/2 p is proportional to 1, 4, 25."""
    logits_NV = torch.tensor([[0.0, math.log(2), math.log(5)]], device=device, requires_grad=True)
    tokens_N = torch.tensor([1], device=device)
    made = logprob(logits_NV, tokens_N, backend=backend)
    assert made.logprob_N.item() == pytest.approx(math.log(2 / 8), abs=1e-6)
    entropy = math.log(8) - 2 / 8 * math.log(2) - 5 / 8 * math.log(5)
    assert made.entropy_N.item() == pytest.approx(entropy, abs=1e-6)
    made.logprob_N.sum().backward()
    assert logits_NV.grad.tolist()[0] == pytest.approx([-1 / 8, 6 / 8, -5 / 8], abs=1e-6)
    half = logprob(logits_NV.detach().requires_grad_(), tokens_N, temperature=0.5, backend=backend)
    assert half.logprob_N.item() == pytest.approx(math.log(4 / 30), abs=1e-6)
    (d_NV,) = torch.autograd.grad(
        logprob(logits_NV, tokens_N, temperature=0.5, backend=backend).logprob_N.sum(), logits_NV
    )
    assert d_NV.tolist()[0] == pytest.approx([-2 / 30, 52 / 30, -50 / 30], abs=1e-6)  # 1/T exactly once


def test_more_than_2_31_elements_by_stride(backend, device):
    """Forward and backward over rows 2^30 elements apart: the strides are read, not the memory."""
    values_NV = torch.randn(3, 40, device=device).bfloat16()  # rows of both begin at 16 bytes: the same order of sums
    tokens_N = torch.tensor([0, 36, 20], device=device)
    made = []
    for logits_NV in (far_apart(values_NV), values_NV):
        leaf_NV = logits_NV.requires_grad_()
        out = logprob(leaf_NV, tokens_N, backend=backend)
        made.append([*out, torch.autograd.grad(out[0].sum() + out[1].sum(), leaf_NV)[0]])
    for far, near in zip(*made, strict=True):
        torch.testing.assert_close(far, near, atol=0, rtol=0)


def test_unaligned_labels(backend, device):
    logits_NV, tokens_N, g_N, h_N = inputs(5, 37, device)
    made = (
        outcome(logits_NV, tokens, g_N, h_N, dtype=torch.float32, backend=backend)
        for tokens in (tokens_N, off_by_8_bytes(tokens_N))
    )
    assert all(torch.equal(aligned, unaligned) for aligned, unaligned in zip(*made, strict=True))


def _token_outside(run, device):
    logits_NV, tokens_N = torch.zeros(3, 5, device=device, requires_grad=True), torch.tensor([-100, 2, 5])
    made = run(logits_NV, tokens_N.to(device), 1.0, False)
    assert made.logprob_N.isnan().tolist() == [True, False, True] and made.entropy_N.isfinite().all()
    assert torch.autograd.grad(made.logprob_N.sum(), logits_NV)[0].isfinite().all()


def test_token_outside_the_vocabulary(backend, device):
    """-100 is no label here. The CPU looks and raises; a GPU does not look (that would wait): NaN, and no bad address."""
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"tokens_N must be in \[0, 5\); got values from -100 to 5"):
            logprob(torch.zeros(3, 5), torch.tensor([-100, 2, 5]), backend=backend)
    if backend in ("triton", "cuda"):  # past the check
        _token_outside(room.BACKEND_TABLE[backend], device)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_logits_are_not_hidden(backend, device, bad):
    logits_NV = torch.randn(2, 300, device=device)
    logits_NV[0, 100] = bad
    made = logprob(logits_NV, torch.tensor([5, 5], device=device), backend=backend)
    assert made.logprob_N[0].isnan() and made.entropy_N[0].isnan()
    assert made.logprob_N[1].isfinite() and made.entropy_N[1].isfinite()


def test_row_of_minus_infinity_is_nan(backend, device):
    logits_NV = torch.full((1, 300), -torch.inf, device=device)
    made = logprob(logits_NV, torch.tensor([5], device=device), backend=backend)
    assert made.logprob_N.isnan().all() and made.entropy_N.isnan().all()


def test_banned_token_is_minus_infinity(backend, device):
    logits_NV = torch.zeros(1, 300, device=device)
    logits_NV[0, 5] = -torch.inf
    made = logprob(logits_NV, torch.tensor([5], device=device), backend=backend)
    assert made.logprob_N.item() == -math.inf and made.entropy_N.item() == pytest.approx(math.log(299), abs=1e-5)


def test_zero_upstream_rows_get_zero(backend, device):
    logits_NV, tokens_N, g_N, h_N = inputs(4, 517, device)
    if backend != "reference":
        logits_NV[1] = torch.nan  # a row that no loss uses does not spread
    logits_NV.requires_grad_()
    live_N = torch.tensor([1.0, 0.0, 1.0, 0.0], device=device)
    torch.autograd.backward(logprob(logits_NV, tokens_N, backend=backend), [g_N * live_N, h_N * live_N])
    assert (logits_NV.grad[[1, 3]] == 0).all() and (logits_NV.grad[[0, 2]] != 0).all()


def test_expanded_upstream_gradient(backend, device):
    """sum() sends a gradient of stride 0."""
    logits_NV, tokens_N, *_ = inputs(4, 517, device)
    ours_NV, truth_NV = logits_NV.clone().requires_grad_(), logits_NV.double().requires_grad_()
    sum(x.sum() for x in logprob(ours_NV, tokens_N, backend=backend)).backward()
    sum(x.sum() for x in logprob_reference(truth_NV, tokens_N)).backward()
    torch.testing.assert_close(ours_NV.grad.double(), truth_NV.grad, atol=2e-6, rtol=0)


def test_one_output_unused(backend, device):
    logits_NV, tokens_N, *_ = inputs(4, 517, device)
    for use in (0, 1):
        ours_NV, truth_NV = logits_NV.clone().requires_grad_(), logits_NV.double().requires_grad_()
        logprob(ours_NV, tokens_N, backend=backend)[use].sum().backward()
        logprob_reference(truth_NV, tokens_N)[use].sum().backward()
        torch.testing.assert_close(ours_NV.grad.double(), truth_NV.grad, atol=2e-6, rtol=0)


def test_gradcheck_of_the_reference():
    logits_NV = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    tokens_N = torch.tensor([0, 4])
    assert torch.autograd.gradcheck(lambda z: tuple(logprob(z, tokens_N, temperature=0.7)), logits_NV)
    banned = torch.tensor([0.0, -torch.inf, 0.0, 0.0, 0.0])
    made = logprob(logits_NV.detach().add(banned).requires_grad_(), tokens_N, backend="reference")
    assert made.entropy_N.isfinite().all()


def test_double_backward_raises(backend, device):
    if backend == "reference":
        pytest.skip("autograd differentiates the reference twice")
    logits_NV, tokens_N, *_ = inputs(2, 37, device)
    logits_NV.requires_grad_()
    made = logprob(logits_NV, tokens_N, backend=backend)
    (d_NV,) = torch.autograd.grad(made.logprob_N.sum(), logits_NV, create_graph=True)
    with pytest.raises(RuntimeError, match="logprob: its gradient cannot be differentiated again"):
        d_NV.sum().backward()


def test_retained_graph_runs_twice(backend, device):
    logits_NV, tokens_N, *_ = inputs(2, 37, device)
    logits_NV.requires_grad_()
    made = logprob(logits_NV, tokens_N, backend=backend)
    first, second = (torch.autograd.grad(made.logprob_N.sum(), logits_NV, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_inplace_backward(backend, device):
    if backend == "reference":
        pytest.skip("the reference keeps the logits")
    logits_NV, tokens_N, g_N, h_N = inputs(4, 517, device)
    g_N[2] = h_N[2] = 0
    leaf_NV = logits_NV.clone().requires_grad_()
    made_NV = leaf_NV * 1.0
    made = logprob(made_NV, tokens_N, inplace_backward=True, backend=backend)
    (d_NV,) = torch.autograd.grad(made, made_NV, [g_N, h_N], retain_graph=True)
    assert d_NV.data_ptr() == made_NV.data_ptr()
    assert torch.equal(d_NV, outcome(logits_NV, tokens_N, g_N, h_N, dtype=torch.float32, backend=backend)[2]) or (
        backend != "cpu"
    )
    torch.testing.assert_close(
        d_NV, outcome(logits_NV, tokens_N, g_N, h_N, dtype=torch.float32, backend=backend)[2], atol=1e-6, rtol=1e-5
    )
    with pytest.raises(RuntimeError, match="inplace_backward=True and has overwritten"):
        torch.autograd.grad(made, made_NV, [g_N, h_N])


def test_inplace_backward_tells_other_users_of_the_logits(backend, device):
    if backend == "reference":
        pytest.skip("the reference keeps the logits")
    logits_NV, tokens_N, *_ = inputs(4, 37, device)
    made_NV = logits_NV.requires_grad_() * 1.0
    other = (made_NV**2).sum()
    made = logprob(made_NV, tokens_N, inplace_backward=True, backend=backend)
    torch.autograd.grad(made.logprob_N.sum(), made_NV)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_chosen_by_default_runs(device):
    logits_NV, tokens_N, *_ = inputs(2, 37, device)
    assert logprob(logits_NV, tokens_N).logprob_N.shape == (2,)
    assert logprob(logits_NV.double(), tokens_N).logprob_N.dtype == torch.float64


BAD = {
    r"tokens_N must be in \[0, 5\); got values from -100 to 1": dict(tokens=torch.tensor([-100, 1])),
    r"tokens_N must be in \[0, 5\); got values from 0 to 5": dict(tokens=torch.tensor([0, 5])),
    r"tokens_N must be torch.int64 of shape \(2,\) on cpu; got torch.int64 \(3,\)": dict(tokens=torch.zeros(3).long()),
    r"tokens_N must be torch.int64 of shape \(2,\) on cpu; got torch.int32": dict(tokens=torch.zeros(2).int()),
    r"temperature must be a positive finite number; got 0": dict(temperature=0),
    r"temperature must be a positive finite number; got nan": dict(temperature=float("nan")),
    r"logits_NV must be floating point of shape \[..., V\] with V > 0; got torch.int64": dict(
        logits=torch.zeros(2, 5).long()
    ),
    r"logits_NV must be floating point of shape \[..., V\] with V > 0; got torch.float32 \(2, 0\)": dict(
        logits=torch.zeros(2, 0)
    ),
    r"inplace_backward=True needs logits that are computed": dict(
        logits=torch.zeros(2, 5, requires_grad=True), inplace_backward=True
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    arguments = {"logits": torch.zeros(2, 5), "tokens": torch.zeros(2).long(), **BAD[message]}
    with pytest.raises(ValueError, match="logprob: " + message):
        logprob(arguments.pop("logits"), arguments.pop("tokens"), **arguments)


@pytest.fixture(scope="module")
def cuda_on_cpu():
    """csrc/cuda/logprob.cu run on the CPU by tests/cuda_host."""
    module = cuda_host.build()
    if isinstance(module, str):
        pytest.skip(module)
    return room._run(room.c_launcher(lambda: module, "cuda_", lambda: (0,)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:-1] + [(1, 20_011)])  # 20,011: four vectors in flight, a tail, all dtypes
def test_cuda_source_on_the_cpu(cuda_on_cpu, monkeypatch, dtype, shape):
    monkeypatch.setitem(room.BACKEND_TABLE, "cpu", cuda_on_cpu)
    check(*inputs(*shape, "cpu"), dtype=dtype, temperature=0.7, backend="cpu")


@pytest.mark.parametrize("trap", TRAPS)
def test_cuda_source_on_the_cpu_in_traps(cuda_on_cpu, monkeypatch, trap):
    monkeypatch.setitem(room.BACKEND_TABLE, "cpu", cuda_on_cpu)
    test_traps("cpu", "cpu", trap, torch.bfloat16)


def test_cuda_source_on_the_cpu_other_cases(cuda_on_cpu, monkeypatch):
    monkeypatch.setitem(room.BACKEND_TABLE, "cpu", cuda_on_cpu)
    device = torch.device("cpu")
    test_batched_view_without_last_position("cpu", device)
    test_row_of_minus_infinity_is_nan("cpu", device)
    test_banned_token_is_minus_infinity("cpu", device)
    test_zero_upstream_rows_get_zero("cpu", device)
    test_more_than_2_31_elements_by_stride("cpu", device)
    test_unaligned_labels("cpu", device)
    _token_outside(cuda_on_cpu, device)
    for bad in (math.nan, math.inf):
        test_bad_logits_are_not_hidden("cpu", device, bad)
    _strides("cpu", device)
