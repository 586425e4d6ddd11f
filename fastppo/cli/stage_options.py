"""Options of `fastppo sft`, `reward` and `ppo`: the command's own, and every field of the stage's configuration."""

import dataclasses
import enum
import functools
import importlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastppo.cli.errors import UserError
from fastppo.cli.options import check_values, comments, load_yaml, parse_over, take_config, with_help

# Set by the trainer, by --output-dir, or of no use on a command line.
LEFT_OUT = {"output_dir", "parallelism_config", "sft_model_path", "reward_model_path", "world_size", "batch_size"}
LEFT_OUT |= {"num_total_batches", "micro_batch_size", "local_batch_size", "local_mini_batch_size", "mini_batch_size"}
# Where a command's defaults differ from the trainer's: a run that is killed goes on from at most 100 steps back.
DEFAULTS = {"disable_tqdm": True, "save_steps": 100.0, "save_total_limit": 2}


@dataclass
class RunOptions:
    """What the stages and the pipeline take."""

    model: str = ""
    """The language model to start from: a folder or a hub id. Required."""
    dataset_split: str = "train"
    """Split of a dataset from the hub."""
    overwrite: bool = False
    """Start anew in an --output-dir that holds a run."""


@dataclass
class StageOptions(RunOptions):
    """What all stages take."""

    dataset: str = ""
    """A .jsonl, .json or .parquet file, a folder that `datasets` saved, or a hub id. Required."""
    eval_dataset: str | None = None
    """Held-out rows in the same form."""
    output_dir: Path | None = None
    """Where the run goes; a new folder under runs/ when not given. Started again with the same folder and options, an
    unfinished run goes on and a finished one is left alone."""
    lora_rank: int | None = None
    """Train LoRA adapters of this rank instead of all weights; the saved model has them merged."""


@dataclass(frozen=True)
class Given:
    """options: of the stage's flat class. config: the fields of the stage's configuration that were given, or have a
    default of the command's own."""

    options: Any
    config: dict[str, Any]
    values: dict[str, Any]

    def configuration(self, cls: type) -> Any:
        try:
            return cls(output_dir=str(self.options.output_dir), **self.config)
        except (ValueError, TypeError, ImportError) as error:
            raise UserError(str(error)) from error


class Figure(NamedTuple):
    """A line of results.json: means of the first (perhaps) and the last `window` values of a metric, as NAME_first, NAME_last."""

    metric: str
    name: str
    window: int = 1
    first: bool = True


