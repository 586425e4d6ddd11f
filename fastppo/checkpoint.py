"""Crash-safe checkpoints: safetensors and JSON, never pickle; complete or not there.

A checkpoint is a folder `step-00000012` with one `<part>.safetensors` per group of tensors, `values.json` for everything
else, and `manifest.json`, written last, which lists each file's size and SHA-256. It is written under a temporary
name in the same folder, synced, then renamed: whatever kills the process leaves either the old set or the new one.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastppo.disk import (
    CheckpointError,
    check_step,
    finish_removing,
    make_folder,
    parse_json,
    read_file,
    read_json,
    remove,
    set_aside,
    sync_folder,
    told_as_checkpoint_error,
)
from fastppo.wanted import is_whole, want

FORMAT_VERSION = 1
_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".writing-"

Parts = Mapping[str, Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint. path: its folder. step: training steps done. parts: part -> name -> tensor (on the CPU).
    values: what JSON holds (KL controller, running moments, data position, ...)."""

    path: Path
    step: int
    parts: dict[str, dict[str, torch.Tensor]]
    values: dict[str, Any]


def save_checkpoint(folder: str | Path, step: int, parts: Parts, values: Mapping[str, Any], *, keep: int = 3) -> Path:
    """Write checkpoint `step` into `folder`, keep the newest `keep`, return the new checkpoint's path.

    Checkpoints of later steps belong to a course of the run that was left (it was resumed from an older one): they get
    `set-aside-` before their names, so that nothing resumes from them. One whose files are missing or cut off does not count
    among those kept. Raises CheckpointError when the disk is full, the folder cannot be written, or a value is no JSON;
    older checkpoints are then untouched.
    """
    want(is_whole(keep, 1), "save_checkpoint", "keep", "a whole number of at least 1", keep)
    folder = Path(folder)
    target = folder / f"step-{step:08d}"
    temporary = folder / f"{_TEMPORARY}{target.name}-{os.getpid()}"
    with told_as_checkpoint_error(target):
        try:
            make_folder(folder)
            _remove_leftovers(folder)
            temporary.mkdir()
            _write_files(temporary, step, parts, values)
            for name in (name for name in _complete_names(folder) if _step(name) >= step):
                set_aside(folder / name)
            os.rename(temporary, target)
            sync_folder(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    _remove_old(folder, keep)
    return target


def load_newest(folder: str | Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint in `folder` that is whole, and in words why newer ones were passed over.

    (None, reasons) when there is none. A damaged checkpoint is never deleted and never loaded.
    """
    folder, passed_over = Path(folder), []
    for name in sorted(_complete_names(folder), key=_step, reverse=True):
        try:
            return load_checkpoint(folder / name), passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
    return None, passed_over


def find(path: str | Path) -> tuple[Checkpoint | None, list[str]]:
    """load_checkpoint for a checkpoint's own folder, load_newest for a folder of checkpoints."""
    path = Path(path)
    if _NAME.fullmatch(path.name) or (path / "manifest.json").is_file():
        return load_checkpoint(path), []
    return load_newest(path)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check one checkpoint folder. Raises CheckpointError naming the file and what is wrong with it."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(path)
    manifest = read_json(path / "manifest.json")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {manifest.get('format_version')!r}, this fastppo reads {FORMAT_VERSION}"
        )
    step, contents = check_step(path, manifest.get("step")), {}
    for name, wanted in _entries(path, manifest).items():
        contents[name] = read_file(path / name, wanted["bytes"])
        found = hashlib.sha256(contents[name]).hexdigest()
        if found != wanted["sha256"]:
            raise CheckpointError(
                f"{path / name}: SHA-256 {found[:12]}; the manifest says {wanted['sha256'][:12]}. "
                "The file is truncated or was changed"
            )
    values = parse_json(path / "values.json", contents.pop("values.json"))
    try:
        tensors = {name.removesuffix(".safetensors"): load(data) for name, data in contents.items()}
        # clone: `load` gives views into the file's bytes, which are not aligned as torch's own memory is
        parts = {part: {name: t.clone() for name, t in group.items()} for part, group in tensors.items()}
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of fastppo: {error!r}") from error
    return Checkpoint(path, step, parts, values)


def check_tensors(what: str, found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError unless `found` has exactly `wanted`'s names, shapes and dtypes (first difference named)."""
    for name in sorted(wanted.keys() - found.keys())[:1]:
        raise CheckpointError(f"{what}: {name!r} is missing from the checkpoint")
    for name in sorted(found.keys() - wanted.keys())[:1]:
        raise CheckpointError(f"{what}: the checkpoint holds {name!r}, which this run does not have")
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            raise CheckpointError(
                f"{what}: {name!r} should be {tensor.dtype} {tuple(tensor.shape)}; "
                f"the checkpoint holds {found[name].dtype} {tuple(found[name].shape)}"
            )


def split_tensors(tree: Any, prefix: str = "") -> tuple[dict[str, torch.Tensor], Any]:
    """A nested state dict as (tensors by dotted path, the same tree in JSON types with {"tensor": path} in their place).

    For optimizers' and schedulers' state dicts. Dict keys that are ints are kept apart from strings: {"int_keys": ...}.
    Raises CheckpointError naming what is neither a plain tensor nor of a JSON type.
    """
    tensors: dict[str, torch.Tensor] = {}

    def walk(node: Any, path: str) -> Any:
        if type(node) in (torch.Tensor, torch.nn.Parameter) or hasattr(node, "full_tensor"):  # FSDP2's
            tensors[path] = node.detach()
            return {"tensor": path}
        if isinstance(node, Mapping) and len({isinstance(k, int) for k in node}) < 2:
            inside = {str(k): walk(v, f"{path}.{k}" if path else str(k)) for k, v in node.items()}
            return {"int_keys": inside} if node and all(isinstance(k, int) for k in node) else {"dict": inside}
        if isinstance(node, (list, tuple)):
            return [walk(v, f"{path}.{i}") for i, v in enumerate(node)]
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        what = "dict with keys of two kinds" if isinstance(node, Mapping) else type(node).__name__
        raise CheckpointError(f"state {path!r} is a {what}, which no checkpoint can hold")

    return tensors, walk(tree, prefix)


def join_tensors(tensors: Mapping[str, torch.Tensor], tree: Any) -> Any:
    """What split_tensors took apart."""
    if isinstance(tree, list):
        return [join_tensors(tensors, node) for node in tree]
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "int_keys" in tree:
        return {int(k): join_tensors(tensors, v) for k, v in tree["int_keys"].items()}
    return {k: join_tensors(tensors, v) for k, v in tree["dict"].items()}


def rng_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State of torch's (CPU and every GPU), numpy's and Python's global random generators, as (tensors, JSON values)."""
    import random

    import numpy as np

    tensors = {"torch": torch.get_rng_state()}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        tensors[f"cuda.{index}"] = torch.cuda.get_rng_state(index)
    _, keys, position, has_gauss, gauss = np.random.get_state()
    tensors["numpy"] = torch.from_numpy(np.asarray(keys, dtype=np.int64))
    version, words, gauss_next = random.getstate()
    numpy_rest = [int(position), int(has_gauss), float(gauss)]
    return tensors, {"numpy": numpy_rest, "python": [version, list(words), gauss_next]}


def set_rng_state(tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
    """Put back what rng_state returned."""
    import random

    import numpy as np

    torch.set_rng_state(tensors["torch"])
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)
    np.random.set_state(("MT19937", tensors["numpy"].numpy().astype(np.uint32), *values["numpy"]))
    version, words, gauss_next = values["python"]
    random.setstate((version, tuple(words), gauss_next))


def _write_files(folder: Path, step: int, parts: Parts, values: Mapping[str, Any]) -> None:
    from safetensors.torch import save

    files = {}
    for part, tensors in parts.items():
        if not re.fullmatch(r"[a-z_]+", part) or part == "values":
            raise ValueError(f"save_checkpoint: a part's name is lower-case letters and _; got {part!r}")
        # clone: safetensors refuses tensors that share storage (tied embeddings), and the copy is on the CPU
        data = save({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()})
        files[f"{part}.safetensors"] = data
    try:
        files["values.json"] = json.dumps(values).encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"save_checkpoint: values must be JSON: {error}") from error
    entries = {n: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for n, data in files.items()}
    manifest = {"format_version": FORMAT_VERSION, "step": step, "torch": torch.__version__, "files": entries}
    for name, data in {**files, "manifest.json": json.dumps(manifest, indent=1).encode()}.items():
        with open(folder / name, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    sync_folder(folder)


def _complete_names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if _NAME.fullmatch(entry.name)] if folder.is_dir() else []


def _step(name: str) -> int:
    return int(_NAME.fullmatch(name)[1])


def _remove_leftovers(folder: Path) -> None:
    """Delete what a killed process of this folder left half-written (a live writer's folder carries a live pid)."""
    for entry in folder.glob(f"{_TEMPORARY}*"):
        pid = entry.name.rpartition("-")[2]
        if not pid.isdecimal() or int(pid) == os.getpid() or not _lives(int(pid)):
            shutil.rmtree(entry, ignore_errors=True)
    finish_removing(folder)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:  # another user's
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _remove_old(folder: Path, keep: int) -> None:
    """Delete what is older than the `keep` newest ones whose files are all there in full length (reading them would take long)."""
    whole = 0
    for name in sorted(_complete_names(folder), key=_step, reverse=True):
        if whole >= keep:
            remove(folder / name)
        whole += _has_its_files(folder / name)


def _has_its_files(path: Path) -> bool:
    try:
        entries = _entries(path, read_json(path / "manifest.json"))
        return all((path / name).stat().st_size == entry["bytes"] for name, entry in entries.items())
    except (CheckpointError, OSError):
        return False


def _entries(path: Path, manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The manifest's file table, checked, so that a tampered manifest can name no file outside the checkpoint."""
    files = manifest.get("files")
    fine = isinstance(files, dict) and "values.json" in files
    for name, entry in files.items() if fine else ():
        fine = fine and bool(re.fullmatch(r"[a-z_]+\.safetensors|values\.json", name)) and isinstance(entry, dict)
        fine = fine and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
    if not fine:
        raise CheckpointError(f"{path / 'manifest.json'}: its table of files is missing or damaged")
    return files
