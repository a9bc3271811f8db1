"""Activation-space similarity: correlations of units over data, accumulated batch by batch; no feature map is kept.

For every signature of a spec one or more *sites* are read: the inputs of the last module that consumes it (the published
choice), or, where nothing consumes it (queries and keys), the outputs of the modules that make it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..ops.pearson import EPS, normalise
from .permutation import PermutationSpec
from .trace import as_call, evaluating
from .units import Signature, View, views


@dataclass(frozen=True)
class Site:
    """Where a signature's activations are read: input or output of a module, along one of its axes."""

    module: str
    view: View
    reads_input: bool


def sites(spec: PermutationSpec, model: nn.Module) -> dict[Signature, list[Site]]:
    """The sites of each signature; signatures without any (head order alone) are left out."""
    modules = dict(model.named_modules())
    out: dict[Signature, list[Site]] = {}
    consumed: dict[Signature, Site] = {}
    made: dict[Signature, list[Site]] = {}
    for v in views(spec):
        owner, _, leaf = v.tensor.rpartition(".")
        module = modules.get(owner)
        if leaf != "weight" or not isinstance(module, nn.Module) or spec.crossing(v.tensor):
            continue
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim < 2 or isinstance(module, (nn.Embedding, nn.LayerNorm)):
            continue
        if v.axis.role == "in":
            consumed[v.signature] = Site(owner, v, True)
        else:
            made.setdefault(v.signature, []).append(Site(owner, v, False))
    for s in dict.fromkeys([*made, *consumed]):
        out[s] = [consumed[s]] if s in consumed else made[s]
    return out


def _channels_last(x: Tensor, module: nn.Module) -> Tensor:
    """A feature map as [samples, channels]."""
    if isinstance(module, nn.modules.conv._ConvNd):
        spatial = module.weight.ndim - 2
        x = x.movedim(x.ndim - spatial - 1, -1)
    return x.reshape(-1, x.shape[-1])


@dataclass
class _Sums:
    """Running sums of one signature for one pair of models, about a shift (the first batch's means)."""

    shift_a: Tensor
    shift_b: Tensor
    cross: Tensor
    sum_a: Tensor
    sum_b: Tensor
    square_a: Tensor
    square_b: Tensor
    count: int = 0

    @classmethod
    def start(cls, a: Tensor, b: Tensor) -> _Sums:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=a.device)

        n = a.shape[0]
        return cls(a.mean(1), b.mean(1), zeros(n, n), zeros(n), zeros(n), zeros(n), zeros(n))

    def add(self, a: Tensor, b: Tensor) -> None:
        a, b = a - self.shift_a[:, None], b - self.shift_b[:, None]
        self.cross += a @ b.T
        self.sum_a += a.sum(1, dtype=torch.float64)
        self.sum_b += b.sum(1, dtype=torch.float64)
        self.square_a += torch.linalg.vector_norm(a, dim=1).double().square()
        self.square_b += torch.linalg.vector_norm(b, dim=1).double().square()
        self.count += a.shape[1]

    def similarity(self, kind: str) -> Tensor:
        ma, mb = self.sum_a / self.count, self.sum_b / self.count
        covariance = self.cross / self.count - ma[:, None] * mb[None, :]
        sa = (self.square_a / self.count - ma.square()).clamp(min=0).sqrt()
        sb = (self.square_b / self.count - mb.square()).clamp(min=0).sqrt()
        if kind != "pearson":  # products about zero: put the means back
            fa, fb = self.shift_a.double() + ma, self.shift_b.double() + mb
            covariance = covariance + fa[:, None] * fb[None, :]
            sa, sb = (sa.square() + fa.square()).sqrt(), (sb.square() + fb.square()).sqrt()
        if kind == "dot":
            return covariance.float()
        return normalise(covariance, sa, sb, EPS).float()


