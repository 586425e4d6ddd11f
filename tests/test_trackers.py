"""wandb and trackio, played by small modules that record what accelerate's trackers call them with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# what both libraries have in common, as far as accelerate uses it; trackio warns of every value that is no number
FAKE = """
import json, os, warnings

def note(what, values):
    kinds = {name: type(value).__name__ for name, value in values.items()}
    numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
    with open(os.environ["TRACKED"], "a") as file:
        file.write(json.dumps([__name__, what, kinds, numbers]) + "\\n")

class Config:
    def update(self, values, allow_val_change=False):
        note("config", values)

class Run:
    def log(self, values, step=None, **kwargs):
        if __name__ == "trackio" and any(type(value).__name__ == "ndarray" for value in values.values()):
            warnings.warn("trackio.log() skipped a metric")
        note("log", values)
    def finish(self):
        note("finish", {})

class Table:
    def __init__(self, columns, rows):
        self.columns, self.rows = columns, rows

config, run = Config(), Run()

def init(project=None, **kwargs):
    note("init", {project: 0, **kwargs})
    return run
"""
STEPS = """
import sys, warnings
warnings.filterwarnings("error", "trackio")
import fastppo
from golden_cases import batches, trainer

made = trainer(fastppo, {"config": {"log_with": sys.argv[1], "tracker_project_name": "stories"}})
queries, responses, scores, _ = next(batches({}, 1))
for _ in range(2):
    stats = made.step(queries, responses, scores)
    made.log_stats(stats, {"query": list("abcd"), "response": list("efgh")}, scores)
made.accelerator.end_training()
"""


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_settings_and_the_numbers_of_every_step(tmp_path, name):
    (tmp_path / f"{name}.py").write_text(FAKE)
    (tmp_path / f"{name}-1.0.dist-info").mkdir()
    (tmp_path / f"{name}-1.0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    here = Path(__file__).parent
    paths = os.pathsep.join([str(tmp_path), str(here), str(here.parent)])
    environment = os.environ | {"PYTHONPATH": paths, "TRACKED": str(tmp_path / "calls"), "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STEPS, name], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert [(who, what) for who, what, _, _ in calls] == [
        (name, what) for what in ("init", "config", "log", "log", "finish")
    ]
    assert list(calls[0][2]) == ["stories"] and list(calls[1][2]) == ["trl_ppo_trainer_config"]
    for _, _, kinds, numbers in calls[2:4]:
        assert numbers["objective/kl_coef"] > 0 and "env/reward_mean" in numbers and "ppo/loss/total" in kinds
        assert ("game_log" in kinds) == (name == "wandb")
        assert name == "wandb" or set(kinds.values()) <= {"float", "int", "float32", "float64"}
