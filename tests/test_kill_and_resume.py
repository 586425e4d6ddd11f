"""Whatever kills a run, the same command goes on to bitwise the same weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
LONG = pytest.mark.skipif(not os.environ.get("FASTPPO_LONG"), reason="set FASTPPO_LONG=1 for dozens of kills: minutes")
COMMANDS = ("fastppo train", "fastppo sft", "fastppo reward", "fastppo ppo", "fastppo pipeline")


def kill(kinds: dict[str, int], moments: str) -> None:
    """moments: as kill_runs.py explains; those of the clock alone may come after a run's end."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    command = [sys.executable, HERE / "kill_runs.py", json.dumps(kinds), moments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    print(report)
    assert {kind: len(runs) for kind, runs in report.items()} == kinds
    assert all(not run["differs"] and not run["bugs"] for runs in report.values() for run in runs), report
    if moments != "clock":
        assert all(run["killed"] for runs in report.values() for run in runs), report


def test_kill_9_at_random_moments_of_trainers():
    kill({"sft": 2, "reward": 2, "ppo": 2, "classic": 2}, "calls")


def test_kill_9_at_random_file_operations_of_commands():
    kill({"fastppo pipeline": 1, "fastppo train": 2}, "on_disk")


def test_a_disk_that_is_full_from_any_file_on():
    """Checkpoints, metrics, samples, trackers' files, the saved model: what cannot be written is told, and the run can go on."""
    kill({"fastppo train": 2, "fastppo ppo": 1, "classic": 1}, "full")


@pytest.mark.slow
@LONG
@pytest.mark.parametrize("moments", ["calls", "on_disk", "clock", "full"])
@pytest.mark.parametrize("kind", ["sft", "reward", "ppo", "classic", *COMMANDS])
def test_kill_9_at_ten_moments(kind, moments):
    kill({kind: 10}, moments)
