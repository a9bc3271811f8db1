"""Zip merging (ZipIt): features of two networks merged many-to-one, within and across them.

Every signature of the spec has a label per feature of the two models: the merged feature it goes to. Producing axes
average the members of a merged feature, consuming axes add their columns up. Units whose structure allows no zipping
(shared heads of grouped queries, grouped convolutions, tied embeddings) are permuted instead, which is a special case.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BadInput
from ..ops import pearson, zip_match
from .alignment import UNREADABLE, Search, Sweep
from .features import is_feature
from .permutation import AxisSpec, PermutationSpec
from .solve import Match, matched_columns, solve
from .units import Signature, Unit, View, views

Labels = dict[Signature, Tensor]  # [2 · units]: the first model's, then the second's


def key(signature: Signature) -> str:
    return "|".join(signature)


@dataclass
class ZipAlignment:
    """Where every feature of the two models goes, and how that was found."""

    spec: PermutationSpec
    labels: Labels
    trace: list[list[Sweep]]
    weight_share: float
    values: list[dict[str, float]] = field(default_factory=list)
    perms: list[Any] = field(default_factory=lambda: [{}, {}])  # two models, like an Alignment's

    @property
    def objective(self) -> float:
        """Mean similarity of the merges, over the signatures."""
        return max((s.objective for s in self.trace[1] if s.accepted), default=1.0)

    def merge(self, states: Sequence[Mapping[str, Tensor]], weights: Sequence[float] = (0.5, 0.5)) -> dict[str, Tensor]:
        """The merged tensors: Σ weight · (model zipped along all its axes); tensors without groups are averaged."""
        if len(states) != 2:
            raise BadInput(
                f"a zip alignment merges two models, not {len(states)}",
                remedy="give the two it was made from, or align more with match='permute'",
            )
        table = Zipper(self.spec)
        out = {}
        for name, base in states[0].items():
            if not base.is_floating_point():
                out[name] = base.clone()
                continue
            parts = [
                table.zipped(name, s[name].float(), m, self.labels) * w
                for m, (s, w) in enumerate(zip(states, weights, strict=True))
            ]
            out[name] = (parts[0] + parts[1]).to(base.dtype)
        return out

    def save(self, path: str | Path) -> None:
        """Writes spec, labels and trace to one .npz file."""
        about = {
            "spec": json.loads(self.spec.to_json()),
            "kind": "zip",
            "weight_share": self.weight_share,
            "trace": [[vars(s) for s in t] for t in self.trace],
            "values": self.values,
        }
        arrays: dict[str, Any] = {key(s): v.numpy().astype(np.int32) for s, v in self.labels.items()}
        with open(path, "wb") as f:
            np.savez_compressed(f, about=np.array(json.dumps(about)), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> ZipAlignment:
        """Reads what `save` wrote; raises BadInput for any other file."""
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as data:
                about = json.loads(str(data["about"]))
                labels = {
                    tuple(k.split("|")): torch.from_numpy(data[k].astype(np.int64)) for k in data.files if k != "about"
                }
                if about["kind"] != "zip":
                    raise ValueError("the file holds permutations")
            trace = [[Sweep(**s) for s in t] for t in about["trace"]]
            spec = PermutationSpec.from_json(json.dumps(about["spec"]))
            return cls(spec, labels, trace, about["weight_share"], about["values"])
        except UNREADABLE as error:
            raise BadInput(
                f"not a file of zip labels: {getattr(error, 'message', error)}",
                where=str(path),
                remedy="check the path: ZipAlignment.save writes such files, Alignment.load reads permutations",
            ) from error


class Zipper:
    """Applies labels along the axes of tensors."""

    def __init__(self, spec: PermutationSpec) -> None:
        self.spec = spec
        self.by_axis: dict[tuple[str, int], list[View]] = {}
        for v in views(spec):
            self.by_axis.setdefault((v.tensor, v.axis.axis), []).append(v)

    def zipped(self, name: str, tensor: Tensor, model: int, labels: Labels, skip: int | None = None) -> Tensor:
        """One model's tensor with its features merged along every axis but `skip`."""
        crossing = self.spec.crossing(name) if name in self.spec.tensors else {}
        for a in self.spec.tensors.get(name, ()):
            if a.axis != skip and a.axis not in crossing:
                tensor = self._axis(name, tensor, a, model, labels)
        if crossing and model == 1:  # only permuted units cross: undo the labels into permutations
            perms = as_permutations(self.spec, labels, crossing)
            for a in self.spec.tensors[name]:
                if a.axis in crossing and a.axis != skip:
                    tensor = self.spec._permute_crossing(name, tensor, a, crossing[a.axis], perms, _gather)
        return tensor

    def target(self, name: str, a: AxisSpec, model: int, labels: Labels) -> Tensor:
        """The merged position that each position of one model's axis goes to."""
        size = a.layout.size(self.spec.size)
        out = torch.arange(size, device="cpu")
        for v in self.by_axis[name, a.axis]:
            if v.signature in labels:
                label = labels[v.signature]
                n = label.numel() // 2
                positions = v.rows_of_axis(torch.arange(size, device="cpu")[:, None])  # [units, fixed positions]
                out[positions.reshape(-1)] = positions[label[model * n : (model + 1) * n]].reshape(-1)
        return out

    def _axis(self, name: str, tensor: Tensor, a: AxisSpec, model: int, labels: Labels) -> Tensor:
        if not any(v.signature in labels for v in self.by_axis[name, a.axis]):
            return tensor
        size = tensor.shape[a.axis]
        target, share = self.target(name, a, model, labels), torch.ones(size, device="cpu")
        for v in self.by_axis[name, a.axis]:
            if v.signature not in labels:
                continue
            label = labels[v.signature]
            n = label.numel() // 2
            positions = v.rows_of_axis(torch.arange(size, device="cpu")[:, None])  # [units, fixed positions]
            mine = label[model * n : (model + 1) * n]
            if a.role != "in":  # 2 · merge: the two models' parts are averaged afterwards
                weight = 2.0 / torch.bincount(label, minlength=n)[mine].float()
                share[positions.reshape(-1)] = weight[:, None].expand_as(positions).reshape(-1)
        shape = [1] * tensor.ndim
        shape[a.axis] = size
        if not torch.equal(share, torch.ones(size, device="cpu")):
            tensor = tensor * share.view(shape).to(tensor)
        return torch.zeros_like(tensor).index_add_(a.axis, target.to(tensor.device), tensor)


