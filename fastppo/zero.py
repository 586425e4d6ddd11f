"""DeepSpeed ZeRO: what lies between our stages and the engine that accelerate makes.

    backward      gradients of one pass, reduced by the engine; the last pass of an optimizer step is told
    gradient_norm over all processes, before clipping, known before the weights are touched
    step, discard take the optimizer step, or drop its gradients: weights and optimizer are as before it
    save_optimizer, check_optimizer, load_optimizer   its sharded state, for a checkpoint without pickles
    whole         ZeRO-3: run a function while all parameters are whole, gathered once, without a gathering per layer
    writable      ZeRO-3: what is written to the parameters inside the block stays

accelerate's own backward takes DeepSpeed's step with it, before anybody has looked at the gradients.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastppo.disk import CheckpointError

if TYPE_CHECKING:
    from accelerate import Accelerator

_WEIGHTS = "weights"
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def engine_of(accelerator: "Accelerator") -> Any:
    """The DeepSpeed engine of what is trained; None where there is none (yet)."""
    wrapped = getattr(accelerator, "deepspeed_engine_wrapped", None)
    return None if wrapped is None else wrapped.engine


# --- an optimizer step ------------------------------------------------------------------------------------------------


def backward(accelerator: "Accelerator", loss: Tensor, last: bool) -> None:
    """Gradients of `loss`, divided by the accumulation steps as accelerate does. last: step() or discard() is next."""
    engine = engine_of(accelerator)
    engine.set_gradient_accumulation_boundary(is_boundary=last)
    engine.backward(loss / accelerator.gradient_accumulation_steps, scale_wrt_gas=False)


def gradient_norm(accelerator: "Accelerator") -> float:
    """Norm of the averaged gradients of all processes; NaN or infinity where one of them is. After the last backward()."""
    engine = engine_of(accelerator)
    squares = sum((grad.detach().double().square().sum() for grad in _gradients(engine)), torch.zeros(()).double())
    squares = squares.to(accelerator.device)
    torch.distributed.all_reduce(squares)
    return float(squares.sqrt())


def _gradients(engine: Any) -> Iterator[Tensor]:
    """This process's part of the gradients."""
    optimizer = engine.optimizer
    masters = _masters(optimizer)
    if any(master.grad is not None for master in masters):  # offloaded
        yield from (master.grad for master in masters if master.grad is not None)
        return
    for group in optimizer.averaged_gradients.values():
        yield from (grad for grad in group or () if grad is not None)


def _masters(optimizer: Any) -> list[Tensor]:
    """This process's part of the float32 weights, one flat tensor per group: what the torch optimizer steps."""
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        if found := getattr(optimizer, name, None):
            return list(found)
    raise ValueError(
        f"DeepSpeed: {type(optimizer).__name__} is not supported; use ZeRO stage 1, 2 or 3 (stage 0 is DDP)"
    )


def scales_loss(accelerator: "Accelerator") -> bool:
    """float16: the loss scaler expects infinite gradients now and then, and skips those steps itself."""
    return bool(engine_of(accelerator).fp16_enabled())


def step(accelerator: "Accelerator") -> None:
    """Clip at DeepSpeed's gradient_clipping and step."""
    engine_of(accelerator).step()


def discard(accelerator: "Accelerator") -> None:
    """Drop the gradients that backward() has collected, in the engine's own way: its step, with an optimizer that does nothing."""
    engine = engine_of(accelerator)
    optimizer, scheduler = engine.optimizer.optimizer, engine.lr_scheduler
    optimizer.step, engine.lr_scheduler = (lambda *_, **__: None), None
    try:
        engine.step()
    finally:
        del optimizer.step
        engine.lr_scheduler = scheduler


# --- whole parameters -------------------------------------------------------------------------------------------------


