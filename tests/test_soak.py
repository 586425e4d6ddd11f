"""A short form of bench/soak.py: faults and kills on the way, the same weights at the end, nothing left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not hasattr(os, "fork") or not Path("/proc/self/statm").exists(), reason="needs fork and /proc")
def test_faults_and_kills_leave_no_trace(tmp_path):
    tiny_models.causal(vocab_size=len(tiny_models.WORDS)).save_pretrained(tmp_path / "model")
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "bench.soak", "--model", tmp_path / "model", "--folder", tmp_path / "out"]
    command += ["--steps", "16", "--kills", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads((tmp_path / "out/report.json").read_text())
    assert found["same_weights"] and found["same_curve"], found
    assert len(found["killed_after_step"]) == 2
    assert found["reward_raised"] == found["nan_scores"] == found["empty_batches"] == 1
    assert found["left_behind"] == [] and found["checkpoints"] == 2
    assert found["open_files_first_last"][0] == found["open_files_first_last"][1]
    assert (tmp_path / "out/soak.png").stat().st_size > 10_000
