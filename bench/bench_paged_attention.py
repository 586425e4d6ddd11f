"""Decode attention over a paged cache against the read bandwidth measured in the same run, and against SDPA on a dense cache.

The bytes of a row are the keys and values of every context, read once. Shapes: sequences x tokens, key/value heads, query heads,
head size. The pages' memory is allocated as the generator's is, in large pages where the system has them; the ceiling is read
from a plain tensor. "sdpa dense" has its keys and values laid out [B, KV, T, D] already and no block table: what paging costs.
"""

import torch
from harness import arguments, call_us, compare, report

from fastppo.attention import memory
from fastppo.kernels.paged_attention import BACKEND_TABLE, cache_write, paged_attention

BLOCK_SIZE = 16


def inputs(B, T, KV, H, D, dtype, device):
    blocks = T // BLOCK_SIZE
    k_cache, v_cache = memory.zeros(2 * B * T * KV * D, dtype, device).view(2, B * blocks, BLOCK_SIZE, KV, D).normal_()
    tables_BM = torch.randperm(B * blocks, dtype=torch.int32).view(B, blocks).to(device)
    lens_B = torch.full((B,), T, dtype=torch.int32, device=device)
    return torch.randn(B, H, D, dtype=dtype, device=device), k_cache, v_cache, tables_BM, lens_B


def able(device):
    names = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    return [name for name in names if name in BACKEND_TABLE]


def decode(B, T, KV, H, D, dtype, options):
    q_BHD, k_cache, v_cache, tables_BM, lens_B = inputs(B, T, KV, H, D, dtype, options.device)
    scale = D**-0.5
    dense = [c.view(B, T, KV, D).transpose(1, 2).contiguous() for c in (k_cache, v_cache)]
    fns = {
        name: lambda name=name: paged_attention(q_BHD, k_cache, v_cache, tables_BM, lens_B, scale=scale, backend=name)
        for name in able(options.device)
    }
    fns["sdpa dense"] = lambda: torch.nn.functional.scaled_dot_product_attention(
        q_BHD[:, :, None], *dense, enable_gqa=H != KV, scale=scale
    )
    medians = compare(fns, rounds=options.rounds, device=options.device, cold=options.device.type == "cuda")
    bytes = 2 * B * T * KV * D * k_cache.element_size()
    shape = f"{B} x {T}, kv {KV}, heads {H}, {D}"
    report(
        "paged_attention",
        shape,
        dtype,
        medians,
        device=options.device,
        bytes=bytes,
        baseline="sdpa dense",
        csv=options.csv,
    )


def tiny(options):
    """A 5-layer model of 260 thousand parameters at batch 32: what one call costs where there is little to read."""
    q_BHD, k_cache, v_cache, tables_BM, lens_B = inputs(32, 64, 4, 8, 8, torch.float32, options.device)
    slots_B = torch.arange(32, device=options.device) * BLOCK_SIZE
    k_BKD = torch.randn(32, 4, 8, device=options.device)
    attend = call_us(lambda: paged_attention(q_BHD, k_cache, v_cache, tables_BM, lens_B, scale=1.0))
    write = call_us(lambda: cache_write(k_BKD, k_BKD, k_cache, v_cache, slots_B))
    medians = {"paged_attention": attend / 1e3, "cache_write": write / 1e3}
    report(
        "paged_attention",
        "32 x 64, kv 4, heads 8, 8",
        torch.float32,
        medians,
        device=options.device,
        csv=options.csv,
        note="one call",
    )


if __name__ == "__main__":
    options = arguments(__doc__)
    shapes = [(32, 1024, 8, 8, 128), (32, 1024, 8, 32, 128), (1, 16384, 8, 32, 128)]
    if options.device.type == "cuda":
        shapes = [(512, 1024, 8, 32, 128), (32, 1024, 8, 32, 128), (1, 32768, 8, 32, 128)]
    if options.quick:
        shapes = [(2, 64, 2, 4, 16)]
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            decode(*shape, dtype, options)
    tiny(options)
