"""The rollout's loop: schedule, run, sample, stop; and the record of what was sampled."""

from collections.abc import Callable

import torch

from fastppo.data import Rollout
from fastppo.generation.decode_program import Drawn
from fastppo.generation.model_runner import DecodeState, ModelRunner, Output
from fastppo.generation.sampler import Sampler
from fastppo.generation.scheduler import Prefill, Scheduler
from fastppo.generation.sequence import Sequence
from fastppo.generation.stopping import Stopping
from fastppo.kernels.sampling import Sample, raise_on_bad_rows

STEPS_AT_ONCE = 16  # decode steps of one call into C++ or of CUDA graphs; an interrupt waits for as many


class Loop:
    """One step after the other: schedule, run, sample, stop."""

    def __init__(
        self, scheduler: Scheduler, runner: ModelRunner, sampler: Sampler, stopping: Stopping, record: "Record"
    ):
        self.scheduler, self.runner, self.sampler, self.stopping = scheduler, runner, sampler, stopping
        self.record = record
        self._is_plain = sampler.is_plain and stopping.is_plain
        self._state: DecodeState | None = None
        self._drawn_B: torch.Tensor | None = None

    def step(self) -> None:
        step = self.scheduler.schedule()
        if isinstance(step, Prefill):
            output = self.runner.prefill(step.chunks)
            ends = [chunk.seq for chunk in step.chunks if chunk.is_last]
            repeats = [len(seq.rows) for seq in ends]
            seqs = self.scheduler.prefilled(step)
            if seqs:
                self._sample(seqs, _repeat(output, repeats))
            return
        self.runner.cache.copy_blocks(step.copies)
        fast = self._is_plain and self.runner.decodes_several
        steps = self.scheduler.reserve(step.seqs, STEPS_AT_ONCE) if fast else 1
        if steps > 1:
            self._decode_several(step.seqs, steps)
            return
        if step.changed or step.copies or self._state is None:
            self._state = self.runner.state(step.seqs)
        else:
            self._state = self.runner.advance(self._state, self._drawn_B)
        self._sample(step.seqs, self.runner.decode(self._state), self._state)

    def _decode_several(self, seqs: list[Sequence], steps: int) -> None:
        """Decode, sample and stop without Python in between."""
        self._state = None
        others_wait = bool(self.scheduler.waiting)
        drawn = self.runner.decode_steps(seqs, steps, self.sampler.options, self.stopping.eos, others_wait)
        counts, tokens_SB = drawn.counts_B.tolist(), drawn.tokens_SB.cpu()  # from a GPU once, not for each question
        if int(tokens_SB.min()) < 0:
            last = max(counts) - 1
            raise_on_bad_rows(Sample(tokens_SB[last], *drawn.numbers_3SB[:, last].cpu()))
        self.record.add_steps(seqs, drawn, self.runner.values)
        tokens = [column[:n] for column, n in zip(tokens_SB.T.tolist(), counts, strict=True)]
        reasons = [self.stopping.reason(seq, new) for seq, new in zip(seqs, tokens, strict=True)]
        self._finish(seqs, reasons)
        self.scheduler.extend(seqs, tokens, reasons)

    def _finish(self, seqs: list[Sequence], reasons: list[str | None]) -> None:
        for seq, reason in zip(seqs, reasons, strict=True):
            if reason is not None:
                self.record.finish_reasons[seq.row] = reason

    def _sample(self, seqs: list[Sequence], output: Output, state: DecodeState | None = None) -> None:
        state = state or self.runner.state(seqs)
        drawn = self.sampler(output.logits_BV, seqs, state.seeds_B, state.positions_B + 1)
        self._drawn_B = drawn.tokens_B
        tokens = drawn.tokens_B.tolist()
        if min(tokens) < 0:
            raise_on_bad_rows(drawn)
        reasons = self.stopping(seqs, tokens, output.logits_BV)
        self.record.add(seqs, drawn, output.values_B)
        self._finish(seqs, reasons)
        self.scheduler.append(seqs, tokens, reasons)


class Record:
    """What was sampled, step by step; one scatter at the end makes the Rollout."""

    def __init__(self, B: int, pad: int):
        self.finish_reasons = ["length"] * B
        self._pad = pad
        self._rows: list[int] = []
        self._columns: list[int] = []
        self._steps: list[tuple[torch.Tensor, ...]] = []

    def add(self, seqs: list[Sequence], drawn, values_B: torch.Tensor | None) -> None:
        self._rows += [seq.row for seq in seqs]
        self._columns += [seq.num_new for seq in seqs]
        numbers = (drawn.tokens_B, drawn.logprob_B, drawn.sampled_logprob_B, drawn.entropy_B)
        self._steps.append(numbers if values_B is None else (*numbers, values_B))

    def add_steps(self, seqs: list[Sequence], drawn: Drawn, values: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """`values` of hidden states, used when they were kept."""
        made_SB = torch.arange(len(drawn.tokens_SB))[:, None] < drawn.counts_B
        first_B = torch.tensor([seq.num_new for seq in seqs])
        self._rows += torch.tensor([seq.row for seq in seqs]).expand(made_SB.shape)[made_SB].tolist()
        self._columns += (first_B + torch.arange(len(made_SB))[:, None])[made_SB].tolist()
        sampled_SB, logprob_SB, entropy_SB = drawn.numbers_3SB
        numbers = tuple(x[made_SB] for x in (drawn.tokens_SB, logprob_SB, sampled_SB, entropy_SB))
        hidden = drawn.hidden_SBD
        self._steps.append(numbers if hidden is None else (*numbers, values(hidden[made_SB])))

    def rollout(self, prompts: list[torch.Tensor]) -> Rollout:
        device = self._steps[0][0].device
        index = torch.tensor(self._rows, device=device), torch.tensor(self._columns, device=device)
        shape = len(prompts), max(self._columns) + 1
        columns = []
        for numbers in zip(*self._steps, strict=True):
            flat = torch.cat(numbers)
            out = flat.new_full(shape, self._pad if flat.dtype == torch.int64 else 0)
            columns.append(out.index_put_(index, flat))
        tokens, logprobs, sampled, entropies, *values = columns
        mask = torch.zeros(shape, dtype=torch.bool, device=device).index_put_(index, torch.tensor(True, device=device))
        return Rollout(
            prompts, tokens, mask, logprobs, sampled, values[0] if values else None, entropies, self.finish_reasons
        )


def _repeat(output: Output, repeats: list[int]) -> Output:
    """A row for each response of each prompt."""
    if all(n == 1 for n in repeats):
        return output
    index = torch.repeat_interleave(torch.tensor(repeats)).to(output.logits_BV.device)
    return Output(*(x if x is None else x[index] for x in output))
