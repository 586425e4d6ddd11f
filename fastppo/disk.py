"""Files that must survive: brought to the disk before they are counted on, read with the reason why they cannot be."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ASIDE = "set-aside-"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or that must not be loaded; the message says why and what to do."""


def disk_trouble(error: BaseException) -> str | None:
    """Why the disk refused, in its words; None for an error that is not about it. Libraries in Rust raise types of their own
    (safetensors.SafetensorError, tokenizers' plain Exception), with the system's number in the text."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    said = str(error)
    return said if "(os error " in said or "I/O error" in said else None


@contextlib.contextmanager
def told_as_checkpoint_error(target: Path) -> Iterator[None]:
    """What the disk refuses inside becomes a CheckpointError that names `target` and what to do."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if (why := disk_trouble(error)) is None:
            raise
        raise CheckpointError(
            f"checkpoint {target} could not be written: {why}. "
            "Older checkpoints are untouched; free space or choose another output folder."
        ) from error


def set_aside(checkpoint: Path) -> None:
    """Rename a checkpoint so that nothing resumes from it."""
    aside = checkpoint.with_name(f"{_ASIDE}{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(checkpoint, aside)


def sync_tree(folder: Path) -> None:
    """Bring every file below `folder`, and the folders, to the disk."""
    for at, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(at, name))
        sync_folder(Path(at))


def sync_folder(folder: Path) -> None:
    if os.name != "nt":  # Windows cannot open a folder
        _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(read_file(path))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(read, dict):
        raise CheckpointError(f"{path}: a JSON object was wanted, got {type(read).__name__}")
    return read
