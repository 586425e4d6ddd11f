"""Attention over KV pages: prompts being read (Prefill) and one token per sequence (Decode).

A layout's `attend` is called once per layer: it writes the new keys and values into their pages, then attends.
Suffixes: N tokens of this forward pass, B sequences, M pages per sequence, H heads, K key/value heads, D head dimension.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastppo.attention.decode import decode_attention
from fastppo.attention.layout import Packed
from fastppo.attention.memory import zeros
from fastppo.attention.varlen import varlen_attention
from fastppo.kernels.paged_attention import cache_write, paged_attention


class LayerSpec(NamedTuple):
    """What a layer's cache must hold: found by running the model once (see probe)."""

    layer_idx: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    window: int | None


class KVCache:
    """Keys and values of every layer, [blocks, block_size, K, D] each (the layout of flash-attention and our kernels)."""

    def __init__(self, layers: list[LayerSpec], num_blocks: int, block_size: int, device: torch.device):
        self.block_size, self.num_blocks = block_size, num_blocks
        shapes = {spec: (num_blocks, block_size, spec.kv_heads, spec.head_dim) for spec in layers}
        # one piece of memory for all layers of a dtype: in large pages it is there several times as fast
        memory = {
            dtype: zeros(
                2 * sum(math.prod(shape) for spec, shape in shapes.items() if spec.dtype == dtype), dtype, device
            )
            for dtype in {spec.dtype for spec in layers}
        }
        self.layers = {}
        for spec, shape in shapes.items():
            pair, rest = memory[spec.dtype].tensor_split([2 * math.prod(shape)])
            self.layers[spec.layer_idx], memory[spec.dtype] = tuple(pair.view(2, *shape)), rest

    @staticmethod
    def block_bytes(layers: list[LayerSpec], block_size: int) -> int:
        """Bytes of one page over all layers."""
        return sum(2 * block_size * spec.kv_heads * spec.head_dim * spec.dtype.itemsize for spec in layers)

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy pages (from, to) in every layer; reads of all come before writes."""
        if not copies:
            return
        device = next(iter(self.layers.values()))[0].device
        source, target = torch.tensor(copies, device=device).T
        for pair in self.layers.values():
            for cache in pair:
                cache[target] = cache[source]


def _write(k_NKD, v_NKD, k_cache, v_cache, slots_N):
    # under autocast keys are often float32 (rotated) and values bfloat16
    cache_write(k_NKD.to(k_cache.dtype), v_NKD.to(v_cache.dtype), k_cache, v_cache, slots_N)


@dataclass(frozen=True, eq=False)
class PagedPrefill:
    """Chunks of prompts, packed; cached_prefix says whether any of them has earlier tokens in pages."""

    cache: KVCache
    packed: Packed
    slots_N: torch.Tensor  # int64
    block_tables_BM: torch.Tensor  # int32
    context_lens_B: torch.Tensor  # int32, with this chunk
    cached_prefix: bool

    def attend(self, module, q_NHD, k_NKD, v_NKD, *, scale, window, softcap):
        k_cache, v_cache = self.cache.layers[module.layer_idx]
        _write(k_NKD, v_NKD, k_cache, v_cache, self.slots_N)
        if not self.cached_prefix:
            return varlen_attention(q_NHD, k_NKD, v_NKD, self.packed, scale=scale, window=window, softcap=softcap)
        tables = (self.block_tables_BM, self.context_lens_B)
        options = dict(scale=scale, window=window, softcap=softcap, cu_seqlens_q=self.packed.cu_seqlens)
        return paged_attention(q_NHD, k_cache, v_cache, *tables, **options)


@dataclass(frozen=True, eq=False)
class PagedDecode:
    """One new token of each sequence."""

    cache: KVCache
    slots_N: torch.Tensor  # int64, one per sequence
    block_tables_BM: torch.Tensor  # int32
    context_lens_B: torch.Tensor  # int32, with the new token

    def attend(self, module, q_BHD, k_BKD, v_BKD, *, scale, window, softcap):
        k_cache, v_cache = self.cache.layers[module.layer_idx]
        _write(k_BKD, v_BKD, k_cache, v_cache, self.slots_N)
        tables = (self.block_tables_BM, self.context_lens_B)
        return decode_attention(q_BHD, k_cache, v_cache, *tables, scale=scale, window=window, softcap=softcap)


class Probe:
    """Records what each layer asks of attention while it runs packed sequences without a cache."""

    def __init__(self, packed: Packed):
        self.packed = packed
        self.layers: list[LayerSpec] = []

    def attend(self, module, q_NHD, k_NKD, v_NKD, *, scale, window, softcap):
        layer_idx = getattr(module, "layer_idx", None)
        self.layers.append(LayerSpec(layer_idx, *k_NKD.shape[1:], v_NKD.shape[2], k_NKD.dtype, window))
        return varlen_attention(q_NHD, k_NKD, v_NKD, self.packed, scale=scale, window=window, softcap=softcap)
