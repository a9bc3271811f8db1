"""Serving FREE: one backbone in memory, experts swapped in place, batches routed sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import BadInput, check_choice
from .storage import Expert, load, load_folder

Experts = str | Path | Mapping[str, "Expert | str | Path"] | Sequence["Expert | str | Path"]
Mixture = Mapping[str, float]


class FreeModel(nn.Module):
    """A merged backbone with experts: ``use(task)`` adds one to the weights in place, exactly undoable.

    Args:
        model: the backbone, changed in place while an expert is in use; any nn.Module.
        experts: a folder of expert files, or experts (or their files) in a list or by task.
        combine: ``add``: θ + μ·v (paper); ``override``: on the expert's positions θ0 + μ·v instead of the backbone's
            value, as the published code; this needs `base`. Default: what the experts were made for.
        base: the state dict (or module) that the models were fine-tuned from, for ``override``.
        heads: modules by task that take the place of the submodule called `head` while the task is in use.
        router: ``router(*args, **kwargs)`` -> scores [B, T] or indices [B], of its own list `tasks` of names where it has
            one, as a fastmerge Router, else of this model's `tasks`. With one, ``forward`` runs every sample with its
            own expert.

    Swapping costs the expert's entries only: about 1 % of the weights at the usual density. Works under
    torch.inference_mode, and on CUDA (move the module first, or call ``to``: positions and values follow).
    """

    def __init__(
        self,
        model: nn.Module,
        experts: Experts,
        *,
        combine: Literal["add", "override"] | None = None,
        base: Mapping[str, Tensor] | nn.Module | None = None,
        heads: Mapping[str, nn.Module] | None = None,
        head: str | None = None,
        router: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.experts = _collect(experts)
        if combine is None:
            meant = {e.about.get("combine", "add") for e in self.experts.values()}
            if len(meant) > 1:
                raise BadInput("some experts are to be added, others put over the backbone", remedy="pass combine=")
            combine = "override" if meant == {"override"} else "add"
        self.combine = combine
        self.tasks = list(self.experts)
        self.router = router
        self._columns = self._match(router)
        self.task: str | None = None  # the expert in use, if one alone is
        if (heads is None) != (head is None):
            raise BadInput("heads and head go together", remedy="head names the submodule that heads[task] replaces")
        self.heads = nn.ModuleDict(dict(heads)) if heads is not None else None
        self._head = head
        self._own_head = model.get_submodule(head) if head is not None else None
        check_choice("combine", combine, ("add", "override"))
        if combine == "override" and base is None:
            raise BadInput("combine='override' puts base + expert in place", remedy="pass base=, the base's state dict")
        self._base = {k: v.detach() for k, v in _state(base).items()} if base is not None else {}
        self._targets = self._find_targets()
        self._ready: dict[str, tuple[list[Tensor], list[Tensor], list[Tensor], list[float]]] = {}
        self._undo: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = []

    def _match(self, router: Callable[..., Tensor] | None) -> Tensor | None:
        """The index here of each of the router's tasks, which may come in another order."""
        names = getattr(router, "tasks", None)
        if names is None:
            return None
        unknown = [t for t in names if t not in self.tasks]
        if unknown:
            raise BadInput(
                f"the router picks {unknown[0]!r}, for which there is no expert",
                remedy=f"experts: {', '.join(self.tasks)}",
            )
        return torch.tensor([self.tasks.index(t) for t in names], dtype=torch.long, device="cpu")

    def _find_targets(self) -> dict[str, Tensor]:
        """Parameters and buffers by name; every expert must fit them."""
        state: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        state.update(self.model.named_buffers(remove_duplicate=False))
        for expert in self.experts.values():
            for name, t in expert.tensors.items():
                if name not in state:
                    raise BadInput(
                        f"expert {expert.task!r} changes {name!r}, which the model does not have",
                        remedy="use the model class the experts were extracted from",
                    )
                if tuple(state[name].shape) != t.shape:
                    raise BadInput(
                        f"expert {expert.task!r}: {name!r} is {list(t.shape)}, the model's {list(state[name].shape)}",
                        remedy="use the backbone this expert was extracted with, of the same size",
                    )
        return state

    def _prepared(self, task: str) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[float]]:
        """Targets, positions, values and scales of an expert on the model's device; positions are checked once."""
        expert = self.experts[task]
        names = [n for n, t in expert.tensors.items() if t.index.numel() and t.mu != 0.0]
        targets = [self._targets[n].detach() for n in names]
        held = self._ready.get(task)
        if held is not None and all(a.data_ptr() == b.data_ptr() for a, b in zip(held[0], targets, strict=True)):
            return held
        index, value, scale = [], [], []
        for name, target in zip(names, targets, strict=True):
            t = expert.tensors[name]
            small = torch.int32 if t.numel < 2**31 else torch.int64
            index.append(t.index.to(target.device, small))
            if self.combine == "override":
                wide = torch.float64 if target.dtype == torch.float64 else torch.float32
                origin = self._base[name].reshape(-1)[t.index.long().to(self._base[name].device)].to(wide)
                value.append((origin + t.value.to(origin.device, wide) * t.mu).to(target.device))
                scale.append(1.0)
            else:
                value.append(t.value.to(target.device))
                scale.append(t.mu)
        self._ready[task] = (targets, index, value, scale)
        return self._ready[task]

    @torch.no_grad()
    def use(self, task: str | Mixture | None) -> FreeModel:
        """Put one expert, a mixture {task: weight} of experts, or none in use; what was in use is undone exactly first.

        A mixture needs ``combine="add"``; weights scale the experts (softmax routing). Heads do not mix: a mixture of
        more than one task keeps the model's own head. Returns self.
        """
        wanted = {} if task is None else {task: 1.0} if isinstance(task, str) else dict(task)
        for name in wanted:
            if name not in self.experts:
                raise BadInput(f"no expert for task {name!r}", remedy=f"the tasks are {', '.join(self.tasks)}")
        if len(wanted) > 1 and self.combine == "override":
            raise BadInput(
                "a mixture of experts needs combine='add': put over the backbone, one would hide the other",
                remedy="use one task, or extract the experts with combine='add'",
            )
        if isinstance(task, str) and task == self.task:
            return self
        while self._undo:
            changed, positions, before = self._undo.pop()
            ops.expert_scatter(changed, positions, before, mode="override", check=False)
        self.task = None
        mode = "override" if self.combine == "override" else "add"
        for name, weight in wanted.items():
            fresh = name not in self._ready
            targets, index, value, scale = self._prepared(name)
            if targets:
                scales = [s * weight for s in scale]
                saved = ops.expert_scatter(targets, index, value, scale=scales, mode=mode, check=fresh)
                assert isinstance(saved, list)
                self._undo.append((targets, index, saved))
        only = next(iter(wanted)) if len(wanted) == 1 else None
        self.task = only if only is not None and wanted[only] == 1.0 else None
        self._set_head(only)
        return self

    def _set_head(self, task: str | None) -> None:
        if self._head is None or self.heads is None:
            return
        chosen = self.heads[task] if task is not None and task in self.heads else self._own_head
        parent, _, leaf = self._head.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, chosen)

    @contextmanager
    def using(self, task: str | Mixture | None):  # type: ignore[no-untyped-def]
        """``with free.using("svhn"):`` the expert is in use inside, the backbone alone after."""
        try:
            yield self.use(task)
        finally:
            self.use(None)

    def route(self, *args: Any, **kwargs: Any) -> Tensor:
        """[B] the task index the router picks for every sample (its first maximum). Raises BadInput without a router."""
        if self.router is None:
            raise BadInput("there is no router", remedy="pass router=, or a task")
        with torch.no_grad():
            scores = self.router(*args, **kwargs)
        chosen = scores.argmax(-1) if scores.ndim == 2 else scores.long()
        return chosen if self._columns is None else self._columns.to(chosen.device)[chosen]

    def groups(
        self, *args: Any, tasks: Tensor | Sequence[str] | None = None, **kwargs: Any
    ) -> list[tuple[str, Tensor, Any]]:
        """Runs a batch grouped by expert, each expert swapped in once: [(task, sample indices, output)].

        Tensors among the arguments whose first dimension is the batch's are split; everything else is passed on.
        tasks: one name (oracle) or index per sample instead of the router's choice.
        """
        if tasks is None:
            tasks = self.route(*args, **kwargs)
        choice = (
            torch.tensor([self.tasks.index(t) for t in tasks], dtype=torch.long, device="cpu")
            if not isinstance(tasks, Tensor)
            else tasks.cpu()
        )
        size = choice.numel()
        out = []
        for t in sorted(set(choice.tolist())):  # sorted: the order of swaps does not depend on the batch's order
            picked = (choice == t).nonzero().squeeze(1)
            self.use(self.tasks[t])
            part_args, part_kwargs = _split((args, kwargs), picked, size)
            out.append((self.tasks[t], picked, self.model(*part_args, **part_kwargs)))
        return out

    def forward(self, *args: Any, task: str | Mixture | Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's output with `task` in use for the whole batch, or one task per sample (a list or the router).

        With neither a task nor a router: whatever is in use. Raises BadInput when groups give outputs that do not
        stack (heads of different widths: use ``groups``).
        """
        if isinstance(task, (str, Mapping)):
            return self.use(task).model(*args, **kwargs)
        if task is None and self.router is None:
            return self.model(*args, **kwargs)
        parts = self.groups(*args, tasks=task, **kwargs)
        return _join([p for _, _, p in parts], [i for _, i, _ in parts], sum(i.numel() for _, i, _ in parts))


def _collect(experts: Experts) -> dict[str, Expert]:
    if isinstance(experts, (str, Path)):
        return load_folder(experts)
    listed = experts.values() if isinstance(experts, Mapping) else experts
    loaded = [e if isinstance(e, Expert) else load(e) for e in listed]
    names = list(experts) if isinstance(experts, Mapping) else [e.task for e in loaded]
    if len(set(names)) != len(names) or not names:
        raise BadInput(
            f"experts need different tasks and at least one; got {names}",
            remedy="pass a mapping {task: expert}, which names them anew" if names else "pass at least one expert",
        )
    return dict(zip(names, loaded, strict=True))


def _state(base: Mapping[str, Tensor] | nn.Module) -> Mapping[str, Tensor]:
    return base.state_dict() if isinstance(base, nn.Module) else base


def _split(value: Any, picked: Tensor, size: int) -> Any:
    """`value` with every tensor of `size` rows reduced to the picked ones."""
    if isinstance(value, Tensor):
        return value[picked.to(value.device)] if value.ndim and value.shape[0] == size else value
    if isinstance(value, Mapping):
        return {k: _split(v, picked, size) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_split(v, picked, size) for v in value)
    return value


def _join(parts: Sequence[Any], picked: Sequence[Tensor], size: int) -> Any:
    """Outputs of groups as one output in the batch's order; model outputs, mappings and tuples element by element."""
    first = parts[0]
    if len(parts) == 1 and (not isinstance(first, Tensor) or first.shape[:1] == (size,)):
        order = torch.argsort(picked[0])
        return first if bool((order == torch.arange(size, device="cpu")).all()) else _split(first, order, size)
    if isinstance(first, Tensor):
        if any(p.shape[1:] != first.shape[1:] for p in parts) or sum(p.shape[0] for p in parts if p.ndim) != size:
            shapes = ", ".join(str(tuple(p.shape)) for p in parts)
            raise BadInput(f"outputs of {shapes} do not stack", remedy="FreeModel.groups returns them task by task")
        out = first.new_empty((size, *first.shape[1:]))
        for p, i in zip(parts, picked, strict=True):
            out[i.to(out.device)] = p
        return out
    if isinstance(first, Mapping):
        joined = {k: _join([p[k] for p in parts], picked, size) for k in first}
        return type(first)(**joined) if type(first) is not dict else joined
    if isinstance(first, (list, tuple)):
        items = [_join([p[n] for p in parts], picked, size) for n in range(len(first))]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    return first
