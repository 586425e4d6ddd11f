"""A model that talks to tools: generate until a call, run the tool, append its answer, go on.

    <request><ToolName>argument<call>answer of the tool<response> ... final answer<submit>

The model writes up to <call> or <submit>; the environment writes the tool's answer and <response>.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from fastppo.extras.text_history import TextHistory
from fastppo.generation.arguments import check_arguments
from fastppo.wanted import are_callables, check, is_whole, want


def _are_tools(tools: Any) -> bool:
    return are_callables(list(tools.values()) if isinstance(tools, Mapping) else tools)


_AT_LEAST_1 = ("a whole number of at least 1", lambda x: is_whole(x, 1))
_RULES = {
    "model": ("a value-head model, or one with generate()", lambda x: hasattr(x, "generate") or hasattr(x, "module")),
    "tokenizer": ("a transformers tokenizer", lambda x: hasattr(x, "batch_decode")),
    "reward_fn": ("a function of the last segments", callable),
    "tools": ("functions (text -> text), in a list or by name in a dictionary", _are_tools),
    "prompt": ("a text", lambda x: isinstance(x, str)),
    **dict.fromkeys(("max_turns", "max_length"), _AT_LEAST_1),
    "max_tool_reponse": ("a whole number of at least 3", lambda x: is_whole(x, 3)),
    "generation_kwargs": ("a dictionary", lambda x: isinstance(x, Mapping)),
}


class TurnEnd(StoppingCriteria):
    """A row is done when its newly generated text contains a stop string; `lengths` counts its tokens up to there."""

    def __init__(self, stop_strings: Sequence[str], tokenizer):
        self.stop_strings = stop_strings
        self.tokenizer = tokenizer
        self.start = None
        self.lengths: list[int] = []
        self.done: list[bool] = []

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        if self.start is None:
            self.start = input_ids.shape[-1] - 1  # called after the first new token
            self.lengths = [0] * len(input_ids)
            self.done = [False] * len(input_ids)
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :])
        for row, text in enumerate(texts):
            self.lengths[row] += not self.done[row]
            self.done[row] = self.done[row] or any(stop in text for stop in self.stop_strings)
        return torch.tensor(self.done, device=input_ids.device)


class TextEnvironment:
    """Runs episodes for PPO with tools.

    model: value-head model (or anything with generate). tools: callables str -> str, as a mapping by name or a list (then
    the name is the function's, or the class's). reward_fn(last segments, **reward_kwargs) -> one reward per episode.
    prompt: put in front of every query. max_turns: of the model. max_tool_reponse: characters of a tool's answer that are
    kept. max_length: tokens of an episode; longer ones end as truncated. generation_kwargs: for model.generate.
    Raises ValueError for an argument that is missing or of the wrong kind, or a reward_fn that does not give one number each.
    """

    request_token = "<request>"
    call_token = "<call>"
    response_token = "<response>"
    submit_token = "<submit>"

    def __init__(
        self,
        model=None,
        tokenizer=None,
        tools: Mapping[str, Callable] | Sequence[Callable] | None = None,
        reward_fn: Callable[..., Sequence] | None = None,
        prompt: str | None = None,
        max_turns: int = 4,
        max_tool_reponse: int = 100,
        max_length: int | None = None,
        generation_kwargs: Mapping[str, Any] | None = None,
    ):
        needed = {"model": model, "tokenizer": tokenizer, "reward_fn": reward_fn}
        if missing := [name for name, value in needed.items() if value is None]:
            raise ValueError(f"TextEnvironment: {', '.join(missing)} must be given")
        sizes = {"max_turns": max_turns, "max_length": max_length, "max_tool_reponse": max_tool_reponse}
        others = {"prompt": prompt, "tools": tools, "generation_kwargs": generation_kwargs}
        check("TextEnvironment", needed | sizes | others, _RULES)
        check_arguments(generation_kwargs or {})
        self.model = model
        self.tokenizer = tokenizer
        self.prompt = prompt or ""
        self.tools = dict(tools) if isinstance(tools, Mapping) else {_tool_name(tool): tool for tool in tools or ()}
        self.reward_fn = reward_fn
        self.max_length = max_length
        self.max_turns = max_turns
        self.max_tool_response = max_tool_reponse
        self.generation_kwargs = dict(generation_kwargs or {})
        self.is_encoder_decoder = hasattr(self._unwrapped, "is_encoder_decoder")
        self.current_device = getattr(self._unwrapped, "pretrained_model", self._unwrapped).device

    @property
    def _unwrapped(self):
        """The model itself under DistributedDataParallel and the like."""
        return getattr(self.model, "module", self.model)

    def run(self, queries: Sequence[str], **rewards_kwargs):
        """Episodes to their end: (queries, responses, masks, rewards, histories), the first three as token tensors.

        masks: 1 on the tokens of a response that the model wrote; hand them to PPOTrainer.step as response_masks.
        """
        good = (
            isinstance(queries, Sequence) and not isinstance(queries, str) and all(isinstance(q, str) for q in queries)
        )
        want(good, "TextEnvironment.run", "queries", "a list of texts", queries)
        histories = []
        for query in queries:
            text = self.prompt + query
            histories.append(TextHistory(text, self._tokens(text), system=True))
        for _ in range(self.max_turns):
            if all(history.completed for history in histories):
                break
            self.generate(histories)
            self.tasks_end_check(histories)
            for history in histories:
                self.step(history)
            self.tasks_end_check(histories, model_turn=False)
        self.compute_reward(histories, **rewards_kwargs)
        split = [history.split_query_response_tokens() for history in histories]
        query_tokens, responses, masks = (
            (list(column) for column in zip(*split, strict=True)) if split else ([], [], [])
        )
        return query_tokens, responses, masks, [history.reward for history in histories], histories

    def step(self, history: TextHistory) -> TextHistory:
        """Answer the tool call at the end of the history, unless the episode is over."""
        truncated, ended = self.task_end_check(history)
        if ended:
            history.complete(truncated)
        if history.completed:
            return history
        answer = self._tool_answer(history.last_text_segment)
        if len(answer) > self.max_tool_response:
            answer = answer[: self.max_tool_response - 3] + "..."
        text = answer + self.response_token
        history.append_segment(text, self._tokens(text, add_special_tokens=False), system=True)
        return history

    def _tool_answer(self, text: str) -> str:
        tool, argument = self.parse_tool_call(text)
        if tool is None:
            return f"Unknown tool call: {text}"
        if tool not in self.tools:
            return f"Unknown tool {tool}."
        try:
            return str(self.tools[tool](argument))
        except Exception as error:  # whatever a tool raises is for the model to read
            return f"Tool error: {error}"

    def parse_tool_call(self, text: str) -> tuple[str | None, str | None]:
        """ "...<request><Name>argument<call>" -> ("Name", "argument"); (None, None) when it is no call."""
        call = re.search(f"{re.escape(self.request_token)}(.*?){re.escape(self.call_token)}", text, re.DOTALL)
        named = call and re.search(r"<(.*?)>", call[1])
        if not named:
            return None, None
        # the argument starts after the first ">" of the call
        return named[1], call[1].split(">", 1)[1]

    def compute_reward(self, histories: list[TextHistory], **reward_kwargs) -> list[TextHistory]:
        """reward_fn on the last segment of every history."""
        rewards = self.reward_fn([history.last_text_segment for history in histories], **reward_kwargs)
        want(hasattr(rewards, "__len__"), "TextEnvironment", "what reward_fn gives", "a list of rewards", rewards)
        if len(rewards) != len(histories):
            raise ValueError(f"TextEnvironment: reward_fn gave {len(rewards)} rewards for {len(histories)} episodes")
        for history, reward in zip(histories, rewards, strict=True):
            history.reward = reward
        return histories

    def generate(self, histories: list[TextHistory]) -> list[TextHistory]:
        """The model's next turn in every history that is not completed."""
        active = [history for history in histories if not history.completed]
        responses = self._generate_batched([history.tokens for history in active])
        texts = self.tokenizer.batch_decode(responses)
        for history, text, tokens in zip(active, texts, responses, strict=True):
            history.append_segment(text, tokens, system=False)
        return histories

    def tasks_end_check(self, histories: list[TextHistory], model_turn: bool = True) -> list[TextHistory]:
        """Complete the histories that are at their end."""
        for history in histories:
            if not history.completed:
                truncated, ended = self.task_end_check(history, model_turn=model_turn)
                if ended:
                    history.complete(truncated)
        return histories

    def task_end_check(self, history: TextHistory, model_turn: bool = True) -> tuple[bool, bool]:
        """(truncated, ended): too long; end of sequence, submitted, or a model's turn that calls no tool."""
        if history.completed:
            return False, False
        if self.max_length is not None and len(history.tokens) > self.max_length:
            return True, True
        last = history.last_text_segment
        has_eos = self.tokenizer.eos_token is not None and self.tokenizer.eos_token in history.text
        submitted = self.submit_token in last
        calls = self.request_token in last and self.call_token in last
        return False, has_eos or submitted or (model_turn and not calls)

    @torch.no_grad()
    def _generate_batched(
        self, query_tensors: list[Tensor], batch_size: int = 16, pad_to_multiple_of: int | None = None
    ) -> list[Tensor]:
        """One turn per query, cut after its call, submission or end of sequence."""
        outputs = []
        for start in range(0, len(query_tensors), batch_size):
            batch = query_tensors[start : start + batch_size]
            inputs = _left_pad(batch, self.tokenizer.pad_token_id, pad_to_multiple_of)
            inputs = {name: tensor.to(self.current_device) for name, tensor in inputs.items()}
            turn_end = TurnEnd([self.call_token, self.submit_token], self.tokenizer)
            criteria = StoppingCriteriaList([turn_end])
            tokens = self._unwrapped.generate(**inputs, **{**self.generation_kwargs, "stopping_criteria": criteria})
            # an encoder-decoder answers with its start token first
            prompt_length = 1 if self.is_encoder_decoder else inputs["input_ids"].shape[1]
            outputs += [
                _cut_after(row[prompt_length:][:length], self.tokenizer.eos_token_id)
                for row, length in zip(tokens, turn_end.lengths, strict=True)
            ]
        return outputs

    def _tokens(self, text: str, **kwargs) -> Tensor:
        return self.tokenizer(text, return_tensors="pt", **kwargs).input_ids[0].to(self.current_device)


def _tool_name(tool: Callable) -> str:
    return getattr(tool, "__name__", type(tool).__name__)


def _left_pad(sequences: list[Tensor], pad_token_id: int, multiple_of: int | None) -> dict[str, Tensor]:
    length = max(len(sequence) for sequence in sequences)
    if multiple_of is not None:
        length = -(-length // multiple_of) * multiple_of
    rows = [torch.cat([s.new_full((length - len(s),), pad_token_id), s]) for s in sequences]
    masks = [torch.arange(length, device=s.device) >= length - len(s) for s in sequences]
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks).long()}


def _cut_after(tokens: Tensor, end_token_id: int | None) -> Tensor:
    """Up to and including the first end token."""
    if end_token_id is None or not len(ends := (tokens == end_token_id).nonzero()):
        return tokens
    return tokens[: ends[0, 0] + 1]
