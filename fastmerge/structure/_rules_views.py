"""Rules of operations that move elements or axes: transposes, reshapes, cuts, concatenations, indexing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._domain import EXPLODE, UNIT, Family, Node, Product, Sum, Tree, size
from ._rule import Context, Value, at_axis, rule


# ---- moving axes -----------------------------------------------------------------------------------------------------
def _rearranged(x: Value, order: Sequence[int]) -> Value:
    origin = None if x.origin is None else (x.origin[0], [x.origin[1][i] for i in order])
    return Value([x.dims[i] for i in order], origin)


@rule("permute")
def _permute(c: Context, x: Value, dims: Sequence[int]) -> Value:
    return _rearranged(x, [at_axis(d, len(x.dims)) for d in dims])


@rule("transpose", "swapaxes", "swapdims")
def _transpose(c: Context, x: Value, a: int, b: int) -> Value:
    order = list(range(len(x.dims)))
    a, b = at_axis(a, len(order)), at_axis(b, len(order))
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
    moved = {at_axis(t, n): at_axis(s, n) for s, t in zip(source, target, strict=True)}
    rest = iter([i for i in range(n) if i not in moved.values()])
    return _rearranged(x, [moved[i] if i in moved else next(rest) for i in range(n)])


@rule("unsqueeze")
def _unsqueeze(c: Context, x: Value, dim: int) -> Value:
    at = at_axis(dim, len(x.dims) + 1)
    origin = None if x.origin is None else (x.origin[0], [*x.origin[1][:at], None, *x.origin[1][at:]])
    return Value([*x.dims[:at], UNIT, *x.dims[at:]], origin)


@rule("squeeze")
def _squeeze(c: Context, x: Value, dim: Any = None) -> Value:
    n = len(x.dims)
    gone = set(range(n)) if dim is None else {at_axis(d, n) for d in ([dim] if isinstance(dim, int) else dim)}
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
    dim = at_axis(dim, len(x.dims))
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
    return take(c, x, dim, [s[at_axis(dim, len(x.dims))] for s in shapes])


@rule("unbind")
def _unbind(c: Context, x: Value, dim: int = 0) -> list[Value]:
    dim = at_axis(dim, len(x.dims))
    return [_squeeze(c, v, dim) for v in take(c, x, dim, [1] * size(x.dims[dim]))]


@rule("slice", "narrow")
def _slice(
    c: Context, x: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1, **kw: Any
) -> Value:
    dim = at_axis(dim, len(x.dims))
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
    dim = at_axis(dim, len(x.dims))
    index = at_axis(index, size(x.dims[dim]))
    return _squeeze(c, _slice(c, x, dim, index, index + 1), dim)


@rule("cat", "concat", "concatenate")
def _cat(c: Context, values: Sequence[Value], dim: int = 0) -> Value:
    ndim = max(len(v.dims) for v in values)
    values = [v for v in values if len(v.dims) == ndim]
    dim = at_axis(dim, ndim)
    rest = c.broadcast([Value([*v.dims[:dim], UNIT, *v.dims[dim + 1 :]]) for v in values])
    rest[dim] = Sum(*(v.dims[dim] for v in values if size(v.dims[dim])))
    return Value(rest)


@rule("stack")
def _stack(c: Context, values: Sequence[Value], dim: int = 0) -> Value:
    dim = at_axis(dim, len(values[0].dims) + 1)
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
    return Value([index.dims[0] if i == at_axis(dim, len(x.dims)) else t for i, t in enumerate(x.dims)])


@rule("gather", "take_along_dim")
def _gather(c: Context, x: Value, dim: int, index: Value, **_: Any) -> Value:
    for i, (t, u) in enumerate(zip(x.dims, index.dims, strict=True)):
        if i == at_axis(dim, len(x.dims)):
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
