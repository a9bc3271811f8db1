"""spec_for: the permutation spec of an arbitrary nn.Module, from its graph.

The module is exported (torch.export, non-strict) on example inputs, and axes are followed through every operation by the
rules in :mod:`._rules`: residual streams, concatenations, grouped convolutions, reshapes into heads and whatever else
the graph does. What the rules do not know is pinned, so the result is always a true symmetry; it is checked by running
the model with random permutations applied.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ._build import build
from ._domain import Axes, Node, Tree, size
from ._rules import RULES, Context, Value
from .permutation import PermutationSpec


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block; the training flags of every submodule come back afterwards."""
    flags = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for m, flag in flags.items():
            m.training = flag


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as (args, kwargs): a dict is keywords, a tuple or list is positional, a tensor the only argument."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def export(model: nn.Module, example_inputs: Any) -> Any:
    args, kwargs = as_call(example_inputs)
    with warnings.catch_warnings(), evaluating(model), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(model, args, kwargs, strict=False)
        except Exception as error:
            raise BadInput(
                f"the model can not be traced: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                remedy="give example_inputs the model accepts in eval mode, or pass a PermutationSpec of your own",
            ) from error
        if _unknown(program.graph_module):
            with contextlib.suppress(
                Exception
            ):  # some decompositions assume contiguous inputs: keep the graph as it is
                return program.run_decompositions()
        return program


def _unknown(module: Any) -> list[str]:
    """Operations without a rule, which a decomposition may turn into ones that have."""
    return [str(n.target) for n in module.graph.nodes if n.op == "call_function" and _find(n.target) is None]


def _find(target: Any) -> Callable[..., Any] | None:
    if isinstance(target, torch._ops.OpOverload):
        packet = str(target.overloadpacket)
        found = RULES.get(packet) or (RULES.get(packet[:-1]) if packet.endswith("_") else None)
        if found is not None:
            return found
        if torch.Tag.pointwise in target.tags:
            return _pointwise
        functional = packet[:-1].replace("aten.", "") if packet.endswith("_") else None
        if functional and hasattr(torch.ops.aten, functional):
            overload = getattr(getattr(torch.ops.aten, functional), target._overloadname, None)
            if overload is not None and torch.Tag.pointwise in overload.tags:
                return _pointwise
        return None
    return _not_aten  # getitem, arithmetic on sizes, higher-order wrappers: handled by the walk itself


def _not_aten(*_: Any) -> None:
    raise AssertionError("handled by the walk")


def _pointwise(c: Context, *args: Any, **kwargs: Any) -> Value:
    values = [a for a in (*args, *kwargs.values()) if isinstance(a, Value)]
    for a in (*args, *kwargs.values()):
        if isinstance(a, (list, tuple)):
            values.extend(v for v in a if isinstance(v, Value))
    for v in values:
        c.produce(v)
    return Value(c.broadcast(values))


