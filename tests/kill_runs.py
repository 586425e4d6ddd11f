"""kill -9 at random moments of SFT, reward, late and classic PPO runs, start again the same way, compare the final weights.

A process of its own that never trains itself: it forks each run, so that a run costs no imports.
Prints one JSON object: kind -> list of {"killed_after": seconds, "killed": bool, "equal": bool}.
"""

import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from datasets import Dataset
from sft_cases import make_model, make_tokenizer, rows

from fastppo import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from fastppo.experimental.ppo import PPOConfig, PPOTrainer

CLASSIC_STEPS = 12

COMMON = dict(
    use_cpu=True, report_to="none", save_strategy="steps", save_steps=1, save_total_limit=2, disable_tqdm=True
)
COMMON |= dict(per_device_train_batch_size=4, learning_rate=1e-2, seed=7)


def words(prompts, completions):
    return [float(len(set(text.split()))) for text in completions]


def build(kind: str, folder: str):
    if kind == "ppo":
        data = Dataset.from_list([{"text": row["text"]} for row in rows("text")])
        options = dict(total_episodes=40, response_length=5, num_sample_generations=0, num_mini_batches=2)
        args = PPOConfig(output_dir=folder, **COMMON, **options)
        models = dict(model=make_model(), ref_model=None, reward_model=words, value_model=make_model("reward", 1))
        return PPOTrainer(args=args, processing_class=make_tokenizer(), train_dataset=data, **models)
    config, trainer = (SFTConfig, SFTTrainer) if kind == "sft" else (RewardConfig, RewardTrainer)
    args = config(output_dir=folder, max_steps=12, gradient_accumulation_steps=2, **COMMON)
    model = make_model("causal" if kind == "sft" else "reward")
    data = Dataset.from_list(rows("text" if kind == "sft" else "pairs"))
    return trainer(model=model, args=args, train_dataset=data, processing_class=make_tokenizer())


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


def child(kind: str, folder: str) -> None:
    run = Classic(folder) if kind == "classic" else build(kind, folder)
    run.train(resume_from_checkpoint="auto")
    digest = hashlib.sha256()
    for parameter in run.model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    Path(folder, "digest").write_text(digest.hexdigest())


def start(kind: str, folder: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    status = 1
    try:
        child(kind, folder)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def finish(kind: str, folder: str) -> str:
    status = os.waitpid(start(kind, folder), 0)[1]
    if status:
        raise RuntimeError(f"{kind} ended with status {status}")
    return Path(folder, "digest").read_text()


def main(moments: dict[str, int]) -> dict:
    torch.set_num_threads(1)
    draw, report = random.Random(), {}
    for kind, count in moments.items():
        with tempfile.TemporaryDirectory() as folder:
            # imports what the runs will need
            Classic(folder) if kind == "classic" else build(kind, folder)
        with tempfile.TemporaryDirectory() as folder:
            began = time.time()
            wanted = finish(kind, folder)
            seconds = time.time() - began
        report[kind] = []
        for _ in range(count):
            with tempfile.TemporaryDirectory() as folder:
                delay = seconds * draw.uniform(0.1, 0.9)
                pid = start(kind, folder)
                time.sleep(delay)
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                killed = not Path(folder, "digest").exists()
                equal = finish(kind, folder) == wanted
                report[kind].append({"killed_after": round(delay, 3), "killed": killed, "equal": equal})
    return report


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
