"""Tokens per second, MFU, peak memory and padding saved, each against a computation of its own, and what the terminal shows."""

import itertools
import os
import re
from pathlib import Path

import golden_cases
import pytest
import torch
from late_cases import trainer as late_trainer
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

import fastppo
from fastppo import flops, metrics
from fastppo.cli.loop import Step
from fastppo.cli.screen import Screen, speed

QUERIES, RESPONSES = [3, 5, 2, 4], [6, 2, 9, 1]  # tokens
RATE = 1e9


def classic(monkeypatch, **options):
    """(trainer, statistics of a step on sequences of those lengths, where the machine multiplies RATE times a second)."""
    monkeypatch.setattr(flops, "matmul_flops_per_s", lambda *_: RATE)
    made = golden_cases.trainer(fastppo, {"model": "llama"}, **options)
    draw = torch.Generator().manual_seed(0)
    tokens = [[torch.randint(3, 96, (n,), generator=draw) for n in lengths] for lengths in (QUERIES, RESPONSES)]
    return made, made.step(*tokens, [torch.tensor(float(i)) for i in range(4)])


def counted_flops(model, queries: list[int], responses: list[int], labels: int | None = None) -> float:
    """Of the products that one forward over the batch needs: counted by PyTorch, less what no response token needs."""
    model.set_attn_implementation("eager")  # bmm, so that it is counted
    layers, V = model.model.layers, labels or model.config.vocab_size
    last = [layers[-1].self_attn.o_proj, *(getattr(layers[-1].mlp, n) for n in ("gate_proj", "up_proj", "down_proj"))]
    past_attention = 2 * sum(x.weight.numel() for x in last)
    total = 0.0
    for query, response in zip(queries, responses, strict=True):
        n = query + response
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.arange(n)[None], use_cache=False)
        by_op = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
        # attention sees what lies before a token, half of the square
        heads = 2 * 2 * 2 * n * n * 32
        assert by_op["aten.bmm"] >= heads
        total += sum(by_op.values()) - by_op["aten.bmm"] + heads * (n + 1) / (2 * n)
        total -= (n - response) * (past_attention + 2 * V * 32)
    return total


@pytest.mark.parametrize("packed", [True, False])
def test_statistics_of_the_classic_trainer(monkeypatch, packed):
    made, stats = classic(monkeypatch, packed=packed)
    tokens, longest = sum(QUERIES) + sum(RESPONSES), 11
    assert stats["fastppo/tokens"] == tokens == 32
    assert stats["fastppo/padding_saved"] == pytest.approx(1 - 32 / (4 * longest))
    prepare, optimise = (stats[f"time/ppo/{stage}"] for stage in ("forward_pass", "optimize_step"))
    assert stats["fastppo/prepare_tokens_per_s"] == pytest.approx(tokens / prepare)
    assert stats["fastppo/optimise_tokens_per_s"] == pytest.approx(tokens * made.config.ppo_epochs / optimise)
    if packed:
        needed = counted_flops(made.model.pretrained_model, QUERIES, RESPONSES)
        assert stats["fastppo/prepare_mfu"] * prepare * RATE == pytest.approx(2 * needed, rel=1e-6)
        epochs = made.config.ppo_epochs
        assert stats["fastppo/optimise_mfu"] * optimise * RATE == pytest.approx(3 * epochs * needed, rel=1e-6)


def test_peak_memory_is_the_kernels(monkeypatch):
    """Linux's own figure for this process, which only grows."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc here")

    def peak() -> float:
        return 1024 * float(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])

    before = peak()
    _, stats = classic(monkeypatch)
    # the kernel adds a thread's pages to the total in batches
    assert 0.98 * before <= stats["fastppo/peak_memory_bytes"] <= 1.02 * peak()


@pytest.mark.parametrize("value", [True, False], ids=["two_backbones", "value_head"])
def test_metrics_of_the_late_trainer(tmp_path, monkeypatch, value):
    monkeypatch.setattr(flops, "matmul_flops_per_s", lambda *_: RATE)
    ticks = itertools.count(0.0, 2.0)
    monkeypatch.setattr(metrics.Clock, "_now", lambda self: next(ticks))  # s
    seen = []
    run = late_trainer(tmp_path, value=value, total_episodes=8, stop_token="eos")
    rollout = run.rollout
    run.rollout = lambda *args: seen.append(rollout(*args)) or seen[-1]
    run.train()
    logs, ((made),) = run.state.log_history[0], seen
    lengths = [len(q) + len(r) for q, r in zip(made.prompts, made.responses, strict=True)]
    assert len(set(lengths)) > 1 and logs["fastppo/tokens"] == sum(lengths)
    assert logs["fastppo/padding_saved"] == pytest.approx(1 - sum(lengths) / (max(lengths) * len(lengths)))
    for phase in ("generate", "prepare", "optimise"):
        assert logs[f"fastppo/{phase}_tokens_per_s"] > 0
    assert logs["fastppo/peak_memory_bytes"] > 2**24
    parts = [[len(x) for x in parts] for parts in (made.prompts, made.responses)]
    policy = counted_flops(run.policy_model, *parts)
    reads = counted_flops(run.value_model, *parts, 1) if value else 0.0
    # each stage took 2 s; the rollout's own log-probs, and with one backbone its values
    assert logs["fastppo/prepare_mfu"] * 2 * RATE == pytest.approx(policy + reads, rel=1e-6)
    assert logs["fastppo/optimise_mfu"] * 2 * RATE == pytest.approx(3 * 4 * (policy + reads), rel=1e-6)
    assert logs["fastppo/matmul_flops_per_s"] == RATE


METRICS = {
    "fastppo/generate_tokens_per_s": 12345.6,
    "fastppo/prepare_tokens_per_s": 9876.0,
    "fastppo/optimise_tokens_per_s": 4321.0,
    "fastppo/optimise_mfu": 0.625,
    "fastppo/peak_memory_bytes": 1.5 * 2**30,
    "fastppo/padding_saved": 0.31,
}
TOLD = "generate 12,346 tok/s · prepare 9,876 tok/s · optimise 4,321 tok/s · MFU 62% · peak memory 1.50 GiB · padding saved 31%"


@pytest.mark.parametrize("terminal", [True, False])
def test_the_terminal_shows_them(terminal):
    assert speed(METRICS) == TOLD and speed({}) == ""
    console = Console(record=True, force_terminal=terminal, width=140, file=open(os.devnull, "w"))  # noqa: SIM115
    screen = Screen(3, "paper", console)
    for number in (1, 2, 3):
        screen.step(Step(number, METRICS | {"env/reward_mean": 1.0}, []))
    if terminal:
        console.print(screen.view())
    # a file gets them with the first step and the last
    assert console.export_text().replace("\u00a0", " ").count(TOLD) == (1 if terminal else 2)
