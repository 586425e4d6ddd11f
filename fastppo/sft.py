"""Supervised fine-tuning with TRL's names: SFTConfig, SFTTrainer.

loss = - sum over labelled tokens of log p(token | tokens before) / their number in the whole optimizer step

computed by `linear_logprob` on packed sequences, at labelled positions only: there is no padding and no logits tensor.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from fastppo import distributed, zero
from fastppo.kernels.linear_logprob import Head, linear_logprob
from fastppo.kernels.logprob import logprob
from fastppo.models.head import checked_output_head, output_head
from fastppo.packed_model import PackedModel
from fastppo.packing import PackedBatch, pack
from fastppo.sft_data import SFTCollator, prepare_dataset
from fastppo.supervised import PackedTrainer, check_trainer, each_split, prepare_run
from fastppo.training_args import SupervisedConfig
from fastppo.wanted import is_flag

logger = logging.getLogger(__name__)

PACKING_STRATEGIES = ("bfd", "bfd_split", "wrapped")
_ARGMAX_LOGITS = 2**24  # logits at a time when counting correct tokens: 64 MB in float32


@dataclass
class SFTConfig(SupervisedConfig):
    """TrainingArguments plus TRL's fields for supervised fine-tuning; ValueError names a field with a wrong value."""

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
        flags = ("shuffle_dataset", "packing", "padding_free", "assistant_only_loss")
        self._check(flags, "True or False", is_flag)
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"SFTConfig: {name} must be one of {allowed}; got {getattr(self, name)!r}")
        if self.packing and self.max_length is None:
            raise ValueError("SFTConfig: packing=True needs max_length, the number of tokens of a row; got None")
        if self.label_smoothing_factor:
            raise ValueError("SFTConfig: label_smoothing_factor is not supported; the loss is the plain log-likelihood")
        super().__post_init__()


LEFT_OUT = "a row needs two tokens (within max_length), and a loss on one past the first"


class SFTTrainer(PackedTrainer):
    """Fine-tune a causal language model on text, messages, or prompt and completion.

    model: a transformers model, a PEFT model, or the name of one. The dataset is tokenised here unless it has
    `input_ids` (then `labels`, `completion_mask` or `assistant_masks` say which tokens count).
    The loss is in nats per token that counts. Raises ValueError for a model, dataset or option that does not fit; train()
    raises NonFinite for a NaN or infinite loss and CheckpointError for a checkpoint that cannot be used.
    """

    checkpoint_kind = "sft"
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
        functions = {
            "data_collator": data_collator,
            "formatting_func": formatting_func,
            "compute_metrics": compute_metrics,
        }
        others = {"processing_class": processing_class, "peft_config": peft_config, "optimizers": optimizers}
        check_trainer("SFTTrainer", model=model, callbacks=callbacks, **functions, **others)
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
            train_dataset=each_split(
                train_dataset, lambda rows: prepare(rows, args.packing), LEFT_OUT, "train_dataset"
            ),
            eval_dataset=each_split(eval_dataset, lambda rows: prepare(rows, eval_packing), LEFT_OUT),
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.model_accepts_loss_kwargs = True  # older transformers read this, newer ones loss_is_scaled_for_ga
        self._start()
        head = checked_output_head(self._packed.model)
        self._head_reason = head if isinstance(head, str) else None
        if self._head_reason:
            logger.warning("SFTTrainer: logits are computed in full: %s", self._head_reason)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list({*self._signature_columns, "labels", "seq_lengths"})

    def _next_batches(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The micro-batches of one optimizer step, and the number of labelled tokens in all of them."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        count = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        if batches and self.args.world_size > 1:
            count = self.accelerator.reduce(count.to(device), "sum")
        # at least 1: a batch may have no labelled token at all, which teaches nothing, but 0 / 0 would be NaN
        return batches, count.clamp(min=1) if batches else None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError("SFTTrainer.compute_loss: there are no outputs, the loss is computed without logits")
        tokens_BT, labels_BT = inputs["input_ids"], inputs["labels"]
        batch = pack(tokens_BT, inputs.get("attention_mask"))
        labels_N = batch.pick(torch.nn.functional.pad(labels_BT[:, 1:], (0, 1), value=-100))
        scored_N = labels_N != -100
        targets = labels_N[scored_N]

        correct: list[int] = []

        def forward() -> Predictions:
            if not self._head_reason:
                distributed.unshard(self._packed.inner.get_output_embeddings())
            scores = predict(self._packed, self._head_reason, tokens_BT, batch, scored_N, targets)
            # a second product with the head, here because ZeRO-3 gives the head back after this function
            if self._this_step_is_logged():
                correct.append(scores.count_correct())
            return scores

        self._gather_head()
        with self.accelerator.autocast():
            scores = self._packed.call(model, forward)
        self._record(scores, batch, correct)
        total = -scores.logprob_R.sum()
        if num_items_in_batch is None:
            return total / max(targets.numel(), 1)
        # DDP averages gradients over processes; the count is of all of them
        return total * self.args.world_size / num_items_in_batch

    def _gather_head(self) -> None:
        """ZeRO-3 gathers the parameters of modules that are called; the head's are read."""
        if not self._head_reason and distributed.kind(self.accelerator) == "zero3":
            zero.gather_with(self._packed.model, self._packed.inner.get_output_embeddings().parameters())

    @torch.no_grad()
    def _record(self, scores: "Predictions", batch: PackedBatch, correct: list[int]) -> None:
        self._metrics.add(self._mode, "entropy", scores.entropy_R.detach().sum(), scores.entropy_R.numel())
        if self._mode == "train":
            self._new_tokens += batch.tokens_1N.numel()
        for count in correct:
            self._metrics.add(self._mode, "mean_token_accuracy", count, scores.entropy_R.numel())

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            with self._packed.attention():
                loss = self.compute_loss(model, inputs).detach()
            if prediction_loss_only:
                return loss, None, None
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return loss, logits.detach(), inputs["labels"]


class Predictions(NamedTuple):
    """At the R labelled positions: log-prob of the label and entropy in nats; count_correct() compares the argmax."""

    logprob_R: torch.Tensor
    entropy_R: torch.Tensor
    count_correct: Callable[[], int]


def predict(model: PackedModel, why_logits: str | None, tokens_BT, batch, scored_N, targets_R) -> Predictions:
    """Score targets_R at the packed positions scored_N, without logits unless `why_logits` says they are needed."""
    if why_logits:
        logits_RV = model.logits(tokens_BT, batch)[scored_N]
        scores = logprob(logits_RV, targets_R)
        return Predictions(*scores, lambda: int((logits_RV.argmax(-1) == targets_R).sum()))
    hidden_RD = model.hidden(tokens_BT, batch)[scored_N]
    head = output_head(model.model)
    scores = linear_logprob(hidden_RD, head, targets_R)
    return Predictions(*scores, lambda: count_correct(hidden_RD.detach(), head, targets_R))


@torch.no_grad()
def count_correct(hidden_RD: torch.Tensor, head: Head, targets_R: torch.Tensor) -> int:
    """How many targets are the most likely token. Scale and soft cap keep the order of the logits."""
    rows = max(_ARGMAX_LOGITS // head.weight_VD.shape[0], 1)
    weight_VD = head.weight_VD.to(hidden_RD.dtype)
    bias_V = None if head.bias_V is None else head.bias_V.to(hidden_RD.dtype)
    parts = zip(hidden_RD.split(rows), targets_R.split(rows), strict=True)
    return sum(int((torch.nn.functional.linear(h, weight_VD, bias_V).argmax(-1) == t).sum()) for h, t in parts)
