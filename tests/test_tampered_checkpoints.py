"""What a hostile or unlucky hand does to checkpoints: nothing changed is loaded, nothing good is deleted, nothing hangs."""

import hashlib
import json
import os
import shutil

import pytest
import torch
from test_resume import build, go_on
from test_trainer_checkpoints import make, seal

from fastppo import checkpoint as ckpt
from fastppo import disk, manifest
from fastppo.checkpoint import load_checkpoint, load_newest, save_checkpoint
from fastppo.disk import CheckpointError
from fastppo.run_folder import resolve, whole_or_nothing

PARTS = {"policy": {"w": torch.arange(6.0).reshape(2, 3)}}
DEEP = "[" * 100_000


@pytest.fixture
def two(tmp_path):
    """Checkpoints of steps 1 and 2, both whole."""
    return [save_checkpoint(tmp_path, step, PARTS, {"a": 1}) for step in (1, 2)]


def seal_values(path, text: str) -> None:
    """values.json with a right checksum."""
    (path / "values.json").write_text(text)
    table = json.loads((path / "manifest.json").read_text())
    table["files"]["values.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(table))


def test_a_renamed_checkpoint_is_not_a_newer_one(two, tmp_path):
    two[0].rename(tmp_path / "step-00000009")
    found, reasons = load_newest(tmp_path)
    assert found.step == 2 and len(reasons) == 1 and "step-00000009: it holds step 1" in reasons[0]
    shutil.copytree(two[1], tmp_path / "best")
    assert ckpt.find(tmp_path / "best")[0].step == 2, "a copy under a name of one's own is fine"


@pytest.mark.parametrize("step", ["Infinity", "NaN", "2.0", '"2"', "true", "-2", "null", "[2]", "1" * 5000])
def test_a_step_that_is_no_count_is_told(two, step):
    text = (two[1] / "manifest.json").read_text()
    assert '"step": 2' in text
    (two[1] / "manifest.json").write_text(text.replace('"step": 2', f'"step": {step}'))
    with pytest.raises(CheckpointError, match="step-00000002"):
        load_checkpoint(two[1])


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"b": [{"a": 1, "a": 1}]}', DEEP, '{"a": ' * 100_000, "\xff"])
def test_values_that_are_not_plain_json_are_told(two, text):
    seal_values(two[1], text)
    with pytest.raises(CheckpointError, match="values.json: (not JSON|SHA-256|.* bytes)"):
        load_checkpoint(two[1])


@pytest.mark.parametrize("text", [DEEP, '{"step": 2, "step": 2}', '{"files": {"files": ' * 50_000])
def test_a_manifest_that_is_not_plain_json_is_told(two, text):
    (two[1] / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="manifest.json: not JSON"):
        load_checkpoint(two[1])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["manifest.json", "policy.safetensors", "values.json"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_file_that_never_ends_is_not_read(two, name, kind):
    (two[1] / name).unlink()
    os.mkfifo(two[1] / name) if kind == "pipe" else (two[1] / name).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=f"{name}: it is no file"):
        load_checkpoint(two[1])
    assert load_newest(two[1].parent)[0].step == 1


def test_a_broken_newer_one_does_not_push_out_the_good_one(tmp_path):
    for step in (1, 2, 3):
        path = save_checkpoint(tmp_path, step, PARTS, {}, keep=2)
    (path / "policy.safetensors").write_bytes(b"")
    save_checkpoint(tmp_path, 4, PARTS, {}, keep=2)
    assert sorted(p.name[-1] for p in tmp_path.iterdir()) == ["2", "3", "4"]
    shutil.rmtree(tmp_path / "step-00000004")
    assert load_newest(tmp_path)[0].step == 2


def test_a_writer_of_another_user_is_left_alone(two, tmp_path, monkeypatch):
    names = [f".writing-step-00000003-{pid}" for pid in (999, 10**30, os.getpid(), "x")]
    for name in names:
        (tmp_path / name).mkdir()

    def kill(pid, number):
        if pid == 999:
            raise PermissionError(1, "Operation not permitted")
        raise OverflowError("signed integer is greater than maximum")

    monkeypatch.setattr(os, "kill", kill)
    save_checkpoint(tmp_path, 3, PARTS, {})
    assert [name for name in names if (tmp_path / name).exists()] == names[:1]


def test_a_process_killed_while_it_deletes_leaves_no_half_checkpoint(two, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(disk.shutil, "rmtree", lambda *_, **__: None)  # as if killed before the first file was gone
        save_checkpoint(tmp_path, 3, PARTS, {}, keep=1)
    assert sorted(p.name[:9] for p in tmp_path.iterdir()) == [".removing", ".removing", "step-0000"]
    save_checkpoint(tmp_path, 4, PARTS, {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]


def test_a_disk_too_full_for_another_name_gets_its_space_back(two, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    disk.remove(two[0])
    assert not two[0].exists() and two[1].exists()


def test_a_linked_checkpoint_is_unlinked_and_not_followed(two, tmp_path):
    outside = tmp_path.with_name("outside")
    two[0].rename(outside)
    two[0].symlink_to(outside)
    save_checkpoint(tmp_path, 3, PARTS, {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"] and load_checkpoint(outside).step == 1


def test_the_names_of_new_folders_are_brought_to_the_disk(tmp_path, monkeypatch):
    synced, real = [], disk.sync_folder
    monkeypatch.setattr(disk, "sync_folder", lambda path: (synced.append(path), real(path)))
    save_checkpoint(tmp_path / "runs/a/checkpoints", 1, PARTS, {})
    assert {tmp_path, tmp_path / "runs", tmp_path / "runs/a"} <= set(synced)


def test_a_file_written_in_one_go_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    disk.write_whole(tmp_path / "config.yaml", "steps: 100\n")

    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(os, name, full)
            disk.write_whole(tmp_path / "config.yaml", "steps: 1\n")
        assert (tmp_path / "config.yaml").read_text() == "steps: 100\n" and len(list(tmp_path.iterdir())) == 1


# --- the classic trainer ----------------------------------------------------------------------------------------------


def test_weights_that_are_no_numbers_push_nothing_out_and_are_not_loaded(tmp_path):
    made = build({})
    path = made.save_checkpoint(tmp_path, keep=1)
    go_on(made, 1)
    good = made.model.v_head.summary.weight.detach().clone()
    with torch.no_grad():
        made.model.v_head.summary.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="'v_head.summary.weight' holds NaN or infinity: the run has diverged"):
        made.save_checkpoint(tmp_path, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    saved = load_checkpoint(path)
    saved.parts["policy"]["v_head.summary.weight"][0, 0] = float("inf")
    save_checkpoint(tmp_path / "bad", 0, saved.parts, saved.values)
    with torch.no_grad():
        made.model.v_head.summary.weight.copy_(good)
    with pytest.raises(CheckpointError, match="step-00000000: the weight 'v_head.summary.weight' holds NaN"):
        made.load_checkpoint(tmp_path / "bad")
    assert torch.equal(made.model.v_head.summary.weight, good) and made._steps_done == 1


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (("counters", "_steps_done"), 5, "the checkpoint of step 0 holds a run of 5 steps"),
        (("kl", "value"), float("nan"), "the KL coefficient must be a number; got nan"),
    ],
)
def test_values_of_another_step_are_told(key, value, words, tmp_path):
    made = build({})
    saved = load_checkpoint(made.save_checkpoint(tmp_path))
    saved.values[key[0]][key[1]] = value
    save_checkpoint(tmp_path, 0, saved.parts, saved.values)
    with pytest.raises(CheckpointError, match=words):
        made.load_checkpoint(tmp_path)


# --- SFT, reward, late PPO --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    make("sft", folder).train()
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def test_a_renamed_folder_is_passed_over(copied):
    (copied / "checkpoint-2").rename(copied / "checkpoint-9")
    chosen, reasons = resolve(copied, True)
    assert chosen.endswith("checkpoint-4") and "checkpoint-9: it holds step 2" in reasons[0]


def test_a_checkpoint_of_ours_without_its_manifest_is_refused_by_name_too(copied):
    """Else its changed weights would be read as transformers' own, which nothing can check."""
    (copied / "checkpoint-4/manifest.json").unlink()
    with pytest.raises(CheckpointError, match="checkpoint-4/manifest.json: No such file"):
        make("sft", copied).train(resume_from_checkpoint=str(copied / "checkpoint-4"))


@pytest.mark.parametrize("what", ["link to a folder", "pipe", "JSON name twice"])
def test_what_no_run_writes_is_found(copied, what):
    path = copied / "checkpoint-4"
    if what == "link to a folder":
        (path / "adapter").symlink_to(copied / "checkpoint-3")
    elif what == "pipe":
        (path / "resume.json").unlink()
        os.mkfifo(path / "resume.json")
    else:
        text = (path / "manifest.json").read_text()
        (path / "manifest.json").write_text(text.replace('"step": 4', '"step": 3, "step": 4'))
    chosen, reasons = resolve(copied, True)
    assert chosen.endswith("checkpoint-3") and len(reasons) == 1 and "checkpoint-4" in reasons[0]


def test_what_killed_runs_left_is_removed(copied):
    left = [".writing-checkpoint-7", ".before-checkpoint-3", ".removing-checkpoint-1"]
    for name in left:
        (copied / name).mkdir()
        (copied / name / "model.safetensors").write_bytes(b"half")
    (copied / ".writing-notes").mkdir()
    trainer = make("sft", copied, max_steps=5)
    trainer.train(resume_from_checkpoint=True)
    assert sorted(p.name for p in copied.iterdir() if p.name.startswith(".")) == [".writing-notes"]


def test_a_folder_that_was_between_two_names_comes_back(tmp_path):
    (tmp_path / ".before-model").mkdir()
    (tmp_path / ".before-model/weights").write_text("old")
    with pytest.raises(OSError, match="full"), whole_or_nothing(tmp_path / "model"):
        raise OSError("full")
    assert [p.name for p in tmp_path.iterdir()] == ["model"] and (tmp_path / "model/weights").read_text() == "old"


def test_the_best_checkpoint_is_checked_before_it_is_loaded(tmp_path, monkeypatch):
    options = dict(eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss")
    trainer = make("sft", tmp_path, evaluate=True, **options)
    real = type(trainer)._load_best_model

    def damaged(self):
        path = tmp_path / f"checkpoint-{self.state.best_global_step}/model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        real(self)

    monkeypatch.setattr(type(trainer), "_load_best_model", damaged)
    with pytest.raises(CheckpointError, match="model.safetensors: .*truncated or was changed"):
        trainer.train()


def test_a_run_whose_weights_are_no_numbers_pushes_nothing_out(tmp_path):
    from transformers import TrainerCallback

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    model.lm_head.weight[0, 0] = float("inf")

    trainer = make("sft", tmp_path, save_total_limit=1)
    trainer.add_callback(Spoil())
    with pytest.raises(CheckpointError, match="'lm_head.weight' holds NaN or infinity"):
        trainer.train()
    assert [p.name for p in tmp_path.glob("*checkpoint-*")] == ["checkpoint-2"]
    manifest.check(tmp_path / "checkpoint-2")


def test_a_sealed_checkpoint_of_another_step_is_found(copied):
    seal(copied / "checkpoint-3")  # which writes "step": 4
    with pytest.raises(CheckpointError, match="checkpoint-3: it holds step 4"):
        resolve(copied, str(copied / "checkpoint-3"))
