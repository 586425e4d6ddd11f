"""What SFTConfig, RewardConfig and the late PPOConfig share: transformers.TrainingArguments with TRL's defaults."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from fastppo.field_types import check_field_types
from fastppo.wanted import is_flag, is_number, is_whole, want


def can_train_in_bf16(use_cpu: bool = False) -> bool:
    """Whether mixed precision in bf16 is a gain here: a GPU that has it. On a CPU transformers' autocast is not used."""
    return not use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()


@dataclass
class BaseConfig(TrainingArguments):
    """TrainingArguments; bf16=None picks what the machine can do (TRL's default, True, raises on a CPU)."""

    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between two log lines."})
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Recompute activations in the backward pass: less memory, a third more work."}
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "Mixed precision in bf16. None: where a GPU has it, and fp16 is off."}
    )

    def __post_init__(self):
        counts = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        self._check(counts, "a whole number of at least 1", lambda x: x is None or is_whole(x, 1))
        self._check(
            ("dataset_num_proc",), "a whole number of at least 1, or None", lambda x: x is None or is_whole(x, 1)
        )
        self._check(("seed",), "a whole number from 0 to 2**32 - 1", lambda x: is_whole(x, 0) and x < 2**32)
        self._check(("learning_rate",), "a number of at least 0", lambda x: is_number(x, 0))
        self._check(("max_grad_norm",), "a number of at least 0, or None", lambda x: x is None or is_number(x, 0))
        self._check(("num_train_epochs",), "a number above 0", lambda x: is_number(x, 0) and x > 0)
        self._check(("max_steps",), "a whole number (-1: as many as the epochs have)", is_whole)
        self._check(("bf16", "fp16"), "True, False or None", lambda x: x is None or is_flag(x))
        check_field_types(self)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and can_train_in_bf16(self.use_cpu)
        # non-reentrant: works with frozen embeddings under an adapter and keeps the packed layout of the forward
        if self.gradient_checkpointing and not self.gradient_checkpointing_kwargs:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
        # transformers 5.23 renamed the fields and warns about the old names; it mirrors the new values into them
        for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            new = old.replace("gradient", "activation")
            if getattr(self, new, self) is None:
                setattr(self, new, getattr(self, old))
                setattr(self, old, None)
        super().__post_init__()

    def _check(self, names: Iterable[str], wanted: str, holds: Callable[[Any], bool]) -> None:
        """ValueError for the first of these fields that is there and is not what is wanted."""
        for name in names:
            if hasattr(self, name):
                want(holds(getattr(self, name)), type(self).__name__, name, wanted, getattr(self, name))


@dataclass
class SupervisedConfig(BaseConfig):
    """Fields that SFTConfig and RewardConfig share."""

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of from_pretrained when the model is given by name."}
    )
    allow_pickle: bool = field(
        default=False,
        metadata={
            "help": "Also load a model given by name whose weights are pickles (.bin): from trusted sources only."
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code from the model's repository."})
    chat_template_path: str | None = field(
        default=None, metadata={"help": "A .jinja file, or a folder or name of a tokenizer whose template is taken."}
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise the dataset."})
    eos_token: str | None = field(default=None, metadata={"help": "End-of-sequence token; None: the tokenizer's."})
    pad_token: str | None = field(default=None, metadata={"help": "Padding token; None: the tokenizer's, else eos."})
    max_length: int | None = field(default=1024, metadata={"help": "Longest sequence in tokens; None: no limit."})
    pad_to_multiple_of: int | str | None = field(
        default="auto", metadata={"help": "Accepted for TRL's sake: batches are packed, nothing is padded."}
    )
    activation_offloading: bool = field(default=False, metadata={"help": "Not supported: True raises."})

    def __post_init__(self):
        if isinstance(self.model_init_kwargs, str):
            try:
                self.model_init_kwargs = json.loads(self.model_init_kwargs)
            except ValueError as error:
                raise ValueError(
                    f"{type(self).__name__}: model_init_kwargs is text that is not JSON: {error}"
                ) from error
        if self.activation_offloading:
            raise ValueError(
                f"{type(self).__name__}: activation_offloading is not supported; packed batches without logits need "
                "less memory, and gradient_checkpointing=True (the default) keeps activations down"
            )
        self._check(("max_length",), "a positive number of tokens or None", lambda x: x is None or is_whole(x, 1))
        super().__post_init__()


def adopt(config_class: type, args: TrainingArguments | None, model_name: str) -> Any:
    """`args` as `config_class`: as they are, rebuilt from plain TrainingArguments, or the defaults."""
    if isinstance(args, config_class):
        return args
    if args is not None and not isinstance(args, TrainingArguments):
        want(False, f"{config_class.__name__[:-6]}Trainer", "args", f"a {config_class.__name__} or None", args)
    if args is None:
        return config_class(output_dir=f"{model_name.rstrip('/').split('/')[-1]}-{config_class.__name__[:-6]}")
    values = args.to_dict()  # masks tokens as "<HUB_TOKEN>"
    values.update({name: getattr(args, name) for name in ("hub_token",) if hasattr(args, name)})
    names = {name for name, f in config_class.__dataclass_fields__.items() if f.init}
    return config_class(**{name: value for name, value in values.items() if name in names})
