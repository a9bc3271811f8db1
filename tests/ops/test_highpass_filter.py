import pytest
import torch
from checks import assert_close, assert_same_bits, check_op

from fastmerge import _native, use_backend
from fastmerge.ops import _highpass_cpu, highpass_filter, weighted_sum
from fastmerge.ops._highpass_cpu import fresh as _fresh
from fastmerge.ops._spectral_mask import spectral_mask
from fastmerge.ops.highpass_filter import bytes_held, two_passes


def published_mask(height, width, mask, cutoff, ring_double):
    """Gain of every bin of a full spectrum, from the definitions, bin by bin."""
    if mask == "radial":
        fy, fx = 2 * torch.fft.fftfreq(height, dtype=torch.float64), 2 * torch.fft.fftfreq(width, dtype=torch.float64)
        return (torch.sqrt(fy[:, None] ** 2 + fx[None] ** 2) >= cutoff).double()
    y = torch.arange(height) - height // 2
    x = torch.arange(width) - width // 2
    d = torch.sqrt((x[None] ** 2 + y[:, None] ** 2).float())
    radius = cutoff * (min(height, width) if mask == "disc_min" else max(height, width))
    if not ring_double:
        return (d <= radius).double()
    r0 = min(height, width) // 10
    return ((d <= r0).float() + ((d >= r0) & (d <= radius)).float()).double()


def published_filter(x, gain):
    return torch.fft.ifft2(torch.fft.fft2(x.double()) * gain).real


