"""Checkpoints of SFTTrainer, RewardTrainer and the late PPOTrainer: no pickle, whole or not there, checked, safe on a full disk."""

import errno
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from saving_cases import build
from sft_cases import make_model

from fastppo import manifest
from fastppo.disk import CheckpointError
from fastppo.run_folder import resolve
from fastppo.trainer_checkpoints import read

KINDS = ("sft", "reward", "ppo")
STEPS = {"sft": dict(max_steps=4), "reward": dict(max_steps=4), "ppo": dict(total_episodes=16)}


def make(kind: str, folder, **options):
    return build(kind, str(folder), **{**STEPS[kind], "save_total_limit": 3, **options})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """kind -> (a trainer that was never stopped, its folder with checkpoints of steps 2 to 4, generators at its end)."""
    made = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        trainer = make(kind, folder)
        trainer.train()
        made[kind] = trainer, folder, torch.get_rng_state()
    return made


@pytest.fixture
def copied(whole, tmp_path, request):
    """A copy of the SFT run's folder, to damage."""
    folder = tmp_path / "run"
    shutil.copytree(whole["sft"][1], folder)
    return folder


def same(one, two) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("kind", "optim"), [("sft", "adafactor"), ("ppo", "adafactor"), ("reward", "rmsprop"), ("sft", "adagrad")]
)
def test_a_run_with_another_optimizer_goes_on_bitwise(kind, optim, tmp_path):
    """Adafactor's state has other shapes than its parameters: rows' and columns' means."""
    whole = make(kind, tmp_path, optim=optim)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    again = make(kind, tmp_path, optim=optim)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == whole.state.global_step and same(whole, again)
    assert not [name for name, p in again.model.named_parameters() if not torch.isfinite(p).all()]


class Odd(torch.optim.SGD):
    """State that no checkpoint can hold: in its settings, or made by its first step."""

    def __init__(self, parameters, at_start: bool):
        super().__init__(parameters, lr=1e-3)
        self.at_start = at_start
        if at_start:
            self.param_groups[0]["signal"] = len

    def step(self, closure=None):
        done = super().step(closure)
        if not self.at_start:
            self.state[self.param_groups[0]["params"][0]]["seen"] = {1, 2}
        return done


@pytest.mark.parametrize(
    ("at_start", "wanted"), [(True, "'param_groups.0.signal' is a builtin"), (False, "'state.0.seen' is a set")]
)
def test_an_optimizer_that_no_checkpoint_holds_is_named_at_the_start(at_start, wanted, tmp_path):
    def run(**options):
        trainer = make("sft", tmp_path, save_steps=3, **options)
        trainer.optimizer = Odd(trainer.model.parameters(), at_start)
        trainer.train()
        return trainer

    # torch then calls an optimizer's hooks within the subclass's step too
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    with pytest.raises(CheckpointError, match=rf"Odd: its state {wanted}.*--save-only-model"):
        run()
    assert not list(tmp_path.glob("checkpoint-*"))
    assert run(save_only_model=True).state.global_step == 4


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_and_json_only(whole, kind):
    _, folder, _ = whole[kind]
    assert sorted(path.name for path in folder.glob("*checkpoint-*")) == [f"checkpoint-{i}" for i in (2, 3, 4)]
    files = {path.name for path in (folder / "checkpoint-4").rglob("*") if path.is_file()}
    assert {Path(name).suffix for name in files} <= {".safetensors", ".json", ".jinja", ".md"}
    assert {"optimizer.safetensors", "random.safetensors", "resume.json", "trainer_state.json"} < files
    listed = json.loads((folder / "checkpoint-4/manifest.json").read_text())["files"]
    assert {*listed, "manifest.json"} == files
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_newest_one_is_passed_over_and_the_end_is_the_same(whole, kind, tmp_path, caplog):
    trainer, folder, generators = whole[kind]
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    for step, name in ((4, "optimizer.safetensors"), (3, "trainer_state.json")):
        path = copy / f"checkpoint-{step}" / name
        path.write_bytes(path.read_bytes()[:-5])
    torch.manual_seed(99)
    again = make(kind, copy)
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint="auto")
    assert same(trainer, again) and torch.equal(torch.get_rng_state(), generators)
    assert [Path(x.split(": ")[0]).parts[-2] for x in again.passed_over] == ["checkpoint-4", "checkpoint-3"]
    assert caplog.text.count("truncated or was changed") == 2
    names = {path.name for path in copy.glob("*checkpoint-*")}
    assert names == {"checkpoint-2", "checkpoint-3", "checkpoint-4", "set-aside-checkpoint-3", "set-aside-checkpoint-4"}


