"""Every generation argument means what it means in model.generate; unknown ones raise; slow ones say why."""

import logging

import pytest
import torch
from architectures import tiny
from test_generation_greedy import greedy_by_transformers, make_prompts

from fastppo.generation import Generator


def _greedy(model, prompts, **options):
    given = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0) | options
    return [x.tolist() for x in Generator(model).generate(prompts, **given).responses]


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def free(model):
    return greedy_by_transformers(model, make_prompts())


def _cut(row, eos):
    return row[: row.index(eos) + 1] if eos in row else row


@pytest.mark.parametrize(
    "options",
    [
        dict(repetition_penalty=1.8),
        dict(no_repeat_ngram_size=1),
        dict(no_repeat_ngram_size=2, repetition_penalty=1.2),
        dict(bad_words_ids=[[11], [12, 13], [90]]),
        dict(suppress_tokens=list(range(40, 97))),
        dict(begin_suppress_tokens=list(range(3, 60))),
        dict(forced_eos_token_id=2),
        dict(sequence_bias={(50,): 4.0}),
        dict(exponential_decay_length_penalty=(3, 1.5), eos_token_id=2),
        dict(renormalize_logits=True, remove_invalid_values=True),
        dict(top_k=0.0, top_p=1.0, min_length=-1),  # as TRL's scripts write it
    ],
    ids=lambda options: "+".join(options),
)
def test_greedy_processors(model, options):
    prompts = make_prompts()
    wanted = greedy_by_transformers(model, prompts, **options)
    eos = options.get("eos_token_id")
    assert _greedy(model, prompts, **options) == [_cut(row, eos) for row in wanted]


@pytest.mark.parametrize("name", ["min_new_tokens", "min_length"])
def test_minimum_lengths_ban_eos(model, free, name):
    prompts = make_prompts()
    eos = [free[0][2], free[2][1]]
    least = 6
    options = {name: least} if name == "min_new_tokens" else {name: 13}
    wanted = greedy_by_transformers(model, prompts, eos_token_id=eos, **options)
    got = _greedy(model, prompts, eos_token_id=eos, **options)
    assert got == wanted
    lengths = [len(row) for row in got]
    assert min(lengths) >= (least if name == "min_new_tokens" else 1)


def test_lengths(model):
    prompts = make_prompts()[:3]
    assert [len(r) for r in _greedy(model, prompts, max_new_tokens=None)] == [20, 20, 20]  # transformers' default
    assert [len(r) for r in _greedy(model, prompts, max_new_tokens=None, max_length=25)] == [18, 24, 5]
    with pytest.raises(ValueError, match="prompt 2 of 20 tokens leaves -2 new tokens"):
        _greedy(model, prompts, max_new_tokens=None, max_length=18)


def test_custom_processors_and_criteria_never_see_padding(model):
    prompts = make_prompts()
    seen = set()

    def processor(input_ids, scores):
        for row in input_ids:
            assert any(torch.equal(row[: len(prompt)], prompt) for prompt in prompts)
        assert scores.shape == (len(input_ids), 97)
        seen.add(tuple(input_ids.shape))
        scores = scores.clone()
        scores[:, 50] += 3.0
        return scores

    def criterion(input_ids, scores):
        return input_ids[:, -1] == 50

    got = _greedy(model, prompts, logits_processor=[processor], stopping_criteria=[criterion])
    biased = greedy_by_transformers(model, prompts, logits_processor=[processor])
    assert got == [_cut(row, 50) for row in biased]
    assert any(50 in row for row in got) and len(seen) > 4


def test_generation_config_object_and_the_models_own(model):
    from transformers import GenerationConfig

    prompts = make_prompts()
    config = GenerationConfig(
        max_new_tokens=5, do_sample=False, repetition_penalty=1.5, eos_token_id=None, pad_token_id=0
    )
    got = Generator(model).generate(prompts, generation_config=config)
    wanted = greedy_by_transformers(model, prompts, 5, repetition_penalty=1.5)
    assert [x.tolist() for x in got.responses] == [_cut(row, 2) for row in wanted]


def test_trl_style_arguments(model):
    prompts = make_prompts()
    for eos in (-1, None):
        rollout = Generator(model).generate(
            prompts,
            min_length=-1,
            top_k=0.0,
            top_p=1.0,
            do_sample=True,
            pad_token_id=0,
            eos_token_id=eos,
            max_new_tokens=4,
        )
        assert rollout.mask_BT.all()


