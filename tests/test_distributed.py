"""Several processes (gloo, CPU) against one: losses, statistics, samples and weights; DDP and FSDP2; failures that end.

Each launch runs many cases (distributed_worker.py) and has a hard time limit, so that a hang fails.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastppo import host_group

HERE = Path(__file__).parent
CLASSIC = ["plain", "everything", "early_stopping", "lora", "padded", "rollout", "fewer", "skipped"]
RESUMED = ["resume", "resume_lora"]
LATE = ["late", "late_lora", "late_value", "late_whiten", "late_fewer", "late_nan", "late_resume"]
DETERMINISTIC = ["deterministic", "late_deterministic"]
SUPERVISED = ["sft", "reward"]
SUPERVISED_RESUMED = ["sft_resume", "sft_lora_resume", "reward_resume", "reward_lora_resume"]
FEW = ["everything", "early_stopping", "fewer", "lora", "resume", "late_lora", "late_value", "late_fewer"]
FEW += ["sft_resume", "reward_lora_resume"]
# launch -> (processes, how parameters lie, cases)
LAUNCHES = {
    "one": (1, "", CLASSIC + RESUMED + LATE + DETERMINISTIC + SUPERVISED + SUPERVISED_RESUMED),
    "ddp2": (2, "", CLASSIC + RESUMED + LATE + DETERMINISTIC + SUPERVISED + SUPERVISED_RESUMED),
    "ddp4": (4, "", FEW),
    "fsdp2": (2, "fsdp2", CLASSIC + RESUMED + LATE + DETERMINISTIC + SUPERVISED + SUPERVISED_RESUMED),
    "fsdp4": (4, "fsdp2", FEW),
}
LIMIT_SECONDS = 600  # against hangs only: many processes share two cores


def environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun sets; processes that are started alone have nobody who ends them when another fails."""
    own = {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    if processes > 1:
        own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        own |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return os.environ | own


def start(processes: int, *arguments: str, worker: str = "distributed_worker.py") -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(HERE / worker), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen(command, env=environment(r, processes, port), **pipes) for r in range(processes)]


def ends(started: list[subprocess.Popen], seconds: float) -> list[tuple[int, str]]:
    """(exit status, output) of each; the test fails when one runs longer than `seconds`."""
    limit, found = time.monotonic() + seconds, []
    try:
        for process in started:
            output, _ = process.communicate(timeout=max(limit - time.monotonic(), 0.1))
            found.append((process.returncode, output))
    finally:
        for process in started:
            process.kill()
    return found


@cache
def results(launch: str, folder: Path) -> Path:
    processes, kind, cases = LAUNCHES[launch]
    path = folder / launch
    path.mkdir()
    for status, output in ends(start(processes, str(path), ",".join(cases), *filter(None, [kind])), LIMIT_SECONDS):
        assert status == 0, output[-4000:]
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


def close(found, wanted, where: str) -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key, value in wanted.items():
            close(found[key], value, f"{where}: {key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for number, (mine, value) in enumerate(zip(found, wanted, strict=True)):
            close(mine, value, f"{where}: step {number}")
    elif isinstance(wanted, (int, float)):
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-5, nan_ok=True), where
    else:
        assert found == wanted, where


@pytest.mark.parametrize(("launch", "case"), [(n, case) for n, x in LAUNCHES.items() if n != "one" for case in x[2]])
def test_many_processes_give_the_result_of_one(folder, launch, case):
    same_as_one(results("one", folder), results(launch, folder), case, LAUNCHES[launch][0])


def same_as_one(one: Path, many: Path, case: str, processes: int) -> None:
    wanted = load_file(one / f"{case}.0.safetensors")
    for rank in range(processes):
        found = load_file(many / f"{case}.{rank}.safetensors")
        assert found.keys() == wanted.keys()
        worst = max((found[name] - wanted[name]).abs().max().item() for name in wanted)
        assert worst < 1e-5, f"{case}: weights on process {rank} of {processes} differ by {worst:.2g}"
        own = json.loads((many / f"{case}.{rank}.json").read_text())
        close(own, json.loads((one / f"{case}.0.json").read_text()), f"{case} on process {rank} of {processes}")


