"""Every Triton kernel in the interpreter, in a process of its own: the switch must be set before triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = [*sorted(path.stem for path in (ROOT / "kernels").glob("[!_]*.py")), "linear_stats"]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter's process already")
@pytest.mark.parametrize("room", ROOMS)
def test_triton_kernels_of(room):
    pytest.importorskip("triton", reason="triton is not installed (pip install 'fastppo[triton]')")
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    chosen = [] if room == "linear_stats" else ["-k", "triton"]  # the fused forward has no other back end
    command = [sys.executable, "-m", "pytest", f"tests/test_{room}.py", *chosen, "-p", "no:cacheprovider", "-v"]
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert ran.returncode == 0 and " passed" in ran.stdout, ran.stdout[-6000:] + ran.stderr[-2000:]
