"""The decode step's products by themselves: x [rows, K] times a packed weight [N, K], in GB/s of weights beside the read bandwidth.

The copies of each weight that take turns are together as large as a 124 M model, so that none is found in a cache
that a decode step would not find it in. torch is F.linear on the same copies.
"""

import itertools

import harness
import torch

SHAPES = ((2304, 768), (768, 768), (3072, 768), (768, 3072), (50257, 768))  # GPT-2 124 M: N, K
MODEL_BYTES = 500_000_000


def packed(weight_NK: torch.Tensor, half: bool) -> torch.Tensor:
    from fastppo.kernels._backend import extension

    (N, K), dtype = weight_NK.shape, torch.bfloat16 if half else torch.float32
    out = torch.empty(extension().packed_size(N, K), dtype=dtype)
    extension().pack_linear(weight_NK.data_ptr(), False, *weight_NK.stride(), N, K, out.data_ptr(), half)
    return out


def case(N: int, K: int, rows: int, half: bool, options) -> None:
    from fastppo.kernels._backend import extension

    dtype = torch.bfloat16 if half else torch.float32
    weight_NK, x = torch.randn(N, K), torch.randn(rows, K)
    nbytes = N * K * dtype.itemsize
    copies = max(1, (MODEL_BYTES if not options.quick else nbytes) // nbytes)
    ours = [packed(weight_NK, half) for _ in range(copies)]
    theirs = [weight_NK.to(dtype) for _ in range(copies)]
    out, turn, other = torch.empty(rows, N), itertools.cycle(ours), itertools.cycle(theirs)
    x_theirs, run = x.to(dtype), extension().packed_linear

    def one():
        run(next(turn).data_ptr(), half, 0, N, K, x.data_ptr(), out.data_ptr(), rows, True)

    def torchs():
        return torch.nn.functional.linear(x_theirs, next(other))

    medians_ms = harness.compare({"cpu": one, "torch": torchs}, rounds=options.rounds, warmup=1)
    harness.report("packed_linear", f"[{rows}, {K}] x [{N}, {K}]", dtype, medians_ms, bytes=nbytes, csv=options.csv)


def main() -> None:
    options = harness.arguments(__doc__, cases=True)
    options.rounds = min(options.rounds, 7)
    cases = {
        f"{rows} rows {N}x{K} {name}": (N, K, rows, name == "bf16")
        for name, (N, K), rows in itertools.product(("fp32", "bf16"), SHAPES, (1, 4, 8, 16, 32))
    }
    chosen = options.only or list(cases)[: 3 if options.quick else None]
    if unknown := set(chosen) - set(cases):
        raise SystemExit(f"bench_packed_linear: no case {sorted(unknown)}; there are {', '.join(cases)}")
    for name in chosen:
        case(*cases[name], options)


if __name__ == "__main__":
    main()
