"""The linear minimisation oracle over candidates that stream: one read of each per iteration.

Checkpoints go straight from their files through the kernel, block by block: a block of the gradient is in cache while
all candidates' blocks are read and reduced, so nothing but K·L numbers remains. What has to be computed first (a LoRA
product, a difference from the base) or lies on a GPU is made piece by piece in the thread's buffers and reduced at once.
Either way the sums are those of ``ops.fw_lmo`` on whole tensors, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .. import _native
from .._dispatch import requested_backend
from ..errors import BadInput
from ..io.files import Files
from ..io.pipeline import Pool as Workers
from ..io.pipeline import Source
from ..ops import fw_products
from ..ops.fw_products import BLOCK, FwProducts, Piece, ReadFailed, native
from .candidates import Candidate, Readable, Zeros
from .choice import Part, Products

PIECE = 16 * BLOCK  # elements: large enough that a call's overhead does not show, small enough for the shared cache
GROUP = 4  # candidates per call: bounds the buffers, whatever the number of candidates
CALL = 256 * BLOCK  # elements per call where the kernel reads: bounds its sums of blocks, and how long Ctrl-C waits

Place = Callable[[int, int], "Tensor | Piece"]


class Pool:
    """Candidates and the base they belong to, as vertices of the hull."""

    def __init__(
        self,
        base: Candidate,
        candidates: Sequence[Candidate],
        parts: Mapping[str, Part],
        *,
        space: str,
        lacking: Mapping[str, Sequence[int]],
        workers: Workers,
        files: Files,
    ) -> None:
        self.base, self.candidates, self.parts, self.space = base, list(candidates), dict(parts), space
        self.lacking = {(name, k) for name, ks in lacking.items() for k in ks}
        self.workers, self.files = workers, files
        self.initial = -2  # index of the start among the candidates, when it is one
        self._places: dict[tuple[str, int], Place | None] = {}

    def add_initial(self, initial: Candidate) -> None:
        """The start as the last candidate; unlike the others it holds only this process's part."""
        self.initial = len(self.candidates)
        self.candidates.append(initial)

    @property
    def labels(self) -> list[str]:
        return [c.label for c in self.candidates]

    def vertex(self, name: str, k: int, space: str = "weights") -> Callable[[int, int, str], Tensor]:
        """read(begin, end, key) of candidate k's tensor within this process's part; k = -1 is the zero vertex.

        In the space "weights" a point is a tensor of the model, in "deltas" its difference from the base.
        """
        part = self.parts[name]
        absent = k < 0 or (name, k) in self.lacking
        source: Readable = Zeros() if absent else self.candidates[k].open(name, self.files)
        # A module an adapter lacks is unchanged by it: a zero difference, whatever the space.
        is_delta = (k >= 0 and self.candidates[k].deltas) or (absent and self.space == "deltas")
        shift = int(is_delta) - int(space == "deltas")  # +1: add the base, -1: subtract it
        base = self.base.open(name, self.files) if shift else None
        first = 0 if k == self.initial else part.begin

        def read(begin: int, end: int, key: str) -> Tensor:
            buffers = self.workers.buffers
            x = source.read(first + begin, first + end, buffers, key)
            if base is None:
                return x
            out = buffers.get(key + " moved", end - begin, torch.float32)
            torch.add(x.float(), base.read(part.base + begin, part.base + end, buffers, "origin"), alpha=shift, out=out)
            return out

        return read

    def place(self, name: str, k: int) -> Place | None:
        """place(begin, end) says where candidate k's tensor lies; None when it is not stored as it is wanted.

        Kept from one iteration to the next: finding K·L places anew takes longer than reducing small tensors.
        """
        if (name, k) not in self._places:
            self._places[name, k] = self._find(name, k)
        return self._places[name, k]

    def _find(self, name: str, k: int) -> Place | None:
        candidate = self.candidates[k]
        if self.space != "weights" or candidate.deltas or (name, k) in self.lacking:
            return None
        source = candidate.open(name, self.files)
        if not isinstance(source, Source) or source.dtype not in _native.DTYPES:
            return None
        first = 0 if k == self.initial else self.parts[name].begin
        if source.entry is not None:
            fd, start, dtype = self.files.fd(source.entry.file), source.entry.begin, source.dtype
            return lambda begin, end: Piece(fd, start + (first + begin) * dtype.itemsize, dtype)
        assert source.tensor is not None
        if source.tensor.device.type != "cpu" or not source.tensor.is_contiguous():
            return None  # flattened piece by piece: a copy here would stay
        return _within(source.flat, first)

    def origin(self, name: str) -> Callable[[int, int, str], Tensor]:
        """read(begin, end, key) of the base's tensor within this process's part."""
        part, base = self.parts[name], self.base.open(name, self.files)
        return lambda begin, end, key: base.read(part.base + begin, part.base + end, self.workers.buffers, key)

    def each(self, sizes: Mapping[str, int], visit: Callable[[str, int, int], None]) -> None:
        """visit(name, begin, end) over pieces of all tensors, from several threads, in no particular order."""
        jobs = [(n, at, min(at + PIECE, size)) for n, size in sizes.items() for at in range(0, size, PIECE)]
        self.workers.each(len(jobs), lambda i: visit(*jobs[i]))

    def products(
        self,
        gradients: Mapping[str, Tensor],
        point: Mapping[str, Tensor],
        *,
        norms: Sequence[bool],
        only: Sequence[int] | None = None,
        relative: bool = False,
    ) -> Products:
        """⟨g, s⟩ of every tensor and candidate in one read, with ⟨g, θ⟩ and ‖g‖²; ‖s‖² of those that `norms` marks.

        With `relative` ⟨g, s − θ⟩ and ‖s − θ‖²: the difference is taken before the sums, which lose nothing where
        candidates are near.

        Raises BadInput that names the gradient, candidate and tensor where a product is not finite.
        """
        names, rows = list(gradients), list(range(len(self.candidates))) if only is None else list(only)
        count = len(rows)
        out = Products(
            names,
            *(torch.full((count, len(names)), float("nan"), dtype=torch.float64, device="cpu") for _ in range(2)),
            *(torch.zeros(len(names), dtype=torch.float64, device="cpu") for _ in range(2)),
        )
        done = set() if relative else self._straight(out, gradients, point, norms, rows)
        # Tensors in order of size, the largest first, so that threads end together; a tensor too large for that is cut
        # by candidates (its gradient is then read once per cut).
        total = sum(g.numel() for g in gradients.values())
        jobs: list[tuple[int, list[int], bool]] = []
        for i in sorted(range(len(names)), key=lambda i: -gradients[names[i]].numel()):
            left = [r for r in range(count) if (i, r) not in done]
            large = self.workers.workers > 1 and gradients[names[i]].numel() * 4 * self.workers.workers > total
            step = GROUP if large and gradients[names[i]].numel() > PIECE else max(len(left), 1)
            jobs += [(i, left[at : at + step], False) for at in range(0, len(left), step)]
            if (i, -1) not in done:
                jobs.append((i, [], True))

        def run(j: int) -> None:
            i, members, of_theta = jobs[j]
            name = names[i]
            g = gradients[name].detach().reshape(-1)
            readers = {r: self.vertex(name, rows[r], self.space) for r in members}
            groups = [
                marked[at : at + GROUP]
                for wanted in (True, False)
                for marked in [[r for r in members if norms[r] is wanted]]
                for at in range(0, len(marked), GROUP)
            ]
            carry: list[FwProducts | None] = [None] * (len(groups) + 1)
            theta = point[name].detach().reshape(-1)
            origin = self.origin(name) if self.space == "deltas" else None
            if relative:
                readers = {r: self._from(theta, self.vertex(name, rows[r])) for r in members}
            for begin in range(0, g.numel(), PIECE) or (0,):
                end = min(begin + PIECE, g.numel())
                here = g[begin:end]
                if of_theta:
                    at = theta[begin:end]
                    if relative:
                        at = torch.zeros_like(at)
                    elif origin is not None:
                        at = at - origin(begin, end, "origin").to(at)
                    carry[-1] = fw_products(here, [at], norms=False, carry=carry[-1])
                for n, group in enumerate(groups):
                    read = [readers[r](begin, end, f"fw{m}") for m, r in enumerate(group)]
                    read = [x.to(here.device) for x in read]
                    carry[n] = fw_products(here, read, norms=norms[group[0]], carry=carry[n])
            for group, sums in zip(groups, carry, strict=False):
                assert sums is not None
                out.dots[group, i] = sums.dots.cpu()
                out.squares[group, i] = sums.sqnorms.cpu()
            if carry[-1] is not None:
                out.point[i], out.gradient[i] = carry[-1].dots.cpu()[0], carry[-1].grad_sqnorm.cpu()

        self.workers.each(len(jobs), run)
        self._check_finite(out, gradients, rows)
        return out

    def _from(self, theta: Tensor, read: Callable[[int, int, str], Tensor]) -> Callable[[int, int, str], Tensor]:
        """read(begin, end, key) of s − θ."""

        def moved(begin: int, end: int, key: str) -> Tensor:
            x, here = read(begin, end, key).to(theta.device).float(), theta[begin:end]
            if x.device.type != "cpu":
                return x - here
            return torch.sub(x, here, out=self.workers.buffers.get(key + " step", end - begin, torch.float32))

        return moved

    def _straight(
        self,
        out: Products,
        gradients: Mapping[str, Tensor],
        point: Mapping[str, Tensor],
        norms: Sequence[bool],
        rows: Sequence[int],
    ) -> set[tuple[int, int]]:
        """Fills in the products of everything that is stored as it is wanted; returns (tensor, row), row -1 for θ."""
        if self.space != "weights" or _native.why_not() is not None or requested_backend() not in (None, "cpu"):
            return set()
        done: set[tuple[int, int]] = set()
        batch: list[tuple[int, Tensor, list[Place]]] = []  # consecutive tensors that the same candidates have
        members: list[int] = []

        def flush() -> None:
            if batch:
                self._reduce(out, batch, members, rows, norms)
                done.update((i, r) for i, _, _ in batch for r in [*members, -1])
                batch.clear()

        for i, name in enumerate(out.names):
            g, theta = gradients[name].detach().reshape(-1), point[name].detach().reshape(-1)
            if any(t.device.type != "cpu" or t.dtype not in _native.DTYPES for t in (g, theta)):
                continue
            places = {r: self.place(name, k) for r, k in enumerate(rows)}
            have = [r for r, place in places.items() if place is not None]
            if have != members:
                flush()
                members = have
            found: list[Place] = [p for p in places.values() if p is not None]
            batch.append((i, g, [*found, _within(theta)]))
        flush()
        return done

    def _reduce(
        self,
        out: Products,
        batch: Sequence[tuple[int, Tensor, Sequence[Place]]],
        members: Sequence[int],
        rows: Sequence[int],
        norms: Sequence[bool],
    ) -> None:
        k = len(members)
        wanted = [*(norms[r] for r in members), False]
        totals = torch.zeros(len(batch), 2 * k + 3, dtype=torch.float64, device="cpu")
        # Calls of at most CALL elements: a large tensor takes several, small ones share one.
        call: list[tuple[int, int, int]] = []

        def run() -> None:
            if not call:
                return
            gradients = [batch[b][1][begin:end] for b, begin, end in call]
            streams = [[batch[b][2][c](begin, end) for b, begin, end in call] for c in range(k + 1)]
            try:
                native(gradients, streams, wanted, totals[call[0][0] : call[-1][0] + 1])
            except ReadFailed as error:
                name, label = (
                    out.names[batch[call[error.tensor][0]][0]],
                    self.candidates[rows[members[error.candidate]]].label,
                )
                raise BadInput(
                    f"tensor {name!r} can not be read: {error.strerror or error}", where=label,
                    remedy="the candidate is damaged: fetch it again or remove it",
                ) from error  # fmt: skip
            for stream in streams:
                for g, x in zip(gradients, stream, strict=True):
                    self.files.bytes_read += g.numel() * x.dtype.itemsize if isinstance(x, Piece) else 0
            call.clear()

        held = 0
        for b, (_, g, _) in enumerate(batch):
            for begin in range(0, g.numel(), CALL) or (0,):  # an empty tensor keeps its row
                end = min(begin + CALL, g.numel())
                if held + end - begin > CALL:
                    run()
                    held = 0
                call.append((b, begin, end))
                held += end - begin
        run()
        where = torch.tensor([i for i, _, _ in batch], device="cpu")
        out.point[where], out.gradient[where] = totals[:, k], totals[:, -1]
        for column, r in enumerate(members):
            out.dots[r, where] = totals[:, column]
            if norms[r]:
                out.squares[r, where] = totals[:, k + 1 + column]

    def _check_finite(self, p: Products, gradients: Mapping[str, Tensor], rows: Sequence[int]) -> None:
        if bool(torch.isfinite(p.dots.sum() + p.point.sum() + p.gradient.sum())):
            return
        for i, name in enumerate(p.names):
            if not bool(torch.isfinite(gradients[name]).all()):
                raise BadInput(f"the gradient of {name!r} is not finite", remedy="check the calibration data and loss")
            for r, k in enumerate(rows):
                if not bool(torch.isfinite(p.dots[r, i])):
                    raise BadInput(
                        f"tensor {name!r} holds NaN or Inf (or overflows float32 in the product)",
                        where=self.candidates[k].label,
                        remedy="the candidate is damaged: fetch it again or remove it",
                    )
            if not bool(torch.isfinite(p.point[i])):
                raise BadInput(f"the merged tensor {name!r} is not finite", remedy="lower step_size or scale")
        raise BadInput("the products with the gradient overflow", remedy="scale the loss down")

    def same(self, a: int, b: int) -> bool:
        """Whether two candidates are equal in every merged tensor, element for element."""

        def pieces() -> Iterator[bool]:
            for name, part in self.parts.items():
                x, y = self.vertex(name, a), self.vertex(name, b)
                for at in range(0, part.numel, PIECE):
                    end = min(at + PIECE, part.numel)
                    yield torch.equal(x(at, end, "fw0").float(), y(at, end, "fw1").float())

        return all(pieces())


def _within(flat: Tensor, first: int = 0) -> Place:
    return lambda begin, end: flat[first + begin : first + end]
