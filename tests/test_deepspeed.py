"""DeepSpeed: what fastppo asks of it, by a stand-in; and where it is installed, ZeRO 2 and 3 on two processes against one."""

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_distributed import (
    CLASSIC,
    CONFIGURED,
    LATE,
    LIMIT_SECONDS,
    RESUMED,
    SUPERVISED,
    SUPERVISED_RESUMED,
    ends,
    launched,
    nothing_pickled,
    results,
    same_as_one,
    start,
)
from transformers import AutoModelForCausalLM

from fastppo.trainer import setup


class Engine:
    """Like DeepSpeed's, whose eval() returns nothing."""

    def __init__(self, model, config):
        self.module, self.config, self.training = model, config, True

    def eval(self):
        self.training = False


def accelerator(**options):
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 2}} | options)
    return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))


def test_the_reference_is_an_engine_that_only_reads(monkeypatch):
    stand_in = SimpleNamespace(initialize=lambda model, config: (Engine(model, config), None, None, None))
    monkeypatch.setitem(sys.modules, "deepspeed", stand_in)
    model, given = SimpleNamespace(config=SimpleNamespace(hidden_size=8)), accelerator()
    engine = setup.prepare_deepspeed(given, model)
    assert engine.module is model and not engine.training
    assert engine.config["zero_optimization"]["stage"] == 0  # a frozen model has no optimizer to share out
    assert given.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    "given, wanted",
    [
        ({}, (0.5, 4, 2)),
        ({"gradient_clipping": "auto", "train_micro_batch_size_per_gpu": "auto"}, (0.5, 4, 2)),
        (
            {"gradient_clipping": 2.0, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1},
            (2.0, 1, 2),
        ),
    ],
)
def test_what_deepspeeds_configuration_leaves_open_is_the_trainers(given, wanted):
    config = SimpleNamespace(max_grad_norm=0.5, mini_batch_size=4, gradient_accumulation_steps=2)
    trainer = SimpleNamespace(accelerator=accelerator(**given), config=config)
    setup.complete_deepspeed_config(trainer)
    made = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    names = ("gradient_clipping", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert tuple(made[name] for name in names) == wanted
    config.max_grad_norm = None  # never clips
    trainer.accelerator = accelerator()
    setup.complete_deepspeed_config(trainer)
    assert trainer.accelerator.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] == 0.0


# --- ZeRO on two processes, where deepspeed is installed ----------------------------------------------------------------

needs_deepspeed = pytest.mark.skipif(
    not importlib.util.find_spec("deepspeed"),
    reason="deepspeed is not installed (DS_BUILD_OPS=0 pip install deepspeed)",
)
# one launch for all; under ZeRO-3 one for each: transformers shards every model that is made after the first run's
ZERO2 = [*CLASSIC, *RESUMED, *LATE, *SUPERVISED, *SUPERVISED_RESUMED]
ZERO3 = ["plain", "lora", "padded", "rollout", "fewer", "skipped", *RESUMED, *LATE, *SUPERVISED, *SUPERVISED_RESUMED]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("deepspeed")


def run(path: Path, stage: int, cases: list[str]) -> Path:
    """The cases on two processes; returns where the results are."""
    path.mkdir(exist_ok=True)
    for status, output in ends(start(2, str(path), ",".join(cases), f"zero{stage}"), LIMIT_SECONDS):
        assert status == 0, output[-4000:]
    return path


@cache
def zero2(folder: Path) -> Path:
    return run(folder / "zero2", 2, ZERO2)


@needs_deepspeed
@pytest.mark.parametrize("case", ZERO2)
def test_zero_2_gives_the_result_of_one_process(folder, case):
    same_as_one(results("one", folder), zero2(folder), case, 2)


@needs_deepspeed
def test_zero_1_gives_the_result_of_one_process_and_goes_on_bitwise(folder):
    done = run(folder / "zero1", 1, cases := ["resume", "late_resume", "sft_resume"])
    for case in cases:
        same_as_one(results("one", folder), done, case, 2)


@needs_deepspeed
@pytest.mark.parametrize("case", ZERO3)
def test_zero_3_gives_the_result_of_one_process(folder, case):
    done = run(folder / "zero3", 3, [case])
    same_as_one(results("one", folder), done, case, 2)
    if case in SUPERVISED_RESUMED:
        nothing_pickled(done / case, 2)
    if case == "plain":
        policy_loads(done / "plain-policy", load_file(done / "plain.0.safetensors"))


@needs_deepspeed
def test_a_policy_saved_under_zero_2_is_whole(folder):
    done = zero2(folder)
    policy_loads(done / "plain-policy", load_file(done / "plain.0.safetensors"))


@needs_deepspeed
def test_checkpoints_under_zero_2_hold_no_pickle(folder):
    nothing_pickled(zero2(folder), 12)


def policy_loads(path: Path, trained: dict[str, torch.Tensor]) -> None:
    """transformers alone reads the trained policy, which is not the reference any more."""
    logs = json.loads((path.parent / "plain.0.json").read_text())
    assert abs(logs[1]["objective/kl"]) > 0.01
    for name, found in AutoModelForCausalLM.from_pretrained(path).named_parameters():
        assert torch.equal(found, trained[f"pretrained_model.{name}"]), name


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_nan_gradients_never_reach_the_weights(folder, stage):
    """on_nonfinite="stop": all processes raise, and hold the weights of the update before."""
    started = start(2, str(folder), "nan_stops", f"zero{stage}")
    for status, output in ends(started, LIMIT_SECONDS):
        assert status == 0, output[-4000:]
        assert "NonFinite: PPOTrainer.step: gradient norm is nan" in output and "weights as before: True" in output


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_accelerate_launch_with_the_example_configurations(folder, tmp_path, stage):
    launched(
        [*CONFIGURED, f"examples/accelerate/deepspeed_zero{stage}.yaml", "--main_process_port", "0"],
        tmp_path,
        ["plain", "late"],
    )
    for case in ("plain", "late"):
        same_as_one(results("one", folder), tmp_path, case, 2)
