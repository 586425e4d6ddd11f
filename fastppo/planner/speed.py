"""Seconds of a PPO step from what a device was measured to do: its matrix products and its memory.

    prefill, scoring, training   FLOPs / matmul rate          decode   max(bytes read / bandwidth, FLOPs / matmul rate)
    optimizer                    bytes / bandwidth

Communication, waiting, the reward and kernels below the two rates are not in it: an upper bound of tokens/s, or with
`mfu` (what a run's statistics call fastppo/optimise_mfu) what training reaches. Rates are given or read, never assumed.
"""

import csv
from pathlib import Path
from typing import NamedTuple

from fastppo.planner.memory import MOST_DECODED, Job
from fastppo.planner.passes import Counted


class Rates(NamedTuple):
    """matmul_tflops: of torch's matrix product in the compute dtype. bandwidth_gbs: of reading memory. source: in words."""

    matmul_tflops: float
    bandwidth_gbs: float
    source: str


class NoRates(ValueError):
    """Nothing was measured on such a device; the message says what to do."""


def read_rates(place: Path, device: str, dtype: str) -> Rates:
    """The newest matmul_tflops (of `dtype`) and bandwidth_gbs of a device whose name contains `device`, from bench rows.

    place: a CSV file that bench/ wrote, or a folder of them. Raises NoRates.
    """
    files = sorted(place.glob("*.csv")) if place.is_dir() else [place]
    found: dict[str, tuple[str, float, str]] = {}
    names = set()
    for file in files:
        with file.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                names.add(row.get("device") or "")
                if device.lower() not in (row.get("device") or "").lower():
                    continue
                for column in ("matmul_tflops", "bandwidth_gbs"):
                    fits = column == "bandwidth_gbs" or row.get("dtype") == dtype
                    if row.get(column) and fits and row["date"] >= found.get(column, ("",))[0]:
                        found[column] = (
                            row["date"],
                            float(row[column]),
                            f"{file.name} of {row['date']}, {row['device']}",
                        )
    missing = {"matmul_tflops", "bandwidth_gbs"} - found.keys()
    if missing:
        raise NoRates(
            f"{place} has no {' and no '.join(sorted(missing))} ({dtype}) of a device called {device!r}; it has rows of "
            f"{', '.join(sorted(names - {''})) or 'nothing'}"
        )
    return Rates(
        found["matmul_tflops"][1], found["bandwidth_gbs"][1], "; ".join(sorted({x[2] for x in found.values()}))
    )


class Seconds(NamedTuple):
    """One step of one process."""

    prefill: float
    decode: float
    scoring: float
    training: float
    optimizer: float


def seconds(job: Job, counted: Counted, rates: Rates, mfu: float = 1.0) -> Seconds:
    p, c = counted.parameters, counted
    rate, bandwidth = rates.matmul_tflops * 1e12, rates.bandwidth_gbs * 1e9
    width = 2 if job.precision == "bf16-weights" else 4

    def attention(length: float) -> float:
        return 2 * c.layers * c.hidden * length**2

    prompts = job.sequences * (2 * p.matrices * job.prompt_tokens + attention(job.prompt_tokens))
    whole = job.sequences * (2 * p.matrices * job.length + attention(job.length) + 2 * p.head * job.response_tokens)
    together = min(MOST_DECODED, job.sequences)
    steps = job.response_tokens * job.sequences / together
    middle = job.prompt_tokens + job.response_tokens / 2
    read = width * (p.matrices + p.head) + together * middle * c.kv_bytes
    flops = together * (2 * (p.matrices + p.head) + 4 * c.layers * c.hidden * middle)
    backbones = 2 if job.trainer == "late" and job.value_model else 1
    forwards = 2 if job.lora_rank is not None else 3
    forwards += job.gradient_checkpointing
    optimizer_steps = job.epochs * max(1, job.sequences // job.mini_batch)
    shards = job.processes if job.sharded else 1
    return Seconds(
        prefill=prompts / rate,
        decode=steps * max(read / bandwidth, flops / rate),
        scoring=whole * backbones / rate,  # the reference, and a value function of its own
        training=job.epochs * forwards * whole * backbones / (rate * mfu),
        optimizer=optimizer_steps * 7 * 4 * p.trained * backbones / shards / bandwidth,
    )


def tokens_per_second(job: Job, spent: Seconds) -> float:
    """Response tokens of all processes."""
    return job.processes * job.sequences * job.response_tokens / sum(spent)