@dataclass
class ActivationStatistics:
    """Similarities of the units of a spec between models, from data. ``sums[(m, n)]`` is anchor m against model n."""

    spec: PermutationSpec
    sums: dict[tuple[int, int], dict[Signature, _Sums]] = field(default_factory=dict)

    def similarity(self, model: int, kind: str = "pearson", anchor: int = 0) -> dict[Signature, Tensor]:
        """{signature: [units of the anchor, units of the model]} on the CPU."""
        if (anchor, model) not in self.sums:
            raise BadInput(
                f"these activation statistics do not hold models {anchor} and {model}",
                remedy="collect them over the models that are aligned"
                + (" with within=True, as zip matching needs" if anchor == model else ""),
            )
        return {s: v.similarity(kind).cpu() for s, v in self.sums[anchor, model].items()}


@contextlib.contextmanager
def _recording(
    model: nn.Module, wanted: dict[Signature, list[Site]], store: dict[tuple[Signature, int], Tensor]
) -> Iterator[None]:
    """Hooks that put each site's features, [units, samples], into `store`; removed even when the model raises."""
    modules = dict(model.named_modules())
    handles = []

    def keep(key: tuple[Signature, int], site: Site, module: nn.Module) -> Callable[[Any], None]:
        def read(value: Any) -> None:
            x = value[0] if isinstance(value, (tuple, list)) else value
            flat = _channels_last(x.detach(), module).float()  # [samples, axis]
            rows = site.view.rows_of_axis(flat.T)
            store[key] = torch.cat([store[key], rows], 1) if key in store else rows

        return read

    try:
        for signature, found in wanted.items():
            for k, site in enumerate(found):
                module = modules[site.module]
                read = keep((signature, k), site, module)
                if site.reads_input:
                    handles.append(module.register_forward_pre_hook(lambda _, args, read=read: read(args)))
                else:
                    handles.append(module.register_forward_hook(lambda _, __, out, read=read: read(out)))
        yield
    finally:
        for h in handles:
            h.remove()


@torch.no_grad()
def activation_statistics(
    models: Sequence[nn.Module], spec: PermutationSpec, batches: Iterable[Any], *, within: bool = False
) -> ActivationStatistics:
    """Correlations of the models' units over data.

    Args:
        models: modules of one architecture, each on any device; run in eval mode and left as they were.
        batches: inputs, each a tensor, a tuple of arguments or a dict of keyword arguments; one pass is made. A batch
            that is a tuple (inputs, labels) of a data loader must be reduced to its inputs by the caller.
        within: also the blocks of each model with itself (zip matching needs them).

    Raises: BadInput for models that are not modules, no batches, or a site that no batch reached.
    Cost: one forward pass per model and batch, one GEMM per signature and pair; memory: one batch's features and the
        n × n sums.
    """
    for i, m in enumerate(models):
        if not isinstance(m, nn.Module):
            raise BadInput(
                f"models[{i}] is a {type(m).__name__}: activations need nn.Modules",
                remedy="pass the modules, or align by weights alone (activations=None)",
            )
    wanted = sites(spec, models[0])
    stats = ActivationStatistics(spec)
    pairs = [(0, n) for n in range(1, len(models))]
    pairs += [(n, n) for n in range(len(models))] if within else []
    stats.sums = {p: {} for p in pairs}
    seen = 0
    for batch in batches:
        args, kwargs = as_call(batch)
        features: list[dict[tuple[Signature, int], Tensor]] = []
        for model in models:
            store: dict[tuple[Signature, int], Tensor] = {}
            with evaluating(model), _recording(model, wanted, store):
                model(*args, **kwargs)
            features.append(store)
        device = next(iter(features[0].values())).device if features[0] else torch.device("cpu")
        for a, b in pairs:
            for s, found in wanted.items():
                for k in range(len(found)):
                    if (s, k) not in features[a]:
                        raise BadInput(
                            f"module {found[k].module!r} was not run by a batch: its activations are unknown",
                            remedy="give batches that reach it, or align by weights alone (activations=None)",
                        )
                    x, y = features[a][s, k].to(device), features[b][s, k].to(device)
                    sums = stats.sums[a, b].setdefault(s, _Sums.start(x, y))
                    sums.add(x, y)
        seen += 1
    if not seen:
        raise BadInput(
            "activations is empty: no batch to run the models on",
            remedy="give a list of batches (an iterator that was read before is empty), or leave activations= out",
        )
    return stats
