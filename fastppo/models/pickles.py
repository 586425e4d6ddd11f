"""Weights from outside come from safetensors: reading a pickle can run what its author put into it."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any


def refused(file: str, how: str = "allow_pickle=True") -> OSError:
    return OSError(
        f"{file} is a pickle, which can run code when it is read, and there is no safetensors file in its place: "
        f"convert it, or if you trust where it comes from, load it with {how}"
    )


def check_folder(source: Any) -> None:
    """FileNotFoundError for what is written like a path and is none: transformers would look for it on the hub."""
    name = str(source)
    if (name.startswith(("/", ".", "~")) or name.count("/") > 1) and not os.path.exists(name):
        raise FileNotFoundError(f"from_pretrained: there is no folder {name}")


@contextlib.contextmanager
def safetensors_only(source: Any, allowed: bool, how: str = "allow_pickle=True") -> Iterator[dict[str, Any]]:
    """The keywords that keep transformers from pickles (none where they are allowed); its error then says what to do."""
    check_folder(source)
    with damage_told(source):
        if allowed:
            yield {}
            return
        try:
            yield {"use_safetensors": True}
        except OSError as error:
            if "safetensors" not in str(error):
                raise
            raise refused(f"{source}: its weights file", how) from error


@contextlib.contextmanager
def damage_told(source: Any) -> Iterator[None]:
    """Weights that are cut off, or of another model than config.json describes: OSError and ValueError that say so."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{source}: a weights file is damaged or cut off ({error}): copy or download it again") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"{source}: the weights have other shapes than config.json gives: is one of them another model's? "
            "(ignore_mismatched_sizes=True would start those weights at random)"
        ) from error
