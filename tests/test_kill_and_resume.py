"""Whatever kills a run, the same command goes on to bitwise the same weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_at_ten_moments():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    moments = json.dumps({"sft": 3, "reward": 3, "ppo": 4})
    done = subprocess.run(
        [sys.executable, HERE / "kill_runs.py", moments], capture_output=True, text=True, env=environment, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert {kind: len(runs) for kind, runs in report.items()} == {"sft": 3, "reward": 3, "ppo": 4}
    assert all(run["equal"] for runs in report.values() for run in runs), report
    # most were killed before their end; else the test shows nothing
    assert sum(run["killed"] for runs in report.values() for run in runs) >= 5, report
