"""The model's forward pass for one token as a list of row operations, read off its own ATen graph.

For one token every tensor of the graph is a row: views and transposes of size-one dimensions change nothing, the rest are
elementwise operations, norms, products with constant matrices, and attention. That list, run for many rows at once, is
csrc/cpu/decode_program.cpp. Nothing here knows an architecture; what is not understood raises Untraceable, and the model
runs as it is.
"""

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from fastppo.attention import install, using

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
    """ops[:split] make hidden from tokens and positions, ops[split:] make logits from hidden."""

    graph: fx.GraphModule
    constants: list[fx.Node]
    sizes: list[int]
    ops: list[Op]
    split: int
    tokens: int
    positions: int
    hidden: int
    logits: int
    layers: dict[int, int] = field(default_factory=dict)  # index of an attention op -> layer_idx
    packed: dict[tuple[fx.Node, bool], torch.Tensor] = field(default_factory=dict)  # memory for packed matrices (bf16?)


class _Layout:
    """Makes each layer's attention one node of the graph."""

    def attend(self, module, q_NHD, k_NKD, v_NKD, *, scale, window, softcap):
        run = _attention_op()
        return run(q_NHD, k_NKD, v_NKD, module.layer_idx, float(scale), window or 0, float(softcap or 0.0))


@functools.cache
def _attention_op() -> Callable:
    library = torch.library.Library("fastppo", "FRAGMENT")
    library.define(
        "row_attention(Tensor q, Tensor k, Tensor v, int layer, float scale, int window, float cap) -> Tensor"
    )
    library.impl("row_attention", lambda q, *_: torch.empty_like(q), "CompositeExplicitAutograd")
    _attention_op.library = library  # or the registration ends with it
    return torch.ops.fastppo.row_attention


def trace(model) -> Program:
    """The Program of `model` (a transformers causal LM in eval mode). Raises Untraceable with the reason."""
    from torch.fx.experimental.proxy_tensor import make_fx

    refuse_state(model)
    device = model.get_input_embeddings().weight.device
    seen: list[torch.Tensor] = []

    def step(tokens, positions):
        seen.clear()
        embeds = model.get_input_embeddings()(tokens[None])
        with using(_Layout()):
            out = model(inputs_embeds=embeds, position_ids=positions[None], use_cache=False)
        return out.logits, seen[0]

    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    example = torch.tensor([3], device=device), torch.tensor([5], device=device)
    try:
        with install(model), torch.no_grad():
            graph = make_fx(step)(*example)
            graph.graph.eliminate_dead_code()
            shapes = _Shapes(graph)
            shapes.run(*example)
    except (RuntimeError, NotImplementedError, TypeError, IndexError) as error:
        raise Untraceable(f"its graph can't be traced: {str(error).splitlines()[0][:200]}") from error
    finally:
        hook.remove()
    return _Lowering(graph, shapes.values).program()


