import functools

import cuda_host
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rooms import assert_as_exact_as_torch, examples, make_mask, masks, sizes, trl_numbers

from fastppo.kernels import gae as room
from fastppo.kernels.gae import MASKED, ShapedGAEOptions, gae, gae_packed, gae_reference, shaped_gae, whitening
from fastppo.kernels.kl_reward import KINDS

ON_HOST = "cuda source on the CPU"


@pytest.fixture(params=["as it runs here", ON_HOST])
def run_backend(request, backend, monkeypatch):
    """The back end's name; once more for csrc/cuda/gae.cu itself, run by the host executor under the name of the C++ one."""
    if request.param == ON_HOST:
        if backend != "cpu":
            pytest.skip("the executor takes the C++ back end's place once")
        module = cuda_host.build()
        if isinstance(module, str):
            pytest.skip(module)
        monkeypatch.setitem(room.BACKEND_TABLE, "cpu", functools.partial(room._launch_cuda, module=module, stream=0))
    return backend


def inputs(B, T, mask_kind, device, seed=0):
    """logprobs, ref_logprobs, values, mask, scores; also serve as rewards and values."""
    generator = torch.Generator().manual_seed(seed * 7919 + B * 1000 + T)
    logprobs_BT, noise_BT, values_BT = (torch.randn(B, T, generator=generator) for _ in range(3))
    mask_BT, scores_B = make_mask(mask_kind, B, T, generator), torch.randn(B, generator=generator)
    return [x.to(device) for x in (logprobs_BT - 2, logprobs_BT - 2 + 0.3 * noise_BT, values_BT, mask_BT, scores_B)]


def double(x):
    return x.double() if x is not None and x.is_floating_point() else x


def reference(arguments, options, cast, cu_seqlens=None):
    logprobs, ref_logprobs, values, mask, scores = map(cast, arguments)
    x = room._Inputs(None, logprobs, ref_logprobs, values, mask, scores, cu_seqlens)
    return room.ShapedGAE(*room._launch_reference(x, options))


def check(ours, plain, truth):
    for name in ("advantages_BT", "returns_BT", "kl_B", "sums"):
        values = [getattr(made, name, None) for made in (ours, plain, truth)]
        if values[0] is not None:
            assert_as_exact_as_torch(name, *values, tiny=4e-6 if name == "sums" else 1e-6)


sometimes = st.tuples(
    st.sampled_from([0.0, 0.9, 1.0]), st.sampled_from([0.0, 0.95, 1.0]), st.sampled_from(sorted(KINDS)), st.sampled_from(sorted(MASKED))
)  # fmt: skip


def test_fused_matches_reference(run_backend, device):
    """KL shaping, scan, returns and sums together, padded and packed, every kind and every meaning of the mask."""

    @settings(deadline=None, max_examples=examples(25))
    @given(st.integers(1, 10), sizes, masks, sometimes, st.integers(0, 99))
    def check_one(B, T, mask_kind, choice, seed):
        gamma, lam, kind, masked = choice
        arguments = inputs(B, T, mask_kind, device, seed)
        options = ShapedGAEOptions(0.1, gamma, lam, kind, masked)
        ours = shaped_gae(*arguments, options, backend=run_backend)
        check(ours, reference(arguments, options, lambda x: x), reference(arguments, options, double))
        flat = [x.reshape(-1) for x in arguments[:4]] + arguments[4:]
        cu_seqlens = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=device)
        packed = shaped_gae(*flat, options, cu_seqlens=cu_seqlens, backend=run_backend)
        for padded_values, packed_values in zip(ours[:3], packed[:3], strict=True):
            torch.testing.assert_close(packed_values.reshape(padded_values.shape), padded_values, atol=1e-5, rtol=1e-5)

    check_one()


def test_plain_gae_matches_reference(run_backend, device):
    @settings(deadline=None, max_examples=examples(15))
    @given(st.integers(1, 10), sizes, masks, sometimes, st.integers(0, 99))
    def check_one(B, T, mask_kind, choice, seed):
        gamma, lam, _, masked = choice
        rewards_BT, _, values_BT, mask_BT, _ = inputs(B, T, mask_kind, device, seed)
        ours = gae(rewards_BT, values_BT, mask_BT, gamma=gamma, lam=lam, masked=masked, backend=run_backend)
        plain, truth = (
            gae_reference(cast(rewards_BT), cast(values_BT), mask_BT, gamma, lam, masked)
            for cast in (lambda x: x, double)
        )
        check(ours, plain, truth)

    check_one()


