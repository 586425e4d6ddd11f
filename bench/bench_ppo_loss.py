"""ppo_loss forward + backward against eager PyTorch (and torch.compile on a GPU)."""

import torch
from harness import arguments, call_us, compare, graph_ms, report

from fastppo.kernels.ppo_loss import PPOBatch, PPOLossOptions, ppo_loss

BYTES_PER_TOKEN = 25 + 8  # seven float32 and a mask byte less the entropy read, two gradients written


def both_ways(inputs, backend):
    logprobs_BT, values_BT, batch = inputs

    def run():
        loss = ppo_loss(logprobs_BT, values_BT, batch, OPTIONS, normalizer=NORMALIZER, backend=backend).loss
        return torch.autograd.grad(loss, (logprobs_BT, values_BT))

    return run


OPTIONS, NORMALIZER = PPOLossOptions(), 1000.0


def main():
    options = arguments(__doc__)
    device = options.device
    for B, T in [(4, 64)] if options.quick else [(64, 1024), (512, 1024)]:
        torch.manual_seed(0)
        logprobs_BT, values_BT, *rest = (torch.randn(B, T, device=device) * 0.2 for _ in range(6))
        inputs = (
            logprobs_BT.requires_grad_(),
            values_BT.requires_grad_(),
            PPOBatch(*rest, torch.rand(B, T, device=device) < 0.9),
        )
        runs = {"ours": both_ways(inputs, None), "torch": both_ways(inputs, "reference")}
        on_gpu = device.type == "cuda"
        medians_ms, note = compare(runs, rounds=options.rounds, device=device, cold=on_gpu), ""
        if on_gpu:  # the gradients are made in the forward: its launch is what the graph repeats
            launch = lambda x=inputs: ppo_loss(*x, OPTIONS, normalizer=NORMALIZER)  # noqa: E731
            note = f"cold L2; {call_us(runs['ours'], calls=50):.0f} us a call from Python; "
            note += f"the forward's launch warm in a graph {1e3 * graph_ms(launch):.2f} us"
        size = B * T * BYTES_PER_TOKEN
        report(
            "ppo_loss", f"[{B}, {T}]", torch.float32, medians_ms, device=device, bytes=size, note=note, csv=options.csv
        )


if __name__ == "__main__":
    main()