def test_cases_do_what_their_names_say(folder):
    def log(case):
        return json.loads((results("one", folder) / f"{case}.0.json").read_text())

    steps = {case: log(case)[-2]["optimizer steps"] for case in ("plain", "early_stopping")}
    assert steps["early_stopping"] < steps["plain"] * 4, steps
    assert log("everything")[-1]["count"] == 16 and log("everything")[0]["kl_coef"] != log("everything")[1]["kl_coef"]
    assert [sorted(x) for x in log("skipped")[1:2]] == [["kl_coef", "objective/kl_coef"]]  # no statistics of a step
    assert log("late") == log("late_resume")[:-1]
    assert log("late_fewer")[0]["objective/scores"] != log("late")[0]["objective/scores"]
    # the tests above hold two processes to the same: gloo adds two numbers in one order
    assert all(log(case)[-1]["bitwise"] for case in [*RESUMED, "late_resume", *DETERMINISTIC, *SUPERVISED_RESUMED])
    assert all(log("late_deterministic")[-2]["exact"])
    assert all(log(case)[-1]["best"] for case in SUPERVISED_RESUMED)


@pytest.mark.parametrize("launch", ["ddp2", "ddp4", "fsdp2"])
def test_processes_of_one_host_share_memory(folder, launch):
    """Where the system lets a process look at another's files, which a sandbox may not."""
    file = host_group._anonymous_file(4096)
    mapped = file is not None and host_group._map(f"/proc/{os.getpid()}/fd/{file}", 4096, [os.getpid()])
    done = results(launch, folder)
    found = [json.loads((done / f"shared_memory.{rank}.json").read_text()) for rank in range(LAUNCHES[launch][0])]
    assert found == [bool(mapped)] * LAUNCHES[launch][0]


@pytest.mark.parametrize("launch", ["ddp2", "fsdp2"])
def test_a_saved_policy_is_whole_and_loads_with_transformers_alone(folder, launch):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    done, trained = results(launch, folder), {}
    for case in RESUMED:
        trained[case] = load_file(done / f"{case}.0.safetensors")
    model = AutoModelForCausalLM.from_pretrained(done / "resume-policy")
    assert (done / "resume-policy/tokenizer.json").exists()
    for name, found in model.named_parameters():
        assert torch.equal(found, trained["resume"][f"pretrained_model.{name}"]), name
    head = load_file(done / "resume_lora-policy/value_head.safetensors")
    assert torch.equal(head["v_head.summary.weight"], trained["resume_lora"]["v_head.summary.weight"])
    adapted = PeftModel.from_pretrained(model, done / "resume_lora-policy", is_trainable=True)
    adapters = {f"pretrained_model.{name}": p for name, p in adapted.named_parameters() if p.requires_grad}
    assert adapters and all(torch.equal(p, trained["resume_lora"][name]) for name, p in adapters.items())


@pytest.mark.parametrize("launch", ["one", "ddp2", "fsdp2"])
def test_checkpoints_hold_no_pickle(folder, launch):
    nothing_pickled(results(launch, folder), 12)


def nothing_pickled(done: Path, count: int) -> None:
    found = [*done.rglob("checkpoint-*"), *done.rglob("step-*")]
    assert len(found) == count
    kinds = {path.suffix for folder in found for path in folder.rglob("*") if path.is_file()}
    assert kinds <= {".safetensors", ".json", ".jinja", ".md"} and {".safetensors", ".json"} <= kinds, kinds


LAUNCH = ["-m", "accelerate.commands.launch", "--config_file"]
CONFIGURED = [*LAUNCH[:-1], "--num_processes", "2", "--mixed_precision", "no", "--config_file"]
ALL_TRAINERS = ["plain", "late", "sft", "reward"]
# launcher -> (its arguments, cases)
LAUNCHERS = {
    "torchrun": (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], ["plain"]),
    "multi_cpu.yaml": ([*LAUNCH, "examples/accelerate/multi_cpu.yaml", "--main_process_port", "0"], ["plain"]),
    "ddp.yaml": ([*CONFIGURED, "examples/accelerate/ddp.yaml", "--main_process_port", "0"], ALL_TRAINERS),
    "fsdp2.yaml": ([*CONFIGURED, "examples/accelerate/fsdp2.yaml", "--main_process_port", "0"], ALL_TRAINERS),
}


