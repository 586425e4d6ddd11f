"""backbone + head give the model's own logits, or the reason why they cannot."""

import pytest
import tiny_models
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from fastppo.attention import unwrap
from fastppo.kernels.linear_logprob import Head, head_logits
from fastppo.models import AutoModelForCausalLMWithValueHead
from fastppo.models.head import backbone, checked_output_head, output_head

TOKENS = torch.tensor([[5, 9, 33, 60, 7, 3], [8, 1, 90, 44, 21, 11]])


def lora(model, **kwargs):
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **kwargs))


def assert_splits(model):
    head = output_head(model)
    assert isinstance(head, Head), head
    with torch.no_grad():
        wanted = unwrap(model)(TOKENS).logits
        got = head_logits(backbone(model)(TOKENS).last_hidden_state, head)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert checked_output_head(model) == head
    return head


@pytest.mark.parametrize("name", tiny_models.CAUSAL)
def test_head_of_backbone_is_the_models_logits(name):
    assert_splits(tiny_models.causal(name))


@pytest.mark.parametrize(
    ("name", "scale", "cap", "has_bias"),
    [
        ("llama", 1.0, None, False),
        ("cohere", 0.25, None, False),
        ("granite", 0.25, None, False),
        ("gemma2", 1.0, 3.0, False),
        ("phi", 1.0, None, True),
    ],
)
def test_scale_cap_and_bias(name, scale, cap, has_bias):
    head = output_head(tiny_models.causal(name))
    assert (head.logit_scale, head.softcap, head.bias_V is not None) == (scale, cap, has_bias)


def test_the_head_holds_the_live_parameters():
    model = tiny_models.causal("gpt2")
    head = output_head(AutoModelForCausalLMWithValueHead.from_pretrained(model))
    assert head.weight_VD is model.lm_head.weight is model.transformer.wte.weight
    assert backbone(model) is model.transformer


def test_through_wrapper_and_adapters():
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(lora(tiny_models.causal()))
    tiny_models.fill(policy.pretrained_model)
    policy.eval()
    adapted = assert_splits(policy)
    with torch.no_grad():
        hidden = backbone(policy)(TOKENS).last_hidden_state
        with policy.pretrained_model.disable_adapter():
            without = backbone(policy)(TOKENS).last_hidden_state
        assert not torch.allclose(hidden, without)
        torch.testing.assert_close(head_logits(hidden, adapted), policy(TOKENS)[0])


def test_values_read_the_same_hidden_state():
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_models.causal("opt")).eval()
    with torch.no_grad():
        hidden = backbone(policy)(TOKENS).last_hidden_state
        torch.testing.assert_close(policy.v_head(hidden).squeeze(-1), policy(TOKENS)[2])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: lora(tiny_models.causal(), target_modules=["q_proj", "lm_head"]), "under an adapter of its own"),
        (lambda: lora(tiny_models.causal(), modules_to_save=["lm_head"]), "trained through modules_to_save"),
        (
            lambda: get_peft_model(
                tiny_models.causal(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
            ),
            "PROMPT_TUNING puts virtual tokens in front",
        ),
        (lambda: tiny_models.seq2seq("bart"), "BartForConditionalGeneration is an encoder-decoder model"),
    ],
)
def test_why_not(make, reason):
    model = make()
    assert reason in output_head(model)
    assert reason in checked_output_head(model)


def test_the_check_finds_a_head_that_does_more():
    class Shifted(type(tiny_models.causal())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + torch.arange(96)
            return output

    model = tiny_models.causal()
    model.__class__ = Shifted
    assert isinstance(output_head(model), Head)
    assert "the logits of Shifted differ from head(backbone(x)) by up to 95" in checked_output_head(model)
    model.train()
    checked_output_head(model)
    assert all(module.training for module in model.modules())


def test_no_backbone():
    with pytest.raises(ValueError, match="Linear has no submodule called base_model_prefix"):
        backbone(torch.nn.Linear(1, 1))
