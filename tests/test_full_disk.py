"""A disk that is full in truth: a small tmpfs in a mount namespace of its own, where the kernel lets one be made."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@cache
def refused() -> str | None:
    """Why no file system can be mounted here, or None. test_cli_resume and test_trainer_checkpoints fill a disk without one."""
    if shutil.which("unshare") is None:
        return "there is no unshare"
    tried = subprocess.run(
        ["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True, timeout=60
    )
    return None if tried.returncode == 0 else f"this machine mounts nothing for its users: {tried.stderr.strip()}"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    from kill_runs import write_inputs

    folder = tmp_path_factory.mktemp("disk")
    write_inputs(folder)
    (folder / "disk").mkdir()
    return folder


@pytest.mark.parametrize(("kind", "free"), [("train", 60_000), ("sft", 60_000), ("ppo", 0)])
def test_a_full_file_system_loses_one_step_and_the_run_goes_on_when_there_is_space(kind, free, place):
    if why := refused():
        pytest.skip(why)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    inside = 'mount -t tmpfs -o size=24m tmpfs disk && exec "$@"'
    command = ["unshare", "-Urm", "sh", "-c", inside, "sh", sys.executable, HERE / "full_disk.py", kind, str(free)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=place, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["statuses"] == [0, 1, 0] and found["same"], found
    assert "could not be written: " in found["said"] and "No space left on device" in found["said"]
    assert "Older checkpoints are untouched; free space or choose another output folder" in found["said"]
    assert "go" in found["said"].split("output folder.")[1] and "Traceback" not in found["said"]
    saved = [name for name in found["left"] if name.rpartition("/")[2].startswith(("step-", "checkpoint-"))]
    assert [name[-1] for name in saved] == ["1", "2"] and not any("writing" in name for name in found["left"])
