"""What the value-head models share: loading, saving, adapters."""

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftModelForCausalLM, PeftModelForSeq2SeqLM
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastppo import distributed
from fastppo.attention import unwrap
from fastppo.models import checkpoint, pretrained, reward_adapter
from fastppo.quantized import keep_differentiable

logger = logging.getLogger(__name__)

HUB_ARGUMENTS = ("repo_id", "private", "commit_message", "create_pr", "revision")


class PreTrainedModelWrapper(nn.Module):
    """Holds a transformers model (or a PEFT one) as `pretrained_model`, and modules of its own beside it.

    A subclass names the auto class that loads the model, its own keywords (supported_args) and its own modules
    (supported_modules), whose weights are saved with the wrapped model's.
    """

    transformers_parent_class = None
    supported_args: tuple[str, ...] | None = None
    supported_modules = ("v_head",)
    supported_rm_modules = ("score",)
    supported_pretrained_model_architectures = (PreTrainedModel, PeftModelForCausalLM, PeftModelForSeq2SeqLM)

    def __init__(
        self, pretrained_model=None, score_module=None, supports_rm_adapter=False, rm_adapter_name=None, **kwargs
    ):
        if kwargs:
            raise TypeError(f"{type(self).__name__} got arguments that it does not know: {', '.join(kwargs)}")
        super().__init__()
        self.pretrained_model = keep_differentiable(pretrained_model)
        self.is_sequential_parallel = False
        self.supports_rm_adapter = supports_rm_adapter
        self.rm_adapter_name = rm_adapter_name
        self.policy_adapter_name = "default"
        self.is_peft_model = isinstance(pretrained_model, PeftModel)
        self.current_device = pretrained.current_device()
        if score_module is not None:
            self.score = score_module
        self.register_load_state_dict_pre_hook(_add_wrapper_prefix)

    # --- what is the wrapped model's ---------------------------------------------------------------------------------

    @property
    def config(self):
        return self.pretrained_model.config

    @property
    def _no_split_modules(self):
        """accelerate asks the model for the layers that FSDP2 shards one by one."""
        return getattr(unwrap(self.pretrained_model), "_no_split_modules", None)

    @property
    def is_loaded_in_8bit(self) -> bool:
        return getattr(self.pretrained_model, "is_loaded_in_8bit", False)

    @property
    def is_loaded_in_4bit(self) -> bool:
        return getattr(self.pretrained_model, "is_loaded_in_4bit", False)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return self.pretrained_model.prepare_inputs_for_generation(*args, **kwargs)

    def generate(self, *args, **kwargs):
        return self.pretrained_model.generate(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args, **kwargs) -> None:
        self.pretrained_model.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.pretrained_model.gradient_checkpointing_disable()

    def enable_input_require_grads(self) -> None:
        self.pretrained_model.enable_input_require_grads()

    # --- loading -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        peft_config: PeftConfig | None = None,
        reward_adapter: str | None = None,
        reward_adapter_name: str = "reward_adapter",
        is_trainable: bool = False,
        allow_pickle: bool = False,
        **kwargs,
    ):
        """Wrap a model: a folder, a Hub id, a PreTrainedModel or a PeftModel.

        peft_config: add a new adapter of this configuration; ignored (with a warning) when the folder holds one.
        reward_adapter: folder or Hub id of a sequence-classification adapter for compute_reward_score.
        is_trainable: whether an adapter loaded from the folder trains.
        allow_pickle: also load weights that are only there as pickles (.bin), which can run code: from trusted sources.
        supported_args go to the wrapper, load_in_8bit / load_in_4bit become a BitsAndBytesConfig, keywords of
        peft.prepare_model_for_kbit_training go there, all others to the auto class. Weights are float32 unless dtype is given.
        """
        _check_arguments(peft_config, reward_adapter)
        own_kwargs = {name: kwargs.pop(name) for name in cls.supported_args or () if name in kwargs}
        kbit_kwargs, model_kwargs = pretrained.split_kbit_kwargs(kwargs)
        source = pretrained.Source(
            pretrained_model_name_or_path, model_kwargs, peft_config, is_trainable, kbit_kwargs, allow_pickle
        )
        v_head_weights = {}
        if isinstance(pretrained_model_name_or_path, (str, os.PathLike)):
            source.path_or_id = os.fspath(pretrained_model_name_or_path)
            model = pretrained.load_by_name(cls.transformers_parent_class, source, *model_args)
            v_head_weights = checkpoint.load_value_head(
                checkpoint.finder(source.path_or_id, source.hub_kwargs), allow_pickle
            )
            if not v_head_weights:
                logger.warning("%s has no value head: it starts from random weights", source.path_or_id)
        else:
            model = _take_model(cls, source)
        if reward_adapter is not None:
            token = model_kwargs.get("token")
            pretrained.check_adapter(reward_adapter, {} if token is None else {"token": token}, allow_pickle)
            own_kwargs |= {"supports_rm_adapter": True, "rm_adapter_name": reward_adapter_name}
            own_kwargs["score_module"] = cls.add_and_load_reward_modeling_adapter(
                model, reward_adapter, reward_adapter_name, token=token
            )
        wrapper = cls(model, **own_kwargs)
        wrapper.post_init(v_head_weights)
        return wrapper

    def post_init(self, state_dict: dict[str, Tensor]) -> None:
        """Load the `v_head.*` entries of a checkpoint, then put the head beside the last layer of a split model."""
        for name in self.supported_modules:
            prefix = f"{name}."
            weights = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
            if weights:
                getattr(self, name).load_state_dict(weights)
        devices = list(dict.fromkeys((getattr(self.pretrained_model, "hf_device_map", None) or {}).values()))
        if len(devices) < 2:
            return
        if {"cpu", "disk"} & set(map(str, devices)):
            raise ValueError(
                f"{type(self).__name__}: parts of the model are offloaded ({devices}); its weights cannot be trained there. "
                "Use a device_map without cpu and disk, a smaller model, or quantisation."
            )
        for name in self.supported_modules:
            getattr(self, name).to(devices[-1])
        self.is_sequential_parallel = True

    # --- weights -----------------------------------------------------------------------------------------------------

    def state_dict(self, *args, destination=None, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        """The wrapped model's names without a prefix, and `v_head.*`."""
        destination = self.pretrained_model.state_dict(
            *args, destination=destination, prefix=prefix, keep_vars=keep_vars
        )
        for name in self.supported_modules:
            getattr(self, name).state_dict(destination=destination, prefix=f"{prefix}{name}.", keep_vars=keep_vars)
        return destination

    def save_pretrained(self, save_directory, *, state_dict=None, push_to_hub: bool = False, **kwargs) -> None:
        """Write a folder that this class and the plain transformers (or PEFT) classes load.

        A full model: the value head is in model.safetensors. A PEFT or quantised model: in value_head.safetensors.
        Under FSDP2 every process must call it: whole tensors are gathered, the first process writes.
        kwargs go to the wrapped model's save_pretrained; with push_to_hub, also token and HUB_ARGUMENTS.
        """
        if isinstance(save_directory, (str, os.PathLike)) and os.path.isfile(save_directory):
            raise NotADirectoryError(f"save_pretrained: {save_directory} is a file; wanted a folder to write to")
        hub_kwargs = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        if not kwargs.pop("safe_serialization", True):
            logger.warning("save_pretrained: safe_serialization=False is not done any more: safetensors are written")
        sharded = bool(distributed.fsdp_units(self))
        if state_dict is None:
            state_dict = distributed.state_dict(self) if sharded else self.state_dict()
        if sharded and torch.distributed.get_rank() != 0:
            return
        own = {key: value for key, value in state_dict.items() if key.startswith(self._own_prefixes)}
        is_quantized = getattr(self.pretrained_model, "hf_quantizer", None) is not None
        # both write their own weights, whatever state_dict says
        if self.is_peft_model or is_quantized:
            gathered = {"state_dict": state_dict} if sharded else {}
            self.pretrained_model.save_pretrained(save_directory, **gathered, **kwargs)
            if kwargs.get("is_main_process", True):
                checkpoint.save_value_head(own, save_directory)
        else:
            self.pretrained_model.save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        if push_to_hub:
            repo_id = hub_kwargs.pop("repo_id", Path(save_directory).name)
            _upload(save_directory, repo_id, token=kwargs.get("token"), **hub_kwargs)

    def push_to_hub(self, repo_id: str, *, token: str | None = None, **kwargs):
        """Upload what save_pretrained writes; returns huggingface_hub's CommitInfo.

        kwargs: private, commit_message, create_pr, revision; the others go to save_pretrained.
        """
        hub_kwargs = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            return _upload(folder, repo_id, token=token, **hub_kwargs)

    @property
    def _own_prefixes(self) -> tuple[str, ...]:
        return tuple(f"{name}." for name in self.supported_modules)

    # --- reward adapter ----------------------------------------------------------------------------------------------

    @classmethod
    def add_and_load_reward_modeling_adapter(
        cls, pretrained_model, adapter_model_id: str, adapter_name: str = "reward_model_adapter", token=None
    ) -> nn.Linear:
        """Load a reward adapter beside the policy's; returns its score layer. ValueError without PEFT model."""
        if not isinstance(pretrained_model, PeftModel):
            raise ValueError("reward_adapter can only be used with a PeftModel: pass peft_config as well")
        hub_kwargs = {} if token is None else {"token": token}
        score = reward_adapter.load_score_module(adapter_model_id, cls.supported_rm_modules, hub_kwargs)
        with reward_adapter.policy_untouched(pretrained_model):
            pretrained_model.load_adapter(adapter_model_id, adapter_name, is_trainable=False, **hub_kwargs)
        return score.to(pretrained_model.device)

    @torch.no_grad()
    def compute_reward_score(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        """[B, T, labels]: what the reward adapter's score layer says at every position. The policy stays as it was."""
        if not self.supports_rm_adapter:
            raise ValueError("This model does not support reward modeling adapter: load it with reward_adapter=...")
        with reward_adapter.active_adapter(self.pretrained_model, self.rm_adapter_name, self.policy_adapter_name):
            output = self.pretrained_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                output_hidden_states=True,
                return_dict=True,
                **kwargs,
            )
        hidden = output.hidden_states[-1]
        return self.score(hidden.to(device=self.score.weight.device, dtype=self.score.weight.dtype))


def _add_wrapper_prefix(module, state_dict, prefix, *_args) -> None:
    """load_state_dict takes what state_dict gives: the wrapped model's names have no prefix there."""
    own = tuple(f"{prefix}{name}." for name in ("pretrained_model", *module.supported_modules))
    for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(own)]:
        state_dict[f"{prefix}pretrained_model.{key.removeprefix(prefix)}"] = state_dict.pop(key)