def test_stop_strings(shared):
    from transformers import AutoTokenizer

    model, tokenizer = tiny("gpt2"), AutoTokenizer.from_pretrained(shared / "models/stories260K")
    prompts = make_prompts()
    free = greedy_by_transformers(model, prompts)
    word = tokenizer.decode(free[0][4:5])
    rollout = Generator(model, tokenizer).generate(
        prompts, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0, stop_strings=[word]
    )
    assert "stop" in rollout.finish_reasons
    for response, row, reason in zip(rollout.responses, free, rollout.finish_reasons, strict=True):
        assert response.tolist() == row[: len(response)]
        assert (word in tokenizer.decode(response)) == (reason == "stop")
    with pytest.raises(ValueError, match="stop_strings need a tokenizer"):
        Generator(model).generate(prompts, stop_strings=["x"])


def test_typical_epsilon_and_eta_run_through_transformers_processors(model):
    prompts = make_prompts()
    for options in (dict(typical_p=0.5), dict(epsilon_cutoff=0.02), dict(eta_cutoff=0.02)):
        rollout = Generator(model).generate(
            prompts, max_new_tokens=6, do_sample=True, top_k=0, seed=0, eos_token_id=None, **options
        )
        # what is left sums to one: kept tokens are more likely than under the raw distribution
        assert (rollout.sampled_logprobs_BT >= rollout.logprobs_BT - 1e-4).all()
        assert (rollout.sampled_logprobs_BT > rollout.logprobs_BT + 1e-3).any()


def test_unknown_and_wrong_arguments(model):
    generator, prompt = Generator(model), torch.tensor([5, 6])
    with pytest.raises(ValueError, match="unknown argument 'max_new_token'; did you mean 'max_new_tokens'"):
        generator.generate([prompt], max_new_token=3)
    with pytest.raises(ValueError, match="attention_mask follows from the prompts"):
        generator.generate([prompt], attention_mask=torch.ones(1, 2))
    with pytest.raises(ValueError, match="prompt 1 must be a 1-D integer tensor with at least one token"):
        generator.generate([prompt, torch.tensor([], dtype=torch.long)])
    with pytest.raises(ValueError, match="prompt 0 has tokens from 5 to 97; the model's vocabulary is 0 .. 96"):
        generator.generate([torch.tensor([5, 97])])
    with pytest.raises(ValueError, match="non-empty list"):
        generator.generate([])
    with pytest.raises(ValueError, match="2 numbers for 1 prompts"):
        generator.generate([prompt], max_new_tokens=[1, 2])
    with pytest.raises(ValueError, match="128"):
        Generator(tiny("gpt2")).generate([torch.arange(3, 90)], max_new_tokens=43)
    with pytest.raises(ValueError, match="max_num_seqs must be a positive int; got 0"):
        Generator(model, max_num_seqs=0)
    with pytest.raises(ValueError, match="needs 3 KV pages"):
        Generator(model, num_blocks=2, block_size=4).generate([prompt], max_new_tokens=9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        # 2.5 was a float64 array where C++ reads int64: it wrote past the end of its memory
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number of at least 1, or a list .*; got 2.5"),
        ({"max_new_tokens": "3"}, "max_new_tokens must be a whole number .*; got '3'"),
        ({"max_new_tokens": [2.5]}, r"max_new_tokens must be .* list with one per prompt; got \[2.5\]"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number .*; got True"),
        ({"min_new_tokens": "3"}, "min_new_tokens must be a whole number; got '3'"),
        ({"max_length": 2.5, "max_new_tokens": None}, "max_length must be a whole number of at least 1; got 2.5"),
        ({"eos_token_id": "x"}, "eos_token_id must be a token id or a list of them .*; got 'x'"),
        ({"eos_token_id": [2.5]}, r"eos_token_id must be .*; got \[2.5\]"),
        ({"pad_token_id": "x"}, "pad_token_id must be a whole number; got 'x'"),
        ({"seed": "a"}, "seed must be None or a whole number; got 'a'"),
        ({"first_prompt": -1}, "first_prompt must be a whole number of at least 0; got -1"),
        ({"logits_processor": 3}, r"logits_processor must be a list of functions .*; got 3"),
        ({"stopping_criteria": [3]}, r"stopping_criteria must be a list of functions .*; got \[3\]"),
        ({"num_return_sequences": 0}, "num_return_sequences must be a whole number of at least 1; got 0"),
        ({"do_sample": "false"}, "do_sample must be True or False; got 'false'"),
        ({"temperature": "1", "do_sample": True}, "temperature must be a number; got '1'"),
        ({"top_k": 2.5, "do_sample": True}, "top_k must be a whole number; got 2.5"),
        ({"num_beams": 2.5}, "num_beams must be a whole number of at least 1; got 2.5"),
        ({"stop_strings": [3]}, r"stop_strings must be a text or a list of texts; got \[3\]"),
        ({"generation_config": {}}, "generation_config must be a transformers GenerationConfig; got {}"),
        ({"tokenizer": "gpt2"}, "tokenizer must be a transformers tokenizer; got 'gpt2'"),
        ({"prompts": ["hello"]}, "prompt 0 must be a 1-D integer tensor of token ids .*; got 'hello'"),
        ({"prompts": [None]}, "prompt 0 must be a 1-D integer tensor of token ids .*; got None"),
        ({"prompts": [torch.tensor([True])]}, "prompt 0 must be a 1-D integer tensor .*; got torch.bool"),
    ],
    ids=str,
)
def test_arguments_of_the_wrong_kind(model, given, message):
    given = {"prompts": [torch.tensor([5, 6])], "max_new_tokens": 2} | given
    with pytest.raises(ValueError, match=message):
        Generator(model).generate(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "gpt2"}, r"model must be a transformers language model \(from_pretrained loads one\); got 'gpt2'"),
        ({"model": torch.nn.Linear(2, 2)}, "model must be a transformers language model .*; got a Linear"),
        ({"tokenizer": "gpt2"}, "tokenizer must be None or a transformers tokenizer; got 'gpt2'"),
        ({"share_prefixes": "no"}, "share_prefixes must be True or False; got 'no'"),
        ({"num_blocks": True}, "num_blocks must be a positive int; got True"),
    ],
)
def test_a_generator_of_the_wrong_kind(model, given, message):
    with pytest.raises(ValueError, match=f"Generator: {message}"):
        Generator(**{"model": model} | given)


