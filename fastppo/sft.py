"""Supervised fine-tuning with TRL's names: SFTConfig, SFTTrainer.

loss = - sum over labelled tokens of log p(token | tokens before) / their number in the whole optimizer step

computed by `linear_logprob` on packed sequences, at labelled positions only: there is no padding and no logits tensor.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from fastppo.chat import sft_ids
from fastppo.kernels.linear_logprob import linear_logprob
from fastppo.models.head import output_head
from fastppo.packing import best_fit_decreasing, pack
from fastppo.supervised import PackedTrainer, each_split, keep_rows, pad_rows, prepare_run, tokenise
from fastppo.training_args import SupervisedConfig

PACKING_STRATEGIES = ("bfd", "bfd_split", "wrapped")
_PACKING_BATCH = 1000  # rows packed together: bounds memory, and bins are nearly full already
_ARGMAX_LOGITS = 2**24  # logits at a time when counting correct tokens: 64 MB in float32


@dataclass
class SFTConfig(SupervisedConfig):
    """TrainingArguments plus TRL's fields for supervised fine-tuning."""

    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate of the optimizer."})
    dataset_text_field: str = field(default="text", metadata={"help": "Column with plain text."})
    dataset_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": '{"skip_prepare_dataset": True}: the dataset has input_ids and labels already.'}
    )
    truncation_mode: str = field(default="keep_start", metadata={"help": "keep_start or keep_end of long sequences."})
    shuffle_dataset: bool = field(default=False, metadata={"help": "Shuffle before packing."})
    packing: bool = field(default=False, metadata={"help": "Fill rows of max_length tokens with several sequences."})
    packing_strategy: str = field(
        default="bfd",
        metadata={"help": "bfd: best fit, cut at max_length; bfd_split: keep the cut part; wrapped: one long stream."},
    )
    padding_free: bool = field(default=False, metadata={"help": "Accepted for TRL's sake: batches are always packed."})
    eval_packing: bool | None = field(
        default=None, metadata={"help": "Packing of the evaluation set; None: as packing."}
    )
    completion_only_loss: bool | None = field(
        default=None, metadata={"help": "Loss on the completion alone; None: where rows have prompt and completion."}
    )
    assistant_only_loss: bool = field(
        default=False, metadata={"help": "Loss on assistant turns alone; the template needs {% generation %} marks."}
    )
    loss_type: str = field(default="nll", metadata={"help": "nll, the only one here."})

    def __post_init__(self):
        choices = {
            "truncation_mode": ("keep_start", "keep_end"),
            "packing_strategy": PACKING_STRATEGIES,
            "loss_type": ("nll",),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"SFTConfig: {name} must be one of {allowed}; got {getattr(self, name)!r}")
        if self.packing and self.max_length is None:
            raise ValueError("SFTConfig: packing=True needs max_length, the number of tokens of a row; got None")
        if self.label_smoothing_factor:
            raise ValueError("SFTConfig: label_smoothing_factor is not supported; the loss is the plain log-likelihood")
        super().__post_init__()


class SFTTrainer(PackedTrainer):
    """Fine-tune a causal language model on text, messages, or prompt and completion.

    model: a transformers model, a PEFT model, or the name of one. The dataset is tokenised here unless it has
    `input_ids` (then `labels`, `completion_mask` or `assistant_masks` say which tokens count).
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole optimizer step

    def __init__(
        self,
        model: Any,
        args: SFTConfig | TrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        optimizer_cls_and_kwargs: tuple | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Callable[[dict], str] | None = None,
    ):
        run = prepare_run(
            SFTConfig, AutoModelForCausalLM, model, args, processing_class, quantization_config, peft_config
        )
        args, tokenizer = run.args, run.tokenizer

        def prepare(dataset: Any, packing: bool) -> Any:
            return prepare_dataset(dataset, tokenizer, args, packing, formatting_func)

        if compute_loss_func is not None:
            raise ValueError(
                "SFTTrainer: compute_loss_func needs logits, which are never computed; override compute_loss instead"
            )
        if data_collator is None:
            data_collator = SFTCollator(tokenizer.pad_token_id)
        eval_packing = args.packing if args.eval_packing is None else args.eval_packing
        super().__init__(
            model=run.model,
            args=args,
            data_collator=data_collator,
            train_dataset=each_split(train_dataset, lambda split: prepare(split, args.packing)),
            eval_dataset=each_split(eval_dataset, lambda split: prepare(split, eval_packing)),
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.model_accepts_loss_kwargs = True  # older transformers read this, newer ones loss_is_scaled_for_ga
        self._start()

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list({*self._signature_columns, "labels", "seq_lengths"})

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The micro-batches of one optimizer step, and the number of labelled tokens in all of them."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        count = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        if batches and self.args.world_size > 1:
            count = self.accelerator.reduce(count.to(device), "sum")
        return batches, count if batches else None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError("SFTTrainer.compute_loss: there are no outputs, the loss is computed without logits")
        tokens_BT, labels_BT = inputs["input_ids"], inputs["labels"]
        batch = pack(tokens_BT, inputs.get("attention_mask"))
        labels_N = batch.pick(torch.nn.functional.pad(labels_BT[:, 1:], (0, 1), value=-100))
        scored_N = labels_N != -100
        targets = labels_N[scored_N]

        def forward():
            hidden = self._packed.hidden(tokens_BT, batch)[scored_N]
            head = output_head(self._packed.model)
            return hidden, head, linear_logprob(hidden, head, targets)

        with self.accelerator.autocast():
            hidden, head, scores = self._packed.call(model, forward)
        self._record(hidden.detach(), head, targets, scores, batch)
        if num_items_in_batch is None:
            return -scores.logprob_N.sum() / max(targets.numel(), 1)
        # DDP averages gradients over processes; the count is of all of them
        return -scores.logprob_N.sum() * self.args.world_size / num_items_in_batch

    @torch.no_grad()
    def _record(self, hidden, head, targets, scores, batch) -> None:
        self._metrics.add(self._mode, "entropy", scores.entropy_N.detach().sum(), targets.numel())
        if self._mode == "train":
            self._new_tokens += batch.tokens_1N.numel()
        if self._this_step_is_logged():  # a second product with the head
            self._metrics.add(self._mode, "mean_token_accuracy", count_correct(hidden, head, targets), targets.numel())

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            with self._packed.attention():
                loss = self.compute_loss(model, inputs).detach()
            if prediction_loss_only:
                return loss, None, None
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return loss, logits.detach(), inputs["labels"]


@torch.no_grad()
def count_correct(hidden_ND: torch.Tensor, head: Any, targets_N: torch.Tensor) -> int:
    """How many targets are the most likely token. Scale and soft cap keep the order of the logits."""
    rows = max(_ARGMAX_LOGITS // head.weight_VD.shape[0], 1)
    correct = 0
    for start in range(0, len(targets_N), rows):
        chunk_nD = hidden_ND[start : start + rows].to(head.weight_VD.dtype)
        best_n = torch.nn.functional.linear(chunk_nD, head.weight_VD, head.bias_V).argmax(-1)
        correct += int((best_n == targets_N[start : start + rows]).sum())
    return correct


class SFTCollator:
    """Rows to right-padded `input_ids`, `attention_mask`, `labels`; a packed row gives each of its sequences a line."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        tokens, labels = [], []
        for row in rows:
            start = 0
            for length in row.get("seq_lengths") or [len(row["input_ids"])]:
                tokens.append(row["input_ids"][start : start + length])
                labels.append(row["labels"][start : start + length])
                start += length
        return {
            "input_ids": pad_rows(tokens, self.pad_token_id),
            "attention_mask": pad_rows([[1] * len(row) for row in tokens], 0),
            "labels": pad_rows(labels, -100),
        }


