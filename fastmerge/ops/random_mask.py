"""random_mask: drop at random, reproducibly: DARE's mask, and DELLA's by rank."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native, _triton
from .._dispatch import op
from ._checks import require_float
from .philox import draw_key, draw_limit, draws
from .threshold import magnitude_key, require_density


def row_length(x: Tensor) -> int:
    """Rows are the last axis; a tensor of fewer than two dimensions is one row."""
    return x.shape[-1] if x.ndim >= 2 else x.numel()


def rank_limits(density: float, epsilon: float, length: int) -> tuple[int, int, int]:
    """(limit of the smallest, span, divisor): rank r from below has the limit ``first + r · span // divisor``.

    Integers, so that every backend has the same limits. A row of one element has the middle probability.
    """
    if length <= 1:
        return draw_limit(density), 0, 1
    return draw_limit(density - epsilon), draw_limit(2 * epsilon), length - 1


def require_epsilon(op_name: str, density: float, epsilon: float) -> None:
    """Raises ValueError unless density ± epsilon lies strictly inside (0, 1) (any epsilon at density 0 and 1)."""
    if epsilon < 0 or epsilon != epsilon:
        raise ValueError(f"{op_name}: epsilon {epsilon} is negative or NaN")
    if 0.0 < density < 1.0 and not (density - epsilon > 0.0 and density + epsilon < 1.0):
        raise ValueError(f"{op_name}: density {density} ± epsilon {epsilon} must lie strictly inside (0, 1)")


def check_random(op_name: str, x: Tensor, density: float, epsilon: float, stream: int, offset: int) -> None:
    """The checks that random_mask's backends share."""
    require_density(op_name, [density])
    require_epsilon(op_name, density, epsilon)
    if offset < 0 or not 0 <= stream < 2**32:
        raise ValueError(f"{op_name}: offset {offset} is negative, or stream {stream} is not in [0, 2^32)")
    length = row_length(x)
    if epsilon > 0 and length and (offset % length if x.ndim >= 2 else offset):
        raise ValueError(f"{op_name}: offset {offset} does not start a row of {length} elements; ranks need whole rows")


def reference_mask(
    x: Tensor, density: float, *, epsilon: float, key: tuple[int, int], stream: int, offset: int
) -> Tensor:
    """bool of x's shape in plain PyTorch; ranks by |x| within each row when epsilon > 0."""
    draw = draws(x.numel(), key=key, stream=stream, offset=offset, device=x.device)
    if epsilon == 0.0 or not 0.0 < density < 1.0 or x.numel() == 0:
        return (draw < draw_limit(density)).view(x.shape)
    first, span, divisor = rank_limits(density, epsilon, row_length(x))
    limit = first + torch.div(row_ranks(x) * span, divisor, rounding_mode="floor")
    return (draw < limit.view(-1)).view(x.shape)


def row_ranks(x: Tensor) -> Tensor:
    """int64 [rows, length]: the rank by |x| within each row of a tensor that is not empty, 0 the smallest."""
    length = row_length(x)
    descending = magnitude_key(x).reshape(-1, length).sort(dim=-1, descending=True, stable=True).indices
    # The largest has rank length - 1; of equals the lowest index ranks highest, as in topk_mask.
    ranks = torch.empty_like(descending)
    return ranks.scatter_(-1, descending, torch.arange(length - 1, -1, -1, device=x.device).expand_as(descending))


def _check(x: Tensor, density: float, epsilon: float, stream: int, offset: int, rescale: str | None) -> None:
    require_float("random_mask", x=x)
    check_random("random_mask", x, density, epsilon, stream, offset)
    if rescale not in (None, "density"):
        raise ValueError(f"random_mask: rescale {rescale!r} is not None or 'density'")


@op(numerics="A", kind="selection")
def random_mask(
    x: Tensor,
    density: float,
    *,
    epsilon: float = 0.0,
    seed: int = 0,
    name: str = "",
    stream: int = 0,
    offset: int = 0,
    rescale: str | None = None,
) -> Tensor:
    """A mask that keeps each element with probability `density`; with rescale, the masked and rescaled tensor.

    With epsilon > 0 (DELLA) the probability grows with the element's rank by |x| within its row (last axis; a tensor of
    fewer than two dimensions is one row): ``density − ε + 2ε · rank / (length − 1)``, rank 0 the smallest.

    Args:
        x: [...] float32, float64, float16 or bfloat16. Its values matter only for epsilon > 0 or rescale.
        density: probability of keeping, in [0, 1]; 1 keeps all, 0 none.
        seed, name: the random stream of this parameter; see fastmerge/ops/philox.py for the exact numbers.
        stream: a further independent stream, e.g. the model's place in a list.
        offset: flat index of x's first element within the whole tensor, so that a chunk gets its part of the mask.
        rescale: None returns the mask (bool, x's shape); "density" returns x / density where kept and 0 elsewhere, in
            x's dtype (the product with float(1 / density) is taken in the compute dtype and rounded once).

    Numerics: class A; the mask depends on (seed, name, stream, flat index) and, with epsilon, on the ranks alone.
    Cost: one Philox call for eight elements, one byte written for each; ranks need a sort of each row.
    Raises: TypeError for a non-float tensor; ValueError for a density outside [0, 1], for density ± epsilon outside
        (0, 1), an offset inside a row with epsilon > 0, or an unknown rescale.
    Source: DARE (arXiv:2311.03099), §3; DELLA (arXiv:2406.11617), §3.1.
    """
    _check(x, density, epsilon, stream, offset, rescale)
    mask = reference_mask(x, density, epsilon=epsilon, key=draw_key(seed, name), stream=stream, offset=offset)
    return mask if rescale is None else apply_mask(x, mask, density)


