"""fm.align: permutations that bring networks into the frame of the first one, in weight and activation space."""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .._native import threads
from ..errors import BadInput, check_choice
from .features import KINDS, WeightFeatures
from .naming import named_spec, state_of
from .permutation import Permutations, PermutationSpec
from .solve import Match, evaluate, solve
from .units import Signature, Unit, units

Similarity = Literal["pearson", "cosine", "dot"]
PRESETS: dict[str, tuple[float, Similarity]] = {"git-rebasin": (1.0, "dot"), "activation": (0.0, "pearson")}

# What reading a file of another kind, a cut one or an edited one may raise.
UNREADABLE = (OSError, EOFError, zipfile.BadZipFile, ValueError, LookupError, TypeError, AttributeError)


@dataclass(frozen=True)
class Sweep:
    """One pass over all units: the objective is the mean similarity of matched pairs, over the signatures."""

    number: int
    objective: float
    accepted: bool
    changed: int  # units whose permutation changed
    margin: float  # smallest lead of a match over the rest of its row
    seconds: float


@dataclass
class Alignment:
    """Permutations per model (the anchor's are empty) and how they were found. ``out[i] = in[perm[i]]``."""

    spec: PermutationSpec
    perms: list[Permutations]
    trace: list[list[Sweep]]  # per model
    weight_share: float
    values: list[dict[str, float]] = field(default_factory=list)  # per model: matched similarity of each unit

    @property
    def objective(self) -> float:
        """Mean matched similarity over the aligned models (1 = identical up to permutation)."""
        best = [max((s.objective for s in t if s.accepted), default=1.0) for t in self.trace[1:]]
        return sum(best) / len(best) if best else 1.0

    def apply(self, model: Any, index: int) -> Any:
        """Model number `index` in the anchor's frame: a state dict for a state dict, the module itself (changed in place)
        for a module."""
        if isinstance(model, nn.Module):
            model.load_state_dict(self.spec.permute_state(model.state_dict(), self.perms[index]))
            return model
        return self.spec.permute_state(model, self.perms[index])

    def save(self, path: str | Path) -> None:
        """Writes spec, permutations and trace to one .npz file (no pickles in it)."""
        arrays: dict[str, Any] = {
            f"{m}/{g}": p.numpy().astype(np.int32) for m, perms in enumerate(self.perms) for g, p in perms.items()
        }
        about = {
            "spec": json.loads(self.spec.to_json()),
            "models": len(self.perms),
            "weight_share": self.weight_share,
            "trace": [[vars(s) for s in t] for t in self.trace],
            "values": self.values,
        }
        with open(path, "wb") as f:
            np.savez_compressed(f, about=np.array(json.dumps(about)), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Alignment:
        """Reads what `save` wrote; raises BadInput for any other file."""
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as data:
                about = json.loads(str(data["about"]))
                perms: list[Permutations] = [{} for _ in range(about["models"])]
                for key in data.files:
                    if key != "about":
                        m, _, group = key.partition("/")
                        perms[int(m)][group] = torch.from_numpy(data[key].astype(np.int64))
            spec = PermutationSpec.from_json(json.dumps(about["spec"]))
            for p in perms:
                spec.validate(p)
            trace = [[Sweep(**s) for s in t] for t in about["trace"]]
            return cls(spec, perms, trace, about["weight_share"], about["values"])
        except UNREADABLE as error:
            raise BadInput(
                f"not a file of permutations: {getattr(error, 'message', error)}",
                where=str(path),
                remedy="check the path: fastmerge align and Alignment.save write such files",
            ) from error


def resolve_spec(models: Sequence[Any], spec: PermutationSpec | str | None) -> PermutationSpec:
    """The spec asked for: one given, an architecture's name, or (None) the one whose tensor names fit."""
    return spec if isinstance(spec, PermutationSpec) else named_spec(spec, models[0])


def align(
    models: Sequence[Any],
    spec: PermutationSpec | str | None = None,
    *,
    activations: Any = None,
    weight_share: float | Sequence[float] | None = None,
    match: Literal["permute", "zip"] = "permute",
    order: Literal["topological", "random"] = "topological",
    seed: int = 0,
    similarity: Similarity = "pearson",
    preset: Literal["git-rebasin", "activation"] | None = None,
    sweeps: int = 100,
    patience: int = 5,
    score: Callable[[Alignment], float] | None = None,
    reference_bugs: bool = False,
) -> Any:
    """Permutations that bring models 1, 2, … into the frame of model 0 (the anchor).

    Each group of units is matched by linear assignment on ``S = w·S_weight + (1 − w)·S_activation``, S_weight computed
    from the weights under the current permutations of all other groups, over and over until nothing improves.

    Args:
        models: two or more nn.Modules or state dicts of one architecture.
        spec: a PermutationSpec (see :func:`spec_for`), the name of a shipped architecture, or None to recognise one.
        activations: batches of inputs (modules only), or ActivationStatistics; None aligns by weights alone.
        weight_share: w; default 0.5 with activations, 1 without (any other value then raises). A list is searched with
            `score` (the largest wins; it gets the Alignment and should judge it on held-out data).
        match: "permute", or "zip" for ZipIt's many-to-one matching (two models; returns a ZipAlignment).
        order: of the sweeps: "topological" from the inputs (the first pass uses only tensors whose other axes are settled,
            which recovers a permuted copy exactly), or "random" (published; torch.randperm seeded by `seed`).
        similarity: of units: "pearson" (published), "cosine" or "dot" (inner products).
        preset: "git-rebasin" = weights only, inner products; "activation" = activations only.
        sweeps, patience: at most so many sweeps; stop after so many in a row that do not improve the objective. Such a
            sweep is undone, so the objective of accepted sweeps never falls.
        reference_bugs: match the head orders of q, k and of v apart, as the published ViT spec does. The result does not
            preserve the function.

    Returns: Alignment.
    Raises: BadInput for fewer than two models, tensors that do not fit the spec, or options that do not fit together.
    Cost: a sweep is one GEMM of n·n·K per group (K = weights per unit) and one assignment, O(n³); only what moved is
        recomputed.
    Source: MuDSC (arXiv:2403.01753), alg. 1; Git Re-Basin (arXiv:2209.04836), alg. 1; ZipIt (arXiv:2305.03053).
    """
    models = list(models)
    if len(models) < 2:
        raise BadInput(f"align needs two models or more, not {len(models)}", remedy="pass [anchor, other, …]")
    if preset is not None:
        check_choice("preset", preset, list(PRESETS))
        weight_share, similarity = PRESETS[preset]
        activations = activations if preset == "activation" else None
    for name, value, known in (
        ("similarity", similarity, KINDS),
        ("order", order, ("topological", "random")),
        ("match", match, ("permute", "zip")),
    ):
        check_choice(name, value, known)
    shares = _shares(weight_share, activations, score)
    spec = resolve_spec(models, spec)
    if reference_bugs:
        spec = separate_heads(spec)
    states = [state_of(m, f"models[{i}]") for i, m in enumerate(models)]
    _check_states(spec, states)
    statistics = _statistics(models, spec, activations, within=match == "zip")
    found: list[tuple[float, Any]] = []
    for share in shares:
        if match == "zip":
            from .zipping import zip_align

            result: Any = zip_align(spec, states, statistics, share, order, seed, similarity, sweeps, patience)
        else:
            result = _align_all(spec, states, statistics, share, order, seed, similarity, sweeps, patience)
        found.append((score(result) if score is not None and len(shares) > 1 else 0.0, result))
    return max(found, key=lambda pair: pair[0])[1]


def _shares(weight_share: Any, activations: Any, score: Any) -> list[float]:
    if weight_share is None:
        return [0.5 if activations is not None else 1.0]
    shares = [float(w) for w in (weight_share if isinstance(weight_share, Iterable) else [weight_share])]
    for w in shares:
        if not 0.0 <= w <= 1.0:
            raise BadInput(
                f"weight_share must be in [0, 1], not {w}", remedy="1 matches by weights alone, 0 by activations alone"
            )
        if w != 1.0 and activations is None:
            raise BadInput(
                f"weight_share={w} needs activations", remedy="give activations=batches, or leave weight_share at 1"
            )
    if len(shares) > 1 and score is None:
        raise BadInput(
            "weight_share is a list, which is searched, but there is no score",
            remedy="give score=, a function of the Alignment, or one weight_share",
        )
    if not shares:
        raise BadInput("weight_share is an empty list", remedy="give a number in [0, 1], or a list of them to search")
    return shares


def _check_states(spec: PermutationSpec, states: Sequence[Mapping[str, Tensor]]) -> None:
    for i, state in enumerate(states):
        spec.check({k: v.shape for k, v in state.items()}, f"models[{i}]")
        for name in spec.tensors:
            if state[name].is_floating_point() and not bool(state[name].isfinite().all()):
                raise BadInput(f"models[{i}]: {name} holds NaN or Inf", remedy="such a model can not be aligned")


def _statistics(models: Sequence[Any], spec: PermutationSpec, activations: Any, within: bool) -> Any:
    if activations is None:
        return None
    from .activation import ActivationStatistics, activation_statistics

    if isinstance(activations, ActivationStatistics):
        return activations
    return activation_statistics(models, spec, activations, within=within)


def separate_heads(spec: PermutationSpec) -> PermutationSpec:
    """The spec with an order of heads of its own for each kind of inner unit (the published ViT spec; not a symmetry)."""
    from .layout import Layout
    from .permutation import AxisSpec, Group

    groups: dict[str, Group] = {}
    for g in spec.groups.values():
        if g.parents:
            for p in g.parents:
                groups[f"{p}@{g.name}"] = Group(f"{p}@{g.name}", spec.size(p))
            groups[g.name] = Group(g.name, g.size, tuple(f"{p}@{g.name}" for p in g.parents))
        else:
            groups[g.name] = g

    def rename(layout: Layout) -> Layout:
        segments = []
        for segment in layout.segments:
            owner = {p: f for f in segment if isinstance(f, str) for p in spec.parents(f)}
            segments.append(
                tuple(
                    rename(f)
                    if isinstance(f, Layout)
                    else f"{f}@{owner[f]}"
                    if isinstance(f, str) and f in owner
                    else f
                    for f in segment
                )
            )
        return Layout(tuple(segments))

    tensors = {n: tuple(AxisSpec(a.axis, rename(a.layout), a.role) for a in axes) for n, axes in spec.tensors.items()}
    used = {g for axes in tensors.values() for a in axes for g in a.layout.groups()}
    used |= {p for g in used for p in groups[g].parents}
    return PermutationSpec({n: g for n, g in groups.items() if n in used}, tensors, f"{spec.architecture}, heads apart")


def _align_all(spec, states, statistics, share, order, seed, similarity, sweeps, patience) -> Alignment:  # type: ignore[no-untyped-def]
    perms: list[Permutations] = [{}]
    trace: list[list[Sweep]] = [[]]
    values: list[dict[str, float]] = [{}]
    for m in range(1, len(states)):
        block = None if statistics is None else statistics.similarity(m, similarity)
        search = Search(spec, states[0], states[m], block, share, similarity)
        search.run(order, seed, sweeps, patience)
        perms.append(search.perms)
        trace.append(search.trace)
        values.append(search.values)
    return Alignment(spec, perms, trace, share, values)


class Search:
    """Coordinate ascent over the units of one pair of models."""

    def __init__(
        self,
        spec: PermutationSpec,
        anchor: Mapping[str, Tensor],
        other: Mapping[str, Tensor],
        activation: Mapping[Signature, Tensor] | None,
        share: float,
        similarity: str,
    ) -> None:
        self.spec, self.activation, self.share = spec, activation, share
        self.units = units(spec)
        self.features = [WeightFeatures(spec, u, anchor, other, similarity) for u in self.units]
        self.perms: Permutations = spec.identity()
        self.trace: list[Sweep] = []
        self.values: dict[str, float] = {}
        self._matches: list[Match | None] = [None] * len(self.units)
        self._seen: list[Any] = [None] * len(self.units)

    # ---- one unit ----------------------------------------------------------------------------------------------------
    def blend(self, k: int, weight: Mapping[Signature, Tensor]) -> dict[Signature, Tensor]:
        """share · weight + (1 − share) · activation; a signature that no activation shows has its weights alone."""
        if self.activation is None or self.share == 1.0:
            return dict(weight)
        out: dict[Signature, Tensor] = {}
        for s in self.units[k].signatures:
            a, w = self.activation.get(s), weight.get(s)
            if a is None:
                if w is not None and self.share > 0:
                    out[s] = w
            elif w is None or self.share == 0.0:
                out[s] = a
            else:
                out[s] = w.mul_(self.share).add_(a, alpha=1.0 - self.share)
        return out

    def match(self, k: int) -> tuple[Match, bool]:
        """The best match of a unit under the current permutations of the others, and whether it had to be computed."""
        near = self.features[k].neighbours() if self.share > 0 else set()
        seen = {g: self.perms[g] for g in near}
        before = self._seen[k]
        old = self._matches[k]
        if old is not None and before is not None and all(torch.equal(before[g], seen[g]) for g in near):
            return old, False
        weight = self.features[k].similarity(self.perms) if self.share > 0 else {}
        similarities = self.blend(k, weight)
        found = solve(self.spec, self.units[k], similarities)
        current = {g: self.perms[g] for g in self.units[k].groups}
        shown = [s for s in self.units[k].signatures if s in similarities]
        value, _ = evaluate(self.spec, similarities, shown, current, margins=False)
        if value >= found.value:  # nested matching is greedy: never leave a better match
            found = Match(current, *evaluate(self.spec, similarities, shown, current))
        self._matches[k], self._seen[k] = found, seen
        return found, True

    # ---- sweeps ------------------------------------------------------------------------------------------------------
    def batches(self, order: Sequence[int]) -> list[list[int]]:
        """The order cut into runs of units that share no tensor: within a run nothing depends on anything."""
        out: list[list[int]] = []
        taken: set[str] = set()
        for k in order:
            tensors = self.units[k].tensors
            if not out or taken & tensors:
                out.append([])
                taken = set()
            out[-1].append(k)
            taken |= tensors
        return out

    def sweep(self, order: Sequence[int], pool: ThreadPoolExecutor | None) -> tuple[float, int, float]:
        changed, margin = 0, float("inf")
        for batch in self.batches(order):
            found = list((pool.map if pool is not None and len(batch) > 1 else map)(self.match, batch))
            for k, (match, _) in zip(batch, found, strict=True):
                if any(not torch.equal(self.perms[g], p) for g, p in match.perms.items()):
                    changed += 1
                self.perms.update(match.perms)
                self.values[self.units[k].name] = match.value
                margin = min(margin, match.margin)
        return sum(self.values.values()) / max(len(self.values), 1), changed, margin

    def start(self, order: str) -> None:
        """First permutations: from activations when there are any, else along the graph, else the identity."""
        if self.activation is not None:
            for u in self.units:
                known = {s: self.activation[s] for s in u.signatures if s in self.activation}
                if known:
                    self.perms.update(solve(self.spec, u, known).perms)
            return
        if order != "topological":
            return
        done: set[str] = set()
        waiting = list(range(len(self.units)))
        while waiting:
            ready = [(k, self.features[k].aligned(done)) for k in waiting]
            k, only = next(((k, only) for k, only in ready if only), (waiting[0], set()))
            if only:
                self.perms.update(solve(self.spec, self.units[k], self.features[k].similarity(self.perms, only)).perms)
            done |= set(self.units[k].groups)
            waiting.remove(k)

    def run(self, order: str, seed: int, sweeps: int, patience: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        workers = threads()
        pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) if workers > 1 else None
        try:
            self.start(order)
            best, kept, kept_values, bad = -float("inf"), dict(self.perms), {}, 0
            plan = list(range(len(self.units)))
            for number in range(1, sweeps + 1):
                if order == "random" or bad:  # a fixed order that did not help once will not help again
                    plan = torch.randperm(len(self.units), generator=generator, device="cpu").tolist()
                begin = time.perf_counter()
                objective, changed, margin = self.sweep(plan, pool)
                accepted = objective > best
                self.trace.append(Sweep(number, objective, accepted, changed, margin, time.perf_counter() - begin))
                if accepted:
                    best, kept, kept_values, bad = objective, dict(self.perms), dict(self.values), 0
                else:
                    self.perms, bad = dict(kept), bad + 1
                if bad >= patience or changed == 0 or self.share == 0.0:
                    break
            self.perms, self.values = kept, kept_values
        finally:
            if pool is not None:
                pool.shutdown()
                torch.set_num_threads(workers)


__all__ = ["Alignment", "Search", "Sweep", "Unit", "align"]
