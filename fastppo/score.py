"""Scores: from whatever judges a response to one finite float32 number per sequence, then TRL's scaling and clipping.

    Rollout -> score(...) -> scores_B -> shape_scores(...) -> scores_B

Suffix: B sequences.
"""

import math
from collections.abc import Callable, Sequence

import torch

EPSILON = torch.finfo(torch.float32).eps


class NonFinite(FloatingPointError):
    """A NaN or infinity where training needs a number. Nothing was changed by it."""


def score(judge, prompts: Sequence[str], responses: Sequence[str], tokenizer=None) -> torch.Tensor:
    """float32 [B] on the CPU: what `judge` gives each response.

    judge: numbers (list or tensor) | transformers pipeline (text classification: score of the last label) | sequence
    classifier (an nn.Module with `.config.num_labels`; needs its tokenizer; one label: its logit, else the last label's
    log-odds are left to you: its logit) | callable(prompts, responses) -> B numbers.
    Raises ValueError on a wrong number of scores and NonFinite on a NaN or infinite one.
    """
    texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    if isinstance(judge, (list, tuple, torch.Tensor)):
        scores = judge
    elif type(judge).__name__.endswith("Pipeline"):
        scores = _pipeline_scores(judge, texts)
    elif isinstance(judge, torch.nn.Module) and hasattr(getattr(judge, "config", None), "num_labels"):
        scores = _classifier_scores(judge, texts, tokenizer)
    elif isinstance(judge, Callable):
        scores = judge(list(prompts), list(responses))
    else:
        raise TypeError(f"score: judge must be numbers, a pipeline, a classifier or a callable; got {type(judge)}")
    return as_scores(scores, len(texts))


def as_scores(scores, count: int, where: str = "score") -> torch.Tensor:
    """float32 [B] on the CPU from a list of numbers or one-element tensors, or a tensor; checked."""
    if isinstance(scores, torch.Tensor):
        scores = scores.detach().flatten().tolist()
    try:
        values = [x.item() if isinstance(x, torch.Tensor) else float(x) for x in scores]
    except (TypeError, ValueError, RuntimeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{where}: {count} numbers wanted, one per response; got {scores!r:.80} ({error})") from error
    if len(values) != count:
        raise ValueError(f"{where}: {count} scores wanted, one per response; got {len(values)}")
    scores_B = torch.tensor(values, dtype=torch.float32)
    check_finite(where, scores_B)
    return scores_B


def check_finite(what: str, values_B: torch.Tensor, where: str = "") -> None:
    """Raise NonFinite naming the rows of values_B ([B] or [B, ...]) that hold a NaN or infinity."""
    good_B = torch.isfinite(values_B.flatten(1) if values_B.dim() > 1 else values_B[:, None]).all(1)
    if bool(good_B.all()):
        return
    rows = (~good_B).nonzero()[:, 0].tolist()
    first = values_B[rows[0]].flatten()
    shown = first[~torch.isfinite(first)][0].item()
    raise NonFinite(f"{what} is {shown} for sequence{'s' * (len(rows) > 1)} {rows[:16]} of the batch{where}")


def _pipeline_scores(pipe, texts: list[str]) -> list[float]:
    label = list(pipe.model.config.id2label.values())[-1]
    outputs = pipe(texts, top_k=None, function_to_apply="none")
    return [next(x["score"] for x in output if x["label"] == label) for output in outputs]


@torch.no_grad()
def _classifier_scores(model: torch.nn.Module, texts: list[str], tokenizer) -> torch.Tensor:
    if tokenizer is None:
        raise ValueError(
            "score: a sequence classifier needs its tokenizer: score(model, prompts, responses, tokenizer)"
        )
    device = next(model.parameters()).device
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
    return model(**inputs).logits[:, -1].float()


def shape_scores(scores_B: torch.Tensor, config, running) -> torch.Tensor:
    """Scores after use_score_scaling, use_score_norm and score_clip; `running` (RunningMoments) takes the batch in.

    scaling: s / (std + eps);  with norm: (s - mean) / (std + eps);  then clamp(s, -clip, clip).
    """
    if config.use_score_scaling:
        running.update(scores_B)
        factor = float(running.std) + EPSILON
        shift = float(running.mean) if config.use_score_norm else 0.0
        scores_B = (scores_B - shift) / factor
    if config.score_clip is not None:
        scores_B = scores_B.clamp(-config.score_clip, config.score_clip)
    return scores_B


def snapshot(running) -> dict[str, float]:
    """The state of a RunningMoments, to put back when a step is abandoned."""
    return {name: getattr(running, name) for name in ("mean", "std", "var", "count")}


def restore(running, state: dict[str, float]) -> None:
    if any(isinstance(x, float) and math.isnan(x) for x in state.values()):
        raise ValueError(f"RunningMoments: refusing to restore NaN: {state}")
    for name, value in state.items():
        setattr(running, name, value)
