"""Every GPU kernel once or twice on small awkward shapes, for compute-sanitizer to watch; its numbers are compared with the reference.

compute-sanitizer --tool memcheck|racecheck python bench/gpu_sanitize.py --backend cuda|triton
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from fastppo.kernels import (
    gae,
    kl_reward,
    linear_logprob,
    linear_ppo_loss,
    logprob,
    paged_attention,
    ppo_loss,
    sampling,
)

CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def close(ours, reference, tolerance: float = 2e-3) -> None:
    """Raise unless every floating tensor is within `tolerance` of the reference, relative to its largest number."""
    for a, b in zip(ours, reference, strict=True):
        scale = max(1.0, float(b.float().abs().nan_to_num().max())) if b.numel() else 1.0
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=tolerance * scale, equal_nan=True)


@case
def run_logprob(device, backend):
    for dtype, (N, V) in ((torch.float32, (3, 517)), (torch.bfloat16, (5, 4099))):
        logits_NV = torch.randn(N, V, device=device).to(dtype).requires_grad_()
        tokens_N, upstream = torch.randint(0, V, (N,), device=device), list(torch.randn(2, N, device=device))
        both = []
        for name in (backend, "reference"):
            made = logprob.logprob(logits_NV, tokens_N, temperature=0.7, backend=name)
            both.append([*made, *torch.autograd.grad(made, logits_NV, upstream)])
        close(*both, tolerance=2e-2 if dtype == torch.bfloat16 else 1e-4)


@case
def run_linear(device, backend):
    if backend not in linear_logprob.BACKEND_TABLE:
        return
    N, D, V = 37, 32, 517
    hidden_ND, weight_VD = torch.randn(N, D, device=device), torch.randn(V, D, device=device)
    leaves = [x.requires_grad_() for x in (hidden_ND, weight_VD, torch.randn(V, device=device))]
    head, tokens_N = linear_logprob.Head(*leaves[1:], softcap=20.0), torch.randint(0, V, (N,), device=device)
    batch = ppo_loss.PPOBatch(*torch.randn(4, N, device=device), torch.rand(N, device=device) < 0.8)
    both = []
    for name in (backend, "reference"):
        made = linear_logprob.linear_logprob(hidden_ND, head, tokens_N, backend=name)
        grads = torch.autograd.grad(made, leaves, [torch.ones(N, device=device)] * 2)
        loss = linear_ppo_loss.linear_ppo_loss(
            *(hidden_ND, torch.zeros(N, device=device), head, tokens_N, batch, ppo_loss.PPOLossOptions()), backend=name
        ).loss
        both.append([*made, *grads, loss, *torch.autograd.grad(loss, leaves)])
    close(*both, tolerance=1e-2)  # float32 products may run in TF32


@case
def run_fused_forward(device, backend):
    if backend != "triton":
        return
    from fastppo.kernels._linear_stats_triton import fused_forward

    hidden_ND, weight_VD = torch.randn(37, 128, device=device).bfloat16(), torch.randn(5003, 128, device=device) / 8
    head, tokens_N = linear_logprob.Head(weight_VD.bfloat16()), torch.randint(0, 5003, (37,), device=device)
    both = (
        fused_forward(hidden_ND, head, tokens_N),
        linear_logprob.linear_logprob_reference(hidden_ND, head, tokens_N),
    )
    close(*both, tolerance=2e-2)


@case
def run_rewards(device, backend):
    B, T = 5, 1300
    logprobs_BT, ref_BT, values_BT = torch.randn(3, B, T, device=device)
    mask_BT = torch.rand(B, T, device=device) < 0.9
    scores_B = torch.randn(B, device=device)
    starts = torch.tensor([0, 1, 700, T * B], dtype=torch.int32, device=device)
    for masked in gae.MASKED:
        options = gae.ShapedGAEOptions(kind="k3", masked=masked)
        padded, packed = [], []
        for name in (backend, "reference"):
            made = gae.shaped_gae(logprobs_BT, ref_BT, values_BT, mask_BT, scores_B, options, backend=name)
            padded.append([*made[:3], made.moments_3.float()])
            flat = (x.flatten() for x in (values_BT, ref_BT))
            made = gae.gae_packed(
                *flat, starts, gamma=0.99, lam=0.95, mask_N=mask_BT.flatten(), masked=masked, backend=name
            )
            packed.append(made[:2])
        close(*padded)
        close(*packed)
    if backend in kl_reward.BACKEND_TABLE:
        run = lambda name: kl_reward.kl_reward(logprobs_BT, ref_BT, mask_BT, scores_B, kl_coef=0.2, kind="k3", backend=name)  # fmt: skip  # noqa: E731
        close(run(backend), run("reference"))


@case
def run_ppo_loss(device, backend):
    if backend not in ppo_loss.BACKEND_TABLE:
        return
    N = 3001
    leaves = [(torch.randn(N, device=device) * 0.3).requires_grad_() for _ in range(3)]
    batch = ppo_loss.PPOBatch(*(torch.randn(4, N, device=device) * 0.3), torch.rand(N, device=device) < 0.9)
    options, both = ppo_loss.PPOLossOptions(entropy_coef=0.1, dual_clip=2.0), []
    for name in (backend, "reference"):
        made = ppo_loss.ppo_loss(*leaves[:2], batch, options, entropy_N=leaves[2], backend=name)
        both.append([made.loss, *torch.autograd.grad(made.loss, leaves)])
    close(*both)


@case
def run_sampling(device, backend):
    for dtype, V in ((torch.float32, 517), (torch.bfloat16, 5003)):
        logits_BV = (torch.randn(4, V, device=device) * 2).to(dtype)
        rows_B = torch.arange(4, device=device)
        for options in (
            dict(top_k=50, top_p=0.9, min_p=0.01),
            dict(top_p=0.9),
            dict(temperature=0.7),
            dict(temperature=0),
        ):
            options = sampling.SamplingOptions(**options)
            ours, theirs = (
                sampling.sampling(logits_BV, rows_B, rows_B, options, backend=x) for x in (backend, "reference")
            )
            close([ours.entropy_B], [theirs.entropy_B])
            assert ((ours.tokens_B >= 0) & (ours.tokens_B < V)).all()


@case
def run_paged_attention(device, backend):
    KV, H, D, blocks = 2, 8, 64, 60
    lens_B = torch.tensor([1, 300, 17], dtype=torch.int32, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        caches = [torch.randn(blocks, 16, KV, D, device=device).to(dtype) for _ in range(2)]
        k_NKD, slots_N = (
            torch.randn(5, KV, D, device=device).to(dtype),
            torch.tensor([3, 99, -1, 500, 7], device=device),
        )
        paged_attention.cache_write(k_NKD, k_NKD, *caches, slots_N, backend=backend)
        tables_BM = torch.randint(0, blocks, (3, 20), dtype=torch.int32, device=device)
        q_BHD = torch.randn(3, H, D, device=device).to(dtype)
        run = lambda name: paged_attention.paged_attention(q_BHD, *caches, tables_BM, lens_B, scale=0.125, window=250, backend=name)  # fmt: skip  # noqa: E731, B023
        close([run(backend)], [run("reference")], tolerance=2e-2)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="cuda")
    options = parser.parse_args()
    torch.manual_seed(0)
    for name, run in CASES.items():
        run(torch.device(options.device), options.backend)
        if options.device == "cuda":
            torch.cuda.synchronize()
        print(f"{name}: ok", flush=True)


if __name__ == "__main__":
    main()
