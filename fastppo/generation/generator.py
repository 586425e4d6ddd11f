"""Prompts in, Rollout out: `Generator(model, tokenizer).generate(prompts, max_new_tokens=64, do_sample=True)`."""

import contextlib
import logging
from collections.abc import Iterator

import torch
from torch import nn

from fastppo import attention
from fastppo.attention.paged import KVCache
from fastppo.data import Rollout
from fastppo.generation import fallback
from fastppo.generation.arguments import check_arguments, limits_of
from fastppo.generation.block_manager import BlockManager
from fastppo.generation.cuda_graphs import DecodeGraphs
from fastppo.generation.fast_path import program_for
from fastppo.generation.loop import Loop, Record
from fastppo.generation.memory import free_memory
from fastppo.generation.model_runner import ModelRunner
from fastppo.generation.params import GenerationParams, resolve
from fastppo.generation.probe import probe
from fastppo.generation.prompts import check_positions, checked, new_token_limits, refuse_prompt_learning
from fastppo.generation.sampler import Sampler
from fastppo.generation.scheduler import Scheduler
from fastppo.generation.sequence import Sequence, group_equal_prompts
from fastppo.generation.stopping import Stopping
from fastppo.wanted import is_flag, is_whole, want

log = logging.getLogger(__name__)
_MASK64 = (1 << 64) - 1


