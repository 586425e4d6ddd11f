"""torch.compile of the eager definitions, liger-kernel and quack (where they import) beside ours, at the kernels' shapes.

"speedup" is over torch.compile ("eager" on a CPU, where nothing is compiled). A peer that does not import or does not run has a row that says why, without a time.
"""

import importlib
from collections.abc import Callable

import harness
import torch
from bench_linear_logprob import inputs
from bench_logprob import eager_shared

from fastppo.kernels.linear_logprob import Head, linear_logprob
from fastppo.kernels.logprob import logprob
from fastppo.kernels.ppo_loss import PPOBatch, PPOLossOptions, ppo_loss


def liger_cross_entropy(logits_NV, tokens_N):
    module = importlib.import_module("liger_kernel.ops.cross_entropy")
    # the class changes logits in place in its forward when they need a gradient; here they do not
    return module.LigerCrossEntropyFunction.apply(logits_NV, tokens_N, None, -100, 0.0, 0.0, "none", None, False)[0]


def quack_cross_entropy(logits_NV, tokens_N):
    return importlib.import_module("quack.cross_entropy").cross_entropy(logits_NV, tokens_N, reduction="none")


def liger_linear(hidden_ND, weight_VD, tokens_N):
    module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    return module.LigerFusedLinearCrossEntropyFunction.apply(hidden_ND, weight_VD, tokens_N)[0]


def quack_linear(hidden_ND, weight_VD, tokens_N):
    module = importlib.import_module("quack.linear_cross_entropy")
    return module.chunked_linear_cross_entropy(hidden_ND, weight_VD, tokens_N)


def able(peers: dict, options, bench: str, shape: str) -> dict:
    """Those that run once; the others get a row with the reason."""
    good = {}
    for name, run in peers.items():
        try:
            run()
            good[name] = run
        except Exception as error:  # a peer may fail in any way; the row says how
            why = f"does not run: {type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
            print(f"{bench} {shape} {name} {why}")
            if options.csv:
                harness.write_row(bench, options.device.type, variant=name, shape=shape, note=why)
    return good


def compiled(function, device: torch.device) -> tuple[str, Callable]:
    """The baseline and its name: torch.compile on a GPU; on a CPU, where it would take minutes, the function itself."""
    return ("torch.compile", torch.compile(function)) if device.type == "cuda" else ("eager", function)


def logits(options) -> None:
    device = options.device
    N, V = (8, 1000) if options.quick else (8192, 151_936)
    logits_NV = torch.randn(N, V, device=device, dtype=torch.bfloat16) * 4
    tokens_N, shape = torch.randint(0, V, (N,), device=device), f"[{N}, {V}]"
    baseline, eager = compiled(eager_shared, device)
    peers = {
        baseline: lambda: eager(logits_NV, tokens_N),
        "liger cross-entropy (no entropy)": lambda: liger_cross_entropy(logits_NV, tokens_N),
        "quack cross-entropy (no entropy)": lambda: quack_cross_entropy(logits_NV, tokens_N),
    }
    fns = {"ours": lambda: logprob(logits_NV, tokens_N), **able(peers, options, "peers logprob", shape)}
    show = dict(device=device, bytes=logits_NV.nbytes, baseline=baseline, csv=options.csv, note="forward")
    report(options, "peers logprob", shape, fns, show)


def linear(options) -> None:
    device = options.device
    N, D, V = (16, 32, 1000) if options.quick else (8192, 2048, 151_936)
    hidden_ND, weight_VD, tokens_N = inputs(N, D, V, torch.bfloat16, device)
    shape, both = f"[{N}, {D}] x [{V}, {D}]", (hidden_ND, weight_VD)
    baseline, definition = compiled(lambda h, w, t: eager_shared(torch.nn.functional.linear(h, w), t), device)
    upstream = torch.ones(2, N, device=device).unbind()

    def ours():
        return torch.autograd.grad(linear_logprob(hidden_ND, Head(weight_VD), tokens_N), both, upstream)

    peers = {
        baseline: lambda: torch.autograd.grad(
            [x.float() for x in definition(hidden_ND, weight_VD, tokens_N)], both, upstream
        ),
        "liger fused linear cross-entropy (scalar)": lambda: torch.autograd.grad(
            liger_linear(hidden_ND, weight_VD, tokens_N), both
        ),
        "quack linear cross-entropy (scalar)": lambda: torch.autograd.grad(
            quack_linear(hidden_ND, weight_VD, tokens_N), both
        ),
    }
    fns = {"ours": ours, **able(peers, options, "peers linear_logprob", shape)}
    show = dict(device=device, flops=6 * N * D * V, baseline=baseline, csv=options.csv, note="fwd+bwd")
    report(options, "peers linear_logprob", shape, fns, show)


def loss(options) -> None:
    device = options.device
    shape = (4, 64) if options.quick else (512, 1024)
    leaves = [(torch.randn(shape, device=device) * 0.2).requires_grad_() for _ in range(2)]
    batch = PPOBatch(*(torch.randn(4, *shape, device=device) * 0.2), torch.rand(shape, device=device) < 0.9)

    def both(backend):
        made = ppo_loss(*leaves, batch, PPOLossOptions(), normalizer=1000.0, backend=backend)
        return made.loss

    baseline, definition = compiled(lambda: both("reference"), device)
    peers = {baseline: lambda: torch.autograd.grad(definition(), leaves)}
    fns = {
        "ours": lambda: torch.autograd.grad(both(None), leaves),
        **able(peers, options, "peers ppo_loss", str(shape)),
    }
    size = 33 * leaves[0].numel()
    show = dict(device=device, bytes=size, baseline=baseline, csv=options.csv, note="fwd+bwd")
    report(options, "peers ppo_loss", str(list(shape)), fns, show, torch.float32)


def report(options, bench, shape, fns, show, dtype=torch.bfloat16) -> None:
    rounds = max(3, options.rounds // 2)
    medians_ms = harness.compare(fns, rounds=rounds, warmup=2, device=options.device)
    harness.report(bench, shape, dtype, medians_ms, **show)


def main():
    options = harness.arguments(__doc__)
    for bench in (logits, linear, loss):
        bench(options)


if __name__ == "__main__":
    main()
