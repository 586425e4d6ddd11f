"""bench/gpu_suite.sh without a GPU: tiny shapes on the CPU, a part that fails, and a second call that takes up where the first stopped."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SUITE = ROOT / "bench/gpu_suite.sh"
PARTS = "environment,ceilings,bench-gae,memcheck-cpu,rollout-llama3-8b-32,loop-llama3-8b-lora"
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter's process is for Triton"
)


def suite(out: Path, *options: str, python: str = sys.executable) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": python, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(["bash", SUITE, out, *options], env=environment, capture_output=True, text=True, cwd="/")


def rows(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_flow_failure_and_resumption(tmp_path):
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\ncase "$*" in *bench_gae.py*) exit 3 ;; esac\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    out, options = tmp_path / "out", ("--device", "cpu", "--quick", "--only", PARTS)
    first = suite(out, *options, python=str(wrapper))
    assert first.returncode == 1 and "failed with 3" in first.stdout, first.stdout + first.stderr
    status = {row["part"]: row["rc"] for row in rows(out / "status.csv")}
    assert status == {part: "3" if part == "bench-gae" else "0" for part in PARTS.split(",")}, first.stdout
    second = suite(out, *options)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("done before") == 5 and "== bench-gae (at most" in second.stdout

    found = rows(out / "rows.csv")
    by_part = {part: [row for row in found if row["part"] == part] for part in PARTS.split(",")}
    assert {row["variant"] for row in by_part["bench-gae"]} == {"ours", "torch", "python loop"}
    assert {row["variant"] for row in by_part["loop-llama3-8b-lora"]} == {"fastppo", "eager (TRL-style)"}
    assert all(float(row["ms"]) > 0 for part in ("bench-gae", "loop-llama3-8b-lora") for row in by_part[part])
    assert {row["clocks_before"] for row in found} == {"cpu"} and all(row["torch"] and row["commit"] for row in found)
    summary = (out / "summary.md").read_text()
    assert "| bench-gae | done |" in summary and "FAILED" not in summary and "| model.generate |" in summary
    assert len(list(out.iterdir())) <= 8


def test_a_budget_leaves_parts_for_the_next_call(tmp_path):
    ran = suite(tmp_path / "out", "--device", "cpu", "--quick", "--only", "ceilings", "--budget", "10")
    assert ran.returncode == 1 and "ceilings: left for the next call" in ran.stdout


def test_dry_run_lists_every_part_in_order_of_value(tmp_path):
    ran = suite(tmp_path / "out", "--dry-run")
    names = [line.split()[0] for line in ran.stdout.splitlines()]
    first = ["build", "environment", "tests", "tests-generation", "ceilings"]
    assert ran.returncode == 0 and names[:5] == first and not (tmp_path / "out").exists()
    assert {"memcheck-cuda", "racecheck-triton", "peers", "rollout-llama3-8b-256", "loop-qwen3-1.7b", "learning"} < set(
        names
    )
    assert all(int(line.split()[1].rstrip("s")) <= 600 for line in ran.stdout.splitlines())
    benches = {line.split("bench/")[1].split()[0] for line in ran.stdout.splitlines() if "bench/" in line}
    assert all((ROOT / "bench" / name).exists() for name in benches)


def test_every_file_of_the_tests_part_has_tests_for_a_gpu(tmp_path):
    """`-m gpu` selects nothing, and pytest then exits with 5, where no test takes `device`; collecting needs no GPU."""
    ran = suite(tmp_path / "out", "--dry-run", "--only", "tests,tests-generation")
    files = [word for word in ran.stdout.split() if word.startswith("tests/test_")]
    assert len(files) == 10
    for file in files:
        assert re.search(r"def test_\w+\([^)]*\bdevice\b", (ROOT / file).read_text()), file
    few = [file for file in files if "kl_reward" in file or "generation" in file]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", "-m", "gpu", "-p", "no:cacheprovider", *few]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    counts = dict(re.findall(r"^(tests/\S+): (\d+)$", found.stdout, re.MULTILINE))
    assert found.returncode == 0 and all(int(counts[file]) > 5 for file in few), found.stdout[-2000:]


@pytest.mark.parametrize(("options", "words"), [((), "gpu_suite.sh OUT"), (("x", "--devices"), "no option --devices")])
def test_a_wrong_call_says_what_is_wanted(options, words):
    ran = subprocess.run(["bash", SUITE, *options], capture_output=True, text=True)
    assert ran.returncode == 2 and words in ran.stderr