def launched(arguments: list[str], folder: Path, cases: list[str], more: dict[str, str] | None = None) -> None:
    """The cases, by a launcher that decides how parameters lie."""
    worker = [str(HERE / "distributed_worker.py"), str(folder), ",".join(cases), "launched"]
    variables = os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"} | (more or {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([sys.executable, *arguments, *worker], env=variables, cwd=HERE.parent, **pipes)
    ((status, output),) = ends([process], LIMIT_SECONDS)
    assert status == 0, output[-4000:]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_with_the_example_configurations(folder, tmp_path, launcher):
    """torchrun and accelerate launch for real; without a GPU accelerate takes gloo."""
    arguments, cases = LAUNCHERS[launcher]
    launched(arguments, tmp_path, cases, {"ACCELERATE_USE_CPU": "1"} if launcher == "torchrun" else {})
    for case in cases:
        same_as_one(results("one", folder), tmp_path, case, 2)


@pytest.mark.parametrize(
    "path", sorted((HERE.parent / "examples/accelerate").glob("*.yaml")), ids=lambda path: path.stem
)
def test_accelerate_reads_the_example_configurations(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= 2
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2 and not config.fsdp_config["fsdp_cpu_ram_efficient_loading"]


# --- failures ---------------------------------------------------------------------------------------------------------


def test_an_error_on_one_process_ends_all_with_its_words(tmp_path):
    (zero, first), (one, second) = ends(start(2, str(tmp_path), "failing_reward"), LIMIT_SECONDS)
    assert zero and one, "both end long before the time-out of 1,800 s"
    assert "PeerFailure: process 1 failed in the reward: ValueError: no score for 'cat'" in first, first[-2000:]
    assert "ValueError: no score for 'cat'" in second and "PeerFailure" not in second


def test_what_fails_on_one_process_fails_on_all_with_its_words(tmp_path):
    """In reading, rollouts and saving, a full disk for one; no process waits, so that the next stage can be tried."""
    for status, output in ends(start(2, str(tmp_path), "failing_stages"), LIMIT_SECONDS):
        assert status == 0, output[-4000:]
    first, second = (json.loads((tmp_path / f"raised.{rank}.json").read_text()) for rank in range(2))
    rows, pages = "ValueError: a row without tokens", "ValueError: no pages"
    failed = {"sft rows": ("reading the next batches", rows), "reward rows": ("reading the next batches", rows)}
    failed |= {"late rows": ("reading the next prompts", rows), "late rollout": ("the rollout", pages)}
    for stage, (where, words) in failed.items():
        assert (first[stage], second[stage]) == (f"PeerFailure: process 1 failed in {where}: {words}", words)
    for stage in ("late save", "sft save"):
        assert first[stage].startswith("CheckpointError: ") and "No space left on device" in first[stage]
        assert second[stage] == f"PeerFailure: process 0 failed in writing a checkpoint: {first[stage]}"
    assert first["classic save"] == second["classic save"] and "No space left on device" in first["classic save"]
    assert len(first) == len(second) == 7


def test_a_killed_process_ends_the_others_and_the_run_goes_on_bitwise(folder, tmp_path):
    (zero, first), (one, _) = ends(start(2, str(tmp_path), "killed"), LIMIT_SECONDS)
    assert zero and one == -signal.SIGKILL, first[-2000:]
    assert "waiting for the other processes after the check of step()'s arguments failed" in first, first[-2000:]
    for status, output in ends(start(2, str(tmp_path), "killed"), LIMIT_SECONDS):
        assert status == 0, output[-4000:]
    wanted = load_file(results("ddp2", folder) / "resume.0.safetensors")
    for rank in range(2):
        found = load_file(tmp_path / f"killed.{rank}.safetensors")
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_process_that_is_late_ends_the_others_after_the_time_out(tmp_path):
    (zero, first), (one, _) = ends(start(2, str(tmp_path), "late_process"), LIMIT_SECONDS)
    assert zero and one, first[-2000:]
    assert "is later than the time-out (config.ddp_timeout)" in first and "come within 10 s" in first, first[-2000:]
