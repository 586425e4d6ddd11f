"""Suffixes: B sequences, N query tokens, M blocks per sequence, H query heads, KV key/value heads, D head size."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_cases import far_apart, off_by_8_bytes

from fastppo.kernels._backend import INTERPRET, missing
from fastppo.kernels.paged_attention import (
    BACKEND_TABLE,
    cache_write,
    paged_attention,
    paged_attention_reference,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = [  # H, KV, D with the reason
    (8, 4, 8),  # half a vector: a model of 260 thousand parameters
    (3, 3, 24),  # a vector and a half, no grouping
    (7, 1, 64),  # an odd group
    (8, 2, 128),  # the usual
    (2, 1, 256),  # the largest
    (4, 4, 80),  # two pairs of vectors and one
]
LENS = [0, 1, 15, 16, 17, 64, 65, 256, 257, 700]  # nothing; one; around a block, a chunk, a part; several parts
FEW_LENS = [0, 1, 17, 65, 300]


def case(lens, H, KV, D, dtype, device, query_lens=None, block_size=16, seed=0):
    """Random caches with NaN wherever no sequence has a token: reading one shows."""
    generator = torch.Generator().manual_seed(seed)
    M = max(1, max((-(-n // block_size) for n in lens), default=1))
    blocks = len(lens) * M + 1
    tables_BM = torch.randperm(blocks, generator=generator)[: len(lens) * M].view(len(lens), M).int()
    caches = torch.full((2, blocks, block_size, KV, D), math.nan)
    for b, n in enumerate(lens):
        slots_n = tables_BM[b, torch.arange(n) // block_size].long() * block_size + torch.arange(n) % block_size
        caches.flatten(1, 2)[:, slots_n] = torch.randn(2, n, KV, D, generator=generator)
    N = len(lens) if query_lens is None else sum(query_lens)
    q_NHD = torch.randn(N, H, D, generator=generator)
    starts = None
    if query_lens is not None:
        starts = torch.tensor([0, *itertools.accumulate(query_lens)], dtype=torch.int32).to(device)
    k_cache, v_cache = caches.to(dtype).to(device)
    lens_B = torch.tensor(lens, dtype=torch.int32, device=device)
    return [q_NHD.to(dtype).to(device), k_cache, v_cache, tables_BM.to(device), lens_B], starts


def sdpa_in(args, dtype, **options):
    return paged_attention_reference(*(x.to(dtype) if x.is_floating_point() else x for x in args), **options)


def assert_exact(ours, args, options):
    """error <= 2 x what plain torch makes in the same dtypes (its output rounded to q's) + tiny."""
    truth = sdpa_in(args, torch.float64, **options)
    plain = paged_attention_reference(*args, **options)
    assert ours.dtype == args[0].dtype and ours.shape == args[0].shape and not ours.isnan().any()
    error = (ours.double() - truth).abs().max().item() if truth.numel() else 0.0
    plain_error = (plain.double() - truth).abs().max().item() if truth.numel() else 0.0
    allowed = 2 * plain_error + 1e-6
    assert error <= allowed, f"error {error:.2e}, plain torch {plain_error:.2e}"


def assert_right(backend, args, options):
    ours, dtype = paged_attention(*args, **options, backend=backend), args[0].dtype
    if backend == "triton" and dtype != torch.float32 and ours.numel():
        # tensor cores take the probabilities in the cache's dtype, as flash-attn does: one more rounding
        truth = sdpa_in(args, torch.float64, **options)
        assert (ours.double() - truth).abs().max() <= 4 * torch.finfo(dtype).eps * truth.abs().max()
    else:
        assert_exact(ours, args, options)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_matches_reference(backend, device, heads, dtype):
    lens = FEW_LENS if INTERPRET else LENS
    if INTERPRET and (dtype == torch.float16 or heads[2] in (24, 256)):
        pytest.skip("fewer cases in the slow interpreter")
    args, _ = case(lens, *heads, dtype, device)
    for options in ({}, {"window": 20}, {"softcap": 2.0}, {"window": 300, "softcap": 30.0}):
        options = {"scale": heads[2] ** -0.5, **options}
        assert_right(backend, args, options)


@pytest.mark.parametrize("block_size", [16, 48, 8])  # a tile of sixteen tokens; three; none, and no AMX
@pytest.mark.parametrize("q_dtype", DTYPES, ids=str)
def test_bfloat16_caches_under_queries_of_any_dtype(q_dtype, block_size):
    """Float queries (a decode program's) lose nothing to tiles of bfloat16: their error is float's."""
    device = torch.device("cpu")
    if why := missing("cpu", device):
        pytest.skip(why)
    for heads in [(8, 2, 128), (4, 1, 32), (18, 1, 64), (6, 3, 96)]:  # the last but one: more rows than a tile has
        for query_lens in (None, [5, 1, 0, 33, 64]):
            args, starts = case([5, 64, 33, 150, 300], *heads, torch.bfloat16, device, query_lens, block_size)
            generator = torch.Generator().manual_seed(1)
            args[0] = torch.randn(args[0].shape, generator=generator).to(q_dtype)
            for extra in ({}, {"window": 37, "softcap": 9.0}):
                options = {"scale": heads[2] ** -0.5, "cu_seqlens_q": starts, **extra}
                assert_exact(paged_attention(*args, **options, backend="cpu"), args, options)


@pytest.mark.parametrize("heads", HEADS[:4], ids=str)
def test_a_chunk_of_queries_matches_reference(backend, device, heads):
    lens, query_lens = ([20, 40], [3, 40]) if INTERPRET else ([5, 64, 65, 700, 300, 7], [5, 1, 33, 150, 300, 0])
    if INTERPRET and heads[2] != 64:
        pytest.skip("one head size is enough in the slow interpreter")
    args, starts = case(lens, *heads, torch.float32, device, query_lens)
    for extra in ({}, {"window": 50}):
        options = {"scale": 0.3, "cu_seqlens_q": starts, **extra}
        assert_exact(paged_attention(*args, **options, backend=backend), args, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 100}, {"softcap": 5.0}], ids=str)
