"""Rollouts beside model.generate: same model, prompts and lengths, in turn; response tokens per second and their ratio.

The floor of a rollout is what its decode steps must read: weights once a step and the keys and values of every sequence.
bench/results/generate.csv has a row per variant; `speedup` is over model.generate, `note` has tokens/s.
"""

import harness
import torch


def gpt2(**sizes):
    import transformers

    config = transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config)


def stories(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def step_bytes(model, prompt: int, limits: list[int], width: int) -> int:
    """Bytes that the decode steps of one rollout read; width: of a weight, key or value."""
    config = model.config
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    per_token = 2 * width * config.num_hidden_layers * kv_heads * (config.hidden_size // config.num_attention_heads)
    weights = sum(p.numel() for p in model.parameters()) * width
    total = 0
    for step in range(1, max(limits)):
        total += weights + sum(limit > step for limit in limits) * (prompt + step) * per_token
    return total


def case(name: str, model, B: int, prompt: int, limits: list[int], options, variants: dict) -> None:
    from fastppo.generation import Generator

    model.eval()
    torch.manual_seed(0)
    prompts = [torch.randint(3, model.config.vocab_size, (prompt,)) for _ in range(B)]
    ids = torch.stack(prompts)
    sampling = dict(do_sample=True, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0)

    def theirs():
        return model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max(limits), **sampling
        )

    runs = {}
    for variant, arguments in variants.items():
        generator = Generator(model, **arguments)
        runs[variant] = lambda generator=generator: generator.generate(prompts, max_new_tokens=limits, **sampling)
    medians_ms = harness.compare({**runs, "torch": theirs}, rounds=options.rounds, warmup=1)
    tokens = sum(limits)
    for variant, ms in medians_ms.items():
        print(
            f"{name:>32} {variant:>10} {ms:9.1f} ms {tokens / ms * 1e3:9.0f} tokens/s {medians_ms['torch'] / ms:6.2f}x"
        )
    width = 2 if "bf16" in variants else 4
    harness.report(
        "generate",
        f"{name} batch {B} prompt {prompt} new {min(limits)}-{max(limits)}",
        torch.float32,
        medians_ms,
        bytes=step_bytes(model, prompt, limits, width),
        baseline="torch",
        note=f"{tokens} response tokens; torch is model.generate",
        csv=options.csv,
    )


def main() -> None:
    options = harness.arguments(__doc__, cases=True)
    options.rounds = min(options.rounds, 5)
    folder = harness.ROOT.parent / "shared" / "models" / "stories260K"
    small = dict(vocab_size=5000, n_embd=256, n_layer=4, n_head=4)
    ragged = [8 + i * 37 % 57 for i in range(64)]
    half = {"bf16": dict(decode_weights=torch.bfloat16)}
    cases = {
        "stories260K": (lambda: stories(folder), 32, 8, [48] * 32, {"fp32": {}}),
        "gpt2 4x256": (lambda: gpt2(**small), 16, 32, [64] * 16, {"fp32": {}}),
        "gpt2 4x256 ragged": (lambda: gpt2(**small), 64, 32, ragged, {"fp32": {}}),
        "gpt2 124M": (gpt2, 16, 32, [64] * 16, {"fp32": {}}),
        "gpt2 124M, bf16 decode weights": (gpt2, 16, 32, [64] * 16, half),
    }
    chosen = options.only or list(cases)[: 2 if options.quick else None]
    if unknown := set(chosen) - set(cases):
        raise SystemExit(f"bench_generate: no case {sorted(unknown)}; there are {', '.join(cases)}")
    for name in chosen:
        make, B, prompt, limits, variants = cases[name]
        if name != "stories260K" or folder.is_dir():
            case(name.partition(",")[0], make(), B, prompt, limits, options, variants)


if __name__ == "__main__":
    main()
