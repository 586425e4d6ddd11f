"""Fused KL shaping + GAE + returns + whitening sums against Python loops; GAE alone as well.

"python loop" is the work as PPO trainers write it in Python: a reward row per sequence, a GAE step per token (each for the
whole batch at once), returns, whitening. "torch" is the room's reference: the same loop over tokens, the rest in whole tensors,
whitening sums but no whitened advantages.
"""

import os

import torch
from harness import arguments, call_us, compare, graph_ms, report

from fastppo.kernels.gae import ShapedGAEOptions, gae, shaped_gae

FUSED_BYTES, GAE_BYTES = 13 + 8, 9 + 8  # per token: three or two float32 and a mask byte read, two float32 written


def python_loop(logprobs_BT, ref_BT, values_BT, mask_BT, scores_B, o):
    rewards = []
    for score, logprobs_T, ref_T, mask_T in zip(scores_B, logprobs_BT, ref_BT, mask_BT, strict=True):
        reward_T = -o.kl_coef * (logprobs_T - ref_T)
        reward_T[mask_T.nonzero()[-1]] += score
        rewards.append(reward_T)
    rewards_BT, values_BT = torch.stack(rewards) * mask_BT, values_BT * mask_BT
    advantages, next_advantage_B, T = [], 0, values_BT.shape[1]
    for t in reversed(range(T)):
        next_value_B = values_BT[:, t + 1] if t + 1 < T else 0.0
        delta_B = rewards_BT[:, t] + o.gamma * next_value_B - values_BT[:, t]
        next_advantage_B = delta_B + o.gamma * o.lam * next_advantage_B
        advantages.append(next_advantage_B)
    advantages_BT = torch.stack(advantages[::-1]).T
    counted = advantages_BT[mask_BT]
    return (advantages_BT - counted.mean()) * (counted.var() + 1e-8).rsqrt(), advantages_BT + values_BT


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
            if bench != "gae":
                runs["python loop"] = lambda x=(logprobs_BT, ref_BT, values_BT, mask_BT, scores_B): python_loop(
                    *x, shaping
                )
            medians_ms, note = compare(runs, rounds=options.rounds, device=device, cold=device.type == "cuda"), ""
            if device.type == "cpu":
                note = f"OMP_WAIT_POLICY={(os.environ['OMP_WAIT_POLICY'] or 'default')}"
            if device.type == "cuda":
                note = f"cold L2; {call_us(runs['ours']):.1f} us a call from Python; warm in a graph {1e3 * graph_ms(runs['ours']):.2f} us"
            report(
                "gae", f"[{B}, {T}]", torch.float32, medians_ms, device=device, bytes=B * T * size,
                baseline="python loop" if "python loop" in runs else "torch", note=f"{bench}; {note}".rstrip("; "), csv=options.csv,
            )  # fmt: skip


if __name__ == "__main__":
    main()
