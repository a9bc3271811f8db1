"""Partial zip (ZipIt): two networks share a zipped trunk up to one module and keep their own heads after it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import BadInput
from .alignment import align, resolve_spec
from .merging import has_batchnorm, model_weights, reset_batchnorm, warn_batchnorm
from .permutation import AxisSpec, PermutationSpec
from .zipping import ZipAlignment, Zipper


class Unmerge(nn.Module):
    """Features of the shared trunk as one network knows them: each of its units reads the merged unit it went into."""

    index: Tensor

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        n = self.index.numel()
        dim = 1 if x.ndim > 3 and x.shape[1] == n else -1
        if x.shape[dim] != n:
            raise BadInput(
                f"the trunk's output has shape {tuple(x.shape)}, but {n} units were zipped where it ends",
                remedy="end the trunk (stop_at=) at a module whose output has them on axis 1 or on the last",
            )
        return x.index_select(dim, self.index)


class PartialZip(nn.Module):
    """``forward(x)`` gives the outputs of every head, in the order of the models; the trunk runs once."""

    def __init__(self, trunk: nn.Module, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, nn.ModuleList(heads)

    def forward(self, *inputs: Any, **more: Any) -> list[Any]:
        shared = self.trunk(*inputs, **more)
        return [head(shared) for head in self.heads]


@dataclass
class PartialZipResult:
    """The network with a shared trunk, and how the trunk's units were matched."""

    model: PartialZip
    alignment: ZipAlignment


class _Tracer(fx.Tracer):
    def __init__(self, stop_at: str) -> None:
        super().__init__()
        self.stop_at = stop_at

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name == self.stop_at or super().is_leaf_module(m, module_qualified_name)


def _graph(model: nn.Module, stop_at: str) -> tuple[fx.Graph, fx.Node]:
    """The operations of a module, and the one that is `stop_at`."""
    if stop_at not in dict(model.named_modules()) or not stop_at:
        near = [n for n, _ in model.named_children()]
        raise BadInput(f"stop_at={stop_at!r} is not a module of the network", remedy=f"its children: {', '.join(near)}")
    try:
        graph = _Tracer(stop_at).trace(model)
    except Exception as error:
        raise BadInput(
            f"the network can not be cut: torch.fx does not trace it ({type(error).__name__}: {error})",
            remedy="give a module without data-dependent control flow, or zip it whole",
        ) from error
    calls = [n for n in graph.nodes if n.op == "call_module" and n.target == stop_at]
    if len(calls) != 1:
        raise BadInput(
            f"stop_at={stop_at!r} is called {len(calls)} times in a forward pass; it must be once",
            remedy="name a module that runs once, such as the block around it",
        )
    return graph, calls[0]


def split(model: nn.Module, stop_at: str) -> tuple[fx.GraphModule, fx.GraphModule]:
    """(up to and with the module `stop_at`, everything after it); modules are shared with the original.

    Raises: BadInput when torch.fx can not trace the network, or values go round `stop_at` to later layers.
    """
    graph, stop = _graph(model, stop_at)
    fx.GraphModule(model, graph)  # owns the graph: removing dead code asks its owner
    for node in list(graph.nodes):
        if node.op == "output":
            graph.erase_node(node)
    graph.output(stop)
    graph.eliminate_dead_code()
    trunk = fx.GraphModule(model, graph)
    graph, stop = _graph(model, stop_at)
    fx.GraphModule(model, graph)
    with graph.inserting_before(next(iter(graph.nodes))):
        features = graph.placeholder("features")
    stop.replace_all_uses_with(features)
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if node.op == "placeholder" and node is not features:
            if node.users:
                user = next(iter(node.users))
                raise BadInput(
                    f"values go round stop_at={stop_at!r}: {user.name} after it reads the network's input too",
                    remedy="choose a module that everything passes through, such as the end of a block or stage",
                )
            graph.erase_node(node)
    return trunk, fx.GraphModule(model, graph)


def _tensors_of(trunk: fx.GraphModule) -> set[str]:
    """Names of the tensors that a trunk uses."""
    called = [str(n.target) for n in trunk.graph.nodes if n.op in ("call_module", "get_attr")]
    return {n for n in trunk.state_dict() if any(n == c or n.startswith(c + ".") for c in called)}


def _end(trunk: fx.GraphModule, spec: PermutationSpec) -> AxisSpec:
    """How the trunk's output is made of units: by the last module that makes some."""
    for node in reversed(list(trunk.graph.nodes)):
        if node.op != "call_module":
            continue
        for name in reversed([n for n in spec.tensors if n.startswith(f"{node.target}.")]):
            for a in spec.tensors[name]:
                if a.axis == 0 and a.role == "out":
                    return a
    raise BadInput("nothing up to stop_at makes units that the permutation spec knows", remedy="stop later")


def partial_zip(
    models: Sequence[nn.Module],
    stop_at: str,
    spec: PermutationSpec | str | None = None,
    *,
    reset: Any = None,
    weights: Sequence[float] | None = None,
    **options: Any,
) -> PartialZipResult:
    """Zip two networks up to a module and keep both networks' layers after it, as heads of one trunk.

    Args:
        models: two nn.Modules of one architecture that torch.fx can trace.
        stop_at: name of the module where the shared trunk ends (its output is the last zipped one); everything must
            pass through it.
        spec: as in :func:`align`; only the trunk's tensors are matched.
        reset: batches to re-estimate the trunk's BatchNorm statistics with; default: `activations` when given; False
            leaves the averaged ones.
        weights: of the two models in the trunk's average.
        options: activations, weight_share, order, … as in :func:`align`.

    Returns: PartialZipResult; its model returns one output per network.
    Raises: BadInput as align does, and when the network can not be cut at `stop_at`.
    Cost: of a forward pass: one trunk and two heads.
    Source: ZipIt! (arXiv:2305.03053), sec. 4.3.
    """
    models = list(models)
    if len(models) != 2 or not all(isinstance(m, nn.Module) for m in models):
        raise BadInput(
            f"partial_zip needs two nn.Modules, not {', '.join(type(m).__name__ for m in models) or 'none'}",
            remedy="load the state dicts into modules, and zip more than two pair by pair",
        )
    parts = [split(m, stop_at) for m in models]
    whole = resolve_spec(models, spec)
    names = _tensors_of(parts[0][0])
    inner = whole.restricted(names)
    end = _end(parts[0][0], inner)
    found: ZipAlignment = align(models, inner, match="zip", **options)
    share = model_weights(weights, 2)
    trunk = copy.deepcopy(parts[0][0])
    states = [{n: t for n, t in m.state_dict().items() if n in names} for m in models]
    with torch.no_grad():
        trunk.load_state_dict(found.merge(states, share), strict=False)
    zipper = Zipper(inner)
    heads = []
    for m, (_, head) in enumerate(parts):
        index = zipper.target(_owner(inner, end), end, m, found.labels)
        heads.append(nn.Sequential(Unmerge(index), copy.deepcopy(head)))
    data = reset if reset is not None else options.get("activations")
    if has_batchnorm(trunk.state_dict()) and reset is not False:
        if data is None or hasattr(data, "sums"):
            warn_batchnorm("reset")
        else:
            reset_batchnorm(trunk, data)
    model = PartialZip(trunk, heads)
    model.train(models[0].training)
    return PartialZipResult(model, found)


def _owner(spec: PermutationSpec, axis: AxisSpec) -> str:
    return next(n for n, axes in spec.tensors.items() if any(a is axis for a in axes))


__all__ = ["PartialZip", "PartialZipResult", "Unmerge", "partial_zip", "split"]
