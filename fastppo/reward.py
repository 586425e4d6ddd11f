"""Reward modelling with TRL's names: RewardConfig, RewardTrainer.

loss = - mean over pairs of log sigmoid(r(chosen) - r(rejected) - margin)  [+ c * mean (r(chosen) + r(rejected))^2]

(Bradley-Terry; margin: Llama 2, arXiv:2307.09288, section 3.2.2; centring: arXiv:2312.09244.) The two sides of all pairs
run as one packed batch through the backbone; the score layer sees the last token of each sequence only.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, TrainingArguments

from fastppo.attention import unwrap
from fastppo.chat import pair_ids
from fastppo.packing import pack
from fastppo.supervised import PackedTrainer, check_trainer, each_split, keep_rows, pad_rows, prepare_run, tokenise
from fastppo.training_args import SupervisedConfig
from fastppo.wanted import is_flag, is_number


@dataclass
class RewardConfig(SupervisedConfig):
    """TrainingArguments plus TRL's fields for reward models; ValueError names a field with a wrong value."""

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of the optimizer."})
    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout of the model to 0."})
    center_rewards_coefficient: float | None = field(
        default=None, metadata={"help": "c in c * mean (r(chosen) + r(rejected))^2, which pulls rewards to 0."}
    )

    def __post_init__(self):
        wanted = "a number of at least 0, or None"
        self._check(("center_rewards_coefficient",), wanted, lambda x: x is None or is_number(x, 0))
        self._check(("disable_dropout",), "True or False", is_flag)
        super().__post_init__()