def test_a_query_does_not_depend_on_its_batch(backend, device, dtype, options):
    """Bit for bit: alone or in a batch, and on a CPU decoded or in a chunk of a prompt."""
    lens = [300, 3, 40] if INTERPRET else [700, 3, 290, 64]
    args, _ = case(lens, 8, 2, 64, dtype, device)
    q_BHD, k_cache, v_cache, tables_BM, lens_B = args
    options = {"scale": 0.125, "backend": backend, **options}
    together = paged_attention(*args, **options)
    for b in (0, 2):
        one = slice(b, b + 1)
        alone = paged_attention(q_BHD[one], k_cache, v_cache, tables_BM[one].contiguous(), lens_B[one], **options)
        assert torch.equal(alone[0], together[b])
    if backend == "cpu":
        chunk, starts = case(lens, 8, 2, 64, dtype, device, [60, 1, 33, 64])
        in_chunk = paged_attention(*chunk, cu_seqlens_q=starts, **options)
        for i, (b, last) in enumerate(zip(range(4), starts[1:].tolist(), strict=True)):
            for back in range(0, [60, 1, 33, 64][i], 13):
                one = [chunk[0][last - 1 - back][None], *chunk[1:3], chunk[3][[b]], chunk[4][[b]] - back]
                assert torch.equal(paged_attention(*one, **options)[0], in_chunk[last - 1 - back])


