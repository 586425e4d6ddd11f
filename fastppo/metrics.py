"""Statistics of one PPO step, under the names that TRL's users plot.

    objective/  the rollout: KL, entropy, coefficient        ppo/     scores and what the mini-batches reported
    tokens/     lengths                                      time/    seconds per stage
    fastppo/    ours: tokens per second, padding saved, mismatch, peak memory, MFU

Suffixes: B sequences, T predicted positions.
"""

import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fastppo.core import masked_mean


class Clock:
    """Seconds per named stage. On a GPU a stage ends when its kernels have."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._start = self._now()
        self.seconds: dict[str, float] = {}

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def stage(self, name: str):
        start = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def timing(self) -> dict[str, float]:
        """time/ppo/<stage> and time/ppo/total, in seconds."""
        return {f"time/ppo/{name}": s for name, s in self.seconds.items()} | {
            "time/ppo/total": self._now() - self._start
        }


@dataclass
class Generated:
    """Response tokens and seconds of generate() since the last step()."""

    tokens: int = 0
    seconds: float = 0.0

    @contextmanager
    def timed(self, device: torch.device):
        clock = Clock(device)
        with clock.stage("generate"):
            yield
        self.seconds += clock.seconds["generate"]

    def stats(self) -> dict[str, float]:
        return {"fastppo/generate_tokens_per_s": self.tokens / self.seconds} if self.tokens else {}


def objective_stats(kl_coef: float, masks, kls, logprobs, ref_logprobs, non_score_reward, scores) -> dict:
    """What the batch looked like before the update: KL summed over each response, entropy estimated by -log-prob."""
    kl_B = (kls * masks).sum(-1)
    if float(kl_B.mean()) < -1.0:
        warnings.warn(
            f"KL divergence is starting to become negative: {float(kl_B.mean()):.2f} - this might be a precursor for failed "
            "training. Sampling that isn't from the policy itself (top_k, top_p, temperature, min_length) does this.",
            stacklevel=4,
        )
    return {
        "objective/kl": kl_B.mean(),
        "objective/kl_dist": kl_B,
        "objective/logprobs": logprobs,
        "objective/ref_logprobs": ref_logprobs,
        "objective/kl_coef": kl_coef,
        "objective/entropy": (-logprobs * masks).sum(-1).mean(),
        "ppo/mean_non_score_reward": masked_mean(non_score_reward, masks),
        "ppo/mean_scores": scores.mean(),
        "ppo/std_scores": std(scores),
    }


def std(values_B: torch.Tensor) -> torch.Tensor:
    """Unbiased; nan for one value, without torch's warning."""
    return values_B.std() if len(values_B) > 1 else values_B.new_tensor(float("nan"))


def length_stats(queries, responses) -> dict[str, torch.Tensor]:
    stats = {}
    for name, sequences in (("queries", queries), ("responses", responses)):
        lengths_B = torch.tensor([len(ids) for ids in sequences], dtype=torch.float32)
        stats[f"tokens/{name}_len_mean"] = lengths_B.mean()
        stats[f"tokens/{name}_len_std"] = std(lengths_B)
        stats[f"tokens/{name}_dist"] = lengths_B
    return stats


def flat_train_stats(stacked: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """stack_dicts' [mini-batches, ...] tensors, with the two per-token arrays as one row."""
    for key in ("policy/advantages", "policy/ratio"):
        stacked[key] = torch.nan_to_num(stacked[key].flatten()[None], -1)
    return stacked


def peak_memory_bytes(device: torch.device) -> int:
    """Highest allocation so far: of the device, or on a CPU the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def throughput(batch, clock: Clock, ppo_epochs: int, device: torch.device) -> dict[str, float]:
    """fastppo/: tokens (query + response) per second by phase, share of padding a padded batch would have, peak memory."""
    lengths = [len(q) + len(r) for q, r in zip(batch.queries, batch.responses, strict=True)]
    tokens = sum(lengths)
    seconds = clock.seconds
    return {
        "fastppo/tokens": float(tokens),
        "fastppo/padding_saved": 1 - tokens / (max(lengths) * len(lengths)),
        "fastppo/prepare_tokens_per_s": tokens / max(seconds["forward_pass"], 1e-9),
        "fastppo/optimise_tokens_per_s": tokens * ppo_epochs / max(seconds["optimize_step"], 1e-9),
        "fastppo/peak_memory_bytes": float(peak_memory_bytes(device)),
    }
