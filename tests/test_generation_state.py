"""What a rollout leaves behind: nothing. And who goes to model.generate on their own account."""

import logging

import pytest
import torch
from architectures import tiny
from test_generation_greedy import greedy_by_transformers, logprobs_by_full_pass, make_prompts

from fastppo.generation import Generator
from fastppo.generation.decode_program import DecodeProgram

OPTIONS = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)


def _tokens(rollout):
    return [x.tolist() for x in rollout.responses]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_next_rollout_uses_the_new_weights(name):
    model, prompts = tiny(name), make_prompts()
    generator = Generator(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    seen = []
    for _ in range(3):
        got = _tokens(generator.generate(prompts, **OPTIONS))
        assert got == greedy_by_transformers(model, prompts, 8)
        seen.append(got)
        optimizer.zero_grad()
        model(input_ids=prompts[4][None], labels=prompts[4][None]).loss.backward()
        optimizer.step()
    assert seen[0] != seen[1] != seen[2]
    model.load_state_dict(tiny(name, seed=9).state_dict())
    assert _tokens(generator.generate(prompts, **OPTIONS)) == greedy_by_transformers(model, prompts, 8)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_everything_is_as_before_even_after_an_interrupt(name, error):
    model, prompts = tiny(name), make_prompts()
    model.train()
    part = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    part[0].eval()  # a mixed state must come back as it was
    model.gradient_checkpointing_enable({"use_reentrant": False})
    training = {key: m.training for key, m in model.named_modules()}
    forwards = {key: m.__dict__.get("forward") for key, m in model.named_modules()}
    generator = Generator(model)
    calls = 0

    def hook(module, args, kwargs, output):
        nonlocal calls
        calls += 1
        if error is not None and calls == 9:
            raise error("in the middle")

    handle = model.register_forward_hook(hook, with_kwargs=True)
    weights = {key: x.clone() for key, x in model.state_dict().items()}
    if error is None:
        generator.generate(prompts, **OPTIONS)
        assert calls >= 9, "the model's own hooks must run"
    else:
        with pytest.raises(error):
            generator.generate(prompts, **OPTIONS)
        assert generator.block_manager.num_free == generator.block_manager.num_blocks
    handle.remove()
    assert {key: m.training for key, m in model.named_modules()} == training
    assert {key: m.__dict__.get("forward") for key, m in model.named_modules()} == forwards
    assert model.is_gradient_checkpointing and model.config._attn_implementation == "sdpa"
    assert all(torch.equal(x, weights[key]) for key, x in model.state_dict().items())
    assert all(p.requires_grad and not p.is_inference() for p in model.parameters())
    loss = model(input_ids=prompts[2][None], labels=prompts[2][None], use_cache=False).loss
    loss.backward()
    model.eval()
    assert _tokens(generator.generate(prompts, **OPTIONS)) == greedy_by_transformers(model, prompts, 8)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_between_steps_of_the_program_frees_every_page(error, monkeypatch):
    model, prompts = tiny("llama"), make_prompts()
    generator, decode, calls = Generator(model), DecodeProgram.decode, []

    def interrupted(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 2:
            raise error("in the middle")
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(DecodeProgram, "decode", interrupted)
    with pytest.raises(error, match="in the middle"):
        generator.generate(prompts, **OPTIONS | dict(max_new_tokens=40))
    assert len(calls) == 2 and generator.block_manager.num_free == generator.block_manager.num_blocks
    monkeypatch.undo()
    assert _tokens(generator.generate(prompts, **OPTIONS)) == greedy_by_transformers(model, prompts, 8)


def test_logits_that_cannot_be_sampled_raise_and_free_every_page():
    model, prompts = tiny("llama"), make_prompts()
    generator = Generator(model)
    generator.generate(prompts, **OPTIONS)
    kept = model.model.norm.weight.detach().clone()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        generator.generate(prompts, **OPTIONS)
    assert generator.block_manager.num_free == generator.block_manager.num_blocks
    with torch.no_grad():
        model.model.norm.weight.copy_(kept)
    assert _tokens(generator.generate(prompts, **OPTIONS)) == greedy_by_transformers(model, prompts, 8)


def test_autocast_and_grad_mode_are_left_alone():
    model, prompts = tiny("llama"), make_prompts()
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        rollout = Generator(model).generate(prompts, **OPTIONS)
        assert torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    assert rollout.logprobs_BT.isfinite().all() and not rollout.logprobs_BT.requires_grad
    assert _tokens(Generator(model).generate(prompts, **OPTIONS)) == greedy_by_transformers(model, prompts, 8)


def test_bfloat16_models_run():
    model, prompts = tiny("qwen2").bfloat16(), make_prompts()
    rollout = Generator(model).generate(prompts, **OPTIONS)
    for i, response in enumerate(rollout.responses):
        error = (rollout.logprobs_BT[i] - logprobs_by_full_pass(model, prompts[i], response)).abs().max()
        assert error < 0.25, f"{error} nats"


def test_a_rollout_can_be_used_in_a_loss():
    model, prompts = tiny("llama"), make_prompts()
    rollout = Generator(model).generate(prompts, **OPTIONS)
    x = torch.zeros_like(rollout.logprobs_BT, requires_grad=True)
    ((x - rollout.logprobs_BT).exp() * rollout.sampled_logprobs_BT).sum().backward()
    assert x.grad.isfinite().all()


def _outside_the_interface():
    import transformers as t

    torch.manual_seed(0)
    config = t.GPTNeoConfig(
        vocab_size=97,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
    )
    return t.AutoModelForCausalLM.from_config(config).eval()


def test_a_model_outside_the_interface_goes_to_model_generate(caplog):
    model, prompts = _outside_the_interface(), make_prompts()
    generator = Generator(model)
    with caplog.at_level(logging.WARNING, logger="fastppo"):
        for _ in range(2):
            rollout = generator.generate(prompts, **OPTIONS)
    said = [r.message for r in caplog.records if "model.generate" in r.message]
    assert said == [
        "generate: using model.generate because GPTNeoForCausalLM does not go through transformers' attention interface"
    ]
    assert _tokens(rollout) == greedy_by_transformers(model, prompts, 8)
    for i, response in enumerate(rollout.responses):
        wanted = logprobs_by_full_pass(model, prompts[i], response)
        torch.testing.assert_close(rollout.logprobs_BT[i][rollout.mask_BT[i]], wanted, rtol=0, atol=1e-4)


def test_eos_none_ends_nothing_there_either():
    """For a configuration without it transformers takes the model's own end-of-sequence token."""
    model, prompts = _outside_the_interface(), make_prompts()[:2]
    first = Generator(model).generate(prompts, **OPTIONS).tokens_BT[0, 0]
    model.generation_config.eos_token_id = int(first)
    rollout = Generator(model).generate(prompts, **OPTIONS)
    assert OPTIONS["eos_token_id"] is None and [len(x) for x in rollout.responses] == [OPTIONS["max_new_tokens"]] * 2


def test_encoder_decoders_and_their_values():
    import transformers as t

    torch.manual_seed(0)
    config = t.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = t.T5ForConditionalGeneration(config).eval()
    wrapper = torch.nn.Module()
    wrapper.pretrained_model, wrapper.v_head = model, torch.nn.Linear(32, 1)
    prompts = make_prompts()
    rollout = Generator(wrapper).generate(
        prompts,
        max_new_tokens=5,
        do_sample=True,
        top_k=0,
        num_return_sequences=2,
        eos_token_id=1,
        pad_token_id=0,
        seed=3,
    )
    assert rollout.tokens_BT.shape[0] == 14 and rollout.values_BT.shape == rollout.logprobs_BT.shape
    again = Generator(wrapper).generate(
        prompts,
        max_new_tokens=5,
        do_sample=True,
        top_k=0,
        num_return_sequences=2,
        eos_token_id=1,
        pad_token_id=0,
        seed=3,
    )
    assert torch.equal(again.tokens_BT, rollout.tokens_BT)
    i = 3
    ids, response = prompts[i // 2][None], rollout.responses[i]
    decoder = torch.cat([torch.tensor([0]), response[:-1]])[None]
    with torch.no_grad():
        logits = model(input_ids=ids, decoder_input_ids=decoder).logits[0]
    wanted = logits.log_softmax(-1).gather(-1, response[:, None])[:, 0]
    torch.testing.assert_close(rollout.logprobs_BT[i][rollout.mask_BT[i]], wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompt_learning_adapters_are_refused_not_ignored(kind):
    import peft

    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model, prompts = peft.get_peft_model(tiny("llama"), config).eval(), make_prompts()
    with pytest.raises(ValueError, match=f"{kind}.*would be ignored"):
        Generator(model).generate(prompts, **OPTIONS)
    with model.disable_adapter():
        base = model.get_base_model()
        assert _tokens(Generator(model).generate(prompts, **OPTIONS)) == greedy_by_transformers(base, prompts, 8)


def test_the_cache_is_no_larger_than_asked():
    model, prompts = tiny("llama"), make_prompts()
    generator = Generator(model)
    generator.generate(prompts, **OPTIONS)
    assert generator.block_manager.num_blocks <= sum(-(-(len(p) + 8) // 16) for p in prompts)
    page = 2 * 2 * 16 * 2 * 8 * 4  # layers, keys and values, tokens, heads, dimension, bytes
    small = Generator(model, kv_cache_bytes=6 * page)
    assert _tokens(small.generate(prompts, **OPTIONS)) == greedy_by_transformers(model, prompts, 8)
    assert small.block_manager.num_blocks == 6
