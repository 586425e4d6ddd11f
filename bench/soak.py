"""A long PPO run with faults on the way, beside the same run without: both must end with the same weights, bit for bit.

python -m bench.soak --model MODEL --steps 500 --kills 10 --folder OUT [--seconds 400]

Faults, at random steps: the reward raises (the process ends and is started again), NaN scores and empty responses (the step
refuses them and is done again), kill -9 (`--kills` times). Every fourteenth step has one response without a token, in both runs.
Each start is a fork that goes on from the newest checkpoint. OUT/rows.jsonl has a line per step of the faulty run, OUT/report.json
what came of it. --seconds: stop after so long; the same command goes on.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
from tqdm import tqdm

BATCH, TOKENS = 16, 24
KINDS = ("raise", "nan", "empty")


def plan(steps: int, seed: int) -> dict[int, str]:
    """step -> fault; one step in 25, all kinds."""
    rng = random.Random(seed)
    chosen = rng.sample(range(2, steps + 1), max(len(KINDS), steps // 25))
    return {step: KINDS[i % len(KINDS)] for i, step in enumerate(chosen)}


def trainer(model: str):
    import warnings

    from transformers import AutoTokenizer

    from fastppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
    from fastppo.core import set_seed

    set_seed(1)  # before the value head, whose weights start at random
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(model)
    config = PPOConfig(
        seed=1, batch_size=BATCH, mini_batch_size=BATCH // 2, ppo_epochs=2, learning_rate=2e-4, init_kl_coef=0.05,
        use_score_scaling=True, use_score_norm=True, max_grad_norm=1.0,
    )  # fmt: skip
    vocabulary = policy.config.vocab_size
    data = [torch.tensor([1, 3 + (7 * i) % (vocabulary - 3)]) for i in range(101)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PPOTrainer(config, policy, None, tokenizer, Rows(data), data_collator=list)


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def reward(responses) -> list[torch.Tensor]:
    """Share of tokens that are a multiple of three: smooth, and the model can learn it."""
    return [(r % 3 == 0).float().mean() if len(r) else torch.tensor(0.0) for r in responses]


class Worker:
    """One start of the run in `folder`. faults: step -> kind; each happens once, whatever is done again."""

    def __init__(self, model: str, folder: Path, faults: dict[int, str]):
        self.folder, self.faults = folder, faults
        self.made = trainer(model)
        self.resumed = self.made.load_checkpoint(folder / "checkpoints", missing_ok=True)
        rows = [] if self.resumed is None else read(folder)[: self.resumed.step]
        temporary = folder / ".rows"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(temporary, folder / "rows.jsonl")

    def due(self, step: int) -> str | None:
        return None if (self.folder / f"fault-{step}").exists() else self.faults.get(step)

    def happened(self, step: int, kind: str) -> None:
        """Told outside the rows: a kill right after the fault takes the step's row, and the step is done without the fault."""
        mark = self.folder / f".fault-{step}"
        mark.write_text(kind)
        os.replace(mark, self.folder / f"fault-{step}")

    def run(self, steps: int, until: float) -> None:
        with (self.folder / "rows.jsonl").open("a") as rows:
            while self.made._steps_done < steps:
                for queries in self.made.dataloader:
                    row = self.step(queries)
                    rows.write(
                        json.dumps(row) + "\n"
                    )  # before the checkpoint: a step that is done again has two rows, none is lost
                    rows.flush()
                    self.made.save_checkpoint(self.folder / "checkpoints", keep=2)
                    if self.made._steps_done == steps:
                        break
                    if time.time() > until:
                        return
        digest = hashlib.sha256()
        for parameter in self.made.model.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        (self.folder / "digest").write_text(digest.hexdigest())

    def step(self, queries) -> dict:
        made, number = self.made, self.made._steps_done + 1
        started, sample = time.perf_counter(), {"do_sample": True, "max_new_tokens": TOKENS, "batch_size": BATCH}
        responses = made.generate(queries, return_prompt=False, **sample)
        made._generator(made.model).block_manager.check([])  # every page came back
        if number % 14 == 0:
            responses[number % BATCH] = responses[number % BATCH][:0]
        fault = self.due(number)
        if fault == "raise":
            self.happened(number, fault)
            raise LookupError("the reward's server is gone")
        scores = reward(responses)
        if fault == "nan":
            self.refused(FloatingPointError, queries, responses, [*scores[1:], torch.tensor(float("nan"))])
        if fault == "empty":
            self.refused(ValueError, queries, [r[:0] for r in responses], scores)
        if fault:
            self.happened(number, fault)
        stats = made.step(queries, responses, scores)
        return {
            "step": number,
            "reward": float(torch.stack(scores).mean()),
            "kl": stats["objective/kl"],
            "kl_coef": stats["objective/kl_coef"],
            "seconds": time.perf_counter() - started,
            "rss_mib": rss(),
            "files": len(os.listdir("/proc/self/fd")),
            "fault": fault,
        }

    def refused(self, error: type[Exception], *batch) -> None:
        try:
            self.made.step(*batch)
        except error:
            return
        raise AssertionError(f"step() took what it must refuse with {error.__name__}")


