"""`fastppo ppo`: PPO with the late trainer, against a reward model, a function or an endpoint.

fastppo ppo --model runs/sft/model --dataset prompts.jsonl --reward runs/reward/model --output-dir runs/ppo
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastppo.cli.errors import UserError
from fastppo.cli.stage_options import Figure, Stage, StageOptions

PANELS = (
    ("objective/scores", "Reward", "mean score of a batch", "#0b7a75"),
    ("objective/kl", "KL from the start", "nats per response", "#c8553d"),
    ("policy/entropy_avg", "Entropy", "nats per token", "#5b5f97"),
    ("policy/clipfrac_avg", "Clip fraction", "share of tokens", "#b8860b"),
)
COLUMNS = (
    ("objective/scores", "reward", "{:+.2f}"),
    ("objective/kl", "KL", "{:.2f}"),
    ("policy/entropy_avg", "entropy", "{:.2f}"),
    ("policy/clipfrac_avg", "clipped", "{:.1%}"),
    ("eps", "episodes/s", "{:.0f}"),
)


@dataclass
class PPOOptions(StageOptions):
    reward: str = ""
    """A sequence classifier (folder or hub id), module:function, path.py:function, or the URL of an endpoint. Required. A
    function gets what its parameters are called: prompts, completions, texts (prompt + completion), or a column of the
    dataset; lists, one entry per response."""
    reward_label: str | None = None
    """Which label of the classifier is the reward; the last of one or two when not given."""
    value_model: str | None = None
    """A sequence classifier that starts as value function; a value head on the policy when not given."""
    prompt_column: str | None = None
    """The column that holds the prompts; found by itself when it has a usual name (prompt, query, messages, text, ...)."""
    prompt_tokens: int | None = None
    """Keep only the first so many tokens of each prompt."""
    allow_pickle: bool = False
    """Load weights from pickle files (.bin) too, for models that have no safetensors: only from sources you trust."""
    probes: int = 8
    """Prompts that are answered before and after training, in samples.json."""


class TextReward:
    """A reward of `fastppo train` as the late trainer calls it."""

    def __init__(self, reward: Any):
        self.reward, self.__name__ = reward, reward.name

    def __call__(self, prompts: list[str], completions: list[str], **columns: list) -> list[float]:
        from fastppo.cli.loop import Prompt

        rows = [Prompt(text, None, {n: c[i] for n, c in columns.items()}) for i, text in enumerate(prompts)]
        return self.reward(rows, completions)


def load_judge(options: Any, tokenizer: Any, columns: Sequence[str], device: Any) -> Any:
    """What PPOTrainer takes as reward_model. A classifier that shares the policy's tokens scores them packed."""
    from fastppo.cli.rewards import ClassifierReward, load_reward

    if options.reward.startswith(("http://", "https://")):
        return options.reward
    reward = load_reward(options.reward, columns, options.reward_label, device, options.allow_pickle)
    if not isinstance(reward, ClassifierReward):
        return TextReward(reward)
    model = reward.model
    fits = hasattr(model, "score") and hasattr(model, getattr(model, "base_model_prefix", None) or "-")
    same = reward.tokenizer.get_vocab() == tokenizer.get_vocab()
    return model if fits and same and model.config.num_labels == 1 else TextReward(reward)


def load_models(options: Any) -> tuple[Any, Any, Any]:
    """(policy, value model or None, tokenizer)"""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from fastppo.cli.stage import load_error
    from fastppo.models.pickles import safetensors_only

    flag, source = "--model", options.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        with safetensors_only(source, options.allow_pickle, "--allow-pickle") as only:
            policy, value = AutoModelForCausalLM.from_pretrained(source, **only), None
        if options.value_model:
            flag, source = "--value-model", options.value_model
            with safetensors_only(source, options.allow_pickle, "--allow-pickle") as only:
                value = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, **only)
    except (OSError, ValueError) as error:
        raise load_error(flag, source, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return policy, value, tokenizer


def read_prompts(options: Any, config: Any, policy: Any, tokenizer: Any, source: str, flag: str) -> Any:
    """Rows with input_ids, the prompt's text and the other columns."""
    from fastppo.cli.pairs import as_dataset, rows_of
    from fastppo.cli.prompts import find_column, make_prompts

    rows = rows_of(source, options.dataset_split, flag)
    column = find_column(rows, options.prompt_column, source)
    positions = getattr(policy.config, "max_position_embeddings", None) or getattr(policy.config, "n_positions", None)
    room = None if positions is None else positions - config.response_length
    try:
        prompts = make_prompts(rows, column, tokenizer, options.prompt_tokens, room)
    except UserError as error:
        text = str(error).replace("--dataset:", f"{flag}:", 1).replace("--max-new-tokens", "--response-length")
        raise UserError(text) from error
    made = [{**prompt.columns, "prompt": prompt.text, "input_ids": prompt.tokens.tolist()} for prompt in prompts]
    return as_dataset(made, f"{flag}: {source}")


def build(options: Any, config: Any) -> Any:
    from fastppo.cli.pairs import read_both
    from fastppo.cli.stage import adapter, told_errors
    from fastppo.core import set_seed
    from fastppo.experimental.ppo import PPOTrainer

    if options.probes < 0:
        raise UserError(f"--probes must be at least 0; got {options.probes}")
    set_seed(config.seed)
    policy, value, tokenizer = load_models(options)
    read = functools.partial(read_prompts, options, config, policy, tokenizer)
    data, held_out = read_both(options, read)
    columns = [name for name in data.column_names if name not in ("input_ids", "prompt")]
    judge = load_judge(options, tokenizer, columns, config.device)
    with told_errors():
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=policy,
            ref_model=None,
            reward_model=judge,
            value_model=value,
            train_dataset=data,
            eval_dataset=held_out,
            peft_config=adapter(options, "CAUSAL_LM"),
        )
    trainer.probes = list(held_out or data)[: options.probes]
    return trainer


def probe(trainer: Any) -> list[dict[str, Any]]:
    """Answers to trainer.probes, with scores; drawn with a seed of their own."""
    if not trainer.probes:
        return []
    batch = trainer.data_collator(trainer.probes)
    rollout = trainer.rollout(batch.prompts, trainer.args.seed)
    scores_B, _ = trainer.judge(rollout, batch.columns)
    texts = trainer.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
    rows = zip(batch.columns["prompt"], texts, scores_B.tolist(), strict=True)
    return [{"prompt": prompt, "response": text, "score": score} for prompt, text, score in rows]


STAGE = Stage(
    "ppo",
    "fastppo.experimental.ppo:PPOConfig",
    build,
    PANELS,
    COLUMNS,
    (Figure("objective/scores", "score", 5), Figure("objective/kl", "kl", 5, first=False)),
    PPOOptions,
    "update",
    probe,
)


def run(argv: Sequence[str]) -> int:
    return STAGE.run(argv, __doc__)