@dataclass(frozen=True)
class Stage:
    """name: the command. config: "module:class". build(options, configuration) -> trainer, nothing trained yet. panels: of
    curves.png. columns: of the screen. figures: of results.json. probe(trainer) -> sample answers."""

    name: str
    config: str
    build: Callable[[Any, Any], Any]
    panels: Sequence[tuple[str, str, str, str]]
    columns: Sequence[tuple[str, str, str]]
    figures: Sequence[Figure]
    options: type = StageOptions
    step_name: str = "optimizer step"
    probe: Callable[[Any], list[dict[str, Any]]] | None = None

    @property
    def config_class(self) -> type:
        module, name = self.config.split(":")
        return getattr(importlib.import_module(module), name)

    def run(self, argv: Sequence[str], description: str) -> int:
        """The command; its exit status."""
        from fastppo.cli.stage import run_stage

        made = read_stage(argv, self.options, self.config_class, f"fastppo {self.name}", description)
        return run_stage(self, made)[0]

    def results(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What the run came to, from the lines of metrics.jsonl."""
        found = {"steps": max((row["step"] for row in rows), default=0)}
        for figure in self.figures:
            if values := [row[figure.metric] for row in rows if row.get(figure.metric) is not None]:
                first, last = values[: figure.window], values[-figure.window :]
                found |= {f"{figure.name}_first": sum(first) / len(first)} if figure.first else {}
                found |= {f"{figure.name}_last": sum(last) / len(last)}
        return found


def plain(hint: Any) -> Any:
    """The hint of a TrainingArguments field as a command line and YAML can give it."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return str if isinstance(hint, type) and issubclass(hint, enum.Enum) else hint
    parts = typing.get_args(hint)
    options = [part for part in parts if part is not type(None)]
    origins = {typing.get_origin(part) or part for part in options}
    if dict in origins:
        return dict[str, Any]
    if list in origins and type(None) in parts:
        chosen = next(x for x in options if typing.get_origin(x) is list)
    else:
        chosen = options[0] if len(options) == 1 else str
    return chosen | None if type(None) in parts else chosen


def plain_default(default: Any, hint: Any) -> Any:
    if isinstance(default, enum.Enum):
        return default.value
    kind = typing.get_origin(hint) or hint
    if kind is dict and default is None:
        return {}
    is_list = any(typing.get_origin(part) is list for part in (hint, *typing.get_args(hint)))
    return [default] if is_list and isinstance(default, str) else default


@functools.cache
def flat_class(name: str, own: type, config: type) -> type:
    """One dataclass with the command's options, then the configuration's: its own fields before TrainingArguments'."""
    from transformers import TrainingArguments

    made = []
    hints, said = typing.get_type_hints(own), comments(RunOptions) | comments(StageOptions) | comments(own)
    for field in dataclasses.fields(own):
        made.append((field.name, with_help(hints[field.name], said.get(field.name, "")), field))
    taken, hints = {field.name for field in dataclasses.fields(own)}, typing.get_type_hints(config)
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    for field in sorted(dataclasses.fields(config), key=lambda each: each.name in inherited):
        if not field.init or field.name in LEFT_OUT | taken:
            continue
        hint = plain(hints[field.name])
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        default = plain_default(DEFAULTS.get(field.name, default), hint)
        text = " ".join(field.metadata.get("help", "").replace("`", "").split())
        made.append((field.name, with_help(hint, text), copied(default)))
    return dataclasses.make_dataclass(name, [(n, h, copied_field(f)) for n, h, f in made])


def copied(default: Any) -> Any:
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default))
    return dataclasses.field(default=default)


def copied_field(field: dataclasses.Field) -> dataclasses.Field:
    return dataclasses.field(default=field.default, default_factory=field.default_factory)


def flags_given(argv: Sequence[str], names: Sequence[str]) -> set[str]:
    """Names of the options that `argv` sets, --no-x among them."""
    found = set()
    for word in argv:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            found |= {name, name.removeprefix("no_")} & set(names)
    return found


def read_stage(argv: Sequence[str], own: type, config: type, prog: str, description: str) -> Given:
    """Flags over --config's file. Raises UserError."""
    argv, file = take_config(argv)
    values = load_yaml(file) if file else {}
    return given(argv, values, own, config, prog, description, f"--config: {file}")


def given(
    argv: Sequence[str],
    values: Mapping[str, Any],
    own: type,
    config: type,
    prog: str,
    description: str = "",
    where: str = "",
) -> Given:
    """`argv` over `values`, checked: what is required is there, numbers are in range."""
    cls = flat_class(config.__name__, own, config)
    values = check_values(values, cls, where)
    options = parse_over(cls, argv, values, prog, description)
    names = [field.name for field in dataclasses.fields(cls)]
    told = flags_given(argv, names) | set(values)
    if options.lora_rank is not None and options.lora_rank < 1:
        raise UserError(f"--lora-rank must be at least 1; got {options.lora_rank}")
    for name in ("model", "dataset", *(["reward"] if hasattr(options, "reward") else [])):
        if not getattr(options, name):
            raise UserError(f"--{name} is required (as a flag or in --config's file); '{prog} --help' explains it")
    ours = {field.name for field in dataclasses.fields(own)}
    fields = {n: getattr(options, n) for n in names if n not in ours and (n in told or n in DEFAULTS)}
    kept = fields | {n: getattr(options, n) for n in names if n in told & ours - {"output_dir", "overwrite"}}
    return Given(options, fields, kept)
