"""The late trainer's models for the packed stages: score with them, and learn with packed_update.PackedLearner.

Suffixes: B sequences, T response tokens, N packed tokens, R response tokens of a pack (row after row), D hidden, V vocabulary.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from fastppo import determinism, distributed, zero
from fastppo.data import Experience
from fastppo.gradients import FlatGradients
from fastppo.kernels.linear_logprob import linear_logprob
from fastppo.kernels.linear_ppo_loss import linear_ppo_loss
from fastppo.kernels.logprob import logprob
from fastppo.kernels.ppo_loss import PPOBatch, PPOLossOptions, PPOStats, ppo_loss
from fastppo.models.head import checked_output_head, output_head
from fastppo.packed import Pack, Sequences, pack, plan
from fastppo.packed_model import PackedModel
from fastppo.packed_update import PackedLearner, Result
from fastppo.packing import PackedBatch
from fastppo.update import loss_options

if TYPE_CHECKING:
    from fastppo.experimental.ppo.ppo_trainer import PPOTrainer

logger = logging.getLogger(__name__)


def sequences(prompts: list[torch.Tensor], responses: list[torch.Tensor], mask_BT: torch.Tensor) -> Sequences:
    """[B, T] matrices of this batch have a column per response token."""
    whole = [torch.cat([q.to(mask_BT.device), r.to(mask_BT.device)]) for q, r in zip(prompts, responses, strict=True)]
    return Sequences(whole, [len(q) for q in prompts], [len(ids) for ids in whole], [0] * len(whole), mask_BT)


def padded(packed: Pack) -> tuple[torch.Tensor, PackedBatch]:
    """(tokens [b, T], right-padded; the pack as PackedModel takes it)."""
    tokens_1N = packed.tokens_1N
    lengths_B1 = torch.tensor(packed.lengths, device=tokens_1N.device)[:, None]
    place_T = torch.arange(max(packed.lengths), device=tokens_1N.device)
    kept_BT = place_T < lengths_B1
    tokens_BT = tokens_1N.new_zeros(kept_BT.shape).masked_scatter(kept_BT, tokens_1N)
    positions_1N = place_T.expand_as(kept_BT)[kept_BT][None]
    return tokens_BT, PackedBatch(tokens_1N, positions_1N, packed.cu_seqlens, len(place_T), kept_BT)


class Policy:
    """A language model that gives log-probs of response tokens. `full_logits`: why its head can't be split off, or None."""

    def __init__(self, model: nn.Module):
        self.packed = PackedModel(model)
        head = checked_output_head(model)
        self.full_logits = head if isinstance(head, str) else None

    def gather_head(self, accelerator: Any, root: nn.Module) -> None:
        """ZeRO-3 gathers the parameters of modules that are called; the head's are read. root: what the engine wraps."""
        if not self.full_logits and distributed.kind(accelerator) == "zero3":
            zero.gather_with(root, self.packed.inner.get_output_embeddings().parameters())

    def states(self, packed: Pack) -> torch.Tensor:
        """[R, D] hidden states, or [R, V] logits where full_logits says so."""
        run = self.packed.logits if self.full_logits else self.packed.hidden
        return run(*padded(packed)).index_select(0, packed.at_R)

    def logprob(self, packed: Pack, temperature: float, as_learnt: bool = False) -> torch.Tensor:
        """[R]; as_learnt: in the very numbers of loss()."""
        states, targets_R = self.states(packed), packed.targets_R
        if as_learnt:
            data = determinism.no_data(packed)
            return self.loss(states, data.old_values_N, targets_R, data, PPOLossOptions(), temperature, 1.0)[2]
        if self.full_logits:
            return logprob(states, targets_R, temperature=temperature).logprob_N
        return linear_logprob(states, output_head(self.packed.model), targets_R, temperature=temperature).logprob_N

    def loss(self, states, values_R, targets_R, data: PPOBatch, options, temperature: float, normalizer: float) -> Any:
        """(loss, PPOStats, log-probs [R])."""
        if not self.full_logits:
            head = output_head(self.packed.model)
            both = {"temperature": temperature, "normalizer": normalizer}
            out = linear_ppo_loss(states, values_R, head, targets_R, data, options, **both)
            return out.loss, out.stats, out.logprob_N
        scores = logprob(states, targets_R, temperature=temperature)
        out = ppo_loss(scores.logprob_N, values_R, data, options, entropy_N=scores.entropy_N, normalizer=normalizer)
        return out.loss, out.stats, scores.logprob_N.detach()


def loss_of(trainer: "PPOTrainer", packed: Pack, data: PPOBatch, normalizer: float) -> Any:
    """(loss, PPOStats, log-probs [R], values [R]) of the trainer's models, through their own modules."""
    with trainer.accelerator.autocast():
        states = trainer.policy.states(packed)
        values_R = trainer.value(packed, states)
        options, temperature = loss_options(trainer.args), trainer._score_temperature
        found = trainer.policy.loss(states, values_R, packed.targets_R, data, options, temperature, normalizer)
    return *found, values_R


class SharedValue:
    """Values from a head on the policy's hidden states."""

    def __init__(self, model: nn.Module, policy: Policy):
        if policy.full_logits:
            raise ValueError(
                f"PPOTrainer: value_model=None puts the value head on the policy's hidden states, but {policy.full_logits}; "
                "pass a value_model"
            )
        self.model, self.policy, self.packed = model, policy, policy.packed

    def __call__(self, packed: Pack, states: torch.Tensor | None = None) -> torch.Tensor:
        """[R]; states: the policy's, where they are known."""
        return self.model.v_head(self.policy.states(packed) if states is None else states)[:, 0].float()


