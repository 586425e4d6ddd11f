"""`fastppo pipeline`: supervised fine-tuning, a reward model and PPO against it, from one file of preference pairs.

fastppo pipeline --config examples/pipeline.yaml

fastppo pipeline --model gpt2 --dataset pairs.jsonl --output-dir runs/pipeline --ppo.total-episodes 3200

The dataset has the columns chosen and rejected (and perhaps prompt), or text and label (two values, the larger preferred).
SFT learns the chosen side, the reward model starts from its result, PPO from the same, on the prompts. The sections
sft, reward and ppo of the file (or flags like --sft.learning-rate) take whatever 'fastppo sft', 'fastppo reward' and
'fastppo ppo' take; 'sft: false' leaves fine-tuning out. Started again with the same options, finished stages are skipped and an
unfinished one goes on from its newest checkpoint.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastppo.cli.errors import UserError, nearest
from fastppo.cli.options import check_values, load_yaml, parse_over, take_config
from fastppo.cli.stage_options import Given, RunOptions, Stage, flags_given, given

STAGES = ("sft", "reward", "ppo")
PANELS = (
    ("sft/loss", "SFT: loss", "nats per token", "#2f6690"),
    ("reward/accuracy", "Reward model: accuracy", "share of pairs with chosen above rejected", "#b8860b"),
    ("ppo/objective/scores", "PPO: reward", "mean score of a batch", "#0b7a75"),
    ("ppo/objective/kl", "PPO: KL from the start", "nats per response", "#c8553d"),
)


@dataclass
class PipelineOptions(RunOptions):
    """All three stages of RLHF from one file of preference pairs."""

    dataset: str = ""
    """Preference pairs, or texts with labels: .jsonl, .json, .parquet, a folder of `datasets`, or a hub id. Required."""
    eval_dataset: str | None = None
    """Held-out pairs in the same form; a tenth of the pairs (500 at most) when not given."""
    output_dir: Path = Path("runs/pipeline")
    """Where the run goes: a folder for each stage, results.json and curves.png."""
    pairs: int | None = None
    """Use so many training pairs at most."""
    prompt_words: int = 5
    """Where pairs have no prompt, PPO's prompts are the first so many words of the chosen texts."""
    seed: int = 0
    """Seed of every stage that is given none of its own."""


@dataclass(frozen=True)
class Plan:
    """options: the pipeline's. sections: stage -> its values; None leaves it out. flags: stage -> its flags. values: what
    was given, for config.yaml."""

    options: PipelineOptions
    sections: dict[str, dict[str, Any] | None]
    flags: dict[str, list[str]]
    values: dict[str, Any]


