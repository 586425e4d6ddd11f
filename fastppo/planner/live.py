"""What is alive while a model runs on tensors without storage: bytes, and an attention that keeps what a flash kernel keeps."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Bytes of the tensors made inside that are alive, and the most there were. apart: tensors that are not counted."""

    def __init__(self, apart: Iterable[torch.Tensor]):
        super().__init__()
        self.now = self.most = 0
        self._apart = {id(storage): storage for storage in (x.untyped_storage() for x in apart)}
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor):
                self._count(x.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._storages or key in self._apart:
            return

        def gone(_):
            self.now -= size
            self._storages.pop(key, None)

        self._storages[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_1HND, k_1KND, v_1KND):
        out = q_1HND.new_empty(1, q_1HND.shape[2], q_1HND.shape[1], v_1KND.shape[3])
        ctx.save_for_backward(q_1HND, k_1KND, v_1KND, out, q_1HND.new_empty(q_1HND.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


@dataclass
class Cached:
    """Bytes that a token's keys and values take, as the attention function sees them."""

    bytes_per_token: int = 0
    seen: set[int] = field(default_factory=set)

    def attend(self, module, q, k, v, attention_mask=None, **_) -> tuple[torch.Tensor, None]:
        if id(module) not in self.seen:
            self.seen.add(id(module))
            self.bytes_per_token += 2 * k.shape[1] * k.shape[3] * k.dtype.itemsize
        return _Attention.apply(q, k, v), None