FILES = ["model.safetensors", "config.json", "tokenizer.json", "optimizer.safetensors", "random.safetensors"]
FILES += ["resume.json", "trainer_state.json", "scheduler.safetensors", "training_args.json"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
@pytest.mark.parametrize("name", FILES)
def test_damage_to_each_file_is_found(copied, name, damage):
    path = copied / "checkpoint-4" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=f"{name}: (the file is missing|.*truncated or was changed)"):
        resolve(copied, str(path.parent))
    chosen, passed_over = resolve(copied, True)
    assert chosen == str(copied / "checkpoint-3") and name in passed_over[0] and path.parent.is_dir()


@pytest.mark.parametrize("damage", ["no manifest", "no JSON", "version", "a file more", "no table"])
def test_damage_to_the_manifest_is_found(copied, damage):
    path = copied / "checkpoint-4/manifest.json"
    table = json.loads(path.read_text())
    if damage == "no manifest":
        path.unlink()
    elif damage == "a file more":
        (path.parent / "optimizer.pt").write_bytes(b"a pickle")
    else:
        told = {"no JSON": "[1", "version": json.dumps(table | {"format_version": 9}), "no table": "{}"}[damage]
        path.write_text(told)
    chosen, passed_over = resolve(copied, "auto")
    assert chosen == str(copied / "checkpoint-3") and len(passed_over) == 1 and "checkpoint-4" in passed_over[0]


def test_none_that_is_whole_is_no_fresh_start(copied):
    for step in (2, 3, 4):
        (copied / f"checkpoint-{step}/manifest.json").unlink()
    with pytest.raises(
        CheckpointError, match="no checkpoint that can be loaded.*checkpoint-2.*start anew, remove them"
    ):
        make("sft", copied).train(resume_from_checkpoint="auto")


def seal(folder: Path) -> None:
    """Make the manifest right again, as one who tampers would."""
    (folder / "manifest.json").unlink()
    manifest.write(folder, 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "key", ["kind", "parameters", "optimizer", "scheduler", "random", "processes", "frozen", "threads"]
)
def test_garbled_values_with_a_right_checksum_start_nothing(whole, kind, key, tmp_path):
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(whole[kind][1] / "checkpoint-4", folder)
    values = json.loads((folder / "resume.json").read_text())
    values[key] = {"tree": 1}
    (folder / "resume.json").write_text(json.dumps(values))
    seal(folder)
    trainer = make(kind, tmp_path / "out", **({"total_episodes": 20} if kind == "ppo" else {"max_steps": 5}))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    if key == "processes":  # another number of them goes on, with generators of its own
        assert read(folder).values["processes"] == {"tree": 1}
        return
    with pytest.raises(CheckpointError, match="checkpoint-4: "):
        trainer.train(resume_from_checkpoint=str(folder))
    assert trainer.state.global_step in (0, 4), "no step was trained"
    if key in ("kind", "parameters", "frozen"):
        assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def another(kind: str, folder: Path, monkeypatch):
    import saving_cases

    if kind == "sgd":
        return make("sft", folder, optim="sgd")
    if kind == "classifier":
        trainer = make("reward", folder)
        trainer.checkpoint_kind = "sft"
        return trainer
    model = make_model()
    model = model.bfloat16() if kind == "half" else model
    if kind == "wider":
        model.resize_token_embeddings(41)
    monkeypatch.setattr(saving_cases, "make_model", lambda _: model)
    return make("sft", folder)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("sgd", "saved with the optimizer AdamW.*, this run has SGD"),
        ("wider", "'model.embed_tokens.weight' was torch.float32 .40, 32., this run's is torch.float32 .41, 32."),
        ("half", "this run's is torch.bfloat16"),
        ("classifier", "lacks the parameter 'lm_head.weight'"),
    ],
)
def test_another_run_is_named(whole, tmp_path, kind, words, monkeypatch):
    trainer = another(kind, tmp_path, monkeypatch)
    with pytest.raises(CheckpointError, match=words):
        trainer.train(resume_from_checkpoint=str(whole["sft"][1] / "checkpoint-3"))


