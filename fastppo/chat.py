"""Dataset rows to token ids: text, prompt + completion, messages, preference pairs.

A row is conversational when its prompt, completion, messages, chosen or rejected is a list of {"role", "content"}.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

CONVERSATION_COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected")


def is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def is_conversational(row: dict) -> bool:
    return any(is_conversation(row.get(name)) for name in CONVERSATION_COLUMNS)


def load_chat_template(tokenizer: Any, path: str) -> None:
    """Give `tokenizer` the chat template in `path`: a .jinja file, or a tokenizer's folder or name."""
    if Path(path).is_file():
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        return
    from transformers import AutoTokenizer

    template = AutoTokenizer.from_pretrained(path).chat_template
    if template is None:
        raise ValueError(f"chat_template_path: the tokenizer {path!r} has no chat template")
    tokenizer.chat_template = template


def set_special_tokens(tokenizer: Any, *, eos_token: str | None = None, pad_token: str | None = None) -> None:
    """Set end-of-sequence and padding tokens; without a padding token the end-of-sequence token pads."""
    for name, token in (("eos_token", eos_token), ("pad_token", pad_token)):
        if token is None:
            continue
        if token not in tokenizer.get_vocab():
            raise ValueError(f"{name}: {token!r} is not in the tokenizer's vocabulary")
        setattr(tokenizer, name, token)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError("the tokenizer has neither a padding nor an end-of-sequence token: set tokenizer.pad_token")


def template_ids(tokenizer: Any, messages: list[dict], row: dict, **kwargs: Any) -> dict[str, list[int]]:
    """{"input_ids"[, "assistant_masks"]} of a conversation; `tools` and `chat_template_kwargs` of the row are passed on."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "the dataset has messages but the tokenizer has no chat template: set tokenizer.chat_template, or give "
            "chat_template_path a .jinja file or a tokenizer that has one"
        )
    encoded = tokenizer.apply_chat_template(
        messages, tools=row.get("tools"), return_dict=True, **kwargs, **(row.get("chat_template_kwargs") or {})
    )
    return {name: list(encoded[name]) for name in ("input_ids", "assistant_masks") if name in encoded}


def with_eos(tokenizer: Any, text: str) -> str:
    return text if tokenizer.eos_token is None or text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token


def common_prefix(first: list[int], second: list[int]) -> int:
    """Number of leading tokens that are the same."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _unread(row: dict, names: tuple[str, ...]) -> str:
    """ "got ['messages'] (messages: an empty list)": the row's columns, and what those of `names` hold."""
    held = [f"{name}: {_kind(row[name])}" for name in names if name in row]
    return f"got {sorted(row)}" + (f" ({', '.join(held)})" if held else "")


def _kind(value: Any) -> str:
    if is_conversation(value):
        return "messages"
    if isinstance(value, list):
        return "a list without {'role', 'content'} messages" if value else "an empty list"
    return "text" if isinstance(value, str) else type(value).__name__


def same_form(*values: Any) -> bool:
    """All text or all messages; None and "" and [] go with either."""
    given = [value for value in values if value]
    return all(isinstance(value, str) for value in given) or all(is_conversation(value) for value in given)


def prompt_ids(row: dict, tokenizer: Any, text_field: str = "text") -> list[int]:
    """A prompt for generation: `input_ids`, `prompt` or `messages` (with the generation prompt added), or text."""
    if row.get("input_ids") is not None:
        return list(row["input_ids"])
    names = ("prompt", "messages", "query", text_field)
    for name in names:
        value = row.get(name)
        if is_conversation(value):
            return template_ids(tokenizer, value, row, add_generation_prompt=True)["input_ids"]
        if isinstance(value, str):
            return tokenizer(value)["input_ids"]
    wanted = f"wanted input_ids, prompt, messages, query or {text_field}, as text or messages"
    raise ValueError(f"no prompt in the dataset row: {wanted}; {_unread(row, names)}")


def sft_ids(
    row: dict, tokenizer: Any, *, text_field: str = "text", completion_only: bool | None, assistant_only: bool
) -> dict[str, list[int]]:
    """{"input_ids", "labels"}: labels are the tokens, -100 where no loss is wanted.

    completion_only=None means: for rows with prompt and completion.
    """
    if "input_ids" in row:
        ids, loss_mask = list(row["input_ids"]), list(row.get("labels") or [])
        if loss_mask:
            return {"input_ids": ids, "labels": loss_mask}
        kept = row.get("completion_mask") if completion_only else None
        kept = row.get("assistant_masks") if assistant_only else kept
    elif row.get("prompt") is not None and row.get("completion") and same_form(row["prompt"], row["completion"]):
        ids, kept = _prompt_completion_ids(row, tokenizer, assistant_only, completion_only is not False)
    elif is_conversation(row.get("messages")):
        encoded = template_ids(tokenizer, row["messages"], row, return_assistant_tokens_mask=assistant_only)
        ids, kept = encoded["input_ids"], encoded.get("assistant_masks") if assistant_only else None
    elif isinstance(row.get(text_field), str):
        ids, kept = tokenizer(with_eos(tokenizer, row[text_field]))["input_ids"], None
    else:
        held = _unread(row, ("prompt", "completion", "messages", text_field))
        raise ValueError(f"SFT dataset row: wanted input_ids, messages, prompt + completion or {text_field!r}; {held}")
    if kept is None:
        return {"input_ids": ids, "labels": list(ids)}
    return {"input_ids": ids, "labels": [token if keep else -100 for token, keep in zip(ids, kept, strict=True)]}


def _prompt_completion_ids(row: dict, tokenizer: Any, assistant_only: bool, completion_only: bool):
    """Token ids and which of them count. The completion starts where it parts from the prompt on its own."""
    prompt, completion = row["prompt"], row["completion"]
    assistant = None
    if is_conversation(completion):
        head = template_ids(tokenizer, prompt, row, add_generation_prompt=True)["input_ids"]
        whole = template_ids(tokenizer, prompt + completion, row, return_assistant_tokens_mask=assistant_only)
        ids, assistant = whole["input_ids"], whole.get("assistant_masks") if assistant_only else None
    else:
        head = tokenizer(prompt)["input_ids"]
        ids = tokenizer(with_eos(tokenizer, prompt + completion))["input_ids"]
    start = common_prefix(head, ids) if completion_only else 0
    kept = [index >= start and (assistant is None or bool(assistant[index])) for index in range(len(ids))]
    return ids, kept


def pair_ids(row: dict, tokenizer: Any) -> dict[str, list[int]]:
    """{"chosen_ids", "rejected_ids"} of a preference pair, with the prompt in front where the row has one."""
    if "chosen_ids" in row and "rejected_ids" in row:
        return {}
    sides = [row.get(name) for name in ("chosen", "rejected")]
    if any(side is None for side in sides) or not same_form(row.get("prompt"), *sides):
        held = _unread(row, ("prompt", "chosen", "rejected"))
        raise ValueError(f"preference dataset row: wanted chosen and rejected, both text or both messages; {held}")
    encode: Callable[[str], list[int]] = lambda side: _side_ids(row, side, tokenizer)  # noqa: E731
    return {"chosen_ids": encode("chosen"), "rejected_ids": encode("rejected")}


def _side_ids(row: dict, side: str, tokenizer: Any) -> list[int]:
    prompt, answer = row.get("prompt"), row[side]
    if is_conversation(answer):
        return template_ids(tokenizer, (prompt or []) + answer, row)["input_ids"]
    return tokenizer(with_eos(tokenizer, (prompt or "") + answer))["input_ids"]
