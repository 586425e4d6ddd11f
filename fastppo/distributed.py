"""Many processes: what lies between the stages and accelerate, which owns launch, wrapping and communication.

    kind       how the parameters lie: "single", "ddp", "fsdp2", "zero2", "zero3"
    whole      run a function while every parameter is whole on this process (rollouts, passes without gradient)
    forward    run a function as the forward pass of a wrapped model, so that DDP's and FSDP's hooks see it
    together   a block that all processes leave in the same way: one's error ends it on all, with that one's words
    Share      a mini-batch's tokens and passes over all processes, so that the loss is the one of a single process

Under FSDP2 and ZeRO-3 at most one model is whole at a time: memory per process is its parameters in the dtype they are
gathered in, for the length of one rollout or one scoring stage; training gathers layer by layer.
Suffix: B sequences.
"""

import contextlib
import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from fastppo import host_group, zero
from fastppo.gradients import FlatGradients
from fastppo.score import NonFinite

if TYPE_CHECKING:
    from accelerate import Accelerator

SHARDED = ("fsdp2", "zero3")
KINDS = "one process, DDP, FSDP2 (fsdp_version: 2) and DeepSpeed ZeRO"


class PeerFailure(RuntimeError):
    """Another process failed; the message is its error. The run ends here, too."""


def kind(accelerator: "Accelerator") -> str:
    """ "single" | "ddp" | "fsdp2" | "zero2" (every stage that keeps parameters whole) | "zero3". ValueError for others."""
    found = accelerator.distributed_type.value
    if found == "FSDP":
        if not accelerator.is_fsdp2:
            raise ValueError(f"FSDP version 1 is not supported; set fsdp_version: 2. Supported: {KINDS}")
        return "fsdp2"
    if found == "DEEPSPEED":
        return "zero3" if accelerator.state.deepspeed_plugin.zero_stage == 3 else "zero2"
    if found in ("MEGATRON_LM", "XLA"):
        raise ValueError(f"{found} is not supported. Supported: {KINDS}")
    return "single" if found == "NO" else "ddp"


def process_group_options(seconds: float):
    """accelerate's handler: a collective that waits longer than this raises instead of hanging."""
    from accelerate.utils import InitProcessGroupKwargs

    return InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=seconds))


# --- models -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def forward_as(module: nn.Module, function: Callable) -> Iterator[None]:
    """`module.forward` is `function` inside the block, so that DDP's and FSDP's hooks around forward still run."""
    before = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def forward(wrapped: nn.Module, function: Callable[[], Any]) -> Any:
    """`function()` as the forward pass of `wrapped` (DDP, FSDP2, a DeepSpeed engine or the bare model)."""
    with forward_as(bare(wrapped), function):
        return wrapped()


def bare(wrapped: nn.Module) -> nn.Module:
    """The model inside DDP's or DeepSpeed's wrapper; FSDP2 has none."""
    is_wrapper = isinstance(wrapped, nn.parallel.DistributedDataParallel) or hasattr(wrapped, "optimizer_name")
    return wrapped.module if is_wrapper else wrapped


def fsdp_units(model: nn.Module) -> list[nn.Module]:
    """The modules that FSDP2 gathers as one, the root first; none where it isn't used."""
    if not torch.distributed.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def whole(accelerator: "Accelerator", model: nn.Module, function: Callable[[], Any]) -> Any:
    """`function()` while all parameters of `model` are whole here, gathered once and given back. No gradient.

    Every process must call it; what happens inside may differ (other lengths, other numbers of passes).
    """
    if kind(accelerator) == "zero3":
        return zero.whole(model, function)
    units = fsdp_units(model)
    if not units:
        return function()
    plugin = accelerator.state.fsdp_plugin

    def gathered():
        for unit in units:
            unit.unshard()
        return function()

    with torch.no_grad():
        try:
            for unit in units:
                unit.set_reshard_after_forward(False, recurse=False)
            return forward(units[0], gathered)
        finally:
            for unit in units:
                # FSDP2 keeps the root's own parameters until the backward pass
                unit.set_reshard_after_forward(
                    unit is not units[0] and bool(plugin.reshard_after_forward), recurse=False
                )
                unit.reshard()


