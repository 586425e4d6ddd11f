"""Adapters: LoRA and DoRA policies, reward adapters, their files; numbers recorded from TRL 0.11.4."""

import inspect
import json
from pathlib import Path

import peft
import pytest
import tiny_models
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fastppo.models import AutoModelForCausalLMWithValueHead

RECORDED = json.loads((Path(__file__).parent / "fixtures/trl_models.json").read_text())
TOKENS, MASK = torch.tensor(RECORDED["tokens"]), torch.tensor(RECORDED["mask"])
LOAD = AutoModelForCausalLMWithValueHead.from_pretrained
KINDS = pytest.mark.parametrize("kind", ["lora", "dora"])


def adapter_config(kind="lora", **kwargs):
    return LoraConfig(task_type="CAUSAL_LM", r=4, use_dora=kind == "dora", **kwargs)


def same(actual, expected):
    """Equal to rounding: a copy of a weight may lie at another alignment, where the matrix product sums in another order."""
    torch.testing.assert_close(actual, torch.as_tensor(expected), atol=2e-5, rtol=2e-5)


@pytest.fixture
def base(tmp_path):
    """A folder with a plain model, as an adapter names it for its base."""
    tiny_models.causal().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(base, kind="lora", **kwargs):
    """A policy whose adapter does something."""
    policy = LOAD(base, peft_config=adapter_config(kind), **kwargs).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".default" in name and parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return policy


def test_policy_and_reward_adapter_give_trls_numbers(tmp_path):
    tiny_models.reward_adapter(tmp_path)
    policy = LOAD(tiny_models.causal(), peft_config=adapter_config(), reward_adapter=str(tmp_path))
    tiny_models.fill(policy.pretrained_model)
    tiny_models.fill(policy.v_head)
    policy.eval()
    expected = RECORDED["lora"]
    assert sorted(name for name, p in policy.named_parameters() if p.requires_grad) == expected["trainable"]
    with torch.no_grad():
        logits, _, values = policy(TOKENS, attention_mask=MASK)
        with policy.pretrained_model.disable_adapter():
            base_logits = policy(TOKENS, attention_mask=MASK)[0]
    same(logits, expected["logits"])
    same(values, expected["values"])
    same(base_logits, expected["base_logits"])
    scores = policy.compute_reward_score(TOKENS, MASK)
    assert scores.shape == (2, 6, 1) and not scores.requires_grad
    same(scores, expected["scores"])


def test_scoring_leaves_the_policy_as_it_was(tmp_path):
    """TRL: eval mode afterwards, and PEFT's set_adapter has made frozen adapters trainable."""
    tiny_models.reward_adapter(tmp_path)
    policy = LOAD(
        tiny_models.causal(), peft_config=adapter_config(), reward_adapter=str(tmp_path), reward_adapter_name="judge"
    )
    assert policy.supports_rm_adapter and policy.rm_adapter_name == "judge"
    assert not any(p.requires_grad for p in policy.score.parameters())
    policy.train()
    trainable = [name for name, p in policy.named_parameters() if p.requires_grad]
    logits = policy.eval()(TOKENS)[0]
    policy.train()
    first, second = policy.compute_reward_score(TOKENS, MASK), policy.compute_reward_score(TOKENS, MASK)
    assert torch.equal(first, second)
    assert policy.pretrained_model.training and policy.pretrained_model.active_adapter == "default"
    assert [name for name, p in policy.named_parameters() if p.requires_grad] == trainable
    assert torch.equal(policy.eval()(TOKENS)[0], logits)


@KINDS
def test_adapter_off_is_the_base_model(base, kind):
    policy, plain = adapted(base, kind), AutoModelForCausalLM.from_pretrained(base)
    assert policy.is_peft_model and isinstance(policy.pretrained_model, PeftModel)
    with torch.no_grad():
        wanted = plain(TOKENS).logits
        assert not torch.allclose(policy(TOKENS)[0], wanted, atol=1e-3)
        with policy.pretrained_model.disable_adapter():
            same(policy(TOKENS)[0], wanted)


@KINDS
def test_only_the_adapter_and_the_value_head_train(base, kind):
    policy = adapted(base, kind)
    logits, _, values = policy(TOKENS)
    (logits.square().mean() + values.square().mean()).backward()
    trained = {name for name, p in policy.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in policy.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("v_head.") for name in trained) and "v_head.summary.bias" in trained


