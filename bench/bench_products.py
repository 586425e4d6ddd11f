"""Matrix products of training against torch.mm: forward x W^T, dx = dy W and dW = dy^T x of layers [outputs, inputs] at some tokens.

GPT-2 124M's layers and head, a tiny GPT-2's and stories260K's. `cpu` is csrc/cpu/products.cpp, `ours` is mm, what training calls, which
takes torch's product where that is faster. dW of bfloat16 factors is wanted in float32: torch has one more pass for it.
"""

import harness
import torch

from fastppo.kernels._products import mm, on_tiles

# tokens, outputs, inputs
SHAPES = (
    *((tokens, *layer) for tokens in (64, 256, 400, 1000) for layer in ((2304, 768), (3072, 768), (768, 3072))),
    (256, 50257, 768),
    *((300, *layer) for layer in ((1024, 256), (256, 1024), (5000, 256), (192, 64), (64, 172), (512, 64))),
)


def factors(tokens: int, outputs: int, inputs: int, dtype: torch.dtype) -> dict:
    """orientation -> (left, right, dtype of the result)"""
    x, dy, w = torch.randn(tokens, inputs), torch.randn(tokens, outputs), torch.randn(outputs, inputs)
    x, dy, w = (t.to(dtype) for t in (x, dy, w))
    return {"x W^T": (x, w.t(), dtype), "dy W": (dy, w, dtype), "dy^T x": (dy.t(), x, torch.float32)}


def case(shape: tuple, dtype: torch.dtype, options) -> None:
    tokens, outputs, inputs = shape
    for name, (a, b, out_dtype) in factors(*shape, dtype).items():
        out = torch.empty(a.shape[0], b.shape[1], dtype=out_dtype)

        def torchs(a=a, b=b, out=out):
            if out.dtype == a.dtype:
                torch.mm(a, b, out=out)
            else:
                out.copy_(torch.mm(a, b))

        fns = {"ours": lambda a=a, b=b, out=out: mm(a, b, out), "torch": torchs}
        if on_tiles(a, b, out):
            fns["cpu"] = lambda a=a, b=b, out=out: on_tiles(a, b, out)
        medians_ms = harness.compare(fns, rounds=options.rounds, warmup=1)
        text = f"{name}, {tokens} tokens, [{outputs}, {inputs}]"
        flops = 2 * tokens * outputs * inputs
        harness.report("products", text, dtype, medians_ms, baseline="torch", flops=flops, csv=options.csv)


def main() -> None:
    options = harness.arguments(__doc__, cases=True)
    options.rounds = min(options.rounds, 7)
    cases = {
        f"{'x'.join(map(str, shape))} {name}": (shape, dtype)
        for shape in SHAPES
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    chosen = options.only or list(cases)[-2 if options.quick else 0 :]
    if unknown := set(chosen) - set(cases):
        raise SystemExit(f"bench_products: no case {sorted(unknown)}; there are {', '.join(cases)}")
    for name in chosen:
        case(*cases[name], options)


if __name__ == "__main__":
    main()
