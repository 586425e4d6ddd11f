"""The whole PPO loop on a GPU, generate + score + step: fastppo against eager_ppo.py (TRL-style), in the same process, in turn.

Random models of the shapes of gpu_rollout.py; float32 master weights under bf16 autocast; llama3-8b-lora: bf16 weights, rank-16
adapters. Prompt 128, response 512, batch 64, 4 epochs of mini-batches of 16 (eager: 4, what its logits leave room for).
Each side: one iteration to warm up, two timed. Rows: ms of an iteration, tokens/s, MFU of the optimise stage, peak memory.
"""

import gc
import sys
import time

import harness
import torch
from eager_ppo import EagerPPO
from gpu_rollout import build
from loop_worker import synthetic_tokenizer

LORA = dict(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")


def adapted(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(**LORA))


class Ours:
    def __init__(self, name: str, lora: bool, options, sizes):
        import fastppo

        dtype = torch.bfloat16 if lora else torch.float32
        wrapper = fastppo.AutoModelForCausalLMWithValueHead
        base = build(name, options.device, dtype, options.quick)
        policy = wrapper.from_pretrained(adapted(base) if lora else base)
        reference = None if lora else wrapper.from_pretrained(build(name, options.device, dtype, options.quick))
        config = fastppo.PPOConfig(
            seed=0, batch_size=sizes.batch, mini_batch_size=sizes.mini, ppo_epochs=4, learning_rate=1e-5,
            max_tokens_per_micro_batch=sizes.micro_tokens, mixed_precision="bf16",
        )  # fmt: skip
        self.trainer = fastppo.PPOTrainer(config, policy, reference, synthetic_tokenizer(base.config.vocab_size))
        self.flops_share = ""

    def iteration(self, prompts_BP, new: int, scores_B) -> dict[str, float]:
        start = now(prompts_BP.device)
        options = dict(do_sample=True, top_k=0, top_p=1.0, pad_token_id=0, eos_token_id=-1, max_new_tokens=new)
        responses = self.trainer.generate(list(prompts_BP), return_prompt=False, **options)
        middle = now(prompts_BP.device)
        stats = self.trainer.step(list(prompts_BP), list(responses), list(scores_B))
        self.flops_share = f"; optimise MFU {100 * float(stats['fastppo/optimise_mfu']):.1f} %"
        return {"generate": middle - start, "step": now(prompts_BP.device) - middle}


def theirs(name: str, lora: bool, options, sizes):
    model = build(name, options.device, torch.bfloat16 if lora else torch.float32, options.quick)
    if lora:
        return EagerPPO(adapted(model), None, mini_batch=sizes.eager_mini)
    reference = build(name, options.device, torch.float32, options.quick).requires_grad_(False)
    return EagerPPO(model, reference, mini_batch=sizes.eager_mini)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Sizes:
    def __init__(self, quick: bool):
        self.batch, self.mini, self.eager_mini = (4, 2, 2) if quick else (64, 16, 4)
        self.prompt, self.new, self.timed = (8, 6, 1) if quick else (128, 512, 2)
        self.micro_tokens = None if quick else 16 * 640


def measure(side, vocab: int, options, sizes: Sizes) -> tuple[list[dict], int]:
    """Seconds per stage of each timed iteration, and the peak bytes on the GPU."""
    generator = torch.Generator().manual_seed(1)
    results = []
    for i in range(1 + sizes.timed):
        prompts_BP = torch.randint(1, vocab, (sizes.batch, sizes.prompt), generator=generator).to(options.device)
        scores_B = torch.randn(sizes.batch, generator=generator).to(options.device)
        if i == 1 and options.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        made = side.iteration(prompts_BP, sizes.new, scores_B)
        print({k: round(v, 3) for k, v in made.items()}, flush=True)
        results += [made] if i else []
    return results, torch.cuda.max_memory_allocated() if options.device.type == "cuda" else 0


def main() -> int:
    options = harness.arguments(__doc__, model="qwen3-0.6b")
    name = options.model
    base, lora, sizes = name.removesuffix("-lora"), name.endswith("-lora"), Sizes(options.quick)
    vocab = 500 if options.quick else 100_000
    shape = f"{name} batch {sizes.batch} prompt {sizes.prompt} response {sizes.new}"
    rows, failed = [], 0
    for variant, make in (("fastppo", Ours), ("eager (TRL-style)", theirs)):
        row = {"variant": variant, "shape": shape, "dtype": "bfloat16"}
        try:
            side = make(base, lora, options, sizes)
            results, peak = measure(side, vocab, options, sizes)
            seconds = sum(sum(r.values()) for r in results) / len(results)
            stages = ", ".join(f"{k} {sum(r[k] for r in results) / len(results):.3f} s" for k in results[0])
            rate = sizes.batch * sizes.new / seconds
            share = getattr(side, "flops_share", "")
            row |= {
                "ms": f"{seconds * 1e3:.1f}",
                "note": f"{rate:.1f} response tok/s; {stages}{share}; peak {peak / 2**30:.1f} GiB",
            }
        except Exception as error:  # e.g. out of memory: the other side still runs, the part fails
            failed, row["note"] = 1, f"does not run: {type(error).__name__}: {str(error)[:200]}"
        rows.append(row)
        side = None
        gc.collect()
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    if all("ms" in row for row in rows):
        for row in rows:
            row["speedup"] = f"{float(rows[1]['ms']) / float(row['ms']):.2f}"
    for row in rows:
        if options.csv:
            harness.write_row("loop", options.device.type, **row)
    harness.print_table(f"loop {shape}", rows, ("variant", "ms", "speedup", "note"))
    return failed


if __name__ == "__main__":
    sys.exit(main())
