"""torch's default device and its lazy negation reach no kernel: tensors are made where their inputs are.

"meta" stands for any default device that is not the CPU: a tensor made on it by mistake has no memory.
"""

import ast
import zlib
from pathlib import Path

import pytest
import torch
from checkpoints import load, near, save, tiny_state
from checks import assert_same_bits, clone_tree, compare, map_tensors
from quadratic import Quadratic, torched, toy
from torch import nn
from torch.utils._device import _device_constructors

import fastmerge as fm
import fastmerge.ops
from fastmerge import fw
from fastmerge._dispatch import Op
from fastmerge.experts import router
from fastmerge.methods import REQUIRED, get, names
from fastmerge.structure import named_spec

PACKAGE = Path(fm.__file__).parent
OPS = [value for name in fastmerge.ops.__all__ if isinstance(value := getattr(fastmerge.ops, name), Op)]
VARIANTS = {
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5},
    "breadcrumbs": {"density": 0.5},
    "nuslerp": {"nuslerp_flatten": False},
    "sce": {"select_topk": 0.4},
    "ties": {"density": 0.3},
}
METHODS = [name for name in names() if not get(name).needs_data and get(name).files_pass is None and name != "mudsc"]


def calls(the_op, count):
    """(what, backend, a maker of fresh inputs) of an operator's first cases, for the backends of CPU tensors."""
    for case in the_op.cases[:count]:
        dtype = case.dtypes[0]
        inputs = case.make(torch.Generator().manual_seed(zlib.crc32(case.name.encode())), dtype)
        for name in ["reference", *the_op.backends]:
            if the_op.why_not(name, *inputs[0], **inputs[1]) is None:
                yield f"{the_op.name} [{name}] {case.name}", name, inputs


def same(got, want, what):
    """The same bits, since the same code ran on the same numbers."""
    if isinstance(want, torch.Tensor):
        assert got.device == want.device, what
        assert_same_bits(got, want, what)
    elif isinstance(want, (list, tuple)):
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            same(g, w, f"{what}[{i}]")
    elif isinstance(want, dict):
        assert got.keys() == want.keys(), what
        for k in want:
            same(got[k], want[k], f"{what}[{k!r}]")
    else:
        assert got == want, what


@pytest.mark.parametrize("the_op", OPS, ids=lambda o: o.name)
def test_operators(the_op):
    count = 0
    for what, backend, inputs in calls(the_op, 6):
        (args, kwargs), (again, options) = clone_tree(inputs), clone_tree(inputs)
        want = the_op(*args, backend=backend, **kwargs)
        with torch.device("meta"):
            got = the_op(*again, backend=backend, **options)
        same(got, want, what)
        same((again, options), (args, kwargs), f"{what}: inputs after the call")
        count += 1
    assert count >= 2


def options_of(name):
    needs = {n: 0.4 for n, p in get(name).parameters.items() if p.default is REQUIRED}
    return needs | VARIANTS.get(name, {})


def family(name):
    base = tiny_state(seed=2)
    most = min(get(name).models[1] or 3, 3)
    return None if get(name).base == "ignored" else base, [near(base, 10 + i) for i in range(max(most, 1))]


@pytest.mark.parametrize("name", METHODS)
def test_methods(name, tmp_path):
    base, models = family(name)
    want = fm.merge(name, base, models, **options_of(name))
    folders = [save(tmp_path / str(i), state) for i, state in enumerate(models)]
    root = None if base is None else save(tmp_path / "base", base)
    with torch.device("meta"):
        same(fm.merge(name, base, models, **options_of(name)), want, name)
        fm.merge(name, root, folders, out=tmp_path / "out", **options_of(name))
    same(load(tmp_path / "out"), want, f"{name}, folders")


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", METHODS)
def test_methods_where_the_gpu_is_the_default(name, device):
    base, models = family(name)
    want = fm.merge(name, base, models, device=device, **options_of(name))
    with torch.device("cuda"):
        same(fm.merge(name, base, models, device=device, **options_of(name)), want, name)


def test_experts_of_free(tmp_path):
    base, models = family("fr")
    folders = [save(tmp_path / str(i), state) for i, state in enumerate(models)]
    root = save(tmp_path / "base", base)
    fm.merge("free", root, folders, out=tmp_path / "want", density=0.2)
    with torch.device("meta"):
        fm.merge("free", root, folders, out=tmp_path / "got", density=0.2)
    same(load(tmp_path / "got"), load(tmp_path / "want"), "free")
    for file in (tmp_path / "want").rglob("*.safetensors"):
        assert (tmp_path / "got" / file.relative_to(tmp_path / "want")).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("solve", [fw.frank_wolfe, fw.frank_wolfe_soft])
