"""Errors planted in an operator that tests/checks.py must catch: a checker that passes them is worth nothing."""

import pytest
import torch
from checks import assert_close, assert_same_bits, check_op, map_tensors, relative_rms

from fastmerge._dispatch import op


def make(run, *, numerics="A", kind="elementwise", shape=(31, 17)):
    """An operator that doubles its input, with `run` as its cpu backend."""

    @op(numerics=numerics, kind=kind)
    def double(x):  # type: ignore[no-untyped-def]
        return x * 2

    double.backend("cpu", when=lambda x: None)(run)

    @double.case("normal", torch.float32, torch.bfloat16)
    def _(g, dtype):  # type: ignore[no-untyped-def]
        return (torch.randn(shape, generator=g).to(dtype),), {}

    return double


def into_empty(x):
    out = torch.empty(x.shape, dtype=x.dtype)
    out.copy_(x * 2)
    return out


def last_unwritten(x):
    out = torch.empty(x.shape, dtype=x.dtype)
    out.view(-1)[:-1] = (x * 2).reshape(-1)[:-1]
    return out


def one_ulp(x):
    out = x * 2
    bits = out.view(torch.int32 if x.dtype == torch.float32 else torch.int16)
    bits.view(-1)[5] += 1
    return out


def ignores_strides(x):
    return (x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride()) * 2).contiguous()


def assumes_alignment(x):
    out = x * 2
    if x.data_ptr() % 16:
        out.view(-1)[0] += 1
    return out


PLANTED = {
    "an element that is never written": last_unwritten,
    "one unit in the last place": one_ulp,
    "a wrong dtype": lambda x: (x * 2).double(),
    "a wrong shape": lambda x: (x * 2).view(-1),
    "strides ignored": ignores_strides,
    "alignment assumed": assumes_alignment,
    "an input changed": lambda x: x.mul_(2).clone(),
    "a NaN": lambda x: torch.where(x == x.max(), float("nan"), x * 2),
    "the wrong thing": lambda x: x * 3,
    "no tensor": lambda x: (x * 2).tolist(),
}


def test_a_correct_backend_passes():
    assert check_op(make(into_empty), backends=["cpu"]) == 6  # 2 dtypes, 3 layouts
    assert check_op(make(into_empty, numerics="C"), backends=["cpu"]) == 6


@pytest.mark.parametrize("what", PLANTED)
def test_planted_errors_are_caught(what):
    with pytest.raises(AssertionError):
        check_op(make(PLANTED[what]), backends=["cpu"])


@pytest.mark.parametrize("what", [w for w in PLANTED if w != "one unit in the last place"])
def test_tolerance_classes_catch_them_too(what):
    with pytest.raises(AssertionError):
        check_op(make(PLANTED[what], numerics="C"), backends=["cpu"])


def test_tolerances_tell_rounding_from_error():
    want = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    assert_close(want * (1 + 1e-7), want, "elementwise")
    with pytest.raises(AssertionError, match="relative RMS error"):
        assert_close(want * (1 + 1e-4), want, "elementwise")
    one_off = want.clone()
    one_off[77] += 1.0
    with pytest.raises(AssertionError, match=r"\(77,\)"):
        assert_close(one_off, want, "elementwise")


def test_nan_and_inf_must_be_in_the_same_places():
    want = torch.tensor([1.0, float("nan"), float("inf")])
    assert_close(want.clone(), want, "elementwise")
    for wrong in ([1.0, 2.0, float("inf")], [1.0, float("nan"), -float("inf")], [float("nan")] * 2 + [float("inf")]):
        with pytest.raises(AssertionError):
            assert_close(torch.tensor(wrong), want, "elementwise")


def test_same_bits_sees_the_sign_of_zero_but_no_nan_payload():
    with pytest.raises(AssertionError, match="1 of 2"):
        assert_same_bits(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
    payload = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert_same_bits(payload, torch.tensor([float("nan")]))


def test_an_operator_without_cases_is_an_error():
    bare = op(numerics="A", kind="elementwise")(lambda x: x)
    with pytest.raises(AssertionError, match="no cases"):
        check_op(bare)


def test_a_backend_that_is_named_must_run():
    refuses = make(into_empty)
    refuses.backend("cuda", when=lambda x: "no device")(into_empty)
    assert check_op(refuses) == 6
    with pytest.raises(RuntimeError, match="no device"):
        check_op(refuses, backends=["cuda"])


def test_helpers():
    assert relative_rms(torch.zeros(0), torch.zeros(0)) == 0.0
    assert relative_rms(torch.tensor([1.0]), torch.tensor([0.0])) == 1.0
    tree = {"a": [torch.ones(1), 2], "b": (torch.ones(1),)}
    assert map_tensors(tree, lambda t: t + 1) == {"a": [torch.tensor([2.0]), 2], "b": (torch.tensor([2.0]),)}
