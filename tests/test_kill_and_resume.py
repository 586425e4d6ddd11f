"""Whatever kills a run, the same command goes on to bitwise the same weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def kill(moments: dict[str, int]) -> dict:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    command = [sys.executable, HERE / "kill_runs.py", json.dumps(moments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert {kind: len(runs) for kind, runs in report.items()} == moments
    assert all(run["equal"] for runs in report.values() for run in runs), report
    return report


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_at_fifteen_moments():
    report = kill({"sft": 3, "reward": 3, "ppo": 4, "classic": 5})
    # most were killed before their end; else the test shows nothing
    assert sum(run["killed"] for runs in report.values() for run in runs) >= 8, report


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("FASTPPO_LONG"), reason="set FASTPPO_LONG=1 for fifty kills: minutes")
def test_kill_9_at_fifty_moments():
    report = kill({"classic": 50})
    assert sum(run["killed"] for run in report["classic"]) >= 40, report
