"""Where a step of `fastppo sft | reward | ppo` spends its time, under the names that `fastppo train` writes."""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from fastppo.metrics import peak_memory_bytes


class Phases:
    """Seconds of the current step, peak memory, and with the late PPOTrainer seconds of `rollout` and `judge` and response
    lengths. Those two methods are wrapped, on this trainer alone."""

    def __init__(self, trainer: Any):
        self.device = trainer.accelerator.device
        self.is_ppo = hasattr(trainer, "rollout") and hasattr(trainer, "judge")
        if self.is_ppo:
            trainer.rollout = self.timed("generate", trainer.rollout)
            trainer.judge = self.timed("reward", trainer.judge)
        self.start()

    def start(self) -> None:
        """A step begins."""
        self.began, self.seconds, self.lengths = self.now(), {}, []

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a phase ends when its kernels have
        return time.perf_counter()

    def timed(self, phase: str, method: Callable) -> Callable:
        @functools.wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            began = self.now()
            result = method(*args, **kwargs)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + self.now() - began
            if phase == "generate":
                self.lengths += result.mask_BT.sum(1).tolist()
            return result

        return run

    def figures(self) -> dict[str, float]:
        """What to log of the step so far: seconds, response tokens per second of this process, bytes."""
        total = self.now() - self.began
        told = {"time/loop/step": total, "fastppo/peak_memory_bytes": float(peak_memory_bytes(self.device))}
        if not (self.is_ppo and self.lengths):
            return told
        parts = {f"time/loop/{phase}": self.seconds.get(phase, 0.0) for phase in ("generate", "reward")}
        told |= parts | {"time/loop/step": total - sum(parts.values())}
        told["tokens/responses_len_mean"] = sum(self.lengths) / len(self.lengths)
        told["perf/response_tokens_per_second"] = sum(self.lengths) / max(total, 1e-9)
        return told
