"""Two processes under torchrun (gloo, CPU): packed and padded steps agree, and a NaN on one rank is skipped on both."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def launch(path: str, spoil: str) -> list[dict]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    environment = os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "ACCELERATE_USE_CPU": "1"}
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(HERE / "distributed_worker.py"), path, spoil],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(part.split("\n")[0]) for part in done.stdout.split("RESULT ")[1:]]
    assert [x["rank"] for x in sorted(found, key=lambda x: x["rank"])] == [0, 1]
    return found


def test_packed_and_padded_steps_agree_over_two_processes():
    packed, padded = launch("packed", ""), launch("padded", "")
    assert {x["path"] for x in packed} == {"PackedPath"} and {x["path"] for x in padded} == {"PaddedPath"}
    for name in ("parameters", "loss"):
        values = [x[name] for x in packed + padded]
        assert values == pytest.approx([values[0]] * 4, rel=1e-4), name


def test_a_nan_on_one_rank_skips_the_step_on_all():
    found = launch("packed", "nan")
    assert [x["loss"] for x in found] == [None, None]
    assert found[0]["parameters"] == pytest.approx(found[1]["parameters"], rel=1e-6)
