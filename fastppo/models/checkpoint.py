"""The value head on disk.

A full model keeps `v_head.summary.*` among its own weights (model.safetensors, possibly sharded; older ones
pytorch_model.bin). An adapter folder keeps it in value_head.safetensors; TRL wrote pytorch_model.bin there.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastppo.models.pickles import refused

V_HEAD_FILE = "value_head.safetensors"
V_HEAD_PREFIX = "v_head."
# in the order in which they are looked for; the first that is there decides, in each row
V_HEAD_FILES = (V_HEAD_FILE, "value_head.bin")
MODEL_FILES = ("model.safetensors", "pytorch_model.bin")

Find = Callable[[str], str | None]  # file name -> local path, or None where there is no such file


def finder(path_or_id: str, hub_kwargs: dict) -> Find:
    """Looks in a folder, or on the Hub (and its cache) when path_or_id is no folder."""
    if os.path.isdir(path_or_id):
        folder = Path(path_or_id, hub_kwargs.get("subfolder", ""))
        return lambda name: str(folder / name) if (folder / name).is_file() else None

    from transformers.utils import cached_file

    # absent files are the ordinary case; a missing repository has been reported by the model's own loading
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return lambda name: cached_file(path_or_id, name, **quiet, **hub_kwargs)


def load_value_head(find: Find, allow_pickle: bool = False) -> dict[str, Tensor]:
    """`v_head.*` tensors of a checkpoint; empty when it has none. OSError for a pickle that is not allowed."""
    for names in (V_HEAD_FILES, MODEL_FILES):
        # a repository with both kinds of model file has the same weights in both: no download to find nothing again
        files = next((files for name in names if (files := _files_of(find, name)) is not None), [])
        pickled = next((file for file in files if not file.endswith(".safetensors")), None)
        if pickled is not None and not allow_pickle:
            raise refused(pickled)
        weights = {key: weight for file in files for key, weight in _read_value_head(file).items()}
        if weights:
            return weights
    return {}


def _files_of(find: Find, name: str) -> list[str] | None:
    """The file itself, or those of its shards that the index says hold the value head; None where there is neither."""
    if (file := find(name)) is not None:
        return [file]
    if (index := find(f"{name}.index.json")) is None:
        return None
    weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    shards = sorted({shard for key, shard in weight_map.items() if key.startswith(V_HEAD_PREFIX)})
    files = [find(shard) for shard in shards]
    if None in files:
        raise FileNotFoundError(f"{index} names {', '.join(shards)} for the value head; not all of them are there")
    return files


def _read_value_head(file: str) -> dict[str, Tensor]:
    if file.endswith(".safetensors"):
        with safe_open(file, framework="pt") as weights:
            return {key: weights.get_tensor(key) for key in weights.keys() if key.startswith(V_HEAD_PREFIX)}  # noqa: SIM118
    # weights_only: a pickle from elsewhere must not run code
    weights = torch.load(file, map_location="cpu", weights_only=True)
    return {key: weight for key, weight in weights.items() if key.startswith(V_HEAD_PREFIX)}


def save_value_head(weights: dict[str, Tensor], folder: str | os.PathLike) -> None:
    os.makedirs(folder, exist_ok=True)
    tensors = {key: weight.detach().cpu().contiguous() for key, weight in weights.items()}
    save_file(tensors, Path(folder, V_HEAD_FILE), metadata={"format": "pt"})
