"""Whether a configuration's values are of the types that its fields are declared with: a wrong one is told by its name."""

import functools
import os
import types
from dataclasses import fields
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fastppo.wanted import is_flag, is_number, is_whole, want

_OURS = "fastppo"


def check_field_types(config: Any) -> None:
    """ValueError naming the first field of `config`, a dataclass, whose value its declaration does not allow; infinity and NaN are
    no numbers. Of fields that another library declares, numbers and Enums are looked at, and a whole number may be a float.
    """
    for name, hint, ours in _declared(type(config)):
        value = getattr(config, name)
        if value is not config.__dataclass_fields__[name].default and (ours or _is_checked(hint)):
            want(_fits(value, hint, ours), type(config).__name__, name, _told(hint), value)


@functools.cache
def _declared(cls: type) -> list[tuple[str, Any, bool]]:
    """(field, its type, whether a class of ours declares it) of the fields that the constructor takes."""
    hints = get_type_hints(cls)
    declares = {name: base for base in reversed(cls.__mro__) for name in getattr(base, "__annotations__", {})}
    return [(f.name, hints[f.name], declares[f.name].__module__.startswith(_OURS)) for f in fields(cls) if f.init]


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def _is_checked(hint: Any) -> bool:
    """Numbers and Enums, or None: not what takes text or a list as well."""
    alternatives = [h for h in _alternatives(hint) if h is not type(None)]
    return any(map(_is_enum, alternatives)) or all(h in (int, float) for h in alternatives)


def _fits(value: Any, hint: Any, ours: bool) -> bool:
    alternatives = _alternatives(hint)
    if any(map(_is_enum, alternatives)):
        return any(value in list(h) or value in [x.value for x in h] for h in alternatives if _is_enum(h))
    return any(_fits_one(value, each, ours) for each in alternatives)


def _fits_one(value: Any, hint: Any, ours: bool) -> bool:
    kind = get_origin(hint) or hint
    if kind is Literal:
        return value in get_args(hint)
    if kind is bool:
        return is_flag(value)
    if kind in (int, float):
        return is_whole(value) or is_number(value) and (kind is float or (not ours and value == value // 1))
    if kind is str:
        return isinstance(value, (str, os.PathLike))
    if kind is list:
        return isinstance(value, (list, tuple))
    return isinstance(value, kind) if isinstance(kind, type) else True


def _told(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "text", type(None): "None"}
    words |= {list: "a list", dict: "a dictionary"}
    told = []
    for each in _alternatives(hint):
        if get_origin(each) is Literal:
            told += [repr(value) for value in get_args(each)]
        elif _is_enum(each):
            told += [repr(x.value) for x in each]
        elif not any(map(_is_enum, _alternatives(hint))) or each is type(None):
            told.append(words.get(get_origin(each) or each, str(each)))
    return " or ".join(told)
