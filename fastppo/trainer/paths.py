"""Which way a step takes: packed (no padding, no logits), or padded batches through the trainer's public methods."""

import logging

from fastppo import determinism, distributed
from fastppo.models.head import checked_output_head
from fastppo.trainer.packed_path import PackedPath
from fastppo.trainer.padded_path import PaddedPath

logger = logging.getLogger(__name__)

# a subclass that overrides one of these means the padded tensors that they take
STAGES = (
    "prepare_model_inputs", "batched_forward_pass", "compute_rewards", "_kl_penalty", "compute_advantages", "loss",
    "train_minibatch",
)  # fmt: skip


def choose_path(trainer, default_collator: bool):
    """PackedPath where it can run; else PaddedPath, with the reason in the log."""
    why = _padded_because(trainer, default_collator)
    if why is None:
        models = [trainer.model] if trainer.ref_model is None else [trainer.model, trainer.ref_model]
        heads = [_checked_head(trainer.accelerator, model) for model in models]
        why = next((head for head in heads if isinstance(head, str)), None)
    if trainer.config.deterministic:
        determinism.check(distributed.kind(trainer.accelerator), why)
    if why is None:
        return PackedPath(trainer, heads[0], heads[-1])
    if trainer.config.packed:
        logger.warning("step() runs padded batches: %s", why)
    return PaddedPath(trainer)


def _checked_head(accelerator, model):
    inner = distributed.bare(model)
    return distributed.whole(accelerator, model, lambda: checked_output_head(inner))


def _padded_because(trainer, default_collator: bool) -> str | None:
    from fastppo import attention
    from fastppo.trainer.ppo_trainer import PPOTrainer

    if not trainer.config.packed:
        return "config.packed is False"
    changed = [name for name in STAGES if getattr(type(trainer), name) is not getattr(PPOTrainer, name)]
    changed += [name for name in STAGES if name in vars(trainer)]
    if changed:
        return f"{type(trainer).__name__} overrides {', '.join(changed)}"
    if not default_collator:
        return "training_data_collator decides on the padding"
    if getattr(trainer.model, "is_sequential_parallel", False):
        return "the model is split over devices"
    models = [trainer.model] + [trainer.ref_model] * (trainer.ref_model is not None)
    return next((why for model in models if (why := attention.unsupported(model))), None)
