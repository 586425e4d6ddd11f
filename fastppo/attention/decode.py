"""Which kernel attends when each sequence has one new token and its keys and values lie in pages: ours, or one of flash-attention's.

Ours is the default: its parts of 256 tokens do not depend on the batch, so that neither do the sampled tokens. FASTPPO_DECODE_ATTN names another
("fa3", "varlen", "fa2": it runs or raises with the reason) or says "auto" (the first of them that can run, else ours). None of
them has been timed against ours on a GPU yet. They run without splits, which keeps their results independent of the batch as well.

Loaded when first asked for, by the exact symbol (see backends.py).   Suffixes: B sequences, M pages per sequence, H heads, D head dimension.
"""

import functools
import inspect
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from fastppo.attention.backends import load_symbol
from fastppo.kernels.paged_attention import paged_attention


class DecodeCall(NamedTuple):
    """A decode step, by what decides who can run it."""

    device_type: str
    dtype: torch.dtype  # of the queries
    cache_dtype: torch.dtype
    head_dim: int
    block_size: int
    softcap: float | None


def _window(window: int | None) -> tuple[int, int]:
    return (-1, -1) if window is None else (window - 1, 0)


def _with_kvcache(name: str, tables: str) -> Callable:
    """flash_attn_with_kvcache of version `name`, which calls its block tables `tables`."""

    def run(q_BHD, k_cache, v_cache, tables_BM, lens_B, *, scale, window, softcap):
        out = load(name)(
            *(q_BHD[:, None], k_cache, v_cache),
            **{tables: tables_BM},
            cache_seqlens=lens_B,
            softmax_scale=scale,
            causal=True,
            window_size=_window(window),
            softcap=softcap or 0.0,
            num_splits=1,
        )
        return out[:, 0]

    return run


def _varlen(q_BHD, k_cache, v_cache, tables_BM, lens_B, *, scale, window, softcap):
    starts = torch.arange(len(q_BHD) + 1, dtype=torch.int32, device=q_BHD.device)
    return load("varlen")(
        *(q_BHD, k_cache, v_cache, starts, None, 1, tables_BM.shape[1] * k_cache.shape[1]),
        scale=scale,
        window_size=(_window(window)[0], 0),  # causal
        enable_gqa=q_BHD.shape[1] != k_cache.shape[2],
        seqused_k=lens_B,
        block_table=tables_BM,
        num_splits=1,
    )


# name -> (module, symbol, arguments that it must take, page sizes are multiples of, how it is called); best first, ours last
DECODERS = {
    "fa3": (
        "flash_attn_interface",
        "flash_attn_with_kvcache",
        ("page_table", "softcap", "num_splits"),
        1,
        _with_kvcache("fa3", "page_table"),
    ),
    "varlen": ("torch.nn.attention.varlen", "varlen_attn", ("block_table", "seqused_k", "num_splits"), 256, _varlen),
    "fa2": (
        "flash_attn",
        "flash_attn_with_kvcache",
        ("block_table", "softcap", "num_splits"),
        256,
        _with_kvcache("fa2", "block_table"),
    ),
    "paged": ("fastppo.kernels.paged_attention", "paged_attention", (), 1, paged_attention),
}


@functools.cache
def load(name: str) -> Callable | str:
    """The function behind a decoder, or in words why there is none that will do."""
    module, symbol, wanted, *_ = DECODERS[name]
    found = load_symbol(module, symbol)
    if isinstance(found, str):
        return found
    lacking = [x for x in wanted if x not in inspect.signature(found).parameters]
    return f"{module}.{symbol} of this version does not take {', '.join(lacking)}" if lacking else found


def missing(name: str, call: DecodeCall) -> str | None:
    """Why `name` can't run this call, in words; None when it can."""
    if name not in DECODERS:
        return f"there is no such decoder; there are {', '.join(DECODERS)} and auto"
    if name == "paged":
        return None
    if isinstance(load(name), str):
        return load(name)
    pages = DECODERS[name][3]
    if call.device_type != "cuda":
        return f"it needs a CUDA tensor, got one on {call.device_type}"
    if call.dtype not in (torch.float16, torch.bfloat16) or call.cache_dtype != call.dtype:
        return f"it needs queries and cache both float16 or both bfloat16, got {call.dtype} and {call.cache_dtype}"
    if call.head_dim > 256 or call.head_dim % 8:
        return f"it needs a head dimension <= 256, a multiple of 8; got {call.head_dim}"
    if call.block_size % pages:
        return f"it needs pages of a multiple of {pages} tokens, got {call.block_size} (Generator(block_size={pages}))"
    if call.softcap and name == "varlen":
        return "it has no soft cap"
    major, minor = torch.cuda.get_device_capability()
    if major != 9 if name == "fa3" else major < 8:
        return f"it does not run on compute capability {major}.{minor}"
    return None


def choose(call: DecodeCall) -> str:
    """The decoder for this call; one that FASTPPO_DECODE_ATTN names runs or raises RuntimeError."""
    asked = os.environ.get("FASTPPO_DECODE_ATTN", "paged")
    if asked == "auto":
        return next(name for name in DECODERS if missing(name, call) is None)
    if why := missing(asked, call):
        raise RuntimeError(f"attention: FASTPPO_DECODE_ATTN={asked} was asked for but {why}")
    return asked


def decode_attention(q_BHD, k_cache, v_cache, tables_BM, lens_B, *, scale, window, softcap) -> torch.Tensor:
    """[B, H, D]: each sequence's query over its cached keys and values, the new one's included."""
    call = DecodeCall(q_BHD.device.type, q_BHD.dtype, k_cache.dtype, q_BHD.shape[2], k_cache.shape[1], softcap)
    run = DECODERS[choose(call)][4]
    return run(q_BHD, k_cache, v_cache, tables_BM, lens_B, scale=scale, window=window, softcap=softcap)
