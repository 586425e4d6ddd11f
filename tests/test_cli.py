"""The command line's own part: commands, flags, YAML files, and what is said about wrong ones."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastppo.cli import main
from fastppo.cli.errors import UserError
from fastppo.cli.options import as_flat_class, comments, convert, parse, to_yaml_values

ROOT = Path(__file__).parent.parent


@dataclass
class Toy:
    rate: float = 0.1
    """How fast."""
    batch: int = 8  # sequences per step
    limit: float | None = None
    name: str = "toy"
    adaptive: bool = True
    folder: Path | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.batch % 4:
            raise ValueError(f"Toy: batch must be a multiple of 4; got {self.batch}")


Flat = as_flat_class("Flat", "Toy.", Toy)


def test_commands_are_listed_and_a_wrong_one_is_answered(capsys):
    assert main([]) == 2 and main(["--help"]) == 0
    assert capsys.readouterr().out.count("fastppo COMMAND") == 4
    assert main(["trian"]) == 2
    assert "there is no command 'trian'. Did you mean 'fastppo train'?" in capsys.readouterr().err


def test_help_of_train_has_every_field_of_the_configuration():
    ran = subprocess.run([sys.executable, "-m", "fastppo", "train", "--help"], cwd=ROOT, capture_output=True, text=True)
    from dataclasses import fields

    from fastppo import PPOConfig

    assert ran.returncode == 0, ran.stderr
    missing = [f.name for f in fields(PPOConfig) if f.init and f"--{f.name.replace('_', '-')}" not in ran.stdout]
    assert missing == []
    assert "sequences per step()" in ran.stdout  # the comment beside batch_size


def test_comments_and_docstrings_are_the_help():
    assert comments(Toy) == {"rate": "How fast.", "batch": "sequences per step"} | dict.fromkeys(
        ("limit", "name", "adaptive", "folder", "extra"), ""
    )


def test_flags_win_over_the_file_and_checks_come_last(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("rate: 1e-5\nbatch: 3\nname: file\nextra: {a: 1}\nadaptive: false\n")  # 3 alone would be refused
    got = parse(Flat, ["--name", "flag", "--config", str(file), "--batch", "12", "--limit", "2"], "toy")
    assert (got.rate, got.batch, got.name, got.limit, got.extra, got.adaptive) == (
        1e-5,
        12,
        "flag",
        2.0,
        {"a": 1},
        False,
    )
    assert parse(Flat, [f"--config={file}", "--extra", "{b: [1, 2]}", "--adaptive"], "toy").extra == {"b": [1, 2]}


def test_a_written_configuration_reads_back(tmp_path):
    options = Flat(folder=Path("here"), limit=1.5, extra={"a": {"b": None}})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(to_yaml_values(options)))
    assert parse(Flat, ["--config", str(tmp_path / "c.yaml")], "toy") == options


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("batc: 3", "sets 'batc', which is no option. Did you mean 'batch'?"),
        ("batch: many", "batch must be int; got 'many'"),
        ("batch: true", "batch must be int; got True"),
        ("batch: 1.5", "batch must be int; got 1.5"),
        ("limit: [1]", "limit must be float | None; got \\[1\\]"),
        ("adaptive: 1", "adaptive must be bool; got 1"),
        ("- batch", "must hold 'name: value' lines; got a list"),
        ("a: [", "is not YAML"),
        ("batch: 2\nextra: 3", "extra must be .*dict.*; got 3"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path, text, wanted):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=wanted):
        parse(Flat, ["--config", str(tmp_path / "run.yaml")], "toy")


def test_a_missing_file_and_a_bare_config_are_named():
    with pytest.raises(UserError, match="cannot read nowhere.yaml: No such file"):
        parse(Flat, ["--config", "nowhere.yaml"], "toy")
    with pytest.raises(UserError, match="--config needs a YAML file"):
        parse(Flat, ["--config"], "toy")


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [(["--btch", "3"], "Perhaps you meant"), (["--batch", "x"], "Error parsing --batch"), (["--rate"], "--rate")],
)
def test_a_wrong_flag_ends_with_status_2_and_the_nearest(capsys, argv, wanted):
    with pytest.raises(SystemExit) as ended:
        parse(Flat, argv, "toy")
    said = capsys.readouterr()
    assert ended.value.code == 2 and wanted in said.out + said.err


def test_numbers_without_a_dot_are_numbers():
    assert convert("1e-5", float | None) == 1e-5 and convert(3, float) == 3.0 and convert(None, float | None) is None
    with pytest.raises(ValueError):
        convert("fast", float)


def test_the_example_configuration_is_valid():
    from fastppo.cli.train import read_options

    options, config, _ = read_options(["--config", str(ROOT / "examples/train.yaml"), "--seed", "7"])
    assert (options.model, config.batch_size, config.seed, config.total_ppo_epochs) == ("gpt2", 32, 7, 100)
    assert (config.model_name, config.query_dataset) == ("gpt2", "prompts.jsonl")


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ([], "--model is required"),
        (["--model", "m", "--dataset", "d"], "--reward is required"),
        (["--kl-penalty", "kll"], "kl_penalty must be one of .*did you mean 'kl'"),
        (["--batch-size", "6", "--mini-batch-size", "4"], "batch_size. must be a multiple"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1; got 0"),
    ],
)
def test_train_refuses_what_cannot_be(argv, wanted):
    from fastppo.cli.train import read_options

    given = [] if not argv or "--model" in argv else ["--model", "m", "--dataset", "d", "--reward", "r"]
    with pytest.raises(UserError, match=wanted):
        read_options([*given, *argv])