def prepare_dataset(
    dataset: Any, tokenizer: Any, args: SFTConfig, packing: bool, formatting_func: Callable | None = None
) -> Any:
    """Rows with `input_ids` and `labels`, no longer than max_length, packed when asked."""
    if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        return dataset
    with args.main_process_first(desc="tokenising", local=False):
        if formatting_func is not None:
            name = args.dataset_text_field
            dataset = tokenise(dataset, lambda row: {name: formatting_func(row)}, args, "Formatting")
        options = {
            "tokenizer": tokenizer,
            "text_field": args.dataset_text_field,
            "completion_only": args.completion_only_loss,
            "assistant_only": args.assistant_only_loss,
        }
        if args.assistant_only_loss:
            check_generation_marks(dataset, tokenizer)
        dataset = tokenise(dataset, sft_ids, args, "Tokenising", fn_kwargs=options)
        split = packing and args.packing_strategy != "bfd"
        if args.max_length is not None and not split:
            dataset = tokenise(dataset, truncate, args, "Truncating", fn_kwargs={"args": args})
        dataset = keep_rows(dataset, has_label, args, "Dropping rows without a label")
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        return pack_dataset(dataset, args) if packing else dataset


def check_generation_marks(dataset: Any, tokenizer: Any) -> None:
    row = next(iter(dataset))
    conversational = isinstance(row.get("messages") or row.get("prompt"), list)
    if conversational and "generation %}" not in (tokenizer.chat_template or ""):
        raise ValueError(
            "SFTConfig: assistant_only_loss needs {% generation %} ... {% endgeneration %} around assistant turns in the "
            "chat template; this tokenizer's template has none. Use a prompt + completion dataset, or another template"
        )


def truncate(row: dict, args: SFTConfig) -> dict:
    part = slice(None, args.max_length) if args.truncation_mode == "keep_start" else slice(-args.max_length, None)
    return {"input_ids": row["input_ids"][part], "labels": row["labels"][part]}


def has_label(row: dict) -> bool:
    """Whether the loss sees any token: the first one is never predicted."""
    return any(label != -100 for label in row["labels"][1:])


def pack_dataset(dataset: Any, args: SFTConfig) -> Any:
    """Rows of up to max_length tokens with `seq_lengths` (one long stream cut in pieces for "wrapped")."""
    columns = list(next(iter(dataset)))
    options = {"batched": True, "batch_size": _PACKING_BATCH, "remove_columns": columns, "fn_kwargs": {"args": args}}
    return tokenise(dataset, pack_rows, args, "Packing", **options)


def joined(parts: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(parts))


def pack_rows(rows: dict[str, list], args: SFTConfig) -> dict[str, list]:
    size = args.max_length
    pairs = list(zip(rows["input_ids"], rows["labels"], strict=True))
    if args.packing_strategy == "wrapped":
        ids, labels = (joined(pair[i] for pair in pairs) for i in (0, 1))
        cuts = range(0, len(ids), size)
        return {"input_ids": [ids[i : i + size] for i in cuts], "labels": [labels[i : i + size] for i in cuts]}
    pieces = [(ids[i : i + size], labels[i : i + size]) for ids, labels in pairs for i in range(0, len(ids), size)]
    bins = best_fit_decreasing([len(ids) for ids, _ in pieces], size)
    return {
        "input_ids": [joined(pieces[i][0] for i in members) for members in bins],
        "labels": [joined(pieces[i][1] for i in members) for members in bins],
        "seq_lengths": [[len(pieces[i][0]) for i in members] for members in bins],
    }
