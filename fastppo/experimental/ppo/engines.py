"""The late trainer's scoring and optimisation on the engine (fastppo/engine): known models in float32 on a CPU, whole on each process.

Suffixes: R response tokens of a pack, D hidden.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastppo import distributed, packed
from fastppo.attention import unwrap
from fastppo.engine import Engine, engine_for
from fastppo.engine.body import Body, Inputs
from fastppo.engine.engine import PROBE_TOLERANCE, SCORED_TOKENS, inputs_of, probe
from fastppo.engine.spec import Spec, read
from fastppo.experimental.ppo.learner import Reader
from fastppo.gradients import FlatGradients, Neighbours, for_one_stage
from fastppo.kernels._backend import extension
from fastppo.kernels.ppo_loss import PPOBatch, PPOLossOptions
from fastppo.models.head import output_head

if TYPE_CHECKING:
    from fastppo.experimental.ppo.ppo_trainer import PPOTrainer

logger = logging.getLogger(__name__)


class Classifier:
    """Scores of a sequence classifier on the engine, its live parameters. read() first: the model may have changed."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._probed: str | None = None  # why the engine does not compute this model, "" where it does

    def read(self) -> Spec | str:
        """What the engine computes with, or why it can't."""
        spec = extension() if isinstance(extension(), str) else read(self.model)
        if isinstance(spec, str):
            return spec
        if self._probed is None:
            close = probe(self.model, spec) <= PROBE_TOLERANCE
            self._probed = (
                "" if close else f"the hidden states of {type(self.model).__name__} differ from its own modules'"
            )
        return self._probed or spec

    @torch.no_grad()
    def score(self, spec: Spec, inputs: Inputs) -> torch.Tensor:
        """[R]"""
        hidden_RD, _ = Body(spec, torch.float32, train=False).forward(inputs, len(inputs.at_R), keep=False)
        return unwrap(self.model).score(hidden_RD)[:, 0]


class SeparateValues(Classifier):
    """A value model with a backbone of its own as Engine's value_head: forward(pack), then values, then backward()."""

    _body: Body | None = None

    @contextlib.contextmanager
    def started(self, flat: FlatGradients | None) -> Iterator[None]:
        spec = self.read()
        flat = flat or for_one_stage(spec.parameters(), spec.neighbours())
        self._body = Body(spec, torch.float32, train=True, flat=flat)
        try:
            yield
        finally:
            self._body = self._leaf_RD = self._tape = None

    def refresh(self) -> None:
        self._body.refresh()

    def forward(self, pack: packed.Pack) -> None:
        states_RD, self._tape = self._body.forward(inputs_of(pack, 1), len(pack.at_R), keep=True)
        self._leaf_RD = states_RD.requires_grad_()

    def __call__(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        # the policy's states have no part in it; the engine asks for their gradient, which is 0
        return self.model.score(self._leaf_RD) + 0.0 * hidden_RD[:, :1]

    def backward(self) -> None:
        self._body.backward(self._tape, self._leaf_RD.grad)

    @torch.no_grad()
    def score_as_learnt(self, pack: packed.Pack) -> torch.Tensor:
        """[R], inside `started`, in the very numbers that learn() would find now."""
        self.forward(pack)
        return self.model.score(self._leaf_RD)[:, 0]

    def score_pack(self, pack: packed.Pack) -> torch.Tensor:
        """[R]"""
        return self.score(self.read(), inputs_of(pack, 1))


class Fused:
    """Policy and value function as one Engine for PackedLearner: learn() runs inside `started`. reference: only scored."""

    def __init__(self, policy: Engine, separate: SeparateValues | None, reference: Engine):
        self.policy, self.separate, self.reference = policy, separate, reference

    def still_fits(self) -> bool:
        fits = self.policy.still_fits() and self.reference.still_fits()
        return fits and (self.separate is None or not isinstance(self.separate.read(), str))

    def neighbours(self) -> Neighbours:
        """FlatGradients', of both models."""
        own = self.policy.spec.neighbours()
        return own if self.separate is None else own + self.separate.read().neighbours()

    @contextlib.contextmanager
    def started(self, flat: FlatGradients | None = None) -> Iterator["Fused"]:
        """flat: where the gradients of both models go."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.policy.started(torch.float32, flat))
            if self.separate is not None:
                stack.enter_context(self.separate.started(flat))
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

    def score_as_learnt(self, pack: packed.Pack) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probs [R], values [R]), inside `started`, in the very numbers that learn() would find now."""
        logprob_R, values_R = self.policy.score_as_learnt(pack, with_values=self.separate is None)
        return logprob_R, values_R if self.separate is None else self.separate.score_as_learnt(pack)


def fused_for(trainer: "PPOTrainer") -> Fused | str:
    """The trainer's models on the engine, or why they run their own modules."""
    accelerator, policy = trainer.accelerator, trainer.policy_model
    if accelerator.device.type != "cpu" or accelerator.mixed_precision != "no":
        return "the engine is for CPUs, in float32"
    if distributed.kind(accelerator) not in ("single", "ddp"):
        return f"{distributed.kind(accelerator)} works through hooks of the models' own modules"
    if trainer.policy.full_logits:
        return trainer.policy.full_logits
    separate = None if trainer.value_model is None else SeparateValues(trainer.value_model)
    value_head = separate or trainer.model.v_head
    made = engine_for(policy, output_head(policy), value_head, trainer._score_temperature)
    if isinstance(made, str):
        return made
    if separate is not None and isinstance(why := separate.read(), str):
        return why
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
    as_learnt = trainer.args.deterministic
    if fused := fused_of(trainer):
        policy, reference = (
            _reader(partial(_logprob, engine, as_learnt), partial(context, torch.float32))
            for engine in (fused.policy, fused.reference)
            for context in [engine.started if as_learnt else engine.scoring]
        )
        return policy, reference, value if fused.separate is None else _reader(fused.separate.score_pack)
    policy, reference = (
        Reader(
            partial(scored.logprob, temperature=trainer._score_temperature, as_learnt=as_learnt),
            scored.packed.attention,
        )
        for scored in (trainer.policy, trainer.reference or trainer.policy)
    )
    return policy, reference, value


def _reader(read: Callable[[packed.Pack], torch.Tensor], context: Callable = contextlib.nullcontext) -> Reader:
    return Reader(read, context, SCORED_TOKENS)


def _logprob(engine: Engine, as_learnt: bool, pack: packed.Pack) -> torch.Tensor:
    return (engine.score_as_learnt if as_learnt else engine.score)(pack, with_values=False)[0]