SHAPES = [
    (64, 64),
    (100, 140),
    (257, 131),
    (5, 7),
    (9, 768),
    (768, 96),
    (48, 101),
    (101, 48),
    (1, 17),
    (17, 1),
    (1117, 8),
]
MODES = [
    ("radial", 0.1, False),
    ("radial", 0.7, False),
    ("disc_min", 0.7, True),
    ("disc_max", 0.6, True),
    ("disc_min", 0.9, True),
    ("disc_min", 0.7, False),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_parity_with_the_published_formula(shape, mode):
    mask, cutoff, ring = mode
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 1e-3
    gain = published_mask(*shape, mask, cutoff, ring)
    want = published_filter(x, gain)
    got = highpass_filter(x, cutoff, mask=mask, ring_double=ring)
    assert (got.double() - want).abs().max() <= 2e-6 * x.abs().max()
    # The mask itself, bit for bit, symmetrised: the mean of M(k) and M(-k).
    mirrored = gain[(-torch.arange(shape[0])) % shape[0]][:, (-torch.arange(shape[1])) % shape[1]]
    half = ((gain + mirrored) / 2)[:, : shape[1] // 2 + 1]
    assert torch.equal(spectral_mask(*shape, cutoff, mask, ring).gain(), half)


@pytest.mark.parametrize(
    ("shape", "cutoff", "mask", "removed"),
    [
        ((768, 768), 0.7, "disc_min", 113),  # the published scripts' masks, counted in their own arrays
        ((1024, 1024), 0.7, "disc_min", 221),
        ((4096, 4096), 0.7, "disc_min", 3445),
        ((5120, 5120), 0.7, "disc_min", 5305),
        ((768, 768), 0.9, "disc_min", 0),
        ((4096, 4096), 0.9, "disc_min", 0),
        ((3072, 768), 0.6, "disc_max", 0),
        ((50265, 768), 0.6, "disc_max", 0),
    ],
)
def test_bin_counts_of_the_published_masks(shape, cutoff, mask, removed):
    bounds = spectral_mask(*shape, cutoff, mask, False).bounds
    kept = (bounds[..., 1] - bounds[..., 0]).sum(1)
    assert (shape[0] * shape[1] - kept == removed).all()


@pytest.mark.parametrize(
    ("shape", "cutoff", "mask", "percent"),
    [
        ((768, 768), 0.6, "disc_max", 4.91),
        ((4096, 4096), 0.6, "disc_max", 4.91),
        ((2304, 768), 0.7, "disc_min", 57.7),
        ((3072, 768), 0.7, "disc_min", 68.3),
        ((768, 3072), 0.7, "disc_min", 68.3),
        ((11008, 4096), 0.7, "disc_min", 52.8),
        ((32000, 5120), 0.9, "disc_min", 72.8),
        ((50265, 768), 0.7, "disc_min", 98.1),
    ],
)
def test_shares_removed_by_the_published_masks(shape, cutoff, mask, percent):
    bounds = spectral_mask(*shape, cutoff, mask, False).bounds[0]
    kept = int((bounds[:, 1] - bounds[:, 0]).sum())
    assert round(100 * (1 - kept / (shape[0] * shape[1])), 2 if percent < 10 else 1) == percent


def test_ring_bins():
    # d == r0 exactly: 4 bins, 12 where r0 is the long side of an integer right triangle; the Nyquist bin when r0 = 0.
    for size, half_bins in ((100, 3 + 4), (64, 3), (8, 1)):  # r0 = 10 = |(6, 8)|, 6, 0; the half holds columns <= W / 2
        assert len(spectral_mask(size, size, 0.7, "disc_min", True).ring) == half_bins
    assert spectral_mask(8, 8, 0.7, "disc_min", True).ring.tolist() == [[4, 4]]
    assert len(spectral_mask(100, 100, 0.05, "disc_min", True).ring) == 0  # the ring lies outside that disc


def test_golden_values():
    x = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    # spectrum of a 2 x 2 matrix: DC 16, fx = 1: -4, fy = 1: -8, both: 0; radial 1 removes DC, that is the mean
    assert highpass_filter(x, 1.0).tolist() == [[-3.0, -1.0], [1.0, 3.0]]
    assert highpass_filter(x, 1.1).tolist() == [[0.0, 0.0], [0.0, 0.0]]  # keeps the (1, 1) bin only
    assert highpass_filter(x, 0.0).tolist() == x.tolist()
    # disc_min with ring on 2 x 2: the Nyquist bin counts twice, distance 1 bins are in, DC (distance 1.41) is out
    assert highpass_filter(x, 0.5, mask="disc_min", ring_double=True).tolist() == [[-3.0, -1.0], [1.0, 3.0]]


def test_the_filter_is_linear():
    g = torch.Generator().manual_seed(5)
    a, b = torch.randn(2, 90, 70, generator=g, dtype=torch.float64)
    want = 0.3 * highpass_filter(a) - 1.7 * highpass_filter(b)
    assert_close(highpass_filter(0.3 * a - 1.7 * b), want, "fft")


def test_gradient_of_the_reference():
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: highpass_filter(v, 0.5), x)


@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [
        ((torch.zeros(3),), {}, "shape"),
        ((torch.zeros(3, 3, dtype=torch.int64),), {}, "int64"),
        ((torch.zeros(3, 3),), {"mask": "disk"}, "disk"),
        ((torch.zeros(3, 3), -0.1), {}, "cutoff"),
        ((torch.zeros(3, 3), float("nan")), {}, "cutoff"),
        ((torch.zeros(3, 3),), {"ring_double": True}, "ring_double"),
        ((torch.zeros(3, 3),), {"out": torch.zeros(2, 3)}, "out has shape"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", None])
def test_bad_input_is_named(args, kwargs, match, backend):
    with pytest.raises((ValueError, TypeError), match=match):
        highpass_filter(*args, backend=backend, **kwargs)


def test_backends_agree_with_the_reference():
    assert check_op(highpass_filter, backends=["cpu"]) >= 100


@pytest.mark.parametrize(
    "shape", [(700, 512), (2, 301, 480), (3, 1117, 24), (40, 33, 64), (9, 12, 7), (5, 8, 8)], ids=str
)
@pytest.mark.parametrize("mode", [("radial", 0.1, False), ("disc_min", 0.7, True), ("disc_max", 0.3, False)], ids=str)
def test_same_bits_for_any_batch_and_number_of_threads(shape, mode, monkeypatch):
    mask, cutoff, ring = mode
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 1e-3

    def run(t):
        return highpass_filter(t, cutoff, mask=mask, ring_double=ring, backend="cpu")

    want = run(x)
    for limit in (1, 2, 3):  # threads also decide how many transforms go into one block
        with _native.limit_threads(limit):
            assert_same_bits(run(x), want)
    monkeypatch.setattr(_highpass_cpu, "_SHARED", 1)  # blocks on Python's threads
    monkeypatch.setattr(_highpass_cpu, "_ROW_BLOCK", 1)
    monkeypatch.setattr(_native, "threads", lambda: 3)
    assert_same_bits(run(x), want)
    monkeypatch.undo()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_same_bits(run(x), want)
    finally:
        torch.set_num_threads(before)
    matrices = x.reshape(-1, *shape[-2:])
    alone = torch.stack([run(m) for m in matrices])
    assert_same_bits(alone, want.reshape(alone.shape))
    assert_same_bits(run(torch.cat([matrices, matrices]))[len(matrices) :], alone)


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float64,) * 2]
)
@pytest.mark.parametrize("shape", [(53, 96), (64, 2048), (16, 62), (1, 16), (1117, 18), (130, 75), (33, 1117)], ids=str)
@pytest.mark.parametrize("mode", [("radial", 0.1, False), ("disc_min", 0.7, True), ("radial", 2.0, False)], ids=str)
def test_two_passes_have_the_bits_of_sum_and_filter(shape, mode, dtypes):
    """However rows are cut, whichever comes first, and with the sums kept or added up a second time."""
    mask, cutoff, ring = mode
    g = torch.Generator().manual_seed(8)
    base, *models = ((torch.randn(shape, generator=g) * 0.1).to(dtypes[i % 2]) for i in range(4))
    weights = [0.5, -0.25, 1.1]
    compute = torch.float64 if torch.float64 in dtypes else torch.float32
    options = {"mask": mask, "ring_double": ring}
    delta = weighted_sum(base, models, weights, add_base=False, dtype=compute)
    want = weighted_sum(None, [base, highpass_filter(delta, cutoff, backend="cpu", **options)], 1.0, dtype=base.dtype)
    height = shape[0]
    for step, keeps, threads in ((height, True, 2), (1, False, 1), (7, True, 1), (32, False, 3)):
        passes = two_passes(base, shape, compute, _fresh, cutoff, **options)
        assert passes is not None
        kept = torch.full(shape, torch.nan, dtype=compute) if keeps else None
        got = torch.full(shape, torch.nan, dtype=base.dtype)
        blocks = [slice(a, min(a + step, height)) for a in range(0, height, step)]
        with _native.limit_threads(threads):
            for rows in reversed(blocks):
                part = rows.stop - rows.start, base[rows], [m[rows] for m in models], weights
                passes.forward(rows.start, *part, None if kept is None else kept[rows])
            passes.filter_columns()
            for rows in blocks:
                part = rows.stop - rows.start, base[rows], [m[rows] for m in models], weights
                delta_here = None if kept is None else kept[rows]
                passes.inverse(rows.start, *part, got[rows], add_base=True, delta=delta_here)
        assert_same_bits(got, want, f"step {step}")
        if kept is not None:
            assert_same_bits(kept, delta)


