"""One side of bench_loop.py and bench_step.py: a PPO loop under fastppo or TRL, one iteration per line on standard input.

python loop_worker.py fastppo|trl '{"model": "tiny", ...}'   reads a line, runs generate + score + step, writes a JSON line.
Imports nothing of this repository but the package it measures, so that TRL 0.11.4's own environment can run it.
"""

import importlib
import json
import re
import resource
import sys
import time
import warnings

import torch

warnings.filterwarnings("ignore")

PROMPT, RESPONSE, SHORTEST = 32, 64, 8
GPT2 = {"tiny": dict(vocab_size=5000, n_embd=256, n_layer=4, n_head=4), "124m": dict(vocab_size=50257)}
OTHERS = {
    "llama": dict(vocab_size=5000, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4),
    "qwen2": dict(
        vocab_size=5000, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2,
    ),
}  # fmt: skip
HAPPY = r"\b(happy|happily|smiled?|laugh(ed)?|fun|loved?|joy|excited|glad|good|nice|kind|friend|played)\b"
SAD = r"\b(sad|sadly|cry|cried|crying|angry|mad|scared|afraid|hurt|bad|mean|lost|no|not)\b"
OPENINGS = [
    "Once upon a time", "One day", "Lily", "Tom and his mom", "The little dog", "A big bear", "The sun", "In the park",
    "There was a boy named Tim", "Mom said", "Sara had a toy", "The cat",
]  # fmt: skip


def synthetic_model(name: str):
    import transformers

    torch.manual_seed(0)
    if name in GPT2:
        config = transformers.GPT2Config(**GPT2[name])
    else:
        config = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[name](**OTHERS[name])
    return transformers.AutoModelForCausalLM.from_config(config)


