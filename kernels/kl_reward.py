"""Per-token reward: minus kl_coef times the KL from the reference policy, plus the score on the last token.

    d          = logprob - ref_logprob
    kl         = d ("kl", "k1"); |d| ("abs"); d^2 / 2 ("mse", "k2"); exp(-d) - 1 + d ("k3"); the exact KL ("full")
    non_score  = -kl_coef * kl
    reward     = non_score, and + score at the last True of the row

Suffixes: B sequences, T response tokens, V vocabulary. mask_BT is True where a token counts; everything is 0 where it is
False, whatever stands there. A row without a True gets no score. Not differentiable: rewards are data to PPO.
Bound by memory: 9 bytes read and 12 written per token. The fused gae.shaped_gae does this inside the GAE launch.
k1, k2, k3: Schulman, "Approximating KL divergence", 2020. kl, abs, mse, full: Ziegler et al. 2019 as TRL has them.
"""

from typing import NamedTuple

import torch

from fastppo.kernels._backend import extension, pick
from fastppo.kernels._triton import tl, triton

# name -> number in csrc/cpu/kl_reward.h, csrc/cuda/gae.cu and the Triton kernels
KINDS = {"kl": 0, "k1": 0, "abs": 1, "mse": 2, "k2": 2, "k3": 3, "full": 4}


class KLReward(NamedTuple):
    """All float32 [B, T], 0 where mask_BT is False."""

    rewards_BT: torch.Tensor
    non_score_BT: torch.Tensor
    kl_BT: torch.Tensor


def full_kl(logits: torch.Tensor, ref_logits: torch.Tensor) -> torch.Tensor:
    """KL(policy || reference) in nats over the last dimension (V) of two logits tensors, float32.

    A token of probability 0 under the policy adds 0, also where the reference has -inf.
    """
    logp_V, ref_logp_V = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    p_V = logp_V.exp()
    return torch.where(p_V > 0, p_V * (logp_V - ref_logp_V), torch.zeros_like(p_V)).sum(-1)


def kl_reference(logprobs_BT, ref_logprobs_BT, mask_BT, kind, full_kl_BT=None) -> torch.Tensor:
    """The KL column of the table above."""
    d_BT = full_kl_BT if kind == "full" else logprobs_BT - ref_logprobs_BT
    d_BT = torch.where(mask_BT, d_BT, torch.zeros_like(d_BT))
    return {
        "abs": lambda: d_BT.abs(),
        "mse": lambda: 0.5 * d_BT**2,
        "k2": lambda: 0.5 * d_BT**2,
        "k3": lambda: (-d_BT).exp() - 1 + d_BT,
    }.get(kind, lambda: d_BT)()


def kl_reward_reference(
    logprobs_BT, ref_logprobs_BT, mask_BT, scores_B, *, kl_coef, kind="kl", full_kl_BT=None
) -> KLReward:
    """The definition above in plain PyTorch, any float dtype."""
    kl_BT = kl_reference(logprobs_BT, ref_logprobs_BT, mask_BT, kind, full_kl_BT)
    non_score_BT = -kl_coef * kl_BT
    trues_after_BT = mask_BT.int().flip(1).cumsum(1).flip(1)
    last_BT = mask_BT & (trues_after_BT == 1)
    return KLReward(torch.where(last_BT, non_score_BT + scores_B[:, None], non_score_BT), non_score_BT, kl_BT)


# --- Triton ---


@triton.jit
def kl_of(d, KIND: tl.constexpr):
    """One token's KL from d = logprob - ref_logprob (KIND 4: d is the KL)."""
    kl = d
    if KIND == 1:
        kl = tl.abs(d)
    elif KIND == 2:
        kl = 0.5 * d * d
    elif KIND == 3:
        kl = (tl.exp(-d) - 1.0) + d
    return kl


@triton.jit
def last_true(mask_T, T, BLOCK: tl.constexpr):
    """Index of the last True of a row, -1 where there is none."""
    last = tl.full([BLOCK], -1, tl.int32)
    for start in range(0, T, BLOCK):
        t = start + tl.arange(0, BLOCK)
        last = tl.maximum(last, tl.where(tl.load(mask_T + t, mask=t < T, other=0) != 0, t, -1))
    return tl.max(last)


