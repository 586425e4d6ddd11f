"""linear_ppo_loss forward + backward against three bare matrix products, linear_logprob + ppo_loss, and eager PyTorch."""

import torch
from bench_linear_logprob import cases
from harness import arguments, compare, report
from peak import extra_mib

from fastppo.kernels.linear_logprob import linear_logprob
from fastppo.kernels.linear_ppo_loss import linear_ppo_loss
from fastppo.kernels.ppo_loss import PPOBatch, PPOLossOptions, ppo_loss


def main():
    options = arguments(__doc__)
    device = options.device
    for hidden_ND, tokens_N, head, bare, shape in cases(options):
        N, weight_VD = len(hidden_ND), head.weight_VD
        values_N = torch.randn(N, device=device, requires_grad=True)
        with torch.no_grad():
            old_N = linear_logprob(hidden_ND, head, tokens_N).logprob_N + 0.05 * torch.randn(N, device=device)
        batch = PPOBatch(old_N, *torch.randn(3, N, device=device))
        leaves = (hidden_ND, weight_VD, values_N)

        def fused(backend=None, head=head, tokens_N=tokens_N, batch=batch, leaves=leaves):
            made = linear_ppo_loss(leaves[0], leaves[2], head, tokens_N, batch, PPOLossOptions(), backend=backend)
            return torch.autograd.grad(made.loss, leaves)

        def two_rooms(head=head, tokens_N=tokens_N, batch=batch, leaves=leaves):
            logprob_N = linear_logprob(leaves[0], head, tokens_N).logprob_N
            return torch.autograd.grad(ppo_loss(logprob_N, leaves[2], batch, PPOLossOptions()).loss, leaves)

        fns = {
            "ours": fused,
            "products": bare.three,
            "two rooms": two_rooms,
            "torch": lambda fused=fused: fused("reference"),
        }
        note = f"fwd+bwd; {extra_mib(fused, device, hidden_ND.nbytes + weight_VD.nbytes):.0f} MiB extra"
        medians_ms = compare(fns, rounds=max(3, options.rounds // 3), warmup=1, device=device)
        show = dict(device=device, baseline="products", csv=options.csv, note=note)
        report("linear_ppo_loss", shape, hidden_ND.dtype, medians_ms, flops=6 * N * weight_VD.numel(), **show)


if __name__ == "__main__":
    main()
