"""Checkpoints: whole or not there, checked on load, safe against kills, full disks and tampering."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastppo import checkpoint as ckpt
from fastppo.checkpoint import CheckpointError, load_checkpoint, load_newest, save_checkpoint

PARTS = {"policy": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}}


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path):
    path = save_checkpoint(tmp_path, 7, PARTS, {"kl_coef": 0.2, "order": [3, 1]})
    found = load_checkpoint(path)
    assert (found.step, found.values) == (7, {"kl_coef": 0.2, "order": [3, 1]})
    assert all(torch.equal(found.parts["policy"][n], t) for n, t in PARTS["policy"].items())
    assert not [p for p in path.iterdir() if p.suffix not in (".json", ".safetensors")]


def test_the_last_n_are_kept(tmp_path):
    for step in range(5):
        save_checkpoint(tmp_path, step, PARTS, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "no manifest", "bad manifest", "version", "escape"])
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(tmp_path, damage):
    save_checkpoint(tmp_path, 1, PARTS, {})
    newest = save_checkpoint(tmp_path, 2, PARTS, {})
    weights, manifest = newest / "policy.safetensors", newest / "manifest.json"
    data, table = bytearray(weights.read_bytes()), json.loads(manifest.read_text())
    if damage == "truncate":
        weights.write_bytes(data[:-3])
    elif damage == "flip":
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "delete":
        weights.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "bad manifest":
        manifest.write_text("[1")
    elif damage == "version":
        manifest.write_text(json.dumps({**table, "format_version": 99}))
    else:
        table["files"]["../../secret"] = table["files"].pop("policy.safetensors")
        manifest.write_text(json.dumps(table))
    found, reasons = load_newest(tmp_path)
    assert found.step == 1 and len(reasons) == 1 and "step-00000002" in reasons[0]
    assert newest.is_dir(), "a damaged checkpoint is left for its owner to look at"


@settings(deadline=None, max_examples=60)
@given(
    position=st.integers(0, 10_000),
    value=st.integers(0, 255),
    name=st.sampled_from(["policy.safetensors", "values.json"]),
)
def test_any_changed_byte_is_found(tmp_path_factory, position, value, name):
    folder = tmp_path_factory.mktemp("ckpt")
    path = save_checkpoint(folder, 1, PARTS, {"a": list(range(20))})
    data = bytearray((path / name).read_bytes())
    before = data[position % len(data)]
    data[position % len(data)] = value
    (path / name).write_bytes(data)
    if value == before:
        assert load_checkpoint(path).step == 1
    else:
        with pytest.raises(CheckpointError, match="truncated or was changed"):
            load_checkpoint(path)


@settings(deadline=None, max_examples=100)
@given(
    text=st.one_of(
        st.text(max_size=40),
        st.recursive(
            st.none() | st.integers() | st.text(max_size=5),
            lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=12), c, max_size=3),
        ).map(json.dumps),
    )
)
def test_any_manifest_gives_a_checkpoint_error_only(tmp_path_factory, text):
    path = save_checkpoint(tmp_path_factory.mktemp("ckpt"), 1, PARTS, {})
    (path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, PARTS, {})
    real = os.fsync

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device.*Older checkpoints are untouched"):
        save_checkpoint(tmp_path, 2, PARTS, {})
    monkeypatch.setattr(os, "fsync", real)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"] and load_newest(tmp_path)[0].step == 1


def test_a_read_only_folder_leaves_the_old_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 1, PARTS, {})
    tmp_path.chmod(0o500)
    was_root = os.geteuid() == 0
    if was_root:  # root may write anywhere; "nobody" may not
        try:
            os.seteuid(65534)
        except OSError as error:
            pytest.skip(f"root here can't become another user: {error}")
    try:
        with pytest.raises(CheckpointError, match="Permission denied.*Older checkpoints are untouched"):
            save_checkpoint(tmp_path, 2, PARTS, {})
    finally:
        if was_root:
            os.seteuid(0)
        tmp_path.chmod(0o700)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"] and load_newest(tmp_path)[0].step == 1


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(CheckpointError, match="runs.*could not be written"):
        save_checkpoint(tmp_path / "runs", 1, PARTS, {})


WRITER = """
import sys, torch
from fastppo.checkpoint import save_checkpoint, load_newest
folder = sys.argv[1]
found, _ = load_newest(folder)
step = found.step if found else 0
print("from", step, flush=True)
while True:
    step += 1
    save_checkpoint(folder, step, {"policy": {"w": torch.full((300_000,), float(step))}}, {"step": step})
    print(step, flush=True)
"""


def test_kill_9_at_random_moments_never_loses_a_finished_checkpoint(tmp_path):
    rng, finished = random.Random(0), 0
    for _ in range(5):
        run = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert int(run.stdout.readline().split()[1]) >= finished
        began = time.monotonic()
        printed = [int(run.stdout.readline()) for _ in range(2)]
        # within the next writes, however long one takes here
        time.sleep(rng.uniform(0.1, 1.5) * (time.monotonic() - began))
        run.send_signal(signal.SIGKILL)
        printed += [int(line) for line in run.stdout.read().split("\n")[:-1] if line.isdigit()]
        run.wait()
        finished = max([finished, *printed])
        found, reasons = load_newest(tmp_path)
        assert not reasons and (found is None or found.step >= finished)
        if found:
            assert (found.parts["policy"]["w"] == found.step).all() and found.values == {"step": found.step}
    assert finished > 0
    save_checkpoint(tmp_path, finished + 9, PARTS, {})
    assert not list(tmp_path.glob(".writing-*")), "half-written folders of killed runs are cleared"


def test_optimizer_state_survives_bitwise():
    w = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.Adam([w], lr=0.1)
    w.sum().backward()
    optimizer.step()
    tensors, tree = ckpt.split_tensors(optimizer.state_dict())
    back = ckpt.join_tensors(tensors, json.loads(json.dumps(tree)))
    other = torch.optim.Adam([torch.nn.Parameter(w.detach().clone())], lr=9.0)
    other.load_state_dict(back)
    assert other.param_groups[0]["lr"] == 0.1
    for key, value in optimizer.state_dict()["state"][0].items():
        assert torch.equal(other.state_dict()["state"][0][key], value)


def test_random_generators_continue_where_they_were():
    tensors, values = ckpt.rng_state()
    first = torch.rand(3), np.random.rand(3), random.random()
    ckpt.set_rng_state(tensors, json.loads(json.dumps(values)))
    again = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(first[0], again[0]) and (first[1] == again[1]).all() and first[2] == again[2]


def test_wrong_tensors_are_named():
    want = {"w": torch.zeros(2, 3)}
    ckpt.check_tensors("policy", {"w": torch.ones(2, 3)}, want)
    for found, words in (
        ({}, "'w' is missing"),
        ({"w": torch.zeros(2, 3), "x": torch.zeros(1)}, "holds 'x'"),
        ({"w": torch.zeros(3, 2)}, r"should be torch.float32 \(2, 3\); the checkpoint holds torch.float32 \(3, 2\)"),
        ({"w": torch.zeros(2, 3).double()}, "holds torch.float64"),
    ):
        with pytest.raises(CheckpointError, match=words):
            ckpt.check_tensors("policy", found, want)


def test_values_that_are_no_json_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="values must be JSON"):
        save_checkpoint(tmp_path, 1, PARTS, {"x": object()})
    assert list(tmp_path.iterdir()) == []
