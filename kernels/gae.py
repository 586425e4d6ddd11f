"""Generalized advantage estimation over padded rows or packed sequences, with KL shaping in the same launch on request.

    delta[t]     = reward[t] + gamma * value[t+1] - value[t]
    advantage[t] = delta[t] + gamma * lam * advantage[t+1]            return[t] = advantage[t] + value[t]

after the last token value and advantage are 0. Outputs are 0 where mask_BT is False; what a False token is:

    masked="zero"   a state of value 0 and reward 0 that the scan passes through (TRL 0.11.4)
    masked="stop"   an end: the token before it sees value 0 and advantage 0 after itself
    masked="carry"  not there: the scan goes from True token to True token (verl, NeMo-RL)

Suffixes: B sequences, T response tokens, N packed tokens. moments_3 = (count, mean, sum of squared distances from the mean)
of the advantages over the mask: enough to whiten them inside ppo_loss, and exact to add over ranks (`sums`).
Bound by memory: 9 bytes read (13 when shaping) and 8 written per token. Same bits on every run.
Schulman et al. 2016, equation 16; the scan's composition rule: Blelloch 1990.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastppo.kernels import _recycle
from fastppo.kernels._backend import extension, pick
from fastppo.kernels._gae_triton import gae_kernel
from fastppo.kernels._tickets import current_stream, ticket
from fastppo.kernels._triton import triton
from fastppo.kernels.kl_reward import KINDS, check_kind, check_tensors, kl_reward_reference

MASKED = {"zero": 0, "stop": 1, "carry": 2}  # numbers as in csrc/cpu/gae.cpp, csrc/cuda/gae.cu and the Triton kernel


class GAE(NamedTuple):
    """advantages and returns: float32, like values. moments_3: (count, mean, squared distances) of the advantages."""

    advantages_BT: torch.Tensor
    returns_BT: torch.Tensor
    moments_3: torch.Tensor

    @property
    def sums(self) -> torch.Tensor:
        """float64 [3]: count, sum, sum of squares of the advantages over the mask. Add them over ranks or batches."""
        count, mean, m2 = self.moments_3.double().unbind()
        return torch.stack((count, count * mean, m2 + count * mean * mean))


class ShapedGAE(NamedTuple):
    """As GAE, and kl_B: each sequence's KL summed over its mask."""

    advantages_BT: torch.Tensor
    returns_BT: torch.Tensor
    kl_B: torch.Tensor
    moments_3: torch.Tensor

    sums = GAE.sums


@dataclass(frozen=True)
class ShapedGAEOptions:
    """Coefficients of the fused KL shaping and GAE."""

    kl_coef: float = 0.2  # weight of the KL penalty
    gamma: float = 1.0  # discount, in [0, 1]
    lam: float = 0.95  # lambda, in [0, 1]
    kind: str = "kl"  # KL estimator, one of kl_reward.KINDS ("full": ref_logprobs holds the KL itself)
    masked: str = "zero"  # what a False token is: "zero", "stop" or "carry"


