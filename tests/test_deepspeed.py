"""DeepSpeed: what fastppo asks of it, by a stand-in; and where it is installed, ZeRO 2 and 3 on two processes against DDP."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_distributed import LIMIT_SECONDS, ends, start
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
        ({}, (0.5, 4)),
        ({"gradient_clipping": "auto", "train_micro_batch_size_per_gpu": "auto"}, (0.5, 4)),
        ({"gradient_clipping": 2.0, "train_micro_batch_size_per_gpu": 1}, (2.0, 1)),
    ],
)
def test_what_deepspeeds_configuration_leaves_open_is_the_trainers(given, wanted):
    config = SimpleNamespace(max_grad_norm=0.5, mini_batch_size=4)
    trainer = SimpleNamespace(accelerator=accelerator(**given), config=config)
    setup.complete_deepspeed_config(trainer)
    made = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    assert (made["gradient_clipping"], made["train_micro_batch_size_per_gpu"]) == wanted
    config.max_grad_norm = None  # never clips
    trainer.accelerator = accelerator()
    setup.complete_deepspeed_config(trainer)
    assert trainer.accelerator.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] == 0.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """DDP's result, ZeRO's beside it."""
    folder = tmp_path_factory.mktemp("deepspeed")
    run(folder, 0)
    return folder


def run(folder: Path, stage: int) -> None:
    for status, output in ends(start(2, str(folder), str(stage), worker="deepspeed_worker.py"), LIMIT_SECONDS):
        assert status == 0, output


@pytest.mark.skipif(
    not importlib.util.find_spec("deepspeed"),
    reason="deepspeed is not installed (DS_BUILD_OPS=0 pip install deepspeed)",
)
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_gives_the_result_of_ddp(folder, stage):
    run(folder, stage)
    for rank in range(2):
        plain, sharded = (load_file(folder / f"{kind}.{rank}.safetensors") for kind in (0, stage))
        assert plain.keys() == sharded.keys()
        assert any("objective/kl" in name and abs(x) > 0.1 for name, x in plain.items() if x.dim() == 0)
        for name, x in plain.items():
            torch.testing.assert_close(sharded[name], x, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    AutoModelForCausalLM.from_pretrained(folder / f"policy{stage}")
