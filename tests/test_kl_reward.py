import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rooms import assert_as_exact_as_torch, examples, make_mask, masks, sizes, trl_numbers

from fastppo.kernels.kl_reward import KINDS, full_kl, kl_reward, kl_reward_reference


def inputs(B, T, mask_kind, kind, device, seed=0):
    generator = torch.Generator().manual_seed(seed * 7919 + B * 1000 + T)
    logprobs_BT, noise_BT = torch.randn(B, T, generator=generator) - 2, torch.randn(B, T, generator=generator)
    mask_BT, scores_B = make_mask(mask_kind, B, T, generator), torch.randn(B, generator=generator)
    tensors = (logprobs_BT, logprobs_BT + 0.5 * noise_BT, mask_BT, scores_B, noise_BT.abs())
    *tensors, full_kl_BT = (x.to(device) for x in tensors)
    return tensors, {"kl_coef": 0.2, "kind": kind, "full_kl_BT": full_kl_BT if kind == "full" else None}


def test_matches_reference(backend, device):
    @settings(deadline=None, max_examples=examples(25))
    @given(st.integers(1, 5), sizes, masks, st.sampled_from(sorted(KINDS)), st.integers(0, 99))
    def check(B, T, mask_kind, kind, seed):
        tensors, options = inputs(B, T, mask_kind, kind, device, seed)
        double = lambda x: x.double() if x is not None and x.is_floating_point() else x  # noqa: E731
        full = {"full_kl_BT": double(options["full_kl_BT"])}
        truth = kl_reward_reference(*map(double, tensors), **(options | full))
        plain, ours = kl_reward_reference(*tensors, **options), kl_reward(*tensors, **options, backend=backend)
        for name, o, p, t in zip(ours._fields, ours, plain, truth, strict=True):
            assert_as_exact_as_torch(name, o, p, t)

    check()


@pytest.mark.parametrize("kind", ["kl", "abs", "mse"])
def test_trl_numbers(backend, device, kind):
    """TRL 0.11.4's compute_rewards on [4, 9] tokens with holes: equal where the mask counts, 0 elsewhere."""
    trl = trl_numbers()
    tensor = lambda x: torch.tensor(x, dtype=torch.float32, device=device)  # noqa: E731
    mask_BT = torch.tensor(trl["mask"], device=device).bool()
    given = (tensor(trl["logprobs"]), tensor(trl["ref_logprobs"]), mask_BT, tensor(trl["scores"]))
    made = kl_reward(*given, kl_coef=0.2, kind=kind, backend=backend)
    for ours, name in zip(made, ("rewards", "non_score", "kls"), strict=True):
        theirs = torch.where(mask_BT, tensor(trl[f"rewards_{kind}"][name]), 0.0)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_hand_worked(backend, device):
    """Two tokens count, the middle and the third; the last one and its NaN do not, so the score goes to the third."""
    nan = float("nan")
    row = lambda *x: torch.tensor([x], device=device)  # noqa: E731
    mask_BT = torch.tensor([[False, True, True, False]], device=device)
    given = (row(nan, -1.0, -2.0, nan), row(nan, -1.5, -1.0, nan), mask_BT, torch.tensor([3.0], device=device))
    made = kl_reward(*given, kl_coef=0.1, backend=backend)
    torch.testing.assert_close(made.kl_BT, row(0.0, 0.5, -1.0, 0.0))
    torch.testing.assert_close(made.rewards_BT, row(0.0, -0.05, 3.1, 0.0))


def test_fully_masked_rows_get_no_score(backend, device):
    tensors, options = inputs(3, 20, "none", "k3", device)
    assert not any(x.any() for x in kl_reward(*tensors, **options, backend=backend))


def test_no_rows(backend, device):
    tensors, options = inputs(0, 4, "full", "kl", device)
    assert kl_reward(*tensors, **options, backend=backend).rewards_BT.shape == (0, 4)


def test_full_kl_is_exact_and_survives_impossible_tokens(device):
    """KL((1/2, 1/2) || (1/4, 3/4)) = ln(2 / sqrt(3)); a token at -inf in both adds 0, not NaN."""
    ninf = float("-inf")
    policy, reference = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.75, 0.0]]).log()
    assert policy[0, 2] == ninf
    assert full_kl(policy.to(device), reference.to(device)).item() == pytest.approx(0.1438410362)


def test_bad_input_says_what_came(device):
    tensors, options = inputs(2, 8, "full", "kl", device)
    with pytest.raises(ValueError, match="kind must be one of kl, k1, abs.*got 'k4'"):
        kl_reward(*tensors, kl_coef=0.1, kind="k4")
    with pytest.raises(ValueError, match="kind 'full' needs full_kl_BT"):
        kl_reward(*tensors, kl_coef=0.1, kind="full")
    with pytest.raises(ValueError, match=r"mask_BT must be a contiguous torch.bool of shape \(2, 8\).*got torch.int64"):
        kl_reward(tensors[0], tensors[1], tensors[2].long(), tensors[3], kl_coef=0.1)
    with pytest.raises(ValueError, match=r"ref_logprobs_BT must be a contiguous torch.float32.*got torch.float64"):
        kl_reward(tensors[0], tensors[1].double(), tensors[2], tensors[3], kl_coef=0.1)
