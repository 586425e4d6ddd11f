"""linear_ppo_loss forward + backward against three bare matrix products, linear_logprob + ppo_loss, and eager PyTorch."""

import torch
from bench_linear_logprob import Products, inputs, shapes_of
from harness import arguments, compare, report
from peak import extra_mib

from fastppo.kernels.linear_logprob import Head, linear_logprob
from fastppo.kernels.linear_ppo_loss import linear_ppo_loss
from fastppo.kernels.ppo_loss import PPOBatch, PPOLossOptions, ppo_loss


def main():
    options = arguments(__doc__)
    device = options.device
    dtypes = (torch.bfloat16,) if device.type == "cuda" else (torch.float32, torch.bfloat16)
    for N, D, V in shapes_of(options):
        for dtype in dtypes:
            hidden_ND, weight_VD, tokens_N = inputs(N, D, V, dtype, device)
            head, bare = Head(weight_VD), Products(hidden_ND, weight_VD)
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
            memory = f"{extra_mib(fused, device, hidden_ND.nbytes + weight_VD.nbytes):.0f} MiB extra"
            medians_ms = compare(fns, rounds=max(3, options.rounds // 3), warmup=1, device=device)
            report(
                "linear_ppo_loss",
                f"[{N}, {D}] x [{V}, {D}]",
                dtype,
                medians_ms,
                device=device,
                flops=6 * N * D * V,
                baseline="products",
                note=f"fwd+bwd; {memory}",
                csv=options.csv,
            )


if __name__ == "__main__":
    main()