def _gather(tensor: Tensor, indices: Mapping[int, Tensor]) -> Tensor:
    for axis, index in indices.items():
        tensor = tensor.index_select(axis, index.to(tensor.device))
    return tensor


def as_permutations(spec: PermutationSpec, labels: Labels, crossing: Mapping[int, str]) -> dict[str, Tensor]:
    """Permutations of nested groups from labels that are one to one."""
    perms: dict[str, Tensor] = {}
    for leader in set(crossing.values()):
        for signature, label in labels.items():
            if signature[0] != leader or len(signature) != 2:
                continue
            g, c = (spec.size(x) for x in signature)
            source = label[g * c :].argsort().view(g, c)
            perms[leader] = source[:, 0] // c
            perms[signature[1]] = source % c
    return perms


def from_permutations(spec: PermutationSpec, unit: Unit, perms: Mapping[str, Tensor]) -> Labels:
    """The labels that a permutation is: feature perm[i] of the second model goes to feature i."""
    out: Labels = {}
    for s in unit.signatures:
        columns = matched_columns(spec, s, perms)
        out[s] = torch.cat([torch.arange(columns.numel(), device="cpu"), columns.argsort()])
    return out


class ZipSearch(Search):
    """The sweeps of :class:`.alignment.Search` with zip matching; ``perms`` holds labels by signature."""

    def __init__(self, spec, states, activation, share, similarity):  # type: ignore[no-untyped-def]
        super().__init__(spec, states[0], states[1], None, share, similarity)
        self.states, self.both, self.kind = states, activation, similarity
        self.zipper = Zipper(spec)
        self.plain = self.perms
        self.perms = {}
        for u in self.units:
            self.perms.update({key(s): v for s, v in from_permutations(spec, u, self.plain).items()})
        self.names = {key(s): s for u in self.units for s in u.signatures}

    def labels(self) -> Labels:
        return {s: self.perms[k] for k, s in self.names.items()}

    def start(self, order: str) -> None:
        if order == "topological" and self.both is None:
            search = Search(self.spec, self.states[0], self.states[1], None, 1.0, self.kind)
            search.start(order)
            self.plain = search.perms
            for u in self.units:
                self.perms.update({key(s): v for s, v in from_permutations(self.spec, u, self.plain).items()})
        elif self.both is not None:
            for u in self.units:
                known = {s: self.both[s] for s in u.signatures if s in self.both}
                if known:
                    self.perms.update(self._solve(u, known).perms)

    def zippable(self, unit: Unit) -> bool:
        """One plain group, or heads with dims of their own; nothing tied and no grouped convolution."""
        if any(self.spec.crossing(t) for t in unit.tensors) or any(len(s) > 2 for s in unit.signatures):
            return False
        if len(unit.groups) > 1 and any(self.spec.parents(g) != (unit.groups[0],) for g in unit.groups[1:]):
            return False
        roles: dict[tuple[int, int], set[str]] = {}
        for v in unit.views:
            t = self.states[0][v.tensor]
            roles.setdefault((t.data_ptr() if t.numel() else id(t), v.axis.axis), set()).add(v.axis.role)
        return all(len(r) == 1 for r in roles.values())

    def _solve(self, unit: Unit, similarities: Mapping[Signature, Tensor]) -> Match:
        blocks = {s: m[: m.shape[0] // 2, m.shape[0] // 2 :] for s, m in similarities.items()}
        if not self.zippable(unit):
            found = solve(self.spec, unit, blocks)
            labels = from_permutations(self.spec, unit, found.perms)
            return Match({key(s): v for s, v in labels.items()}, found.value, found.margin)
        out: dict[str, Tensor] = {}
        scores: list[float] = []
        pairing: Mapping[str, Tensor] = {}
        if len(unit.groups) > 1:
            pairing = solve(self.spec, unit, blocks).perms
        for s in unit.signatures:
            if s not in similarities:
                if len(s) == 1 and s[0] in pairing:
                    out[key(s)] = from_permutations(self.spec, unit, pairing)[s]
                continue
            matrix = similarities[s].float()
            n = matrix.shape[0] // 2
            if len(unit.groups) == 1:
                match = zip_match(matrix, dense=False)
                out[key(s)] = match.label
                scores.append(float(match.score.double().mean()))
            elif len(s) == 1:
                out[key(s)] = from_permutations(self.spec, unit, pairing)[s]
            else:
                g = self.spec.size(s[0])
                c = n // g
                label = torch.empty(2 * n, dtype=torch.int64, device="cpu")
                for h in range(g):
                    a, b = h * c, n + int(pairing[s[0]][h]) * c
                    members = torch.cat([torch.arange(a, a + c, device="cpu"), torch.arange(b, b + c, device="cpu")])
                    match = zip_match(matrix[members][:, members], dense=False)
                    label[members] = match.label + a
                    scores.append(float(match.score.double().mean()))
                out[key(s)] = label
        return Match(out, sum(scores) / max(len(scores), 1), float("nan"))

    def match(self, k: int) -> tuple[Match, bool]:
        unit = self.units[k]
        labels = self.labels()
        similarities: dict[Signature, Tensor] = {}
        for s in unit.signatures:
            weight = self._weights(unit, s, labels) if self.share > 0 else None
            active = None if self.both is None else self.both.get(s)
            if weight is not None and active is not None:
                similarities[s] = weight.mul_(self.share).add_(active, alpha=1.0 - self.share)
            elif (one := active if active is not None else weight) is not None:
                similarities[s] = one
        return self._solve(unit, similarities), True

    def _weights(self, unit: Unit, signature: Signature, labels: Labels) -> Tensor | None:
        """[2n, 2n] similarity of both models' features, their other axes zipped as things stand."""
        rows = []
        for m, state in enumerate(self.states):
            parts = [
                v.rows(self.zipper.zipped(v.tensor, state[v.tensor].float(), m, labels, skip=v.axis.axis))
                for v in unit.views
                if v.signature == signature and is_feature(v.tensor)
            ]
            if not parts:
                return None
            rows.append(torch.cat(parts, 1))
        x = torch.cat(rows)
        s = x @ x.T if self.kind == "dot" else pearson(x, x, center=self.kind == "pearson")
        return s.nan_to_num_(0.0, 0.0, 0.0)


def zip_align(spec, states, statistics, share, order, seed, similarity, sweeps, patience) -> ZipAlignment:  # type: ignore[no-untyped-def]
    """The zip alignment of two models; see :func:`.alignment.align`."""
    if len(states) != 2:
        raise BadInput(f"match='zip' merges two models, not {len(states)}", remedy="use match='permute'")
    both = None
    if statistics is not None:
        blocks = {p: statistics.similarity(p[1], similarity, p[0]) for p in ((0, 0), (0, 1), (1, 1))}
        both = {
            s: torch.cat([torch.cat([blocks[0, 0][s], x], 1), torch.cat([x.T, blocks[1, 1][s]], 1)])
            for s, x in blocks[0, 1].items()
        }
    search = ZipSearch(spec, states, both, share, similarity)  # type: ignore[no-untyped-call]
    search.run(order, seed, sweeps, patience)
    return ZipAlignment(spec, search.labels(), [[], search.trace], share, [{}, search.values])
