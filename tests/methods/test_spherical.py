"""slerp, nuslerp, multislerp, karcher, model_stock, nearswap, passthrough against their formulas on whole vectors."""

import math

import pytest
import torch
from checkpoints import load, near, save, tiny_state
from checks import assert_same_bits, relative_rms

import fastmerge as fm
from fastmerge.errors import BadInput


def vectors(count, shape=(7, 9), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(count)]


def merged(method, base, models, **parameters):
    state = fm.merge(method, None if base is None else {"w": base}, [{"w": m} for m in models], **parameters)
    return state["w"]


def close(got, want):
    assert relative_rms(got, want) < 1e-12


def angle(a, b):
    return math.acos(float((a * b).sum() / (a.norm() * b.norm())))


def test_slerp_is_the_formula_and_linear_when_colinear():
    a, b = vectors(2)
    phi = angle(a, b)
    want = math.sin(0.7 * phi) / math.sin(phi) * a + math.sin(0.3 * phi) / math.sin(phi) * b
    close(merged("slerp", a, [b], t=0.3), want)
    close(merged("slerp", a, [a * 2], t=0.25), 1.25 * a)
    close(merged("slerp", a, [b], t=0.0), a)


def test_slerp_golden_quarter_circle():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    got = merged("slerp", a, [b], t=0.5)
    half = math.sin(math.pi / 4)
    assert torch.allclose(got, torch.tensor([half, 2 * half]))


@pytest.mark.parametrize("with_base", [False, True])
def test_nuslerp_flat_rows_and_columns(with_base):
    a, b = vectors(2)
    base = vectors(1, seed=5)[0] if with_base else None
    x, y = (a, b) if base is None else (a - base, b - base)
    back = 0.0 if base is None else base
    t = 0.6 / (0.2 + 0.6)

    def rule(u, v):
        phi = angle(u, v)
        return math.sin((1 - t) * phi) / math.sin(phi) * u + math.sin(t * phi) / math.sin(phi) * v

    close(merged("nuslerp", base, [a, b], weight=[0.2, 0.6]), rule(x, y) + back)
    rows = torch.stack([rule(u, v) for u, v in zip(x, y, strict=True)])
    close(merged("nuslerp", base, [a, b], weight=[0.2, 0.6], nuslerp_flatten=False), rows + back)
    columns = torch.stack([rule(u, v) for u, v in zip(x.T, y.T, strict=True)]).T
    got = merged("nuslerp", base, [a, b], weight=[0.2, 0.6], nuslerp_flatten=False, nuslerp_row_wise=True)
    close(got, columns + back)
    close(merged("nuslerp", base, [a, a], weight=[0.5, -0.5]), a)  # weights that cancel: t = 0.5; colinear: linear


@pytest.mark.parametrize("with_base", [False, True])
def test_multislerp_is_the_formula(with_base):
    models = vectors(3)
    base = vectors(1, seed=7)[0] if with_base else None
    xs = models if base is None else [m - base for m in models]
    w = [0.5, 0.3, 0.2]
    us = [x / (x.norm() + 1e-8) for x in xs]
    m = sum(a * u for a, u in zip(w, us, strict=True))
    m = m / m.norm()
    tangent = sum(a * (u - (u * m).sum() * m) for a, u in zip(w, us, strict=True))
    n = tangent.norm()
    want = (m * n.cos() + tangent * n.sin() / n) * sum(a * x.norm() for a, x in zip(w, xs, strict=True))
    close(merged("multislerp", base, models, weight=[5.0, 3.0, 2.0]), want + (0.0 if base is None else base))


def test_multislerp_vanishing_mean():
    a = vectors(1)[0]
    with pytest.raises(BadInput, match=r"'w'.*vanishes"):
        merged("multislerp", None, [a, -a, a * 0], weight=1.0)
    close(merged("multislerp", None, [a, -a], weight=[0.5, 0.5]), a * 0)
    with pytest.raises(BadInput, match="sum to 0"):
        merged("multislerp", None, [a, a], weight=[1.0, -1.0])


def test_karcher_is_the_iteration():
    models = vectors(4)
    us = [m / m.norm() for m in models]
    m = sum(us) / 4
    m = m / m.norm()
    for _ in range(10):
        tangent = torch.zeros_like(m)
        for u in us:
            cos = (u * m).sum()
            theta = torch.acos(cos)
            tangent = tangent + 0.25 * theta / theta.sin() * (u - cos * m)
        n = tangent.norm()
        if n < 1e-5:
            break
        m = m * n.cos() + tangent / n * n.sin()
        m = m / m.norm()
    close(merged("karcher", None, models), m * sum(x.norm() for x in models) / 4)


def test_karcher_leaves_vanishing_inputs_out():
    a = vectors(1)[0]
    close(merged("karcher", None, [a, a * 0]), a)
    close(merged("karcher", None, [a * 0, a * 0]), a * 0)


def test_model_stock_whole_and_per_row():
    base, *models = vectors(4)
    deltas = [m - base for m in models]

    def ratio(ds):
        c = (
            sum(
                float((a * b).sum() / (a.norm() * b.norm()))
                for a, b in [(ds[0], ds[1]), (ds[0], ds[2]), (ds[1], ds[2])]
            )
            / 3
        )
        return 3 * c / (1 + 2 * c)

    mean = sum(models) / 3
    t = ratio(deltas)
    close(merged("model_stock", base, models), t * mean + (1 - t) * base)
    rows = []
    for i in range(len(base)):
        t = ratio([d[i] for d in deltas])
        rows.append(t * mean[i] + (1 - t) * base[i])
    close(merged("model_stock", base, models, filter_wise=True), torch.stack(rows))


def test_nearswap_golden():
    a, b = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([0.5, 1.0, 4.0, 3.1])
    want = torch.tensor([0.4 * 0.5, 1.0, 0.9 * 2 + 0.1 * 4, 3.1])
    assert torch.allclose(merged("nearswap", a, [b], t=0.2), want)


def test_passthrough_copies_bits_and_scales():
    a = torch.tensor([1.0, -0.0, 3.0]).bfloat16()
    assert_same_bits(merged("passthrough", None, [a]), a)
    assert merged("passthrough", None, [a], scale=2.0).tolist() == [2.0, 0.0, 6.0]


@pytest.mark.parametrize(
    ("method", "base", "count", "parameters"),
    [
        ("slerp", True, 1, {"t": 0.4}),
        ("nuslerp", True, 2, {"weight": [0.4, 0.6]}),
        ("multislerp", False, 3, {"weight": 1.0}),
        ("karcher", False, 3, {}),
        ("model_stock", True, 3, {}),
        ("nearswap", True, 1, {"t": 0.05}),
        ("passthrough", False, 1, {}),
    ],
)
def test_folders_and_memory_agree_bit_for_bit(tmp_path, method, base, count, parameters):
    states = [tiny_state(0), *(near(tiny_state(0), i + 1) for i in range(count))]
    folders = [save(tmp_path / str(i), s) for i, s in enumerate(states)]
    want = fm.merge(method, states[0] if base else None, states[1:], **parameters)
    fm.merge(method, folders[0] if base else None, folders[1:], out=tmp_path / "out", **parameters)
    for name, got in load(tmp_path / "out").items():
        assert_same_bits(got, want[name], name)


def test_wrong_numbers_of_models_are_named():
    a = vectors(1)[0]
    with pytest.raises(BadInput, match="slerp"):
        merged("slerp", a, [a, a], t=0.5)
    with pytest.raises(BadInput, match="karcher"):
        merged("karcher", None, [a])
