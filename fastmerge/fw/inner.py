"""The inner merge: θ' = MergeFn(θ, [s], η), any registered method with the current point as its base.

Task arithmetic is the Frank-Wolfe step itself, θ + η(s − θ), and streams in place. Every other method gets θ and the
whole vertex in memory: one model more, whatever the number of candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import methods
from ..errors import BadInput
from ..io.checkpoint import Checkpoint, from_state_dict
from ..merging import merge_checkpoints
from ..ops import fw_step
from ..recipe import Recipe
from .problem import Problem, State

SCALES = ("lambda", "t")  # the parameter that takes the step size, in order of preference


class Inner:
    """A registered method as the merge function of one step (and of the start)."""

    def __init__(self, name: str, parameters: Mapping[str, Any] | None, *, seed: int) -> None:
        self.method = methods.get(name)
        self.name, self.seed = self.method.name, seed
        self.parameters = dict(parameters or {})
        known = self.method.parameters
        if self.method.needs_data or not any(s in known for s in SCALES):
            raise BadInput(
                f"{name} can not be the inner merge: it has no parameter lambda or t to take the step size",
                remedy="use task_arithmetic, ties, dare_ties, della, fr or another method with a lambda",
            )
        for key in self.parameters:
            if key not in known:
                raise BadInput(f"inner_parameters: {name} has no {key!r}", remedy=f"it has {', '.join(known)}")
            if key in SCALES:
                raise BadInput(
                    f"inner_parameters: {key} is the step size, set by scale and step_size",
                    remedy=f"leave {key} out, and give scale= or step_size=",
                )
        if "weight" in known:
            self.parameters.setdefault("weight", 1.0)
        self.scale = next(s for s in SCALES if s in known)
        self.linear = self.name == "task_arithmetic" and self.parameters == {"weight": 1.0}

    def merge(self, base: Checkpoint, others: Sequence[Checkpoint], step: float, seed: int) -> State:
        """The method over checkpoints, to float32 tensors in memory."""
        parameters = {**self.parameters, self.scale: step}
        labels = [f"models[{i}]" for i in range(len(others))]
        recipe = Recipe.from_call(self.name, "base", labels, parameters, out_dtype="float32", seed=seed)
        return merge_checkpoints(recipe, base, others)

    def start(self, problem: Problem, scale: float) -> None:
        """θ = MergeFn(base, all candidates, scale)."""
        if self.linear:
            problem.start_from_sum(scale)
            return
        base = only(problem.base.checkpoint, problem.names)
        lacking = {k for _, k in problem.pool.lacking}
        everyone = [
            # Files are streamed; adapters and incomplete candidates are made whole first.
            from_state_dict(vertex(problem, k), c.label)
            if c.deltas or k in lacking
            else only(c.checkpoint, problem.names)
            for k, c in enumerate(problem.pool.candidates)
        ]
        merged = self.merge(base, everyone, scale, self.seed)
        problem.theta = {n: t.to(problem.device) for n, t in merged.items()}

    def step(
        self, problem: Problem, theta: State, picks: Mapping[str, int], step: float | Mapping[str, float], t: int
    ) -> None:
        """Moves `theta` in place towards the picked vertex of each tensor, by one step or (linear only) each its own."""
        if self.linear:
            steps = step if isinstance(step, Mapping) else dict.fromkeys(picks, step)

            def move(name: str, begin: int, end: int) -> None:
                here = theta[name].view(-1)[begin:end]
                k = picks[name]
                s: Tensor | None = None
                if k >= 0 or problem.space == "deltas":
                    s = problem.pool.vertex(name, k)(begin, end, "fw0").to(here.device)
                fw_step([here], [s], steps[name])

            problem.pool.each({n: theta[n].numel() for n in picks if steps[n]}, move)
            return
        assert not isinstance(step, Mapping)
        here = from_state_dict({n: theta[n] for n in picks}, "the current point")
        target = from_state_dict({n: vertex(problem, k, [n])[n] for n, k in picks.items()}, "the vertex")
        # Random methods draw anew in every iteration.
        for n, merged in self.merge(here, [target], step, self.seed + 1 + t).items():
            theta[n].copy_(merged)

    def direction(self, problem: Problem, picks: Mapping[str, int], gradients: Mapping[str, Tensor]) -> Tensor:
        """[tensors of picks, 2] ⟨g, θ − s⟩ and ‖s − θ‖² over all processes, one read of the picked vertices."""
        found: dict[tuple[str, int], Tensor] = {}

        def add(name: str, begin: int, end: int) -> None:
            here = problem.theta[name].view(-1)[begin:end]
            k = picks[name]
            s: Tensor | None = None
            if k >= 0 or problem.space == "deltas":
                s = problem.pool.vertex(name, k)(begin, end, "fw0").to(here.device)
            g = gradients[name].detach().reshape(-1)[begin:end]
            sums = fw_step([here], [s], 0.0, gradients=[g])
            assert sums is not None
            found[name, begin] = sums.cpu()

        counted = {n: problem.parts[n].numel for n in picks if n in gradients and problem.layout.counts(n)}
        problem.pool.each(counted, add)
        row = {n: i for i, n in enumerate(picks)}
        out = torch.zeros(len(picks), 2, dtype=torch.float64, device="cpu")
        for name, begin in sorted(found):  # in a fixed order, whatever the threads did
            out[row[name]] += found[name, begin][0]
        return problem.layout.reduce(out) * torch.tensor([-1.0, 1.0], dtype=torch.float64, device="cpu")


def only(checkpoint: Checkpoint, names: Sequence[str]) -> Checkpoint:
    """The same checkpoint seen as holding just these tensors, each under its own name."""
    out = Checkpoint(checkpoint.label, checkpoint.folder)
    for name in names:
        held = checkpoint.aliases.get(name, name)
        if held in checkpoint.entries:
            out.entries[name] = checkpoint.entries[held]
        else:
            out.resident[name] = checkpoint.resident[held]
    return out


def vertex(problem: Problem, k: int, names: Sequence[str] | None = None) -> State:
    """Candidate k's weights whole, in float32."""
    out: State = {}
    for name in problem.names if names is None else names:
        out[name] = torch.empty(problem.local_shape(name), dtype=torch.float32, device=problem.device)
        flat = out[name].view(-1)

        def read(name: str, begin: int, end: int, flat: Tensor = flat) -> None:
            flat[begin:end] = problem.pool.vertex(name, k)(begin, end, "fw0")

        problem.pool.each({name: flat.numel()}, read)
    return out
