"""Sampling against softmax + multinomial (temperature) and softmax + sort + cumsum + multinomial (top-k and top-p) in torch.

The row "softmax + sort + multinomial" is those three calls; speedups are over "torch", which for temperature alone sorts nothing.

"torch" of a row is written as transformers and most trainers write it: the filters on logits, then softmax and multinomial.
Ours also returns both log-probs and the entropy, which torch's rows do not compute. The bytes are the logits, read once.
"""

import torch
from harness import arguments, call_us, compare, report

from fastppo.kernels.sampling import BACKEND_TABLE, SamplingOptions, sampling


def torch_sample(logits_BV, options):
    scores_BV = logits_BV.float() / options.temperature
    if options.top_k:
        scores_BV = scores_BV.masked_fill(scores_BV < scores_BV.topk(options.top_k).values[:, -1:], -torch.inf)
    if options.top_p < 1:
        sorted_BV, order_BV = scores_BV.sort(dim=-1)
        drop_BV = sorted_BV.softmax(dim=-1).cumsum(dim=-1) <= 1 - options.top_p
        drop_BV[:, -1] = False
        scores_BV = scores_BV.masked_fill(drop_BV.scatter(1, order_BV, drop_BV), -torch.inf)
    return torch.multinomial(scores_BV.softmax(dim=-1), 1)


def torch_softmax_sort_multinomial(logits_BV, options):
    """The three calls alone, without the filters' masks."""
    p_BV, order_BV = (logits_BV.float() / options.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    return order_BV.gather(1, torch.multinomial(p_BV, 1))


def run(B, V, dtype, name, sample_options, options):
    logits_BV = (torch.randn(B, V, device=options.device) * 2).to(dtype)
    seeds_B, positions_B = (torch.arange(B, device=options.device) for _ in range(2))
    able = ("cuda", "triton") if options.device.type == "cuda" else ("cpu",)
    fns = {
        backend: lambda backend=backend: sampling(
            logits_BV, seeds_B, positions_B, sample_options, check=options.device.type == "cpu", backend=backend
        )
        for backend in able
        if backend in BACKEND_TABLE
    }
    fns["torch"] = lambda: torch_sample(logits_BV, sample_options)
    if not (sample_options.top_k == 1 or sample_options.temperature == 0):
        fns["softmax + sort + multinomial"] = lambda: torch_softmax_sort_multinomial(logits_BV, sample_options)
    cold = options.device.type == "cuda"
    medians = compare(fns, rounds=options.rounds, warmup=1, device=options.device, cold=cold)
    bytes = B * V * logits_BV.element_size()
    report("sampling", f"[{B}, {V}]", dtype, medians, device=options.device, bytes=bytes, note=name, csv=options.csv)


def small(options):
    """One step of a small model: what a call costs where there is little to read."""
    logits_BV, seeds_B = torch.randn(32, 512, device=options.device), torch.arange(32, device=options.device)
    ms = call_us(lambda: sampling(logits_BV, seeds_B, seeds_B, check=options.device.type == "cpu")) / 1e3
    report(
        "sampling", "[32, 512]", torch.float32, {"default": ms}, device=options.device, note="one call", csv=options.csv
    )


CASES = {
    "temperature": SamplingOptions(temperature=0.7),
    "temperature, same for log-probs": SamplingOptions(),
    "top-k 50 + top-p 0.9": SamplingOptions(top_k=50, top_p=0.9),
    "top-p 0.9": SamplingOptions(top_p=0.9),
    "greedy": SamplingOptions(temperature=0),
}

if __name__ == "__main__":
    options = arguments(__doc__)
    B, V = (4, 5000) if options.quick else (512, 151936) if options.device.type == "cuda" else (64, 151936)
    for name, sample_options in CASES.items():
        for dtype in (torch.float32, torch.bfloat16):
            if name == "greedy":
                sample_options = SamplingOptions(top_k=1)
            run(B, V, dtype, name, sample_options, options)
    small(options)
