"""Launchers of the room `paged_attention` (formula: paged_attention.py): C++, Triton and CUDA, on arguments that were checked.

Suffixes: B sequences, N query tokens, M blocks per sequence, H query heads, KV key/value heads, D head size.
"""

import torch

from fastppo.kernels._backend import extension
from fastppo.kernels._paged_attention_triton import cache_write_kernel, merge_kernel, paged_attention_kernel

SPLIT = 256  # tokens per part; part of the order of summation, hence never a function of the batch
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


# --- what a launch in C++ and one in CUDA have in common ---


def _address_and_strides(x_NHD):
    return x_NHD.data_ptr(), x_NHD.stride(0), x_NHD.stride(1)


def _context(block_tables_BM, context_lens_B):
    return block_tables_BM.data_ptr(), block_tables_BM.shape[1], context_lens_B.data_ptr()


def _sizes(q_NHD, k_cache, context_lens_B):
    """B, H, KV, D and the block size."""
    return len(context_lens_B), q_NHD.shape[1], *k_cache.shape[2:], k_cache.shape[1]


def _new_tokens(k_NKD, v_NKD):
    return k_NKD.data_ptr(), v_NKD.data_ptr(), *k_NKD.stride()[:2], *v_NKD.stride()[:2], DTYPE_CODES[k_NKD.dtype]


# --- C++ ---


def cache_write_cpu(k_NKD, v_NKD, k_cache, v_cache, slots_N):
    extension().cache_write(
        *_new_tokens(k_NKD, v_NKD),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        DTYPE_CODES[k_cache.dtype],
        slots_N.data_ptr(),
        *k_NKD.shape,
    )


def paged_attention_cpu(
    q_NHD, k_cache, v_cache, block_tables_BM, context_lens_B, *, scale, window=None, softcap=None, cu_seqlens_q=None
):
    out_NHD = torch.empty(q_NHD.shape, dtype=q_NHD.dtype)
    extension().paged_attention(
        *_address_and_strides(q_NHD),
        DTYPE_CODES[q_NHD.dtype],
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        DTYPE_CODES[k_cache.dtype],
        *_context(block_tables_BM, context_lens_B),
        0 if cu_seqlens_q is None else cu_seqlens_q.data_ptr(),
        out_NHD.data_ptr(),
        *_sizes(q_NHD, k_cache, context_lens_B),
        scale,
        window or 0,
        softcap or 0.0,
    )
    return out_NHD


# --- Triton ---


def _parts(k_cache, block_tables_BM):
    return -(-block_tables_BM.shape[1] * k_cache.shape[1] // SPLIT)


def decode_triton(q_BHD, k_cache, v_cache, block_tables_BM, context_lens_B, *, scale, window=None, softcap=None):
    (B, H, D), KV = q_BHD.shape, k_cache.shape[2]
    parts = _parts(k_cache, block_tables_BM)
    out_BHD = torch.empty((B, H, D), dtype=q_BHD.dtype, device=q_BHD.device)
    partial = torch.empty(B, H, parts, D + 2, device=q_BHD.device)
    if B:
        paged_attention_kernel[(B * KV * parts,)](
            q_BHD,
            k_cache,
            v_cache,
            block_tables_BM,
            context_lens_B,
            partial,
            q_BHD.stride(0),
            q_BHD.stride(1),
            block_tables_BM.shape[1],
            parts,
            scale,
            softcap or 0.0,
            window or 0,
            KV=KV,
            GROUP=H // KV,
            D=D,
            BLOCK=k_cache.shape[1],
            SPLIT=SPLIT,
            GROUP_PADDED=max(16, 1 << (H // KV - 1).bit_length()),
            D_PADDED=max(16, 1 << (D - 1).bit_length()),
            STEP=64,
            num_warps=4,
        )
        merge_kernel[(B * H,)](
            partial,
            context_lens_B,
            out_BHD,
            parts,
            H=H,
            D=D,
            SPLIT=SPLIT,
            D_PADDED=1 << (D - 1).bit_length(),
            num_warps=1,
        )
    return out_BHD


def cache_write_triton(k_NKD, v_NKD, k_cache, v_cache, slots_N):
    k_NKD, v_NKD = k_NKD.to(k_cache.dtype), v_NKD.to(k_cache.dtype)  # by torch: the interpreter's bf16 cast truncates
    N, KV, D = k_NKD.shape
    if N:
        strides = (*k_NKD.stride()[:2], *v_NKD.stride()[:2])
        padded = 1 << (KV * D - 1).bit_length()
        cache_write_kernel[(N,)](k_NKD, v_NKD, k_cache, v_cache, slots_N, *strides, KV=KV, D=D, PADDED=padded)


# --- CUDA ---


def paged_attention_cuda_on(
    module, stream, q_BHD, k_cache, v_cache, block_tables_BM, context_lens_B, *, scale, window=None, softcap=None
):
    """Launch the CUDA kernels of `module`: the extension's, or in tests the same source compiled for the CPU."""
    (B, H, D), q_BHD = q_BHD.shape, q_BHD.to(k_cache.dtype)
    out_BHD = torch.empty((B, H, D), dtype=k_cache.dtype, device=q_BHD.device)
    parts = _parts(k_cache, block_tables_BM)
    partial = torch.empty(B * H * parts * (D + 2) if parts > 1 else 0, device=q_BHD.device)
    module.paged_attention_cuda(
        *_address_and_strides(q_BHD),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        DTYPE_CODES[k_cache.dtype],
        *_context(block_tables_BM, context_lens_B),
        out_BHD.data_ptr(),
        partial.data_ptr(),
        *_sizes(q_BHD, k_cache, context_lens_B),
        scale,
        window or 0,
        softcap or 0.0,
        stream,
    )
    return out_BHD


def cache_write_cuda_on(module, stream, k_NKD, v_NKD, k_cache, v_cache, slots_N):
    """As paged_attention_cuda_on. A key or value of another dtype is converted by torch first."""
    k_NKD, v_NKD = k_NKD.to(k_cache.dtype), v_NKD.to(k_cache.dtype)
    module.cache_write_cuda(
        *_new_tokens(k_NKD, v_NKD),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        slots_N.data_ptr(),
        *k_NKD.shape,
        stream,
    )


def decode_cuda(q_BHD, k_cache, *args, **options):
    with torch.cuda.device(q_BHD.device):
        stream = torch.cuda.current_stream().cuda_stream
        return paged_attention_cuda_on(extension(), stream, q_BHD, k_cache, *args, **options).to(q_BHD.dtype)


def cache_write_cuda(k_NKD, *args):
    with torch.cuda.device(k_NKD.device):
        cache_write_cuda_on(extension(), torch.cuda.current_stream().cuda_stream, k_NKD, *args)
