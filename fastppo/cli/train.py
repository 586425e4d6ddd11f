"""`fastppo train`: PPO on your model, your prompts and your reward.

fastppo train --model gpt2 --dataset prompts.jsonl --reward rewards.py:score --batch-size 32 --mini-batch-size 8
"""

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fastppo.cli.errors import UserError, one_line
from fastppo.cli.options import as_flat_class, parse, to_yaml_values


@dataclass
class TrainOptions:
    model: str = ""
    """The policy to start from: a folder or a hub id. Required."""
    dataset: str = ""
    """Prompts: a .jsonl, .json or .parquet file, or a hub id. Required."""
    reward: str = ""
    """module:function, path.py:function, or a sequence classifier (folder or hub id). Required. A function gets what its
    parameters are called: prompts, responses, texts (prompt + response), or a column of the dataset; lists, one entry
    per response. It returns one number per response."""
    output_dir: Path | None = None
    """Where the run goes; a new folder under runs/ when not given."""
    overwrite: bool = False
    """Write over a run that is already in --output-dir."""
    resume: str | None = None
    """Go on with a run that was stopped or killed: its folder, one of its checkpoints, or nothing for the latest. Its
    options are used again; flags given now win (--steps to train longer)."""
    save_every: int | None = None
    """Steps between checkpoints; when not given, as often as takes 5 % of the run's time. An interrupt always saves."""
    keep: int = 3
    """The newest checkpoints that stay."""
    allow_pickle: bool = False
    """Load weights from pickle files (.bin) too, for models that have no safetensors: only from sources you trust."""
    dataset_split: str = "train"
    """Split of a dataset from the hub."""
    prompt_column: str | None = None
    """The column that holds the prompts; found by itself when it has a usual name (prompt, query, messages, text, ...)."""
    prompt_tokens: int | None = None
    """Keep only the first so many tokens of each prompt."""
    reward_label: str | None = None
    """Which label of the classifier is the reward; the last of one or two when not given."""
    lora_rank: int | None = None
    """Train LoRA adapters of this rank instead of all weights."""
    max_new_tokens: int = 48
    """Longest response, in tokens."""
    min_new_tokens: int = 0
    """Shortest response, in tokens."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_k: int = 0
    """Sample from so many most likely tokens only; 0: from all."""
    top_p: float = 1.0
    """Sample from the most likely tokens that have this probability together."""
    probes: int = 16
    """Prompts that are answered before and after training, to compare; not trained on where there are enough."""


@functools.cache
def options_class() -> type:
    from fastppo.config import PPOConfig

    return as_flat_class("FastppoTrain", "PPO on your model, your prompts and your reward.", TrainOptions, PPOConfig)


def read_options(argv: Sequence[str]) -> tuple[Any, Any, Any]:
    """(options, PPOConfig, where to resume). Raises UserError for what is missing or cannot be."""
    from fastppo.cli.checkpoints import with_saved_options
    from fastppo.config import PPOConfig

    argv, place = with_saved_options(argv)
    options = parse(options_class(), argv, "fastppo train", __doc__)
    for name in ("model", "dataset", "reward"):
        if not getattr(options, name):
            raise UserError(
                f"--{name} is required (as a flag or in --config's file); 'fastppo train --help' explains it"
            )
    for name, least in {
        "max_new_tokens": 1,
        "prompt_tokens": 1,
        "lora_rank": 1,
        "min_new_tokens": 0,
        "probes": 0,
        "save_every": 1,
        "keep": 1,
    }.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}; got {value}")
    ours = {"model_name": "model", "query_dataset": "dataset", "reward_model": "reward"}
    for field in fields(PPOConfig):
        if field.name in ours and getattr(options, field.name) == field.default:
            setattr(options, field.name, getattr(options, ours[field.name]))
    try:
        return options, PPOConfig(**{f.name: getattr(options, f.name) for f in fields(PPOConfig) if f.init}), place
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(str(error)) from error


def load_policy(options: Any) -> tuple[Any, Any]:
    """(model with value head, tokenizer)."""
    from transformers import AutoConfig, AutoTokenizer

    import fastppo

    extra = {}
    try:
        config = AutoConfig.from_pretrained(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        if options.lora_rank is not None:
            from peft import LoraConfig

            task = "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"
            extra = {"peft_config": LoraConfig(r=options.lora_rank, lora_alpha=2 * options.lora_rank, task_type=task)}
        kind = "Seq2SeqLM" if config.is_encoder_decoder else "CausalLM"
        wrapper = getattr(fastppo, f"AutoModelFor{kind}WithValueHead")
        model = wrapper.from_pretrained(options.model, allow_pickle=options.allow_pickle, **extra)
    except (OSError, ValueError) as error:
        known = "a folder here" if Path(options.model).is_dir() else "no folder here"
        said = one_line(error).replace("allow_pickle=True", "--allow-pickle")
        raise UserError(f"--model: {options.model} is {known} and could not be loaded as a policy: {said}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def room_for_prompt(model: Any, max_new_tokens: int) -> int | None:
    """Prompt tokens that fit beside the response; None where the model sets no limit or counts them apart."""
    config = model.pretrained_model.config
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return None if config.is_encoder_decoder or positions is None else positions - max_new_tokens


def generation_options(options: Any, tokenizer: Any) -> dict[str, Any]:
    least = {"min_new_tokens": options.min_new_tokens} if options.min_new_tokens else {}
    return {
        "max_new_tokens": options.max_new_tokens,
        "do_sample": True,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **least,
    }


def open_folder(options: Any, place: Any) -> Any:
    """The run's folder: before the slow parts, as one that cannot be written should not cost a model's loading."""
    from fastppo.cli.run_folder import RunFolder

    if place is not None:
        return RunFolder(place.run, resume=True)
    default = Path("runs") / time.strftime("train-%Y%m%d-%H%M%S")
    folder = RunFolder(options.output_dir or default, overwrite=options.overwrite)
    folder.write_config(saved_options(options))
    return folder


def saved_options(options: Any) -> dict[str, Any]:
    """What config.yaml holds, for --config and --resume."""
    return to_yaml_values(options, leave_out=("output_dir", "overwrite", "resume"))


def run(argv: Sequence[str]) -> int:
    options, config, place = read_options(argv)
    from accelerate.utils import broadcast_object_list

    from fastppo.cli.checkpoints import Checkpoints, answers_of
    from fastppo.cli.lock import joined
    from fastppo.cli.loop import LoopOptions
    from fastppo.cli.prompts import find_column, load_rows, make_prompts
    from fastppo.cli.rewards import load_reward
    from fastppo.cli.screen import Screen
    from fastppo.cli.session import Session, quiet_libraries, run_session
    from fastppo.core import set_seed

    state = joined()
    folder = open_folder(options, place) if state.is_main_process else None
    where = [None if folder is None else folder.path]
    if state.num_processes > 1:
        broadcast_object_list(where)
    if config.log_with:
        config.project_kwargs = {"logging_dir": str(where[0] / "trackers"), **config.project_kwargs}
    rows = load_rows(options.dataset, options.dataset_split)
    column = find_column(rows, options.prompt_column, options.dataset)
    checkpoints, resumed = Checkpoints(where[0] / "checkpoints", options.save_every, options.keep), None
    with quiet_libraries():
        names = [n for n in rows[0] if n != column]
        reward = load_reward(options.reward, names, options.reward_label, state.device, options.allow_pickle)
        set_seed(config.seed)  # before the value head, whose weights start at random
        model, tokenizer = load_policy(options)
        room = room_for_prompt(model, options.max_new_tokens)
        prompts = make_prompts(rows, column, tokenizer, options.prompt_tokens, room)
        from fastppo import PPOTrainer

        trainer = PPOTrainer(config, model, None, tokenizer)
    held_out = min(options.probes, max(0, len(prompts) - config.batch_size))
    probes = prompts[len(prompts) - held_out :] or prompts[: options.probes]
    kept = prompts[: len(prompts) - held_out]
    steps, name = config.total_ppo_epochs, Path(options.model).name
    screen = Screen(steps, f"fastppo train: {name} on {Path(options.dataset).name}, reward {options.reward}")
    if place is not None:
        resumed = resume(checkpoints, trainer, place, folder, screen)
        if folder is not None:
            folder.write_config(saved_options(options))
        resumed = (resumed.step, answers_of(resumed.extra, kept, probes))
    generation = generation_options(options, tokenizer)
    loop = LoopOptions(steps, generation, config.seed, probes, checkpoints, resumed)
    return run_session(trainer, kept, reward, loop, Session(folder, screen, screen.title, checkpoints))


def resume(checkpoints: Any, trainer: Any, place: Any, folder: Any, screen: Any) -> Any:
    """Load the checkpoint and say which, and why newer ones were passed over; the records after it are dropped."""
    back = checkpoints.load(trainer, place.path)
    if folder is None:
        return back
    for reason in back.passed_over:
        screen.say(f"Passed over a checkpoint: {reason}")
    screen.before = back.step
    screen.say(f"Going on after step {back.step}, from {back.path}")
    folder.at_step(back.step)
    return back
