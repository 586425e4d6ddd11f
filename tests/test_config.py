"""PPOConfig: TRL 0.11.4's fields and defaults, and what it refuses."""

import dataclasses
import sys

import pytest

from fastppo import PPOConfig
from fastppo.config import nearest

# TRL 0.11.4's defaults, without those that depend on the process (exp_name) or are derived
DEFAULTS = dict(
    seed=0, log_with=None, task_name=None, model_name="gpt2", query_dataset="stanfordnlp/imdb",
    reward_model="sentiment-analysis:lvwerra/distilbert-imdb", remove_unused_columns=True, tracker_kwargs={},
    accelerator_kwargs={}, project_kwargs={}, tracker_project_name="trl", push_to_hub_if_best_kwargs={}, steps=20000,
    learning_rate=1.41e-05, adap_kl_ctrl=True, init_kl_coef=0.2, kl_penalty="kl", target=6.0, horizon=10000.0, gamma=1.0,
    lam=0.95, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1, batch_size=128, forward_batch_size=None,
    mini_batch_size=128, gradient_accumulation_steps=1, world_size=None, ppo_epochs=4, max_grad_norm=None,
    optimize_cuda_cache=None, optimize_device_cache=False, early_stopping=False, target_kl=1.0, compare_steps=1,
    ratio_threshold=10.0, use_score_scaling=False, use_score_norm=False, score_clip=None, whiten_rewards=False,
    gradient_checkpointing=False, is_encoder_decoder=None, is_peft_model=None, backward_batch_size=128,
    global_backward_batch_size=None, global_batch_size=None, dataset_num_proc=None,
)  # fmt: skip


def test_fields_and_defaults_are_trls():
    made = dataclasses.asdict(PPOConfig())
    assert {name: made[name] for name in DEFAULTS} == DEFAULTS


def test_exp_name_is_the_script(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["some/where/train_it.py"])
    assert PPOConfig().exp_name == "train_it"


def test_derived_fields():
    config = PPOConfig(steps=1000, batch_size=96, mini_batch_size=8, gradient_accumulation_steps=4)
    assert (config.backward_batch_size, config.total_ppo_epochs) == (32, 11)
    assert PPOConfig(batch_size=4, forward_batch_size=2).mini_batch_size == 2
    assert PPOConfig(optimize_cuda_cache=True).optimize_device_cache is True


def test_to_dict_is_flat():
    flat = PPOConfig(tracker_kwargs={"wandb": {"name": "a"}}).to_dict()
    assert flat["tracker_kwargs/wandb/name"] == "a"
    assert flat["learning_rate"] == 1.41e-05 and flat["total_ppo_epochs"] == 157


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 6, "mini_batch_size": 4}, "must be a multiple of .mini_batch_size"),
        ({"kl_penalty": "ful"}, "did you mean 'full'"),
        ({"log_with": "tensorbord"}, "did you mean 'tensorboard'"),
        ({"gamma": 1.5}, "gamma must be between 0 and 1; got 1.5"),
        ({"learning_rate": "fast"}, "learning_rate must be at least 0; got 'fast'"),
        ({"deterministic": "yes"}, "deterministic must be True or False; got 'yes'"),
        ({"tracker_kwargs": 3}, "tracker_kwargs must be a dictionary; got 3"),
        ({"init_kl_coef": -1}, "init_kl_coef must be None or at least 0; got -1"),
        ({"ratio_threshold": -1}, "ratio_threshold must be above 0; got -1"),
        ({"ppo_epochs": 0}, "ppo_epochs must be a whole number of at least 1"),
        ({"batch_size": 2.5}, "batch_size must be a whole number"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be None or above 0"),
        ({"old_logprobs": "rolout"}, "did you mean 'rollout'"),
        ({"on_nonfinite": "raise"}, "must be one of 'stop', 'skip'"),
        ({"mixed_precision": "bf8"}, "did you mean 'bf16'"),
        ({"target": None}, "target must be above 0 when adap_kl_ctrl"),
        ({"optimize_cuda_cache": True, "optimize_device_cache": True}, "not both"),
    ],
)
def test_wrong_values_name_the_field_and_the_nearest(given, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**{"batch_size": 128, **given})


def test_unknown_field_names_the_nearest():
    with pytest.raises(TypeError, match="no field 'learning_rat'; did you mean 'learning_rate'"):
        PPOConfig(learning_rat=1e-3)


def test_wandb_must_be_there(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install wandb"):
        PPOConfig(log_with="wandb")


def test_nearest_is_silent_when_nothing_is_close():
    assert nearest("zzz", ["batch_size"]) == ""
