"""What the interpreted tests share."""

import pytest
from triton.runtime.interpreter import GridExecutor


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels launched, in order."""
    names: list[str] = []
    call = GridExecutor.__call__

    def counting(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counting)
    return names
