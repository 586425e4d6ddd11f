"""Rollouts on a GPU: tokens of model.generate, with CUDA graphs and without; values; the demo's trainer for two steps.

Skipped without a GPU, where test_generation_*.py and test_cuda_graphs.py cover the same code but for the capture.
"""

import pytest
import torch
from architectures import tiny
from test_generation_greedy import greedy_by_transformers, logprobs_by_full_pass, make_prompts

from fastppo.generation import Generator

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
NEW = 40  # three calls of 16 steps: eager, captured, replayed


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "mistral", "gemma2"])
def test_greedy_tokens_are_those_of_transformers(device, name, graphs):
    model, prompts = tiny(name).to(device), [p.to(device) for p in make_prompts()]
    generator = Generator(model, cuda_graphs=graphs)
    rollout = generator.generate(prompts, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    for prompt, response, logprobs in zip(prompts, rollout.responses, rollout.logprobs_BT, strict=True):
        full = logprobs_by_full_pass(model, prompt, response)
        torch.testing.assert_close(logprobs[: len(response)], full, rtol=0, atol=1e-3)  # TF32 or not
    wanted = greedy_by_transformers(model, prompts, NEW)
    same = [a.tolist() == b for a, b in zip(rollout.responses, wanted, strict=True)]
    assert sum(same) >= len(same) - 1, "at most one sequence may part where two logits tie to rounding"
    assert generator.graphs.why_not is None and (generator.graphs.captures > 0) == graphs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_do_not_depend_on_graphs_or_batch(device, dtype):
    model, prompts = tiny("qwen3").to(device, dtype), [p.to(device) for p in make_prompts()]
    options = dict(max_new_tokens=NEW, do_sample=True, top_k=20, top_p=0.9, seed=5, eos_token_id=7, pad_token_id=0)
    ours = [Generator(model, cuda_graphs=x).generate(prompts, **options) for x in (True, False)]
    assert torch.equal(ours[0].tokens_BT, ours[1].tokens_BT)
    torch.testing.assert_close(ours[0].logprobs_BT, ours[1].logprobs_BT)


def test_an_optimizer_step_in_place_is_seen_by_a_captured_graph(device):
    model, prompts = tiny("llama").to(device), [p.to(device) for p in make_prompts()]
    generator = Generator(model, num_blocks=64)
    options = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    for _ in range(2):
        made = generator.generate(prompts, **options)
        fresh = Generator(model, cuda_graphs=False).generate(prompts, **options)
        assert torch.equal(made.tokens_BT, fresh.tokens_BT)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.1)


def test_values_and_a_training_step(device):
    from tiny_models import tokenizer

    from fastppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    words = tokenizer()
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny("llama"))
    reference = AutoModelForCausalLMWithValueHead.from_pretrained(tiny("llama"))
    config = PPOConfig(batch_size=4, mini_batch_size=2, ppo_epochs=2, mixed_precision="bf16")
    trainer = PPOTrainer(config, model, reference, words)
    queries = [p.to(device) for p in make_prompts(60)[:4]]
    for _ in range(2):
        responses = trainer.generate(queries, return_prompt=False, max_new_tokens=NEW, pad_token_id=0, eos_token_id=-1)
        stats = trainer.step(queries, list(responses), [torch.tensor(float(i)) for i in range(4)])
        assert torch.isfinite(torch.tensor(float(stats["ppo/loss/total"])))
    assert all(torch.isfinite(p).all() for p in model.parameters())
