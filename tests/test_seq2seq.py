"""Encoder-decoder value-head models against TRL 0.11.4's numbers (fixtures/record_trl_models.py)."""

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from peft import LoraConfig
from transformers import AutoModelForSeq2SeqLM, T5EncoderModel

from fastppo.models import AutoModelForSeq2SeqLMWithValueHead, create_reference_model
from fastppo.models.head import output_head

RECORDED = json.loads((Path(__file__).parent / "fixtures/trl_models.json").read_text())
TOKENS, MASK = torch.tensor(RECORDED["tokens"]), torch.tensor(RECORDED["mask"])
DECODER_TOKENS = torch.tensor(RECORDED["decoder_tokens"])
INPUTS = {"input_ids": TOKENS, "attention_mask": MASK, "decoder_input_ids": DECODER_TOKENS}
NAMES = pytest.mark.parametrize("name", ["t5", "bart"])


def wrap(name):
    wrapper = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tiny_models.seq2seq(name))
    tiny_models.fill(wrapper.v_head)
    return wrapper


@NAMES
def test_forward_and_generate_give_trls_numbers(name):
    wrapper = wrap(name).eval()
    with torch.no_grad():
        logits, loss, values = wrapper(**INPUTS, labels=DECODER_TOKENS)
    assert logits.shape == (2, 4, 96) and values.shape == (2, 4) and logits.dtype == torch.float32
    torch.testing.assert_close(logits, torch.tensor(RECORDED[name]["logits"]), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(values, torch.tensor(RECORDED[name]["values"]), atol=2e-5, rtol=2e-5)
    assert loss.item() == pytest.approx(RECORDED[name]["loss"], rel=1e-5)
    assert wrapper.generate(TOKENS[:1], max_new_tokens=8, do_sample=False).tolist() == RECORDED[name]["greedy"]


@NAMES
def test_save_and_load(tmp_path, name):
    wrapper = wrap(name)
    assert set(RECORDED[name]["state_dict"]) == set(wrapper.state_dict())
    wrapper.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tmp_path)
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    for key, weight in wrapper.state_dict().items():
        assert torch.equal(again.state_dict()[key], weight), key
        assert key.startswith("v_head.") or torch.equal(plain.state_dict()[key], weight), key


@NAMES
def test_reference_with_shared_layers(name):
    """TRL finds no layers in T5 and raises."""
    model = wrap(name)
    reference = create_reference_model(model, num_shared_layers=1)
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    encoder = {key for key, _ in model.named_parameters() if ".encoder." in key}
    decoder = {key for key, _ in model.named_parameters() if ".decoder." in key}
    assert (
        encoder < frozen
        and decoder & frozen
        and not any(f".{block}.1." in key for block in ("layers", "block") for key in decoder & frozen)
    )
    mine, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    assert {key for key in mine if mine[key].data_ptr() == theirs[key].data_ptr()} == frozen
    torch.testing.assert_close(reference(**INPUTS)[0], model.eval()(**INPUTS)[0])


@NAMES
def test_gradients_reach_the_value_head_and_the_encoder(name):
    model = wrap(name)
    _, loss, values = model(**INPUTS, labels=DECODER_TOKENS)
    (loss + values.square().mean()).backward()
    assert model.v_head.summary.weight.grad.abs().sum() > 0
    assert (
        model.pretrained_model.get_encoder()
        .get_parameter(next(iter(dict(model.pretrained_model.get_encoder().named_parameters()))))
        .grad
        is not None
    )


@NAMES
def test_lora(tmp_path, name):
    tiny_models.seq2seq(name).save_pretrained(tmp_path / "base")
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, init_lora_weights=False)
    policy = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tmp_path / "base", peft_config=config).eval()
    base_logits = tiny_models.seq2seq(name)(**INPUTS).logits
    assert not torch.allclose(policy(**INPUTS)[0], base_logits, atol=1e-3)
    with policy.pretrained_model.disable_adapter():
        torch.testing.assert_close(policy(**INPUTS)[0], base_logits)
    policy.save_pretrained(tmp_path / "adapter")
    again = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tmp_path / "adapter").eval()
    for actual, expected in zip(again(**INPUTS)[::2], policy(**INPUTS)[::2], strict=True):
        torch.testing.assert_close(actual, expected)


def test_bad_input():
    load = AutoModelForSeq2SeqLMWithValueHead.from_pretrained
    with pytest.raises(ValueError, match="does not have a language model head"):
        load(T5EncoderModel(tiny_models.seq2seq().config))
    with pytest.raises(ValueError, match="use AutoModelForCausalLMWithValueHead"):
        load(tiny_models.causal())


def test_there_is_no_fused_head():
    assert output_head(wrap("t5")) == "T5ForConditionalGeneration is an encoder-decoder model"
