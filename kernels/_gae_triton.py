"""gae's Triton kernel: one program per row, from the row's end; the last program adds the rows' moments in row order.

Formulas, suffixes and the meaning of MASKED: gae.py.
"""

from fastppo.kernels._triton import tl, triton
from fastppo.kernels.kl_reward import kl_of, last_true


@triton.jit
def _after(a2, b2, s2, h2, f2, a1, b1, s1, h1, f1):
    """Step 1 after step 2 (1 is earlier in time), each a map of what comes from the right:

    advantage = a * advantage + b * next_value + s; next_value = f where h (a value was seen), else as it came.
    """
    return a1 * a2, a1 * b2 + b1 * (1.0 - h2), a1 * s2 + b1 * f2 + s1, tl.maximum(h1, h2), f1 + (1.0 - h1) * f2


@triton.jit
def _merge(n1, mean1, m1, n2, mean2, m2):
    """Moments of two sets together (Chan et al. 1979)."""
    n = n1 + n2
    share = n2 / tl.maximum(n, 1.0)
    away = mean2 - mean1
    return n, mean1 + away * share, m1 + m2 + away * away * n1 * share


@triton.jit
def gae_kernel(
    rewards_BT, logprobs_BT, ref_BT, values_BT, mask_BT, scores_B, cu_seqlens, advantages_BT, returns_BT, kl_B,
    partials_B3, ticket, moments_3, T, B, gamma, lam, kl_coef,
    SHAPED: tl.constexpr, KIND: tl.constexpr, MASKED: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    at = b.to(tl.int64) * T  # int64: B * T may pass 2**31
    if PACKED:
        at = tl.load(cu_seqlens + b).to(tl.int64)
        T = (tl.load(cu_seqlens + b + 1) - at).to(tl.int32)
    last = T - 1
    score = 0.0
    if SHAPED:
        score = tl.load(scores_B + b)
        if HAS_MASK:
            last = last_true(mask_BT + at, T, BLOCK)
    advantage_after, value_after, kl_sum, count, mean, m2 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for back in range(0, T, BLOCK):
        t = T - BLOCK - back + tl.arange(0, BLOCK)  # negative before the row's start
        inside = t >= 0
        on = inside
        if HAS_MASK:
            on = tl.load(mask_BT + at + t, mask=inside, other=0) != 0
        if SHAPED:
            d = tl.load(ref_BT + at + t, mask=inside, other=0.0)  # `on` as a mask would make the loads 4 bytes wide
            if KIND != 4:
                d = tl.load(logprobs_BT + at + t, mask=inside, other=0.0) - d
            kl = kl_of(tl.where(on, d, 0.0), KIND)
            kl_sum += tl.sum(kl)
            reward = -kl_coef * kl + tl.where(t == last, score, 0.0)
        else:
            reward = tl.where(on, tl.load(rewards_BT + at + t, mask=inside, other=0.0), 0.0)
        value = tl.where(on, tl.load(values_BT + at + t, mask=inside, other=0.0), 0.0)

        live = inside if MASKED == 0 else on
        a = tl.where(live, gamma * lam, 0.0 if MASKED == 1 else 1.0)
        h = tl.where(live, 1.0, 1.0 if MASKED == 1 else 0.0)
        a, bb, s, h, f = tl.associative_scan(
            (a, tl.where(live, gamma, 0.0), tl.where(live, reward - value, 0.0), h, value), 0, _after, reverse=True
        )
        advantage = a * advantage_after + bb * value_after + s
        value_after = tl.sum(tl.where(t == T - BLOCK - back, f + (1.0 - h) * value_after, 0.0))
        advantage_after = tl.sum(tl.where(t == T - BLOCK - back, advantage, 0.0))
        advantage = tl.where(on, advantage, 0.0)
        tl.store(advantages_BT + at + t, advantage, mask=inside)
        tl.store(returns_BT + at + t, advantage + value, mask=inside)

        n = tl.sum(on.to(tl.float32))
        part = tl.sum(advantage) / tl.maximum(n, 1.0)
        away = tl.where(on, advantage - part, 0.0)
        count, mean, m2 = _merge(count, mean, m2, n, part, tl.sum(away * away))
    if SHAPED:
        tl.store(kl_B + b, kl_sum)
    tl.store(partials_B3 + b, count)
    tl.store(partials_B3 + B + b, mean)
    tl.store(partials_B3 + 2 * B + b, m2)
    tl.debug_barrier()
    if tl.atomic_add(ticket, 1, sem="acq_rel") == B - 1:
        _add_rows(partials_B3, moments_3, B, BLOCK_B)
        tl.store(ticket, 0)  # ready for the next launch on this stream


@triton.jit
def _add_rows(partials_B3, moments_3, B, BLOCK_B: tl.constexpr):
    count, mean, m2 = 0.0, 0.0, 0.0
    for start in range(0, B, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        n = tl.load(partials_B3 + b, mask=b < B, other=0.0, cache_modifier=".cg")
        row_mean = tl.load(partials_B3 + B + b, mask=b < B, other=0.0, cache_modifier=".cg")
        row_m2 = tl.load(partials_B3 + 2 * B + b, mask=b < B, other=0.0, cache_modifier=".cg")
        part_n = tl.sum(n)
        part = tl.sum(n * row_mean) / tl.maximum(part_n, 1.0)
        part_m2 = tl.sum(row_m2 + n * (row_mean - part) * (row_mean - part))
        count, mean, m2 = _merge(count, mean, m2, part_n, part, part_m2)
    tl.store(moments_3, count)
    tl.store(moments_3 + 1, mean)
    tl.store(moments_3 + 2, m2)
