"""Any configuration, prompt file, option file or checkpoint: it works, or one documented error says why; no half output.

FASTPPO_FUZZ=2000 runs so many cases in all; the default is a short run.
"""

import hashlib
import json
import os
import shutil
from dataclasses import fields
from pathlib import Path

import golden_cases
import pytest
import tiny_models
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastppo
from fastppo import PPOConfig, PPOTrainer
from fastppo.checkpoint import CheckpointError, load_newest
from fastppo.cli.errors import UserError

CASES = int(os.environ.get("FASTPPO_FUZZ", 120))
GENTLE = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]


def share(part: float):
    return settings(deadline=None, max_examples=max(5, int(CASES * part)), suppress_health_check=GENTLE)


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.text(max_size=6),
    st.sampled_from(["kl", "full", "auto", "skip", "bf16", 10**30, -1, 0, 1e-300, "1e-5"]),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip
JSON = st.recursive(ODD, lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=8), c, max_size=3))
FIELDS = [f.name for f in fields(PPOConfig) if f.init]


@share(0.3)
@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), ODD, max_size=4))
def test_any_configuration(settings_):
    try:
        config = PPOConfig(**settings_)
    except (ValueError, TypeError, ImportError) as error:
        assert "PPOConfig" in str(error) and any(
            name in str(error) or repr(name) in str(error) for name in [*settings_, "batch_size", "log_with"]
        )
        return
    assert config.batch_size % config.backward_batch_size == 0 and config.total_ppo_epochs >= 1
    assert isinstance(config.to_dict(), dict)


@share(0.2)
@given(st.one_of(st.binary(max_size=60), JSON.map(lambda x: json.dumps(x).encode()), st.lists(JSON, max_size=4).map(
    lambda rows: "\n".join(map(json.dumps, rows)).encode()), st.lists(st.dictionaries(
    st.sampled_from(["prompt", "messages", "n"]), JSON, max_size=3), max_size=4).map(
    lambda rows: "\n".join(map(json.dumps, rows)).encode())), st.sampled_from(["jsonl", "json", "parquet"]))  # fmt: skip
def test_any_prompt_file(tmp_path_factory, content, kind):
    from fastppo.cli.prompts import find_column, load_rows, make_prompts

    path = tmp_path_factory.mktemp("data") / f"prompts.{kind}"
    path.write_bytes(content)
    try:
        rows = load_rows(str(path))
        prompts = make_prompts(rows, find_column(rows, None, str(path)), TOKENIZER, 8, 20)
    except UserError as error:
        assert "--dataset" in str(error) or "--prompt" in str(error)
        return
    assert len(prompts) == len(rows) and all(0 < len(prompt.tokens) <= 8 for prompt in prompts)


TOKENIZER = tiny_models.tokenizer()


@share(0.2)
@given(st.one_of(st.text(max_size=60), st.dictionaries(st.sampled_from([*FIELDS, "model", "keep", "probes", "lora-rank"])
    | st.text(max_size=6), JSON, max_size=4).map(json.dumps)))  # fmt: skip
def test_any_option_file(tmp_path_factory, text):
    from fastppo.cli.train import read_options

    folder = tmp_path_factory.mktemp("options")
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    argv = ["--config", str(folder / "run.yaml"), "--dataset", "d.jsonl", "--reward", "r.py:f", "--model", "m"]
    try:
        options, config, place = read_options(argv)
    except UserError as error:
        assert str(error)
    except SystemExit as error:  # the command line's own way with a value it cannot read
        assert error.code == 2
    else:
        assert place is None and isinstance(config, PPOConfig) and options.model == "m"
    assert [path.name for path in folder.iterdir()] == ["run.yaml"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(trainer, a folder with checkpoints of step 0 and 1)."""
    folder = tmp_path_factory.mktemp("fuzz")
    made = golden_cases.trainer(fastppo, {"lora": True})
    made.save_checkpoint(folder)
    made.step(*next(golden_cases.batches({}, 1)))
    made.save_checkpoint(folder)
    return made, folder


def seal(path: Path) -> None:
    """Make the manifest right again, as one who tampers would."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (path / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


def put(tree, keys: list, value):
    """`tree` with one entry, found by following keys (taken modulo what is there), replaced."""
    if not keys or not isinstance(tree, (dict, list)) or not tree:
        return value
    names = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    name = names[keys[0] % len(names)]
    tree[name] = put(tree[name], keys[1:], value)
    return tree


FILES = ["policy.safetensors", "optimizer.safetensors", "random.safetensors", "values.json", "manifest.json"]


@share(0.2)
@given(st.sampled_from(FILES), st.integers(0, 1 << 16), st.binary(max_size=8), st.booleans(), st.booleans())
def test_any_damage_to_a_checkpoints_bytes(tmp_path_factory, saved, name, at, new, cut, sealed):
    made, folder = saved
    copy = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(folder, copy)
    path = copy / "step-00000001"
    data = (path / name).read_bytes()
    at %= len(data)
    (path / name).write_bytes(data[:at] + new + (b"" if cut else data[at + len(new) :]))
    if sealed and name != "manifest.json":
        seal(path)
    loads(made, path)
    found, reasons = load_newest(copy)
    assert found is not None and (found.step == 1 or reasons)
    shutil.rmtree(copy.parent)


@share(0.1)
@given(st.lists(st.integers(0, 40), max_size=5), JSON)
def test_any_value_in_a_checkpoint(tmp_path_factory, saved, keys, value):
    made, folder = saved
    path = tmp_path_factory.mktemp("values") / "step-00000001"
    shutil.copytree(folder / "step-00000001", path)
    values = json.loads((path / "values.json").read_text())
    (path / "values.json").write_text(json.dumps(put(values, keys, value)))
    seal(path)
    loads(made, path)
    shutil.rmtree(path.parent)


def loads(made: PPOTrainer, path: Path) -> None:
    """It loads, or raises CheckpointError and has changed nothing."""
    before = {name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad}
    state, kl = torch.get_rng_state(), made.kl_ctl.value
    try:
        made.load_checkpoint(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        after = dict(made.model.named_parameters())
        assert all(torch.equal(p, after[name]) for name, p in before.items())
        assert torch.equal(state, torch.get_rng_state()) and made.kl_ctl.value == kl