@triton.jit
def _kl_reward_kernel(
    logprobs_BT, ref_BT, mask_BT, scores_B, rewards_BT, non_score_BT, kl_BT, T, kl_coef,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * T  # int64: B * T may pass 2**31
    last = last_true(mask_BT + row, T, BLOCK)
    score = tl.load(scores_B + tl.program_id(0))
    for start in range(0, T, BLOCK):
        t = start + tl.arange(0, BLOCK)
        on = tl.load(mask_BT + row + t, mask=t < T, other=0) != 0
        d = tl.load(ref_BT + row + t, mask=t < T, other=0.0)  # `on` as a mask would make the loads 4 bytes wide
        if KIND != 4:
            d = tl.load(logprobs_BT + row + t, mask=t < T, other=0.0) - d
        kl = kl_of(tl.where(on, d, 0.0), KIND)
        tl.store(kl_BT + row + t, kl, mask=t < T)
        tl.store(non_score_BT + row + t, -kl_coef * kl, mask=t < T)
        tl.store(rewards_BT + row + t, -kl_coef * kl + tl.where(t == last, score, 0.0), mask=t < T)


# --- launchers ---


def _kl_reward_triton(logprobs_BT, ref_logprobs_BT, mask_BT, scores_B, *, kl_coef, kind, full_kl_BT) -> KLReward:
    ref_BT = full_kl_BT if kind == "full" else ref_logprobs_BT
    outputs = KLReward(*(torch.empty_like(ref_BT) for _ in range(3)))
    B, T = ref_BT.shape
    if ref_BT.numel():
        block = min(1024, triton.next_power_of_2(T))
        _kl_reward_kernel[(B,)](
            logprobs_BT, ref_BT, mask_BT, scores_B, *outputs, T, float(kl_coef), KIND=KINDS[kind], BLOCK=block
        )
    return outputs


def _kl_reward_cpu(logprobs_BT, ref_logprobs_BT, mask_BT, scores_B, *, kl_coef, kind, full_kl_BT) -> KLReward:
    ref_BT = full_kl_BT if kind == "full" else ref_logprobs_BT
    outputs = KLReward(*(torch.empty_like(ref_BT) for _ in range(3)))
    tensors = (logprobs_BT, ref_BT, mask_BT, scores_B, *outputs)
    extension().kl_reward(*(x.data_ptr() for x in tensors), *ref_BT.shape, kl_coef, KINDS[kind])
    return outputs


BACKEND_TABLE = {"triton": _kl_reward_triton, "cpu": _kl_reward_cpu, "reference": kl_reward_reference}


def check_kind(op: str, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"{op}: kind must be one of {', '.join(KINDS)}; got {kind!r}")


def check_tensors(op: str, shape: tuple, device: torch.device, floats: dict, others: dict) -> None:
    """Every tensor contiguous, on `device`, float32 [shape] (floats), or as others says: name -> (tensor, dtype, shape)."""
    wanted = {name: (x, torch.float32, shape) for name, x in floats.items()} | others
    for name, (x, dtype, size) in wanted.items():
        if x.shape != size or x.dtype != dtype or x.device != device or not x.is_contiguous():
            raise ValueError(
                f"{op}: {name} must be a contiguous {dtype} of shape {tuple(size)} on {device}; "
                f"got {x.dtype} {tuple(x.shape)} with stride {x.stride()} on {x.device}"
            )


def kl_reward(
    logprobs_BT: torch.Tensor,
    ref_logprobs_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    scores_B: torch.Tensor,
    *,
    kl_coef: float,
    kind: str = "kl",
    full_kl_BT: torch.Tensor | None = None,
    backend: str | None = None,
) -> KLReward:
    """Return (rewards_BT, non_score_BT, kl_BT), float32, by the formula above.

    logprobs_BT, ref_logprobs_BT: float32 nats. mask_BT: bool. scores_B: float32. kind: "kl" (= "k1"), "abs", "mse"
    (= "k2"), "k3", or "full" with full_kl_BT (from full_kl). backend: "triton", "cpu", "reference"; None picks.
    Raises ValueError on a wrong shape, dtype, layout or kind; RuntimeError if `backend` cannot run here.
    """
    check_kind("kl_reward", kind)
    if (kind == "full") != (full_kl_BT is not None):
        raise ValueError(f"kl_reward: kind {kind!r} {'needs' if kind == 'full' else 'does not take'} full_kl_BT")
    floats = {"logprobs_BT": logprobs_BT, "ref_logprobs_BT": ref_logprobs_BT}
    if full_kl_BT is not None:
        floats["full_kl_BT"] = full_kl_BT
    shape, device = logprobs_BT.shape, logprobs_BT.device
    if len(shape) != 2:
        raise ValueError(f"kl_reward: logprobs_BT must have two dimensions (B, T); got {tuple(shape)}")
    others = {"mask_BT": (mask_BT, torch.bool, shape), "scores_B": (scores_B, torch.float32, shape[:1])}
    check_tensors("kl_reward", shape, device, floats, others)
    run = pick("kl_reward", BACKEND_TABLE, device, backend)
    with torch.no_grad():
        return run(logprobs_BT, ref_logprobs_BT, mask_BT, scores_B, kl_coef=kl_coef, kind=kind, full_kl_BT=full_kl_BT)
