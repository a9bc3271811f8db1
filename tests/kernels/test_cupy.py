"""The way through CuPy, on a module that stands in for it: launches reach the emulator with CuPy's own calling convention.

What CuPy and NVRTC themselves do is not seen here: test_nvrtc.py compiles the same sources for real GPUs.
"""

import contextlib
import inspect
import sys
import types

import numpy as np
import pytest
import torch
from checks import assert_same_bits, check_op, compare, map_tensors
from kernels.emulated import Emulator

from fastmerge import _cuda, _cupy, ops
from fastmerge._dispatch import Op
from fastmerge.ops import expert_scatter, fw_lmo, fw_step, permute, permute_merge

OPS = sorted((op for op in vars(ops).values() if isinstance(op, Op)), key=lambda op: op.name)


class CUDARuntimeError(RuntimeError):
    pass


class FakeCupy(types.ModuleType):
    """The part of CuPy that fastmerge calls, with the signatures of CuPy 14; older=True lacks Stream.from_external."""

    uint64, uint32 = np.uint64, np.uint32

    def __init__(self, *, devices=1, older=False):
        super().__init__("cupy")
        self.compiled, self.calls, self.current = [], [], []
        self.emulator = Emulator()
        fake = self

        class Device:
            def __init__(self, device=None):
                self.id = device

            def __enter__(self):
                fake.current.append(("device", self.id))

            def __exit__(self, *_):
                fake.current.pop()

        @contextlib.contextmanager
        def on(pointer):
            fake.current.append(("stream", pointer))
            yield
            fake.current.pop()

        class Stream:
            if not older:

                @staticmethod
                def from_external(stream):
                    version, pointer = stream.__cuda_stream__()
                    assert version == 0
                    return on(pointer)

        class Function:
            def __init__(self, name):
                self.name = name

            def __call__(self, grid, block, args, size_t=None, *, shared_mem=0, stream=None):
                assert [type(a) for a in args] == [np.uint64, np.uint64, np.uint32]
                assert block == (256,)
                fake.calls.append((self.name, grid, shared_mem, tuple(fake.current)))
                tasks, first, count = map(int, args)
                (blocks,) = grid
                library = fake.emulator.library
                assert not library.fm_launch(self.name.encode(), blocks, 256, shared_mem, tasks, first, count, 0)

        class Module:
            def load(self, cubin):
                self.source = cubin.decode()

            def get_function(self, name):
                assert f"X({name}," in self.source or name.startswith("expert_scatter_kernel_")
                return Function(name)

        def compile_using_nvrtc(
            source, options=(), arch=None, filename="kern.cu", name_expressions=None, log_stream=None,
            cache_in_memory=False, jitify=None,
        ):  # fmt: skip
            assert ("device", 0) in fake.current or ("device", 1) in fake.current  # CuPy asks the current device
            fake.compiled.append((filename, options))
            return source.encode(), None

        def count():
            if isinstance(devices, Exception):
                raise devices
            return devices

        self.cuda = types.SimpleNamespace(
            Device=Device,
            Stream=Stream,
            ExternalStream=lambda ptr, device_id=-1: on(ptr),
            compiler=types.SimpleNamespace(compile_using_nvrtc=compile_using_nvrtc),
            function=types.SimpleNamespace(Module=Module),
            runtime=types.SimpleNamespace(getDeviceCount=count, CUDARuntimeError=CUDARuntimeError),
        )
        self.from_dlpack = Array


class Array:
    """What speaks DLPack and calls itself CuPy's."""

    __module__ = "cupy"

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **keywords):
        return self.tensor.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


class TorchStream:
    cuda_stream = 77

    def __cuda_stream__(self):
        return 0, self.cuda_stream


def install(monkeypatch, cupy):
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    _cupy._load.cache_clear()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: TorchStream())
    return cupy


@pytest.fixture(autouse=True)
def forget():
    yield
    _cupy._load.cache_clear()


class OnTheCpu(_cupy.Runtime):
    device_type = "cpu"


@pytest.fixture(params=[False, True], ids=["CuPy 14", "CuPy 13"])
def cupy(request, monkeypatch):
    found = install(monkeypatch, FakeCupy(older=request.param))
    with _cuda.use_executor(OnTheCpu()):
        yield found


def test_launches_have_the_grid_the_arguments_and_the_stream(cupy):
    x, perm = torch.randn(40, 64), torch.randperm(40)
    assert_same_bits(permute(x, {0: perm}, backend="cuda", check=False), x[perm])
    assert [(name, grid, shared) for name, grid, shared, _ in cupy.calls] == [("permute_rows_kernel_16", (3,), 0)]
    assert cupy.calls[0][3] == (("device", 0), ("stream", 77))
    wide, columns = torch.randn(9, 512), torch.randperm(512)
    assert_same_bits(permute(wide, {1: columns}, backend="cuda", check=False), wide[:, columns])
    assert cupy.calls[1][:3] == ("permute_columns_kernel_4", (1,), 9 * 512 * 4)


