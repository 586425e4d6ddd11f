"""What SFTTrainer and RewardTrainer share: model and tokenizer by name, adapters, tokenised datasets, metrics."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin, Trainer
from transformers.trainer_utils import set_seed

from fastppo.adam import in_one_call
from fastppo.chat import load_chat_template, set_special_tokens
from fastppo.distributed import together
from fastppo.packed_model import PackedModel
from fastppo.quantized import keep_differentiable, prepare_for_adapter
from fastppo.run_folder import resolve
from fastppo.score import NonFinite
from fastppo.trainer_checkpoints import SafeCheckpoints
from fastppo.training_args import SupervisedConfig, adopt
from fastppo.wanted import check, want


def _are_optimizers(value: Any) -> bool:
    kinds = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    return pair and all(x is None or isinstance(x, kind) for x, kind in zip(value, kinds, strict=True))


def _is_adapter(value: Any) -> bool:
    from peft import PeftConfig

    return isinstance(value, PeftConfig)


_FUNCTION, _MODEL = (
    ("a function", callable),
    ("a model (from_pretrained loads one)", lambda x: isinstance(x, nn.Module)),
)
TRAINER_RULES = {
    "model": ("a transformers model, or the name of one", lambda x: isinstance(x, str) or hasattr(x, "config")),
    **dict.fromkeys(("ref_model", "value_model"), _MODEL),
    "processing_class": ("a transformers tokenizer", lambda x: hasattr(x, "pad_token") or hasattr(x, "tokenizer")),
    **dict.fromkeys(("data_collator", "compute_metrics", "formatting_func"), _FUNCTION),
    "optimizers": ("a pair: a torch optimizer or None, a scheduler or None", _are_optimizers),
    "callbacks": ("a list of transformers.TrainerCallback", lambda x: isinstance(x, (list, tuple))),
    "peft_config": ("a peft.PeftConfig", _is_adapter),
}


def check_trainer(where: str, **given: Any) -> None:
    """ValueError for an argument of a trainer that is not of the kind it has to be; None passes but as the model."""
    check(where, given, TRAINER_RULES)
    model, (wanted, holds) = given["model"], TRAINER_RULES["model"]
    want(not isinstance(model, type) and holds(model), where, "model", wanted, model)


class Run(NamedTuple):
    """Model, configuration and tokenizer, ready for transformers.Trainer."""

    model: nn.Module
    args: SupervisedConfig
    tokenizer: PreTrainedTokenizerBase


def prepare_run(
    config_class: type,
    auto_class: Any,
    model: Any,
    args: Any,
    tokenizer: Any,
    quantization_config: Any = None,
    peft_config: Any = None,
    **init_kwargs: Any,
) -> Run:
    """Load what was given by name, set special tokens and chat template, put the adapter on."""
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or "model"
    args = adopt(config_class, args, name)
    reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
    if args.device.type == "cpu" and args.ddp_find_unused_parameters is None and not reentrant:
        # or DDP lays its buckets out anew after a run's first step: from three processes on a resumed run's sums differ
        args.ddp_find_unused_parameters = True
    set_seed(args.seed)  # a new head and a new adapter are drawn
    if isinstance(model, str):
        init_kwargs = {"dtype": "auto", **init_kwargs, **(args.model_init_kwargs or {})}
        if quantization_config is not None:
            init_kwargs["quantization_config"] = quantization_config
        model = load_model(auto_class, name, args, init_kwargs)
    elif args.model_init_kwargs or quantization_config is not None:
        raise ValueError(
            f"{config_class.__name__}: model_init_kwargs and quantization_config apply to a model given by name; "
            f"got a {type(model).__name__}"
        )
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    elif isinstance(tokenizer, ProcessorMixin):
        tokenizer = tokenizer.tokenizer
    if args.chat_template_path:
        load_chat_template(tokenizer, args.chat_template_path)
    set_special_tokens(tokenizer, eos_token=args.eos_token, pad_token=args.pad_token)
    return Run(add_adapter(model, peft_config, args), args, tokenizer)


def load_model(auto_class: Any, name: str, args: SupervisedConfig, init_kwargs: dict[str, Any]) -> nn.Module:
    """The model of that name, from safetensors unless args.allow_pickle, or use_safetensors=False in init_kwargs."""
    from fastppo.models.pickles import safetensors_only

    asked = args.allow_pickle or "use_safetensors" in init_kwargs
    with safetensors_only(name, asked, f"{type(args).__name__}(allow_pickle=True), --allow-pickle") as only:
        return auto_class.from_pretrained(name, trust_remote_code=args.trust_remote_code, **only, **init_kwargs)


def add_adapter(model: nn.Module, peft_config: Any, args: Any) -> nn.Module:
    """`model` with a new adapter, or as it is; quantised base models are prepared for training first."""
    if peft_config is None:
        return model
    from peft import PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise ValueError("peft_config: the model has an adapter already; merge it first or pass no peft_config")
    base = prepare_for_adapter(
        model,
        use_gradient_checkpointing=args.gradient_checkpointing,
        gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
    )
    return get_peft_model(base, peft_config)


def is_streaming(dataset: Any) -> bool:
    from datasets import IterableDataset

    return isinstance(dataset, IterableDataset)


def tokenise(dataset: Any, function: Callable, args: SupervisedConfig, what: str, **options: Any) -> Any:
    """`dataset.map(function)`, in parallel and with a progress bar where the dataset is not streamed."""
    if not hasattr(dataset, "map"):
        wanted = "wanted a datasets.Dataset or IterableDataset (Dataset.from_list(rows) makes one)"
        raise TypeError(f"{what}: {wanted}; got {type(dataset).__name__}")
    if not is_streaming(dataset):
        options |= {"num_proc": args.dataset_num_proc, "desc": what}
    return dataset.map(function, **options)


def keep_rows(dataset: Any, function: Callable, args: SupervisedConfig, what: str) -> Any:
    options = {} if is_streaming(dataset) else {"num_proc": args.dataset_num_proc, "desc": what}
    return dataset.filter(function, **options)


def each_split(dataset: Any, function: Callable, left_out: str, name: str = "eval_dataset") -> Any:
    """function(dataset), for every split of a dict of evaluation datasets, None for None.

    ValueError where no row is there, or left. left_out: which rows `function` leaves out.
    """
    if dataset is None:
        return None
    if isinstance(dataset, dict) and name == "eval_dataset":
        return {
            split: each_split(rows, function, left_out, f"eval_dataset[{split!r}]") for split, rows in dataset.items()
        }
    if isinstance(dataset, dict):
        raise ValueError(
            f"{name} must be one dataset; got {type(dataset).__name__} with {sorted(dataset)}: pass one of these"
        )
    if _is_empty(dataset):
        raise ValueError(f"{name} is empty")
    prepared = function(dataset)
    if _is_empty(prepared):
        raise ValueError(f"{name}: no row of {len(dataset)} can be used: {left_out}")
    return prepared


def _is_empty(dataset: Any) -> bool:
    return hasattr(dataset, "__len__") and len(dataset) == 0


def pad_rows(rows: list[list[int]], value: int) -> torch.Tensor:
    """int64 [B, T], right-padded with `value`."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value).long()