def test_what_two_passes_leave_to_others():
    x = torch.zeros(16, 16)
    assert two_passes(x, (16, 16), torch.float32, _fresh, 0.0) is None  # nothing is removed
    with use_backend("reference"):
        assert two_passes(x, (16, 16), torch.float32, _fresh) is None
    thin = bytes_held((128256, 2048), torch.float32, None, mask="radial", ring_double=False)
    assert thin < 0.25 * 4 * 128256 * 2048
    whole = bytes_held((128256, 2048), torch.float32, 0.0, mask="radial", ring_double=False)
    assert whole == 3 * 4 * 128256 * 2048


@pytest.mark.parametrize(("mask", "ring"), [("radial", False), ("disc_min", True), ("disc_max", False)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_huge_cutoff_is_the_largest_one_that_differs(mask, ring, backend):
    x = torch.randn(33, 20, generator=torch.Generator().manual_seed(0))
    largest = 1.5 if mask == "radial" else 60.0
    want = highpass_filter(x, largest, mask=mask, ring_double=ring, backend=backend)
    for cutoff in (1e18, 1e40, 1e300, 1.7e308):
        assert_same_bits(highpass_filter(x, cutoff, mask=mask, ring_double=ring, backend=backend), want)
        assert torch.equal(
            spectral_mask(33, 20, cutoff, mask, ring).bounds, spectral_mask(33, 20, largest, mask, ring).bounds
        )
