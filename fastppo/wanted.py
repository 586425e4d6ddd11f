"""What callers hand in: predicates, and the one form of words in which a value is declined."""

import math
import numbers
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

# argument -> (what is wanted, in words; whether a value is that)
Rules = Mapping[str, tuple[str, Callable[[Any], bool]]]


def want(good: bool, where: str, name: str, wanted: str, got: Any) -> None:
    """ValueError "WHERE: NAME must be WANTED; got GOT" unless good."""
    if not good:
        raise ValueError(f"{where}: {name} must be {wanted}; got {shown(got)}")


def check(where: str, values: Mapping[str, Any], rules: Rules) -> None:
    """want() for each of `values` that has a rule and is not None."""
    for name, value in values.items():
        if name in rules and value is not None:
            wanted, holds = rules[name]
            want(holds(value), where, name, wanted, value)


def shown(value: Any) -> str:
    """A value in an error: short ones as they are written, others by their type."""
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__} itself"
    text = repr(value)
    if len(text) > 80 or text.startswith("<") or isinstance(value, torch.nn.Module):
        return f"a {type(value).__name__}"
    return text


def is_whole(value: Any, least: float = -math.inf) -> bool:
    """An int, or what counts as one (numpy's, a 0-D tensor's), of at least `least`; True and False are none."""
    if isinstance(value, bool) or isinstance(value, torch.Tensor) and value.dtype == torch.bool:
        return False
    try:
        return operator.index(value) >= least
    except TypeError:
        return False


def is_number(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    """A finite number (numpy's, a 0-D tensor's) from `least` to `most`; True and False are none."""
    if isinstance(value, torch.Tensor) and value.dim() == 0 and not value.is_complex():
        value = value.item()
    return (
        isinstance(value, numbers.Real)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and least <= value <= most
    )


def is_flag(value: Any) -> bool:
    """True or False, also as 1 or 0 or numpy's."""
    return is_whole(value) and value in (0, 1) or isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")


def are_callables(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(callable(x) for x in value)


def is_ids(value: Any) -> bool:
    """A tensor of token ids, whatever its shape."""
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    return isinstance(value, torch.Tensor) and value.dtype in integers