def whole(model: nn.Module, function: Callable[[], Any]) -> Any:
    """function() while all parameters of `model` are whole, gathered as one and given back; nothing is written back."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=None), without_hooks(model):
        return function()


@contextlib.contextmanager
def writable(model: nn.Module) -> Iterator[None]:
    """Parameters that ZeRO-3 has sharded are whole inside, and hold afterwards what was written to them on all processes."""
    sharded = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0), without_hooks(model):
        yield


@contextlib.contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """DeepSpeed's hooks, which gather each layer's parameters and give them back, are off inside."""
    kept = []
    for module in model.modules():
        for name in _HOOKS:
            hooks = getattr(module, name)
            if any(_is_deepspeeds(hook) for hook in hooks.values()):
                kept.append((module, name, hooks))
                others = [(key, hook) for key, hook in hooks.items() if not _is_deepspeeds(hook)]
                setattr(module, name, OrderedDict(others))
    try:
        yield
    finally:
        for module, name, hooks in kept:
            setattr(module, name, hooks)


def _is_deepspeeds(hook: Callable) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("deepspeed.")


def gather_with(root: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """ZeRO-3: gather `parameters`, which are read outside their own module's forward pass, with `root`'s."""
    import deepspeed

    for parameter in parameters:
        if hasattr(parameter, "ds_id"):
            deepspeed.zero.register_external_parameter(root, parameter)


# --- the optimizer's state --------------------------------------------------------------------------------------------


def save_optimizer(accelerator: "Accelerator") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, JSON values): every process's part of weights and optimizer state; every process must call it, all get all."""
    from fastppo.gathering import gather

    optimizer, own = engine_of(accelerator).optimizer, {}
    for index, master in enumerate(_masters(optimizer)):
        state = optimizer.optimizer.state.get(master, {})
        odd = [name for name, x in state.items() if not isinstance(x, Tensor)]
        if odd:
            raise ValueError(
                f"{type(optimizer.optimizer).__name__}: the state {odd[0]!r} is no tensor, it cannot be saved"
            )
        for name, x in {_WEIGHTS: master, **state}.items():
            own[f"{index}.{name}"] = x.detach().reshape(-1).to(accelerator.device)
    processes = accelerator.num_processes
    tensors = {
        f"{rank}.{name}": part.cpu()
        for name, whole in gather(accelerator, own).items()
        for rank, part in enumerate(whole.chunk(processes))
    }
    groups = [{k: x for k, x in group.items() if k != "params"} for group in optimizer.optimizer.param_groups]
    return tensors, {"processes": processes, "groups": groups}


def refresh_masters(accelerator: "Accelerator") -> None:
    """The float32 weights that the optimizer steps become those of the model; nothing where there is no engine."""
    if engine := engine_of(accelerator):
        engine.optimizer.refresh_fp32_params()


def is_saved_by_it(values: Any) -> bool:
    """Whether `values` is what save_optimizer returned, or another optimizer's."""
    return isinstance(values, dict) and "processes" in values


def check_optimizer(accelerator: "Accelerator", tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Raise CheckpointError unless save_optimizer's are of as many processes, with parameters laid out as here."""
    wanted, processes = (
        [master.numel() for master in _masters(engine_of(accelerator).optimizer)],
        accelerator.num_processes,
    )
    own = _own_parts(accelerator, tensors)
    sizes = [len(own[index][_WEIGHTS]) for index in sorted(own)]
    if values["processes"] != processes or sizes != wanted:
        raise CheckpointError(
            f"the optimizer was sharded over {values['processes']} processes in parts of {sizes}; this run has {processes} "
            f"and {wanted}: resume with as many processes and the same ZeRO stage"
        )


def _own_parts(accelerator: "Accelerator", tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    own: dict[int, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        rank, index, key = name.split(".", 2)
        if int(rank) == accelerator.process_index:
            own.setdefault(int(index), {})[key] = x
    return own


def load_optimizer(accelerator: "Accelerator", tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """What save_optimizer returned; CheckpointError, nothing changed, where check_optimizer raises."""
    check_optimizer(accelerator, tensors, values)
    optimizer, own = engine_of(accelerator).optimizer, _own_parts(accelerator, tensors)
    for index, master in enumerate(_masters(optimizer)):
        state = {name: x.to(master.device) for name, x in own[index].items()}
        master.data.copy_(state.pop(_WEIGHTS))
        optimizer.optimizer.state[master] = {n: x if x.numel() == master.numel() else x[0] for n, x in state.items()}
    for group, saved in zip(optimizer.optimizer.param_groups, values["groups"], strict=True):
        group.update(saved)
