"""ppo_loss's Triton kernel: every block writes its partial sums, the last one to finish adds them in block order.

Formulas and suffixes: ppo_loss.py; the statistics' order: _ppo_stats.py. G blocks, K statistics.
"""

from fastppo.kernels._triton import tl, triton


@triton.jit
def _load(x_ptr, inside, on):
    """What lies at x_ptr, 0 where it does not count. Not masked by `on`: a mask that varies by token makes every load 4 bytes wide."""
    return tl.where(on, tl.load(x_ptr, mask=inside, other=0.0), 0.0)


@triton.jit
def _policy_terms(log_ratio, advantage, on, low, high, dual_clip, DUAL: tl.constexpr):
    """ratio, plain and clipped surrogates, loss, d loss / d logprob, and where the dual clip holds."""
    ratio = tl.where(on, tl.exp(log_ratio), 0.0)
    clipped_ratio = tl.minimum(tl.maximum(ratio, low), high)
    plain = -advantage * ratio
    clipped = -advantage * clipped_ratio
    # a NaN must reach the loss and the gradient: by itself, tl.maximum takes the other side
    policy = tl.where(on, tl.maximum(plain, clipped, propagate_nan=tl.PropagateNan.ALL), 0.0)
    gradient = tl.where((clipped_ratio == ratio) | (plain > clipped) | (plain != plain), plain, 0.0)
    dual = on & (advantage < 0) & (policy > -advantage * dual_clip) & DUAL
    policy = tl.where(dual, -advantage * dual_clip, policy)
    return ratio, plain, clipped, policy, tl.where(on & (dual == 0), gradient, 0.0), dual


@triton.jit
def _value_terms(value, old_value, ret, cliprange_value):
    """error, clipped error, loss, d loss / d value."""
    clipped_value = tl.minimum(tl.maximum(value, old_value - cliprange_value), old_value + cliprange_value)
    error = (value - ret) * (value - ret)
    clipped_error = (clipped_value - ret) * (clipped_value - ret)
    # torch.maximum halves the gradient at a tie; inside the clip range both sides carry it.
    weight = tl.where(error > clipped_error, 1.0, tl.where(error == clipped_error, 0.5, 0.0))
    weight = tl.where(clipped_value == value, 1.0, weight)
    loss = 0.5 * tl.maximum(error, clipped_error, propagate_nan=tl.PropagateNan.ALL)
    return error, clipped_error, loss, (value - ret) * weight


