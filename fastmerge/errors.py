"""The errors a user can cause or has to know of. Everything else that escapes is a bug and keeps its traceback.

A message is one sentence; ``where`` names the place (``recipe.yml:7``, a file, a tensor), ``remedy`` what to do. The
command line prints the three on three lines and ends with ``exit_code``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class FastmergeError(Exception):
    """Base class. ``str(error)`` holds message, place and remedy; the parts are attributes."""

    exit_code = 1

    def __init__(self, message: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.message = message
        self.where = where
        self.remedy = remedy
        super().__init__(message)

    def __str__(self) -> str:
        lines = [self.message]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.remedy:
            lines.append(f"  what to do: {self.remedy}")
        return "\n".join(lines)


class BadInput(FastmergeError, ValueError):
    """A recipe, an argument, a file or a tensor can not be used. Nothing was published. Exit code 2."""

    exit_code = 2

    @classmethod
    def collect(cls, problems: list[BadInput], what: str) -> BadInput:
        """One error that lists every problem found (a pre-flight check reports all of them at once)."""
        if len(problems) == 1:
            return problems[0]
        listed = "\n".join("- " + str(problem).replace("\n", "\n  ") for problem in problems)
        return cls(f"{len(problems)} problems with {what}:\n{listed}")


class Interrupted(FastmergeError):
    """The job stopped before it was published and its work folder can be resumed. Exit code 3."""

    exit_code = 3


def check_choice(what: str, value: object, known: Sequence[str]) -> None:
    """Raises BadInput, which lists them, unless the argument `what` has one of the `known` values."""
    if value not in known:
        hint = did_you_mean(value, known) if isinstance(value, str) else ""
        raise BadInput(
            f"{what} must be one of {', '.join(known)}, not {value!r}{hint}",
            remedy=f"pass one of these, or leave {what} out for its default",
        )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'density'?)``, or the empty string when nothing in `known` is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
