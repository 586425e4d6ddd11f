"""PPOConfig: every field of TRL 0.11.4's PPOConfig, then the fields that only fastppo has."""

import difflib
import functools
import importlib.util
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

KL_PENALTIES = ("kl", "abs", "mse", "full")
TRACKERS = (
    "wandb", "tensorboard", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "all",
)  # fmt: skip
OLD_LOGPROBS = ("auto", "rollout", "recompute")
ON_NONFINITE = ("stop", "skip")
PRECISIONS = ("no", "bf16", "fp16")


def nearest(value: str, known) -> str:
    """' (did you mean ...?)' with the closest of `known`, or '' when none is close."""
    close = difflib.get_close_matches(str(value), [x for x in known if x is not None], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def strict(cls):
    """Class decorator for a dataclass: an unknown keyword raises TypeError naming the nearest field."""
    made = cls.__init__

    @functools.wraps(made)
    def __init__(self, *args, **kwargs):
        names = [f.name for f in fields(cls) if f.init]
        for key in kwargs:
            if key not in names:
                raise TypeError(f"{cls.__name__} has no field {key!r}{nearest(key, names)}")
        made(self, *args, **kwargs)

    cls.__init__ = __init__
    return cls


def check_choice(name: str, value, choices) -> None:
    if value not in choices:
        wanted = ", ".join(map(repr, choices))
        raise ValueError(f"PPOConfig: {name} must be one of {wanted}; got {value!r}{nearest(value, choices)}")


def _is_bool(value) -> bool:
    return isinstance(value, int) and value in (0, 1)


def _script_name() -> str:
    return os.path.basename(sys.argv[0]).removesuffix(".py") if sys.argv else ""


@strict
@dataclass
class PPOConfig:
    """Settings of PPOTrainer. Raises TypeError on an unknown field and ValueError on a value out of range."""

    # --- run
    exp_name: str = field(default_factory=_script_name)  # kept for scripts that read it; not used
    seed: int = 0  # of sampling, shuffling and torch
    log_with: str | None = None  # a tracker that accelerate knows: "wandb", "tensorboard", ...
    task_name: str | None = None  # kept for scripts that read it; not used
    model_name: str | None = "gpt2"  # this and the next two: kept for scripts that read them; not used
    query_dataset: str | None = "stanfordnlp/imdb"  # see model_name
    reward_model: str | None = "sentiment-analysis:lvwerra/distilbert-imdb"  # see model_name
    remove_unused_columns: bool = True  # of the dataset that no data collator asks for
    tracker_kwargs: dict[str, Any] = field(default_factory=dict)  # of the tracker's own set-up
    accelerator_kwargs: dict[str, Any] = field(default_factory=dict)  # of accelerate.Accelerator
    project_kwargs: dict[str, Any] = field(default_factory=dict)  # of accelerate.ProjectConfiguration, like logging_dir
    tracker_project_name: str = "trl"  # the project that the tracker logs to
    push_to_hub_if_best_kwargs: dict[str, Any] = field(default_factory=dict)  # repo_id, ...: upload at the best score
    # --- PPO
    steps: int = 20000  # sequences seen in the whole run
    learning_rate: float = 1.41e-5  # Adam's, where no optimizer is given
    adap_kl_ctrl: bool = True  # move the KL coefficient towards target; False: keep init_kl_coef
    init_kl_coef: float | None = 0.2  # beta: reward = score - beta * KL
    kl_penalty: str = "kl"  # "kl", "abs", "mse" or "full"
    target: float | None = 6.0  # nats per response that the adaptive controller aims at
    horizon: float | None = 10000.0  # sequences over which the adaptive controller moves
    gamma: float = 1.0  # [0, 1]
    lam: float = 0.95  # [0, 1], lambda of GAE
    cliprange: float = 0.2  # of the probability ratio: 1 - cliprange to 1 + cliprange
    cliprange_value: float = 0.2  # how far a value may move from the old one
    vf_coef: float = 0.1  # weight of the value loss
    batch_size: int = 128  # sequences per step()
    forward_batch_size: int | None = None  # deprecated: overrides mini_batch_size
    mini_batch_size: int = 128  # sequences per backward pass
    gradient_accumulation_steps: int = 1  # mini-batches per optimizer step
    world_size: int | None = None  # set by the trainer
    ppo_epochs: int = 4  # passes over each batch
    max_grad_norm: float | None = None  # gradients are scaled down to this norm; None: never
    optimize_cuda_cache: bool | None = None  # deprecated: optimize_device_cache
    optimize_device_cache: bool = False  # empty the device's cache around each step: less memory, slower
    early_stopping: bool = False  # end a batch's epochs when the policy has moved target_kl from the old one
    target_kl: float = 1.0  # early stopping at 1.5 times this
    compare_steps: int = 1  # steps between two looks at push_to_hub_if_best_kwargs
    ratio_threshold: float = 10.0  # a mini-batch whose mean ratio is above it gives no gradient
    use_score_scaling: bool = False  # divide scores by their running standard deviation
    use_score_norm: bool = False  # with use_score_scaling: subtract their running mean first
    score_clip: float | None = None  # scores are cut to +- this after scaling
    whiten_rewards: bool = False  # per-token rewards to mean 0, standard deviation 1
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    is_encoder_decoder: bool | None = None  # set by the trainer
    is_peft_model: bool | None = None  # set by the trainer
    backward_batch_size: int | None = None  # derived: mini_batch_size * gradient_accumulation_steps
    global_backward_batch_size: int | None = None  # set by the trainer
    global_batch_size: int | None = None  # set by the trainer
    dataset_num_proc: int | None = None  # kept for scripts that read it; not used

    # --- fastppo only
    ddp_timeout: float = 1800.0  # seconds that a process waits for the others before it raises
    packed: bool = True  # run sequences without padding where the model can; False: TRL's padded batches
    max_tokens_per_micro_batch: int | None = None  # packed tokens per forward; None: a mini-batch at once
    old_logprobs: str = "auto"  # "rollout", "recompute", or "auto": the rollout's where it is ours and agrees
    max_mismatch: float = 0.02  # nats, mean |rollout - training log-prob| above which "auto" recomputes
    mixed_precision: str | None = None  # "no", "bf16", "fp16"; None: accelerate's. Master weights stay fp32
    on_nonfinite: str = "stop"  # "stop" or "skip" a step with a NaN or infinite score, loss or gradient
    deterministic: bool = False  # same bits whatever the batching, ratio exactly 1 before the first update; slower
    generation: dict[str, Any] = field(default_factory=dict)  # options of fastppo.Generator (block_size, ...)

    def __post_init__(self):
        self._apply_deprecated()
        self._check_values()
        self.backward_batch_size = self.mini_batch_size * self.gradient_accumulation_steps
        if self.batch_size % self.backward_batch_size:
            raise ValueError(
                "PPOConfig: `batch_size` must be a multiple of `mini_batch_size * gradient_accumulation_steps`; "
                f"got {self.batch_size} and {self.mini_batch_size} * {self.gradient_accumulation_steps}"
            )
        self.total_ppo_epochs = math.ceil(self.steps / self.batch_size)
        if self.log_with == "wandb" and importlib.util.find_spec("wandb") is None:
            raise ImportError("PPOConfig: log_with='wandb' needs wandb: pip install wandb")

    def _apply_deprecated(self):
        if self.forward_batch_size is not None:
            self.mini_batch_size = self.forward_batch_size
        self._check("optimize_cuda_cache", "None, True or False", lambda x: x is None or _is_bool(x))
        if self.optimize_cuda_cache is not None:
            if self.optimize_device_cache:
                raise ValueError(
                    "PPOConfig: give optimize_device_cache or the deprecated optimize_cuda_cache, not both"
                )
            self.optimize_device_cache = self.optimize_cuda_cache

    def _check_values(self):
        check_choice("kl_penalty", self.kl_penalty, KL_PENALTIES)
        check_choice("log_with", self.log_with, (None, *TRACKERS))
        check_choice("old_logprobs", self.old_logprobs, OLD_LOGPROBS)
        check_choice("on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        check_choice("mixed_precision", self.mixed_precision, (None, *PRECISIONS))
        positive = (
            "batch_size",
            "mini_batch_size",
            "gradient_accumulation_steps",
            "ppo_epochs",
            "steps",
            "compare_steps",
        )
        for name in positive:
            self._check(name, "a whole number of at least 1", lambda x: isinstance(x, int) and x >= 1)
        self._check("seed", "a whole number from 0 to 2**32 - 1", lambda x: isinstance(x, int) and 0 <= x < 2**32)
        for each in fields(self):
            if each.type is bool:
                self._check(each.name, "True or False", _is_bool)
            elif each.type == dict[str, Any]:
                self._check(each.name, "a dictionary", lambda x: isinstance(x, Mapping))
        for name in ("gamma", "lam"):
            self._check(name, "between 0 and 1", lambda x: 0 <= x <= 1)
        for name in ("learning_rate", "cliprange", "cliprange_value", "vf_coef", "target_kl", "max_mismatch"):
            self._check(name, "at least 0", lambda x: x >= 0)
        self._check("init_kl_coef", "None or at least 0", lambda x: x is None or x >= 0)
        self._check("ratio_threshold", "above 0", lambda x: x > 0)
        for name in ("max_grad_norm", "score_clip", "max_tokens_per_micro_batch", "ddp_timeout"):
            self._check(name, "None or above 0", lambda x: x is None or x > 0)
        if self.deterministic and (self.old_logprobs == "rollout" or not self.packed):
            given = "old_logprobs='rollout'" if self.packed else "packed=False"
            raise ValueError(f"PPOConfig: deterministic=True does not go with {given}; leave it at its default")
        if self.adap_kl_ctrl:
            for name in ("target", "horizon"):
                self._check(name, "above 0 when adap_kl_ctrl is True", lambda x: x is not None and x > 0)

    def _check(self, name: str, wanted: str, holds):
        value = getattr(self, name)
        try:
            good = holds(value)
        except TypeError:
            good = False
        if not good:
            raise ValueError(f"PPOConfig: {name} must be {wanted}; got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Every setting by name; nested dicts are flattened with '/' between the keys."""
        from fastppo.core import flatten_dict

        return flatten_dict(self.__dict__)