def unshard(module: nn.Module) -> None:
    """Gather a module that FSDP2 shards by itself and whose parameters are read without a call of it (accelerate gives a head
    under adapters a unit of its own); in its model's forward pass. FSDP2 gives it back after the backward pass."""
    if hasattr(module, "unshard"):
        module.unshard()


def prepare_frozen(accelerator: "Accelerator", model: nn.Module | None) -> nn.Module | None:
    """A model that is only read (the reference), laid out as the policy is: sharded under FSDP2, else on the device."""
    if model is None:
        return None
    if kind(accelerator) == "fsdp2":
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, model).eval()
    if kind(accelerator).startswith("zero"):
        from fastppo.trainer.setup import prepare_deepspeed

        return prepare_deepspeed(accelerator, model)
    return model.to(accelerator.device).eval()


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor (every process must call it), or the tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """model.state_dict() with whole tensors; what FSDP2 shards, on the CPU of the first process. Every process must call it."""
    return _gathered(model.state_dict(), torch.distributed.get_rank() == 0)


def whole_tensors(
    accelerator: "Accelerator", model: nn.Module | None, tensors: Callable[[], Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """tensors() of `model`, detached and whole; every process must call it.

    Where they are sharded they are kept on the CPU of the first process (of each machine), and only there.
    """
    keep = accelerator.is_local_main_process

    def copies() -> dict[str, torch.Tensor]:
        return {name: x.detach().cpu().clone() for name, x in tensors().items()} if keep else {}

    if kind(accelerator) == "zero3":
        return whole(accelerator, bare(model), copies)
    return _gathered({name: x.detach() for name, x in tensors().items()}, keep)


def _gathered(tensors: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """FSDP2's tensors gathered one at a time and kept on the CPU, or let go; others as they are."""
    found = {}
    for name, x in tensors.items():
        full = full_tensor(x)
        if full is x:
            found[name] = x
        elif keep:
            found[name] = full.cpu()
    return found


def backward(accelerator: "Accelerator", loss: torch.Tensor, last: bool) -> None:
    """accelerator.backward; under DeepSpeed without its optimizer step. last: the optimizer step's last pass."""
    if kind(accelerator).startswith("zero"):
        zero.backward(accelerator, loss, last)
    else:
        accelerator.backward(loss)


def add_up(flat: FlatGradients) -> None:
    """Each .grad to its sum over processes, as a part of `flat`. Every process must call it."""
    flat.take()
    add_up_tensor(flat.whole)


def add_up_tensor(numbers: torch.Tensor) -> None:
    """A contiguous tensor to its sum over processes: in memory that they share, or by torch's collective."""
    group = host_group.of_world(numbers.device) if numbers.dtype == torch.float32 else None
    if group is None:
        torch.distributed.all_reduce(numbers)
    else:
        group.add_up(numbers)


def reduce_gradients(parameters: Sequence[nn.Parameter], bucket_bytes: int = 32 << 20) -> None:
    """Gradients to their sum over processes, a bucket at a time, for passes that DDP's hooks don't see."""
    bucket: list[torch.Tensor] = []
    size = 0
    for parameter in [*parameters, None]:
        if bucket and (parameter is None or size >= bucket_bytes or parameter.grad.dtype != bucket[0].dtype):
            flat = torch.cat([grad.flatten() for grad in bucket])
            add_up_tensor(flat)
            for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
                grad.copy_(part.view_as(grad))
            bucket, size = [], 0
        if parameter is not None:
            bucket.append(parameter.grad)
            size += parameter.grad.numel() * parameter.grad.element_size()


# --- numbers ----------------------------------------------------------------------------------------------------------


def table(accelerator: "Accelerator", numbers: Sequence[float]) -> torch.Tensor:
    """float64 [processes, numbers] on the CPU: every process's numbers."""
    return begin_table(accelerator, numbers)()


def begin_table(accelerator: "Accelerator", numbers: Sequence[float]) -> Callable[[], torch.Tensor]:
    """table(), begun here and waited for in the call of what is returned; other work may lie in between."""
    if group := accelerator.num_processes > 1 and host_group.of_world(accelerator.device):
        found = group.table(numbers)
        return lambda: found
    row = torch.tensor(numbers, dtype=torch.float64)
    if accelerator.num_processes == 1:
        return lambda: row[None]
    # a sum with zeros is exact
    rows = torch.zeros(accelerator.num_processes, len(row), dtype=torch.float64, device=accelerator.device)
    rows[accelerator.process_index] = row.to(accelerator.device)
    work = torch.distributed.all_reduce(rows, async_op=True)

    def read() -> torch.Tensor:
        work.wait()
        return rows.cpu()

    return read


def total(accelerator: "Accelerator", tensor: torch.Tensor) -> torch.Tensor:
    """Sum over processes, elementwise, of a tensor of floats."""
    return everyones(accelerator, tensor).sum(0) if accelerator.num_processes > 1 else tensor


def everyones(accelerator: "Accelerator", tensor: torch.Tensor) -> torch.Tensor:
    """[processes, *tensor.shape]: the tensors of all processes, of one shape and dtype."""
    group = host_group.of_world(tensor.device)
    return accelerator.gather(tensor[None]) if group is None else group.gather(tensor)


class Share(NamedTuple):
    """A mini-batch over all processes. normalizer: its tokens; by the number of processes where gradients are averaged.
    passes: micro-batches that each process must run."""

    normalizer: float
    passes: int


def shares(
    accelerator: "Accelerator", tokens: Sequence[int], passes: Sequence[int], averaged: bool = True
) -> list[Share]:
    """One Share per mini-batch, from this process's tokens and micro-batches of each. averaged: or gradients are added up."""
    numbers = table(accelerator, [*tokens, *passes])
    tokens_M, passes_M = numbers.sum(0)[: len(tokens)], numbers.max(0).values[len(tokens) :]
    count = accelerator.num_processes if averaged else 1
    return [
        Share(max(float(t) / count, 1.0 / count), int(p))
        for t, p in zip(tokens_M.tolist(), passes_M.tolist(), strict=True)
    ]


def share_stats(accelerator: "Accelerator", stats: Sequence[Any]) -> list[Any]:
    """PPOStats of mini-batches, each over the tokens of all processes."""
    from fastppo.kernels.ppo_loss import STATS, PPOStats

    if accelerator.num_processes == 1:
        return list(stats)
    sums = [one.sums() for one in stats]
    numbers = table(accelerator, [part[name] for part in sums for name in STATS]).view(-1, len(sums), len(STATS))
    return [PPOStats(tuple(numbers[:, i])) for i in range(len(sums))]


# --- errors -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def together(accelerator: "Accelerator", what: str) -> Iterator[None]:
    """Processes meet at the end of the block. When one failed, it raises its own error and the others PeerFailure with
    its words (NonFinite for a NonFinite, which a guard may skip on all)."""
    if accelerator is None or accelerator.num_processes == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as found:
        error = found
    code = 0 if error is None else 2 - isinstance(error, NonFinite)
    with named(what):
        codes = table(accelerator, [code])[:, 0].int().tolist()
    if not any(codes):
        return
    from accelerate.utils import gather_object

    words = gather_object([None if error is None else f"{type(error).__name__}: {error}"])
    if error is not None and (code == 2 or 2 not in codes):
        raise error
    rank = codes.index(max(codes))
    kinds = {1: NonFinite, 2: PeerFailure}
    raise kinds[codes[rank]](f"process {rank} failed in {what}: {words[rank]}") from error


def read_together(accelerator: "Accelerator", batches: Iterator, what: str) -> Iterator:
    """The items of `batches`; when one process cannot read its next one, all end as together() says."""
    while True:
        with together(accelerator, what):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
    """A collective that times out or loses its peer says in which stage that was."""
    try:
        yield
    except (torch.distributed.DistBackendError, RuntimeError) as error:
        raise PeerFailure(
            f"waiting for the other processes after {what} failed: one has ended or is later than the time-out "
            f"(config.ddp_timeout); its own output says why. {error}"
        ) from error
