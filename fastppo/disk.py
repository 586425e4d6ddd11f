"""Files that must survive: brought to the disk before they are counted on, read with the reason why they cannot be."""

import contextlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ASIDE, _REMOVING = "set-aside-", ".removing-"


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


@contextlib.contextmanager
def told_as_garbled(folder: Path) -> Iterator[None]:
    """What a checkpoint's values and tensors make raise becomes a CheckpointError: right checksums, wrong contents."""
    from safetensors import SafetensorError

    try:
        yield
    except CheckpointError:
        raise
    except (
        LookupError,
        TypeError,
        AttributeError,
        ValueError,
        ArithmeticError,
        RuntimeError,
        SafetensorError,
    ) as error:
        raise CheckpointError(f"{folder}: it lacks or garbles what a checkpoint has: {error!r}") from error


def set_aside(checkpoint: Path) -> None:
    """Rename a checkpoint so that nothing resumes from it."""
    aside = checkpoint.with_name(f"{_ASIDE}{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(checkpoint, aside)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, as far as the disk lets. A process that is killed on the way leaves no half one by its name."""
    going = checkpoint.with_name(f"{_REMOVING}{checkpoint.name}")
    shutil.rmtree(going, ignore_errors=True)
    try:
        os.rename(checkpoint, going)
    except OSError:  # a disk may be too full for another name, and this is what gives it space
        going = checkpoint
    with contextlib.suppress(OSError):
        going.unlink() if going.is_symlink() else shutil.rmtree(going, ignore_errors=True)


def finish_removing(folder: Path) -> None:
    """Delete what a killed process did not get to the end of deleting."""
    for entry in folder.glob(f"{_REMOVING}*"):
        shutil.rmtree(entry, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Like mkdir -p; what it makes is on the disk, with its name, when it returns."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        sync_folder(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Write a file in one go: whatever ends the process or the machine, it is the old one or the new one."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


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


def read_file(path: Path, size: int | None = None) -> bytes:
    """The bytes of a file, which must be `size` of them. Raises CheckpointError, before reading where that can be told."""
    try:
        found = check_file(path).st_size
        if size is not None and found != size:
            raise CheckpointError(f"{path}: {found} bytes, not {size}. The file is truncated or was changed")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error


def check_file(path: Path) -> os.stat_result:
    """Raise CheckpointError for what is no file: reading a pipe or a device may never end."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path}: it is no file. The checkpoint was changed")
    return found


def parse_json(where: Path, text: bytes) -> Any:
    """JSON in which no object says a name twice. Raises CheckpointError naming `where`."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not JSON: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"an object has {twice!r} twice")
    return read


def read_json(path: Path) -> dict[str, Any]:
    read = parse_json(path, read_file(path))
    if not isinstance(read, dict):
        raise CheckpointError(f"{path}: a JSON object was wanted, got {type(read).__name__}")
    return read


def check_step(folder: Path, step: Any) -> int:
    """The step that a manifest says. Raises CheckpointError where that is none, or the folder is called after another."""
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{folder / 'manifest.json'}: step {step!r:.40} is no count")
    called = re.fullmatch(r"(?:step|checkpoint)-(\d+)", folder.name)
    if called and int(called[1]) != step:
        raise CheckpointError(
            f"{folder}: it holds step {step}: the folder was renamed, or files of another put into it"
        )
    return step
