"""Rewards for `fastppo train`: a function by name, or a sequence classifier; what they return is checked every step."""

import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastppo.cli.errors import RewardError, UserError, nearest, one_line
from fastppo.cli.loop import Prompt, Reward

# What a reward function may ask for by the name of a parameter, besides the dataset's columns.
GIVEN = {
    "prompts": lambda prompts, responses: [p.text for p in prompts],
    "responses": lambda prompts, responses: list(responses),
    "completions": lambda prompts, responses: list(responses),
    "texts": lambda prompts, responses: [p.text + r for p, r in zip(prompts, responses, strict=True)],
}


def checked(name: str, scores: Any, responses: Sequence[str]) -> list[float]:
    """`scores` as one finite float per response. Raises RewardError naming the reward and the response."""
    if hasattr(scores, "tolist"):
        scores = scores.tolist()
    if not isinstance(scores, (list, tuple)):
        kind = type(scores).__name__
        raise RewardError(f"reward {name} must return a list of {len(responses)} numbers; got a {kind}: {scores!r}")
    if len(scores) != len(responses):
        raise RewardError(f"reward {name} must return {len(responses)} numbers, one per response; got {len(scores)}")
    numbers = []
    for index, score in enumerate(scores):
        number = score.item() if math.prod(getattr(score, "shape", (0,))) == 1 else score  # one-element arrays
        if not isinstance(number, (int, float)):
            raise RewardError(
                f"reward {name} must return numbers; got {number!r} ({type(number).__name__}) for response {index}: "
                f"{responses[index][:200]!r}"
            )
        if not math.isfinite(number):
            raise RewardError(f"reward {name} returned {number} for response {index}: {responses[index][:200]!r}")
        numbers.append(float(number))
    return numbers


class FunctionReward:
    """Calls the user's function with the parameters that it names: prompts, responses, texts (prompt + response), or
    any column of the dataset; each is a list with one entry per response. `**kwargs` gets all of them."""

    def __init__(self, function: Callable, name: str, columns: Sequence[str]):
        self.function, self.name = function, name
        parameters = inspect.signature(function).parameters.values()
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        available = [*GIVEN, *columns]
        for parameter in named:
            if parameter.name not in available and parameter.default is parameter.empty:
                raise UserError(
                    f"--reward: {name} wants a parameter {parameter.name!r}, which is not given."
                    f"{nearest(parameter.name, available)}"
                )
        self.names = available if self.takes_all else [p.name for p in named if p.name in available]
        if not self.names:
            raise UserError(f"--reward: {name} must take at least one of: {', '.join(available)}")

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        arguments = {
            name: GIVEN[name](prompts, responses) if name in GIVEN else [p.columns.get(name) for p in prompts]
            for name in self.names
        }
        try:
            scores = self.function(**arguments)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise RewardError(
                f"reward {self.name} raised {type(error).__name__}: {error} ({where.filename}, line {where.lineno})"
            ) from error
        return checked(self.name, scores, responses)


class ClassifierReward:
    """The logit of one label of a transformers sequence classifier for prompt + response; unbounded, as PPO likes it."""

    def __init__(self, model: Any, tokenizer: Any, name: str, label: int, batch_size: int = 32):
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.label, self.batch_size = label, batch_size

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        import torch

        texts, scores = GIVEN["texts"](prompts, responses), []
        for start in range(0, len(texts), self.batch_size):
            batch = texts[start : start + self.batch_size]
            inputs = self.tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
            with torch.inference_mode():
                logits_BC = self.model(**inputs.to(self.model.device)).logits
            scores += logits_BC[:, self.label].float().tolist()
        return checked(self.name, scores, responses)


def load_reward(
    spec: str, columns: Sequence[str], label: str | None = None, device: Any = "cpu", allow_pickle: bool = False
) -> Reward:
    """`module:function`, `path.py:function`, `path.py` (its function `reward`), or a classifier's folder or hub id."""
    source, _, function = spec.partition(":")
    if source.endswith(".py"):
        return FunctionReward(find_function(import_file(Path(source)), function or "reward", spec), spec, columns)
    if function:
        return FunctionReward(find_function(import_module(source, spec), function, spec), spec, columns)
    return load_classifier(spec, label, device, allow_pickle)


def import_file(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"--reward: there is no file {path}")
    loader = importlib.util.spec_from_file_location(f"fastppo_reward_{path.stem}", path.resolve())
    module = importlib.util.module_from_spec(loader)
    sys.modules[loader.name] = module  # dataclasses and pickle look their module up by name
    sys.path.insert(0, str(path.resolve().parent))  # so that it can import its neighbours, as a script can
    try:
        loader.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--reward: {path} could not be imported: {type(error).__name__}: {error}") from error
    return module


def import_module(name: str, spec: str) -> Any:
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module beside the user's work, as with `python -m`
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise UserError(
            f"--reward: module {name!r} of {spec!r} could not be imported: {type(error).__name__}: {error}"
        ) from error


def find_function(module: Any, name: str, spec: str) -> Callable:
    found = getattr(module, name, None)
    if callable(found):
        return found
    functions = [n for n, value in vars(module).items() if inspect.isfunction(value) and not n.startswith("_")]
    what = f"no function {name!r}" if found is None else f"{name!r}, but it is not a function"
    raise UserError(f"--reward: {spec}: the module has {what}.{nearest(name, functions)}")


def load_classifier(source: str, label: str | None, device: Any, allow_pickle: bool = False) -> ClassifierReward:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from fastppo.models.pickles import safetensors_only

    try:
        with safetensors_only(source, allow_pickle, "--allow-pickle") as options:
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                source, output_loading_info=True, **options
            )
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--reward: {source!r} is neither module:function nor path.py:function, and did not load as a sequence "
            f"classifier: {one_line(error)}"
        ) from error
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(
            f"--reward: {source} is no trained sequence classifier: its weights lack {', '.join(missing[:4])}, so its scores "
            "would be random. Train one with 'fastppo reward', or give module:function."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token, model.config.pad_token_id = tokenizer.eos_token, tokenizer.eos_token_id
    return ClassifierReward(model.to(device), tokenizer, source, find_label(model.config, label, source))


def find_label(config: Any, asked: str | None, source: str) -> int:
    """The index of the label that is the reward: the one asked for, the only one, or the last (positive) of two."""
    names = {str(name).lower(): int(index) for index, name in config.id2label.items()}
    if asked is None:
        if config.num_labels <= 2:
            return config.num_labels - 1
        raise UserError(
            f"--reward: {source} has {config.num_labels} labels; choose with --reward-label: {', '.join(names)}"
        )
    if asked.isdigit() and int(asked) < config.num_labels:
        return int(asked)
    if asked.lower() not in names:
        raise UserError(f"--reward-label: {source} has no label {asked!r}.{nearest(asked.lower(), names)}")
    return names[asked.lower()]
