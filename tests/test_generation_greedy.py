"""Greedy tokens equal to model.generate, log-probs to a full forward pass: every architecture, every way to page."""

import pytest
import torch
from architectures import ARCHITECTURES, tiny

from fastppo.generation import Generator

NEW = 12
WAYS = {
    "plain": {},
    "no sharing": dict(share_prefixes=False),
    "preempts": dict(num_blocks=20, block_size=4),  # the longest sequence alone needs 16
    "two at a time": dict(max_num_seqs=2, block_size=8),
    "chunks of 5 tokens": dict(max_num_batched_tokens=5),
}


def make_prompts(vocabulary=97):
    """Mixed lengths; one token; an equal pair; one that starts like another over two pages of 16."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, vocabulary, (n,), generator=generator) for n in (7, 1, 20, 7, 33)]
    return [*prompts, prompts[0], torch.cat([prompts[4][:32], prompts[2]])]


def greedy_by_transformers(model, prompts, new=NEW, **options):
    """One prompt at a time: no padding to disturb it."""
    options = dict(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0) | options
    rows = []
    for prompt in prompts:
        out = model.generate(input_ids=prompt[None], attention_mask=torch.ones_like(prompt)[None], **options)
        rows.append(out[0, len(prompt) :].tolist())
    return rows


def logprobs_by_full_pass(model, prompt, response):
    with torch.no_grad():
        logits = model(input_ids=torch.cat([prompt, response])[None], use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].float().log_softmax(-1).gather(-1, response[:, None])[:, 0]


def check(model, prompts, rollout, wanted):
    assert [x.tolist() for x in rollout.responses] == wanted
    for i, response in enumerate(rollout.responses):
        got = rollout.logprobs_BT[i][rollout.mask_BT[i]]
        torch.testing.assert_close(got, logprobs_by_full_pass(model, prompts[i], response), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equal_to_transformers_however_it_is_paged(name):
    model, prompts = tiny(name), make_prompts()
    wanted = greedy_by_transformers(model, prompts)
    for way, options in WAYS.items():
        generator = Generator(model, **options)
        rollout = generator.generate(prompts, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        assert isinstance(generator._layers, list), f"{way}: fell back to model.generate: {generator._layers}"
        check(model, prompts, rollout, wanted)
        assert generator.block_manager.num_free == generator.block_manager.num_blocks
        assert (generator.num_preemptions > 0) == (way == "preempts")
    alone = Generator(model).generate(prompts[2:3], max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    assert alone.responses[0].tolist() == wanted[2]


def test_stories260k(shared):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(shared / "models/stories260K").eval()
    prompts = make_prompts(vocabulary=500)
    wanted = greedy_by_transformers(model, prompts, 40)
    rollout = Generator(model).generate(prompts, max_new_tokens=40, do_sample=False, eos_token_id=None)
    check(model, prompts, rollout, wanted)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_lora_adapters_on_and_off(name):
    from peft import LoraConfig, get_peft_model

    model, prompts = tiny(name), make_prompts()
    plain = greedy_by_transformers(model, prompts)
    torch.manual_seed(0)
    peft_model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")).eval()
    adapted = greedy_by_transformers(peft_model, prompts)
    assert adapted != plain
    generator = Generator(peft_model)
    options = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    check(peft_model, prompts, generator.generate(prompts, **options), adapted)
    with peft_model.disable_adapter():
        check(peft_model, prompts, generator.generate(prompts, **options), plain)
    check(peft_model, prompts, generator.generate(prompts, **options), adapted)


def test_eos_ends_a_sequence_and_is_its_last_token():
    model, prompts = tiny("llama"), make_prompts()
    free = greedy_by_transformers(model, prompts)
    eos = [free[0][3], free[2][5]]
    rollout = Generator(model).generate(prompts, max_new_tokens=NEW, do_sample=False, eos_token_id=eos, pad_token_id=0)
    for got, row, reason in zip(rollout.responses, free, rollout.finish_reasons, strict=True):
        ends = [i for i, token in enumerate(row) if token in eos]
        assert got.tolist() == (row[: ends[0] + 1] if ends else row)
        assert reason == ("eos" if ends else "length")
    assert (rollout.tokens_BT[~rollout.mask_BT] == 0).all() and (rollout.logprobs_BT[~rollout.mask_BT] == 0).all()


def test_a_length_for_each_prompt():
    model, prompts = tiny("gpt2"), make_prompts()
    wanted = greedy_by_transformers(model, prompts)
    limits = [3, 12, 1, 5, 2, 9, 4]
    rollout = Generator(model).generate(prompts, max_new_tokens=limits, do_sample=False, eos_token_id=None)
    assert [x.tolist() for x in rollout.responses] == [row[:n] for row, n in zip(wanted, limits, strict=True)]