class RewardTrainer(PackedTrainer):
    """Train a sequence classifier with one label on preference pairs.

    model: a classifier, a PEFT model around one, or a name (loaded with num_labels=1). Rows have `chosen` and `rejected`,
    as text or messages, perhaps `prompt` (put in front of both) and `margin`. Pairs with a side longer than
    max_length are dropped. The loss is -log sigmoid(r(chosen) - r(rejected) - margin) per pair, in nats.
    Raises ValueError for a model, dataset or option that does not fit; train() raises NonFinite for a NaN or infinite
    loss and CheckpointError for a checkpoint that cannot be used.
    """

    checkpoint_kind = "reward"
    loss_is_scaled_for_ga = False  # a mean over the micro-batch: the Trainer divides by their number

    def __init__(
        self,
        model: Any,
        args: RewardConfig | TrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        optimizer_cls_and_kwargs: tuple | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
    ):
        functions = {"data_collator": data_collator, "compute_metrics": compute_metrics}
        others = {"processing_class": processing_class, "peft_config": peft_config, "optimizers": optimizers}
        check_trainer("RewardTrainer", model=model, callbacks=callbacks, **functions, **others)
        run = prepare_run(
            RewardConfig,
            AutoModelForSequenceClassification,
            model,
            args,
            processing_class,
            quantization_config,
            peft_config,
            num_labels=1,
        )
        args, tokenizer, model = run.args, run.tokenizer, run.model
        if (labels := model.config.num_labels) != 1:
            raise ValueError(f"RewardTrainer: the model must have one label, the reward; got num_labels={labels}")
        if unwrap(model).get_output_embeddings() is not None:
            raise ValueError(
                f"RewardTrainer: {type(unwrap(model)).__name__} predicts tokens; load the model with "
                "AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)"
            )
        model.config.pad_token_id = tokenizer.pad_token_id  # the model scores the last token that is not padding
        if args.disable_dropout:
            disable_dropout(model)
        prepare: Callable = lambda rows: prepare_pairs(rows, tokenizer, args)  # noqa: E731
        left_out = f"pairs of which a side has more than max_length={args.max_length} tokens are dropped"
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or PairCollator(tokenizer.pad_token_id),
            train_dataset=each_split(train_dataset, prepare, left_out, "train_dataset"),
            eval_dataset=each_split(eval_dataset, prepare, left_out),
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.model_accepts_loss_kwargs = False  # older transformers read this, newer ones loss_is_scaled_for_ga
        inner = unwrap(model)
        self._start(
            None if hasattr(inner, "score") else f"{type(inner).__name__} has no score layer over a causal backbone"
        )

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["chosen_ids", "rejected_ids", "margin"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """inputs: `input_ids` and `attention_mask` [2B, T], chosen first; perhaps `margin` [B]."""
        with self.accelerator.autocast():
            rewards = self.rewards(model, inputs["input_ids"], inputs["attention_mask"]).float()
        chosen, rejected = rewards.chunk(2)
        margin = inputs.get("margin", 0.0)
        loss = -F.logsigmoid(chosen - rejected - margin).mean()
        if self.args.center_rewards_coefficient is not None:
            loss = loss + self.args.center_rewards_coefficient * ((chosen + rejected) ** 2).mean()
        self._record(chosen.detach(), rejected.detach(), inputs)
        return (loss, {"rewards": torch.stack([chosen, rejected], 1).detach()}) if return_outputs else loss

    def rewards(self, model, tokens_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """Reward of each sequence, [B]: the score of its last token that is not the padding token."""
        packed = self._packed
        if packed.why_padded:
            return model(input_ids=tokens_BT, attention_mask=mask_BT).logits[:, 0]
        batch = pack(tokens_BT, mask_BT)
        last_B = last_tokens(tokens_BT, mask_BT, packed.inner.config.pad_token_id)
        is_last_BT = torch.zeros_like(batch.kept_BT)
        is_last_BT[torch.arange(len(last_B), device=last_B.device), last_B] = True

        def forward():
            hidden = packed.hidden(tokens_BT, batch)
            return packed.inner.score(hidden[batch.pick(is_last_BT)])[:, 0]

        return packed.call(model, forward)

    @torch.no_grad()
    def _record(self, chosen: torch.Tensor, rejected: torch.Tensor, inputs: dict) -> None:
        add, mode, pairs = self._metrics.add, self._mode, len(chosen)
        both = torch.cat([chosen, rejected])
        add(mode, "accuracy", (chosen > rejected).float().sum(), pairs)
        add(mode, "margin", (chosen - rejected).sum(), pairs)
        for name, value in (("min", both.min()), ("mean", both.mean()), ("max", both.max())):
            add(mode, f"{name}_reward", value, 1)
        if mode == "train":
            self._new_tokens += int(inputs["attention_mask"].sum())

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager(), self._packed.attention():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        # compute_metrics sees logits [B, 2] = (chosen, rejected) and the right answer, 0
        return loss, outputs["rewards"], torch.zeros(len(outputs["rewards"]), device=loss.device, dtype=torch.long)


def last_tokens(tokens_BT: torch.Tensor, mask_BT: torch.Tensor, pad_token_id: int | None) -> torch.Tensor:
    """Index of each row's last token as transformers' classifiers choose it: the last that is not the padding token.

    So where padding and end of sequence are one token, the score is taken one token earlier, here as there.
    """
    real_BT = mask_BT.bool()
    if pad_token_id is not None:
        other_BT = real_BT & (tokens_BT != pad_token_id)
        real_BT = torch.where(other_BT.any(1, keepdim=True), other_BT, real_BT)
    positions_T = torch.arange(1, tokens_BT.shape[1] + 1, device=tokens_BT.device)
    return (positions_T * real_BT).argmax(1)


def disable_dropout(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


class PairCollator:
    """Pairs to right-padded `input_ids` and `attention_mask` [2B, T], chosen first, and `margin` [B]."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        sides = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
        batch = {
            "input_ids": pad_rows(sides, self.pad_token_id),
            "attention_mask": pad_rows([[1] * len(side) for side in sides], 0),
        }
        if "margin" in rows[0]:
            batch["margin"] = torch.tensor([row["margin"] for row in rows], dtype=torch.float32)
        return batch


def prepare_pairs(dataset: Any, tokenizer: Any, args: RewardConfig) -> Any:
    """Rows with `chosen_ids` and `rejected_ids`, both at most max_length tokens."""
    with args.main_process_first(desc="tokenising", local=False):
        dataset = tokenise(dataset, pair_ids, args, "Tokenising", fn_kwargs={"tokenizer": tokenizer})
        if args.max_length is None:
            return dataset
        longest = args.max_length
        return keep_rows(
            dataset,
            lambda row: len(row["chosen_ids"]) <= longest and len(row["rejected_ids"]) <= longest,
            args,
            f"Dropping pairs over {longest} tokens",
        )
