"""How the indices of one tensor axis are made of permutation groups: a small language.

An axis is a sum of segments (a concatenation), a segment is a product of factors (row-major, the outermost first), a
factor is the name of a group, a whole number (that many fixed positions) or a parenthesised axis:

    "stream"                              the residual stream
    "features * 49"                       49 positions of every channel, flattened
    "heads * qk + heads * qk + heads * v" a fused qkv projection
    "heads * (qk + qk + v)"               the same, interleaved head by head
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Factor: TypeAlias = "str | int | Layout"
Segment: TypeAlias = "tuple[Factor, ...]"
_TOKEN = re.compile(r"\s*(?:(\d+)(?![\w.])|([\w.{}:/-]+)|([*+()]))")
_FORM = "write sums of products of groups and numbers, as in 'heads * (qk + qk + v) + rest * 64'"


@dataclass(frozen=True)
class Layout:
    """An axis as a sum of segments, each a product of factors. Immutable and hashable; ``str`` gives the text form."""

    segments: tuple[Segment, ...]

    @classmethod
    def parse(cls, text: str) -> Layout:
        """The layout of a text; raises ValueError that shows where it stops making sense."""
        tokens: list[str | int] = []
        at = 0
        while at < len(text.rstrip()):
            m = _TOKEN.match(text, at)
            if m is None:
                raise ValueError(f"layout {text!r}: unexpected {text[at:].strip()!r}; {_FORM}")
            tokens.append(int(m[1]) if m[1] else (m[2] or m[3]))
            at = m.end()
        layout, rest = _parse_sum(tokens, text)
        if rest:
            raise ValueError(f"layout {text!r}: unexpected {rest[0]!r}; {_FORM}")
        return layout

    def __str__(self) -> str:
        def factor(f: Factor) -> str:
            return f"({f})" if isinstance(f, Layout) else str(f)

        return " + ".join(" * ".join(factor(f) for f in s) or "1" for s in self.segments)

    def groups(self) -> Iterator[str]:
        """Every group named, in order, repeats included."""
        for segment in self.segments:
            for f in segment:
                if isinstance(f, str):
                    yield f
                elif isinstance(f, Layout):
                    yield from f.groups()

    def size(self, sizes: Callable[[str], int]) -> int:
        return sum(segment_size(s, sizes) for s in self.segments)

    def rename(self, name: Callable[[str], str]) -> Layout:
        def factor(f: Factor) -> Factor:
            return f.rename(name) if isinstance(f, Layout) else name(f) if isinstance(f, str) else f

        return Layout(tuple(tuple(factor(f) for f in s) for s in self.segments))


def _parse_sum(tokens: list[str | int], text: str) -> tuple[Layout, list[str | int]]:
    segments: list[Segment] = []
    while True:
        factors: list[Factor] = []
        while True:
            if not tokens or tokens[0] in ("*", "+", ")"):
                raise ValueError(f"layout {text!r}: a group name or a number is missing; {_FORM}")
            head, tokens = tokens[0], tokens[1:]
            if head == "(":
                inner, tokens = _parse_sum(tokens, text)
                if not tokens or tokens[0] != ")":
                    raise ValueError(f"layout {text!r}: a parenthesis is not closed; {_FORM}")
                tokens = tokens[1:]
                factors.append(inner)
            else:
                factors.append(head)
            if not tokens or tokens[0] != "*":
                break
            tokens = tokens[1:]
        segments.append(tuple(factors))
        if not tokens or tokens[0] != "+":
            return Layout(tuple(segments)), tokens
        tokens = tokens[1:]


def factor_size(f: Factor, sizes: Callable[[str], int]) -> int:
    return f if isinstance(f, int) else sizes(f) if isinstance(f, str) else f.size(sizes)


def segment_size(segment: Segment, sizes: Callable[[str], int]) -> int:
    n = 1
    for f in segment:
        n *= factor_size(f, sizes)
    return n


def _coordinates(segment: Segment, sizes: Callable[[str], int]) -> tuple[list[int], list[Tensor]]:
    """Sizes of a segment's factors and, for each flat position, the position within each factor."""
    widths = [factor_size(f, sizes) for f in segment]
    n = segment_size(segment, sizes)
    flat = torch.arange(n, device="cpu")
    out, stride = [], n
    for w in widths:
        stride = stride // w if w else 0
        out.append((flat // max(stride, 1)) % max(w, 1))
    return widths, out


Perms: TypeAlias = Mapping[str, Tensor]
Parents: TypeAlias = Callable[[str], "tuple[str, ...]"]


def source_index(
    layout: Layout,
    perms: Perms,
    sizes: Callable[[str], int],
    parents: Parents,
    env: Mapping[str, Tensor] | None = None,
    rows: int = 1,
) -> Tensor:
    """Where each position of the axis is gathered from: [rows, size], the gather convention ``out[i] = in[index[i]]``.

    A group that depends on others (parents) has one permutation per position of those: perms[g][p1, ..., :]. `env` gives,
    per row, the position of groups outside this layout (an enclosing segment, or another axis of the tensor).
    """
    env = env or {}
    pieces, offset = [], 0
    for segment in layout.segments:
        widths, coordinates = _coordinates(segment, sizes)
        here: dict[str, Tensor] = {k: v.reshape(-1, 1) for k, v in env.items()}
        for f, c in zip(segment, coordinates, strict=True):
            if isinstance(f, str):
                here[f] = c.reshape(1, -1)
        n = coordinates[0].numel() if coordinates else 1
        total = torch.zeros(rows, n, dtype=torch.int64, device="cpu")
        for f, width, c in zip(segment, widths, coordinates, strict=True):
            at: Tensor
            if isinstance(f, int) or (isinstance(f, str) and f not in perms):
                at = c.reshape(1, -1)
            elif isinstance(f, str):
                where = [here[p] for p in parents(f)]
                at = perms[f][tuple([*where, c.reshape(1, -1)])]
            else:
                inner_env = {k: v.expand(rows, n).reshape(-1) for k, v in here.items()}
                inner = source_index(f, perms, sizes, parents, inner_env, rows * n)
                at = inner.gather(1, c.repeat(rows).reshape(-1, 1)).reshape(rows, n)
            total = total * width + at
        pieces.append(total + offset)
        offset += n
    return torch.cat(pieces, 1) if pieces else torch.zeros(rows, 0, dtype=torch.int64, device="cpu")


def free_parents(layout: Layout, parents: Parents) -> set[str]:
    """Parents of groups of the layout that the layout itself (in the same segment) does not hold."""
    out: set[str] = set()
    for segment in layout.segments:
        have = {f for f in segment if isinstance(f, str)}
        for f in segment:
            needs = set(parents(f)) if isinstance(f, str) else free_parents(f, parents) if isinstance(f, Layout) else ()
            out |= set(needs) - have
    return out
