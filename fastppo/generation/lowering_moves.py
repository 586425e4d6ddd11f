"""Operations of a graph that move a row's elements: transposes, slices, splits and concatenations."""

import math

from fastppo.generation.row_program import Op, Row, Untraceable


class Moves:
    """The part of Lowering that moves elements; it has `rows`, `shapes`, `ops`, and the methods row, done, emit and new."""

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
