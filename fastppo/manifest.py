"""manifest.json of a folder of many files: each file's size and SHA-256, written last, checked before anything is read.

For checkpoints in transformers' layout (SFT, reward, late PPO); fastppo/checkpoint.py has its own, over what it holds in memory.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastppo.checkpoint import FORMAT_VERSION
from fastppo.disk import CheckpointError, check_file, check_step, read_json

MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 22


def write(folder: Path, step: int) -> None:
    """List every file below `folder` in its manifest, which must not be there yet."""
    entries = {name: _entry(folder / name) for name in _files(folder)}
    manifest = {"format_version": FORMAT_VERSION, "step": step, "torch": torch.__version__, "files": entries}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def check(folder: Path) -> None:
    """Raise CheckpointError unless `folder` holds exactly the files of its manifest, byte for byte."""
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}: format version {manifest.get('format_version')!r}, this fastppo reads {FORMAT_VERSION}"
        )
    check_step(folder, manifest.get("step"))
    wanted = manifest.get("files")
    if not isinstance(wanted, Mapping) or not wanted:
        raise CheckpointError(f"{folder / MANIFEST}: its table of files is missing or damaged")
    found = set(_files(folder))
    for name in sorted(wanted.keys() ^ found):
        what = "missing" if name in wanted else "not in the manifest"
        raise CheckpointError(f"{folder / name}: the file is {what}: the checkpoint was changed or not copied whole")
    for name in sorted(wanted):
        if (entry := _entry(folder / name)) != wanted[name]:
            raise CheckpointError(
                f"{folder / name}: {_told(entry)}; the manifest says {_told(wanted[name])}. "
                "The file is truncated or was changed"
            )


def _files(folder: Path) -> list[str]:
    """Names of all files but the manifest, relative to `folder`, with slashes; of links to folders too, which lead out of it."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(name for path in paths if (name := path.relative_to(folder).as_posix()) != MANIFEST)


def _entry(path: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    try:
        check_file(path)
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    return {"bytes": size, "sha256": digest.hexdigest()}


def _told(entry: Any) -> str:
    if not isinstance(entry, Mapping):
        return repr(entry)[:40]
    return f"{entry.get('bytes')} bytes, SHA-256 {str(entry.get('sha256'))[:12]}"
