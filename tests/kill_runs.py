"""kill -9 at random moments of training, start again the same way, compare the final weights.

A process of its own that never trains itself: it forks each run, so that a run costs no imports. Kinds: the trainers in
a script ("sft", "reward", "ppo", "classic") and the commands ("fastppo train", "fastppo sft", "fastppo reward", "fastppo ppo",
"fastppo pipeline"). Each run is killed twice: the start that goes on is killed, too, if it lasts to the second moment.

A moment is a number of calls: a run counts the Python and C functions that it calls and kills itself at the drawn one, so that
nothing depends on how fast the machine is. Moments are drawn from the whole run, models and checkpoints included; with
"on_disk" from its file operations alone, where a half-written checkpoint could come from; with "clock" they are
seconds, and the parent kills (a run may then have ended before). With "full" nobody kills: from the drawn moment on, counted
in files and folders that Python makes or renames in the run's folder, the disk is full, and the run must end with a message.
Prints one JSON object: kind -> list of {"moments": shares of the run, "killed": how often, "bugs": starts that ended by
what is no message, "differs": names}.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from saving_cases import COMMON, build
from sft_cases import make_model, make_tokenizer, rows
from tqdm import tqdm

from fastppo.checkpoint import CheckpointError
from fastppo.cli import main as command

CLASSIC_STEPS = 12
# what a run tells Python's audit hooks about files; writing through torch shows in the renames and lists around it
ON_DISK = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}

STAGES = {
    "sft": {"max_steps": 6, "gradient_accumulation_steps": 2},
    "reward": {"max_steps": 6},
    "ppo": {
        "total_episodes": 20,
        "response_length": 5,
        "num_sample_generations": 0,
        "probes": 2,
        "num_mini_batches": 2,
    },
}


TRAIN = "train --model model --dataset prompts.jsonl --reward rewards.py:words --save-every 1 --steps 20 --batch-size 4"
TRAIN += " --mini-batch-size 2 --ppo-epochs 1 --max-new-tokens 4 --probes 2 --learning-rate 0.01"

# tqdm's own lock is a semaphore that forks share: a run killed while it draws a bar would keep it from all later ones
tqdm.set_lock(threading.RLock())
LONGEST = 600  # seconds for a run: one that hangs ends
TOLD, BUG = 3, 1  # exit status of a run that ended with a message, with anything else


class Ended(Exception):
    """A command's own way to end."""


# --- scripts ----------------------------------------------------------------------------------------------------------


class Classic:
    """A script over the classic API: the loop that its users write, with a checkpoint after every step."""

    def __init__(self, folder: str):
        import test_resume

        self.folder, self.steps = folder, test_resume
        self.run = test_resume.build({"config": {"target": 0.1, "horizon": 20, "use_score_scaling": True}})
        self.model = self.run.model

    def train(self, resume_from_checkpoint: str) -> None:
        self.run.load_checkpoint(self.folder, missing_ok=True)
        if self.run._steps_done < CLASSIC_STEPS:
            self.steps.go_on(self.run, CLASSIC_STEPS, after=lambda: self.run.save_checkpoint(self.folder, keep=2))


def train(kind: str, folder: str) -> dict:
    """The digest of the final weights."""
    run = Classic(folder) if kind == "classic" else build(kind, folder)
    run.train(resume_from_checkpoint="auto")
    digest = hashlib.sha256()
    for parameter in run.model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return {"weights": digest.hexdigest()}


# --- commands ---------------------------------------------------------------------------------------------------------


def write_inputs(folder: Path) -> None:
    """model/, pairs.jsonl, prompts.jsonl, rewards.py."""
    make_model(seed=3).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    pairs = [json.dumps(row) for row in rows("pairs")]
    (folder / "pairs.jsonl").write_text("\n".join(pairs))
    prompts = [json.dumps({"prompt": row["chosen"]}) for row in rows("pairs")]
    (folder / "prompts.jsonl").write_text("\n".join(prompts))
    (folder / "rewards.py").write_text(
        "def words(completions): return [float(len(set(c.split()))) for c in completions]\n"
    )


def stages_of(stage: str) -> list[str]:
    return list(STAGES) if stage == "pipeline" else [stage]


def command_line(stage: str, folder: str) -> list[str]:
    """What runs the stage into `folder`, options in a file beside it."""
    values = {name: {**COMMON, "logging_steps": 1, **STAGES[name]} for name in stages_of(stage)}
    if stage != "pipeline":
        values = values[stage] | ({"reward": "rewards.py:words", "prompt_column": "chosen"} if stage == "ppo" else {})
    config = Path(f"{folder}.yaml")
    config.write_text(yaml.safe_dump({"model": "model", "dataset": "pairs.jsonl", **values}))
    return [stage, "--config", str(config), "--output-dir", folder]


def ppo_command(folder: str) -> list[str]:
    """What starts `fastppo train` into `folder`, or goes on with what is there."""
    if any(Path(folder, "checkpoints").glob("step-*")):
        return ["train", "--resume", folder]
    return [*TRAIN.split(), "--output-dir", folder, "--overwrite"]


