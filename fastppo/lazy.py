"""Names that a package hands on and imports when they are first used."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, defined_in: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """(__getattr__, __dir__) of `package`; defined_in: name -> the module that defines it."""

    def __getattr__(name: str) -> Any:
        if name not in defined_in:
            raise AttributeError(
                f"module {package!r} has no attribute {name!r}; it has {', '.join(sorted(defined_in))}"
            )
        value = getattr(importlib.import_module(defined_in[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted(sys.modules[package].__all__)

    return __getattr__, __dir__