@triton.jit
def ppo_loss_kernel(
    logprobs_N, values_N, entropy_N, old_logprobs_N, old_values_N, advantages_N, returns_N, mask_N,
    grad_logprobs_N, grad_values_N, grad_entropy_N, partials_KG, ticket, whiten_2, normalizer_1, loss_1, stats_K,
    N, G, low, high, cliprange_value, vf_coef, dual_clip, entropy_coef, mean, rstd, normalizer,
    HAS_MASK: tl.constexpr, HAS_ENTROPY: tl.constexpr, GRAD: tl.constexpr, DUAL: tl.constexpr,
    WHITEN: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """WHITEN 0: off, 1: numbers, 2: tensor. COUNT: the normalizer comes from a tensor."""
    block = tl.program_id(0)
    n = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    on = inside
    if HAS_MASK:
        on &= tl.load(mask_N + n, mask=inside, other=0) != 0
    if WHITEN == 2:
        mean = tl.load(whiten_2)
        rstd = tl.load(whiten_2 + 1)
    if COUNT:
        normalizer = tl.maximum(tl.load(normalizer_1), 1.0)
    scale = 1.0 / normalizer

    log_ratio = _load(logprobs_N + n, inside, on) - _load(old_logprobs_N + n, inside, on)
    advantage = _load(advantages_N + n, inside, on)
    if WHITEN:
        advantage = tl.where(on, (advantage - mean) * rstd, 0.0)
    ratio, plain, clipped, policy, grad_logprob, dual = _policy_terms(
        log_ratio, advantage, on, low, high, dual_clip, DUAL
    )
    value = _load(values_N + n, inside, on)
    old_value = _load(old_values_N + n, inside, on)
    ret = _load(returns_N + n, inside, on)
    error, clipped_error, value_loss, grad_value = _value_terms(value, old_value, ret, cliprange_value)
    entropy = _load(entropy_N + n, inside, on) if HAS_ENTROPY else tl.zeros([BLOCK], tl.float32)

    if GRAD:
        tl.store(grad_logprobs_N + n, grad_logprob * scale, mask=inside)
        tl.store(grad_values_N + n, grad_value * (vf_coef * scale), mask=inside)
        if HAS_ENTROPY:
            tl.store(grad_entropy_N + n, tl.where(on, -entropy_coef * scale, 0.0), mask=inside)

    count = tl.sum(on.to(tl.float32))
    return_sum, old_value_sum = tl.sum(ret), tl.sum(old_value)
    away_return = tl.where(on, ret - return_sum / tl.maximum(count, 1.0), 0.0)
    away_value = tl.where(on, old_value - old_value_sum / tl.maximum(count, 1.0), 0.0)
    tl.store(partials_KG + 0 * G + block, count)
    tl.store(partials_KG + 1 * G + block, tl.sum(policy))
    tl.store(partials_KG + 2 * G + block, tl.sum(value_loss))
    tl.store(partials_KG + 3 * G + block, tl.sum(entropy))
    tl.store(partials_KG + 4 * G + block, tl.sum((on & (clipped > plain)).to(tl.float32)))
    tl.store(partials_KG + 5 * G + block, tl.sum((on & (clipped_error > error)).to(tl.float32)))
    tl.store(partials_KG + 6 * G + block, tl.sum(dual.to(tl.float32)))
    tl.store(partials_KG + 7 * G + block, tl.sum(0.5 * log_ratio * log_ratio))
    tl.store(partials_KG + 8 * G + block, tl.sum(-log_ratio))
    tl.store(partials_KG + 9 * G + block, tl.sum(ratio))
    tl.store(partials_KG + 10 * G + block, tl.sum(advantage))
    tl.store(partials_KG + 11 * G + block, return_sum)
    tl.store(partials_KG + 12 * G + block, tl.sum(away_return * away_return))
    tl.store(partials_KG + 13 * G + block, old_value_sum)
    tl.store(partials_KG + 14 * G + block, tl.sum(away_value * away_value))
    tl.store(partials_KG + 15 * G + block, tl.sum(value))
    tl.store(partials_KG + 16 * G + block, tl.sum(error))
    tl.store(partials_KG + 17 * G + block, tl.max(ratio))
    tl.debug_barrier()
    if tl.atomic_add(ticket, 1, sem="acq_rel") == G - 1:
        _finish(partials_KG, loss_1, stats_K, G, vf_coef, entropy_coef, scale, BLOCK_G)
        tl.store(ticket, 0)  # ready for the next launch on this stream


@triton.jit
def _add_blocks(partials_KG, k, G, BLOCK_G: tl.constexpr):
    total = tl.zeros([BLOCK_G], tl.float32)
    for start in range(0, G, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)
        total += tl.load(partials_KG + k * G + g, mask=g < G, other=0.0, cache_modifier=".cg")
    return tl.sum(total)


@triton.jit
def _add_squares(partials_KG, k, G, count, total, BLOCK_G: tl.constexpr):
    """Squared distances from the common mean (Chan et al. 1979): those from the blocks' means and of the blocks' means."""
    mean = total / tl.maximum(count, 1.0)
    squares = tl.zeros([BLOCK_G], tl.float32)
    for start in range(0, G, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)
        n = tl.load(partials_KG + g, mask=g < G, other=0.0, cache_modifier=".cg")
        block_sum = tl.load(partials_KG + k * G + g, mask=g < G, other=0.0, cache_modifier=".cg")
        block_m2 = tl.load(partials_KG + (k + 1) * G + g, mask=g < G, other=0.0, cache_modifier=".cg")
        away = block_sum / tl.maximum(n, 1.0) - mean
        squares += block_m2 + n * away * away
    return tl.sum(squares)


@triton.jit
def _finish(partials_KG, loss_1, stats_K, G, vf_coef, entropy_coef, scale, BLOCK_G: tl.constexpr):
    for k in tl.static_range(17):
        if k != 12 and k != 14:
            tl.store(stats_K + k, _add_blocks(partials_KG, k, G, BLOCK_G))
    count = _add_blocks(partials_KG, 0, G, BLOCK_G)
    for k in tl.static_range(11, 14, 2):
        total = _add_blocks(partials_KG, k, G, BLOCK_G)
        tl.store(stats_K + k + 1, _add_squares(partials_KG, k, G, count, total, BLOCK_G))
    most = tl.zeros([BLOCK_G], tl.float32)
    for start in range(0, G, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)
        most = tl.maximum(most, tl.load(partials_KG + 17 * G + g, mask=g < G, other=0.0, cache_modifier=".cg"))
    tl.store(stats_K + 17, tl.max(most))
    policy = _add_blocks(partials_KG, 1, G, BLOCK_G)
    value = _add_blocks(partials_KG, 2, G, BLOCK_G)
    entropy = _add_blocks(partials_KG, 3, G, BLOCK_G)
    tl.store(loss_1, (policy + vf_coef * value - entropy_coef * entropy) * scale)