@pytest.mark.parametrize("lengths", [[1], [3, 0, 1025, 7], [0, 0], [5, 2049, 16, 1, 1, 1, 1, 1, 1, 40]])
def test_packed_sequences_of_any_length(run_backend, device, lengths):
    """Empty ones among them, starts at any alignment, more than one tile: each equals its own row alone."""
    N, B = sum(lengths), len(lengths)
    torch.manual_seed(N)
    logprobs_N, ref_N, values_N = torch.randn(3, N, device=device)
    scores_B = torch.randn(B, device=device)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    options = ShapedGAEOptions(0.1, 0.99, 0.95)
    ours = shaped_gae(logprobs_N, ref_N, values_N, None, scores_B, options, cu_seqlens=cu_seqlens, backend=run_backend)
    arguments = (logprobs_N, ref_N, values_N, None, scores_B)
    truth = reference(arguments, options, double, cu_seqlens)
    check(ours, reference(arguments, options, lambda x: x, cu_seqlens), truth)
    rewards_only = gae_packed(logprobs_N, values_N, cu_seqlens, gamma=0.99, lam=0.95, backend=run_backend)
    for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        alone = gae_reference(logprobs_N[None, a:b], values_N[None, a:b], torch.ones(1, b - a, dtype=torch.bool, device=device), 0.99, 0.95)  # fmt: skip
        torch.testing.assert_close(rewards_only.advantages_BT[a:b], alone.advantages_BT[0], atol=2e-5, rtol=2e-5)


def test_the_same_bits_at_any_alignment(run_backend, device):
    """Rows of 1000 tokens by 16-byte loads, and the same rows three tokens further, one by one."""
    torch.manual_seed(0)
    values = torch.randn(3, 2, 1000, device=device)
    options = dict(gamma=0.99, lam=0.95, backend=run_backend)
    aligned = gae_packed(values[0].flatten(), values[1].flatten(), torch.tensor([0, 1000, 2000], dtype=torch.int32, device=device), **options)  # fmt: skip
    shifted = [torch.cat((values[2, 0, :3], x.flatten())) for x in values[:2]]
    starts = torch.tensor([0, 3, 1003, 2003], dtype=torch.int32, device=device)
    unaligned = gae_packed(*shifted, starts, **options)
    for ours, theirs in zip(aligned[:2], unaligned[:2], strict=True):
        assert torch.equal(ours, theirs[3:])


def test_carry_is_the_row_without_its_holes(run_backend, device):
    """masked="carry" on a row with holes equals packing the True tokens."""
    logprobs_BT, ref_BT, values_BT, mask_BT, scores_B = inputs(4, 300, "holes", device)
    options = ShapedGAEOptions(0.1, 0.99, 0.9, masked="carry")
    padded = shaped_gae(logprobs_BT, ref_BT, values_BT, mask_BT, scores_B, options, backend=run_backend)
    cu_seqlens = torch.cat((mask_BT.new_zeros(1, dtype=torch.int64), mask_BT.sum(1).cumsum(0))).int()
    tight = [x[mask_BT] for x in (logprobs_BT, ref_BT, values_BT)]
    packed = shaped_gae(*tight, None, scores_B, options, cu_seqlens=cu_seqlens, backend=run_backend)
    torch.testing.assert_close(padded.advantages_BT[mask_BT], packed.advantages_BT, atol=1e-5, rtol=1e-5)


def test_lambda_one_is_return_minus_value(run_backend, device):
    """Hand-made: with gamma = lam = 1 the return of every token is what comes after it."""
    rewards_BT = torch.tensor([[0.0, 0.0, 1.0]], device=device)
    values_BT = torch.tensor([[0.2, 0.5, 0.1]], device=device)
    ones_BT = torch.ones(1, 3, dtype=torch.bool, device=device)
    made = gae(rewards_BT, values_BT, ones_BT, gamma=1.0, lam=1.0, backend=run_backend)
    torch.testing.assert_close(made.returns_BT.cpu(), torch.tensor([[1.0, 1.0, 1.0]]))
    torch.testing.assert_close(made.advantages_BT.cpu(), torch.tensor([[0.8, 0.5, 0.9]]))
    torch.testing.assert_close(made.sums.cpu().float(), torch.tensor([3.0, 2.2, 1.7]))


