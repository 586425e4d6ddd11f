"""Fused KL shaping + GAE + returns + whitening sums against the Python loop; GAE alone as well."""

import torch
from harness import arguments, call_us, compare, graph_ms, report

from fastppo.kernels.gae import ShapedGAEOptions, gae, shaped_gae

FUSED_BYTES, GAE_BYTES = 13 + 8, 9 + 8  # per token: three or two float32 and a mask byte read, two float32 written


def main():
    options = arguments(__doc__)
    device, shaping = options.device, ShapedGAEOptions()
    for B, T in [(4, 64)] if options.quick else [(64, 512), (512, 1024), (16, 16384)]:
        torch.manual_seed(0)
        logprobs_BT, ref_BT, values_BT = torch.randn(3, B, T, device=device)
        mask_BT = torch.arange(T, device=device) < torch.randint(T // 2, T + 1, (B, 1), device=device)
        scores_B = torch.randn(B, device=device)
        fused = lambda backend, x=(logprobs_BT, ref_BT, values_BT, mask_BT, scores_B): shaped_gae(*x, shaping, backend=backend)  # fmt: skip  # noqa: E731
        alone = lambda backend, x=(logprobs_BT, values_BT, mask_BT): gae(*x, gamma=1.0, lam=0.95, backend=backend)  # noqa: E731
        for bench, run, size in (("kl_reward + gae", fused, FUSED_BYTES), ("gae", alone, GAE_BYTES)):
            runs = {"ours": lambda run=run: run(None), "torch": lambda run=run: run("reference")}
            if device.type == "cuda":
                runs["triton"] = lambda run=run: run("triton")
            medians_ms, note = compare(runs, rounds=options.rounds, device=device, cold=device.type == "cuda"), ""
            if device.type == "cuda":
                note = f"cold L2; {call_us(runs['ours']):.1f} us a call from Python; warm in a graph {1e3 * graph_ms(runs['ours']):.2f} us"
            report(
                "gae", f"[{B}, {T}]", torch.float32, medians_ms, device=device, bytes=B * T * size,
                note=f"{bench}; {note}".rstrip("; "), csv=options.csv,
            )  # fmt: skip


if __name__ == "__main__":
    main()
