"""kl_reward alone (gae.shaped_gae does it inside the GAE launch) against eager PyTorch."""

import torch
from harness import arguments, compare, graph_ms, report

from fastppo.kernels.kl_reward import kl_reward

BYTES_PER_TOKEN = 9 + 12


def main():
    options = arguments(__doc__)
    device = options.device
    for B, T in [(4, 64)] if options.quick else [(64, 1024), (512, 1024)]:
        torch.manual_seed(0)
        x = (*torch.randn(2, B, T, device=device), torch.rand(B, T, device=device) < 0.9, torch.randn(B, device=device))
        run = lambda backend, x=x: kl_reward(*x, kl_coef=0.2, backend=backend)  # noqa: E731
        runs = {"ours": lambda run=run: run(None), "torch": lambda run=run: run("reference")}
        on_gpu = device.type == "cuda"
        medians_ms = compare(runs, rounds=options.rounds, device=device, cold=on_gpu)
        note = f"cold L2; warm in a graph {1e3 * graph_ms(runs['ours']):.2f} us" if on_gpu else ""
        show = dict(device=device, bytes=B * T * BYTES_PER_TOKEN, csv=options.csv, note=note)
        report("kl_reward", f"[{B}, {T}]", torch.float32, medians_ms, **show)


if __name__ == "__main__":
    main()