class SeparateValue:
    """Values from a backbone of their own with a `score` layer."""

    def __init__(self, model: nn.Module):
        self.packed = PackedModel(model)

    def __call__(self, packed: Pack, states: torch.Tensor | None = None) -> torch.Tensor:
        hidden_RD = self.packed.hidden(*padded(packed)).index_select(0, packed.at_R)
        return self.packed.inner.score(hidden_RD)[:, 0].float()


def chunks(lengths: list[int], rows: list[int], size: int) -> Iterator[list[int]]:
    """`rows` in chunks of `size`, sequences of about the same length together."""
    order = sorted(rows, key=lambda row: -lengths[row])
    return (order[i : i + size] for i in range(0, len(order), size))


class Reader(NamedTuple):
    """read(pack) -> [R] at its response tokens, inside `context()`. tokens: most in a pack; None: any number."""

    read: Callable[[Pack], torch.Tensor]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    tokens: int | None = None


@torch.no_grad()
def score(reader: Reader, data: Sequences, size: int) -> torch.Tensor:
    """[B, T]: what is read at the response tokens, 0 elsewhere; at most `size` sequences at a time."""
    out_BT = torch.zeros(data.shape, device=data.mask_BT.device)
    with reader.context():
        for chunk in chunks(data.lengths, range(len(data.tokens)), size):
            for rows in plan(data.lengths, chunk, reader.tokens):
                packed = pack(data, rows, only_counting=False)
                out_BT.view(-1)[packed.flat_R] = reader.read(packed).float()
    return out_BT


@contextlib.contextmanager
def started(trainer: "PPOTrainer", engine: Any, flat: FlatGradients | None = None) -> Iterator[Any]:
    """Training passes run inside, on what is yielded: the engine, or None for the models' own modules."""
    with contextlib.ExitStack() as stack:
        if engine is None:
            for packed in {id(x): x for x in (trainer.policy.packed, trainer.value.packed)}.values():
                stack.enter_context(packed.attention())
        yield None if engine is None else stack.enter_context(engine.started(flat))


def score_as_learnt(trainer: "PPOTrainer", engine: Any, data: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
    """([B, T] log-probs, values) sequence by sequence, in the very numbers that learn() would find now."""

    def read(packed: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        if engine is not None:
            return engine.score_as_learnt(packed)
        *_, logprob_R, values_R = loss_of(trainer, packed, determinism.no_data(packed), 1.0)
        return logprob_R, values_R

    with started(trainer, engine):
        return determinism.score_each(data, True, read)


class Optimised(NamedTuple):
    """One optimizer step: statistics of its mini-batch over all processes, gradient norm before clipping."""

    stats: PPOStats
    grad_norm: float


class Learner(PackedLearner):
    """PackedLearner with a policy and a value function of their own; one mini-batch per optimizer step."""

    def __init__(self, trainer: "PPOTrainer", data: Sequences, experience: Experience):
        accelerator, args = trainer.accelerator, trainer.args
        config = SimpleNamespace(
            cliprange=args.cliprange,
            cliprange_value=args.cliprange_value,
            vf_coef=args.vf_coef,
            max_grad_norm=args.max_grad_norm or None,
            ratio_threshold=float("inf"),
            gradient_accumulation_steps=accelerator.gradient_accumulation_steps,
            deterministic=args.deterministic,
        )
        # what PackedLearner asks the classic trainer for
        view = SimpleNamespace(
            accelerator=accelerator,
            config=config,
            model=trainer.model_wrapped,
            model_params=[p for p in trainer._wrapper.parameters() if p.requires_grad],
            optimizer=trainer.optimizer,
            is_distributed=accelerator.num_processes > 1,
            current_device=accelerator.device,
            _guard=trainer.guard,
            _steps_done=trainer.state.global_step + 1,
        )
        super().__init__(view, data, experience, tolerance=None)
        self.late = trainer
        self.steps: list[Optimised] = []

    @contextlib.contextmanager
    def started(self, engine: Any) -> Iterator["Learner"]:
        """learn() runs inside. engine: engines.Fused, or None for the models' own modules."""
        flat = None if engine is None else self.lay_flat(engine.neighbours())
        with started(self.late, engine, flat) as self.engine:
            yield self

    def _packs(self, rows: list[int]) -> list[Pack]:
        micros = chunks(self.sequences.lengths, rows, self.late.micro_rows)
        packs = [pack(self.sequences, micro, only_counting=True) for micro in micros]
        return [packed for packed in packs if len(packed.flat_R)]

    def _minibatch(self, packs: list[Pack], share: distributed.Share, backward: bool) -> Result:
        # a mini-batch is an optimizer step: undo accelerate's division by its number of accumulation steps
        count = share.normalizer / self.trainer.config.gradient_accumulation_steps
        return super()._minibatch(packs, share._replace(normalizer=count), backward)

    def _forward(self, packed: Pack, count: float) -> tuple[torch.Tensor, Result]:
        data = self._data(packed)
        loss, stats, logprob_R, _ = loss_of(self.late, packed, data, count)
        return loss, Result(stats, packed.flat_R, logprob_R.detach() - data.old_logprobs_N)

    def _stats(self, rows: list[int], result: Result, means: dict[str, float]) -> Optimised:
        return Optimised(result.sums, self.grad_norm)

    def _halve_budget(self, group: list[list[int]]) -> None:
        late = self.late
        if late.micro_rows == 1:
            raise torch.OutOfMemoryError("PPOTrainer: out of memory on one sequence; shorten responses")
        late.micro_rows = -(-late.micro_rows // 2)
        logger.warning("out of memory: micro-batches have %d sequences from here on", late.micro_rows)
        torch.cuda.empty_cache()