def refuse_state(model) -> None:
    """Raise Untraceable when a program could never stand for the model."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {x.get("rope_type", x.get("type")) for x in (rope, *rope.values()) if isinstance(x, dict)}
    if kinds & {"dynamic", "longrope"}:
        raise Untraceable("its rotary frequencies depend on the length of the sequence")
    for module in model.modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if "make_inputs_require_grads" not in getattr(hook, "__qualname__", ""):  # means nothing without gradients
                raise Untraceable(f"{type(module).__name__} has forward hooks, which must run")


class _Shapes(fx.Interpreter):
    """Runs the graph once and keeps the shape of each value."""

    def __init__(self, graph):
        super().__init__(graph)
        self.values: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, node):
        result = super().run_node(node)
        if isinstance(result, torch.Tensor):
            self.values[node] = tuple(result.shape)
        return result


class _Lowering:
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
        ops = self.alive(logits)
        used = {x for op in ops for x in (op.p, op.q, op.f) if isinstance(x, fx.Node)}
        constants = self.constants_for(used)
        split = 1 + max(i for i, op in enumerate(ops) if op.out == hidden)
        made = {hidden}
        for op in ops[split:]:
            if not set(op.inputs) <= made or op.kind == "attention":
                raise Untraceable("its head reads more than the last hidden state")
            made.add(op.out)
        sizes, places = self.reuse(ops, keep=(tokens, positions, hidden, logits))
        layers = {i: self.layers[op] for i, op in enumerate(ops) if op.kind == "attention"}
        ops = [_moved(op, places) for op in ops]
        return Program(
            self.graph,
            constants,
            sizes,
            ops,
            split,
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

    def alive(self, logits: int) -> list[Op]:
        wanted, ops = {logits}, []
        for op in reversed(self.ops):
            if op.out in wanted:
                wanted |= set(op.inputs)
                ops.append(op)
        return ops[::-1]

    def constants_for(self, used: set[fx.Node]) -> list[fx.Node]:
        wanted = set(used)
        order = list(self.graph.graph.nodes)
        for node in reversed(order):
            if node in wanted:
                wanted |= set(node.all_input_nodes)
        return [node for node in order if node in wanted]

    def reuse(self, ops: list[Op], keep: tuple[int, ...]) -> tuple[list[int], dict[int, int]]:
        """Give buffers that are not needed at the same time the same place, so that a step stays in cache."""
        last = {buffer: i for i, op in enumerate(ops) for buffer in (*op.inputs, op.out)}
        sizes: list[int] = []
        free: dict[int, list[int]] = {}
        places: dict[int, int] = {}

        def place(buffer):
            n = self.sizes[buffer]
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
                    free.setdefault(self.sizes[buffer], []).append(places[buffer])
        return sizes, places

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

    def op_transpose(self, node, x, first, second) -> None:
        order = list(range(len(self.shapes[x])))
        order[first], order[second] = order[second], order[first]
        self.op_permute(node, x, order)

    def op_permute(self, node, x, order) -> None:
        moved = [dim % len(order) for dim in order if self.shapes[x][dim] != 1]
        if moved != sorted(moved):
            raise Untraceable("it transposes within a token")
        self.rows[node] = Row(self.row(x).buffer, self.shapes[node])

    def op_expand(self, node, x, size, **_) -> None:
        if math.prod(self.shapes[node]) != math.prod(self.shapes[x]):
            raise Untraceable("it expands a row")
        self.rows[node] = Row(self.row(x).buffer, self.shapes[node])

    def op_select(self, node, x, dim, index) -> None:
        self.cut(node, x, dim, index, 1)

    def op_slice(self, node, x, dim=0, start=0, end=None, step=1) -> None:
        size = self.shapes[x][dim]
        start, end, step = slice(start, end, step).indices(size)
        if step != 1:
            raise Untraceable("it slices with a step")
        self.cut(node, x, dim, start, end - start)

    def cut(self, node, x, dim, start, length) -> None:
        row, shape = self.row(x), self.shapes[x]
        dim %= len(shape)
        size, inner, outer = shape[dim], math.prod(shape[dim + 1 :]), math.prod(shape[:dim])
        if length == size:
            self.rows[node] = Row(row.buffer, self.shapes[node])
            return
        i = (outer, length * inner, size * inner, (start % size) * inner)
        self.done(node, self.emit("slice", 0, outer * length * inner, a=row.buffer, i=i))

    def op_split(self, node, x, size, dim=0) -> None:
        total = self.shapes[x][dim]
        self.parts(node, x, dim, [min(size, total - start) for start in range(0, total, size)])

    def op_split_with_sizes(self, node, x, sizes, dim=0) -> None:
        self.parts(node, x, dim, list(sizes))

    def parts(self, node, x, dim, lengths) -> None:
        node.meta["fastppo_parts"] = (x, dim, lengths)
        self.rows[node] = self.row(x)

    def getitem(self, node) -> None:
        source, index = node.args
        if "fastppo_parts" in source.meta:
            x, dim, lengths = source.meta["fastppo_parts"]
            self.cut(node, x, dim, sum(lengths[:index]), lengths[index])
        elif index == 0:
            self.rows[node] = Row(self.row(source).buffer, self.shapes[node])

    def op_cat(self, node, parts, dim=0) -> None:
        shape = self.shapes[node]
        dim %= len(shape)
        outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
        out, start = self.new(math.prod(shape)), 0
        for part in parts:
            length = self.shapes[part][dim] * inner
            i = (outer, length, shape[dim] * inner, start)
            self.ops.append(Op("place", 0, out, a=self.row(part).buffer, i=i))
            start += length
        self.done(node, out)

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
        spread, m = self.spread(self.shapes[x], self.shapes[y])
        if name == "mul" and (norm := self.rms_norm(row, y)) is not None:
            self.done(node, norm)
            return
        other = dict(b=self.rows[y].buffer) if y in self.rows else dict(p=y)
        self.done(node, self.emit("binary", mode, n, a=row.buffer, i=(spread, m, int(swapped)), **other))

    def count(self, node) -> int:
        return math.prod(self.shapes[node])

    def spread(self, shape: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, int]:
        """How a value of shape `other` covers one of `shape`: (FULL | TAIL | HEAD, period or group)."""
        other = (1,) * (len(shape) - len(other)) + tuple(other)
        pairs = [(a, b) for a, b in zip(shape, other[-len(shape) :], strict=True) if a != 1]
        same = [a == b for a, b in pairs]
        if all(same):
            return FULL, 0
        alike = sum(same)
        if all(same[len(same) - alike :]):
            return TAIL, math.prod(b for _, b in pairs)
        if all(same[:alike]):
            return HEAD, math.prod(a for a, _ in pairs[alike:])
        raise Untraceable("it broadcasts over a middle dimension")

    def rms_norm(self, row: Row, weight: fx.Node) -> int | None:
        """x * rsqrt(mean(x^2) + eps) * weight as one operation."""
        scaled = self.producer.get(row.buffer)
        if weight in self.rows or scaled is None or (scaled.kind, scaled.mode) != ("binary", ARITHMETIC.index("mul")):
            return None
        chain, buffer = [], scaled.b
        for _ in range(4):
            op = self.producer.get(buffer)
            if op is None:
                return None
            chain.append((op.kind, op.mode))
            buffer, last = op.a, op
            if op.kind == "scalar" and op.mode == 0:
                eps = op.f
            if op.kind == "mean":
                d = op.i[0]
        wanted = [("unary", UNARY.index("rsqrt")), ("scalar", 0), ("mean", 0), ("scalar", ARITHMETIC.index("pow"))]
        if chain != wanted or last.f != 2.0 or buffer != scaled.a or self.count(weight) != d:
            return None
        return self.emit("rms_norm", 0, self.sizes[scaled.out], a=scaled.a, i=(d,), f=eps, p=weight)


def _moved(op: Op, places: dict[int, int]) -> Op:
    a, b, c, out = (places.get(x, -1) for x in (op.a, op.b, op.c, op.out))
    return replace(op, a=a, b=b, c=c, out=out)