def whitening(sums_3: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """(mean, 1 / std) float32 [2] from `sums` (added over ranks), for ppo_loss's whiten=. Unbiased variance, as TRL."""
    count, total, squares = sums_3.unbind()
    mean = total / count.clamp(min=1)
    variance = (squares - total * mean).clamp(min=0) / (count - 1).clamp(min=1)
    return torch.stack((mean, (variance + eps).rsqrt())).float()


def gae_reference(rewards_BT, values_BT, mask_BT, gamma, lam, masked="zero") -> GAE:
    """The definition above, one step at a time, any float dtype."""
    zero_BT = torch.zeros_like(values_BT)
    rewards_BT, values_BT = torch.where(mask_BT, rewards_BT, zero_BT), torch.where(mask_BT, values_BT, zero_BT)
    advantages_BT = torch.zeros_like(values_BT)
    next_value_B = next_advantage_B = values_BT.new_zeros(len(values_BT))
    for t in reversed(range(values_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B, value_B = delta_B + gamma * lam * next_advantage_B, values_BT[:, t]
        if masked == "stop":
            advantage_B = advantage_B * mask_BT[:, t]
        if masked == "carry":
            advantage_B = torch.where(mask_BT[:, t], advantage_B, next_advantage_B)
            value_B = torch.where(mask_BT[:, t], value_B, next_value_B)
        advantages_BT[:, t] = next_advantage_B = advantage_B
        next_value_B = value_B
    advantages_BT = torch.where(mask_BT, advantages_BT, zero_BT)
    counted = advantages_BT[mask_BT].double()
    mean = counted.sum() / max(len(counted), 1)
    moments_3 = torch.stack((mean.new_tensor(len(counted)), mean, ((counted - mean) ** 2).sum()))
    return GAE(advantages_BT, advantages_BT + values_BT, moments_3)


def _pad(x_N, cu_seqlens, fill=0):
    rows = [x_N[a:b] for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def _launch_reference(x: "_Inputs", o: ShapedGAEOptions):
    mask_BT = x.mask_BT if x.mask_BT is not None else torch.ones_like(x.values_BT, dtype=torch.bool)
    tensors = [x.values_BT, mask_BT, *(y for y in (x.rewards_BT, x.logprobs_BT, x.ref_BT) if y is not None)]
    if x.cu_seqlens is not None:
        mask_N, tensors = mask_BT, [_pad(y, x.cu_seqlens) for y in tensors]
        in_rows_BT = _pad(torch.ones_like(mask_N), x.cu_seqlens)
    values_BT, mask_BT, *given = tensors
    kl_B = None
    if x.rewards_BT is None:
        given = given if len(given) == 2 else [given[0], given[0]]
        full_kl_BT = given[1] if o.kind == "full" else None
        shaped = kl_reward_reference(*given, mask_BT, x.scores_B, kl_coef=o.kl_coef, kind=o.kind, full_kl_BT=full_kl_BT)
        given, kl_B = [shaped.rewards_BT], shaped.kl_BT.sum(1)
    made = gae_reference(given[0], values_BT, mask_BT, o.gamma, o.lam, o.masked)
    if x.cu_seqlens is None:
        return *made[:2], kl_B, made.moments_3
    return made.advantages_BT[in_rows_BT], made.returns_BT[in_rows_BT], kl_B, made.moments_3


class _Inputs(NamedTuple):
    """What every launcher takes: rewards, or log-probs and reference (and scores); cu_seqlens where packed ([N] tensors)."""

    rewards_BT: torch.Tensor | None
    logprobs_BT: torch.Tensor | None
    ref_BT: torch.Tensor | None
    values_BT: torch.Tensor
    mask_BT: torch.Tensor | None
    scores_B: torch.Tensor | None
    cu_seqlens: torch.Tensor | None

    @property
    def rows(self) -> int:
        return len(self.cu_seqlens) - 1 if self.cu_seqlens is not None else self.values_BT.shape[0]


# --- launchers: (_Inputs, ShapedGAEOptions) -> advantages, returns, kl_B or None, moments_3 ---


def _gpu_outputs(x: _Inputs, stream: int):
    """advantages, returns, kl_B or None, moments_3, the rows' partial moments, and the stream's counter (0 between launches)."""
    values_BT, B = x.values_BT, x.rows
    work = torch.empty(4 * B + 3, dtype=torch.float32, device=values_BT.device)
    kl_B = None if x.scores_B is None else work[3 * B : 4 * B]
    moments_3 = work[4 * B :]
    counter = ticket(values_BT.device, stream)
    return torch.empty_like(values_BT), torch.empty_like(values_BT), kl_B, moments_3, work, counter


def _launch_triton(x: _Inputs, o: ShapedGAEOptions):
    B, packed = x.rows, x.cu_seqlens is not None
    advantages_BT, returns_BT, kl_B, moments_3, work, counter = _gpu_outputs(x, current_stream(x.values_BT.device))
    if B == 0:
        return advantages_BT, returns_BT, kl_B, moments_3.zero_()
    T = 0 if packed else x.values_BT.shape[1]
    gae_kernel[(B,)](
        *x, advantages_BT, returns_BT, kl_B, work, counter, moments_3, T, B,
        float(o.gamma), float(o.lam), float(o.kl_coef),
        SHAPED=x.scores_B is not None, KIND=KINDS[o.kind], MASKED=MASKED[o.masked], HAS_MASK=x.mask_BT is not None,
        PACKED=packed, BLOCK=1024 if packed else min(1024, max(16, triton.next_power_of_2(T))), BLOCK_B=128,
    )  # fmt: skip
    return advantages_BT, returns_BT, kl_B, moments_3


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _launch_cuda(x: _Inputs, o: ShapedGAEOptions, module=None, stream: int | None = None):
    if stream is None:
        stream = current_stream(x.values_BT.device)
    advantages_BT, returns_BT, kl_B, moments_3, work, counter = _gpu_outputs(x, stream)
    if x.rows == 0:
        return advantages_BT, returns_BT, kl_B, moments_3.zero_()
    tensors = (*x, advantages_BT, returns_BT, kl_B, work, counter, moments_3)
    T = 0 if x.cu_seqlens is not None else x.values_BT.shape[1]
    (module or extension()).gae_cuda(
        [_address(y) for y in tensors], x.rows, T, o.gamma, o.lam, o.kl_coef, KINDS[o.kind], MASKED[o.masked], stream
    )
    return advantages_BT, returns_BT, kl_B, moments_3


def _launch_cpu(x: _Inputs, o: ShapedGAEOptions):
    values_BT, B = x.values_BT, x.rows
    advantages_BT, returns_BT = _recycle.empty("gae", (2, *values_BT.shape)).unbind()
    kl_B = None if x.scores_B is None else torch.empty(B, dtype=torch.float32)
    moments_3 = torch.empty(3, dtype=torch.float64)
    addresses = [_address(y) for y in (*x, advantages_BT, returns_BT, kl_B)]
    T = 0 if x.cu_seqlens is not None else values_BT.shape[1]
    extension().gae(addresses, B, T, o.gamma, o.lam, o.kl_coef, KINDS[o.kind], MASKED[o.masked], moments_3.data_ptr())
    return advantages_BT, returns_BT, kl_B, moments_3


BACKEND_TABLE = {"cuda": _launch_cuda, "triton": _launch_triton, "cpu": _launch_cpu, "reference": _launch_reference}


def _run(op: str, x: _Inputs, o: ShapedGAEOptions, backend: str | None):
    """Check what `op` was given and run it."""
    if o.masked not in MASKED:
        raise ValueError(f"{op}: masked must be one of {', '.join(MASKED)}; got {o.masked!r}")
    check_kind(op, o.kind)
    packed = x.cu_seqlens is not None
    suffix = "_N" if packed else "_BT"
    shape, device = x.values_BT.shape, x.values_BT.device
    if len(shape) != (1 if packed else 2):
        raise ValueError(f"{op}: values{suffix} must have shape {'(N,)' if packed else '(B, T)'}; got {tuple(shape)}")
    given = {"rewards": x.rewards_BT, "logprobs": x.logprobs_BT, "ref_logprobs": x.ref_BT, "values": x.values_BT}
    floats = {name + suffix: y for name, y in given.items() if y is not None}
    others = {}
    if x.mask_BT is not None:
        others["mask" + suffix] = (x.mask_BT, torch.bool, shape)
    if x.scores_B is not None:
        others["scores_B"] = (x.scores_B, torch.float32, (x.rows,))
    if packed:
        others["cu_seqlens"] = (x.cu_seqlens, torch.int32, (max(x.rows, 0) + 1,))
    check_tensors(op, shape, device, floats, others)
    launch = pick("gae", BACKEND_TABLE, device, backend)
    if launch is _launch_cpu:  # addresses in, fresh tensors out: no graph to keep away from
        return launch(x, o)
    with torch.no_grad():
        return launch(x, o)


def _unshaped(op: str, tensors: tuple, cu_seqlens, gamma: float, lam: float, masked: str, backend) -> GAE:
    """tensors: rewards, values and mask."""
    rewards, values, mask = tensors
    x = _Inputs(rewards, None, None, values, mask, None, cu_seqlens)
    advantages, returns, _, moments_3 = _run(op, x, ShapedGAEOptions(0.0, gamma, lam, "kl", masked), backend)
    return GAE(advantages, returns, moments_3)


def gae(
    rewards_BT: torch.Tensor,
    values_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    gamma: float,
    lam: float,
    masked: str = "zero",
    backend: str | None = None,
) -> GAE:
    """Return (advantages_BT, returns_BT, moments_3), float32, by the formula above.

    rewards_BT, values_BT: contiguous float32 in units of reward. mask_BT: contiguous bool. gamma, lam: in [0, 1].
    masked: what a False token is. backend: "cuda", "triton", "cpu" or "reference"; None picks the fastest here.
    Raises ValueError on a wrong shape, dtype, layout or option; RuntimeError if `backend` cannot run here.
    """
    return _unshaped("gae", (rewards_BT, values_BT, mask_BT), None, gamma, lam, masked, backend)


def gae_packed(
    rewards_N: torch.Tensor,
    values_N: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    gamma: float,
    lam: float,
    mask_N: torch.Tensor | None = None,
    masked: str = "zero",
    backend: str | None = None,
) -> GAE:
    """gae over sequences that stand one after the other: sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1].

    cu_seqlens: int32 [B + 1], from 0 to N, never falling (not checked: it may live on a GPU). mask_N None: all count.
    """
    return _unshaped("gae_packed", (rewards_N, values_N, mask_N), cu_seqlens, gamma, lam, masked, backend)


def shaped_gae(
    logprobs_BT: torch.Tensor,
    ref_logprobs_BT: torch.Tensor,
    values_BT: torch.Tensor,
    mask_BT: torch.Tensor | None,
    scores_B: torch.Tensor,
    options: ShapedGAEOptions,
    *,
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> ShapedGAE:
    """kl_reward and gae in one launch: advantages, returns, each sequence's KL and the whitening sums.

    With cu_seqlens (int32 [B + 1]) the tensors are packed [N] instead of [B, T]. mask None: every token counts.
    The score goes to a sequence's last True token. Otherwise as kl_reward and gae, to the same rounding.
    """
    x = _Inputs(None, logprobs_BT, ref_logprobs_BT, values_BT, mask_BT, scores_B, cu_seqlens)
    return ShapedGAE(*_run("shaped_gae", x, options, backend))
