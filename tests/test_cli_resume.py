"""`fastppo train --resume`: stopped in every way, the run goes on to what it would have been; broken files are passed over."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
from safetensors.torch import load_file

from fastppo.cli import main
from fastppo.cli.run_folder import read_metrics

ROOT = Path(__file__).parent.parent
STEPS = 8
REWARDS = """
import os, signal, time, threading
from pathlib import Path
calls = 0
def letters(responses):
    return [len(set(r)) / 10 + len(r) / 50 for r in responses]
def at_call_4(responses):  # call 1 answers the probes: this is the third step
    global calls
    calls += 1
    if calls == 4 and not Path("once").exists():
        Path("once").touch()
        what = Path("what").read_text()
        if what == "raise": raise LookupError("no dictionary")
        if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGTERM if what == "term" else signal.SIGINT)
        if what == "twice":
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            time.sleep(20)
    return letters(responses)
"""
OPTIONS = "--batch-size 4 --mini-batch-size 2 --ppo-epochs 1 --max-new-tokens 6 --probes 2 --save-every 1".split()  # noqa: SIM905
OPTIONS += ["--steps", str(4 * STEPS), "--learning-rate", "0.01", "--dataset", "prompts.jsonl"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    tokenizer = tiny_models.tokenizer()
    tiny_models.causal(vocab_size=len(tiny_models.WORDS)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": "abcdefghij"[i : i + 3] + "?"} for i in range(8)] * 2
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "rewards.py").write_text(REWARDS)
    here = os.getcwd()
    os.chdir(folder)
    try:
        train("straight", "letters")
    finally:
        os.chdir(here)
    return folder


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    (place / "once").unlink(missing_ok=True)


def train(output: str, reward: str = "at_call_4", *argv: str) -> int:
    return main(
        ["train", "--model", "model", "--reward", f"rewards.py:{reward}", "--output-dir", output, *OPTIONS, *argv]
    )


def process(*argv: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fastppo", "train", *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def same_policy(one: str, two: str) -> bool:
    a, b = (load_file(Path(name) / "policy/model.safetensors") for name in (one, two))
    return all((a[name] == b[name]).all() for name in a) and a.keys() == b.keys()


def learnt(run: str) -> list:
    """What the steps computed, without the times they took."""
    left_out = ("time/", "perf/", "wall_time", "fastppo/")
    return [{k: v for k, v in row.items() if not k.startswith(left_out)} for row in read_metrics(run)]


def check(run: str, place: Path) -> None:
    assert same_policy("straight", run) and learnt(run) == learnt("straight")
    told = json.loads((place / run / "samples.json").read_text())
    assert told["before"] == json.loads((place / "straight/samples.json").read_text())["before"]
    assert len(list((place / run / "checkpoints").iterdir())) == 3


@pytest.mark.parametrize(
    ("what", "status", "saved"), [("term", 130, 3), ("int", 130, 3), ("twice", 130, 2), ("raise", 1, 2)]
)
def test_a_stopped_run_goes_on_to_the_same_end(what, status, saved, place, capsys):
    run = f"run-{what}"
    (place / "what").write_text(what)
    assert train(run) == status
    said = " ".join(capsys.readouterr().out.split())
    assert f"The last checkpoint is of step {saved}. Go on with: fastppo train --resume {run}" in said
    assert (place / run / "policy").exists() == (what != "twice"), "no policy from the middle of a step"
    assert main(["train", "--resume", run]) == 0
    assert f"Going on after step {saved}" in capsys.readouterr().out
    check(run, place)


def test_a_killed_run_goes_on_and_says_what_it_passed_over(place, capsys):
    (place / "what").write_text("kill")
    killed = process("--model", "model", "--reward", "rewards.py:at_call_4", "--output-dir", "killed", *OPTIONS)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    newest = place / "killed/checkpoints/step-00000002"
    data = (newest / "policy.safetensors").read_bytes()
    (newest / "policy.safetensors").write_bytes(data[:-1])
    assert main(["train", "--output-dir", "killed", "--resume"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Passed over a checkpoint: killed/checkpoints/step-00000002" in said and "Going on after step 1" in said
    shutil.rmtree(next((place / "killed/checkpoints").glob("set-aside-*")))
    check("killed", place)


def test_longer_and_from_one_checkpoint(place, capsys):
    assert train("short", "letters", "--steps", "16") == 0
    assert main(["train", "--resume=short", "--steps", str(4 * STEPS)]) == 0
    check("short", place)
    capsys.readouterr()
    assert main(["train", "--resume", "short/checkpoints/step-00000006"]) == 0
    assert "Going on after step 6" in capsys.readouterr().out
    assert learnt("short") == learnt("straight")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--resume", "nowhere"], "there is no folder nowhere"),
        (["--resume", "model"], "model holds no checkpoints"),
        (["--resume"], "no run under runs/ has checkpoints"),
        (["--resume", "straight", "--dataset", "others.jsonl"], "the run's prompts were others"),
        (["--resume", "straight", "--lora-rank", "2"], "build model and ref_model as the saved run did"),
        (["--resume", "straight", "--save-every", "0"], "--save-every must be at least 1"),
    ],
)
def test_what_cannot_be_resumed_is_said(argv, words, place, capsys):
    (place / "others.jsonl").write_text('{"prompt": "abc"}\n' * 9)
    before = (place / "straight/metrics.jsonl").read_bytes()
    assert main(["train", *argv]) == 1
    said = capsys.readouterr().err
    assert words in " ".join(said.split()) and "Traceback" not in said
    assert (place / "straight/metrics.jsonl").read_bytes() == before


SMALL_FILES = """
import resource, sys
from fastppo.cli import main
import fastppo.checkpoint as c
write = c._write_files
def full(folder, step, *rest):
    if step == 3: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    write(folder, step, *rest)
c._write_files = full
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_ends_the_run_and_loses_one_step(place):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    argv = ["train", "--model", "model", "--reward", "rewards.py:letters", "--output-dir", "full", *OPTIONS]
    ran = subprocess.run(
        [sys.executable, "-c", SMALL_FILES, *argv], capture_output=True, text=True, env=environment, timeout=300
    )
    assert ran.returncode == 1 and "Traceback" not in ran.stderr, ran.stderr
    assert "could not be written: File too large" in ran.stderr and "fastppo train --resume full" in ran.stderr
    assert sorted(p.name for p in (place / "full/checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
    assert main(["train", "--resume", "full"]) == 0
    check("full", place)


def test_checkpoints_that_take_long_come_less_often(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from fastppo.cli import checkpoints

    clock = [1000.0]

    def save_checkpoint(*_, **__):
        clock[0] += 1

    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    trainer = SimpleNamespace(save_checkpoint=save_checkpoint, accelerator=SimpleNamespace(num_processes=1))
    kept, written = checkpoints.Checkpoints(tmp_path), []
    for step in range(1, 9):
        kept.after_step(trainer, step, None, must=step == 8)
        written += [step] * (kept.saved == step)
        clock[0] += 7  # seconds a step: a checkpoint of one second is due twenty seconds after the last, at 5 %
    assert written == [1, 4, 7, 8]
