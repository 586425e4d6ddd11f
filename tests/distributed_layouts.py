"""What the processes of test_distributed.py share: who they are, how parameters lie, the order of rows, plain results."""

import os
import sys
from contextlib import contextmanager

import numpy as np
import torch

GLOBAL, MINI = 8, 4  # sequences of a step and of a mini-batch over all processes
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
# DeepSpeed's stage
ZERO = (
    sys.argv[-1][4:]
    if sys.argv[-1] in ("zero1", "zero2", "zero3")
    else os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
)


def own_rows(mini: int) -> list[int]:
    """This process's share of each mini-batch of `mini` sequences."""
    share = mini // WORLD
    return [start + RANK * share + i for start in range(0, GLOBAL, mini) for i in range(share)]


@contextmanager
def in_order():
    """Rows are not shuffled: mini-batches of all processes together are those of one."""
    real, np.random.permutation = np.random.permutation, np.arange
    try:
        yield
    finally:
        np.random.permutation = real


@contextmanager
def evens_first():
    """Instead of a random order, also of a process's own rows: its mini-batches are its share of one process's."""

    def order(count: int, generator=None) -> torch.Tensor:
        return torch.cat([torch.arange(0, count, 2), torch.arange(1, count, 2)])

    real, torch.randperm = torch.randperm, order
    try:
        yield
    finally:
        torch.randperm = real


def cpu_fsdp2() -> None:
    """accelerate takes an FSDP configuration on accelerators only; here it takes it on the CPU."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    made = AcceleratorState.__init__

    def __init__(self, *args, fsdp_plugin=None, **kwargs):
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
        if plugin is not None and self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    AcceleratorState.__init__ = __init__


def ask_for_fsdp2() -> None:
    """What accelerate launch sets from examples/accelerate/fsdp2.yaml."""
    options = {"USE_FSDP": "true", "USE_CPU": "true"}
    os.environ |= {f"ACCELERATE_{name}": value for name, value in options.items()}
    options = {"VERSION": "2", "AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "RESHARD_AFTER_FORWARD": "true"}
    options |= {"CPU_RAM_EFFICIENT_LOADING": "false", "STATE_DICT_TYPE": "FULL_STATE_DICT"}
    os.environ |= {f"FSDP_{name}": value for name, value in options.items()}


def ask_for_deepspeed(stage: str) -> None:
    """What accelerate launch sets from examples/accelerate/deepspeed_zero<stage>.yaml, on a CPU."""
    from accelerate import PartialState

    os.environ["DS_ACCELERATOR"] = "cpu"
    PartialState(cpu=True)  # accelerate ignores DeepSpeed where cpu=True is given to the Accelerator itself
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}


def models_are_made_whole() -> None:
    """Or models after the first are made in shards under ZeRO-3, which nobody could fill with a seed's numbers."""
    if ZERO:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def plain(stats: dict) -> dict:
    kept = {k: v for k, v in stats.items() if not k.startswith(("time/", "fastppo/")) and np.ndim(v) == 0}
    return {k: float(v) for k, v in kept.items()}


def weights(accelerator, model) -> dict[str, torch.Tensor]:
    from fastppo.distributed import bare, full_tensor, whole

    named = dict(bare(model).named_parameters())

    def copies():
        return {name: full_tensor(p.detach()).clone() for name, p in named.items() if p.requires_grad}

    return whole(accelerator, bare(model), copies) if ZERO else copies()
