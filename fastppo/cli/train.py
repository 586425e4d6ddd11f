"""`fastppo train`: PPO on your model, your prompts and your reward.

fastppo train --model gpt2 --dataset prompts.jsonl --reward rewards.py:score --batch-size 32 --mini-batch-size 8
"""

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fastppo.cli.errors import UserError
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


def read_options(argv: Sequence[str]) -> tuple[Any, Any]:
    """(options, PPOConfig). Raises UserError for what is missing or cannot be."""
    from fastppo.config import PPOConfig

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
    }.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}; got {value}")
    ours = {"model_name": "model", "query_dataset": "dataset", "reward_model": "reward"}
    for field in fields(PPOConfig):
        if field.name in ours and getattr(options, field.name) == field.default:
            setattr(options, field.name, getattr(options, ours[field.name]))
    try:
        return options, PPOConfig(**{f.name: getattr(options, f.name) for f in fields(PPOConfig) if f.init})
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
        model = wrapper.from_pretrained(options.model, **extra)
    except (OSError, ValueError) as error:
        known = "a folder here" if Path(options.model).is_dir() else "no folder here"
        said = " ".join(str(error).split())[:400]
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


def run(argv: Sequence[str]) -> int:
    options, config = read_options(argv)
    from accelerate import PartialState

    from fastppo.cli.loop import LoopOptions
    from fastppo.cli.prompts import find_column, load_rows, make_prompts
    from fastppo.cli.rewards import load_reward
    from fastppo.cli.run_folder import RunFolder
    from fastppo.cli.screen import Screen
    from fastppo.cli.session import Session, quiet_libraries, run_session
    from fastppo.core import set_seed

    state, folder = PartialState(), None
    if (
        state.is_main_process
    ):  # before the slow parts: a folder that cannot be written should not cost a model's loading
        default = Path("runs") / time.strftime("train-%Y%m%d-%H%M%S")
        folder = RunFolder(options.output_dir or default, overwrite=options.overwrite)
        folder.write_config(to_yaml_values(options, leave_out=("output_dir", "overwrite")))
    rows = load_rows(options.dataset, options.dataset_split)
    column = find_column(rows, options.prompt_column, options.dataset)
    with quiet_libraries():
        reward = load_reward(options.reward, [n for n in rows[0] if n != column], options.reward_label, state.device)
        set_seed(config.seed)  # before the value head, whose weights start at random
        model, tokenizer = load_policy(options)
        room = room_for_prompt(model, options.max_new_tokens)
        prompts = make_prompts(rows, column, tokenizer, options.prompt_tokens, room)
        from fastppo import PPOTrainer

        trainer = PPOTrainer(config, model, None, tokenizer)
    held_out = min(options.probes, max(0, len(prompts) - config.batch_size))
    probes = prompts[len(prompts) - held_out :] or prompts[: options.probes]
    kept = prompts[: len(prompts) - held_out]
    steps = config.total_ppo_epochs
    loop = LoopOptions(steps, generation_options(options, tokenizer), config.seed, probes)
    title = f"fastppo train: {Path(options.model).name} on {Path(options.dataset).name}, reward {options.reward}"
    return run_session(trainer, kept, reward, loop, Session(folder, Screen(steps, title), title))
