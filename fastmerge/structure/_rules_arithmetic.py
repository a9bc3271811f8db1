"""Rules of operations that compute: products, norms, reductions, pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._domain import UNIT, Node, Product, size
from ._rule import Context, Rule, Value, at_axis, rule


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
        gone = {at_axis(d, len(x.dims)) for d in ([dims] if isinstance(dims, int) else dims)}
    if len(shape) == len(x.dims):
        return Value([UNIT if i in gone else t for i, t in enumerate(x.dims)])
    return Value([t for i, t in enumerate(x.dims) if i not in gone])


@rule("argmax", "argmin")
def _position(c: Context, x: Value, dim: int | None = None, *_: Any, shape: Sequence[int] = ()) -> Value:
    for i, t in enumerate(x.dims):
        if dim is None or i == at_axis(dim, len(x.dims)):
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
