"""PPOTrainer.save_checkpoint / load_checkpoint: a resumed run is bitwise the uninterrupted one; nothing unfit is loaded."""

import errno
import json
import logging
import os
import shutil

import golden_cases
import numpy as np
import pytest
import torch

import fastppo
from fastppo import PPOTrainer
from fastppo.checkpoint import CheckpointError

SAMPLE = {"do_sample": True, "top_k": 0.0, "top_p": 1.0, "min_length": -1, "pad_token_id": 0, "max_new_tokens": 6}
CASES = {
    "adam": {},
    "adaptive": {"config": {"target": 0.1, "horizon": 20, "use_score_scaling": True, "use_score_norm": True}},
    "lora": {"lora": True},
    "scheduler": {"scheduler": True},
    "sgd": {"sgd": True, "config": {"adap_kl_ctrl": False}},
    "padded": {"config": {"packed": False}},
    "gpt2": {"model": "gpt2"},  # tied embeddings, buffers
}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 14

    def __getitem__(self, i):
        return torch.tensor([1, 5 + i, 6])


def build(case: dict, **extra) -> PPOTrainer:
    """A trainer with a dataset of three batches and a bit, from the same weights every time."""
    made = golden_cases.trainer(fastppo, case, **extra)
    again = {"optimizer": None, "lr_scheduler": None}
    if case.get("scheduler") or case.get("sgd"):
        again["optimizer"] = made.optimizer.optimizer
    if case.get("scheduler"):
        again["lr_scheduler"] = made.lr_scheduler.scheduler
    return PPOTrainer(made.config, made.model, made.ref_model, made.tokenizer, Rows(), data_collator=list, **again)


def go_on(made: PPOTrainer, steps: int, after=lambda: None) -> list[dict]:
    """Train until `steps` steps are done in all, calling after() after each; statistics of the steps made here."""
    stats = []
    while True:
        for queries in made.dataloader:
            responses = made.generate(queries, return_prompt=False, **SAMPLE)
            noise = torch.randn(4) + float(np.random.rand())
            scores = [r.float().mean() / 50 + n for r, n in zip(responses, noise, strict=True)]
            stats.append(made.step(queries, responses, scores))
            after()
            if made._steps_done == steps:
                return stats


def weights(made) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.model.named_parameters()}


