"""What the checkpoint of a classic trainer is made of: its tensors, and the rest as JSON values."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import torch

from fastppo import checkpoint as ckpt
from fastppo import distributed

# elements of each frozen tensor that its fingerprint reads
_SAMPLED = 64
_COUNTERS = ("current_step", "_steps_done", "compare_step")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered (all processes take part), any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Its shape before ZeRO-3 sharded it (FSDP2's tensors tell their whole shape)."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def unwrapped(trainer):
    return trainer.accelerator.unwrap_model(trainer.model)


def saved_tensors(trainer) -> dict[str, torch.Tensor]:
    """The policy's tensors that a checkpoint holds, by name; the very tensors, tied ones once."""
    model = unwrapped(trainer)
    if trainer.is_peft_model:
        return {name: p for name, p in model.named_parameters() if p.requires_grad}
    persistent = {f"{at}.{name}" if at else name for at, module in model.named_modules() for name in _buffers(module)}
    return dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in persistent}


def trained(trainer) -> list[str]:
    """Names of the policy's parameters among `saved_tensors`; buffers may hold infinity (a mask's)."""
    return [name for name, p in unwrapped(trainer).named_parameters() if p.requires_grad or not trainer.is_peft_model]


def _buffers(module) -> list[str]:
    return [name for name in module._buffers if name not in module._non_persistent_buffers_set]


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, shapes, dtypes and a few elements of each: tells another model, without reading all of one."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        flat = whole(tensor.detach()).flatten()
        some = flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED]
        digest.update(f"{name} {whole_shape(tensor)} {tensor.dtype} {some.double().tolist()}".encode())
    return digest.hexdigest()


def model_fingerprint(
    accelerator, model: torch.nn.Module, counts: Callable[[torch.nn.Parameter], bool] = lambda parameter: True
) -> str:
    """fingerprint() of the parameters that count; every process must call it."""
    model = accelerator.unwrap_model(model)

    def taken() -> str:
        return fingerprint((name, p) for name, p in model.named_parameters() if counts(p))

    return whole_here(accelerator, model, taken)


def whole_here(accelerator, model: torch.nn.Module, function: Callable[[], Any]) -> Any:
    """function() where whole() gives each of the model's parameters whole: at once under ZeRO-3, else one at a time."""
    sharded = distributed.kind(accelerator) == "zero3"
    return distributed.whole(accelerator, model, function) if sharded else function()


def frozen(trainer) -> dict[str, str]:
    """Fingerprints of what a checkpoint does not hold: the reference, and the base below adapters."""
    found = {}
    if trainer.ref_model is not None:
        found["reference"] = model_fingerprint(trainer.accelerator, trainer.ref_model)
    if trainer.is_peft_model:
        found["base"] = model_fingerprint(trainer.accelerator, trainer.model, lambda p: not p.requires_grad)
    return found


def base_name(trainer) -> str:
    return str(getattr(getattr(unwrapped(trainer), "config", None), "_name_or_path", "") or "")


def running(trainer) -> dict[str, float]:
    return {f.name: float(getattr(trainer.running, f.name)) for f in fields(trainer.running) if f.name != "accelerator"}


def counters(trainer) -> dict[str, int]:
    return {name: getattr(trainer, name) for name in _COUNTERS if hasattr(trainer, name)}


def random_state(trainer) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """(tensors by "<process>.<name>", JSON values per process); all processes take part."""
    tensors, values = ckpt.rng_state()
    generator = getattr(getattr(trainer.dataloader, "_sampler", None), "generator", None)
    if generator is not None:
        tensors["sampler"] = generator.get_state()
    return everyones_random_state(trainer.accelerator, tensors, values)


def everyones_random_state(accelerator, tensors, values) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """rng_state() of every process: (tensors by "<process>.<name>", JSON values per process)."""
    if accelerator.num_processes == 1:
        return {f"0.{name}": tensor for name, tensor in tensors.items()}, [values]
    from accelerate.utils import gather_object

    mine = {name: (str(t.dtype).removeprefix("torch."), t.tolist()) for name, t in tensors.items()}
    everyone = gather_object([(mine, values)])
    gathered = {
        f"{rank}.{name}": torch.tensor(numbers, dtype=getattr(torch, dtype))
        for rank, (theirs, _) in enumerate(everyone)
        for name, (dtype, numbers) in theirs.items()
    }
    return gathered, [values for _, values in everyone]


def type_name(optimizer) -> str:
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def config_values(trainer) -> dict[str, Any]:
    """The configuration as JSON; what JSON has no word for is left out."""
    kept = {}
    for name, value in trainer.config.__dict__.items():
        try:
            kept[name] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue
    return kept
