"""logprob (log-prob and entropy) forward and backward against PyTorch.

"torch" is the pair that TRL calls, log_softmax + gather and an entropy from the logits (softmax, logsumexp); "torch
shared" takes both from one log_softmax. Backward: their autograd, the graph made once.
"""

import torch
from harness import arguments, compare, report

from fastppo.kernels.logprob import logprob


def eager(logits_NV, tokens_N):
    p_NV = logits_NV.softmax(-1)
    entropy_N = logits_NV.logsumexp(-1) - (p_NV * logits_NV).sum(-1)
    return logits_NV.log_softmax(-1).gather(-1, tokens_N[:, None])[:, 0], entropy_N


def eager_shared(logits_NV, tokens_N):
    logp_NV = logits_NV.log_softmax(-1)
    return logp_NV.gather(-1, tokens_N[:, None])[:, 0], -(logp_NV.exp() * logp_NV).sum(-1)


def forwards(backends, logits_NV, tokens_N):
    fns = {name: (lambda name=name: logprob(logits_NV, tokens_N, backend=name)) for name in backends}
    plain = {"torch": lambda: eager(logits_NV, tokens_N), "torch shared": lambda: eager_shared(logits_NV, tokens_N)}
    return {**fns, **plain}


def backwards(backends, logits_NV, tokens_N):
    """The backward alone: the graph is made once and retained."""
    upstream = torch.randn(2, len(tokens_N), device=logits_NV.device)

    def again(made):
        grads = [g_N.to(out_N.dtype) for g_N, out_N in zip(upstream, made, strict=True)]
        return lambda: torch.autograd.grad(made, logits_NV, grads, retain_graph=True)

    fns = {name: again(logprob(logits_NV, tokens_N, backend=name)) for name in backends}
    return {
        **fns,
        "torch": again(eager(logits_NV, tokens_N)),
        "torch shared": again(eager_shared(logits_NV, tokens_N)),
    }


def main():
    options = arguments(__doc__)
    device = options.device
    shapes = [(8, 1000)] if options.quick else [(256, 151_936)] + ([(8192, 151_936)] if device.type == "cuda" else [])
    backends = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    for N, V in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            logits_NV = (torch.randn(N, V, device=device) * 4).to(dtype)
            tokens_N = torch.randint(0, V, (N,), device=device)
            for note, make, passes in (("forward", forwards, 1), ("backward", backwards, 2)):
                fns = make(backends, logits_NV.detach().requires_grad_(note == "backward"), tokens_N)
                medians_ms = compare(fns, rounds=options.rounds, device=device, cold=device.type == "cuda")
                size = passes * logits_NV.nbytes
                show = dict(device=device, bytes=size, note=note, csv=options.csv)
                report("logprob", f"[{N}, {V}]", dtype, medians_ms, **show)


if __name__ == "__main__":
    main()
