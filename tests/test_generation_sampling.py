"""Sampled tokens: their distribution, their independence of the batch, seeds."""

import math

import pytest
import torch
from architectures import tiny

from fastppo.generation import Generator

DRAWS = 4000


def _chi_square_p(counts, p):
    """Survival function of the chi-square statistic (Wilson-Hilferty), tokens expected under 5 times pooled."""
    n = counts.sum()
    expected = p * n
    rare = expected < 5
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = expected > 0
    assert counts[~keep].sum() == 0, "a token of probability 0 was sampled"
    counts, expected = counts[keep], expected[keep]
    freedom = len(counts) - 1
    x = ((counts - expected) ** 2 / expected).sum().item()
    z = ((x / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


def _exact(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """By transformers' own processors."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return scores[0].double().softmax(-1)


@pytest.mark.parametrize(
    "options", [dict(temperature=0.7), dict(top_k=5), dict(top_p=0.8), dict(min_p=0.1), dict(top_k=9, top_p=0.9)]
)
def test_distribution_of_the_second_token(options):
    model, prompt = tiny("llama", scale=0.6), torch.tensor([5, 6, 7])
    given = dict(temperature=1.0, top_k=0, top_p=1.0) | options
    rollout = Generator(model).generate(
        [prompt] * DRAWS, max_new_tokens=2, do_sample=True, seed=1, eos_token_id=None, **given
    )
    with torch.no_grad():
        first = _exact(model(input_ids=prompt[None]).logits[0, -1], **given)
        assert _chi_square_p(torch.bincount(rollout.tokens_BT[:, 0], minlength=97).double(), first) > 1e-3
        common = rollout.tokens_BT[:, 0].mode().values
        second = _exact(model(input_ids=torch.cat([prompt, common[None]])[None]).logits[0, -1], **given)
    rows = rollout.tokens_BT[:, 0] == common
    counts = torch.bincount(rollout.tokens_BT[rows, 1], minlength=97).double()
    assert counts.sum() > 200
    assert _chi_square_p(counts, second) > 1e-3
    torch.testing.assert_close(
        rollout.sampled_logprobs_BT[rows, 1], second.log()[rollout.tokens_BT[rows, 1]].float(), rtol=0, atol=1e-4
    )


def test_a_sequence_does_not_depend_on_its_batch():
    model = tiny("qwen2", scale=0.6)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 97, (n,), generator=generator) for n in (4, 9, 4, 17, 2, 30)]
    options = dict(max_new_tokens=16, do_sample=True, top_k=0, top_p=0.95, seed=11, eos_token_id=None)
    wanted = Generator(model).generate(prompts, **options)
    for ways in (dict(num_blocks=14, block_size=4), dict(max_num_seqs=2), dict(max_num_batched_tokens=3)):
        other = Generator(model, **ways).generate(prompts, **options)
        assert torch.equal(other.tokens_BT, wanted.tokens_BT)
    fewer = Generator(model).generate(prompts[:2], **options)  # rows 0 and 1 keep their index, hence their seed
    assert torch.equal(fewer.tokens_BT, wanted.tokens_BT[:2])


def test_samples_of_a_prompt_differ_and_a_seed_repeats_them():
    model, prompts = tiny("gpt2", scale=0.3), [torch.tensor([5, 6, 7, 8]), torch.tensor([9, 9])]
    generator = Generator(model)
    options = dict(max_new_tokens=10, do_sample=True, num_return_sequences=4, top_k=0, eos_token_id=None)
    first = generator.generate(prompts, seed=5, **options)
    assert [len(p) for p in first.prompts] == [4] * 4 + [2] * 4
    assert len({tuple(row.tolist()) for row in first.responses}) == 8
    assert torch.equal(first.tokens_BT, generator.generate(prompts, seed=5, **options).tokens_BT)
    assert not torch.equal(first.tokens_BT, generator.generate(prompts, seed=6, **options).tokens_BT)
    torch.manual_seed(0)
    drawn = generator.generate(prompts, **options)
    assert not torch.equal(drawn.tokens_BT, generator.generate(prompts, **options).tokens_BT)
    torch.manual_seed(0)
    assert torch.equal(drawn.tokens_BT, generator.generate(prompts, **options).tokens_BT)


def test_logprobs_entropies_and_values_are_those_of_a_full_pass():
    model = tiny("llama", scale=0.6)
    wrapper = torch.nn.Module()
    wrapper.pretrained_model, wrapper.v_head = model, torch.nn.Linear(32, 1)
    prompts = [torch.tensor([5, 6, 7, 8]), torch.tensor([9, 9]), torch.tensor([5, 6, 7, 8])]
    rollout = Generator(wrapper).generate(
        prompts, max_new_tokens=6, do_sample=True, temperature=0.8, top_k=20, logprob_temperature=0.8, eos_token_id=None
    )
    for i, response in enumerate(rollout.responses):
        with torch.no_grad():
            out = model(input_ids=torch.cat([prompts[i], response])[None], output_hidden_states=True)
        rows = slice(len(prompts[i]) - 1, -1)
        logp = (out.logits[0, rows] / 0.8).log_softmax(-1)
        wanted = logp.gather(-1, response[:, None])[:, 0]
        torch.testing.assert_close(rollout.logprobs_BT[i], wanted, rtol=0, atol=1e-4)
        torch.testing.assert_close(rollout.entropies_BT[i], -(logp.exp() * logp).sum(-1), rtol=0, atol=1e-4)
        values = wrapper.v_head(out.hidden_states[-1][0, rows])[:, 0]
        torch.testing.assert_close(rollout.values_BT[i], values.detach(), rtol=0, atol=1e-4)
    assert not rollout.values_BT.requires_grad and not rollout.values_BT.is_inference()
