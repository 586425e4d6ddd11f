"""What scores a response: a reward model, a Python function over texts, an HTTP endpoint, or a weighted list of them.

Suffixes: B sequences, L prompt + response tokens.
"""

import contextlib
import http.client
import inspect
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from fastppo import distributed
from fastppo.engine.body import Inputs
from fastppo.engine.engine import SCORED_TOKENS
from fastppo.engine.spec import Spec
from fastppo.experimental.ppo.engines import Classifier
from fastppo.experimental.ppo.models import check_scorer
from fastppo.packed_model import PackedModel
from fastppo.packing import PackedBatch, pack
from fastppo.reward import last_tokens
from fastppo.score import as_scores

if TYPE_CHECKING:
    from accelerate import Accelerator

RETRIES = 3
TIMEOUT_SECONDS = 60.0


class Judged(NamedTuple):
    """What is scored. tokens_BL, mask_BL: prompt + response, right-padded. columns: the dataset's other columns."""

    tokens_BL: torch.Tensor
    mask_BL: torch.Tensor
    prompts: list[str]
    completions: list[str]
    columns: dict[str, list]


class Rewards:
    """Sum of weight * score over the given sources, and each source's own scores by name."""

    def __init__(self, reward: Any, weights: list[float] | None, chunk: int):
        parts = list(reward) if isinstance(reward, (list, tuple)) else [reward]
        pairs = [part if isinstance(part, tuple) else (part, 1.0) for part in parts]
        if weights is not None:
            if len(weights) != len(pairs):
                raise ValueError(f"PPOTrainer: {len(pairs)} rewards but {len(weights)} reward_weights")
            pairs = [(source, weight) for (source, _), weight in zip(pairs, weights, strict=True)]
        if not pairs:
            raise ValueError("PPOTrainer: reward_model is an empty list")
        self.sources = [_source(part, chunk) for part, _ in pairs]
        self.weights = [float(weight) for _, weight in pairs]

    @property
    def models(self) -> list[nn.Module]:
        return [source.model for source in self.sources if isinstance(source, ModelReward)]

    def prepare(self, accelerator: "Accelerator") -> None:
        """Reward models to the device."""
        for source in self.sources:
            if isinstance(source, ModelReward):
                source.prepare(accelerator)

    def __call__(self, judged: Judged) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(scores [B], name -> scores [B]), float32 on the CPU. NonFinite names the sequences of a NaN or infinity."""
        parts = [as_scores(source(judged), len(judged.completions)) for source in self.sources]
        total_B = sum(weight * part for weight, part in zip(self.weights, parts, strict=True))
        names = [source.name for source in self.sources]
        named = {f"{n}_{i}" if names.count(n) > 1 else n: p for i, (n, p) in enumerate(zip(names, parts, strict=True))}
        return total_B, named if len(parts) > 1 else {}


def _source(reward: Any, chunk: int) -> Callable[[Judged], Any]:
    if isinstance(reward, nn.Module):
        return ModelReward(reward, chunk)
    if isinstance(reward, str):
        return EndpointReward(reward)
    if callable(reward):
        return FunctionReward(reward)
    raise TypeError(
        "PPOTrainer: reward_model must be a sequence classifier, a function of (prompts, completions), the URL of an "
        f"endpoint, or a list of these; got {type(reward).__name__}"
    )


class ModelReward:
    """The score of a sequence classifier that reads the policy's tokens, at the last token of prompt + response."""

    def __init__(self, model: nn.Module, chunk: int):
        check_scorer(model, "reward_model")
        self.name, self.model, self.chunk = type(model).__name__, model.eval(), chunk
        self._packed, self._engine = PackedModel(model), Classifier(model)
        self._whole: Callable = lambda function: function()

    def prepare(self, accelerator: "Accelerator") -> None:
        """To the device. Under ZeRO-3 the model may have been sharded when it was loaded: then it is whole while it scores."""
        self.model.to(accelerator.device).eval()
        self._whole = partial(distributed.whole, accelerator, self.model)

    def __call__(self, judged: Judged) -> torch.Tensor:
        return self._whole(partial(self._judge, judged))

    @torch.no_grad()
    def _judge(self, judged: Judged) -> torch.Tensor:
        device, pad = next(self.model.parameters()).device, self._packed.inner.config.pad_token_id
        spec = "autocast" if torch.is_autocast_enabled(device.type) else self._engine.read()
        most = SCORED_TOKENS // judged.tokens_BL.shape[1]
        rows = self.chunk if isinstance(spec, str) else max(1, min(self.chunk, most))
        scores, parts = [], (judged.tokens_BL.split(rows), judged.mask_BL.split(rows))
        with self._packed.attention() if isinstance(spec, str) else contextlib.nullcontext():
            for tokens_BL, mask_BL in zip(*parts, strict=True):
                longest = int(mask_BL.sum(1).max())
                tokens_BL, mask_BL = tokens_BL[:, :longest].to(device), mask_BL[:, :longest].to(device)
                batch = pack(tokens_BL, mask_BL)
                is_last_BL = torch.zeros_like(batch.kept_BT)
                is_last_BL.scatter_(1, last_tokens(tokens_BL, mask_BL, pad)[:, None], True)
                at_B = batch.pick(is_last_BL).nonzero()[:, 0]
                scores.append(self._scores(spec, tokens_BL, batch, at_B).float().cpu())
        return torch.cat(scores)

    def _scores(
        self, spec: Spec | str, tokens_BL: torch.Tensor, batch: PackedBatch, at_B: torch.Tensor
    ) -> torch.Tensor:
        """[B], of the hidden states at_B: on the engine, or where that does not know the model on its own modules."""
        if isinstance(spec, str):
            return self._packed.inner.score(self._packed.hidden(tokens_BL, batch)[at_B])[:, 0]
        tokens_N, places_N = batch.tokens_1N[0], batch.positions_1N[0]
        return self._engine.score(spec, Inputs(tokens_N, places_N, batch.cu_seqlens, at_B, len(tokens_N)))