@KINDS
def test_save_and_load(base, tmp_path, kind):
    policy = adapted(base, kind)
    folder = tmp_path / "new" / "adapter"  # TRL: RuntimeError, parent directory does not exist
    policy.save_pretrained(folder)
    files = {path.name for path in folder.iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors", "value_head.safetensors"}
    assert not files & {"pytorch_model.bin", "model.safetensors"}
    again = LOAD(folder).eval()
    assert torch.equal(again.v_head.summary.weight, policy.v_head.summary.weight)
    same(again(TOKENS)[0], policy(TOKENS)[0])
    same(again(TOKENS)[2], policy(TOKENS)[2])
    assert [name for name, p in again.named_parameters() if p.requires_grad] == [
        "v_head.summary.weight",
        "v_head.summary.bias",
    ]
    trainable = [name for name, p in LOAD(folder, is_trainable=True).named_parameters() if p.requires_grad]
    assert trainable == [name for name, p in policy.named_parameters() if p.requires_grad]
    plain = AutoPeftModelForCausalLM.from_pretrained(folder)
    same(plain(TOKENS).logits, policy(TOKENS)[0])


@KINDS
def test_merge(base, tmp_path, kind):
    policy = adapted(base, kind)
    wanted = policy(TOKENS)[0]
    merged = LOAD(policy.pretrained_model.merge_and_unload())
    merged.v_head.load_state_dict(policy.v_head.state_dict())
    assert not merged.is_peft_model
    merged.save_pretrained(tmp_path / "merged")
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(TOKENS).logits, wanted.detach())
    assert torch.equal(LOAD(tmp_path / "merged").v_head.summary.weight, policy.v_head.summary.weight)


def test_load_trls_adapter_folder(base, tmp_path):
    """TRL keeps the value head in pytorch_model.bin beside the adapter."""
    policy = adapted(base)
    policy.pretrained_model.save_pretrained(tmp_path / "trl")
    head = {name: weight for name, weight in policy.state_dict().items() if name.startswith("v_head.")}
    torch.save(head, tmp_path / "trl/pytorch_model.bin")
    with pytest.raises(OSError, match="pytorch_model.bin is a pickle"):
        LOAD(tmp_path / "trl")
    again = LOAD(tmp_path / "trl", allow_pickle=True).eval()
    same(again(TOKENS)[2], policy(TOKENS)[2])


def test_state_dict_round_trip(base):
    """Everything, adapters included: a checkpoint of it is complete. (TRL's has the value head only.)"""
    first, second = adapted(base), LOAD(base, peft_config=adapter_config()).eval()
    second.load_state_dict(first.state_dict())
    same(first(TOKENS)[0], second(TOKENS)[0])
    same(first(TOKENS)[2], second(TOKENS)[2])


def test_a_peft_model_is_taken_as_it_is():
    model = get_peft_model(tiny_models.causal(), adapter_config())
    assert LOAD(model).pretrained_model is model
    with pytest.raises(ValueError, match="one adapter inside the other"):
        LOAD(model, peft_config=adapter_config())


def test_an_adapter_in_the_folder_wins_over_peft_config(base, tmp_path, caplog):
    adapted(base).save_pretrained(tmp_path / "adapter")
    policy = LOAD(tmp_path / "adapter", peft_config=LoraConfig(task_type="CAUSAL_LM", r=7))
    assert policy.pretrained_model.active_peft_config.r == 4 and "peft_config is ignored" in caplog.text


def test_prefix_tuning_keeps_its_own_past():
    policy = LOAD(tiny_models.causal(), peft_config=PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert policy(TOKENS, attention_mask=MASK)[0].shape == (2, 6, 96)


def test_reward_adapter_bad_input(base, tmp_path):
    with pytest.raises(ValueError, match="reward_adapter can only be used with a PeftModel"):
        LOAD(base, reward_adapter=str(tmp_path))
    with pytest.raises(ValueError, match="should be a string.* got int"):
        LOAD(base, peft_config=adapter_config(), reward_adapter=3)
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors"):
        LOAD(base, peft_config=adapter_config(), reward_adapter=str(base))
    adapted(base).save_pretrained(tmp_path / "no_score")
    with pytest.raises(ValueError, match="holds no weight of a module called score"):
        LOAD(base, peft_config=adapter_config(), reward_adapter=str(tmp_path / "no_score"))
    with pytest.raises(ValueError, match="does not support reward modeling adapter"):
        LOAD(base).compute_reward_score(TOKENS)


def test_a_quantised_base_is_prepared_for_training(monkeypatch):
    asked = {}

    def prepare(model, **kwargs):
        asked.update(kwargs)
        return model

    # the signature tells from_pretrained which keywords are whose
    prepare.__signature__ = inspect.signature(peft.prepare_model_for_kbit_training)
    monkeypatch.setattr(peft, "prepare_model_for_kbit_training", prepare)
    base = tiny_models.causal()
    LOAD(base, peft_config=adapter_config(), use_gradient_checkpointing=False)
    assert asked == {}
    base = tiny_models.causal()
    base.is_loaded_in_8bit = True
    policy = LOAD(base, peft_config=adapter_config(), use_gradient_checkpointing=False)
    assert asked.pop("gradient_checkpointing_kwargs") == {"use_reentrant": False}
    assert asked == {"use_gradient_checkpointing": False} and policy.is_loaded_in_8bit and not policy.is_loaded_in_4bit
