"""Does a spec preserve the function? Random permutations are applied and the outputs compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput
from .permutation import PermutationSpec

TOLERANCE = 1e-4  # largest difference of outputs over the largest output


def _outputs(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in _outputs(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _outputs(v)]
    return []


def shaken(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """The model's tensors, each entry moved a little: fresh norms and biases are all alike and would hide an error."""
    g = torch.Generator().manual_seed(seed)
    state = {}
    for name, t in model.state_dict().items():
        if t.is_floating_point() and t.ndim > 0:
            noise = torch.rand(t.shape, generator=g, device="cpu").to(t) - 0.5
            spread = t.detach().float().std(unbiased=False).clamp(min=0.02).to(t)
            state[name] = t.detach() * (1 + 0.5 * noise) + (0 if name.endswith("running_var") else 1) * spread * noise
        else:
            state[name] = t.detach()
    return state


def tied(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with tensors that the model shares under several names equal again."""
    first: dict[int, str] = {}
    for name, t in model.state_dict().items():
        if t.numel():
            state[name] = state[first.setdefault(t.data_ptr(), name)] if t.numel() > 1 else state[name]
    return state


@torch.no_grad()
def run(model: nn.Module, state: Mapping[str, Tensor], example_inputs: Any) -> list[Tensor]:
    from .trace import as_call, evaluating

    args, kwargs = as_call(example_inputs)
    with evaluating(model):
        return _outputs(torch.func.functional_call(model, dict(state), args, kwargs, tie_weights=False))


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference over the largest magnitude, over all floating outputs."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.is_floating_point() and x.numel():
            worst = max(worst, float((x - y).abs().max() / x.abs().max().clamp(min=1e-12)))
    return worst


def check_spec(
    model: nn.Module, spec: PermutationSpec, example_inputs: Any, *, seed: int = 0, tolerance: float = TOLERANCE
) -> float:
    """Applies a random permutation of every group to a perturbed copy of the model's tensors and compares outputs.

    Returns the difference (relative to the largest output). Raises BadInput, naming the groups that break the function
    when permuted alone, if it exceeds `tolerance`. Costs two forward passes, plus one per group on failure.
    """
    state = tied(model, shaken(model, seed))
    spec.check({k: v.shape for k, v in state.items()})
    perms = spec.random(torch.Generator().manual_seed(seed))
    want = run(model, state, example_inputs)
    moved = difference(want, run(model, spec.permute_state(state, perms), example_inputs))
    if moved <= tolerance:
        return moved
    guilty = []
    for g in spec.groups:
        alone = spec.permute_state(state, {g: perms[g]})
        if difference(want, run(model, alone, example_inputs)) > tolerance:
            guilty.append(g)
    listed = ", ".join(guilty[:5]) + (f" and {len(guilty) - 5} more" if len(guilty) > 5 else "")
    raise BadInput(
        f"the permutation spec ({spec.architecture}) does not preserve the function: a random permutation moves the outputs "
        f"by {moved:.2g} of their largest value" + (f"; groups that break it: {listed}" if guilty else ""),
        remedy="check the layouts of those groups, or derive the spec with spec_for(model, example_inputs)",
    )


@torch.no_grad()
def locate(
    model: nn.Module, spec: PermutationSpec, example_inputs: Any, walk: Any, names: Mapping[int, str], *, seed: int = 0
) -> str:
    """The first operation of the exported graph whose result is not the permuted original one."""
    from ._domain import Family, Node, Product, Sum
    from .layout import Layout
    from .permutation import AxisSpec
    from .trace import _where, as_call, evaluating

    state = tied(model, shaken(model, seed))
    perms = spec.random(torch.Generator().manual_seed(seed))

    def values(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        class Recorder(torch.fx.Interpreter):
            def run_node(self, n: Any) -> Any:
                seen[n.name] = super().run_node(n)
                return seen[n.name]

        signature = walk.program.graph_signature
        args, kwargs = as_call(example_inputs)
        flat = iter(torch.utils._pytree.tree_leaves((args, kwargs)))
        feed = []
        for node in walk.program.graph_module.graph.nodes:
            if node.op != "placeholder":
                continue
            name = signature.inputs_to_parameters.get(node.name) or signature.inputs_to_buffers.get(node.name)
            constant = signature.inputs_to_lifted_tensor_constants.get(node.name)
            if name is not None:
                feed.append(tensors[name] if name in tensors else walk.program.constants[name])
            elif constant is not None:
                feed.append(walk.program.constants[constant])
            else:
                feed.append(next(flat))
        with evaluating(model):
            Recorder(walk.program.graph_module).run(*feed)
        return seen

    def layout(tree: Any) -> Layout | None:
        tree = walk.axes.norm(tree)
        if isinstance(tree, Family):
            return None
        if isinstance(tree, Sum):
            parts = [layout(t) for t in tree.terms]
            return None if None in parts else Layout(tuple(s for p in parts if p for s in p.segments))
        segment: list[Any] = []
        for f in tree.factors if isinstance(tree, Product) else (tree,):
            if isinstance(f, Node):
                segment.append(names.get(id(f), f.size) if not f.fixed else f.size)
            else:
                inner = layout(f)
                if inner is None:
                    return None
                segment.append(inner)
        return Layout((tuple(segment) or (1,),))

    before, after = values(state), values(spec.permute_state(state, perms))
    for node in walk.program.graph_module.graph.nodes:
        value, got = walk.values.get(node), after.get(node.name)
        if node.op != "call_function" or not isinstance(got, Tensor) or not hasattr(value, "dims"):
            continue
        want, known = before[node.name], True
        for axis, tree in enumerate(value.dims):
            made = layout(tree)
            try:
                index = None if made is None else spec.index(AxisSpec(axis, made), perms)
            except KeyError:  # depends on a group of another axis
                known = False
                break
            if made is None:
                known = False
                break
            if index is not None:
                want = want.index_select(axis, index)
        if known and got.is_floating_point() and difference([want], [got]) > TOLERANCE:
            return f"{node.target} in {_where(node)}"
    return "an operation that could not be singled out"
