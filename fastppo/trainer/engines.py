"""Which of a trainer's models run on the engine (fastppo/engine): known models in float32 on a CPU, without adapters."""

import logging

import torch

from fastppo import distributed
from fastppo.engine import Engine, engine_for

logger = logging.getLogger(__name__)

# accelerate's mixed_precision -> what the matrix products compute in; "fp16" goes through autocast
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}


class Engines:
    """Engines of the policy and the reference, made when first asked for."""

    def __init__(self, trainer, head, reference_head):
        self.trainer = trainer
        self.reference_model = trainer.model if trainer.ref_model is None else trainer.ref_model
        self._heads = {id(self.reference_model): reference_head, id(trainer.model): head}
        self._made: dict[int, Engine | str] = {}

    def of(self, model) -> tuple[Engine, torch.dtype] | None:
        """(Engine, dtype) of the trainer's policy or reference; None where its own modules must run."""
        accelerator = self.trainer.accelerator
        dtype = DTYPES.get(accelerator.mixed_precision)
        if dtype is None or self.trainer.current_device.type != "cpu":
            return None
        if distributed.kind(accelerator) not in ("single", "ddp"):
            return None
        if id(model) not in self._made:
            whole = accelerator.unwrap_model(model)
            self._made[id(model)] = engine_for(whole, self._heads[id(model)], getattr(whole, "v_head", None))
            if isinstance(self._made[id(model)], str):
                logger.info("%s runs its own modules: %s", type(whole).__name__, self._made[id(model)])
        engine = self._made[id(model)]
        return (engine, dtype) if isinstance(engine, Engine) and engine.still_fits() else None