def test_a_models_own_generation_config_is_looked_at(model, monkeypatch):
    monkeypatch.setattr(model.generation_config, "max_new_tokens", 2.5)
    with pytest.raises(ValueError, match="max_new_tokens must be a whole number .*; got 2.5"):
        Generator(model).generate([torch.tensor([5, 6])])


def test_beams_go_to_model_generate_and_say_so_once(model, caplog):
    prompts = make_prompts()[:2]
    generator = Generator(model)
    with caplog.at_level(logging.WARNING, logger="fastppo"):
        for _ in range(2):
            rollout = generator.generate(prompts, num_beams=3, max_new_tokens=6, eos_token_id=None, pad_token_id=0)
    said = [r.message for r in caplog.records if "model.generate" in r.message]
    assert said == ["generate: using model.generate because the generation mode is beam search"]
    for i, prompt in enumerate(prompts):
        wanted = model.generate(
            input_ids=prompt[None], num_beams=3, max_new_tokens=6, eos_token_id=None, pad_token_id=0
        )
        assert rollout.responses[i].tolist() == wanted[0, len(prompt) :].tolist()


def test_padding_and_several_responses_as_model_generate_lays_them_out(model, free):
    prompts = [make_prompts()[i] for i in (0, 3)]  # of one length: model.generate needs no padding either
    eos = [free[0][4], free[3][7]]
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=eos, pad_token_id=96, num_return_sequences=1)
    ids = torch.stack(prompts)
    wanted = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :]
    rollout = Generator(model).generate(prompts, **options)
    assert torch.equal(rollout.tokens_BT, wanted)
    assert torch.equal(rollout.tokens_BT[~rollout.mask_BT], torch.full_like(rollout.tokens_BT[~rollout.mask_BT], 96))
    sampled = options | dict(
        do_sample=True, top_k=1, num_return_sequences=3
    )  # transformers refuses it for greedy search
    doubled = Generator(model).generate(prompts, **sampled)
    assert torch.equal(doubled.tokens_BT, wanted.repeat_interleave(3, dim=0))