def same(a, b) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def numbers(stats: list[dict]) -> list[dict]:
    timeless = lambda name: not name.startswith(("time", "perf", "fastppo/")) and "mfu" not in name  # noqa: E731
    return [{k: np.asarray(v).tolist() for k, v in row.items() if timeless(k)} for row in stats]


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(name, tmp_path):
    straight = build(CASES[name])
    wanted = go_on(straight, 5)
    stopped = build(CASES[name])
    go_on(stopped, 2)  # in the middle of an epoch of three batches
    path = stopped.save_checkpoint(tmp_path)
    go_on(stopped, 3)  # what comes after the checkpoint is lost
    torch.manual_seed(123)
    np.random.seed(9)
    resumed = build(CASES[name])
    back = resumed.load_checkpoint(tmp_path)
    assert (back.step, back.path, back.passed_over, back.extra) == (2, str(path), [], None)
    got = go_on(resumed, 5)
    assert same(weights(straight), weights(resumed))
    assert numbers(got) == numbers(wanted[2:])
    moments = [
        (made.kl_ctl.value, made.running.mean, made.running.std, made.running.count) for made in (resumed, straight)
    ]
    assert moments[0] == moments[1]
    assert {p.suffix for p in path.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("steps", [1, 3, 4])  # in the first epoch; at its end; in the second
def test_every_row_comes_as_often_as_without_the_stop(steps, tmp_path):
    straight, orders = build({}), []
    for _ in range(3):
        orders += [torch.stack(batch).tolist() for batch in straight.dataloader]
    stopped, seen = build({}), []
    while len(seen) < steps:
        for batch in stopped.dataloader:
            seen.append(torch.stack(batch).tolist())
            stopped._steps_done += 1
            if len(seen) == steps:
                break
    stopped.save_checkpoint(tmp_path)
    resumed = build({})
    resumed.load_checkpoint(tmp_path)
    while len(seen) < len(orders):
        seen += [torch.stack(batch).tolist() for batch in resumed.dataloader]
    assert seen == orders and resumed.dataloader.epoch == 3 and len(resumed.dataloader) == 3


def test_lora_saves_adapters_and_head_and_names_the_base(tmp_path):
    made = build(CASES["lora"])
    made.model.pretrained_model.config._name_or_path = "some/base"
    path = made.save_checkpoint(tmp_path, extra={"note": [1, None]})
    from safetensors import safe_open

    with safe_open(path / "policy.safetensors", "pt") as file:
        assert all("lora_" in name or name.startswith("v_head") for name in file.keys())  # noqa: SIM118
    assert json.loads((path / "values.json").read_text())["base"] == "some/base"
    other = build(CASES["lora"])
    assert other.load_checkpoint(path).extra == {"note": [1, None]}
    with torch.no_grad():
        next(p for p in other.model.parameters() if not p.requires_grad).add_(1)
    with pytest.raises(CheckpointError, match="the model below the adapters is not the saved run's .some/base."):
        other.load_checkpoint(path)


def wrong(name: str) -> PPOTrainer:
    if name == "another model":
        return build({"model": "gpt2"})
    if name == "another optimizer":
        return build({"sgd": True})
    if name == "a scheduler":
        return build({"scheduler": True})
    if name == "a fixed controller":
        return build({"config": {"adap_kl_ctrl": False}})
    if name == "adapters":
        return build({"lora": True})
    made = build({})
    if name == "another reference":
        with torch.no_grad():
            next(made.ref_model.parameters()).add_(1)
    else:
        made.dataloader._sampler.data_source = [0] * 99
    return made


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("another model", "policy|reference"),
        ("another optimizer", "saved with the optimizer Adam, this run has SGD"),
        ("a scheduler", "had no lr_scheduler, this one has one"),
        ("a fixed controller", "set adap_kl_ctrl=True"),
        ("adapters", "build model and ref_model as the saved run did"),
        ("another reference", "the reference model is not the saved run's"),
        ("another dataset", "had 14 rows in the dataset, this one has 99"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_changed(name, words, tmp_path):
    saved = build({})
    go_on(saved, 1)
    saved.save_checkpoint(tmp_path)
    made = wrong(name)
    before, state = weights(made), torch.get_rng_state()
    with pytest.raises(CheckpointError, match=words):
        made.load_checkpoint(tmp_path)
    assert same(before, weights(made)) and torch.equal(state, torch.get_rng_state()) and made._steps_done == 0


def test_a_broken_newest_checkpoint_is_passed_over_and_said(tmp_path, caplog):
    made = build({})
    with pytest.raises(CheckpointError, match="no checkpoint that can be loaded"):
        made.load_checkpoint(tmp_path)
    assert made.load_checkpoint(tmp_path / "nowhere", missing_ok=True) is None
    for steps in (1, 2):
        go_on(made, steps)
        path = made.save_checkpoint(tmp_path)
    data = (path / "optimizer.safetensors").read_bytes()
    (path / "optimizer.safetensors").write_bytes(data[: len(data) // 2])
    resumed = build({})
    with caplog.at_level(logging.WARNING):
        back = resumed.load_checkpoint(tmp_path)
    assert back.step == 1 and "step-00000002" in back.passed_over[0] and "truncated or was changed" in caplog.text
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match="step-00000002.*truncated"):
        build({}).load_checkpoint(tmp_path, missing_ok=True)


@pytest.mark.parametrize("key", ["kind", "optimizer", "running", "counters", "random", "data", "kl"])
@pytest.mark.parametrize("value", [None, 3, {"tree": 1}])
def test_garbled_values_with_a_right_checksum_change_nothing(key, value, tmp_path):
    import hashlib

    made = build({})
    path = made.save_checkpoint(tmp_path)
    values = json.loads((path / "values.json").read_text())
    values[key] = value
    text = json.dumps(values).encode()
    (path / "values.json").write_bytes(text)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["values.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    if key == "data" and value is None:
        made.load_checkpoint(path)  # what a run whose sampler is not ours saves
        return
    with pytest.raises(CheckpointError, match="step-00000000"):
        made.load_checkpoint(path)


def test_changed_settings_are_told(tmp_path, caplog):
    build({}).save_checkpoint(tmp_path)
    with caplog.at_level(logging.WARNING):
        build({}, ppo_epochs=3).load_checkpoint(tmp_path)
    assert "ppo_epochs 2 -> 3" in caplog.text


def test_going_back_sets_the_later_steps_aside(tmp_path):
    made = build({})
    paths = []
    for steps in (1, 2, 3):
        go_on(made, steps)
        paths.append(made.save_checkpoint(tmp_path))
    resumed = build({})
    assert resumed.load_checkpoint(paths[0]).step == 1
    go_on(resumed, 2)
    resumed.save_checkpoint(tmp_path, keep=1)
    assert build({}).load_checkpoint(tmp_path).step == 2
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000002", *(f"set-aside-step-0000000{i}" for i in (2, 3))}


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_full_disk_keeps_the_last_checkpoint(after, tmp_path, monkeypatch):
    made = build({})
    made.save_checkpoint(tmp_path)
    go_on(made, 1)
    real, calls = os.fsync, []

    def fills(handle):
        calls.append(1)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fills)
    with pytest.raises(CheckpointError, match="No space left on device"):
        made.save_checkpoint(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000000"]
    assert build({}).load_checkpoint(tmp_path).step == 0
