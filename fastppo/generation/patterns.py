"""Several operations of a graph that are one: what models write out and a kernel does in one pass."""

import math

from torch import fx

from fastppo.generation.row_program import ARITHMETIC, FULL, HEAD, TAIL, UNARY, Row, Untraceable


def spread(shape: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, int]:
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


def rms_norm(lowering, row: Row, weight: fx.Node) -> int | None:
    """x * rsqrt(mean(x^2) + eps) * weight as one operation."""
    producer = lowering.producer
    scaled = producer.get(row.buffer)
    if weight in lowering.rows or scaled is None or (scaled.kind, scaled.mode) != ("binary", ARITHMETIC.index("mul")):
        return None
    chain, buffer = [], scaled.b
    for _ in range(4):
        op = producer.get(buffer)
        if op is None:
            return None
        chain.append((op.kind, op.mode))
        buffer, last = op.a, op
        if op.kind == "scalar" and op.mode == 0:
            eps = op.f
        if op.kind == "mean":
            d = op.i[0]
    wanted = [("unary", UNARY.index("rsqrt")), ("scalar", 0), ("mean", 0), ("scalar", ARITHMETIC.index("pow"))]
    if chain != wanted or last.f != 2.0 or buffer != scaled.a or lowering.count(weight) != d:
        return None
    return lowering.emit("rms_norm", 0, lowering.sizes[scaled.out], a=scaled.a, i=(d,), f=eps, p=weight)


def gelu_tanh(lowering, first: int, second: int) -> int | None:
    """0.5 x * (1 + tanh(0.79788 (x + 0.044715 x^3))), written out by GPT-2 and others, as one operation."""
    for half, rest in ((first, second), (second, first)):
        x = _scalar(lowering, half, "mul", 0.5)
        inner = _scalar(lowering, rest, "add", 1.0)
        tanh = lowering.producer.get(inner)
        if x is None or tanh is None or (tanh.kind, tanh.mode) != ("unary", UNARY.index("tanh")):
            continue
        total = lowering.producer.get(_scalar(lowering, tanh.a, "mul", math.sqrt(2 / math.pi)))
        if total is None or (total.kind, total.mode, total.i) != ("binary", ARITHMETIC.index("add"), (FULL, 0, 0)):
            continue
        if total.p is not None or x not in total.inputs:
            continue
        cube = total.b if total.a == x else total.a
        if _scalar(lowering, _scalar(lowering, cube, "mul", 0.044715), "pow", 3.0) == x:
            return lowering.emit("unary", UNARY.index("gelu_tanh"), lowering.sizes[x], a=x)
    return None


def _scalar(lowering, buffer: int | None, name: str, number: float) -> int | None:
    """The buffer of which `buffer` is `name` with this number; None when it is something else."""
    op = lowering.producer.get(buffer)
    if op is None or (op.kind, op.mode, op.i) != ("scalar", ARITHMETIC.index(name), (0,)):
        return None
    return op.a if isinstance(op.f, float) and math.isclose(op.f, number, rel_tol=1e-6) else None
