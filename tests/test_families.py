"""The packed path gives the numbers of plain code for every family that it is made for, with LoRA and a separate value model."""

import copy

import golden_cases
import numpy as np
import pytest
import tiny_models
import torch
import transformers
from late_cases import plain_update, trainer

import fastppo

FAMILIES = pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma2"])
LORA = pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
WINDOWS = {"mistral": 4, "gemma2": 4}  # shorter than the sequences


@FAMILIES
@LORA
def test_classic_statistics_are_those_of_the_padded_recomputing_path(name, lora):
    """Every statistic of two steps; the second starts from weights that the first's gradients have changed."""
    case = {"model": name, "lora": lora}
    packed, padded = (golden_cases.run(fastppo, case, packed=way) for way in (True, False))
    for step, (got, want) in enumerate(zip(packed, padded, strict=True)):
        assert set(got["stats"]) == set(want["stats"]) and len(got["stats"]) > 30
        for key in want["stats"]:
            ours, theirs = (golden_cases.compared(case, step, key, x["stats"][key]) for x in (got, want))
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4, err_msg=f"step {step} {key}")


def value_model(name: str):
    kind, sizes = tiny_models.CAUSAL[name]
    config = getattr(transformers, kind)(**sizes, num_labels=1)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    return tiny_models.fill(model)


def policy_of(name: str, noise: float):
    model = tiny_models.causal(name, **({"sliding_window": WINDOWS[name]} if name in WINDOWS else {}))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=draw))
    return model


def plain(model):
    """A copy on attention that masks, caps and windows in the open."""
    model = copy.deepcopy(model)
    (model.get_base_model() if hasattr(model, "get_base_model") else model).set_attn_implementation("eager")
    return model


@FAMILIES
@LORA
def test_late_update_with_a_separate_value_model_is_plain_pytorchs(name, lora, tmp_path):
    """Metrics and gradients of the first optimizer step."""
    from peft import LoraConfig

    more = {"ref_model": policy_of(name, noise=0.03)}
    if lora:
        targets = ["c_attn"] if name == "gpt2" else ["q_proj", "v_proj", "down_proj"]
        sizes = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.0, "fan_in_fan_out": name == "gpt2"}
        config = LoraConfig(**sizes, target_modules=targets, task_type="CAUSAL_LM")
        more = {"peft_config": config}
    run = trainer(
        tmp_path,
        policy=policy_of(name, noise=0.0),
        value=value_model(name),
        reward=lambda prompts, completions: [0.3 * i - 0.1 * len(text) for i, text in enumerate(completions)],
        num_ppo_epochs=1,
        total_episodes=8,
        max_grad_norm=0.0,
        old_logprobs="recompute",
        **more,
    )
    for key, parameter in run.policy_model.named_parameters():
        if "lora_B" in key:
            tiny_models.fill(torch.nn.ParameterDict({key.replace(".", "_"): parameter}))
    models = plain(run.policy_model), plain(run.value_model), None if lora else plain(run.ref_model)
    seen, gradients, judge = [], {}, run.judge
    run.judge = lambda rollout, columns: seen.append((rollout, judge(rollout, columns))) or seen[-1][1]
    run.create_optimizer()
    run.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None})
    )
    run.train()
    ((rollout, (scores, _)),) = seen
    wanted = plain_update(models, rollout, scores, run.args)
    assert abs(wanted["objective/kl"]) > 1e-3
    for key, value in wanted.items():
        assert run.state.log_history[0][key] == pytest.approx(value, rel=1e-4, abs=1e-4), key
    plain_gradients = {f"policy.{n}": p.grad for n, p in models[0].named_parameters()}
    plain_gradients |= {f"value_model.{n}": p.grad for n, p in models[1].named_parameters()}
    assert set(gradients) == {key for key, grad in plain_gradients.items() if grad is not None}
    largest = max(float(grad.abs().max()) for grad in gradients.values())
    for key, gradient in gradients.items():
        error = (gradient - plain_gradients[key]).abs().max()
        assert error <= 1e-4 * plain_gradients[key].abs().max() + 1e-6 * largest, key
