"""The late trainer's optimisation on the engine (fastppo/engine): known models in float32 on a CPU, one process.

Suffixes: R response tokens of a pack, D hidden.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastppo import packed
from fastppo.data import Experience
from fastppo.engine import Engine, engine_for
from fastppo.engine.body import Body
from fastppo.engine.engine import PROBE_TOLERANCE, inputs_of, probe
from fastppo.engine.spec import read
from fastppo.experimental.ppo.learner import Step
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


class Fused:
    """Policy and value function on the engine. learn() runs inside `started`; refresh() follows an optimizer step."""

    def __init__(self, policy: Engine, separate: SeparateValues | None):
        self.policy, self.separate = policy, separate
        self._sequences: packed.Sequences | None = None

    def still_fits(self) -> bool:
        return self.policy.still_fits() and (self.separate is None or not isinstance(self.separate.spec(), str))

    @contextlib.contextmanager
    def started(self, experience: Experience) -> Iterator[None]:
        """experience: its [B, T] tensors have a column per response token."""
        whole = [torch.cat([q, r]) for q, r in zip(experience.queries, experience.responses, strict=True)]
        prompts, lengths = [len(q) for q in experience.queries], [len(ids) for ids in whole]
        self._sequences = packed.Sequences(whole, prompts, lengths, [0] * len(whole), experience.mask_BT)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.policy.started(torch.float32))
            if self.separate is not None:
                stack.enter_context(self.separate.started())
            yield
        self._sequences = None

    def refresh(self) -> None:
        self.policy.refresh()
        if self.separate is not None:
            self.separate.refresh()

    def learn(self, rows: list[int], old: PPOBatch, options: PPOLossOptions, normalizer: float) -> Step:
        """Loss and gradients (added to .grad) of some rows; old: [B, T] tensors of the batch."""
        pack = packed.pack(self._sequences, rows, only_counting=True)
        data = PPOBatch(*(x.flatten()[pack.flat_R] for x in old[:4]))
        if self.separate is not None:
            self.separate.forward(pack)
        done = self.policy.learn(pack, data, options, normalizer, backward=True)
        if self.separate is not None:
            self.separate.backward()
        return Step(done.loss, done.stats, (done.logprob_R - data.old_logprobs_N).abs().sum())


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
    return Fused(made, separate)


def fused_of(trainer: "PPOTrainer") -> Fused | None:
    """What fused_for makes, made once and checked again for every update."""
    if trainer.fused is None:
        trainer.fused = fused_for(trainer)
        if isinstance(trainer.fused, str):
            logger.info("training runs the models' own modules: %s", trainer.fused)
    return trainer.fused if isinstance(trainer.fused, Fused) and trainer.fused.still_fits() else None