def split_flags(argv: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """(flags of the pipeline, stage -> flags): --sft.x and the values after it belong to sft."""
    own, flags, into = [], {name: [] for name in STAGES}, None
    for word in argv:
        if word.startswith("--"):
            name, dot, rest = word[2:].partition(".")
            into = flags[name] if dot and name in STAGES else own
            word = f"--{rest}" if into is not own else word
        (own if into is None else into).append(word)
    return own, flags


def read_plan(argv: Sequence[str]) -> Plan:
    """Raises UserError."""
    argv, file = take_config(argv)
    own, flags = split_flags(argv)
    values = dict(load_yaml(file)) if file else {}
    sections: dict[str, dict[str, Any] | None] = {}
    for name in STAGES:
        section = values.pop(name, {})
        if section is not False and not isinstance(section, Mapping | None):
            raise UserError(f"--config: {file}: {name} must hold 'name: value' lines, or be false; got {section!r}")
        sections[name] = None if section is False else dict(section or {})
    if not any(section is not None for section in sections.values()):
        raise UserError(f"--config: {file} leaves out all stages")
    unknown = [key for key in values if str(key).replace("-", "_") not in PipelineOptions.__dataclass_fields__]
    if unknown:
        names = [*STAGES, *PipelineOptions.__dataclass_fields__]
        raise UserError(f"--config: {file} sets {unknown[0]!r}, which is no option.{nearest(str(unknown[0]), names)}")
    values = check_values(values, PipelineOptions, f"--config: {file}")
    options = parse_over(PipelineOptions, own, values, "fastppo pipeline", __doc__)
    for name in ("model", "dataset"):
        if not getattr(options, name):
            raise UserError(f"--{name} is required (as a flag or in --config's file); see 'fastppo pipeline --help'")
    for name in ("pairs", "prompt_words"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1; got {value}")
    told = (set(values) | flags_given(own, list(PipelineOptions.__dataclass_fields__))) - {"output_dir", "overwrite"}
    kept = {name: getattr(options, name) for name in PipelineOptions.__dataclass_fields__ if name in told}
    return Plan(options, sections, flags, kept)


def write_data(options: PipelineOptions, folder: Path) -> None:
    """data/: each stage's rows, as its own command would take them."""
    from fastppo.cli.pairs import demonstration, pairs_of, prompt_of, rows_of, write_rows

    rows = rows_of(options.dataset, options.dataset_split, "--dataset")
    pairs = pairs_of(rows, f"--dataset: {options.dataset}", options.pairs, options.seed)
    if options.eval_dataset:
        rows = rows_of(options.eval_dataset, options.dataset_split, "--eval-dataset")
        held_out = pairs_of(rows, f"--eval-dataset: {options.eval_dataset}", 500, options.seed)
    else:
        cut = len(pairs) - min(500, len(pairs) // 10)
        pairs, held_out = pairs[:cut], pairs[cut:]
    if not held_out or "chosen" not in pairs[0]:
        raise UserError(f"--dataset: {options.dataset}: at least 10 pairs of chosen and rejected are needed")
    for name, part in (("", pairs), ("-held-out", held_out)):
        write_rows(folder / f"reward{name}.jsonl", part, dict)
        write_rows(folder / f"sft{name}.jsonl", part, demonstration)
        write_rows(folder / f"ppo{name}.jsonl", part, lambda row: prompt_of(row, options.prompt_words))


def stage_values(plan: Plan, name: str) -> dict[str, Any]:
    """The section's values over what follows from the stages before."""
    options, folder = plan.options, plan.options.output_dir
    tuned = options.model if plan.sections["sft"] is None else str(folder / "sft" / "model")
    values = {
        "model": options.model if name == "sft" else tuned,
        "dataset": str(folder / "data" / f"{name}.jsonl"),
        "eval_dataset": str(folder / "data" / f"{name}-held-out.jsonl"),
        "output_dir": str(folder / name),
        "seed": options.seed,
    }
    if name == "reward" or name == "sft":
        values["eval_strategy"] = "epoch"
    if name == "ppo" and plan.sections["reward"] is not None:
        values["reward"] = str(folder / "reward" / "model")
    section = {str(key).replace("-", "_"): value for key, value in plan.sections[name].items()}
    if "dataset" in section and "eval_dataset" not in section:
        values.pop("eval_dataset")  # the pipeline's own would be of another kind
        values.pop("eval_strategy", None)
    return values | section


def stage_given(plan: Plan, name: str) -> tuple[Stage, Given]:
    """The stage and its options; wrong options of any stage are found before the first one runs."""
    stage = importlib.import_module(f"fastppo.cli.{name}").STAGE
    values, where = stage_values(plan, name), f"section {name} of the pipeline"
    made = given(plan.flags[name], values, stage.options, stage.config_class, f"fastppo pipeline: {name}", where=where)
    made.configuration(stage.config_class)
    return stage, made


def draw_all(folder: Path, names: Sequence[str]) -> None:
    """curves.png: the most telling plots of all stages."""
    from fastppo.cli.curves import draw
    from fastppo.cli.run_folder import read_metrics, writing

    rows = []
    for name in names:
        for row in read_metrics(folder / name):
            rows.append({"step": row["step"], **{f"{name}/{key}": x for key, x in row.items() if key != "step"}})
    with writing(folder / "curves.png"):
        draw(rows, folder / "curves.png", f"fastppo pipeline: {folder}", PANELS, "step of the stage")


def run(argv: Sequence[str]) -> int:
    plan = read_plan(argv)
    names = [name for name in STAGES if plan.sections[name] is not None]
    stages = {name: stage_given(plan, name) for name in names}
    from accelerate import PartialState

    from fastppo.cli.stage import check_model, run_stage, told
    from fastppo.cli.stage_folder import StageFolder

    is_main, folder = PartialState().is_main_process, plan.options.output_dir
    check_model(plan.options.model)
    whole = StageFolder(folder, plan.values, overwrite=plan.options.overwrite, write=is_main)
    if is_main and not (folder / "data" / "ppo-held-out.jsonl").is_file():
        write_data(plan.options, folder / "data")
    PartialState().wait_for_everyone()
    results = {}
    for number, name in enumerate(names, 1):
        stage, made = stages[name]
        made.options.overwrite |= plan.options.overwrite
        if is_main:
            print(f"{number}/{len(names)} {name}", flush=True)
        status, results[name] = run_stage(stage, made)
        if status:
            return status
    if is_main:
        whole.write_json("results.json", results)
        draw_all(folder, names)
        print("\n" + "\n".join(f"{name:<8}{told(found)}" for name, found in results.items()))
        print(f"{folder}: curves.png, results.json; {folder / names[-1] / 'model'} is the trained policy")
    return 0