def synthetic_tokenizer(vocab_size: int):
    """eos is one past the model's vocabulary: no response ends early, on either side."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocab_size)} | {"</s>": vocab_size}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="w0", unk_token="w1")


class Synthetic:
    """Random prompts of PROMPT tokens, responses of RESPONSE (ragged: SHORTEST to RESPONSE), random scores."""

    def __init__(self, lib, spec: dict):
        self.lib, self.spec = lib, spec
        wrapper = lib.AutoModelForCausalLMWithValueHead
        model, reference = (wrapper.from_pretrained(synthetic_model(spec["model"])) for _ in range(2))
        self.vocab = model.pretrained_model.config.vocab_size
        config = dict(seed=0, batch_size=spec["batch"], mini_batch_size=4, ppo_epochs=4, learning_rate=1e-5)
        config = lib.PPOConfig(**config | spec.get("config", {}))
        self.trainer = lib.PPOTrainer(config, model, reference, synthetic_tokenizer(self.vocab))
        self.rng = torch.Generator().manual_seed(1)

    def iteration(self) -> dict:
        count, spec = self.spec["batch"], self.spec
        queries = [torch.randint(1, self.vocab, (PROMPT,), generator=self.rng) for _ in range(count)]
        lengths = [RESPONSE] * count
        if spec["ragged"]:
            lengths = torch.randint(SHORTEST, RESPONSE + 1, (count,), generator=self.rng).tolist()
        start = time.perf_counter()
        responses = self.generate(queries, lengths) if spec["stage"] == "loop" else self.made_up(lengths)
        middle = time.perf_counter()
        scores = [torch.randn((), generator=self.rng) for _ in range(count)]
        stats = self.trainer.step(queries, responses, scores)
        end = time.perf_counter()
        return {"gen_s": middle - start, "step_s": end - middle, "tokens": sum(lengths), "stats": stats}

    def made_up(self, lengths):
        return [torch.randint(1, self.vocab, (n,), generator=self.rng) for n in lengths]

    def generate(self, queries, lengths):
        options = dict(do_sample=True, top_k=0, top_p=1.0, pad_token_id=0, eos_token_id=-1, return_prompt=False)
        if self.lib.__name__ == "fastppo":
            # what an end-of-sequence token at these lengths would do: continuous batching lets a row end by itself
            left = iter(lengths)
            return self.trainer.generate(queries, length_sampler=lambda: next(left), batch_size=1, **options)
        full = self.trainer.generate(queries, batch_size=len(queries), max_new_tokens=max(lengths), **options)
        return [response[:n] for response, n in zip(full, lengths, strict=True)]


class Stories:
    """Story openings, reward = happy words minus sad words, clipped to [-3, 3]; spec["model"] is a folder."""

    def __init__(self, lib, spec: dict):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(spec["model"])
        self.tokenizer.pad_token = self.tokenizer.eos_token
        wrapper = lib.AutoModelForCausalLMWithValueHead
        models = [AutoModelForCausalLM.from_pretrained(spec["model"]).float() for _ in range(2)]
        models = [wrapper.from_pretrained(model, summary_dropout_prob=0.0) for model in models]
        config = dict(batch_size=32, mini_batch_size=8, ppo_epochs=4, learning_rate=3e-4, init_kl_coef=0.05)
        config = lib.PPOConfig(seed=spec["seed"], **config, **spec.get("config", {}))
        self.trainer = lib.PPOTrainer(config, *models, self.tokenizer)
        self.rng = torch.Generator().manual_seed(spec["seed"])

    def iteration(self) -> dict:
        end = self.tokenizer.eos_token_id
        options = dict(do_sample=True, top_k=0, top_p=1.0, max_new_tokens=48, pad_token_id=end, eos_token_id=end)
        picks = torch.randint(len(OPENINGS), (32,), generator=self.rng).tolist()
        texts = [self.tokenizer.encode(OPENINGS[i], add_special_tokens=False) for i in picks]
        queries = [torch.tensor([1, *ids]) for ids in texts]
        start = time.perf_counter()
        responses = self.trainer.generate(queries, batch_size=32, return_prompt=False, **options)
        middle = time.perf_counter()
        scores = [torch.tensor(reward(self.tokenizer.decode(r, skip_special_tokens=True))) for r in responses]
        stats = self.trainer.step(queries, list(responses), scores)
        times = {"gen_s": middle - start, "step_s": time.perf_counter() - middle}
        return times | {"tokens": sum(map(len, responses)), "stats": stats}


def reward(text: str) -> float:
    happy, sad = (len(re.findall(words, text.lower())) for words in (HAPPY, SAD))
    return max(-3.0, min(3.0, float(happy - sad)))


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def needed(stats: dict) -> dict:
    """Seconds that the step's needed FLOPs take at the matrix product's rate here, and that rate; fastppo measures both."""
    if "fastppo/matmul_flops_per_s" not in stats:
        return {}
    stages = {"prepare": "forward_pass", "optimise": "optimize_step"}
    seconds = sum(stats[f"fastppo/{name}_mfu"] * stats[f"time/ppo/{stage}"] for name, stage in stages.items())
    return {"needed_s": float(seconds), "matmul_gflops": float(stats["fastppo/matmul_flops_per_s"]) / 1e9}


def main() -> None:
    package, spec = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(spec["threads"])
    if not torch.version.cuda:
        # TRL 0.11.4's environment has no triton; where it is installed, torch._dynamo imports it (70 MB), on a CPU to no use
        sys.modules["triton"] = None
    lib = importlib.import_module(package)
    importlib.import_module(f"{package}.trainer.ppo_trainer")  # lazily imported
    imports_mb = peak_mb()
    workload = (Stories if "seed" in spec else Synthetic)(lib, spec)
    # tokens/s etc. go to the real standard output; libraries may print
    out, sys.stdout = sys.stdout, sys.stderr
    for _ in sys.stdin:
        result = workload.iteration()
        stats = result.pop("stats")
        result["reward"] = float(stats["ppo/mean_scores"])
        result["kl"] = float(stats["objective/kl"])
        if "fastppo/mismatch_mean" in stats:
            result["mismatch"] = float(stats["fastppo/mismatch_mean"])
        result |= {"imports_mb": imports_mb, "peak_mb": peak_mb(), **needed(stats)}
        print(json.dumps(result), file=out, flush=True)


if __name__ == "__main__":
    main()
