"""Loading what the value-head wrappers wrap: a model by name, an adapter folder, quantised or with new adapters."""

import importlib.util
import inspect
import logging
import os
from dataclasses import dataclass, field
from typing import Any

import torch

from fastppo.models.checkpoint import finder
from fastppo.models.pickles import check_folder, refused, safetensors_only
from fastppo.quantized import prepare_for_adapter

logger = logging.getLogger(__name__)

HUB_ARGUMENTS = ("token", "revision", "cache_dir", "local_files_only", "subfolder", "force_download", "proxies")
# these say which files of a repository; an adapter's repository is not its base model's
REPOSITORY_ARGUMENTS = ("revision", "subfolder")


@dataclass
class Source:
    """Where the model comes from and how: the keywords of from_pretrained, sorted."""

    path_or_id: str
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    peft_config: Any = None
    is_trainable: bool = False
    kbit_kwargs: dict[str, Any] = field(default_factory=dict)
    allow_pickle: bool = False

    @property
    def hub_kwargs(self) -> dict[str, Any]:
        return {key: value for key, value in self.model_kwargs.items() if key in HUB_ARGUMENTS}


def current_device() -> int | str:
    """This process's accelerator index, or "cpu"."""
    return int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else "cpu"


def split_kbit_kwargs(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(keywords of peft.prepare_model_for_kbit_training, the others)"""
    from peft import prepare_model_for_kbit_training

    names = set(inspect.signature(prepare_model_for_kbit_training).parameters) - {"model"}
    return {k: v for k, v in kwargs.items() if k in names}, {k: v for k, v in kwargs.items() if k not in names}


def load_by_name(auto_class, source: Source, *model_args):
    """The model called source.path_or_id: plain, with the adapter found there, or with a new one from peft_config."""
    check_folder(source.path_or_id)
    _resolve_quantization(source.model_kwargs)
    if _adapter_config_file(source) is not None:
        if source.peft_config is not None:
            logger.warning("%s holds an adapter already: peft_config is ignored", source.path_or_id)
        return _load_adapter(auto_class, source, *model_args)
    kwargs = _with_dtype(source.model_kwargs)
    if kwargs.get("local_files_only"):
        # transformers looks for an adapter once more, on the network unless told
        kwargs = {"adapter_kwargs": {**source.hub_kwargs}, **kwargs}
    with safetensors_only(source.path_or_id, source.allow_pickle or "use_safetensors" in kwargs) as only:
        model = auto_class.from_pretrained(source.path_or_id, *model_args, **only, **kwargs)
    return model if source.peft_config is None else add_adapter(model, source.peft_config, source.kbit_kwargs)


def add_adapter(model, peft_config, kbit_kwargs: dict[str, Any]):
    """A PeftModel with a new adapter; a quantised base is prepared for training first."""
    from peft import get_peft_model

    return get_peft_model(prepare_for_adapter(model, **kbit_kwargs), peft_config)


def _adapter_config_file(source: Source) -> str | None:
    from transformers.utils.peft_utils import find_adapter_config_file

    if not os.path.isdir(source.path_or_id) and os.path.exists(source.path_or_id):
        return None
    return find_adapter_config_file(source.path_or_id, **source.hub_kwargs)


def _load_adapter(auto_class, source: Source, *model_args):
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(source.path_or_id, **source.hub_kwargs)
    base_kwargs = {k: v for k, v in source.model_kwargs.items() if k not in REPOSITORY_ARGUMENTS}
    check_adapter(source.path_or_id, source.hub_kwargs, source.allow_pickle)
    name = config.base_model_name_or_path
    with safetensors_only(name, source.allow_pickle or "use_safetensors" in base_kwargs) as only:
        base = auto_class.from_pretrained(name, *model_args, **only, **_with_dtype(base_kwargs))
    return PeftModel.from_pretrained(base, source.path_or_id, is_trainable=source.is_trainable, **source.hub_kwargs)


def check_adapter(path_or_id: str, hub_kwargs: dict[str, Any], allow_pickle: bool) -> None:
    """OSError for an adapter whose weights are a pickle only, unless that is allowed."""
    find = finder(path_or_id, hub_kwargs)
    if (
        not allow_pickle
        and find("adapter_model.safetensors") is None
        and (file := find("adapter_model.bin")) is not None
    ):
        raise refused(file)


def _with_dtype(kwargs: dict[str, Any]) -> dict[str, Any]:
    """float32 unless asked for otherwise, as in TRL: Adam's small steps are lost in bfloat16 weights."""
    if any(kwargs.get(name) is not None for name in ("dtype", "torch_dtype", "quantization_config")):
        return kwargs
    return {**kwargs, "dtype": torch.float32}


def _resolve_quantization(kwargs: dict[str, Any]) -> None:
    """load_in_8bit / load_in_4bit, which transformers 5 no longer takes, become a BitsAndBytesConfig."""
    asked = {name: True for name in ("load_in_8bit", "load_in_4bit") if kwargs.pop(name, False)}
    if asked and kwargs.get("quantization_config") is not None:
        raise ValueError(f"from_pretrained: give {', '.join(asked)} or quantization_config, not both")
    if asked:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ImportError(f"from_pretrained: {', '.join(asked)} needs bitsandbytes: pip install bitsandbytes")
        from transformers import BitsAndBytesConfig

        kwargs["quantization_config"] = BitsAndBytesConfig(**asked)
    if kwargs.get("quantization_config") is not None:
        # quantised weights cannot be moved afterwards
        kwargs.setdefault("device_map", {"": current_device()})