def test_another_trainers_checkpoint_is_named(whole, tmp_path):
    with pytest.raises(CheckpointError, match="saved by a trainer of kind 'sft', this is 'reward'"):
        make("reward", tmp_path).train(resume_from_checkpoint=str(whole["sft"][1] / "checkpoint-3"))


def test_another_base_below_an_adapter_is_named(tmp_path):
    from late_cases import trainer
    from peft import LoraConfig

    def made(seed: int):
        adapter = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear")
        more = dict(save_strategy="steps", save_steps=1, peft_config=adapter, value=False)
        return trainer(tmp_path, policy=make_model(seed=seed), **more)

    made(0).train()
    with pytest.raises(CheckpointError, match="the model below the adapters is not the saved run's"):
        made(1).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_transformers_is_taken_when_it_is_named(tmp_path, caplog):
    from transformers import Trainer

    first = make("sft", tmp_path)
    plain = {name: getattr(Trainer, name) for name in ("_save", "_save_checkpoint")}
    for name, function in plain.items():
        setattr(first, name, function.__get__(first))
    first.train()
    assert (tmp_path / "checkpoint-2/optimizer.pt").is_file()
    with pytest.raises(CheckpointError, match="checkpoint-2/manifest.json: No such file"):
        make("sft", tmp_path).train(resume_from_checkpoint="auto")
    again = make("sft", tmp_path / "again")
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "was not written by fastppo: it cannot be checked" in caplog.text
    whole = make("sft", tmp_path / "whole")
    whole.train()
    assert same(whole, again)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("after", [0, 5])
def test_a_full_disk_ends_the_run_and_keeps_what_was_saved(kind, after, tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def fills(handle):
        calls.append((tmp_path / ".writing-checkpoint-3").exists())
        if sum(calls) > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fills)
    with pytest.raises(
        CheckpointError, match="checkpoint-3 could not be written: No space left.*Older checkpoints are unt"
    ):
        make(kind, tmp_path).train()
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir() if "checkpoint" in path.name) == [
        "checkpoint-1",
        "checkpoint-2",
    ]
    assert resolve(tmp_path, True) == (str(tmp_path / "checkpoint-2"), [])


def test_the_best_and_the_newest_are_kept(tmp_path):
    from fastppo.run_folder import remove_old

    for step in range(1, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text("{}")
    remove_old(tmp_path, 2, tmp_path / "checkpoint-1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-5"]
    remove_old(tmp_path, 1, tmp_path / "checkpoint-1")
    remove_old(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 2
    remove_old(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    """Of three evaluations the first has the highest loss, "best" here: its checkpoint stays, its weights come back."""
    from safetensors.torch import load_file

    options = dict(eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss")
    options |= dict(greater_is_better=True)
    trainer = make("sft", tmp_path, save_total_limit=2, evaluate=True, **options)
    trainer.train()
    state = trainer.state
    assert state.best_global_step == 1 and Path(state.best_model_checkpoint).name == "checkpoint-1"
    saved = load_file(tmp_path / "checkpoint-1/model.safetensors")
    assert all(torch.equal(saved[name], p) for name, p in trainer.model.named_parameters())
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-4"}
