"""Which packed-attention back end runs here: flash-attn 3, flash-attn 2, torch's own varlen attention, SDPA.

A back end is looked for only when attention first runs on a GPU. Each loader imports the exact symbol it calls: a
found module proves nothing (flash-attn 4 installs an empty `flash_attn` namespace, a broken binary raises OSError or
ImportError only when it is imported).
"""

import functools
import importlib
import inspect
import os
from collections.abc import Callable
from typing import NamedTuple

import torch


class Call(NamedTuple):
    """One packed attention call, by what decides who can run it."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    softcap: float | None
    dropout: float


def load_symbol(module: str, name: str) -> Callable | str:
    """A function, or in words why there is none."""
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (ImportError, OSError, RuntimeError) as error:  # missing; shared library missing; ABI mismatch
        return f"{module} does not import: {type(error).__name__}: {error}"
    return found or f"{module} imports but has no {name}"


def _fa3(q_NHD, k_NHD, v_NHD, layout, *, scale, window, softcap, dropout):
    return load("fa3")(
        q_NHD,
        k_NHD,
        v_NHD,
        *(layout.cu_seqlens, layout.cu_seqlens, layout.max_seqlen, layout.max_seqlen),
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
    )


def _fa2(q_NHD, k_NHD, v_NHD, layout, *, scale, window, softcap, dropout):
    return load("fa2")(
        q_NHD,
        k_NHD,
        v_NHD,
        *(layout.cu_seqlens, layout.cu_seqlens, layout.max_seqlen, layout.max_seqlen),
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
    )


def _varlen(q_NHD, k_NHD, v_NHD, layout, *, scale, window, softcap, dropout):
    run, H, KV = load("varlen"), q_NHD.shape[1], k_NHD.shape[1]
    if H != KV and not _varlen_takes("enable_gqa"):
        k_NHD, v_NHD = (x.repeat_interleave(H // KV, dim=1) for x in (k_NHD, v_NHD))
    options = {"enable_gqa": True} if H != KV and _varlen_takes("enable_gqa") else {}
    if _varlen_takes("window_size"):  # torch >= 2.11; before it, is_causal
        options["window_size"] = (-1, 0) if window is None else (window - 1, 0)
    else:
        options["is_causal"] = True
    cu, longest = layout.cu_seqlens, layout.max_seqlen
    return run(q_NHD, k_NHD, v_NHD, cu, cu, longest, longest, scale=scale, **options)


@functools.cache
def _varlen_takes(argument: str) -> bool:
    return argument in inspect.signature(load("varlen")).parameters


# name -> (module, symbol, how it is called); best first. SDPA needs nothing and is last.
BACKENDS = {
    "fa3": ("flash_attn_interface", "flash_attn_varlen_func", _fa3),
    "fa2": ("flash_attn", "flash_attn_varlen_func", _fa2),
    "varlen": ("torch.nn.attention.varlen", "varlen_attn", _varlen),
    "sdpa": ("torch.nn.functional", "scaled_dot_product_attention", None),
}


@functools.cache
def load(name: str) -> Callable | str:
    """The function behind a back end, or in words why there is none."""
    module, symbol, _ = BACKENDS[name]
    return load_symbol(module, symbol)


def missing(name: str, call: Call, window: int | None = None) -> str | None:
    """Why back end `name` can't run this call, in words; None when it can."""
    if name not in BACKENDS:
        return f"there is no such back end; there are {', '.join(BACKENDS)}"
    if name == "sdpa":
        return None
    if isinstance(load(name), str):
        return load(name)
    if call.device_type != "cuda":
        return f"it needs a CUDA tensor, got one on {call.device_type}"
    if call.dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, got {call.dtype}"
    if call.head_dim > 256 or call.head_dim % 8 or call.value_dim != call.head_dim:
        return f"it needs one head dimension <= 256, a multiple of 8; got {call.head_dim} and {call.value_dim}"
    major, minor = torch.cuda.get_device_capability()
    if major < 9 if name == "fa3" else major < 8:
        return f"it does not run on compute capability {major}.{minor}"
    if call.dropout and name != "fa2":
        return "it has no dropout"
    if name == "varlen":
        if call.softcap:
            return "it has no soft cap"
        if window is not None and not _varlen_takes("window_size"):
            return "torch's varlen attention takes a window only from torch 2.11 on"
    return None


def choose(call: Call, window: int | None = None) -> str:
    """The first back end that can run the call; FASTPPO_ATTN=name forces one, and then it runs or raises."""
    if asked := os.environ.get("FASTPPO_ATTN"):
        if why := missing(asked, call, window):
            raise RuntimeError(f"attention: FASTPPO_ATTN={asked} was asked for but {why}")
        return asked
    if call.device_type != "cuda":
        return "sdpa"
    return next(name for name in BACKENDS if missing(name, call, window) is None)
