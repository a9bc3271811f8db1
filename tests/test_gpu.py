"""Every operator's cases on a real CUDA device: `make test-gpu`. Deselected by `make test`; needs a device to pass."""

import pytest
import torch
from checks import check_op

from fastmerge import ops
from fastmerge._dispatch import Op

OPS = sorted((op for op in vars(ops).values() if isinstance(op, Op)), key=lambda op: op.name)

pytestmark = pytest.mark.gpu


def test_there_is_a_device():
    assert torch.cuda.is_available(), "these tests need a CUDA device and a CUDA build of torch"


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_backends_on_the_device_agree_with_the_reference(op):
    served = [name for name in ("triton", "cuda") if name in op.backends]
    assert check_op(op, device="cuda") > 0 or not served, f"none of {served} could run a single case"
