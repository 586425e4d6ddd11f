"""Weights as the products of a pass read them, and gradients as they write them.

In bfloat16 every matrix is rounded once per optimizer step (`refresh`), and matrices that lie side by side become one;
in float32 the parameters serve as they are, but for small models, whose matrices are laid side by side too. A gradient
buffer is kept from step to step of an optimise stage: fresh memory would be paid for by page faults.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastppo.engine import kernels
from fastppo.engine.kernels import Norm, NormGradients
from fastppo.engine.spec import Matrix, Spec
from fastppo.gradients import FlatGradients
from fastppo.kernels._products import by_torch, mm, on_tiles

# below this size copies of the weights cost less than the calls that they save
SIDE_BY_SIDE_BYTES = 16 * 2**20


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """a b into out, in bfloat16 never for a number of rows that oneDNN has to compile for, and without a rounded sum on its way."""
    if a.dtype == torch.float32:
        mm(a, b, out=out, add=add)
    elif not on_tiles(a, b, out, add=add):
        by_torch(a, b, out, add=add)
    return out


class Ready:
    """Matrices side by side, as the products take them: `parts` are (W [n, K] as T, b as T or None, first column)."""

    __slots__ = ("parts", "outputs", "biased")

    def __init__(self, parts, outputs: int):
        self.parts, self.outputs = parts, outputs
        self.biased = parts[0][1] is not None

    def forward(self, x_NK: Tensor) -> Tensor:
        """x W^T + b"""
        out = x_NK.new_empty(len(x_NK), self.outputs)
        for w_nK, b_n, first in self.parts:
            to = out if len(self.parts) == 1 else out[:, first : first + len(w_nK)]
            mm(x_NK, w_nK.t(), out=to, bias=b_n)
        return out

    def backward(self, dy: Tensor) -> Tensor:
        """dy W"""
        out = dy.new_empty(len(dy), self.parts[0][0].shape[1])
        for w_nK, _, first in self.parts:
            mm(dy[:, first : first + len(w_nK)], w_nK, out=out, add=first > 0)
        return out


class Weights:
    """Ready matrices of one Spec. keep: whether they stay until the next refresh (a reference's are made when used)."""

    def __init__(self, spec: Spec, dtype: torch.dtype, keep: bool):
        self.dtype, self.keep = dtype, keep
        size = sum(p.nbytes for p in spec.parameters())
        self.copied = dtype != torch.float32 or size <= SIDE_BY_SIDE_BYTES  # they stay where they are over a refresh
        self._ready: dict[int, Ready] = {}
        self._head: tuple[Tensor, Tensor] | None = None
        self._copies: list[tuple[Tensor, Tensor]] = []  # (parameter, where it is copied to)

    def refresh(self) -> None:
        """The parameters have changed."""
        if not self.copied:
            self._ready.clear()
        kernels.copy_all(self._copies, self.dtype)

    def of(self, matrices: list[Matrix]) -> Ready:
        """Called a hundred times per pass, without autograd (a decorator for that here cost a tenth of a small model's pass)."""
        ready = self._ready.get(id(matrices[0]))
        if ready is None:
            ready = self._make(matrices)
            if self.keep:
                self._ready[id(matrices[0])] = ready
        return ready

    def _make(self, matrices: list[Matrix]) -> Ready:
        outputs = sum(m.outputs for m in matrices)
        alone = len(matrices) == 1 and self.dtype == torch.float32
        if alone or not self.copied:
            parts, first = [], 0
            for m in matrices:
                weight = m.weight.detach()
                parts.append((weight.t() if m.turned else weight, None if m.bias is None else m.bias.detach(), first))
                first += m.outputs
            return Ready(parts, outputs)
        turned, inputs = matrices[0].turned, matrices[0].weight.shape[0 if matrices[0].turned else 1]
        shape = (inputs, outputs) if turned else (outputs, inputs)
        weight = torch.empty(shape, dtype=self.dtype)
        bias = None if all(m.bias is None for m in matrices) else torch.zeros(outputs, dtype=self.dtype)
        copies, first = [], 0
        for m in matrices:
            rows = slice(first, first + m.outputs)
            copies.append((m.weight, weight if turned else weight[rows]))
            if m.bias is not None:
                copies.append((m.bias, bias[rows]))
            first += m.outputs
        kernels.copy_all(copies, self.dtype)
        if self.keep:
            self._copies += copies
        return Ready([(weight.t() if turned else weight, bias, 0)], outputs)

    @torch.no_grad()
    def head(self, weight_VD: Tensor) -> Tensor:
        """The output embedding as T."""
        if self.dtype == torch.float32:
            return weight_VD.detach()
        if self._head is None or self._head[0] is not weight_VD:
            made = weight_VD.detach().to(self.dtype)
            if not self.keep:
                return made
            self._head = (weight_VD, made)
            self._copies.append(self._head)
        return self._head[1]


class Gradients:
    """Where gradients of parameters go: into .grad, in buffers that outlive zero_grad(); in `flat` where it has a place."""

    def __init__(self, flat: FlatGradients | None = None):
        self._flat = flat
        self._buffers: dict[nn.Parameter, Tensor] = {}
        self._blocks: dict[nn.Parameter, tuple[Tensor, tuple[Tensor, ...]]] = {}

    def target(self, parameter: nn.Parameter | None) -> tuple[Tensor | None, bool]:
        """(.grad, whether something is in it already); None for what is not trained."""
        if parameter is None or not parameter.requires_grad:
            return None, False
        if parameter.grad is not None:
            if not parameter.grad.is_contiguous():  # somebody else's: the kernels write rows one after the other
                parameter.grad = parameter.grad.contiguous()
            return parameter.grad, True
        if parameter not in self._buffers:
            own = None if self._flat is None else self._flat.views.get(parameter)
            self._buffers[parameter] = torch.empty_like(parameter, requires_grad=False) if own is None else own
        parameter.grad = self._buffers[parameter]
        return parameter.grad, False

    def block(self, parameters: list[nn.Parameter | None]) -> tuple[Tensor | None, bool]:
        """target() of parameters that lie one below the other: one buffer, of which each .grad is a part.

        None where that can't be: one is not there or not trained, or has a gradient elsewhere.
        """
        if any(p is None or not p.requires_grad for p in parameters):
            return None, False
        if parameters[0] not in self._blocks:
            self._blocks[parameters[0]] = self._one_below_the_other(parameters)
        whole, parts = self._blocks[parameters[0]]
        grads = [p.grad for p in parameters]
        if all(grad is part for grad, part in zip(grads, parts, strict=True)):
            return whole, True
        if any(grad is not None for grad in grads):
            return None, False
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part
        return whole, False

    def _one_below_the_other(self, parameters: list[nn.Parameter]) -> tuple[Tensor, tuple[Tensor, ...]]:
        whole = None if self._flat is None else self._flat.matrix(parameters)
        if whole is not None:
            return whole, tuple(self._flat.views[p] for p in parameters)
        rows = [len(p) for p in parameters]
        whole = torch.empty(sum(rows), *parameters[0].shape[1:])
        return whole, whole.split(rows)

    def norm(self, f: Norm) -> NormGradients:
        both = [self.target(f.weight_D), self.target(f.bias_D)]
        add = any(added for _, added in both)
        for to, added in both:  # one of the two may have been frozen or zeroed alone
            if add and to is not None and not added:
                to.zero_()
        return NormGradients(both[0][0], both[1][0], add)

    def pieces(self, matrices: list[Matrix]) -> tuple[list["Piece"], list["Piece"]]:
        """Where the gradients of matrices side by side, and of their biases, go."""
        apart = matrices[0].turned
        return self._pieces(matrices, [m.weight for m in matrices], apart), self._pieces(
            matrices, [m.bias for m in matrices], False
        )

    def _pieces(self, matrices: list[Matrix], parameters: list[nn.Parameter | None], apart: bool) -> list["Piece"]:
        if len(matrices) > 1 and not apart:
            whole, add = self.block(parameters)
            if whole is not None:
                return [Piece(whole, add, 0, len(whole), False)]
        found, first = [], 0
        for m, parameter in zip(matrices, parameters, strict=True):
            to, add = self.target(parameter)
            if to is not None:
                found.append(Piece(to, add, first, m.outputs, apart))
            first += m.outputs
        return found

    def add_product(self, parameter: nn.Parameter, a: Tensor, b: Tensor) -> None:
        """parameter.grad += a b"""
        to, add = self.target(parameter)
        if to is not None:
            product(a, b, to, add)

    def add(self, parameter: nn.Parameter, x: Tensor) -> None:
        to, add = self.target(parameter)
        if to is not None and add:
            to.add_(x)
        elif to is not None:
            to.copy_(x)


class Piece(NamedTuple):
    """to (+)= dy[:, first : first + count]^T x, of a bias the sums of those columns; turned: x^T dy."""

    to: Tensor
    add: bool
    first: int
    count: int
    turned: bool
