"""linear_logprob against the bare matrix products that it needs (one forward, four with backward) and eager PyTorch.

The bare products write into tensors that exist already; "speedup" is against them, so 1.00 would be free statistics.
"""

import torch
from harness import arguments, compare, report
from peak import extra_mib

from fastppo.kernels.linear_logprob import Head, linear_logprob, linear_logprob_reference


class Products:
    """The bare products over all rows at once."""

    def __init__(self, hidden_ND, weight_VD):
        self.hidden_ND, self.weight_VD = hidden_ND.detach(), weight_VD.detach()
        self.logits_NV = hidden_ND.new_empty(len(hidden_ND), len(weight_VD))
        self.dhidden_ND, self.dweight_VD = torch.empty_like(self.hidden_ND), torch.empty_like(self.weight_VD)

    def logits(self):
        torch.mm(self.hidden_ND, self.weight_VD.t(), out=self.logits_NV)

    def gradients(self):
        torch.mm(self.logits_NV, self.weight_VD, out=self.dhidden_ND)
        torch.mm(self.logits_NV.t(), self.hidden_ND, out=self.dweight_VD)

    def three(self):
        self.logits()
        self.gradients()

    def four(self):
        self.logits()
        self.three()


def inputs(N, D, V, dtype, device):
    torch.manual_seed(0)
    hidden_ND = torch.randn(N, D, device=device).to(dtype).requires_grad_()
    weight_VD = (torch.randn(V, D, device=device) * 0.05).to(dtype).requires_grad_()
    return hidden_ND, weight_VD, torch.randint(0, V, (N,), device=device)


def cases(options):
    """(hidden_ND, tokens_N, head, bare products, text of the shape) of each shape and dtype."""
    for N, D, V in shapes_of(options):
        for dtype in (torch.bfloat16,) if options.device.type == "cuda" else (torch.float32, torch.bfloat16):
            hidden_ND, weight_VD, tokens_N = inputs(N, D, V, dtype, options.device)
            yield hidden_ND, tokens_N, Head(weight_VD), Products(hidden_ND, weight_VD), f"[{N}, {D}] x [{V}, {D}]"


def fused(hidden_ND, head, tokens_N):
    """The forward that keeps its logits in registers, on a GPU."""
    if hidden_ND.device.type != "cuda":
        return {}
    from fastppo.kernels._linear_stats_triton import TILE, TMA_TILE, fused_forward

    tiles = {"fused TMA 128x256": TMA_TILE, "fused 128x128": TILE}
    if torch.cuda.get_device_capability()[0] < 9:
        del tiles["fused TMA 128x256"]
    given = hidden_ND.detach(), head._replace(weight_VD=head.weight_VD.detach()), tokens_N
    return {name: lambda tile=tile: fused_forward(*given, tile=tile) for name, tile in tiles.items()}


def shapes_of(options):
    if options.quick:
        return [(16, 32, 1000)]
    return [(8192, 2048, 151_936)] if options.device.type == "cuda" else [(1024, 768, 50_257)]


def main():
    options = arguments(__doc__)
    device, show = options.device, dict(device=options.device, csv=options.csv, baseline="products")
    for hidden_ND, tokens_N, head, bare, shape in cases(options):
        dtype, N, flops = hidden_ND.dtype, len(hidden_ND), 2 * len(hidden_ND) * head.weight_VD.numel()
        g_N, h_N = torch.randn(2, N, device=device)

        def forward(hidden_ND=hidden_ND, head=head, tokens_N=tokens_N):
            with torch.no_grad():
                return linear_logprob(hidden_ND, head, tokens_N)

        def both(run, hidden_ND=hidden_ND, head=head, tokens_N=tokens_N, g_N=g_N, h_N=h_N):
            made = run(hidden_ND, head, tokens_N)
            return torch.autograd.grad(made, (hidden_ND, head.weight_VD), [g_N, h_N])

        fns = {"ours": forward, "products": bare.logits, **fused(hidden_ND, head, tokens_N)}
        memory = f"{extra_mib(forward, device, 8 * N):.0f} MiB extra"
        medians_ms = compare(fns, rounds=options.rounds, warmup=1, device=device)
        report("linear_logprob", shape, dtype, medians_ms, flops=flops, note=f"forward; {memory}", **show)
        fns = {
            "ours": lambda both=both: both(linear_logprob),
            "products": bare.four,
            "torch": lambda both=both: both(linear_logprob_reference),
        }
        memory = f"{extra_mib(fns['ours'], device, hidden_ND.nbytes + head.weight_VD.nbytes):.0f} MiB extra"
        medians_ms = compare(fns, rounds=max(3, options.rounds // 3), warmup=1, device=device)
        report("linear_logprob", shape, dtype, medians_ms, flops=4 * flops, note=f"fwd+bwd; {memory}", **show)


if __name__ == "__main__":
    main()
