"""From an ATen graph of one token to a Program: each node that depends on the token becomes row operations."""

import math
import operator

from torch import fx

from fastppo.generation.lowering_moves import Moves
from fastppo.generation.patterns import gelu_tanh, rms_norm, spread
from fastppo.generation.row_program import (
    ARITHMETIC,
    ONE,
    UNARY,
    Op,
    Program,
    Row,
    Untraceable,
    alive,
    moved,
    read_from,
    reuse,
)

_VIEWS = {
    "view",
    "_unsafe_view",
    "unsqueeze",
    "squeeze",
    "reshape",
    "alias",
    "detach",
    "clone",
    "contiguous",
    "_to_copy",
}


class Lowering(Moves):
    """Walks the graph in order; `rows` holds what depends on the token, every other node is a constant."""

    def __init__(self, graph: fx.GraphModule, shapes: dict[fx.Node, tuple[int, ...]]):
        self.graph, self.shapes = graph, shapes
        self.rows: dict[fx.Node, Row] = {}
        self.ops: list[Op] = []
        self.sizes: list[int] = []
        self.producer: dict[int, Op] = {}
        self.layers: dict[Op, int] = {}

    def program(self) -> Program:
        inputs = [node for node in self.graph.graph.nodes if node.op == "placeholder"]
        tokens, positions = (self.new(1) for _ in inputs)
        for node, buffer in zip(inputs, (tokens, positions), strict=True):
            self.rows[node] = Row(buffer, (1,))
        for node in self.graph.graph.nodes:
            if node.op == "call_function" and any(x in self.rows for x in node.all_input_nodes):
                self.lower(node)
            elif node.op == "output":
                logits, hidden = (self.rows[x].buffer for x in node.args[0])
        ops = alive(self.ops, logits)
        used = {x for op in ops for x in (op.p, op.q, op.f) if isinstance(x, fx.Node)}
        constants = self.constants_for(used)
        sizes, places = reuse(self.sizes, ops, keep=(tokens, positions, hidden, logits))
        layers = {i: self.layers[op] for i, op in enumerate(ops) if op.kind == "attention"}
        split = 1 + max(layers)
        ops = [moved(op, places) for op in ops]
        return Program(
            self.graph,
            constants,
            sizes,
            ops,
            split,
            read_from(ops, split),
            places[tokens],
            places[positions],
            places[hidden],
            places[logits],
            layers,
        )

    # -- buffers

    def new(self, n: int) -> int:
        self.sizes.append(n)
        return len(self.sizes) - 1

    def emit(self, kind: str, mode: int, n: int, **rest) -> int:
        op = Op(kind, mode, self.new(n), **rest)
        self.ops.append(op)
        self.producer[op.out] = op
        return op.out

    def constants_for(self, used: set[fx.Node]) -> list[fx.Node]:
        wanted = set(used)
        order = list(self.graph.graph.nodes)
        for node in reversed(order):
            if node in wanted:
                wanted |= set(node.all_input_nodes)
        return [node for node in order if node in wanted]

    # -- operations

    def lower(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            return self.getitem(node)
        name = node.target.__name__.split(".")[0] if hasattr(node.target, "__name__") else str(node.target)
        method = getattr(self, f"op_{name}", None)
        if name in _VIEWS:
            self.rows[node] = Row(self.row(node.args[0]).buffer, self.shapes[node])
        elif method is not None:
            method(node, *node.args, **node.kwargs)
        elif name in UNARY:
            self.unary(node, name)
        elif name in ARITHMETIC:
            self.arithmetic(node, name, *node.args, **node.kwargs)
        else:
            raise Untraceable(f"it uses {name}")

    def row(self, node) -> Row:
        if node not in self.rows:
            raise Untraceable("an operation mixes constants and rows in a way that is not known here")
        return self.rows[node]

    def done(self, node: fx.Node, buffer: int) -> None:
        if self.sizes[buffer] != math.prod(self.shapes[node]):
            raise Untraceable(f"{node} is not a row of the size that was expected")
        self.rows[node] = Row(buffer, self.shapes[node])

    def unary(self, node, name) -> None:
        row = self.row(node.args[0])
        self.done(node, self.emit("unary", UNARY.index(name), self.sizes[row.buffer], a=row.buffer))

    def op_gelu(self, node, x, approximate="none") -> None:
        self.unary(node, "gelu" if approximate == "none" else "gelu_tanh")

    def op_embedding(self, node, table, index, *_, **__) -> None:
        rows, n = self.shapes[table]
        self.done(node, self.emit("embed", 0, n, a=self.row(index).buffer, i=(rows,), p=table))

    def op_mean(self, node, x, dims, keepdim=False, **_) -> None:
        shape = self.shapes[x]
        if [d % len(shape) for d in dims] != [len(shape) - 1]:
            raise Untraceable("it takes a mean over other than the last dimension")
        n = math.prod(shape[:-1])
        self.done(node, self.emit("mean", 0, n, a=self.row(x).buffer, i=(shape[-1],), f=1.0 / shape[-1]))

    def op_native_layer_norm(self, node, x, shape, weight, bias, eps) -> None:
        row = self.row(x)
        options = dict(a=row.buffer, i=(math.prod(shape),), f=eps, p=weight, q=bias)
        buffer = self.emit("layer_norm", 0, self.sizes[row.buffer], **options)
        self.rows[node] = Row(buffer, row.shape)

    def op_mm(self, node, x, weight) -> None:
        self.linear(node, x, weight, None)

    def op_addmm(self, node, bias, x, weight, beta=1, alpha=1) -> None:
        if beta != 1 or alpha != 1 or bias in self.rows:
            raise Untraceable("it scales a product")
        self.linear(node, x, weight, bias)

    def linear(self, node, x, weight, bias) -> None:
        if weight in self.rows:
            raise Untraceable("it multiplies by a matrix that depends on the token")
        K, N = self.shapes[weight]
        self.done(node, self.emit("linear", 0, N, a=self.row(x).buffer, i=(N, K), p=weight, q=bias))

    def op_row_attention(self, node, q, k, v, layer, scale, window, cap) -> None:
        (_, H, D), (_, KV, _) = self.shapes[q], self.shapes[k]
        buffers = dict(zip("abc", (self.row(x).buffer for x in (q, k, v)), strict=True))
        self.done(node, self.emit("attention", 0, H * D, i=(H, KV, D, window), f=scale, g=cap, **buffers))
        self.layers[self.ops[-1]] = layer

    def op_pow(self, node, x, exponent) -> None:
        row = self.row(x)
        mode = ARITHMETIC.index("pow")
        self.done(node, self.emit("scalar", mode, self.sizes[row.buffer], a=row.buffer, f=float(exponent), i=(0,)))

    def op_rsub(self, node, x, y, alpha=1) -> None:
        self.arithmetic(node, "sub", y, x, alpha=alpha)

    def arithmetic(self, node, name, x, y, alpha=1, **kwargs) -> None:
        if alpha != 1 or kwargs.get("rounding_mode"):
            raise Untraceable(f"it uses {name} with alpha or rounding")
        mode = ARITHMETIC.index(name)
        swapped = x not in self.rows or (y in self.rows and self.count(y) > self.count(x))
        if swapped:
            x, y = y, x
        row, n = self.row(x), self.count(x)
        if n == 1 and isinstance(y, fx.Node) and y not in self.rows and self.count(node) == self.count(y):
            i = (ONE, 0, int(swapped))
            self.done(node, self.emit("binary", mode, self.count(y), a=row.buffer, p=y, i=i))
            return
        if math.prod(self.shapes[node]) != n:
            raise Untraceable("it broadcasts two rows against each other")
        if not isinstance(y, fx.Node) or (y not in self.rows and self.count(y) == 1):
            if (number := y) in ((0, 0.0) if name in ("add", "sub") else (1, 1.0)) and not swapped:
                self.rows[node] = Row(row.buffer, self.shapes[node])
                return
            number = float(y) if not isinstance(y, fx.Node) else y
            self.done(node, self.emit("scalar", mode, n, a=row.buffer, f=number, i=(int(swapped),)))
            return
        how, m = spread(self.shapes[x], self.shapes[y])
        known = None
        if name == "mul":
            known = gelu_tanh(self, row.buffer, self.rows[y].buffer) if y in self.rows else rms_norm(self, row, y)
        other = dict(b=self.rows[y].buffer) if y in self.rows else dict(p=y)
        i = (how, m, int(swapped))
        self.done(node, known if known is not None else self.emit("binary", mode, n, a=row.buffer, i=i, **other))

    def count(self, node) -> int:
        return math.prod(self.shapes[node])
