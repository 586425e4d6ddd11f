"""Bytes that one process of a PPO run holds, by what they are for and when.

    always      weights, reference, optimizer
    rollout     KV pages, on a CPU packed weights of the decode program, the prompts' forward pass, a step's logits, under FSDP2 one model whole
    scoring     a pass without gradient over FORWARD_TOKENS, the head's tile, under FSDP2 one model whole; on a CPU what waits for training
    training    gradients, DDP's buckets, activations of a micro-batch, the head's chunk, under FSDP2 two gathered layers

On a CPU the rollout's packed weights and pages wait for training: on the engine gradients and activations take their places, its own
modules have them given back.

The peak is `always` and the largest of the three. Suffixes: V vocabulary, D hidden.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from fastppo.engine.engine import SCORED_TOKENS
from fastppo.engine.native import SPARE
from fastppo.kernels._recycle import OF_STAGE
from fastppo.kernels.linear_logprob import TILE_BYTES
from fastppo.kernels.linear_ppo_loss import CHUNK_BYTES
from fastppo.planner.passes import Counted, Setting, count

BLOCK = 16  # tokens of a KV page
ROLLOUT_TOKENS = {"cpu": 1024, "cuda": 8192}  # prompt tokens read at a time
MOST_DECODED = 256  # sequences decoded together
FORWARD_TOKENS = 8192  # of a pass without gradient, where no budget is set; SCORED_TOKENS on the engine
LATE_SCORED = 64  # the late trainer's local_rollout_forward_batch_size
DDP_BUCKET = 32 << 20


@dataclass(frozen=True)
class Job:
    """One run. sequences, mini_batch: of one process.   micro_tokens: packed tokens of a micro-batch; None: a mini-batch."""

    config: Any
    trainer: str = "classic"  # "classic" | "late"
    strategy: str = "ddp"  # "ddp" | "fsdp"
    processes: int = 1
    device: str = "cuda"  # "cuda" | "cpu"
    precision: str = "fp32"  # "fp32" | "bf16" (autocast over float32 weights) | "bf16-weights"
    lora_rank: int | None = None
    sequences: int = 64
    mini_batch: int = 16
    prompt_tokens: int = 256
    response_tokens: int = 256
    micro_tokens: int | None = None
    gradient_checkpointing: bool = False
    value_model: bool = False  # late: the value function has a backbone of its own
    epochs: int = 4
    other_bytes: int = 0  # a reward model and whatever else is on the device

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.response_tokens

    @property
    def sharded(self) -> bool:
        return self.strategy == "fsdp" and self.processes > 1

    @property
    def on_engine(self) -> bool:
        """Whether training runs on fastppo/engine, which keeps less than autograd."""
        known = self.config.model_type in ("gpt2", "llama", "mistral", "qwen2", "qwen3")
        plain = self.lora_rank is None and not self.sharded and self.precision != "bf16-weights"
        learns = self.trainer == "classic" or self.precision == "fp32"
        return self.device == "cpu" and known and plain and learns and not self.gradient_checkpointing

    @property
    def setting(self) -> Setting:
        half = self.precision == "bf16-weights" or (self.precision == "bf16" and self.sharded)
        return Setting(
            # FSDP2 gathers bfloat16 copies of float32 shards
            weights=torch.bfloat16 if half else torch.float32,
            autocast=self.precision == "bf16",
            lora_rank=self.lora_rank,
            lora_targets="all-linear" if self.trainer == "late" else None,
            gradient_checkpointing=self.gradient_checkpointing,
            late=self.trainer == "late",
        )


class Plan(NamedTuple):
    """Bytes of one process, by part. stages: "rollout", "scoring" and "training" -> part -> bytes."""

    always: dict[str, int]
    stages: dict[str, dict[str, int]]
    micro_tokens: int

    @property
    def totals(self) -> dict[str, int]:
        """stage -> what is held while it runs."""
        held = sum(self.always.values())
        return {stage: held + sum(parts.values()) for stage, parts in self.stages.items()}

    @property
    def peak(self) -> int:
        return max(self.totals.values())


class Planner:
    """Plans of one Job for several micro-batches; the model is run once."""

    def __init__(self, job: Job, memory: int):
        """memory: bytes of the device; a rollout's KV pages take half of what is free."""
        self.job, self.memory = job, memory
        self.counted: Counted = count(job.config, job.setting)

    def plan(self, micro_tokens: int | None = None) -> Plan:
        whole = self.job.mini_batch * self.job.length
        tokens = min(micro_tokens or self.job.micro_tokens or whole, whole)
        always = self._always()
        rollout = self._rollout(sum(always.values()))
        pages = rollout["KV pages"]
        stages = {
            "rollout": rollout,
            "scoring": self._scoring(tokens, pages),
            "training": self._training(tokens, pages),
        }
        return Plan(always, stages, tokens)

    def largest(self, room: int) -> Plan | None:
        """The plan with the largest micro-batch of whole sequences within `room` bytes; None: not even one fits."""
        low, high = 0, self.job.mini_batch
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.plan(middle * self.job.length).peak <= room
            low, high = (middle, high) if fits else (low, middle - 1)
        return self.plan(low * self.job.length) if low else None

    # --- sizes --------------------------------------------------------------------------------------------------------

    @cached_property
    def backbones(self) -> int:
        """Trained models of the policy's size."""
        return 2 if self.job.trainer == "late" and self.job.value_model else 1

    def _share(self, bytes: float) -> int:
        return int(-(-bytes // self.job.processes)) if self.job.sharded else int(bytes)

    @cached_property
    def width(self) -> int:
        """Bytes of a parameter as it is kept."""
        return 2 if self.job.precision == "bf16-weights" else 4

    @cached_property
    def gathered_width(self) -> int:
        """Bytes of a parameter as FSDP2 gathers it, and of an activation of the head."""
        return 4 if self.job.precision == "fp32" else 2

    def _held(self, trained: bool = False) -> int:
        """Bytes of the weights (trained: of those that are) as they are kept."""
        p = self.counted.parameters
        if self.job.setting.weights == torch.bfloat16 and self.width == 4:
            return 4 * (p.trained if trained else p.all)
        return p.trained_bytes if trained else p.bytes

    def _whole(self) -> int:
        return self.counted.parameters.all * self.gathered_width if self.job.sharded else 0

    # --- always -------------------------------------------------------------------------------------------------------

    def _always(self) -> dict[str, int]:
        job, held, trained = self.job, self._held(), self._held(trained=True)
        parts = {
            "weights": self._share(held * self.backbones),
            "reference": 0 if job.lora_rank is not None else self._share(held),
            "optimizer": self._share(2 * trained * self.backbones),
        }
        if job.other_bytes:
            parts["other"] = job.other_bytes
        return parts

    def _packed(self) -> int:
        """The CPU decode program's copies of the matrices and the head; autocast and FSDP2's modules go without it."""
        job, p = self.job, self.counted.parameters
        autocast = job.trainer == "late" and job.precision == "bf16"
        without = job.device != "cpu" or autocast or job.sharded
        return 0 if without else self.width * (p.matrices + p.head)

    def _waiting(self, pages: int) -> dict[str, int]:
        """What a CPU keeps of a rollout for training."""
        found = {"packed weights": self._packed(), "KV pages": pages if self.job.device == "cpu" else 0}
        return {name: x for name, x in found.items() if 0 < x <= OF_STAGE}

    # --- stages -------------------------------------------------------------------------------------------------------

    def _rollout(self, held: int) -> dict[str, int]:
        job, c = self.job, self.counted
        pages = job.sequences * -(-job.length // BLOCK) * BLOCK * c.kv_bytes
        together = min(MOST_DECODED, job.sequences)
        read = min(ROLLOUT_TOKENS[job.device], job.sequences * job.prompt_tokens)
        workspace = c.passes.rollout(read) if job.device == "cuda" else 0
        workspace += 4 * together * c.vocabulary * (3 if job.device == "cuda" else 1)  # logits, and the sampler's own
        parts = {"KV pages": min(pages, max(0, (self.memory - held - self._whole()) // 2)), "workspace": int(workspace)}
        parts |= {"packed weights": self._packed()} if self._packed() else {}
        return parts | ({"one model whole": self._whole()} if job.sharded else {})

    def _forward(self, tokens: int) -> float:
        """A pass without gradient."""
        if self.job.on_engine:
            c = self.counted
            return tokens * 4 * (6 * c.hidden + 2 * c.intermediate)
        return self.counted.passes.scoring(tokens)

    def _scoring(self, micro_tokens: int, pages: int) -> dict[str, int]:
        job, c = self.job, self.counted
        everything = job.sequences * job.length
        if job.trainer == "late":
            tokens = min(LATE_SCORED, job.sequences) * job.length
            tokens = min(tokens, max(SCORED_TOKENS, job.length)) if job.on_engine else tokens
        else:
            most = SCORED_TOKENS if job.on_engine else FORWARD_TOKENS
            tokens = min(micro_tokens if micro_tokens < job.mini_batch * job.length else most, everything)
        head = (
            min(TILE_BYTES[job.device], tokens * c.vocabulary * self.gathered_width)
            + tokens * c.hidden * self.gathered_width
        )
        parts = {"workspace": int(self._forward(tokens) + head)}
        return parts | self._waiting(pages) | ({"one model whole": self._whole()} if job.sharded else {})

    def _training(self, tokens: int, pages: int) -> dict[str, int]:
        job = self.job
        trained = self._held(trained=True) * self.backbones
        parts = {"gradients": self._share(trained)}
        if job.processes > 1 and not job.sharded:
            # the reducer's buckets; the classic trainer and the engine add up by themselves: on a CPU no page of them is touched
            touched = job.device == "cuda" or (job.trainer == "late" and not job.on_engine)
            parts["DDP buckets"] = trained if touched else min(DDP_BUCKET, trained)
        peak = int(self._most_in_training(tokens, parts["gradients"]))
        if job.sharded:
            parts["gathered layers"] = int(self._gathered())
        parts["activations and head"] = peak - parts["gradients"] - parts.get("gathered layers", 0)
        if job.on_engine:
            # what is larger than what takes its place
            kept = self._activations(tokens)[0]
            waiting = self._waiting(pages)
            spare = {"packed weights": parts["gradients"], "KV pages": kept}
            over = {name: int(x - spare[name]) for name, x in waiting.items() if x > spare[name]}
            if over.get("KV pages", 0) <= (SPARE - 1) * kept:
                parts |= over
        return parts

    def _most_in_training(self, tokens: int, gradients: int) -> float:
        """Gradients, activations, head and gathered layers, when most of them are there."""
        job = self.job
        kept, backward, head = self._activations(tokens)
        # at its end backward holds the whole gradients of what is gathered, before they are shared out
        first, last = self._gathered(), 2 * self._gathered()
        # the head's memory is used again by the next micro-batch: it stays
        if job.on_engine or tokens < job.mini_batch * job.length:
            return gradients + head + max(kept + first, backward + last)
        # one micro-batch per optimizer step: gradients come as activations go
        return head + max(kept + first, gradients + last) + backward - kept

    def _gathered(self) -> float:
        """FSDP2: the root's own parameters and two layers."""
        p = self.counted.parameters
        return self.gathered_width * (p.outside + 2 * p.layer) * self.backbones if self.job.sharded else 0

    def _activations(self, tokens: int) -> tuple[float, float, float]:
        """Of a micro-batch: kept for backward, most in backward, and the head's between its forward and its backward."""
        job, c = self.job, self.counted
        answers = tokens * job.response_tokens / job.length
        logits = answers * c.vocabulary * self.gathered_width
        chunk = min(CHUNK_BYTES[job.device, self.gathered_width], logits)
        head = chunk + 2 * answers * c.hidden * self.gathered_width
        if job.on_engine:
            kept, transient = self._engine(tokens)
            return kept, kept + transient, head
        if job.lora_rank is None:
            head += c.parameters.head * (4 if logits > chunk else self.gathered_width)
        return c.passes.kept(tokens) * self.backbones, c.passes.backward(tokens) * self.backbones, head

    def _engine(self, tokens: int) -> tuple[float, float]:
        """fastppo/engine: its tape (both residual streams, q k v, attention's output, the MLP before its activation), and
        what a block's backward holds beside it."""
        c, item = self.counted, self.gathered_width
        keys_values = c.kv_bytes / c.layers * item / self.width
        gated = 1 if self.job.config.model_type == "gpt2" else 2
        layer = 8 * c.hidden + 2 * item * c.hidden + keys_values + gated * c.intermediate * item
        transient = item * ((2 + gated) * c.intermediate + 4 * c.hidden) + 4 * c.hidden
        return tokens * c.layers * layer, tokens * transient