def _check_arguments(peft_config, reward_adapter_id) -> None:
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise ValueError(f"peft_config should be an instance of `peft.PeftConfig`; got {type(peft_config).__name__}")
    if reward_adapter_id is not None and not isinstance(reward_adapter_id, str):
        raise ValueError(
            "The `reward_adapter` argument should be a string, a local path or the Hub id of a reward adapter; "
            f"got {type(reward_adapter_id).__name__}"
        )


def _take_model(cls: type[PreTrainedModelWrapper], source: pretrained.Source):
    """A model object handed to from_pretrained."""
    model = source.path_or_id
    if not isinstance(model, cls.supported_pretrained_model_architectures):
        raise ValueError(
            "pretrained_model_name_or_path should be a string or a PreTrainedModel, or a PeftModel for a language-model task "
            f"(task_type), but is {type(model)}"
        )
    if source.model_kwargs:
        names = ", ".join(source.model_kwargs)
        raise ValueError(f"{cls.__name__}.from_pretrained: {names} cannot be applied to a model that is loaded already")
    if source.peft_config is None:
        return model
    if isinstance(model, PeftModel):
        raise ValueError(
            "from_pretrained: peft_config with a PeftModel would put one adapter inside the other; omit it"
        )
    return pretrained.add_adapter(model, source.peft_config, source.kbit_kwargs)


def _upload(folder, repo_id: str, *, token=None, private=None, commit_message="Upload model", **where):
    """where: create_pr, revision"""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(repo_id=full_id, folder_path=str(folder), commit_message=commit_message, **where)