class Generator:
    """Rolls out a causal language model with its own parameters: no copy, no second engine.

    model: a transformers causal LM, or one inside PEFT, value-head (`.pretrained_model`, `.v_head`) or DDP wrappers.
    block_size: tokens per KV page.   max_num_seqs: most sequences decoded together.   max_num_batched_tokens: most prompt
    tokens read in one forward pass (None: 1,024 on a CPU, 8,192 on a GPU).   decode_weights: torch.bfloat16 halves what a
    decode step on a CPU reads, weights and KV pages; None keeps the model's dtype.   num_blocks / kv_cache_bytes: size of the KV cache; None takes what the call can
    use, at most half of the free memory.   share_prefixes: equal beginnings of prompts are computed once.   cuda_graphs: replay decode steps
    on a GPU as CUDA graphs (where a capture fails, that is logged once); False launches each operation.
    batch_invariant: bitwise the same numbers whatever these sizes are: without a traced program, one sequence at a time.
    A model outside transformers' attention interface, and an argument that needs it (beams, assisted generation), goes
    to `model.generate`; that is logged once.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer=None,
        *,
        block_size: int = 16,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int | None = None,
        decode_weights: torch.dtype | None = None,
        num_blocks: int | None = None,
        kv_cache_bytes: int | None = None,
        share_prefixes: bool = True,
        cuda_graphs: bool = True,
        batch_invariant: bool = False,
    ):
        sizes = {"block_size": block_size, "max_num_seqs": max_num_seqs, "num_blocks": num_blocks}
        sizes |= {"max_num_batched_tokens": max_num_batched_tokens, "kv_cache_bytes": kv_cache_bytes}
        for name, x in sizes.items():
            want(x is None or is_whole(x, 1), "Generator", name, "a positive int", x)
        flags = {"share_prefixes": share_prefixes, "cuda_graphs": cuda_graphs, "batch_invariant": batch_invariant}
        for name, x in flags.items():
            want(is_flag(x), "Generator", name, "True or False", x)
        good = isinstance(model, nn.Module) and hasattr(attention.unwrap(model), "generation_config")
        want(good, "Generator", "model", "a transformers language model (from_pretrained loads one)", model)
        good = tokenizer is None or hasattr(tokenizer, "decode")
        want(good, "Generator", "tokenizer", "None or a transformers tokenizer", tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.block_size, self.share_prefixes = block_size, share_prefixes and not batch_invariant
        self.batch_invariant = batch_invariant
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.num_blocks, self.kv_cache_bytes = num_blocks, kv_cache_bytes
        if decode_weights not in (None, torch.bfloat16):
            raise ValueError(f"Generator: decode_weights must be None or torch.bfloat16; got {decode_weights!r}")
        self.decode_weights = decode_weights
        self.cuda_graphs = cuda_graphs
        self.graphs: DecodeGraphs | None = None  # made by the first rollout on a GPU
        self.block_manager: BlockManager | None = None  # of the last rollout: every page is free after it
        self.num_preemptions = 0  # of the last rollout
        self._layers = None
        self._said: set[str] = set()

    def generate(
        self,
        prompts: list[torch.Tensor],
        *,
        seed: int | None = None,
        logprob_temperature: float = 1.0,
        first_prompt: int = 0,
        **generation_kwargs,
    ) -> Rollout:
        """Responses for B prompts (1-D int64, any lengths), num_return_sequences each, in order.

        generation_kwargs: what `model.generate` takes; max_new_tokens may also be a list with one number per prompt.
        seed: None draws one from torch's default generator, so `set_seed` reproduces. A response depends on the seed,
        its index and its prompt, not on the rest of the batch.   logprob_temperature: divides the logits in
        `logprobs_BT` and `entropies_BT` (the policy that PPO trains).   first_prompt: index of the first prompt, where these
        are a part of a larger batch.
        Raises ValueError for a prompt-learning adapter, an empty or malformed prompt, an unknown argument (naming the nearest), one of
        the wrong kind, a length beyond the model's positions, or a KV cache that can't hold one sequence.
        """
        refuse_prompt_learning(self.model)
        inner = attention.unwrap(self.model)
        own = {"seed": seed, "first_prompt": first_prompt, "logprob_temperature": logprob_temperature}
        check_arguments(generation_kwargs | own)
        limits = limits_of(generation_kwargs.get("max_new_tokens"))
        if limits is not None:
            generation_kwargs["max_new_tokens"] = max(limits) if isinstance(limits, list) else limits
        params = resolve(inner, self.tokenizer, generation_kwargs, logprob_temperature)
        prompts = checked(prompts, inner)
        n = params.num_return_sequences
        limits = new_token_limits(prompts, params, limits if isinstance(limits, list) else None)
        seed = int(torch.randint(2**62, ()) if seed is None else seed)
        with _eval_mode(self.model), torch.no_grad():
            if self._layers is None and not params.slow:
                self._layers = probe(inner)
            why = params.slow or (self._layers if isinstance(self._layers, str) else None)
            if why is not None and self.batch_invariant:
                raise ValueError(
                    f"generate: deterministic=True can't be kept with model.generate, which is needed because {why}"
                )
            if why is not None:
                self._say(why)
                return fallback.generate(
                    inner, self.model, prompts, params, [x for x in limits for _ in range(n)], seed + first_prompt
                )
            check_positions(inner, prompts, limits)
            rows = [(p.tolist(), limit) for p, limit in zip(prompts, limits, strict=True) for _ in range(n)]
            seeds = [_sequence_seed(seed, first_prompt * n + i) for i in range(len(rows))]
            groups = group_equal_prompts([r[0] for r in rows], [r[1] for r in rows], seeds)
            if not self.share_prefixes:
                groups = [part for group in groups for part in group.split(1)]
            with attention.install(inner):
                return self._roll_out(inner, [p for p in prompts for _ in range(n)], groups, params)

    def _say(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            log.warning("generate: using model.generate because %s", why)

    def _roll_out(self, model, prompts, groups: list[Sequence], params: GenerationParams) -> Rollout:
        self.block_manager = BlockManager(self._num_blocks(groups), self.block_size, self.share_prefixes)
        runner = ModelRunner(
            model, getattr(self.model, "v_head", None), self._layers, self.block_manager.num_blocks, self.block_size
        )
        runner.program = program_for(runner, self.decode_weights)
        budget = self.max_num_batched_tokens or (1024 if runner.device.type == "cpu" else 8192)
        most = self.max_num_seqs
        if self.batch_invariant and runner.program is None:
            # the program computes each row by itself, in one order; torch's products depend on how many there are
            most, budget = 1, sum(len(prompt) for prompt in prompts)
        scheduler = Scheduler(self.block_manager, most, budget)
        record = Record(len(prompts), params.pad)
        sampler, stopping = Sampler(params, model, runner.device), Stopping(params, runner.device)
        loop = Loop(scheduler, runner, sampler, stopping, record)
        if self.graphs is None and runner.device.type == "cuda":
            self.graphs = DecodeGraphs(runner.device, self.cuda_graphs)
        try:
            for group in groups:
                scheduler.add(group)
            if runner.program is None and self.graphs is not None and sampler.is_plain:
                runner.use_graphs(self.graphs, sampler.options, stopping.eos)
            while not scheduler.is_finished:
                loop.step()
            return record.rollout(prompts)
        finally:
            scheduler.abort()
            if runner.program is not None:
                runner.program.close()
            if runner.graphs is not None:
                runner.graphs.end()
            self.num_preemptions = scheduler.num_preemptions

    def _num_blocks(self, groups: list[Sequence]) -> int:
        """Pages that all sequences of the call could use together, within the budget."""
        if self.num_blocks is not None:
            return self.num_blocks
        wanted = sum(-(-(seq.prompt_length + limit) // self.block_size) for seq in groups for limit in seq.limits)
        budget = self.kv_cache_bytes
        if budget is None:
            budget = free_memory(attention.unwrap(self.model).get_input_embeddings().weight.device) // 2
        return max(1, min(wanted, budget // KVCache.block_bytes(self._layers, self.block_size)))


def _sequence_seed(seed: int, index: int) -> int:
    """A well-mixed int64 from (seed, index): splitmix64 (Steele et al., OOPSLA 2014)."""
    x = (seed * 0x9E3779B97F4A7C15 + (index + 1) * 0xD1342543DE82EF95) & _MASK64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) & _MASK64
    return (x ^ (x >> 31)) >> 1


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off inside; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
