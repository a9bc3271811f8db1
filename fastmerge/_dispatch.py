"""Operators with several backends.

An :class:`Op` is a PyTorch reference plus backends in order of preference. A backend says through ``when`` why it can
not serve a call (a sentence) or that it can (None). Choosing automatically takes the first that can, the reference
last; an explicit request (``backend=`` or :func:`use_backend`, or ``FASTMERGE_BACKEND``) that can not be served raises
with that sentence. A kernel that fails is never a reason to fall back.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, ParamSpec, TypeVar

import torch
import torch.utils.dlpack

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

REFERENCE = "reference"
BACKENDS = (REFERENCE, "cpu", "triton", "cuda", "torch", "cupy")
NUMERICS = ("A", "B", "C")  # docs/numerics.md
# Picks the tolerance in tests/checks.py; reduction32: float32 sums reported as float64.
KINDS = ("elementwise", "selection", "reduction", "reduction32", "fft", "assignment")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_recorders: list[dict[str, str]] = []
_requested: contextvars.ContextVar[str | None] = contextvars.ContextVar("fastmerge_backend", default=None)


Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of an operator
Many = Callable[[Sequence[Call]], list[Any]]  # takes many calls at once


class BackendUnavailable(RuntimeError):
    """An explicitly requested backend can not serve this call; the message says why."""


@dataclass(frozen=True)
class Backend:
    name: str
    run: Callable[..., Any]
    when: Callable[..., str | None]
    detail: Callable[..., str] | None = None  # which of several ways it would take, for explain()
    many: Many | None = None  # many calls in one launch


@dataclass(frozen=True)
class Explanation:
    """Who would run a call, and why not the others."""

    op: str
    chosen: str
    reasons: tuple[tuple[str, str | None], ...]  # (backend, why not); None = could run
    details: dict[str, str] = field(default_factory=dict)  # how a backend would go about it, where it has a choice

    def __str__(self) -> str:
        rows = [
            f"  {'->' if name == self.chosen else '  '} {name}: {reason or 'can run'}"
            + (f" ({self.details[name]})" if name in self.details else "")
            for name, reason in self.reasons
        ]
        return "\n".join([f"{self.op}: {self.chosen}", *rows])


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every operator uses backend `name`, or raises BackendUnavailable with the reason."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; one of {', '.join(BACKENDS)}")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


@contextlib.contextmanager
def record_backends() -> Iterator[dict[str, str]]:
    """Yields a dict that collects, from all threads, the backend each operator last ran on."""
    record: dict[str, str] = {}
    _recorders.append(record)
    try:
        yield record
    finally:
        _recorders.remove(record)


def requested_backend() -> str | None:
    """The backend asked for by use_backend or FASTMERGE_BACKEND, if any."""
    name = _requested.get() or os.environ.get("FASTMERGE_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"FASTMERGE_BACKEND={name!r} is not one of {', '.join(BACKENDS)}")
    return name


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def _is_foreign(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) and hasattr(value, "__dlpack__")


def _from_foreign(value: Any) -> Any:
    """Arrays that speak DLPack (numpy, CuPy) become tensors that share their memory."""
    if _is_foreign(value):
        if getattr(getattr(value, "flags", None), "writeable", True) is False:
            value = value.copy()  # numpy refuses to export read-only memory
        return torch.utils.dlpack.from_dlpack(value)
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):  # a named tuple holds plain scalars
        return type(value)(_from_foreign(v) for v in value)
    if isinstance(value, dict):
        return {k: _from_foreign(v) for k, v in value.items()}
    return value


def _foreign_kind(values: Any) -> str | None:
    for value in values:
        if _is_foreign(value):
            return type(value).__module__.partition(".")[0]
        if isinstance(value, (list, tuple)) and (kind := _foreign_kind(value)):
            return kind
        if isinstance(value, dict) and (kind := _foreign_kind(value.values())):
            return kind
    return None


def _to_foreign(value: Any, kind: str) -> Any:
    if isinstance(value, torch.Tensor):
        if kind == "cupy":
            from . import _cupy

            return _cupy.from_tensor(value)
        return value.numpy()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_to_foreign(v, kind) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_to_foreign(v, kind) for v in value)
    return value


@dataclass(frozen=True)
class Case:
    """One named set of inputs of an operator: ``make(generator, dtype) -> (args, kwargs)``."""

    name: str
    make: Callable[[torch.Generator, torch.dtype], tuple[tuple[Any, ...], dict[str, Any]]]
    dtypes: tuple[torch.dtype, ...]


class Op(Generic[P, R]):
    """An operator: call it, ask it to ``explain`` a call, register backends with ``backend``."""

    def __init__(self, reference: Callable[P, R], *, numerics: str, kind: str) -> None:
        if numerics not in NUMERICS or kind not in KINDS:
            raise ValueError(f"numerics is one of {NUMERICS}, kind one of {KINDS}")
        self.reference = reference
        self.name = reference.__name__
        self.numerics = numerics
        self.kind = kind
        self.backends: dict[str, Backend] = {}
        self.cases: list[Case] = []
        self.signature = inspect.signature(reference)
        functools.update_wrapper(self, reference)

    def backend(
        self, name: str, *, when: Callable[..., str | None], detail: Callable[..., str] | None = None
    ) -> Callable[[F], F]:
        """Register a backend; the order of registration is the order of preference."""
        if name not in BACKENDS or name in self.backends or name == REFERENCE:
            raise ValueError(f"{self.name}: backend {name!r} is unknown, reserved or registered twice")

        def register(run: F) -> F:
            self.backends[name] = Backend(name, run, when, detail)
            return run

        return register

    def many(self, name: str) -> Callable[[F], F]:
        """Register ``run(calls) -> results``, which takes many calls of backend `name` at once."""

        def register(run: F) -> F:
            self.backends[name] = replace(self.backends[name], many=run)
            return run

        return register

    def each(self, calls: Sequence[Call]) -> list[R]:
        """The results of many calls, (arguments, keyword arguments) each, in one launch where their backend can.

        What a thousand small tensors need on a GPU, where a launch costs more than they do.
        """
        results: dict[int, R] = {}
        groups: dict[str, list[int]] = {}
        for i, (args, kwargs) in enumerate(calls):
            groups.setdefault(self.choose(*args, **kwargs), []).append(i)
        for name, members in groups.items():
            together = None if name == REFERENCE else self.backends[name].many
            ready = [(a, {k: v for k, v in kw.items() if k != "backend"}) for a, kw in (calls[i] for i in members)]
            if together is None:
                run = self.reference if name == REFERENCE else self.backends[name].run
                results |= {i: run(*a, **kw) for i, (a, kw) in zip(members, ready, strict=True)}
            else:
                results |= dict(zip(members, together(ready), strict=True))
        return [results[i] for i in range(len(calls))]

    def case(self, name: str, *dtypes: torch.dtype) -> Callable[[F], F]:
        """Register inputs for tests and benchmarks, made from a seeded generator for each dtype (default: all four)."""

        def register(make: F) -> F:
            self.cases.append(Case(name, make, dtypes or FLOATS))
            return make

        return register

    def why_not(self, name: str, /, *args: Any, **kwargs: Any) -> str | None:
        """None when backend `name` can serve the call, else the reason."""
        if name == REFERENCE:
            return None
        if name not in self.backends:
            return f"{self.name} has no {name} backend (it has: {', '.join([*self.backends, REFERENCE])})"
        if torch.is_grad_enabled() and any(t.requires_grad for t in _tensors((args, kwargs))):
            return "an input needs a gradient: only the reference is differentiable"
        return self.backends[name].when(*args, **kwargs)

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """Which backend would run this call, and what keeps each other one from it."""
        args, kwargs = _from_foreign(args), _from_foreign(kwargs)
        requested = kwargs.pop("backend", None) or requested_backend()
        reasons = tuple((name, self.why_not(name, *args, **kwargs)) for name in [*self.backends, REFERENCE])
        chosen = requested or next(name for name, reason in reasons if reason is None)
        details = {n: b.detail(*args, **kwargs) for n, b in self.backends.items() if b.detail is not None}
        return Explanation(self.name, chosen, reasons, details)

    def choose(self, *args: Any, **kwargs: Any) -> str:
        """The backend of a call; raises BackendUnavailable for a requested one that can not run it."""
        requested = kwargs.pop("backend", None) or requested_backend()
        if requested is not None:
            reason = self.why_not(requested, *args, **kwargs)
            if reason is not None:
                raise BackendUnavailable(f"{self.name}: backend {requested!r} can not run this call: {reason}")
            chosen = requested
        else:
            chosen = next((n for n in self.backends if self.why_not(n, *args, **kwargs) is None), REFERENCE)
        for record in _recorders:
            record[self.name] = chosen
        return chosen

    def __call__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> R:
        kind = _foreign_kind((*args, *kwargs.values()))
        if kind is not None:
            if next(_tensors((*args, *kwargs.values())), None) is not None:
                kind = None  # tensors with, say, a numpy index: the result is a tensor
            args, kwargs = _from_foreign(args), _from_foreign(kwargs)
        chosen = self.choose(*args, backend=backend, **kwargs)
        many = None if chosen == REFERENCE else self.backends[chosen].many
        if many is not None and deferred(many, args, kwargs):
            waiting: R = kwargs["out"]
            return waiting
        run: Callable[..., R] = self.reference if chosen == REFERENCE else self.backends[chosen].run
        result = run(*args, **kwargs)
        return result if kind is None else _to_foreign(result, kind)

    def __repr__(self) -> str:
        return f"<op {self.name}: {', '.join([*self.backends, REFERENCE])}>"


class Batch:
    """Calls on small tensors that wait to go in one launch: see :func:`batched`."""

    SMALL = 1 << 20  # elements; a larger result fills a GPU by itself
    MOST = 256  # calls that wait at most: their workspace is held at once

    def __init__(self) -> None:
        self.waiting: dict[Many, list[Call]] = {}

    @contextlib.contextmanager
    def deferring(self) -> Iterator[None]:
        """Within the block a call whose backend takes many waits: its `out` is returned now and filled later."""
        token = _batches.set(self)
        try:
            yield
        finally:
            _batches.reset(token)

    def defer(self, many: Many, call: Call) -> None:
        calls = self.waiting.setdefault(many, [])
        calls.append(call)
        if len(calls) >= self.MOST:
            self.flush()

    def flush(self) -> None:
        """Run what waits."""
        waiting, self.waiting = self.waiting, {}
        for many, calls in waiting.items():
            many(calls)


_batches: contextvars.ContextVar[Batch | None] = contextvars.ContextVar("fastmerge_batch", default=None)


def deferred(many: Many, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call waits, within :meth:`Batch.deferring`, to be run by `many` with others; its `out` is filled then."""
    batch, out = _batches.get(), kwargs.get("out")
    if batch is None or not isinstance(out, torch.Tensor) or out.numel() > Batch.SMALL:
        return False
    batch.defer(many, (args, kwargs))
    return True


@contextlib.contextmanager
def batched() -> Iterator[Batch]:
    """A Batch whose calls have all run when the block is left; inputs and `out` must live, unchanged, until then."""
    batch = Batch()
    yield batch
    batch.flush()


def op(*, numerics: str, kind: str) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Decorator: the function is the reference of a new operator of its name.

    numerics: "A" same bits on every backend, "B" same bits across threads, chunks and workers of one build,
    "C" tolerance only. kind: the row of the tests' tolerance table.
    """
    return lambda reference: Op(reference, numerics=numerics, kind=kind)
