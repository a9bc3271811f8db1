"""A merge method for tests of recipes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest

from fastmerge.methods import Deltas, Density, PerModel, Weight, method
from fastmerge.methods._method import Delta, registered


@pytest.fixture(scope="module")
def probe() -> Iterator[None]:
    """A method with a parameter of every kind."""

    @method(models=(1, 3))
    def probe(
        base: Weight,
        deltas: Deltas,
        *,
        weight: PerModel[float],
        density: PerModel[Density] = 1.0,
        lambda_: float = 1.0,
        normalize: bool = True,
        steps: int = 3,
        scope: Literal["tensor", "model"] = "tensor",
        select: list[str] | None = None,
    ) -> Delta:
        """For tests."""
        raise AssertionError("never run")

    @method(base="ignored", models=(2, 2))
    def probe_pair(base: Weight | None, models: Weight, *, t: float) -> Weight:
        """For tests."""
        raise AssertionError("never run")

    yield
    del registered()["probe"], registered()["probe_pair"]
