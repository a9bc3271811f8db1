"""fw_step: the Frank-Wolfe update of all tensors of a model in place, optionally with the products of the step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _cuda, _native
from .._dispatch import op
from . import _fw_cuda
from ._checks import compute_dtype, per_model, require_float, require_like
from .fw_products import total


def prepare(
    params: Sequence[Tensor],
    vertices: Sequence[Tensor | None],
    gamma: float | Sequence[float] | Tensor,
    gradients: Sequence[Tensor] | None,
    allow_low_precision: bool,
) -> list[float]:
    """One step size per tensor; raises on anything the kernels could not do."""
    if len(vertices) != len(params) or (gradients is not None and len(gradients) != len(params)):
        raise ValueError(f"fw_step: {len(params)} params, {len(vertices)} vertices and as many gradients are needed")
    for n, p in enumerate(params):
        require_float("fw_step", **{f"params[{n}]": p})
        if p.dtype in (torch.bfloat16, torch.float16) and not allow_low_precision:
            raise TypeError(
                f"fw_step: params[{n}] is {p.dtype}, where small steps are rounded away; keep the iterate in float32, "
                "or pass allow_low_precision=True"
            )
        vertex = vertices[n]
        if vertex is not None:
            require_like("fw_step", p, [vertex], f"tensor {n} of vertices")
        if gradients is not None:
            require_like("fw_step", p, [gradients[n]], f"tensor {n} of gradients")
    return per_model("fw_step", "gamma", gamma, len(params))


@op(numerics="A", kind="reduction32")
def fw_step(
    params: Sequence[Tensor],
    vertices: Sequence[Tensor | None],
    gamma: float | Sequence[float] | Tensor,
    *,
    gradients: Sequence[Tensor] | None = None,
    allow_low_precision: bool = False,
) -> Tensor | None:
    """Moves every tensor towards its vertex, in place: ``θ ← θ + γ·(s − θ)``.

    Args:
        params: L tensors θ, float32 or float64 (below that only with `allow_low_precision`: a bf16 step stalls).
        vertices: L tensors s of their shapes, any float dtype; None is the zero vertex.
        gamma: one step size, or one per tensor.
        gradients: L tensors g: the products of the step are computed in the same pass.

    Returns: None, or with `gradients` [L, 2] float64: ⟨g, s − θ⟩ and ‖s − θ‖² at the θ before the step: minus the
        duality gap, and what a short step divides by.
    Numerics: class A (θ): float32 (float64 when θ or s is), one difference, one product, one sum, no contraction, rounded
        once. The products are class B, as :func:`fw_products`.
    Cost: params and vertices read, params written (gradients read too); 3N flops (7N); no workspace.
    Raises: TypeError, ValueError for lengths, dtypes, shapes or devices that do not match.
    Source: FW-Merging (arXiv:2503.12649), alg. 1.
    """
    gammas = prepare(params, vertices, gamma, gradients, allow_low_precision)
    products = torch.zeros(len(params), 2, dtype=torch.float64, device="cpu")
    for n, (p, s, step) in enumerate(zip(params, vertices, gammas, strict=True)):
        compute = compute_dtype(p) if s is None else compute_dtype(p, s)
        theta = p.to(compute)
        direction = (torch.zeros_like(theta) if s is None else s.to(compute)) - theta
        if gradients is not None:
            products[n, 0] = total(gradients[n].to(compute) * direction)
            products[n, 1] = total(direction * direction)
        p.copy_(theta + direction * torch.tensor(step, dtype=compute, device="cpu"))
    return None if gradients is None else products


@fw_step.backend(
    "cpu",
    when=lambda params, vertices, gamma, *, gradients=None, **_: _native.cpu_why_not(
        *params, *(v for v in vertices if v is not None), *(gradients or [])
    ),
)
def _fw_step_cpu(
    params: Sequence[Tensor],
    vertices: Sequence[Tensor | None],
    gamma: float | Sequence[float] | Tensor,
    *,
    gradients: Sequence[Tensor] | None = None,
    allow_low_precision: bool = False,
) -> Tensor | None:
    gammas = prepare(params, vertices, gamma, gradients, allow_low_precision)
    thetas = [p.contiguous() for p in params]
    ends = [None if s is None else s.contiguous() for s in vertices]
    slopes: list[Tensor | None] = [None] * len(params)
    if gradients is not None:
        for n, (g, p, s) in enumerate(zip(gradients, thetas, ends, strict=True)):
            slopes[n] = g.to(compute_dtype(p) if s is None else compute_dtype(p, s)).contiguous()
    products = torch.zeros(len(params), 2, dtype=torch.float64, device="cpu")
    _native.lib().fw_step(
        products.data_ptr(),
        [t.data_ptr() for t in thetas],
        [_native.DTYPES[t.dtype] for t in thetas],
        [0 if s is None else s.data_ptr() for s in ends],
        [0 if s is None else _native.DTYPES[s.dtype] for s in ends],
        [0 if g is None else g.data_ptr() for g in slopes],
        [0 if g is None else _native.DTYPES[g.dtype] for g in slopes],
        [t.numel() for t in thetas],
        gammas,
        _native.threads(),
    )
    for p, t in zip(params, thetas, strict=True):
        if t is not p:
            p.copy_(t)
    return None if gradients is None else products


def _cuda_why_not(params, vertices, gamma, *, gradients=None, **_):  # type: ignore[no-untyped-def]
    reason = _cuda.why_not(*params, *(v for v in vertices if v is not None), *(gradients or []))
    if reason is None:
        for p, v in zip(params, vertices, strict=False):
            if p.dtype != torch.float32 and v is not None and v.dtype != p.dtype:
                return f"a vertex of {v.dtype} for an iterate of {p.dtype}"
            if p.dtype != torch.float32 and gradients is not None:
                return f"products of the step need a float32 iterate, not {p.dtype}"
    return reason


@fw_step.backend("cuda", when=_cuda_why_not)
def _fw_step_cuda(
    params: Sequence[Tensor],
    vertices: Sequence[Tensor | None],
    gamma: float | Sequence[float] | Tensor,
    *,
    gradients: Sequence[Tensor] | None = None,
    allow_low_precision: bool = False,
) -> Tensor | None:
    gammas = prepare(params, vertices, gamma, gradients, allow_low_precision)
    thetas = [p.contiguous() for p in params]
    ends = [None if s is None else s.contiguous() for s in vertices]
    slopes = [None] * len(params) if gradients is None else [g.float().contiguous() for g in gradients]
    products = _fw_cuda.step(thetas, ends, gammas, slopes)
    for p, t in zip(params, thetas, strict=True):
        if t is not p:
            p.copy_(t)
    return None if gradients is None else products


def _inputs(g: torch.Generator, theta: torch.dtype, vertex: torch.dtype, **kwargs: object):  # type: ignore[no-untyped-def]
    shapes = [(64, 33), (33,), (), (70, 57), (0, 5)]
    params, vertices = ([torch.randn(s, generator=g).to(d) for s in shapes] for d in (theta, vertex))
    return (params, vertices, 0.37), kwargs


@fw_step.case("float32 params, any vertices")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _inputs(g, torch.float32, dtype)


@fw_step.case("zero vertex, one gamma per tensor", torch.float32, torch.float64)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    (params, vertices, _), kwargs = _inputs(g, dtype, dtype)
    return (params, [None, *vertices[1:]], [0.1, 0.2, 0.0, 1.0, 0.5]), kwargs


@fw_step.case("low precision on request", torch.bfloat16, torch.float16)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _inputs(g, dtype, dtype, allow_low_precision=True)
