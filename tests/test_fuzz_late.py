"""Any SFT, reward or late PPO configuration, any rows, any damage to their checkpoints: it works, or one documented error says why.

FASTPPO_FUZZ as in test_fuzz.py, which has the classic side.
"""

import json
import math
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path

import pytest
import sft_cases
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz import JSON, ODD, put, share
from test_trainer_checkpoints import make, seal
from transformers import TrainingArguments

from fastppo import RewardConfig, SFTConfig
from fastppo.cli.errors import UserError
from fastppo.disk import CheckpointError
from fastppo.experimental.ppo import PPOConfig
from fastppo.run_folder import resolve

CONFIGS = {"SFTConfig": SFTConfig, "RewardConfig": RewardConfig, "late PPOConfig": PPOConfig}
THEIRS = {f.name for f in fields(TrainingArguments)}
# of transformers' own fields, those that a user of these trainers sets
COMMON = [
    "per_device_train_batch_size",
    "learning_rate",
    "seed",
    "max_steps",
    "num_train_epochs",
    "save_steps",
    "optim",
]
COMMON += ["gradient_accumulation_steps", "save_total_limit", "logging_steps", "max_grad_norm", "lr_scheduler_type"]
COMMON += ["save_strategy", "eval_strategy", "weight_decay"]


@st.composite
def configurations(draw):
    cls = CONFIGS[draw(st.sampled_from(sorted(CONFIGS)))]
    names = [f.name for f in fields(cls) if f.init and f.name not in THEIRS] + COMMON
    return cls, draw(st.dictionaries(st.sampled_from(names) | st.text(max_size=8), ODD | st.just(object()), max_size=3))


@share(0.4)
@given(configurations())
def test_any_configuration(drawn):
    cls, values = drawn
    try:
        made = cls(**{"output_dir": tempfile.gettempdir(), "use_cpu": True, **values})
    except (ValueError, TypeError, ImportError) as error:
        assert any(name in str(error) or repr(name) in str(error) for name in values), repr(error)
        return
    assert made.per_device_train_batch_size >= 1 and not math.isnan(made.learning_rate)


# --- rows -------------------------------------------------------------------------------------------------------------

TOKENIZER, PLAIN = sft_cases.make_tokenizer(), tiny_models.tokenizer()
STRANGE = ["a\u2028b", "a\x85b", "\ud83d", "\ufeffa", "\x00", "a" * 5000, " ", "\u200b", "a\r"]
TEXT = st.text(max_size=8) | st.sampled_from(STRANGE)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]) | JSON}, optional={"content": TEXT | JSON}
)
VALUE = TEXT | st.lists(MESSAGE, max_size=3) | JSON
ROW = st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "text", "label", "messages"]), VALUE, max_size=4)


@st.composite
def files(draw) -> bytes:
    """A JSONL file as users have them: with a byte order mark, strange line ends, characters as they are or escaped."""
    rows, plain = draw(st.lists(ROW, min_size=1, max_size=4)), draw(st.booleans())
    lines = draw(st.sampled_from(["\n", "\r\n", "\n\n"])).join(json.dumps(row, ensure_ascii=not plain) for row in rows)
    text = draw(st.sampled_from(["", "\ufeff"])) + lines + draw(st.sampled_from(["", "\n", '{"prompt": ', "[" * 9999]))
    return text.encode("utf-8", "surrogatepass")


@share(0.4)
@given(files(), st.sampled_from([TOKENIZER, PLAIN]))
def test_any_rows_as_prompts(tmp_path_factory, content, tokenizer):
    from fastppo.cli.prompts import find_column, load_rows, make_prompts

    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_bytes(content)
    try:
        rows = load_rows(str(path))
        prompts = make_prompts(rows, find_column(rows, None, str(path)), tokenizer, 8, 20)
    except UserError as error:
        assert "--dataset" in str(error) and len(str(error)) < 2000
        return
    assert len(prompts) == len(rows) and all(0 < len(prompt.tokens) <= 8 for prompt in prompts)


@share(0.3)
@given(files())
def test_any_rows_as_pairs(tmp_path_factory, content):
    """What the pipeline makes of a file for its stages, and reads again."""
    from fastppo.cli.pairs import demonstration, pairs_of, prompt_of, rows_of, write_rows

    folder = tmp_path_factory.mktemp("data")
    (folder / "rows.jsonl").write_bytes(content)
    try:
        pairs = pairs_of(rows_of(str(folder / "rows.jsonl"), "train", "--dataset"), "--dataset")
        for name, convert in (("reward", dict), ("sft", demonstration), ("ppo", lambda row: prompt_of(row, 5))):
            write_rows(folder / f"{name}.jsonl", pairs, convert)
    except UserError as error:
        assert "--dataset" in str(error) and len(str(error)) < 2000
        return
    if pairs:
        again = rows_of(str(folder / "reward.jsonl"), "train", "--dataset")
        assert again == json.loads(json.dumps(pairs))


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """kind -> the folder of a run of four steps with checkpoints of steps 2 to 4."""
    made = {}
    for kind in ("sft", "ppo"):
        folder = tmp_path_factory.mktemp(kind)
        make(kind, folder).train()
        made[kind] = folder
    return made


def goes_on(kind: str, path: Path) -> None:
    """It is loaded, with no step left to do, or CheckpointError names it."""
    torch.manual_seed(0)
    trainer = make(kind, path.parent / "again", save_strategy="no")
    try:
        trainer.train(resume_from_checkpoint=str(path))
    except CheckpointError as error:
        assert "checkpoint-4" in str(error), error
    assert trainer.state.global_step in (0, 4), "a step was trained"


BYTES = st.tuples(st.integers(0, 1 << 18), st.binary(max_size=8), st.booleans())


@share(0.1)
@given(st.sampled_from(["sft", "ppo"]), st.integers(0, 40), BYTES)
def test_any_damage_to_a_late_checkpoints_bytes(tmp_path_factory, saved, kind, number, change):
    copy = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(saved[kind], copy)
    names = sorted(path for path in (copy / "checkpoint-4").rglob("*") if path.is_file())
    path, (at, new, cut) = names[number % len(names)], change
    data = path.read_bytes()
    at %= len(data)
    damaged = data[:at] + new + (b"" if cut else data[at + len(new) :])
    path.write_bytes(damaged)
    chosen, passed_over = resolve(copy, "auto")
    same = damaged == data or path.name == "manifest.json" and not passed_over
    assert chosen.endswith("checkpoint-4" if same else "checkpoint-3") and len(passed_over) == (0 if same else 1)
    shutil.rmtree(copy.parent)


@share(0.04)
@given(
    st.sampled_from(["sft", "ppo"]),
    st.sampled_from(["resume.json", "trainer_state.json"]),
    st.lists(st.integers(0, 40), min_size=1, max_size=4),
    JSON,
)
def test_any_value_in_a_late_checkpoint(tmp_path_factory, saved, kind, name, keys, value):
    path = tmp_path_factory.mktemp("values") / "checkpoint-4"
    shutil.copytree(saved[kind] / "checkpoint-4", path)
    values = json.loads((path / name).read_text())
    (path / name).write_text(json.dumps(put(values, keys, value)))
    seal(path)
    goes_on(kind, path)
    shutil.rmtree(path.parent)
