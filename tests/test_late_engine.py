"""The late trainer on the engine: the same weights as with the models' own modules and autograd."""

import pytest
import torch
from late_cases import trainer
from sft_cases import make_model

from fastppo import flops
from fastppo.experimental.ppo import engines
from fastppo.kernels import _recycle


def gpt2(kind: str):
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_positions=64, n_embd=32, n_layer=2, n_head=4, pad_token_id=0, num_labels=1)
    torch.manual_seed(0)
    return (GPT2LMHeadModel if kind == "causal" else GPT2ForSequenceClassification)(config)


def run(tmp_path, family: str, value: bool, **options):
    from fastppo.experimental.ppo import PPOTrainer

    models = {}
    if family == "gpt2":
        models["policy"] = gpt2("causal")
    made = trainer(tmp_path, value=value and family != "gpt2", stop_token="eos", **models, **options)
    if value and family == "gpt2":
        args = dict(args=made.args, processing_class=made.tokenizer, model=gpt2("causal"), ref_model=None)
        args |= dict(reward_model=made.reward_model, value_model=gpt2("reward"), train_dataset=made.train_dataset)
        made = PPOTrainer(**args)
    made.train()
    return made


@pytest.mark.parametrize("value", [True, False], ids=["two_backbones", "value_head"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_are_those_of_autograd(tmp_path, monkeypatch, family, value):
    options = dict(num_mini_batches=2, temperature=0.7, learning_rate=1e-3)
    fused = run(tmp_path, family, value, **options)
    assert isinstance(fused.fused, engines.Fused) and (fused.fused.separate is not None) is value
    monkeypatch.setattr(engines, "fused_for", lambda trainer: "not now")
    plain = run(tmp_path, family, value, **options)
    assert plain.fused == "not now"
    for (name, one), two in zip(fused.model.named_parameters(), plain.model.parameters(), strict=True):
        # Adam moves by the sign of a gradient that is 0 but for rounding: allow a tenth of one step
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    first, second = (made.state.log_history for made in (fused, plain))
    for name in ("loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "val/ratio", "grad_norm"):
        assert [x[name] for x in first] == pytest.approx([x[name] for x in second], rel=2e-2, abs=1e-4), name


@pytest.mark.parametrize("own_modules", [False, True])
def test_memory_of_the_rollout_is_the_engines_or_given_back_before_learning(tmp_path, monkeypatch, own_modules):
    monkeypatch.setattr(_recycle, "WORTH_IT", 1)  # so few bytes are fresh memory each time otherwise
    flops.matmul_flops_per_s(torch.device("cpu"), torch.float32, torch.get_num_threads())  # once, in that memory
    _recycle.release()
    if own_modules:
        monkeypatch.setattr(engines, "fused_for", lambda trainer: "not now")
    trainer(tmp_path, value=False, total_episodes=8).train()
    for name in (_recycle.WEIGHTS_OR_GRADIENTS, _recycle.PAGES_OR_ACTIVATIONS):
        assert (name in _recycle._kept) is not own_modules


def test_adapters_run_their_own_modules(tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear")
    made = trainer(tmp_path, value=False, peft_config=config)
    made.train()
    assert isinstance(made.fused, str) or not made.fused.still_fits()


def test_a_value_model_that_it_does_not_know(tmp_path):
    from transformers import OPTConfig, OPTForSequenceClassification

    config = OPTConfig(vocab_size=40, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4)
    config.num_labels, config.word_embed_proj_dim = 1, 32
    from fastppo.experimental.ppo import PPOTrainer

    base = trainer(tmp_path)
    made = PPOTrainer(
        args=base.args,
        processing_class=base.tokenizer,
        model=make_model(),
        ref_model=None,
        reward_model=base.reward_model,
        value_model=OPTForSequenceClassification(config),
        train_dataset=base.train_dataset,
    )
    assert engines.fused_for(made) == "OPTForSequenceClassification is not one of the models it knows"