def test_frank_wolfe(solve):
    base, candidates, *loss = toy()
    start, pool, gradient = torched(base), [torched(c) for c in candidates], Quadratic(*loss)

    def solved():
        return solve(start, pool, gradient, iterations=3).state_dict

    want = solved()
    with torch.device("meta"):
        same(solved(), want, "state")


def test_alignment_and_zip():
    def network(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

    with torch.random.fork_rng():
        models = [network(0), network(1)]
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))

    def found():
        spec = named_spec("mlp", models[0])
        aligned = fm.align(models, spec)
        return [aligned.perms, fm.mudsc(models, spec, activations=[x]).state]

    want = found()
    with torch.device("meta"):
        same(found(), want, "found")


def test_router():
    g = torch.Generator().manual_seed(0)
    samples = {t: torch.randn(20, 5, generator=g) + i for i, t in enumerate("ab")}
    want = router.train(samples, epochs=2)
    with torch.device("meta"):
        got = router.train(samples, epochs=2)
    same(got.state_dict(), want.state_dict(), "router")


# Parameters and buffers of a module follow the default device, as those of torch's modules do; cases are made by tests.
def factories_without_device(tree):
    factories = {f.__name__.removeprefix("fft_") for f in _device_constructors()}

    def walk(node, given):
        if isinstance(node, ast.ClassDef) and any("nn.Module" in ast.unparse(b) for b in node.bases):
            return
        if isinstance(node, ast.FunctionDef) and (
            any(".case(" in ast.unparse(d) for d in node.decorator_list)
            or any("torch.Generator" in ast.unparse(a) for a in node.args.args)
        ):
            return
        if isinstance(node, ast.Call) and any(k.arg == "device" for k in node.keywords):
            given = {id(n) for n in ast.walk(node.func)}
        named = isinstance(node, ast.Attribute) and node.attr in factories
        if named and id(node) not in given and ast.unparse(node.value) in ("torch", "torch.fft"):
            yield node
        for child in ast.iter_child_nodes(node):
            yield from walk(child, given)

    return walk(tree, set())


def test_the_guard_finds_what_it_must():
    bad = "torch.zeros(3)\ntorch.fft.rfftfreq(4)\n(torch.ones if x else torch.zeros)(3)\nmake = torch.empty\nf(torch.arange(3), device=d)"
    good = "torch.zeros(3, device=x.device)\ntorch.stack([a])\nx.new_zeros(3)\n(torch.ones if x else torch.zeros)(3, device=d)"
    assert len(list(factories_without_device(ast.parse(bad)))) == 6
    assert not list(factories_without_device(ast.parse(good)))


def test_every_tensor_is_made_on_a_device_that_is_said():
    files = [p for p in sorted(PACKAGE.rglob("*.py")) if "demo" not in p.parts]  # the demonstration owns its process
    kernels = sorted((PACKAGE.parent / "triton_kernels").glob("*.py"))
    assert len(files) > 100
    assert len(kernels) > 10
    found = [
        f"{file.relative_to(PACKAGE.parent)}:{node.lineno}: {ast.unparse(node)}"
        for file in files + kernels
        for node in factories_without_device(ast.parse(file.read_text()))
    ]
    assert not found, "without device= these follow torch.set_default_device:\n" + "\n".join(found)


def negated(t):
    """The same values, held with the other sign and torch's lazy negation bit."""
    return torch._neg_view(t.neg()) if t.is_floating_point() else t


@pytest.mark.parametrize("the_op", OPS, ids=lambda o: o.name)
def test_operators_on_lazily_negated_tensors(the_op):
    for what, _, inputs in calls(the_op, 2):
        args, kwargs = clone_tree(inputs)
        if "out" in kwargs:
            continue
        lazy, options = map_tensors(clone_tree(inputs), negated)
        compare(the_op(*lazy, **options), the_op(*args, **kwargs), the_op, what)
        after = map_tensors([lazy, options], torch.Tensor.resolve_neg)
        compare(after, [args, kwargs], the_op, f"{what}: inputs after the call")


def test_lazy_negation_is_named_as_the_reason():
    x = negated(torch.ones(3))
    shown = str(fastmerge.ops.abs_sum.explain(None, [x]))
    assert "cpu: a tensor is negated lazily by torch" in shown
    assert "-> reference" in shown
    with pytest.raises(ValueError, match="weighted_sum: out is negated lazily"):
        fastmerge.ops.weighted_sum(None, [torch.ones(3)], 1.0, out=x)
    imaginary = torch.randn(5, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)).conj().imag
    assert_same_bits(fastmerge.ops.weighted_sum(None, [imaginary], 1.0), imaginary.resolve_neg())


@pytest.mark.parametrize("name", METHODS)
def test_methods_on_lazily_negated_tensors(name):
    base, models = family(name)
    lazy = map_tensors([base, *models], negated)
    same(fm.merge(name, lazy[0], lazy[1:], **options_of(name)), fm.merge(name, base, models, **options_of(name)), name)