class FunctionReward:
    """function(prompts, completions, **columns) -> one number per completion.

    prompts, completions: lists of str, by position; by name where `completions` is not the function's second parameter
    (`def short(completions)`, `def right(completions, answer)`). Columns of the dataset are passed by name: those the
    function has parameters for, or all where it takes **kwargs.
    """

    def __init__(self, function: Callable):
        self.name = getattr(function, "__name__", type(function).__name__)
        self.function = function
        parameters = inspect.signature(function).parameters.values()
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.names = [p.name for p in parameters]
        places = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self.by_name = "completions" in self.names and "completions" not in places[1:2]

    def __call__(self, judged: Judged) -> Any:
        columns = {n: x for n, x in judged.columns.items() if n not in ("prompts", "completions")}
        if not self.takes_all:
            columns = {name: x for name, x in columns.items() if name in self.names}
        texts = {"prompts": judged.prompts, "completions": judged.completions}
        if not self.by_name:
            return self.function(*texts.values(), **columns)
        return self.function(**{n: x for n, x in texts.items() if self.takes_all or n in self.names}, **columns)


class EndpointError(RuntimeError):
    """A reward endpoint that cannot be reached, or answers with anything but one number per completion."""


class EndpointReward:
    """POST {"prompts", "completions", column: [...]} as JSON; the answer is a list of numbers, or {"scores": [...]}.

    Raises EndpointError.
    """

    name = "endpoint"

    def __init__(self, url: str):
        if not url.startswith(("http://", "https://")):
            raise ValueError(
                f"PPOTrainer: reward_model {url!r} is no http(s) URL; load a model first and pass the model itself"
            )
        self.url = url

    def __call__(self, judged: Judged) -> Any:
        body = {name: x for name, x in judged.columns.items() if _is_json(x)}
        body |= {"prompts": judged.prompts, "completions": judged.completions}
        answer = self._post(json.dumps(body).encode())
        scores = answer.get("scores", answer.get("rewards")) if isinstance(answer, dict) else answer
        if not isinstance(scores, list):
            raise EndpointError(
                f'reward endpoint {self.url}: wanted a list or {{"scores": [...]}}; got {str(answer)[:200]}'
            )
        numbers = [x for x in scores if isinstance(x, (int, float))]
        if len(numbers) != len(scores) or len(scores) != len(judged.completions):
            raise EndpointError(
                f"reward endpoint {self.url}: wanted {len(judged.completions)} numbers, one per completion; got "
                f"{len(numbers)} numbers in {len(scores)} entries: {str(scores)[:200]}"
            )
        return scores

    def _post(self, body: bytes) -> Any:
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        for attempt in range(RETRIES):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                    return json.load(response)
            except ValueError as error:
                raise EndpointError(f"reward endpoint {self.url}: its answer is not JSON: {error}") from error
            except (OSError, http.client.HTTPException) as error:  # URLError; a connection that ends in the answer
                client_error = isinstance(error, urllib.error.HTTPError) and error.code < 500
                if client_error or attempt == RETRIES - 1:
                    tries = f"{attempt + 1} {'try' if attempt == 0 else 'tries'}"
                    raise EndpointError(f"reward endpoint {self.url} failed after {tries}: {error}") from error
                time.sleep(2**attempt)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
