"""PPOConfig of the late API: transformers.TrainingArguments, TRL 1.12.0's fields and defaults, and a few of ours."""

from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import wraps
from typing import Any, Literal

from fastppo.training_args import BaseConfig
from fastppo.wanted import is_flag, is_number, is_whole

KL_ESTIMATORS = ("k1", "k3")
OLD_LOGPROBS = ("rollout", "recompute")
ON_NONFINITE = ("stop", "skip")


def _told(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


def remember_given(cls: type) -> type:
    """Class decorator: an unknown keyword raises TypeError with the nearest field; `given` holds the names passed."""
    made = cls.__init__

    @wraps(made)
    def __init__(self, *args, **kwargs):
        names = [f.name for f in fields(cls) if f.init]
        for key in kwargs:
            if key not in names:
                near = get_close_matches(key, names, n=1)
                raise TypeError(
                    f"{cls.__name__} has no field {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")
                )
        self.given = frozenset(names[: len(args)]) | frozenset(kwargs)
        made(self, *args, **kwargs)

    cls.__init__ = __init__
    return cls


@remember_given
@dataclass
class PPOConfig(BaseConfig):
    """Settings of fastppo.experimental.ppo.PPOTrainer.

    One update takes batch_size = per_device_train_batch_size * gradient_accumulation_steps * processes prompts, makes one
    optimizer step per mini-batch (num_mini_batches of them) and repeats that num_ppo_epochs times.
    Raises TypeError on an unknown field and ValueError on a value out of range.
    """

    learning_rate: float = _told("Peak learning rate of the optimizer.", 3e-6)
    gradient_checkpointing: bool = _told(
        "Recompute activations in the backward pass. The default acts on GPUs only; on a CPU it acts when given.", True
    )
    # --- data
    dataset_num_proc: int | None = _told("Processes that tokenise the dataset.")
    # --- rollout
    num_mini_batches: int = _told("Mini-batches, and so optimizer steps, per epoch over a batch.", 1)
    total_episodes: int | None = _told("Responses in the whole run; None: num_train_epochs times the dataset.")
    local_rollout_forward_batch_size: int = _told("Sequences per scoring pass (reference, values, rewards).", 64)
    num_sample_generations: int = _told("Tables of sample completions printed during training; 0: none.", 10)
    response_length: int = _told("Most new tokens of a response.", 53)
    stop_token: Literal["eos"] | None = _told('"eos": a response ends with the end-of-sequence token; None: never.')
    stop_token_id: int | None = _told("Token that ends a response; instead of stop_token.")
    temperature: float = _told("Sampling temperature; log-probs are taken at it, too.", 0.7)
    missing_eos_penalty: float | None = _told("Subtracted from the score of a response without end-of-sequence token.")
    sft_model_path: str = _told("Kept for scripts that read it; not used.", "EleutherAI/pythia-160m")
    # --- set by the trainer
    world_size: int | None = _told("Processes.")
    num_total_batches: int | None = _told("Updates of the whole run.")
    micro_batch_size: int | None = _told("Sequences of one forward pass over all processes.")
    local_batch_size: int | None = _told("Sequences of one update on this process.")
    batch_size: int | None = _told("Sequences of one update.")
    local_mini_batch_size: int | None = _told("Sequences of one optimizer step on this process.")
    mini_batch_size: int | None = _told("Sequences of one optimizer step.")
    push_to_hub: bool = _told("Upload the policy whenever it is saved.", False)
    # --- PPO
    reward_model_path: str = _told("Kept for scripts that read it; not used.", "EleutherAI/pythia-160m")
    model_adapter_name: str | None = _told("Adapter of the policy when the model has several.")
    ref_adapter_name: str | None = _told("Adapter of the reference when the model has several; None: no adapter.")
    num_ppo_epochs: int = _told("Epochs over each batch.", 4)
    whiten_rewards: bool = _told("Divide rewards by their standard deviation over the batch.", False)
    kl_coef: float = _told("beta: reward = score - beta * KL.", 0.05)
    kl_estimator: Literal["k1", "k3"] = _told("k1: log p - log q; k3: its unbiased, never negative form.", "k1")
    cliprange: float = _told("Clip range of the probability ratio.", 0.2)
    vf_coef: float = _told("Weight of the value loss.", 0.1)
    cliprange_value: float = _told("How far a value may move from the old one.", 0.2)
    gamma: float = _told("Discount factor.", 1.0)
    lam: float = _told("lambda of GAE.", 0.95)
    ds3_gather_for_generation: bool = _told("Kept for TRL's sake: ZeRO-3 always gathers once per rollout.", True)
    # --- fastppo only
    reward_weights: list[float] | None = _told("Weights of the rewards when reward_model is a list; None: all 1.")
    old_logprobs: str = _told("rollout: as sampled; recompute: from one more pass.", "rollout")
    max_mismatch: float = _told("Mean |rollout - training log-prob| in nats past which a warning is given.", 0.02)
    on_nonfinite: str = _told("What a NaN or infinite score, loss or gradient does: stop or skip.", "stop")
    deterministic: bool = _told(
        "Same bits whatever the batching, ratio exactly 1 before the first update; slower.", False
    )
    generation_kwargs: dict[str, Any] | str | None = _told("More arguments of the rollout (top_k, top_p, min_p, ...).")

    _VALID_DICT_FIELDS = [*BaseConfig._VALID_DICT_FIELDS, "generation_kwargs"]

    def __post_init__(self):
        choices = {"kl_estimator": KL_ESTIMATORS, "old_logprobs": OLD_LOGPROBS, "on_nonfinite": ON_NONFINITE}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"PPOConfig: {name} must be one of {allowed}; got {getattr(self, name)!r}")
        self._check(("deterministic", "whiten_rewards"), "True or False", is_flag)
        if self.deterministic:
            if self.old_logprobs == "rollout" and "old_logprobs" in self.given:
                raise ValueError("PPOConfig: deterministic=True does not go with old_logprobs='rollout'; leave it out")
            self.old_logprobs = "recompute"
        counts = ("num_mini_batches", "response_length", "num_ppo_epochs", "local_rollout_forward_batch_size")
        self._check(counts, "a whole number of at least 1", lambda x: is_whole(x, 1))
        self._check(("total_episodes",), "a whole number of at least 1, or None", lambda x: x is None or is_whole(x, 1))
        self._check(("num_sample_generations",), "a whole number of at least 0", lambda x: is_whole(x, 0))
        self._check(("gamma", "lam"), "between 0 and 1", lambda x: is_number(x, 0, 1))
        weights = ("temperature", "kl_coef", "cliprange", "cliprange_value", "vf_coef", "max_mismatch")
        self._check(weights, "a number of at least 0", lambda x: is_number(x, 0))
        self._check(("missing_eos_penalty",), "a number of at least 0, or None", lambda x: x is None or is_number(x, 0))
        self._check(("stop_token_id",), "a token id, or None", lambda x: x is None or is_whole(x, 0))
        if self.stop_token is not None and self.stop_token_id is not None:
            raise ValueError("PPOConfig: give stop_token or stop_token_id, not both")
        if self.stop_token not in (None, "eos"):
            raise ValueError(f"PPOConfig: stop_token must be 'eos' or None (no stop token); got {self.stop_token!r}")
        asked = "gradient_checkpointing" in self.given
        super().__post_init__()
        if self.gradient_checkpointing and not asked and self.device.type == "cpu":
            self.gradient_checkpointing = False
            if hasattr(self, "activation_checkpointing"):
                self.activation_checkpointing = False

    def set_batch_sizes(self, dataset_length: int) -> None:
        """Fill in what follows from the other fields and world_size. ValueError where sizes don't divide."""
        from fastppo.experimental.ppo.functions import exact_div

        self.local_batch_size = self.per_device_train_batch_size * self.gradient_accumulation_steps
        self.micro_batch_size = self.per_device_train_batch_size * self.world_size
        self.batch_size = self.local_batch_size * self.world_size
        why = "`batch_size` must be a multiple of `num_mini_batches`"
        self.mini_batch_size = exact_div(self.batch_size, self.num_mini_batches, why)
        why = "`local_batch_size` must be a multiple of `num_mini_batches`"
        self.local_mini_batch_size = exact_div(self.local_batch_size, self.num_mini_batches, why)
        if self.whiten_rewards and self.mini_batch_size < 8:
            raise ValueError(
                f"PPOConfig: whiten_rewards needs mini-batches of at least 8 sequences over all processes to estimate a "
                f"standard deviation; got {self.mini_batch_size}"
            )
        if self.total_episodes is None:
            self.total_episodes = int(self.num_train_epochs * dataset_length)
        self.num_total_batches = -(-self.total_episodes // self.batch_size)