class Walk:
    """One pass over the exported graph; `values` maps graph nodes to axes."""

    def __init__(self, program: Any) -> None:
        self.axes = Axes()
        self.context = Context(self.axes)
        self.program = program
        self.values: dict[Any, Any] = {}
        self.parameters: dict[str, Value] = {}  # one entry per stored tensor, under every name it has
        self.notes: list[str] = []
        self._storages: dict[int, Value] = {}
        self.run(program.graph_module)

    def run(self, module: Any, inputs: Sequence[Any] | None = None) -> Any:
        given = iter(inputs) if inputs is not None else None
        result: Any = None
        for node in module.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = next(given) if given is not None else self._placeholder(node)
            elif node.op == "get_attr":
                self.values[node] = self._attribute(module, node)
            elif node.op == "call_function":
                self.values[node] = self._call(module, node)
            elif node.op == "output":
                result = torch.fx.node.map_arg(node.args[0], lambda n: self.values.get(n))
                if inputs is None:
                    for leaf in _values(result):
                        for t in leaf.dims:
                            self.axes.pin(t)
        return result

    def _placeholder(self, node: Any) -> Any:
        signature = self.program.graph_signature
        name = signature.inputs_to_parameters.get(node.name) or signature.inputs_to_buffers.get(node.name)
        shape = _shape(node)
        if shape is None:
            return None
        if name is None:
            constant = signature.inputs_to_lifted_tensor_constants.get(node.name)
            if constant is not None:
                return self._literal(self.program.constants[constant])
            return self.context.fixed(shape)
        stored = self.program.state_dict.get(name)
        if node.name in signature.inputs_to_buffers and not _is_statistic(node):
            return self._literal(self.program.constants[name] if stored is None else stored)
        key = stored.data_ptr() if stored is not None and stored.numel() else id(name)
        if key in self._storages and [size(t) for t in self._storages[key].dims] == list(shape):
            tied = self._storages[key]
            self.parameters[name] = Value(tied.dims)
            return Value(tied.dims, (name, list(range(len(shape)))))
        dims: list[Tree] = []
        for i, n in enumerate(shape):
            # the most general start: what a later axis holds may depend on the position along the first
            lead = [dims[0]] if i and isinstance(dims[0], Node) else []
            dims.append(self.axes.free(int(n), [p for p in lead if isinstance(p, Node)], f"{name}/{i}"))
        self.parameters[name] = self._storages[key] = Value(dims)
        return Value(dims, (name, list(range(len(shape)))))

    def _literal(self, tensor: Tensor) -> Value:
        """A constant: positions along an axis are interchangeable only where all of them hold the same."""
        dims: list[Tree] = []
        for axis, n in enumerate(tensor.shape):
            with torch.no_grad():
                uniform = n > 0 and bool((tensor == tensor.narrow(axis, 0, 1)).all())
            dims.append(self.axes.free(n) if uniform else self.axes.fixed(n))
        return Value(dims)

    def _attribute(self, module: Any, node: Any) -> Any:
        found: Any = module
        for part in node.target.split("."):
            found = getattr(found, part)
        return self._literal(found) if isinstance(found, Tensor) else found

    def _call(self, module: Any, node: Any) -> Any:
        args = torch.fx.node.map_arg(node.args, lambda n: self.values.get(n))
        kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: self.values.get(n))
        target = node.target
        name = getattr(target, "__name__", str(target))
        if name == "getitem":
            return args[0][args[1]] if isinstance(args[0], (list, tuple)) else args[0]
        if not isinstance(target, torch._ops.OpOverload):
            inner = [a for a in args if isinstance(a, torch.fx.GraphModule)]
            if inner:  # wrappers that only set a mode: their body is a graph of its own
                rest = args[list(args).index(inner[0]) + 1 :]
                return self.run(inner[0], [v for v in rest])
            return None if _shape(node) is None else self._pin(node, args, kwargs)
        rule = _find(target)
        if rule is None:
            return self._pin(node, args, kwargs)
        extra = {}
        wanted = rule.__code__.co_varnames[: rule.__code__.co_argcount + rule.__code__.co_kwonlyargcount]
        if "shape" in wanted:
            extra["shape"] = _shape(node) or (_shapes(node) or [()])[0]
        if "shapes" in wanted:
            extra["shapes"] = _shapes(node)
        try:
            out = rule(self.context, *args, **{k: v for k, v in kwargs.items() if k not in extra}, **extra)
        except (TypeError, AttributeError, IndexError):
            return self._pin(node, args, kwargs)
        shapes = _shapes(node)
        if shapes is not None and isinstance(
            out, Value
        ):  # several results (a norm's statistics): the first is the rule's
            out = [out, *(self.context.fixed(s) if s is not None else None for s in shapes[1:])]
        for value in _values(out):
            self.axes.keep_parents(value.dims)
        return out

    def _pin(self, node: Any, args: Any, kwargs: Any) -> Any:
        """No rule: whatever goes in stays where it is."""
        moved = False
        for value in [*_values(args), *_values(kwargs)]:
            for t in value.dims:
                moved = moved or any(not n.fixed for n in self.axes.leaves(t))
                self.axes.pin(t)
        if moved:
            self.notes.append(f"{node.target} in {_where(node)} has no rule: the axes it sees are not permuted")
        shapes = _shapes(node)
        if shapes is not None:
            return [self.context.fixed(s) if s is not None else None for s in shapes]
        shape = _shape(node)
        return None if shape is None else self.context.fixed(shape)


def _values(tree: Any) -> Iterator[Value]:
    if isinstance(tree, Value):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for t in tree:
            yield from _values(t)
    elif isinstance(tree, Mapping):
        for t in tree.values():
            yield from _values(t)


def _shape(node: Any) -> list[int] | None:
    value = node.meta.get("val")
    return [int(n) for n in value.shape] if isinstance(value, Tensor) else None


def _shapes(node: Any) -> list[Any] | None:
    value = node.meta.get("val")
    if not isinstance(value, (list, tuple)):
        return None
    return [[int(n) for n in v.shape] if isinstance(v, Tensor) else None for v in value]


def _is_statistic(node: Any) -> bool:
    """A buffer that only normalisation layers read: running means and variances move with their channels."""
    return all("norm" in str(user.target) for user in node.users) and bool(node.users)


def _where(node: Any) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    return f"module {path.replace('L__self___', '')!r}" if path else "the model"


def spec_for(model: nn.Module, example_inputs: Any, *, check: bool = True, seed: int = 0) -> PermutationSpec:
    """The permutation spec of a module, derived by tracing it.

    Args:
        model: any nn.Module that torch.export accepts with static shapes; traced in eval mode, left as it was.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments; use a batch of 2 or more.
        check: run the model with random permutations applied and compare (see :func:`check_spec`).

    Returns:
        A PermutationSpec over ``model.state_dict()``. ``spec.notes`` names operations without a rule, whose operands were
        pinned: the spec is still right, only smaller than it could be.

    Raises: BadInput when the model can not be exported, or when the check fails: the message names the operation at
        which outputs stop being a permutation of the original ones.
    Cost: one export and, with `check`, three forward passes.
    """
    walk = Walk(export(model, example_inputs))
    spec, names = build(walk, set(model.state_dict()))
    if check:
        from .verify import check_spec, locate

        try:
            check_spec(model, spec, example_inputs, seed=seed)
        except BadInput as error:
            where = locate(model, spec, example_inputs, walk, names, seed=seed)
            raise BadInput(f"{error.message}; it goes wrong at {where}", remedy=error.remedy) from error
    return spec


__all__ = ["Walk", "as_call", "build", "evaluating", "export", "spec_for"]
