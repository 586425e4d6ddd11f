"""Rollouts on a GPU: ours with and without CUDA graphs, model.generate and transformers' continuous batching, one after the other.

Random bf16 models of the shapes of Qwen3-0.6B, Qwen3-1.7B and Llama-3-8B. percent_of_floor: (weights + KV bytes that the decode steps
must read) over the copy bandwidth measured in this run; speedup is over model.generate. One timed run each after a short one.
"""

import sys
import time

import harness
import torch

QWEN3 = dict(num_attention_heads=16, num_key_value_heads=8, head_dim=128, num_hidden_layers=28, vocab_size=151_936)
MODELS = {
    "qwen3-0.6b": ("Qwen3Config", QWEN3 | dict(hidden_size=1024, intermediate_size=3072, tie_word_embeddings=True)),
    "qwen3-1.7b": ("Qwen3Config", QWEN3 | dict(hidden_size=2048, intermediate_size=6144, tie_word_embeddings=True)),
    "llama3-8b": (
        "LlamaConfig",
        dict(hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32)
        | dict(num_key_value_heads=8, vocab_size=128_256),
    ),
}
TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
TINY |= dict(vocab_size=500, head_dim=16)


def build(name: str, device: torch.device, dtype: torch.dtype, quick: bool):
    """The model with random weights, made on its device."""
    import transformers

    kind, sizes = MODELS[name]
    config = getattr(transformers, kind)(**(sizes | TINY if quick else sizes), max_position_embeddings=4096)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.to(device).eval()


def floor_bytes(model, B: int, prompt: int, new: int) -> int:
    """Weights once per step (a tied embedding once, an untied input embedding not), and every cached key and value."""
    config = model.config
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    weights = sum(p.numel() for p in model.parameters()) - (0 if inputs is outputs else inputs.numel())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    context = sum(prompt + step for step in range(1, new))
    return inputs.element_size() * ((new - 1) * weights + B * context * per_token)


def ours(model, prompts, new: int, graphs: bool):
    from fastppo.generation import Generator

    options = {"cuda_graphs": graphs} if model.device.type == "cuda" else {}
    generator = Generator(model, max_num_seqs=len(prompts), **options)
    sampling = dict(do_sample=True, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0)
    return lambda n=new: generator.generate(prompts, max_new_tokens=n, seed=0, **sampling)


def theirs(model, prompts, new: int):
    ids = torch.stack(prompts)
    sampling = dict(do_sample=True, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0)
    return lambda n=new: model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, **sampling
    )


def continuous(model, prompts, new: int):
    from transformers import GenerationConfig

    lists = [prompt.tolist() for prompt in prompts]

    def run(n=new):
        config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=n, eos_token_id=-1, pad_token_id=0)
        made = model.generate_batch(lists, generation_config=config)
        counts = {len(x.generated_tokens) for x in made.values()}
        if len(made) != len(lists) or counts != {n}:
            raise RuntimeError(f"{len(made)} of {len(lists)} requests came back, with {counts} tokens instead of {n}")

    return run


def seconds(run, device: torch.device, warm: int) -> float:
    run(warm)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> int:
    options = harness.arguments(__doc__, model="qwen3-0.6b", batch=32)
    name, B = options.model, options.batch
    device, dtype = options.device, torch.bfloat16 if options.device.type == "cuda" else torch.float32
    prompt, new, B = (16, 6, min(B, 3)) if options.quick else (128, 512, B)
    model = build(name, device, dtype, options.quick)
    prompts = list(torch.randint(3, model.config.vocab_size, (B, prompt), device=device))
    makers = {
        "ours, graphs": lambda: ours(model, prompts, new, True),
        "ours, no graphs": lambda: ours(model, prompts, new, False),
    }
    makers |= {"model.generate": lambda: theirs(model, prompts, new)}
    if device.type == "cuda":  # on a CPU it takes seconds per token
        makers |= {"transformers continuous batching": lambda: continuous(model, prompts, new)}
    medians_ms, failed, shape = {}, 0, f"{name} batch {B} prompt {prompt} new {new}"
    for variant, maker in makers.items():
        try:
            medians_ms[variant] = 1e3 * seconds(maker(), device, min(8, new))
            print(f"{shape} {variant}: {B * new / medians_ms[variant] * 1e3:.0f} tokens/s", flush=True)
        except Exception as error:  # the others still run; the part fails if it was one of ours
            note = f"does not run: {type(error).__name__}: {str(error)[:200]}"
            print(f"{shape} {variant} {note}", flush=True)
            failed += variant.startswith("ours")
            if options.csv:
                harness.write_row("rollout", device.type, variant=variant, shape=shape, note=note)
    note = "tokens/s: " + ", ".join(f"{k} {B * new / ms * 1e3:.0f}" for k, ms in medians_ms.items())
    show = dict(
        device=device, bytes=floor_bytes(model, B, prompt, new), baseline="model.generate", csv=options.csv, note=note
    )
    harness.report("rollout", shape, dtype, medians_ms, **show)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
