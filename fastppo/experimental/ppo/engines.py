"""The late trainer's scoring and optimisation on the engine (fastppo/engine): known models in float32 on a CPU, one process.

Suffixes: R response tokens of a pack, D hidden.
"""

import contextlib
import logging
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastppo import packed
from fastppo.engine import Engine, engine_for
from fastppo.engine.body import Body
from fastppo.engine.engine import PROBE_TOLERANCE, inputs_of, probe
from fastppo.engine.spec import read
from fastppo.experimental.ppo.learner import Reader
from fastppo.kernels.ppo_loss import PPOBatch, PPOLossOptions
from fastppo.models.head import output_head

if TYPE_CHECKING:
    from fastppo.experimental.ppo.ppo_trainer import PPOTrainer

logger = logging.getLogger(__name__)


class SeparateValues:
    """A value model with a backbone of its own as Engine's value_head: forward(pack), then values, then backward()."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._body: Body | None = None

    def spec(self):
        return read(self.model)

    @contextlib.contextmanager
    def started(self) -> Iterator[None]:
        self._body = Body(self.spec(), torch.float32, train=True)
        try:
            yield
        finally:
            self._body = self._leaf_RD = self._tape = None

    def refresh(self) -> None:
        self._body.weights.refresh()

    def forward(self, pack: packed.Pack) -> None:
        states_RD, self._tape = self._body.forward(inputs_of(pack, 1), len(pack.at_R), keep=True)
        self._leaf_RD = states_RD.requires_grad_()

    def __call__(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        # the policy's states have no part in it; the engine asks for their gradient, which is 0
        return self.model.score(self._leaf_RD) + 0.0 * hidden_RD[:, :1]

    def backward(self) -> None:
        self._body.backward(self._tape, self._leaf_RD.grad)

    @torch.no_grad()
    def score(self, pack: packed.Pack) -> torch.Tensor:
        """[R]"""
        body = Body(self.spec(), torch.float32, train=False)
        hidden_RD, _ = body.forward(inputs_of(pack, 1), len(pack.at_R), keep=False)
        return self.model.score(hidden_RD)[:, 0]


class Fused:
    """Policy and value function as one Engine for PackedLearner: learn() runs inside `started`. reference: only scored."""

    def __init__(self, policy: Engine, separate: SeparateValues | None, reference: Engine):
        self.policy, self.separate, self.reference = policy, separate, reference

    def still_fits(self) -> bool:
        fits = self.policy.still_fits() and self.reference.still_fits()
        return fits and (self.separate is None or not isinstance(self.separate.spec(), str))

    @contextlib.contextmanager
    def started(self) -> Iterator["Fused"]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.policy.started(torch.float32))
            if self.separate is not None:
                stack.enter_context(self.separate.started())
            yield self

    def refresh(self) -> None:
        self.policy.refresh()
        if self.separate is not None:
            self.separate.refresh()

    def learn(self, pack: packed.Pack, data: PPOBatch, options: PPOLossOptions, normalizer: float, backward: bool):
        """Engine.learn, the value function's gradients included."""
        if self.separate is not None:
            self.separate.forward(pack)
        done = self.policy.learn(pack, data, options, normalizer, backward)
        if self.separate is not None:
            self.separate.backward()
        return done


def fused_for(trainer: "PPOTrainer") -> Fused | str:
    """The trainer's models on the engine, or why they run their own modules."""
    accelerator, policy = trainer.accelerator, trainer.policy_model
    if accelerator.device.type != "cpu" or accelerator.num_processes > 1 or accelerator.mixed_precision != "no":
        return "the engine is for one process on a CPU in float32"
    if trainer.policy.full_logits:
        return trainer.policy.full_logits
    separate = None if trainer.value_model is None else SeparateValues(trainer.value_model)
    value_head = separate or trainer.model.v_head
    made = engine_for(policy, output_head(policy), value_head, trainer._score_temperature)
    if isinstance(made, str):
        return made
    if separate is not None:
        spec = separate.spec()
        if isinstance(spec, str):
            return spec
        if not probe(trainer.value_model, spec) <= PROBE_TOLERANCE:
            return "the value model's hidden states differ from its own modules'"
    if trainer.reference is None:
        return "the reference is the policy's own model"
    model = trainer.reference.packed.model
    why = trainer.reference.full_logits
    reference = why or engine_for(model, output_head(model), None, trainer._score_temperature)
    if isinstance(reference, str):
        return f"the reference: {reference}"
    return Fused(made, separate, reference)


def fused_of(trainer: "PPOTrainer") -> Fused | None:
    """What fused_for makes, made once and checked again for every update."""
    if trainer.fused is None:
        trainer.fused = fused_for(trainer)
        if isinstance(trainer.fused, str):
            logger.info("training runs the models' own modules: %s", trainer.fused)
    return trainer.fused if isinstance(trainer.fused, Fused) and trainer.fused.still_fits() else None


def readers(trainer: "PPOTrainer") -> tuple[Reader, Reader, Reader]:
    """Log-probs of the policy, of the reference, values."""
    value = Reader(trainer.value, trainer.value.packed.attention)
    if fused := fused_of(trainer):
        policy, reference = (Reader(partial(_logprob, engine)) for engine in (fused.policy, fused.reference))
        return policy, reference, value if fused.separate is None else Reader(fused.separate.score)
    policy, reference = (
        Reader(partial(scored.logprob, temperature=trainer._score_temperature), scored.packed.attention)
        for scored in (trainer.policy, trainer.reference or trainer.policy)
    )
    return policy, reference, value


def _logprob(engine: Engine, pack: packed.Pack) -> torch.Tensor:
    return engine.score(pack, torch.float32, with_values=False)[0]
