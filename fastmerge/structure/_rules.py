"""What each ATen operation does to symbolic axes (:mod:`._domain`): the rules of the tracer.

A rule ties axes that must move together, pins those that may not move, and returns the axes of the result. Operations
without a rule of their own: pointwise ones (by torch's own tag) tie their operands; anything else pins its operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ._domain import EXPLODE, UNIT, Axes, Family, Node, Product, Sum, Tree, size

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


class Value:
    """Axes of a tensor; `origin` = (parameter, its axis for each axis of this view) while it is only a view of one."""

    __slots__ = ("dims", "origin")

    def __init__(self, dims: Sequence[Tree], origin: tuple[str, list[int | None]] | None = None) -> None:
        self.dims, self.origin = list(dims), origin


class Context:
    """What rules may use: the axes, and a note of which parameter axes are contracted (role "in")."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.consumed: set[tuple[str, int]] = set()
        self.produced: set[tuple[str, int]] = set()

    def consume(self, value: Value, axis: int) -> None:
        if value.origin is not None:
            name, where = value.origin
            at = where[axis % len(where)]
            if at is not None:
                self.consumed.add((name, at))

    def produce(self, value: Value) -> None:
        if value.origin is not None:
            self.produced.update((value.origin[0], a) for a in value.origin[1] if a is not None)

    def union(self, a: Tree, b: Tree) -> None:
        self.axes.union(a, b)

    def fixed(self, shape: Sequence[int]) -> Value:
        return Value([self.axes.fixed(int(n)) for n in shape])

    def broadcast(self, values: Sequence[Value]) -> list[Tree]:
        """Axes of the broadcast result; axes of size 1 stretch."""
        ndim = max((len(v.dims) for v in values), default=0)
        out: list[Tree] = []
        for i in range(ndim):
            trees = [v.dims[i - ndim] for v in values if len(v.dims) >= ndim - i]
            wide = [t for t in trees if size(t) != 1]
            for t in wide[1:]:
                self.union(wide[0], t)
            out.append(wide[0] if wide else UNIT)
        return out


F = TypeVar("F", bound=Rule)


def rule(*names: str) -> Callable[[F], F]:
    def register(f: F) -> F:
        RULES.update({f"aten.{n}": f for n in names})
        return f

    return register


def _axis(dim: int, ndim: int) -> int:
    return dim + ndim if dim < 0 else dim


# ---- the same axes, in the same order --------------------------------------------------------------------------------
@rule("clone", "to", "_to_copy", "contiguous", "alias", "detach", "lift_fresh_copy", "dropout", "feature_dropout")
@rule("detach_", "type_as", "_assert_tensor_metadata", "dropout_", "float", "_unsafe_view_same")
def _same(c: Context, x: Value, *_: Any, **__: Any) -> Value:
    return Value(x.dims, x.origin)


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax", "normalize", "native_dropout")
def _equivariant(c: Context, x: Value, *_: Any, **__: Any) -> Value:
    return Value(x.dims)


@rule("cumsum", "cumprod", "flip", "roll", "sort", "argsort", "cummax", "logcumsumexp")
def _ordered(c: Context, x: Value, dim: Any = None, *rest: Any, **kw: Any) -> Any:
    dims = rest[0] if rest and isinstance(rest[0], (list, tuple)) else dim  # roll(x, shifts, dims)
    if isinstance(dims, int):
        dims = [dims]
    for d in dims if dims else range(len(x.dims)):
        c.axes.pin(x.dims[d])
    return Value(x.dims)


# ---- products --------------------------------------------------------------------------------------------------------
@rule("linear")
def _linear(c: Context, x: Value, w: Value, b: Value | None = None) -> Value:
    c.union(x.dims[-1], w.dims[-1])
    c.consume(w, -1)
    c.produce(w)
    if b is not None:
        c.union(w.dims[0], b.dims[0])
        c.produce(b)
    return Value([*x.dims[:-1], *w.dims[:-1]])