def test_a_case_worked_out_by_hand(backend, device):
    """Two tokens with scores ln 1 and ln 3: weights 1/4 and 3/4; with a window of one, the last alone."""
    k_cache, v_cache = torch.zeros(2, 3, 2, 1, 8, device=device)
    k_cache[2, 0, 0, 0], k_cache[1, 0, 0, 0] = math.log(3), 5.0  # block 2 holds both tokens
    k_cache[2, 0, 0, 0], k_cache[2, 1, 0, 0] = 0.0, math.log(3)
    v_cache[2, 0, 0, :2], v_cache[2, 1, 0, :2] = torch.tensor([[4.0, 0.0], [0.0, 4.0]], device=device)
    q_BHD = torch.zeros(1, 2, 8, device=device)
    q_BHD[0, 0, 0] = 2.0
    tables_BM = torch.tensor([[2]], dtype=torch.int32, device=device)
    lens_B = torch.tensor([2], dtype=torch.int32, device=device)
    out = paged_attention(q_BHD, k_cache, v_cache, tables_BM, lens_B, scale=0.5, backend=backend)
    torch.testing.assert_close(out[0, 0, :2].cpu(), torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(out[0, 1, :2].cpu(), torch.tensor([2.0, 2.0]))
    out = paged_attention(q_BHD, k_cache, v_cache, tables_BM, lens_B, scale=0.5, window=1, backend=backend)
    torch.testing.assert_close(out[0, 0, :2].cpu(), torch.tensor([0.0, 4.0]))


def test_large_scores_do_not_overflow(backend, device):
    args, _ = case([40], 2, 1, 16, torch.float32, device)
    args[0] *= 1e3
    out = paged_attention(*args, scale=100.0, backend=backend)
    assert out.isfinite().all()


def test_strided_queries(backend, device):
    """As they come from a model: heads before tokens, or a slice of a fused projection."""
    args, _ = case([5, 40, 17], 4, 2, 16, torch.float32, device)
    expected = paged_attention(*args, scale=0.25, backend=backend)
    transposed = args[0].transpose(0, 1).contiguous().transpose(0, 1)
    fused = torch.cat([args[0], args[0]], dim=2)[..., :16]
    last = args[0].transpose(1, 2).contiguous().transpose(1, 2)
    for q_BHD in (transposed, fused, last):
        assert torch.equal(paged_attention(q_BHD, *args[1:], scale=0.25, backend=backend), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
def test_cache_write(backend, device, dtype, cache_dtype):
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(7, 2, 2, 3, 24, generator=generator).to(dtype).to(device)  # [N, k or v, .., KV, D]
    k_NKD, v_NKD = fused[:, 0, 1], fused[:, 1, 0].transpose(1, 2).contiguous().transpose(1, 2)
    caches = torch.randn(2, 4, 5, 3, 24, generator=generator).to(cache_dtype).to(device)
    slots_N = torch.tensor([3, -1, 19, 0, 7, -1, 11], device=device)
    before = caches.clone()
    cache_write(k_NKD, v_NKD, caches[0], caches[1], slots_N, backend=backend)
    for cache, old, new_NKD in zip(caches, before, (k_NKD, v_NKD), strict=True):
        expected = old.clone().flatten(0, 1)
        for n, slot in enumerate(slots_N.tolist()):
            if slot >= 0:
                expected[slot] = new_NKD[n].to(cache_dtype)
        assert torch.equal(cache.flatten(0, 1), expected)


def test_a_cache_of_more_than_2_to_the_31_elements(backend, device):
    """Offsets are 64 bits wide. 4 GiB of addresses, of which only the first and last page are ever touched."""
    blocks = (1 << 31) // (16 * 8 * 256) + 2
    cache = torch.empty(blocks, 16, 8, 256, dtype=torch.float16, device=device)
    k_NKD = torch.randn(3, 8, 256).half().to(device)
    slots_N = (blocks - 1) * 16 + torch.arange(3, device=device)
    cache[0] = 0
    cache_write(k_NKD, k_NKD, cache, cache, slots_N, backend=backend)
    assert torch.equal(cache[-1, :3], k_NKD)
    q_BHD, lens_B = torch.randn(1, 8, 256, device=device), torch.tensor([3], dtype=torch.int32, device=device)
    ours = []
    for keys, block in ((cache, blocks - 1), (cache[-1:].clone(), 0)):
        tables_BM = torch.tensor([[block]], dtype=torch.int32, device=device)
        ours.append(paged_attention(q_BHD, keys, keys, tables_BM, lens_B, scale=0.1, backend=backend))
    assert torch.equal(*ours) and ours[0].abs().max() > 0


def test_queries_and_new_tokens_of_more_than_2_to_the_31_elements(backend, device):
    """Heads before tokens, 2^30 elements apart: head 2 of three begins past 2^31."""
    (q_BHD, *caches, tables_BM, lens_B), _ = case([5], 3, 3, 8, torch.float16, device)
    far_BHD = far_apart(q_BHD[0])[None]
    made = (paged_attention(x, *caches, tables_BM, lens_B, scale=0.3, backend=backend) for x in (q_BHD, far_BHD))
    assert torch.equal(*made)
    slot = tables_BM[0, :1].long() * 16 + 5
    cache_write(far_BHD, q_BHD, *caches, off_by_8_bytes(slot), backend=backend)
    for cache in caches:
        assert torch.equal(cache.flatten(0, 1)[slot], q_BHD)


def test_nothing_to_do(backend, device):
    args, _ = case([], 4, 2, 16, torch.float32, device)
    assert paged_attention(*args, scale=1.0, backend=backend).shape == (0, 4, 16)
    none = torch.empty(0, dtype=torch.int64, device=device)
    cache_write(
        torch.empty(0, 2, 16, device=device), torch.empty(0, 2, 16, device=device), *args[1:3], none, backend=backend
    )


def _any_case(backend, device, examples, longest=400, largest_group=9):
    @settings(deadline=None, max_examples=examples)
    @given(
        lens=st.lists(st.integers(0, longest), min_size=1, max_size=4),
        KV=st.integers(1, 3),
        group=st.integers(1, largest_group),
        D=st.integers(1, 32).map(lambda n: 8 * n),
        block_size=st.sampled_from([1, 3, 16, 256]),
        dtype=st.sampled_from(DTYPES),
        window=st.one_of(st.none(), st.integers(1, 500)),
        softcap=st.one_of(st.none(), st.floats(0.5, 50)),
        chunked=st.booleans(),
        transposed=st.booleans(),
        seed=st.integers(0, 1000),
    )
    def any_case(lens, KV, group, D, block_size, dtype, window, softcap, chunked, transposed, seed):
        query_lens = [(7 * seed + 13 * b) % (n + 1) for b, n in enumerate(lens)] if chunked else None
        args, starts = case(lens, KV * group, KV, D, dtype, device, query_lens, block_size, seed)
        if transposed:
            args[0] = args[0].transpose(0, 1).contiguous().transpose(0, 1)
        options = {"scale": D**-0.5, "window": window, "softcap": softcap, "cu_seqlens_q": starts}
        assert_right(backend, args, options)

    any_case()


def test_any_case(backend, device):
    if INTERPRET:
        _any_case(backend, device, examples=5, longest=40, largest_group=3)
    else:
        _any_case(backend, device, examples=30)


def test_wrong_arguments_say_what_came(device):
    (q, k, v, tables, lens), _ = case([5, 40], 4, 2, 16, torch.float32, device)
    cases = [
        (
            (q, k.transpose(1, 2), v, tables, lens),
            {},
            r"k_cache must be contiguous.*got torch.float32 \(7, 2, 16, 16\)",
        ),
        ((q, k, v.half(), tables, lens), {}, r"v_cache must be contiguous.*got torch.float16"),
        ((q[:1], k, v, tables, lens), {}, r"q must hold one query per sequence \(2\) .*got 1"),
        ((q[:, :3], k, v, tables, lens), {}, r"H must be a multiple of KV.*got q \(2, 3, 16\)"),
        ((q, k, v, tables.long(), lens), {}, r"block_tables_BM must be contiguous torch.int32.*got torch.int64"),
        ((q, k, v, tables, lens), {"window": 0}, r"window must be >= 1.*got 0"),
    ]
    if device.type == "cpu":
        cases.append(((q, k, v, tables, lens + 100), {}, r"context_lens_B must be in \[0, 48\].*got 140"))
    for args, options, message in cases:
        with pytest.raises(ValueError, match="paged_attention: " + message):
            paged_attention(*args, scale=1.0, **options)
    with pytest.raises(ValueError, match=r"cache_write: k_NKD must be .*\(3, 2, 16\).*got torch.float32 \(2, 2, 16\)"):
        cache_write(q[:, :2], q[:, :2], k, v, torch.tensor([0, 1, 2], device=device))
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"cache_write: slots_N must be below 112.*got 112"):
            cache_write(q[:, :2], q[:, :2], k, v, torch.tensor([0, 112]))


def test_a_back_end_asked_for_never_falls_back(device):
    args, _ = case([5], 4, 2, 16, torch.float32, device)
    absent = next(name for name in ("cuda", "triton", "cpu") if name not in BACKEND_TABLE or missing(name, device))
    with pytest.raises(RuntimeError, match=f"paged_attention: backend '{absent}' was asked for but"):
        paged_attention(*args, scale=1.0, backend=absent)