class MeanMetrics:
    """Sums and counts by metric name, for training and evaluation apart; `drain` gives means over all processes."""

    def __init__(self):
        self._sums: dict[str, dict[str, list]] = {"train": defaultdict(list), "eval": defaultdict(list)}

    def add(self, mode: str, name: str, total: torch.Tensor | float, count: torch.Tensor | float) -> None:
        self._sums[mode][name].append((total, count))

    def drain(self, mode: str, accelerator: Any) -> dict[str, float]:
        means = {}
        for name, pairs in sorted(self._sums[mode].items()):
            both = torch.tensor([[float(total), float(count)] for total, count in pairs]).sum(0)
            total, count = accelerator.reduce(both.to(accelerator.device), "sum").tolist()
            means[name] = total / count if count else float("nan")
        self._sums[mode].clear()
        return means


class BaseTrainer(SafeCheckpoints, Trainer):
    """transformers.Trainer whose AdamW steps in one call on a CPU, with checkpoints without pickles.

    passed_over: why `train` took an older checkpoint than the newest to go on from.
    """

    passed_over: Sequence[str] = ()

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[type, dict]:
        return in_one_call(Trainer.get_optimizer_cls_and_kwargs(args, model))


class PackedTrainer(BaseTrainer):
    """A Trainer whose model runs on packed batches, with metrics beside the loss.

    A subclass calls `_start()` when __init__ is done.
    """

    def _start(self, why_padded: str | None = None) -> None:
        self._metrics = MeanMetrics()
        self._new_tokens = 0
        self._packed = PackedModel(keep_differentiable(self.accelerator.unwrap_model(self.model)), why_padded)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Trainer.train; resume_from_checkpoint may also be "auto": the newest whole checkpoint, if there is any."""
        checkpoint, self.passed_over = resolve(self.args.output_dir, resume_from_checkpoint, self.accelerator)
        return super().train(checkpoint, **kwargs)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _this_step_is_logged(self) -> bool:
        step, args = self.state.global_step + 1, self.args
        if self._mode == "eval" or args.logging_strategy == "epoch" or step == self.state.max_steps:
            return True
        return step % max(self.state.logging_steps, 1) == 0 or (step == 1 and args.logging_first_step)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The micro-batches of one optimizer step. None past max_steps: a run that goes on from its last checkpoint, in the
        middle of an epoch, would take one more step."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        with together(self.accelerator, "reading the next batches"):
            batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        return self._next_batches(iter(batches), num_batches, device)

    def _next_batches(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, model, inputs, num_items_in_batch=None):
        with self._packed.attention():  # the backward pass, too: checkpointed layers run again there
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.scaler is None and not torch.isfinite(loss):  # a scaler leaves such steps out itself
            # transformers would log the mean of the losses before, and go on
            raise NonFinite(f"{type(self).__name__}: the loss is {loss.item()} in step {self.state.global_step + 1}")
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode, means = self._mode, {}
        if "train_runtime" not in logs:
            means = self._metrics.drain(mode, self.accelerator)
            before = next((x["num_tokens"] for x in reversed(self.state.log_history) if "num_tokens" in x), 0.0)
            count = torch.tensor(float(self._new_tokens), device=self.accelerator.device)
            means["num_tokens"] = before + float(self.accelerator.reduce(count, "sum"))
            self._new_tokens = 0 if mode == "train" else self._new_tokens
        prefix = "" if mode == "train" else "eval_"
        super().log({**logs, **{prefix + name: value for name, value in means.items()}}, start_time)
