"""A forward pass as a list of operations on rows (tokens): what trace.py makes and csrc/cpu/decode_program.cpp runs."""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

# csrc/cpu/decode_program.cpp has the same lists
KINDS = (
    "embed",
    "unary",
    "binary",
    "scalar",
    "mean",
    "layer_norm",
    "slice",
    "place",
    "rms_norm",
    "linear",
    "attention",
)
UNARY = ("neg", "cos", "sin", "rsqrt", "relu", "silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "exp", "sqrt")
UNARY += ("reciprocal", "abs")
ARITHMETIC = ("add", "sub", "mul", "div", "pow")
FULL, TAIL, HEAD, ONE = range(4)


class Untraceable(Exception):
    """The graph has something that is not an operation on rows; the message says what."""


@dataclass(eq=False)
class Op:
    """One operation. a, b, c: buffers read, -1 for none.   p, q: constants (graph nodes) whose address it gets."""

    kind: str
    mode: int
    out: int
    a: int = -1
    b: int = -1
    c: int = -1
    i: tuple[int, ...] = ()
    f: Any = 0.0  # a number, or the graph node of a constant with one element
    g: float = 0.0
    p: fx.Node | None = None
    q: fx.Node | None = None

    @property
    def inputs(self) -> list[int]:
        return [buffer for buffer in (self.a, self.b, self.c) if buffer >= 0]


@dataclass(frozen=True)
class Row:
    """A value of the graph that depends on the token: which buffer, in what shape (per row)."""

    buffer: int
    shape: tuple[int, ...]


@dataclass
class Program:
    """ops make hidden and logits from tokens and positions.

    ops[split:] have no attention: where only some rows' logits are wanted, those rows of the buffers `live` are enough.
    """

    graph: fx.GraphModule
    constants: list[fx.Node]
    sizes: list[int]
    ops: list[Op]
    split: int
    live: tuple[int, ...]
    tokens: int
    positions: int
    hidden: int
    logits: int
    layers: dict[int, int] = field(default_factory=dict)  # index of an attention op -> layer_idx
    workspace: Any = None  # the C++ side's, for values between operations
    _state: tuple | None = None  # of the model when the program last gave its logits
    _uses: int = 0  # since then

    def checked(self, state: tuple) -> None:
        """The program gave the model's own logits in this state (see model_state)."""
        self._state, self._uses = state, 0

    def is_checked(self, state: tuple, most: int) -> bool:
        """Whether the model is as it was at the last check, and fewer than `most` rollouts ago."""
        self._uses += 1
        return self._state == state and self._uses < most


def read_from(ops: list[Op], start: int) -> tuple[int, ...]:
    """The buffers that ops[start:] read and none of them has written before."""
    made: set[int] = set()
    read: dict[int, None] = {}
    for op in ops[start:]:
        read |= dict.fromkeys(x for x in op.inputs if x not in made)
        made.add(op.out)
    return tuple(read)


def alive(all_ops: list[Op], logits: int) -> list[Op]:
    """The operations that the logits depend on."""
    wanted, ops = {logits}, []
    for op in reversed(all_ops):
        if op.out in wanted:
            wanted |= set(op.inputs)
            ops.append(op)
    return ops[::-1]


def reuse(all_sizes: list[int], ops: list[Op], keep: tuple[int, ...]) -> tuple[list[int], dict[int, int]]:
    """Give buffers that are not needed at the same time the same place, so that a step stays in cache."""
    last = {buffer: i for i, op in enumerate(ops) for buffer in (*op.inputs, op.out)}
    sizes: list[int] = []
    free: dict[int, list[int]] = {}
    places: dict[int, int] = {}

    def place(buffer):
        n = all_sizes[buffer]
        if free.get(n) and buffer not in keep:
            places[buffer] = free[n].pop()
        else:
            places[buffer] = len(sizes)
            sizes.append(n)

    for buffer in keep:
        place(buffer)
    for i, op in enumerate(ops):
        if op.out not in places:
            place(op.out)
        for buffer in {*op.inputs, op.out}:
            if last[buffer] == i and buffer not in keep:
                free.setdefault(all_sizes[buffer], []).append(places[buffer])
    return sizes, places


def moved(op: Op, places: dict[int, int]) -> Op:
    a, b, c, out = (places.get(x, -1) for x in (op.a, op.b, op.c, op.out))
    return replace(op, a=a, b=b, c=c, out=out)
