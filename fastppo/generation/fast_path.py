"""Decide whether a rollout runs on a DecodeProgram (on a CPU) or on the model's own modules, and check the first against the
second before it is used: the weights' places, the adapters or the model's code may have changed since it was traced.

While nothing of that changes (model_state.py), the check of five tokens is made every CHECK_EVERY rollouts: it costs as much
as four decode steps.
"""

import logging
import os
import weakref

import torch

from fastppo.attention.layout import Packed
from fastppo.attention.paged import PagedPrefill
from fastppo.generation.decode_program import DecodeProgram
from fastppo.generation.model_runner import ModelRunner
from fastppo.generation.model_state import model_state
from fastppo.generation.row_program import Program, Untraceable
from fastppo.generation.trace import refuse_state, trace
from fastppo.kernels import _backend, _recycle

log = logging.getLogger(__name__)
CHECK_EVERY = 16
# model -> which adapters are on -> its traced form, or why there is none
_TRACES: "weakref.WeakKeyDictionary[torch.nn.Module, dict]" = weakref.WeakKeyDictionary()


def program_for(runner: ModelRunner, weights: torch.dtype | None) -> DecodeProgram | None:
    """A checked program with this rollout's weights, or None."""
    if runner.device.type != "cpu" or runner.model.dtype == torch.float16:
        return None
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != weights:
        return None  # the model's own modules multiply in autocast's type, the program in the weights'
    if _backend.missing("cpu", runner.device) or os.environ.get("FASTPPO_BACKEND", "cpu") != "cpu":
        return None
    programs, key = _TRACES.setdefault(runner.model, {}), _adapters(runner.model)
    try:
        refuse_state(runner.model)
        state = model_state(runner.model), weights
        for fresh in (False, True):
            if fresh or key not in programs:
                programs[key] = _trace(runner.model)
            if isinstance(programs[key], str):
                return None
            if weights is not None and not fresh:
                runner.keep_pages_in(weights)
            program = DecodeProgram(programs[key], runner.cache, weights or runner.model.dtype)
            if programs[key].is_checked(state, CHECK_EVERY):
                return program
            if (error := _error(runner, program)) is None:
                programs[key].checked(state)
                return program
        log.warning("generate: decoding through %s itself: its traced form %s", type(runner.model).__name__, error)
    except Untraceable as reason:
        log.info("generate: decoding through %s itself: %s", type(runner.model).__name__, reason)
    return None


def give_back(model: torch.nn.Module) -> None:
    """Free what waits for `model`'s next rollout, where the engine, which would use it in between, does not train it."""
    for program in _TRACES.get(model, {}).values():
        if isinstance(program, Program):
            program.workspace = None
    for slot in (_recycle.WEIGHTS_OR_GRADIENTS, _recycle.PAGES_OR_ACTIVATIONS):
        _recycle.release(slot)


def _trace(model) -> Program | str:
    try:
        return trace(model)
    except Untraceable as reason:
        log.info("generate: decoding through %s itself: %s", type(model).__name__, reason)
        return str(reason)


def _adapters(model) -> tuple:
    """What switches the graph: PEFT's state of each adapted layer."""
    layers = (m for m in model.modules() if hasattr(m, "merged") and hasattr(m, "disable_adapters"))
    return tuple((m.disable_adapters, m.merged, tuple(m.active_adapters)) for m in layers)


def _error(runner: ModelRunner, program: DecodeProgram) -> str | None:
    """Run a few tokens both ways, in a page that nobody has yet."""
    n = min(runner.block_size, 5)
    tokens_N = torch.arange(1, n + 1) * 7919 % runner.model.get_input_embeddings().weight.shape[0]
    positions_N = torch.arange(n)
    packed = Packed(torch.tensor([0, n], dtype=torch.int32), n, [n])
    tables_BM, lens_B = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([n], dtype=torch.int32)
    layout = PagedPrefill(runner.cache, packed, positions_N, tables_BM, lens_B, False)
    wanted = runner.run_model(tokens_N, positions_N, layout, None)
    logits_NV, _ = program.forward(tokens_N, positions_N, layout, None)
    error, spread = (logits_NV - wanted.logits_BV.float()).abs().max().item(), wanted.logits_BV.float().std().item()
    exact = program.weights == torch.float32
    if error <= (2e-3 if exact else 0.25) * spread + 1e-4:
        return None
    return f"differs by {error:.2g} (spread of the logits {spread:.2g})"
