"""`fastppo info`: what is installed, what runs here, and why the rest does not. Paste it into a bug report."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastppo.cli.options import parse

LIBRARIES = [
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "datasets",
    "numpy",
    "triton",
    "flash-attn",
    "bitsandbytes",
]
# What the C++ kernels are compiled for besides the baseline, and what tells a slow CPU from a fast one.
CPU_FEATURES = ["avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve"]


@dataclass(frozen=True)
class InfoOptions:
    """Show versions, devices, and which back ends run here or why not."""

    json: bool = False
    """Print it as JSON."""


def versions() -> dict[str, str]:
    import fastppo

    found = {"fastppo": fastppo.__version__, "python": platform.python_version(), "system": platform.platform()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def cpu() -> dict[str, Any]:
    """Name, cores, threads in use, and vector instructions of this machine's CPU."""
    import torch

    name, flags = platform.processor() or platform.machine(), set()
    path = Path("/proc/cpuinfo")  # Linux; elsewhere the instructions stay unknown
    for line in path.read_text().splitlines() if path.is_file() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        if key.strip() in ("flags", "Features"):
            flags = set(value.split())
            break
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": name,
        "cores": usable,
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "instructions": [flag for flag in CPU_FEATURES if flag in flags],
        "torch uses": torch.backends.cpu.get_cpu_capability(),
    }


def gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_GiB": round(properties.total_memory / 2**30, 1),
            }
        )
    return found


def extension() -> dict[str, Any]:
    from fastppo.kernels import _backend

    module = _backend.extension()
    if isinstance(module, str):
        return {"loaded": False, "why": module}
    return {"loaded": True, "file": module.__file__, "built_with_cuda": bool(module.built_with_cuda)}


def rooms() -> list[str]:
    """The ops: what fastppo.kernels has that is not private."""
    import fastppo.kernels

    return sorted({path.stem for folder in fastppo.kernels.__path__ for path in Path(folder).glob("[!_]*.py")})


def kernel_backends(device: Any) -> dict[str, dict[str, str | None]]:
    """op -> back end -> why it does not run on `device`, None where it does; "not written" where there is none."""
    from fastppo.kernels import _backend

    told = {}
    for room in rooms():
        try:
            table = getattr(importlib.import_module(f"fastppo.kernels.{room}"), "BACKEND_TABLE", {})
        except ImportError as error:
            told[room] = dict.fromkeys(_backend.BACKENDS, f"fastppo.kernels.{room} does not import: {error}")
            continue
        told[room] = {n: _backend.missing(n, device) if n in table else "not written" for n in _backend.BACKENDS}
    return told


def attention_backends(device: Any) -> dict[str, str | None]:
    """Packed attention's back ends -> why they do not run on `device` (bfloat16, head dimension 64)."""
    import torch

    from fastppo.attention import BACKENDS
    from fastppo.attention.backends import Call, missing

    call = Call(device.type, torch.bfloat16, head_dim=64, value_dim=64, softcap=None, dropout=0.0)
    return {name: missing(name, call) for name in BACKENDS}


def gather() -> dict[str, Any]:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    why_no_gpu = "torch was built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
    return {
        "versions": versions(),
        "device": str(device),
        "cpu": cpu(),
        "gpus": gpus() or why_no_gpu,
        "extension": extension(),
        "kernels": kernel_backends(device),
        "attention": attention_backends(device),
        "forced": {
            n: os.environ[n] for n in ("FASTPPO_BACKEND", "FASTPPO_ATTN", "TRITON_INTERPRET") if n in os.environ
        },
    }


def about() -> dict[str, str]:
    """The lines of a run's info.json: enough to know later what made its numbers."""
    told = gather()
    cards, threads = told["gpus"], told["cpu"]["threads"]
    return {
        **told["versions"],
        "device": told["device"],
        "cpu": f"{told['cpu']['name']}, {told['cpu']['cores']} cores, {threads} thread{'s' * (threads != 1)}",
        "gpu": cards if isinstance(cards, str) else ", ".join(card["name"] for card in cards),
        "attention": next(name for name, reason in told["attention"].items() if reason is None),
        **{
            op: next((n for n, why in table.items() if why is None), "nothing") for op, table in told["kernels"].items()
        },
    }


def render(told: dict[str, Any], console: Any) -> None:
    from rich.table import Table

    def section(title: str, rows: dict[str, Any]) -> None:
        table = Table.grid(padding=(0, 2))
        for name, value in rows.items():
            table.add_row(f"  {name}", ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        console.print(f"[bold]{title}[/bold]")
        console.print(table)

    section("versions", told["versions"])
    section("cpu", told["cpu"])
    cards = told["gpus"]
    section(
        "gpu", {"none": cards} if isinstance(cards, str) else {str(i): list(c.values()) for i, c in enumerate(cards)}
    )
    section("extension fastppo._C", told["extension"])
    reasons: dict[str, None] = {}
    for title, rows in (("kernels", told["kernels"]), ("attention", {"packed attention": told["attention"]})):
        table = Table(box=None, padding=(0, 2), header_style="dim")
        for name in ("", *next(iter(rows.values()), {}), f"what runs on {told['device']}"):
            table.add_column(name)
        for op, backends in rows.items():
            marks = [mark(reason, reasons) for reason in backends.values()]
            table.add_row(op, *marks, next((name for name, reason in backends.items() if reason is None), "nothing"))
        console.print(f"[bold]{title}[/bold]")
        console.print(table)
    for number, reason in enumerate(reasons, 1):
        console.print(f"  ({number}) {reason}", markup=False, soft_wrap=True)
    for name, value in told["forced"].items():
        console.print(f"  {name}={value} is set: it decides instead", markup=False, soft_wrap=True)


def mark(reason: str | None, reasons: dict[str, None]) -> str:
    """'yes', '-' for a back end that nobody wrote, or the number of the reason in the list below the table."""
    if reason is None:
        return "yes"
    if reason == "not written":
        return "-"
    reasons.setdefault(reason)
    return f"no ({list(reasons).index(reason) + 1})"


def run(argv: Sequence[str]) -> int:
    options = parse(InfoOptions, argv, "fastppo info", __doc__)
    told = gather()
    if options.json:
        print(json.dumps(told, indent=1))
        return 0
    from rich.console import Console

    render(told, Console(highlight=False))
    return 0