def apply_mask(x: Tensor, mask: Tensor, density: float) -> Tensor:
    """x · float(1 / density) where the mask holds, +0 elsewhere, contiguous, in x's dtype."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    factor = torch.tensor(1.0 / density if density > 0 else 1.0, dtype=wide.dtype, device="cpu")
    return torch.where(mask, wide * factor, 0.0).to(x.dtype).contiguous()


def _random_mask_why_not(x: Tensor, *_: object, **__: object) -> str | None:
    if row_length(x) >= 2**31:
        return "a row is longer than 2^31 elements"
    return _native.cpu_why_not(x)


@random_mask.backend("cpu", when=_random_mask_why_not)
def _random_mask_cpu(
    x: Tensor,
    density: float,
    *,
    epsilon: float = 0.0,
    seed: int = 0,
    name: str = "",
    stream: int = 0,
    offset: int = 0,
    rescale: str | None = None,
) -> Tensor:
    _check(x, density, epsilon, stream, offset, rescale)
    mask = _native.fresh(x.shape, torch.bool)
    draws_of = (*draw_key(seed, name), stream, offset, _native.threads())
    if epsilon == 0.0 or not 0.0 < density < 1.0 or x.numel() == 0:
        _native.lib().random_mask(mask.data_ptr(), x.numel(), draw_limit(density), *draws_of)
    else:
        dense, length = x.contiguous(), row_length(x)
        rows = dense.data_ptr(), _native.DTYPES[x.dtype], x.numel() // length, length
        _native.lib().rank_mask(mask.data_ptr(), *rows, *rank_limits(density, epsilon, length), *draws_of)
    return mask if rescale is None else apply_mask(x, mask, density)


@random_mask.backend("triton", when=lambda x, *_, **__: _triton.why_not(x))
def _random_mask_triton(x, density, *, epsilon=0.0, seed=0, name="", stream=0, offset=0, rescale=None):  # type: ignore[no-untyped-def]
    _check(x, density, epsilon, stream, offset, rescale)
    ranked = epsilon > 0.0 and 0.0 < density < 1.0 and x.numel() > 0
    limits = rank_limits(density, epsilon, row_length(x)) if ranked else (draw_limit(density), 0, 1)
    return _triton.kernel("random_mask")(
        x, torch.empty(x.shape, dtype=x.dtype if rescale else torch.bool, device=x.device), limits,
        key=draw_key(seed, name), stream=stream, offset=offset, ranks=row_ranks(x) if ranked else None,
        factor=None if rescale is None else 1.0 / density if density > 0 else 1.0,
    )  # fmt: skip


@random_mask.case("uniform, odd size")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (torch.randn(263, 517, generator=g).to(dtype), 0.3), {"seed": 7, "name": "layer.0.weight", "stream": 2}


@random_mask.case("a chunk far into a tensor", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (torch.randn(4099, generator=g).to(dtype), 0.5), {"seed": -1, "name": "w", "offset": 8 * 2**32 - 1001}


@random_mask.case("rescaled")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (torch.randn(70, 71, generator=g).to(dtype), 0.3), {"rescale": "density"}


@random_mask.case("by rank")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (torch.randn(3, 7, 331, generator=g).to(dtype), 0.4), {"epsilon": 0.15, "seed": 3, "name": "v"}


@random_mask.case("by rank, ties and special values")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    x = torch.randint(-3, 4, (20, 500), generator=g) / 4
    x[0, :3] = torch.tensor([float("inf"), float("nan"), -0.0])
    return (x.to(dtype), 0.5), {"epsilon": 0.4, "seed": 3, "name": "v", "offset": 1000}


@random_mask.case("by rank, one row", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (torch.randn(3001, generator=g).to(dtype), 0.5), {"epsilon": 0.2}


@random_mask.case("keeps all", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (torch.randn(100, generator=g).to(dtype), 1.0), {}


@random_mask.case("keeps none", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (torch.randn(100, generator=g).to(dtype), 0.0), {"rescale": "density"}


@random_mask.case("empty and 0-d", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (torch.randn((), generator=g).to(dtype), 0.5), {"epsilon": 0.2}
