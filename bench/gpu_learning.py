"""Does PPO learn on the GPU in bf16 what it learns on the CPU in float32? The demo's task: a tiny story model learns to be happy.

Needs no download: the language model is trained here from the package's own corpus, once, on the CPU; then the same PPO runs from the
same weights on the device in bf16 and on the CPU in float32, two seeds each. Random numbers differ between precisions, so curves
agree in distribution: the part fails where the GPU's gain is under half of the CPU's. Rows: reward of the first and last steps.
"""

import copy
import statistics
import sys
import time

import harness
import torch

from fastppo.cli.demo import BATCH, RESPONSE_TOKENS
from fastppo.cli.stories import corpus, happiness
from fastppo.cli.tiny_lm import new_model, train_language_model, train_tokenizer


def language_model(lm_steps: int):
    texts = [f"{opening} {rest}" for opening, rest in corpus(2000, 0)]
    tokenizer = train_tokenizer(texts)
    torch.manual_seed(0)
    model = new_model(tokenizer)
    train_language_model(model, tokenizer, texts, lm_steps, 0, lambda *_: None)
    return model, tokenizer


def curve(model, tokenizer, seed: int, steps: int, bf16: bool, device: str) -> list[float]:
    """Mean reward of every PPO step."""
    import fastppo

    config = fastppo.PPOConfig(
        seed=seed, learning_rate=3e-4, batch_size=BATCH, mini_batch_size=BATCH // 4, ppo_epochs=4, init_kl_coef=0.2,
        adap_kl_ctrl=False, max_grad_norm=1.0, mixed_precision="bf16" if bf16 else None,
        accelerator_kwargs={"cpu": True} if device == "cpu" else {},
    )  # fmt: skip
    policy = fastppo.AutoModelForCausalLMWithValueHead.from_pretrained(copy.deepcopy(model))
    trainer = fastppo.PPOTrainer(config, policy, fastppo.create_reference_model(policy), tokenizer)
    openings = [torch.tensor(tokenizer(opening).input_ids) for opening, _ in corpus(512, seed + 1)]
    options = dict(max_new_tokens=RESPONSE_TOKENS, do_sample=True, top_k=0, top_p=1.0, return_prompt=False)
    options |= dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    rewards = []
    for step in range(steps):
        queries = [openings[(step * BATCH + i) % len(openings)].to(trainer.accelerator.device) for i in range(BATCH)]
        responses = trainer.generate(queries, **options)
        scores = [torch.tensor(happiness(tokenizer.decode(r, skip_special_tokens=True))) for r in responses]
        trainer.step(queries, list(responses), scores)
        rewards.append(statistics.mean(map(float, scores)))
    return rewards


def main() -> int:
    options = harness.arguments(__doc__)
    kind = options.device.type
    steps, lm_steps, seeds = (2, 3, (0,)) if options.quick else (40, 300, (0, 1))
    model, tokenizer = language_model(lm_steps)
    # accelerate keeps its device for the process, so the CPU's curves run in a child that has no GPU
    sides = {"bf16": (True, "cuda")} if kind == "cuda" else {"float32": (False, "cpu")}
    gains = {}
    for variant, (bf16, device) in sides.items():
        for seed in seeds:
            start = time.perf_counter()
            rewards = curve(model, tokenizer, seed, steps, bf16, device)
            span = max(1, steps // 8)
            first, last = statistics.mean(rewards[:span]), statistics.mean(rewards[-span:])
            gains.setdefault(variant, []).append(last - first)
            note = f"seed {seed}, {steps} steps: reward {first:.3f} -> {last:.3f}; {time.perf_counter() - start:.1f} s"
            note += "; " + " ".join(f"{r:.2f}" for r in rewards)
            print(f"{kind} {variant} {note}", flush=True)
            if options.csv:
                dtype = "bfloat16" if bf16 else "float32"
                harness.write_row(
                    "learning", device, variant=f"{device} {variant}", dtype=dtype, shape="demo", note=note
                )
    if kind == "cuda":
        return compare_with_cpu(statistics.mean(gains["bf16"]), options)
    return 0


def compare_with_cpu(gain: float, options) -> int:
    """Run this file again without a GPU; its rows go to the same place. 1 when the gain here is under half of the CPU's."""
    import os
    import re
    import subprocess

    command = [sys.executable, __file__, "--device", "cpu", *(["--quick", "--keep-rows"] if options.quick else [])]
    ran = subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    print(ran.stdout, ran.stderr[-2000:])
    found = re.findall(r"cpu float32 seed .*reward (-?[\d.]+) -> (-?[\d.]+)", ran.stdout)
    if ran.returncode or not found:
        return 1
    theirs = statistics.mean(float(last) - float(first) for first, last in found)
    print(f"gain on the GPU in bf16 {gain:.3f}, on the CPU in float32 {theirs:.3f}")
    return 0 if options.quick or gain >= 0.5 * theirs else 1


if __name__ == "__main__":
    sys.exit(main())
