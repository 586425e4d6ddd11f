"""Rollouts from the policy's own weights: paged KV cache, continuous batching, log-probs and values for free.

One noun per file: params (what the caller asked for) -> sequence -> block_manager -> scheduler -> model_runner ->
sampler -> generator; fallback is `model.generate` for what none of these do.
"""

from fastppo.generation.generator import Generator

__all__ = ["Generator"]