def train_by_command(kind: str, folder: str) -> dict:
    """Digests of the models that the command wrote."""
    stage = kind.split()[1]
    if status := command(ppo_command(folder) if stage == "train" else command_line(stage, folder)):
        raise Ended(f"{kind} ended with status {status}")
    if stage == "train":
        steps = [json.loads(line)["step"] for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        weights = Path(folder, "policy/model.safetensors").read_bytes()
        left = [path.name for path in Path(folder).rglob(".*")]
        return {"weights": hashlib.sha256(weights).hexdigest(), "steps": steps, "left behind": left}
    made = {}
    for name in stages_of(stage):
        path = Path(folder, name) if stage == "pipeline" else Path(folder)
        made[f"{name} weights"] = hashlib.sha256((path / "model/model.safetensors").read_bytes()).hexdigest()
    return made


# --- moments ----------------------------------------------------------------------------------------------------------


def is_write(event: str, arguments: tuple, folder: str) -> bool:
    """Whether an audit event is of a file or folder that is made or renamed in `folder`."""
    if event not in ("open", "os.mkdir", "os.rename") or not isinstance(arguments[0], (str, os.PathLike)):
        return False
    makes = event != "open" or bool(arguments[2] & os.O_CREAT)
    return makes and os.fspath(arguments[0]).startswith(folder)


@contextlib.contextmanager
def counted(moments: str, kill_at: int | None, folder: str):
    """Counts moments while the block runs and kills at number `kill_at`, or fills the disk; yields what says how many there were."""
    ticks, seen = itertools.count(1), [0]

    def tick() -> None:
        seen[0] = next(ticks)
        if moments == "full" and kill_at and seen[0] >= kill_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if seen[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    if moments == "full":
        sys.addaudithook(lambda event, arguments: tick() if is_write(event, arguments, folder) else None)
    if moments == "on_disk":
        sys.addaudithook(lambda event, _: tick() if event in ON_DISK else None)
    elif moments == "calls":
        sys.setprofile(lambda frame, event, _: tick() if event in ("call", "c_call") else None)
    yield lambda: seen[0]
    sys.setprofile(None)


def start(kind: str, folder: str, moments: str, kill_at: int | None) -> int:
    """The process id of a new run. When it ends, `folder`.json holds what it made and how many moments it had."""
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(LONGEST)
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    status = BUG
    try:
        with counted(moments, kill_at, folder) as count:
            made = (train_by_command if " " in kind else train)(kind, folder)
            found = {"made": made, "moments": count()}
        Path(f"{folder}.json").write_text(json.dumps(found))
        status = 0
    except (Ended, CheckpointError):
        status = TOLD
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def finish(kind: str, folder: str, moments: str = "clock") -> dict:
    """The result of a run that nobody kills."""
    status = os.waitpid(start(kind, folder, moments, None), 0)[1]
    if status:
        raise RuntimeError(f"{kind} ended with status {status}")
    return json.loads(Path(f"{folder}.json").read_text())


def killed_run(kind: str, moments: str, total: float, shares: list[float], wanted: dict) -> dict:
    killed = bugs = 0
    with tempfile.TemporaryDirectory() as place:
        folder, left = os.path.join(place, "run"), total
        for share in shares:
            at, left = share * left, (1 - share) * left
            pid = start(kind, folder, moments, None if moments == "clock" else max(1, round(at)))
            if moments == "clock":
                time.sleep(at)
                os.kill(pid, signal.SIGKILL)
            bugs += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == BUG
            if Path(f"{folder}.json").exists():
                break
            killed += 1
        made = finish(kind, folder)["made"]
    differs = [name for name in wanted if made[name] != wanted[name]]
    return {"moments": shares, "killed": killed, "bugs": bugs, "differs": differs}


def kill(kind: str, count: int, moments: str, draw: Callable[[], float]) -> list[dict]:
    with tempfile.TemporaryDirectory() as place:
        finish(kind, os.path.join(place, "warm"))
        began = time.time()
        whole = finish(kind, os.path.join(place, "run"), moments)
        seconds = time.time() - began
    total = seconds if moments == "clock" else whole["moments"]
    return [killed_run(kind, moments, total, [draw(), draw()], whole["made"]) for _ in range(count)]


def main(kinds: dict[str, int], moments: str) -> dict:
    """moments: "calls", "on_disk", "clock" or "full"."""
    torch.set_num_threads(1)
    draw = random.Random(None if os.environ.get("FASTPPO_LONG") else 0)
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        write_inputs(Path(place))
        for kind in kinds:  # imports what the runs will need
            if " " not in kind:
                Classic(place) if kind == "classic" else build(kind, place)
        most = 1 if moments == "full" else 0.95  # a run that is killed at its very end has ended
        return {kind: kill(kind, count, moments, lambda: draw.uniform(0.02, most)) for kind, count in kinds.items()}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]), sys.argv[2])))
