"""What a merge method is: a plain annotated function, and optional passes over the data before it.

The annotations are the configuration schema (recipe keys, ranges, help). A method takes ``base: Weight`` and either
``deltas: Deltas`` (the engine subtracts the base in float32) or ``models: Models`` (raw), keyword-only parameters, and
optionally ``context: Context``. It returns a ``Weight``, or a ``Delta`` that the engine adds to the base.

Passes, each optional::

    @ties.check    # once per job, on names, shapes and parameters: raises BadInput
    @ties.fit      # once per job: sees every tensor; result is context.plan
    @ties.scan     # once per tensor, before it is applied; result is context.state

    @frank_wolfe.run_job  # instead of all others: a whole recipe, for methods that do not go tensor by tensor

    @free.plan_files   # from headers: the files the method writes beside the merged weights, with their sizes
    @free.write_files  # once per job, after every tensor is merged: sees every tensor again and writes them

``grain="element"`` promises that output element i depends on input elements i only (plus plan and state), so that the
engine may call the method on chunks; ``grain="tensor"`` gets whole tensors; ``grain="stream"`` gets the
:class:`TensorStream` itself and drives its own chunks.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_type_hints

import torch
from torch import Tensor

from ._parameter import (
    REQUIRED,
    Delta,
    Deltas,
    Density,
    Help,
    Models,
    Parameter,
    PerModel,
    Range,
    Weight,
    parameter_of,
    space_of,
)


class TensorStream(Protocol):
    """One named parameter of all models, in memory or on disk, read piece by piece."""

    name: str
    shape: tuple[int, ...]
    numel: int
    start: int  # flat index of this tensor's first element among all merged tensors, in the order of their names
    seed: int
    count: int  # number of (non-base) models
    has_base: bool
    out_dtype: torch.dtype
    compute: torch.dtype  # of the arithmetic: float32, or float64 when an input is
    resident: bool  # everything is in memory already
    config: Mapping[str, Any]  # the first model's config.json; empty when there is none
    parameters: Mapping[str, Any]

    def read(self, begin: int, end: int) -> tuple[Tensor | None, list[Tensor]]:
        """Elements [begin, end) of the base and of each model, flat, valid until the next call on this thread."""
        ...

    def read_spans(self, starts: Sequence[int], length: int) -> tuple[Tensor | None, list[Tensor]]:
        """`length` elements from each of `starts`, one span after the other, valid until the next call on this thread."""
        ...

    def for_each(
        self, visit: Callable[[int, Tensor | None, list[Tensor]], None], align: int = 1, block: int = 65_536
    ) -> None:
        """visit(offset, base, models) over chunks that cover the tensor, possibly from several threads at once.

        Chunks begin at multiples of `block` elements and of `align`.
        """
        ...

    def merge_each(
        self, visit: Callable[[int, Tensor | None, list[Tensor], Tensor | None], Tensor], align: int = 1
    ) -> None:
        """Store visit(offset, base, models, out) for every chunk, perhaps on a GPU, perhaps later than this returns.

        Chunks begin at multiples of `align`; `out`, if any, is a flat buffer of `out_dtype` the values may be written to.
        """
        ...

    def in_one_call(self, runs: Callable[[Tensor | None, list[Tensor]], bool]) -> bool:
        """Whether `merge_each` gives the whole tensor in one call: small and on its way to a GPU, or in memory where
        ``runs(base, models)``.
        """
        ...

    def collect(
        self,
        key: str,
        visit: Callable[[int, Tensor | None, list[Tensor], Tensor | None], Tensor],
        dtype: torch.dtype = torch.float32,
        then: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """visit(offset, base, models, out) of every chunk as one tensor of this one's shape, which `then` may change.

        It may be on a GPU, and only `then` and :meth:`emit` may touch it.
        """
        ...

    def collects(self, key: str, dtype: torch.dtype = torch.float32) -> bool:
        """Whether `collect` keeps the tensor on a device; if not, a method may rather pass over it twice."""
        ...

    def whole(self) -> tuple[Tensor | None, list[Tensor]]:
        """Everything, in the tensor's shape, on the CPU unless it is resident elsewhere: O(tensor) memory."""
        ...

    def buffer(self, key: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Work memory of the tensor's shape, on its device, reused from tensor to tensor; contents undefined."""
        ...

    def scratch(self, key: str, numel: int, dtype: torch.dtype) -> Tensor:
        """Flat work memory on the CPU, reused from tensor to tensor; contents undefined."""
        ...

    def place(self, begin: int, end: int) -> Tensor | None:
        """Where elements [begin, end) of the result may be written before they are put, if anywhere."""
        ...

    def put(self, offset: int, values: Tensor) -> None:
        """Store a flat chunk of the result, cast to the output dtype."""
        ...

    def keep_gram(self, gram: list[list[float]], *, deltas: bool, base_first: bool) -> None:
        """Inner products of the deltas, or of the models with the base before them or without it: for the report."""
        ...

    def emit(self, result: Tensor, *, add_base: bool = False) -> None:
        """Store the result (the tensor's shape, any float dtype); with add_base, base + result."""
        ...


@dataclass(frozen=True)
class Header:
    """What is known of one merged tensor before anything is read."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype  # of the result
    parameters: Mapping[str, Any]
    models: tuple[int, ...]  # which of the recipe's models take part
    config: Mapping[str, Any] = field(default_factory=dict)  # the first model's config.json, empty without one


@dataclass
class Context:
    """What a method may know about the call beyond its tensors and parameters."""

    name: str = ""
    shape: tuple[int, ...] = ()
    offset: int = 0  # flat index, within the tensor, of the first element of this chunk
    start: int = 0  # flat index of the tensor among all merged tensors
    seed: int = 0
    dtype: torch.dtype = torch.float32  # of the result
    out: Tensor | None = None  # a buffer the result may be written to
    plan: Any = None
    state: Any = None


@dataclass
class Method:
    """A registered merge method; ``fastmerge.methods.get(name)``."""

    name: str
    function: Callable[..., Any]
    parameters: dict[str, Parameter]
    base: Literal["required", "optional", "ignored"]
    models: tuple[int, int | None]
    grain: Literal["element", "tensor", "stream"]
    takes: Literal["models", "deltas"]
    gives: Literal["weight", "delta"]
    paper: str = ""
    wants_context: bool = False
    summary: str = ""
    description: str = ""
    check_pass: Callable[..., None] | None = None
    memory_pass: Callable[..., int] | None = None
    fit_pass: Callable[..., Any] | None = None
    scan_pass: Callable[..., Any] | None = None
    plan_pass: Callable[[Sequence[Header], Sequence[str]], dict[str, int]] | None = None
    files_pass: Callable[..., dict[str, int]] | None = None
    job_pass: Callable[..., Any] | None = None
    one_call: bool = False
    needs_data: bool = False
    reads: int = 1
    aliases: dict[str, str] = field(default_factory=dict)

    def check(self, function: Callable[..., None]) -> Callable[..., None]:
        """Register ``check(tensors: Sequence[Header])``, which raises BadInput for what no parameter's range shows.

        It runs before a byte is read or written, in dry runs too.
        """
        self.check_pass = function
        return function

    def memory(self, function: Callable[..., int]) -> Callable[..., int]:
        """Register ``memory(tensors: Sequence[Header]) -> bytes``: the most it holds at once besides chunk buffers."""
        self.memory_pass = function
        return function

    def held_bytes(self, tensors: Sequence[Header]) -> int:
        """The most the method holds at once besides chunk buffers; where it does not say, by its grain."""
        if self.memory_pass is not None:
            return self.memory_pass(tensors)
        whole = 4 * max((math.prod(t.shape) * (len(t.models) + 3) for t in tensors), default=0)
        return whole if self.grain == "tensor" else 0

    def fit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Register ``fit(tensors: Iterable[TensorStream], seed) -> plan`` (None = nothing to fit for these parameters)."""
        self.fit_pass = function
        return function

    def scan(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Register ``scan(tensor: TensorStream, plan) -> state``."""
        self.scan_pass = function
        return function

    def plan_files(self, function: Callable[[Sequence[Header], Sequence[str]], dict[str, int]]) -> Callable[..., Any]:
        """Register ``plan_files(tensors, models) -> {relative path: estimated bytes}``; models are the recipe's.

        It raises BadInput for what headers and parameters show to be wrong.
        """
        self.plan_pass = function
        return function

    def write_files(self, function: Callable[..., dict[str, int]]) -> Callable[..., Any]:
        """Register ``write_files(tensors: Iterable[TensorStream], models, folder: Path) -> {relative path: bytes}``."""
        self.files_pass = function
        return function

    def run_job(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Register ``run_job(recipe, out, **options) -> Report``: the method runs whole jobs itself.

        Options are those of ``engine.run``, `dry_run` included; it raises BadInput for those that it can not keep.
        """
        self.job_pass = function
        return function

    def arguments(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Recipe parameters as keyword arguments of the function."""
        return {p.argument: parameters[p.name] for p in self.parameters.values()}

    def __call__(
        self, base: Tensor | None, tensors: Sequence[Tensor], context: Context, parameters: Mapping[str, Any]
    ) -> Tensor:
        """Merge one tensor or chunk: raw models in, the merged weight out (base added if the method gives a delta)."""
        arguments = self.arguments(parameters)
        if self.wants_context:
            arguments["context"] = context
        origin = base
        if self.takes == "deltas":
            assert base is not None
            origin = base.float() if base.dtype != torch.float64 else base
            tensors = [t.to(origin.dtype) - origin for t in tensors]
        result: Tensor = self.function(origin if self.takes == "deltas" else base, tensors, **arguments)
        if self.gives == "delta":
            assert origin is not None
            result = origin.to(result.dtype) + result
        return result


_registry: dict[str, Method] = {}


def method(
    *,
    paper: str = "",
    name: str | None = None,
    base: Literal["required", "optional", "ignored"] = "required",
    models: tuple[int, int | None] = (1, None),
    grain: Literal["element", "tensor", "stream"] = "tensor",
    one_call: bool = False,
    needs_data: bool = False,
    reads: int = 1,
) -> Callable[[Callable[..., Any]], Method]:
    """Decorator that registers a merge method under its function's name.

    Args:
        paper: where the rule comes from, e.g. "arXiv:2306.01708".
        base: whether a base model is needed, used when given, or ignored.
        models: least and most number of models besides the base.
        grain: see the module docstring.
        one_call: a chunk's result is that of one operator call with ``out=``, untouched, or an input: the calls of many
            small tensors may then go in one launch (``_dispatch.batched``).
        needs_data: the method can not run from weights alone; the engine refuses it with a hint, unless it runs its
            jobs itself (:meth:`Method.run_job`) with data that its parameters name.
        reads: how often a tensor's inputs are read at most, where that is not 1 + one for each pass: for plans and progress.

    Raises: TypeError for annotations that are not a configuration schema; ValueError for a name registered twice.
    """

    def register(function: Callable[..., Any]) -> Method:
        hints = get_type_hints(function, include_extras=True)
        signature = inspect.signature(function)
        parameters: dict[str, Parameter] = {}
        takes: Literal["models", "deltas"] = "models"
        wants_context = False
        for p in signature.parameters.values():
            if p.name == "context":
                wants_context = True
            elif p.kind is inspect.Parameter.KEYWORD_ONLY:
                parameter = parameter_of(p.name, hints[p.name], p.default)
                parameters[parameter.name] = parameter
            elif space_of(hints.get(p.name)) == "deltas":
                takes = "deltas"
        doc = inspect.getdoc(function) or ""
        made = Method(
            name=name or function.__name__,
            function=function,
            parameters=parameters,
            base=base,
            models=models,
            grain=grain,
            takes=takes,
            gives="delta" if space_of(hints.get("return")) == "delta" else "weight",
            paper=paper,
            wants_context=wants_context,
            summary=doc.partition("\n")[0],
            description=doc,
            one_call=one_call,
            needs_data=needs_data,
            reads=reads,
        )
        if takes == "deltas" and base != "required":
            raise TypeError(f"{made.name}: deltas need base='required'")
        if made.name in _registry:
            raise ValueError(f"method {made.name!r} is registered twice")
        _registry[made.name] = made
        return made

    return register


def registered() -> dict[str, Method]:
    return _registry


__all__ = [
    "REQUIRED",
    "Context",
    "Delta",
    "Deltas",
    "Density",
    "Header",
    "Help",
    "Method",
    "Models",
    "Parameter",
    "PerModel",
    "Range",
    "TensorStream",
    "Weight",
    "method",
    "registered",
]
