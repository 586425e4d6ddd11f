"""The Triton kernel of the room `sampling` (formula and conditions: sampling.py). One program is one row.

The first pass reads the row from DRAM; thresholds are found by bisection over the order-preserving integer keys of the
logits, each step one more pass that finds the row in L2. The sums of a row have one fixed order.
"""

from fastppo.kernels._triton import tl, triton

NEGATIVE_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def _key(y):
    """int64 that orders like the float32 y."""
    bits = y.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _load(row, start, V, TILE: tl.constexpr):
    column = start + tl.arange(0, TILE)
    return tl.load(row + column, mask=column < V, other=NEGATIVE_INFINITY).to(tl.float32)


@triton.jit
def _mass(y_row, low_key, floor_key, top, rate, V, TILE: tl.constexpr, WEIGHTED: tl.constexpr):
    """Mass (or count) of the tokens with key >= low_key and >= floor_key."""
    total = tl.zeros((TILE,), tl.float32)
    for start in range(0, V, TILE):
        y = _load(y_row, start, V, TILE)
        key = _key(y)
        w = tl.exp((y - top) * rate) if WEIGHTED else tl.full((TILE,), 1.0, tl.float32)
        total += tl.where((key >= low_key) & (key >= floor_key) & (y > NEGATIVE_INFINITY), w, 0.0)
    return tl.sum(total)


@triton.jit
def _top_k_key(y_row, top, top_k, V, TILE: tl.constexpr):
    """The largest key that at least top_k tokens reach; counts are exact in float32 (V < 2**24)."""
    low = tl.full((), -(2**31), tl.int64)
    high = _key(top) + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        enough = _mass(y_row, middle, low * 0 - 2**31, top, 1.0, V, TILE, False) >= top_k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def _top_p_key(y_row, floor_key, top, rate, top_p, V, TILE: tl.constexpr):
    """The smallest key such that the tokens above it weigh less than top_p of those with key >= floor_key."""
    target = top_p * _mass(y_row, floor_key, floor_key, top, rate, V, TILE, True)
    low = floor_key - 1
    high = _key(top)
    while high - low > 1:
        middle = low + (high - low) // 2
        fewer = _mass(y_row, middle + 1, floor_key, top, rate, V, TILE, True) < target
        high = tl.where(fewer, middle, high)
        low = tl.where(fewer, low, middle)
    return high


@triton.jit
def _first_above(weight, u, N: tl.constexpr):
    """The first index whose running sum exceeds u times the total; the last with weight where rounding leaves none."""
    running = tl.cumsum(weight, 0)
    index = tl.arange(0, N)
    found = tl.min(tl.where(running > u * tl.max(running), index, N))
    return tl.minimum(found, tl.max(tl.where(weight > 0, index, 0)))


@triton.jit
def _raw_statistics(x_row, rate, V, TILE: tl.constexpr):
    """(max, sum e, sum e * (x - max), is NaN or +inf found) of a row, e = exp((x - max) * rate); finite without -inf's help."""
    top = tl.full((), -3.0e38, tl.float32)
    total = tl.zeros((), tl.float32)
    dot = tl.zeros((), tl.float32)
    bad = tl.zeros((), tl.int32)
    for start in range(0, V, TILE):
        x = _load(x_row, start, V, TILE)
        bad = tl.maximum(bad, tl.max(((x != x) | (x == float("inf"))).to(tl.int32)))
        new = tl.maximum(top, tl.max(x))
        scale = tl.where(total > 0, tl.exp((top - new) * rate), 0.0)
        e = tl.exp((x - new) * rate)
        dot = tl.where(total > 0, (dot + total * (top - new)) * scale, 0.0) + tl.sum(
            tl.where(e > 0, e * (x - new), 0.0)
        )
        total = total * scale + tl.sum(e)
        top = new
    return top, total, dot, bad


@triton.jit
def _argmax(y_row, V, TILE: tl.constexpr):
    """(max, lowest index of it)."""
    top = tl.full((), NEGATIVE_INFINITY, tl.float32)
    token = tl.zeros((), tl.int32)
    for start in range(0, V, TILE):
        y = _load(y_row, start, V, TILE)
        here = tl.max(y)
        index = start + tl.min(tl.where(y == here, tl.arange(0, TILE), TILE))
        token = tl.where(here > top, index, token)
        top = tl.maximum(top, here)
    return top, token


@triton.jit
def sampling_kernel(
    x_BV,
    y_BV,
    seeds_B,
    positions_B,
    tokens_B,
    numbers_3B,
    B,
    V,
    x_stride,
    y_stride,
    rate,  # 1 / temperature
    raw_rate,  # 1 / logprob_temperature
    top_k,
    top_p,
    log_min_p,  # ln(min_p) * temperature
    GREEDY: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,  # a power of two
):
    b = tl.program_id(0).to(tl.int64)  # int64: b * stride overflows int32 past 2**31 elements
    x_row, y_row = x_BV + b * x_stride, y_BV + b * y_stride
    raw_top, raw_total, raw_dot, bad = _raw_statistics(x_row, raw_rate, V, TILE)
    top, token = _argmax(y_row, V, TILE)
    sampled = tl.zeros((), tl.float32)
    if not GREEDY:
        floor_key = tl.full((), -(2**31), tl.int64)
        if TOP_K:
            floor_key = _top_k_key(y_row, top, top_k, V, TILE)
        if TOP_P:
            floor_key = tl.maximum(floor_key, _top_p_key(y_row, floor_key, top, rate, top_p, V, TILE))
        least = top + log_min_p
        tiles = tl.arange(0, TILES)
        weights = tl.zeros((TILES,), tl.float32)
        for start in range(0, V, TILE):
            y = _load(y_row, start, V, TILE)
            kept = (_key(y) >= floor_key) & (y >= least) & (y > NEGATIVE_INFINITY)
            weights = tl.where(tiles == start // TILE, tl.sum(tl.where(kept, tl.exp((y - top) * rate), 0.0)), weights)
        position, seed = tl.load(positions_B + b), tl.load(seeds_B + b)
        low, high = (position & 0xFFFFFFFF).to(tl.uint32), ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
        word_0, word_1, _, _ = tl.philox(seed, low, high, low * 0, low * 0)
        tile = _first_above(weights, (word_0 >> 8).to(tl.float32) * 5.9604644775390625e-08, TILES)
        y = _load(y_row, tile * TILE, V, TILE)
        kept = (_key(y) >= floor_key) & (y >= least) & (y > NEGATIVE_INFINITY)
        e = tl.where(kept, tl.exp((y - top) * rate), 0.0)
        inside = _first_above(e, (word_1 >> 8).to(tl.float32) * 5.9604644775390625e-08, TILE)
        token = tile * TILE + inside
        chosen = tl.sum(tl.where(tl.arange(0, TILE) == inside, y, 0.0))
        sampled = (chosen - top) * rate - tl.log(tl.sum(weights))
    nan = float("nan")
    code = tl.where(bad > 0, -1, tl.where(top > NEGATIVE_INFINITY, 0, -2))
    raw = tl.load(x_row + token).to(tl.float32)
    logprob = (raw - raw_top) * raw_rate - tl.log(raw_total)
    entropy = tl.log(raw_total) - raw_rate * raw_dot / raw_total
    tl.store(tokens_B + b, tl.where(code < 0, code, token).to(tl.int64))
    tl.store(numbers_3B + b, tl.where(code < 0, nan, sampled))
    tl.store(numbers_3B + B + b, tl.where(code < 0, nan, logprob))
    tl.store(numbers_3B + 2 * B + b, tl.where(code < 0, nan, entropy))