def rss() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def read(folder: Path) -> list[dict]:
    """One row per step, the last of those done again. Whole lines only: the last one may be cut off by a kill."""
    path = folder / "rows.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return list({row["step"]: row for row in rows}.values())


def start(model: str, folder: Path, faults: dict[int, str], steps: int, until: float) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        Worker(model, folder, faults).run(steps, until)
        status = 0
    except LookupError:
        status = 3
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def go(model: str, folder: Path, faults: dict[int, str], kills: list[int], steps: int, until: float) -> dict | None:
    """Start again until it ends; None when the time is up first. kills: steps after which kill -9 comes, at any moment."""
    folder.mkdir(parents=True, exist_ok=True)
    state_file, rng = folder / "starts.json", random.Random(time.time())
    told = json.loads(state_file.read_text()) if state_file.exists() else {"starts": 0, "killed": []}
    while not (folder / "digest").exists():
        if time.time() > until:
            return None
        told["starts"] += 1
        pid, left = start(model, folder, faults, steps, until), kills[len(told["killed"]) :]
        done, status = 0, 0
        while not done:
            if left and len(rows := read(folder)) >= left[0]:
                time.sleep(rng.uniform(0, 1.5 * rows[-1]["seconds"]))
                os.kill(pid, signal.SIGKILL)
                left = []
            done, status = os.waitpid(pid, os.WNOHANG)
            time.sleep(0.005)
        if os.WIFSIGNALED(status):
            told["killed"].append(len(read(folder)))
        elif os.WEXITSTATUS(status) not in (0, 3):
            raise RuntimeError(f"a worker ended with status {os.WEXITSTATUS(status)}")
        state_file.write_text(json.dumps(told))
    return told


def report(folder: Path, told: dict, steps: int) -> dict:
    faulty, straight = (read(folder / name) for name in ("faulty", "straight"))
    numbers = [[(row["step"], row["reward"], row["kl"], row["kl_coef"]) for row in rows] for rows in (faulty, straight)]
    happened = [mark.read_text() for mark in (folder / "faulty").glob("fault-*")]
    later = [row["rss_mib"] for row in straight[len(straight) // 5 :]]
    found = {
        "steps": steps,
        "starts": told["starts"],
        "killed_after_step": told["killed"],
        "reward_raised": happened.count("raise"),
        "nan_scores": happened.count("nan"),
        "empty_batches": happened.count("empty"),
        "same_weights": (folder / "faulty/digest").read_text() == (folder / "straight/digest").read_text(),
        "same_curve": numbers[0] == numbers[1],
        "reward_first_last": [sum(r["reward"] for r in part) / len(part) for part in (faulty[:20], faulty[-20:])],
        "rss_mib_at_a_fifth_and_most_later": [later[0], max(later)],
        "open_files_first_last": [straight[0]["files"], straight[-1]["files"]],
        "left_behind": sorted(
            p.name for p in (folder / "faulty/checkpoints").iterdir() if not p.name.startswith("step-")
        ),
        "checkpoints": len(list((folder / "faulty/checkpoints").glob("step-*"))),
        "seconds_per_step": sorted(row["seconds"] for row in straight)[len(straight) // 2],
    }
    (folder / "report.json").write_text(json.dumps(found, indent=1))
    return found


def draw(folder: Path, told: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, straight = read(folder / "faulty"), read(folder / "straight")
    figure, axes = pyplot.subplots(3, 1, figsize=(9, 8), sharex=True, layout="constrained")
    for axis, key, label in zip(
        axes, ("reward", "kl", "rss_mib"), ("reward", "KL (nats)", "memory (MiB)"), strict=True
    ):
        axis.plot([r["step"] for r in straight], [r[key] for r in straight], lw=3, alpha=0.4, label="undisturbed")
        axis.plot([r["step"] for r in rows], [r[key] for r in rows], lw=0.8, color="black", label="with faults")
        axis.set_ylabel(label)
    for step in told["killed"]:
        axes[0].axvline(step, color="red", lw=0.6)
    for row in rows:
        if row["fault"]:
            axes[0].plot(row["step"], row["reward"], "x", color="tab:orange")
    axes[0].legend(loc="lower right")
    axes[0].set_title("Red: kill -9 and resume. Orange: NaN scores or empty responses refused.")
    axes[-1].set_xlabel("PPO step")
    figure.savefig(folder / "soak.png", dpi=90)


def main(argv: list[str] | None = None) -> dict | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--fresh", action="store_true", help="delete what is in --folder first")
    options = parser.parse_args(argv)
    if options.fresh:
        shutil.rmtree(options.folder, ignore_errors=True)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that forks share: a kill could leave it locked for all
    trainer(options.model)  # imports what the forks need; this process never trains
    until = time.time() + options.seconds
    faults = plan(options.steps, options.seed)
    kills = sorted(random.Random(options.seed + 1).sample(range(1, options.steps - 2), options.kills))
    told = go(options.model, options.folder / "faulty", faults, kills, options.steps, until)
    if told is None or go(options.model, options.folder / "straight", {}, [], options.steps, until) is None:
        print("time is up; the same command goes on")
        return None
    found = report(options.folder, told, options.steps)
    draw(options.folder, told)
    print(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main()