def test_a_source_is_compiled_once_without_contraction_and_without_flushing(cupy):
    for _ in range(2):
        permute(torch.randn(4, 8), {0: torch.randperm(4)}, backend="cuda")
        fw_step([torch.randn(5)], [torch.randn(5)], 0.5, backend="cuda")
    assert cupy.compiled == [("permute.cu", _cupy.OPTIONS), ("fw_step.cu", _cupy.OPTIONS)]
    assert "--fmad=false" in _cupy.OPTIONS
    assert not any("ftz" in o for o in _cupy.OPTIONS)
    assert "RawModule" not in inspect.getsource(_cupy.Runtime._module).replace("Not cupy.RawModule", "")


@pytest.mark.parametrize("op", [permute, permute_merge, expert_scatter, fw_lmo, fw_step], ids=lambda op: op.name)
def test_every_case_through_cupy(cupy, op, monkeypatch):
    monkeypatch.setattr(op, "backends", {"cuda": op.backends["cuda"]})
    monkeypatch.setattr(op, "cases", op.cases[:4])
    assert check_op(op) > 0
    assert cupy.calls


@pytest.mark.parametrize(
    ("devices", "reason"),
    [
        (0, "CuPy finds no CUDA device"),
        (CUDARuntimeError("cudaErrorInsufficientDriver"), "CuPy finds no CUDA device: cudaErrorInsufficientDriver"),
        (1, None),
    ],
)
def test_why_not(monkeypatch, devices, reason):
    install(monkeypatch, FakeCupy(devices=devices))
    assert _cupy.Runtime().why_not(torch.device("cuda")) == reason


def test_without_cupy_the_reason_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    _cupy._load.cache_clear()
    assert "fastmerge[gpu12]" in _cupy.Runtime().why_not(torch.device("cuda"))
    with pytest.raises(ImportError, match=r"fastmerge\[gpu12\]"):
        _cupy.from_tensor(torch.zeros(1))


def test_the_nvcc_build_is_preferred_and_the_choice_is_explained(monkeypatch):
    from fastmerge import _doctor

    install(monkeypatch, FakeCupy())
    monkeypatch.setattr(_cuda.Compiled, "why_not", lambda self, device: "the driver is older than the runtime")
    assert isinstance(_cuda.executor(torch.device("cuda"))[0], _cupy.Runtime)
    assert _doctor._cuda_kernels() == "NVRTC through CuPy (nvcc build: the driver is older than the runtime)"
    monkeypatch.setattr(_cuda.Compiled, "why_not", lambda self, device: None)
    assert isinstance(_cuda.executor(torch.device("cuda"))[0], _cuda.Compiled)
    assert _doctor._cuda_kernels() == "nvcc build"


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_operator_takes_and_gives_cupy_arrays(monkeypatch, op):
    """DLPack in and out, without a copy: what an operator changes in place changes the array."""
    install(monkeypatch, FakeCupy())
    case = next(c for c in op.cases if torch.float32 in c.dtypes)
    want_inputs = case.make(torch.Generator().manual_seed(3), torch.float32)
    want = op(*want_inputs[0], **want_inputs[1])
    inputs = case.make(torch.Generator().manual_seed(3), torch.float32)
    args, kwargs = map_tensors(inputs, Array)
    got = op(*args, **kwargs)
    assert not any(isinstance(v, torch.Tensor) for v in (got if isinstance(got, (list, tuple)) else [got]))
    compare(map_tensors(_plain(got), lambda t: t), want, op, op.name)
    compare(inputs, want_inputs, op, f"{op.name}: inputs after the call")


def test_functions_beside_the_operators_take_arrays_too():
    base, model = torch.randn(5, 6), torch.randn(5, 6)
    for one, other in ((Array(base), Array(model)), (base.numpy(), model.numpy())):
        assert ops.topk_thresholds(one, [other], 0.5) == ops.topk_thresholds(base, [model], 0.5)
        assert_same_bits(ops.gram(one, [other]), ops.gram(base, [model]))


def _plain(value):
    if isinstance(value, Array):
        return value.tensor
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_plain, value))
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(v) for v in value)
    return value


@pytest.mark.parametrize(("driver", "extra"), [("13.0", "gpu13"), ("12.4", "gpu12")])
def test_doctor_advises_the_cupy_that_the_driver_can_run(monkeypatch, driver, extra):
    from fastmerge import _doctor

    monkeypatch.setattr(_doctor, "_cuda_kernels", lambda: "none: nvcc build: X; NVRTC through CuPy: Y")
    native = {"loaded": True, "cuda": None}
    (said,) = (a for a in _doctor._advice(native, {"devices": [{}], "cuda_of_driver": driver}) if "GPU" in a)
    assert f"(nvcc build: X; NVRTC through CuPy: Y): pip install 'fastmerge[{extra}]'" in said
    monkeypatch.setattr(_doctor, "_cuda_kernels", lambda: "NVRTC through CuPy (nvcc build: X)")
    assert not [a for a in _doctor._advice(native, {"devices": [{}], "cuda_of_driver": driver}) if "GPU" in a]
