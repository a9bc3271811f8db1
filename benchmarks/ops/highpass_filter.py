import math

import torch

from ..declare import Bench, Variant, randn


def torch_pair(x, cutoff=None, *, mask="radial", ring_double=False, out=None):  # type: ignore[no-untyped-def]
    """One real FFT pair with the mask ready made (here: none at all), the least a plain PyTorch user runs."""
    return torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape[-2:])


def cupy_pair(x, cutoff=None, *, mask="radial", ring_double=False, out=None):  # type: ignore[no-untyped-def]
    """The same pair with CuPy's cuFFT."""
    import cupy

    return cupy.fft.irfft2(cupy.fft.rfft2(x), s=x.shape[-2:])


def _variant(name, shape, dtype=torch.float32, quick=True, **kwargs):  # type: ignore[no-untyped-def]
    def make(device):  # type: ignore[no-untyped-def]
        x = randn(*shape, dtype=dtype, scale=0.002, device=device)
        return (x,), {"out": torch.empty_like(x), **kwargs}

    numel = math.prod(shape)
    return Variant(
        f"{name} {'x'.join(map(str, shape))}",
        make,
        bytes=2 * numel * dtype.itemsize,
        flops=5 * numel * math.log2(shape[-1] * shape[-2]),
        quick=quick,
    )


PUBLISHED = {"mask": "disc_min", "cutoff": 0.7, "ring_double": True}
BENCH = Bench(
    "highpass_filter",
    (
        _variant("radial 0.1", (4096, 4096)),
        _variant("disc_min 0.7", (4096, 4096), **PUBLISHED),
        _variant("disc_max 0.6", (4096, 4096), mask="disc_max", ring_double=True),
        _variant("radial 0.1", (50265, 768)),
        _variant("disc_min 0.7", (50265, 768), **PUBLISHED),
        _variant("radial 0.1, batch", (64, 256, 256)),
        _variant("radial 0.1", (32000, 4096), quick=False),
        _variant("disc_min 0.7", (32000, 4096), quick=False, **PUBLISHED),
        _variant("radial 0.1", (128256, 2048), quick=False),
    ),
    {"torch rfft2 + irfft2": torch_pair},
    cupy={"cupy.fft": cupy_pair},
)