def test_three_meanings_of_a_hole_by_hand(run_backend, device):
    """Rewards (1, -, 2), values (0, -, 1), gamma = lam = 1/2; the last token has A = 2 - 1 = 1."""
    nan = float("nan")
    rewards_BT, values_BT = torch.tensor([[[1.0, nan, 2.0]], [[0.0, nan, 1.0]]], device=device)
    mask_BT = torch.tensor([[True, False, True]], device=device)
    first = {}
    for masked in MASKED:
        made = gae(rewards_BT, values_BT, mask_BT, gamma=0.5, lam=0.5, masked=masked, backend=run_backend)
        first[masked] = made.advantages_BT[0, 0].item()
        assert made.advantages_BT[0, 1:].tolist() == [0.0, 1.0] and made.returns_BT[0].tolist()[1:] == [0.0, 2.0]
    # zero: A1 = 0.5 * 1 - 0 + 0.25 * 1 = 0.75, A0 = 1 + 0.25 * 0.75; carry: A0 = 1 + 0.5 * 1 + 0.25 * 1
    assert first == pytest.approx({"zero": 1.1875, "stop": 1.0, "carry": 1.75})


@pytest.mark.parametrize("name", ["plain", "disc"])
def test_trl_numbers(run_backend, device, name):
    """TRL 0.11.4's compute_advantages: returns as they are, advantages after whitening() from our sums."""
    trl = trl_numbers()
    tensor = lambda x: torch.tensor(x, dtype=torch.float32, device=device)  # noqa: E731
    mask_BT = torch.tensor(trl["mask"], device=device).bool()
    recorded = trl[f"gae_{name}"]
    rewards_BT = tensor(trl["rewards_kl"]["rewards"])
    made = gae(rewards_BT, tensor(trl["values"]), mask_BT, **recorded["kw"], backend=run_backend)
    mean, rstd = whitening(made.sums)
    torch.testing.assert_close(made.returns_BT[mask_BT], tensor(recorded["returns"])[mask_BT], atol=2e-6, rtol=1e-5)
    whitened = (made.advantages_BT - mean) * rstd
    torch.testing.assert_close(whitened[mask_BT], tensor(recorded["advantages"])[mask_BT], atol=3e-6, rtol=1e-5)


def test_whitening_far_from_zero(run_backend, device):
    """Advantages of 500 +- 0.1: sums of squares in float32 would lose the variance altogether."""
    values_BT = torch.zeros(8, 200, device=device)
    rewards_BT = 500 + 0.1 * torch.randn(8, 200, device=device, generator=torch.Generator(device).manual_seed(0))
    made = gae(rewards_BT, values_BT, values_BT == 0, gamma=0.0, lam=0.0, backend=run_backend)
    mean, rstd = whitening(made.sums)
    assert mean.item() == pytest.approx(rewards_BT.double().mean().item(), rel=1e-6)
    assert rstd.item() == pytest.approx(1 / rewards_BT.double().std().item(), rel=2e-3)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_nothing_to_do(run_backend, device, shape):
    empty_BT = torch.zeros(shape, device=device)
    made = shaped_gae(
        empty_BT, empty_BT, empty_BT, empty_BT == 0, torch.ones(shape[0], device=device), ShapedGAEOptions(), backend=run_backend
    )  # fmt: skip
    assert made.advantages_BT.shape == shape and made.sums.tolist() == [0, 0, 0] and not made.kl_B.any()


def test_same_bits_every_time(run_backend, device):
    """Twice the same call, the same bits, also with another number of threads."""
    arguments, threads, made = inputs(37, 300, "holes", device), torch.get_num_threads(), []
    for n in (1, 2, 2):
        torch.set_num_threads(n)
        made.append(shaped_gae(*arguments, ShapedGAEOptions(), backend=run_backend))
    torch.set_num_threads(threads)
    if run_backend != "reference":
        assert all(torch.equal(a, b) for a, b in zip(made[0], made[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(made[1], made[2], strict=True))


def test_bad_input_says_what_came(device):
    logprobs_BT, ref_BT, values_BT, mask_BT, scores_B = inputs(2, 8, "full", device)
    with pytest.raises(ValueError, match=r"gae: rewards_BT must be .* \(2, 7\).*got torch.float32 \(2, 8\)"):
        gae(logprobs_BT, values_BT[:, :7].contiguous(), mask_BT[:, :7].contiguous(), gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="gae: masked must be one of zero, stop, carry; got 'none'"):
        gae(logprobs_BT, values_BT, mask_BT, gamma=1.0, lam=1.0, masked="none")
    with pytest.raises(ValueError, match=r"values_BT must be a contiguous.*with stride \(1, 2\)"):
        gae(logprobs_BT, values_BT.T.contiguous().T, mask_BT, gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match=r"gae_packed: cu_seqlens must be a contiguous torch.int32"):
        gae_packed(logprobs_BT[0], values_BT[0], torch.tensor([0, 8], device=device), gamma=1.0, lam=1.0)
    with pytest.raises(RuntimeError, match="gae: backend 'tpu' was asked for but gae has only cuda, triton, cpu"):
        shaped_gae(logprobs_BT, ref_BT, values_BT, mask_BT, scores_B, ShapedGAEOptions(), backend="tpu")