@rule("mm", "bmm", "matmul")
def _matmul(c: Context, a: Value, b: Value) -> Value:
    batch = c.broadcast([Value(a.dims[:-2]), Value(b.dims[:-2])])
    c.union(a.dims[-1], b.dims[-2] if len(b.dims) > 1 else b.dims[0])
    c.consume(b, -2 if len(b.dims) > 1 else 0)
    c.consume(a, -1)
    c.produce(a)
    c.produce(b)
    rows = [a.dims[-2]] if len(a.dims) > 1 else []
    columns = [b.dims[-1]] if len(b.dims) > 1 else []
    return Value([*batch, *rows, *columns])


@rule("addmm", "baddbmm")
def _addmm(c: Context, bias: Value, a: Value, b: Value, **_: Any) -> Value:
    out = _matmul(c, a, b)
    c.produce(bias)
    return Value(c.broadcast([out, bias]))


@rule("mv", "dot")
def _mv(c: Context, a: Value, b: Value) -> Value:
    return _matmul(c, a, b)


@rule("scaled_dot_product_attention")
def _attention(
    c: Context, q: Value, k: Value, v: Value, mask: Value | None = None, *_: Any, enable_gqa: bool = False, **__: Any
) -> Value:
    batch = c.broadcast([Value(k.dims[:-2]), Value(v.dims[:-2])])
    if enable_gqa and size(q.dims[-3]) != size(batch[-1]):
        repeat = c.axes.free(size(q.dims[-3]) // size(batch[-1]), list(c.axes.leaves(batch[-1])))
        batch = [*batch[:-1], Product(batch[-1], repeat)]
    batch = c.broadcast([Value(q.dims[:-2]), Value(batch)])
    c.union(q.dims[-1], k.dims[-1])
    c.union(k.dims[-2], v.dims[-2])
    if mask is not None:
        c.broadcast([Value([*batch, q.dims[-2], k.dims[-2]]), mask])
    return Value([*batch, q.dims[-2], v.dims[-1]])


def _conv(
    c: Context, x: Value, w: Value, b: Value | None, groups: int, transposed: bool, shape: Sequence[int]
) -> Value:
    spatial = len(w.dims) - 2
    channel = len(x.dims) - spatial - 1
    for t in (*w.dims[2:], *x.dims[channel + 1 :]):
        c.axes.pin(t)
    source, result = (0, 1) if transposed else (1, 0)
    c.consume(w, source)
    c.produce(w)
    if groups == 1:
        c.union(x.dims[channel], w.dims[source])
        out = w.dims[result]
    else:
        g = c.axes.free(groups)
        parents = [g] if isinstance(g, Node) else []
        inner = c.axes.free(size(x.dims[channel]) // groups, parents)
        made = c.axes.free(shape[channel] // groups, parents)
        c.union(x.dims[channel], Product(g, inner))
        c.union(w.dims[0], Product(g, inner if transposed else made))
        c.union(w.dims[1], made if transposed else inner)
        out = Product(g, made)
    if b is not None:
        c.union(out, b.dims[0])
        c.produce(b)
    return Value([*x.dims[:channel], out, *c.fixed(shape[channel + 1 :]).dims])


@rule("conv1d", "conv2d", "conv3d")
def _conv_forward(
    c: Context, x: Value, w: Value, b: Value | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1, *, shape: Sequence[int],
) -> Value:  # fmt: skip
    return _conv(c, x, w, b, groups, False, shape)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transposed(
    c: Context, x: Value, w: Value, b: Value | None = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1, *, shape: Sequence[int],
) -> Value:  # fmt: skip
    return _conv(c, x, w, b, groups, True, shape)


@rule("convolution")
def _convolution(
    c: Context, x: Value, w: Value, b: Value | None, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, *, shape: Sequence[int],
) -> Value:  # fmt: skip
    return _conv(c, x, w, b, groups, transposed, shape)


@rule("embedding")
def _embedding(c: Context, w: Value, index: Value, *_: Any, **__: Any) -> Value:
    c.axes.pin(w.dims[0])
    c.produce(w)
    return Value([*index.dims, *w.dims[1:]])


# ---- norms -----------------------------------------------------------------------------------------------------------
@rule("batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm", "instance_norm", "cudnn_batch_norm")
def _batch_norm(c: Context, x: Value, *rest: Any, **__: Any) -> Any:
    for t in rest[:4]:
        if isinstance(t, Value):
            c.union(x.dims[1], t.dims[0])
            c.produce(t)
    return Value(x.dims)


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(c: Context, x: Value, shape_: Sequence[int], *rest: Any, **__: Any) -> Any:
    for t in rest[:2]:
        if isinstance(t, Value):
            c.broadcast([Value(x.dims), t])
            c.produce(t)
    return Value(x.dims)


def _group_norm(c: Context, x: Value, groups: int, affine: Sequence[Any]) -> Value:
    channels = size(x.dims[1])
    if 1 < groups < channels:
        g = c.axes.free(groups)
        c.union(x.dims[1], Product(g, c.axes.free(channels // groups, [g] if isinstance(g, Node) else [])))
    for t in affine:
        if isinstance(t, Value):
            c.union(x.dims[1], t.dims[0])
            c.produce(t)
    return Value(x.dims)


@rule("group_norm")
def _group_norm_high(c: Context, x: Value, groups: int, *rest: Any, **__: Any) -> Value:
    return _group_norm(c, x, groups, rest[:2])


@rule("native_group_norm")
def _group_norm_low(c: Context, x: Value, w: Any, b: Any, n: int, ch: int, hw: int, groups: int, eps: float) -> Value:
    return _group_norm(c, x, groups, (w, b))


# ---- reductions ------------------------------------------------------------------------------------------------------
@rule("mean", "sum", "amax", "amin", "var", "std", "prod", "any", "all", "logsumexp", "linalg_vector_norm", "var_mean")
@rule("std_mean", "max", "min", "norm")
def _reduce(c: Context, x: Value, *args: Any, shape: Sequence[int] = (), **kw: Any) -> Any:
    ints = [a for a in args if isinstance(a, (list, tuple)) or (isinstance(a, int) and not isinstance(a, bool))]
    dims = kw.get("dim", ints[0] if ints else None)
    if any(isinstance(a, Value) for a in args):  # max(x, y)
        return Value(c.broadcast([x, *(a for a in args if isinstance(a, Value))]))
    if dims is None or dims == []:
        gone = set(range(len(x.dims)))
    else:
        gone = {_axis(d, len(x.dims)) for d in ([dims] if isinstance(dims, int) else dims)}
    if len(shape) == len(x.dims):
        return Value([UNIT if i in gone else t for i, t in enumerate(x.dims)])
    return Value([t for i, t in enumerate(x.dims) if i not in gone])


@rule("argmax", "argmin")
def _position(c: Context, x: Value, dim: int | None = None, *_: Any, shape: Sequence[int] = ()) -> Value:
    for i, t in enumerate(x.dims):
        if dim is None or i == _axis(dim, len(x.dims)):
            c.axes.pin(t)
    reduced: Value = _reduce(c, x, *([] if dim is None else [dim]), shape=shape)
    return reduced


@rule("topk")
def _topk(c: Context, x: Value, k: int, dim: int = -1, *_: Any, **__: Any) -> Any:
    c.axes.pin(x.dims[dim])
    out = list(x.dims)
    out[dim] = c.axes.fixed(k)
    return Value(out)


def _pool(spatial: int) -> Rule:
    def pool(c: Context, x: Value, *_: Any, shape: Sequence[int], **__: Any) -> Value:
        for t in x.dims[-spatial:]:
            c.axes.pin(t)
        return Value([*x.dims[:-spatial], *c.fixed(shape[-spatial:]).dims])

    return pool


for _n in (1, 2, 3):
    rule(f"max_pool{_n}d", f"avg_pool{_n}d", f"adaptive_avg_pool{_n}d", f"adaptive_max_pool{_n}d")(_pool(_n))
    rule(f"max_pool{_n}d_with_indices", f"_adaptive_avg_pool{_n}d", f"replication_pad{_n}d", f"reflection_pad{_n}d")(
        _pool(_n)
    )
for _name, _n in (("upsample_nearest", 1), ("upsample_nearest", 2), ("upsample_bilinear", 2), ("upsample_bicubic", 2)):
    rule(f"{_name}{_n}d", f"_{_name}{_n}d", f"_{_name}{_n}d_aa")(_pool(_n))
rule("upsample_linear1d")(_pool(1))


# ---- moving axes -----------------------------------------------------------------------------------------------------
def _rearranged(x: Value, order: Sequence[int]) -> Value:
    origin = None if x.origin is None else (x.origin[0], [x.origin[1][i] for i in order])
    return Value([x.dims[i] for i in order], origin)


@rule("permute")
def _permute(c: Context, x: Value, dims: Sequence[int]) -> Value:
    return _rearranged(x, [_axis(d, len(x.dims)) for d in dims])


@rule("transpose", "swapaxes", "swapdims")
def _transpose(c: Context, x: Value, a: int, b: int) -> Value:
    order = list(range(len(x.dims)))
    a, b = _axis(a, len(order)), _axis(b, len(order))
    order[a], order[b] = order[b], order[a]
    return _rearranged(x, order)


@rule("t", "numpy_T", "mT", "adjoint")
def _t(c: Context, x: Value) -> Value:
    return _transpose(c, x, -1, -2) if len(x.dims) > 1 else x


@rule("movedim", "moveaxis")
def _movedim(c: Context, x: Value, source: Any, target: Any) -> Value:
    n = len(x.dims)
    source = [source] if isinstance(source, int) else source
    target = [target] if isinstance(target, int) else target
    moved = {_axis(t, n): _axis(s, n) for s, t in zip(source, target, strict=True)}
    rest = iter([i for i in range(n) if i not in moved.values()])
    return _rearranged(x, [moved[i] if i in moved else next(rest) for i in range(n)])


@rule("unsqueeze")
def _unsqueeze(c: Context, x: Value, dim: int) -> Value:
    at = _axis(dim, len(x.dims) + 1)
    origin = None if x.origin is None else (x.origin[0], [*x.origin[1][:at], None, *x.origin[1][at:]])
    return Value([*x.dims[:at], UNIT, *x.dims[at:]], origin)


@rule("squeeze")
def _squeeze(c: Context, x: Value, dim: Any = None) -> Value:
    n = len(x.dims)
    gone = set(range(n)) if dim is None else {_axis(d, n) for d in ([dim] if isinstance(dim, int) else dim)}
    return _rearranged(x, [i for i in range(n) if i not in gone or size(x.dims[i]) != 1])


@rule("expand", "expand_as", "broadcast_to")
def _expand(c: Context, x: Value, *_: Any, shape: Sequence[int], **__: Any) -> Value:
    lead = len(shape) - len(x.dims)
    dims: list[Tree] = [UNIT] * lead + list(x.dims)
    here = [n for t in x.dims for n in c.axes.leaves(t)]
    for i, n in enumerate(shape):
        if size(dims[i]) != n:
            dims[i] = c.axes.free(int(n), here)  # every position holds the same: any permutation will do
    origin = None
    if x.origin is not None:
        origin = (x.origin[0], [None] * lead + x.origin[1])
    return Value(dims, origin)


@rule("repeat", "tile")
def _repeat(c: Context, x: Value, repeats: Sequence[int], **_: Any) -> Value:
    dims: list[Tree] = [UNIT] * (len(repeats) - len(x.dims)) + list(x.dims)
    repeats = [1] * (len(dims) - len(repeats)) + list(repeats)
    return Value([Product(c.axes.free(r), t) if r != 1 else t for r, t in zip(repeats, dims, strict=True)])


# ---- reshapes --------------------------------------------------------------------------------------------------------
def _split_outer(c: Context, tree: Tree, outer: int) -> tuple[Tree, Tree] | None:
    """The tree as outer x inner."""
    if isinstance(tree, Node):
        return c.axes.split(tree, outer)
    if isinstance(tree, Family):
        pairs = [_split_outer(c, c.axes.norm(m), outer) for m in tree.members]
        if any(p is None for p in pairs):
            return None
        good = [p for p in pairs if p is not None]
        return Family(tree.index, [p[0] for p in good]), Family(tree.index, [p[1] for p in good])
    if isinstance(tree, Sum) and outer <= EXPLODE:
        parts = c.axes.cut_tree(tree, [size(tree) // outer] * outer)
        index = c.axes.fixed(outer)
        if parts is not None and isinstance(index, Node):
            return index, Family(index, parts)
    return None


def reshape(c: Context, dims: Sequence[Tree], shape: Sequence[int]) -> list[Tree] | None:
    """The axes after a reshape, or None when the factors do not line up (the caller pins)."""
    factors: list[Tree] = []
    for t in dims:
        t = c.axes.norm(t)
        factors.extend(t.factors if isinstance(t, Product) else (t,))
    factors.reverse()
    out: list[Tree] = []
    for want in shape:
        taken: list[Tree] = []
        while want > 1:
            if not factors:
                return None
            f = c.axes.norm(factors.pop())
            if isinstance(f, Product):
                factors.extend(reversed(f.factors))
                continue
            have = size(f)
            if want % have == 0:
                taken.append(f)
                want //= have
            elif have % want == 0:
                pair = _split_outer(c, f, want)
                if pair is None:
                    return None
                taken.append(pair[0])
                factors.append(pair[1])
                want = 1
            else:
                return None
        out.append(taken[0] if len(taken) == 1 else Product(*taken))
    return out


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "_reshape_alias", "view_as", "reshape_as", "ravel")
def _view(c: Context, x: Value, *_: Any, shape: Sequence[int], **__: Any) -> Value:
    shape = [int(n) for n in shape]
    sizes = [size(t) for t in x.dims]
    origin = None
    if x.origin is not None:
        wide = [a for a, n in zip(x.origin[1], sizes, strict=True) if n != 1]
        if [n for n in shape if n != 1] == [n for n in sizes if n != 1]:
            it = iter(wide)
            origin = (x.origin[0], [next(it) if n != 1 else None for n in shape])
    dims = None if 0 in shape else reshape(c, x.dims, shape)
    if dims is None:
        for t in x.dims:
            c.axes.pin(t)
        return c.fixed(shape)
    return Value(dims, origin)


@rule("pixel_shuffle")
def _pixel_shuffle(c: Context, x: Value, r: int, *, shape: Sequence[int]) -> Value:
    channel = c.axes.free(shape[-3])
    c.union(x.dims[-3], Product(channel, c.axes.fixed(r * r)))
    return Value([*x.dims[:-3], channel, *c.fixed(shape[-2:]).dims])


# ---- parts and wholes ------------------------------------------------------------------------------------------------
def take(c: Context, x: Value, dim: int, sizes: Sequence[int]) -> list[Value]:
    """The tensor cut along an axis into consecutive parts."""
    dim = _axis(dim, len(x.dims))
    tree = c.axes.norm(x.dims[dim])
    others = [t for i, t in enumerate(x.dims) if i != dim]
    if len(sizes) == 1:
        return [Value(x.dims, x.origin)]
    head = tree.factors[0] if isinstance(tree, Product) and tree.factors else tree
    rows = size(tree) // size(head)
    origin = None
    if x.origin is not None:
        origin = (x.origin[0], list(x.origin[1]))
    if isinstance(head, Node) and head is tree:
        depends = any(
            head in c.axes.parents(n) or (isinstance(n, Family)) for t in others for n in c.axes.leaves(t)
        ) or any(_over(c, t, head) for t in others)
        if depends and rows == 1:
            if not head.fixed or any(head in c.axes.parents(n) for t in others for n in c.axes.leaves(t)):
                c.axes.explode(head)
            return _members(c, x, dim, head, sizes, origin)
    parts = c.axes.cut_tree(tree, sizes)
    if parts is None:
        c.axes.pin(tree)
        parts = [c.axes.fixed(n) for n in sizes]
    return [Value([*x.dims[:dim], p, *x.dims[dim + 1 :]], origin) for p in parts]


def _over(c: Context, tree: Tree, index: Node) -> bool:
    tree = c.axes.norm(tree)
    if isinstance(tree, Family):
        return c.axes.norm(tree.index) is index or any(_over(c, m, index) for m in tree.members)
    parts = tree.factors if isinstance(tree, Product) else tree.terms if isinstance(tree, Sum) else ()
    return any(_over(c, t, index) for t in parts)


def _members(
    c: Context, x: Value, dim: int, index: Node, sizes: Sequence[int], origin: tuple[str, list[int | None]] | None
) -> list[Value]:
    """Parts along an axis whose positions are told apart: families on the other axes shrink to the positions taken."""

    def pick(tree: Tree, positions: range, new: Tree) -> Tree:
        tree = c.axes.norm(tree)
        if isinstance(tree, Family) and c.axes.norm(tree.index) is index:
            chosen = [tree.members[p] for p in positions]
            return chosen[0] if len(chosen) == 1 else Family(new, chosen) if isinstance(new, Node) else chosen[0]
        if isinstance(tree, Product):
            return Product(*(pick(t, positions, new) for t in tree.factors))
        if isinstance(tree, Sum):
            return Sum(*(pick(t, positions, new) for t in tree.terms))
        return tree

    out, at = [], 0
    for n in sizes:
        new = c.axes.fixed(n)
        dims = [new if i == dim else pick(t, range(at, at + n), new) for i, t in enumerate(x.dims)]
        out.append(Value(dims, origin))
        at += n
    return out


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split", "split_with_sizes_copy")
def _split(c: Context, x: Value, sections: Any, dim: int = 0, *, shapes: Sequence[Sequence[int]]) -> list[Value]:
    return take(c, x, dim, [s[_axis(dim, len(x.dims))] for s in shapes])


@rule("unbind")
def _unbind(c: Context, x: Value, dim: int = 0) -> list[Value]:
    dim = _axis(dim, len(x.dims))
    return [_squeeze(c, v, dim) for v in take(c, x, dim, [1] * size(x.dims[dim]))]


@rule("slice", "narrow")
def _slice(
    c: Context, x: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1, **kw: Any
) -> Value:
    dim = _axis(dim, len(x.dims))
    n = size(x.dims[dim])
    first, last, step = slice(start, end, step).indices(n)
    count = len(range(first, last, step))
    if count == n and step == 1:
        return Value(x.dims, x.origin)
    if step != 1 or count == 0:
        c.axes.pin(x.dims[dim])
        return Value([*x.dims[:dim], c.axes.fixed(count), *x.dims[dim + 1 :]])
    sizes = [s for s in (first, count, n - first - count) if s]
    return take(c, x, dim, sizes)[1 if first else 0]


@rule("select")
def _select(c: Context, x: Value, dim: int, index: int) -> Value:
    dim = _axis(dim, len(x.dims))
    index = _axis(index, size(x.dims[dim]))
    return _squeeze(c, _slice(c, x, dim, index, index + 1), dim)


@rule("cat", "concat", "concatenate")
def _cat(c: Context, values: Sequence[Value], dim: int = 0) -> Value:
    ndim = max(len(v.dims) for v in values)
    values = [v for v in values if len(v.dims) == ndim]
    dim = _axis(dim, ndim)
    rest = c.broadcast([Value([*v.dims[:dim], UNIT, *v.dims[dim + 1 :]]) for v in values])
    rest[dim] = Sum(*(v.dims[dim] for v in values if size(v.dims[dim])))
    return Value(rest)


@rule("stack")
def _stack(c: Context, values: Sequence[Value], dim: int = 0) -> Value:
    dim = _axis(dim, len(values[0].dims) + 1)
    if len(values) == 1:
        return _unsqueeze(c, values[0], dim)
    index = c.axes.fixed(len(values))
    assert isinstance(index, Node)
    dims: list[Tree] = [Family(index, trees) for trees in zip(*(v.dims for v in values), strict=True)]
    return Value([*dims[:dim], index, *dims[dim:]])


@rule("constant_pad_nd", "pad")
def _pad(c: Context, x: Value, pad: Sequence[int], mode: Any = "constant", *_: Any, **__: Any) -> Value:
    dims = list(x.dims)
    for i in range(len(pad) // 2):
        before, after = pad[2 * i], pad[2 * i + 1]
        at = len(dims) - 1 - i
        if before < 0 or after < 0 or mode not in ("constant", 0, 0.0):
            c.axes.pin(dims[at])
            dims[at] = c.axes.fixed(size(dims[at]) + before + after)
        elif before or after:
            dims[at] = Sum(
                *[c.axes.fixed(n) for n in (before,) if n], dims[at], *[c.axes.fixed(n) for n in (after,) if n]
            )
    return Value(dims)


# ---- indexing --------------------------------------------------------------------------------------------------------
@rule("index_select")
def _index_select(c: Context, x: Value, dim: int, index: Value) -> Value:
    c.axes.pin(x.dims[dim])
    c.produce(x)
    return Value([index.dims[0] if i == _axis(dim, len(x.dims)) else t for i, t in enumerate(x.dims)])


@rule("gather", "take_along_dim")
def _gather(c: Context, x: Value, dim: int, index: Value, **_: Any) -> Value:
    for i, (t, u) in enumerate(zip(x.dims, index.dims, strict=True)):
        if i == _axis(dim, len(x.dims)):
            c.axes.pin(t)
        elif size(t) == size(u):
            c.union(t, u)
        else:
            c.axes.pin(t)
            c.axes.pin(u)
    return Value(index.dims)


@rule("index", "_unsafe_index")
def _index(c: Context, x: Value, indices: Sequence[Value | None], *, shape: Sequence[int]) -> Value:
    used = [i for i, v in enumerate(indices) if v is not None]
    for i in used:
        c.axes.pin(x.dims[i])
    c.produce(x)
    made = max((len(v.dims) for v in indices if v is not None), default=0)
    kept = [t for i, t in enumerate(x.dims) if i not in used]
    first = used[0] if used and used == list(range(used[0], used[-1] + 1)) else 0
    return Value([*kept[:first], *c.fixed(shape[first : first + made]).dims, *kept[first:]])


# ---- tensors made on the spot ----------------------------------------------------------------------------------------
@rule("full", "zeros", "ones", "full_like", "zeros_like", "ones_like", "new_zeros", "new_ones", "new_full", "empty")
@rule("empty_like", "new_empty", "scalar_tensor", "zero", "fill", "zero_", "fill_", "empty_permuted")
def _constant(c: Context, *_: Any, shape: Sequence[int] = (), **__: Any) -> Value:
    return Value([c.axes.free(int(n)) for n in shape])


@rule("arange", "linspace", "eye", "tril_indices", "triu_indices", "logspace", "range")
def _positions(c: Context, *_: Any, shape: Sequence[int] = (), **__: Any) -> Value:
    return c.fixed(shape)


@rule("tril", "triu", "tril_", "triu_")
def _triangle(c: Context, x: Value, *_: Any, **__: Any) -> Value:
    c.axes.pin(x.dims[-1])
    c.axes.pin(x.dims[-2])
    return Value(x.dims)
