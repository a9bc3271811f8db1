"""The launches that are compiled for real GPUs: every kernel, in the dtypes users have, at sizes that divide by nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastmerge import _triton

SCENARIOS: dict[str, Callable[[], object]] = {}
ODD = 4099


def scenario(name: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    def register(f: Callable[[], object]) -> Callable[[], object]:
        SCENARIOS[name] = f
        return f

    return register


def tensors(count: int, dtype: torch.dtype, *shape: int) -> list[torch.Tensor]:
    return [torch.zeros(shape or (ODD,), dtype=dtype) for _ in range(count)]


@scenario("weighted_sum bf16, base and 4 models, normalised")
def _() -> object:
    base, out, *models = tensors(6, torch.bfloat16)
    return _triton.kernel("weighted_sum")(base, models, [0.3] * 4, 1.2, 0.5, out)


@scenario("weighted_sum bf16, base and 8 models, normalised")
def _() -> object:
    base, out, *models = tensors(10, torch.bfloat16)
    return _triton.kernel("weighted_sum")(base, models, [0.3] * 8, 2.4, 0.5, out)


@scenario("weighted_sum fp32, 4 models")
def _() -> object:
    out, *models = tensors(5, torch.float32)
    return _triton.kernel("weighted_sum")(None, models, [0.3] * 4, None, 1.0, out)


@scenario("weighted_sum fp64, base and 2 models, normalised")
def _() -> object:
    base, out, *models = tensors(4, torch.float64)
    return _triton.kernel("weighted_sum")(base, models, [0.3] * 2, 0.6, 0.5, out)


@scenario("weighted_sum bf16, many tensors")
def _() -> object:
    jobs = []
    for _ in range(3):
        base, out, *models = tensors(5, torch.bfloat16)
        jobs.append((base, models, [0.3] * 3, None, 1.0, out))
    return _triton.kernel("weighted_sum", "weighted_sum_many")(jobs)


@scenario("random_mask, the mask alone")
def _() -> object:
    (x,) = tensors(1, torch.bfloat16)
    out = torch.zeros(ODD, dtype=torch.bool)
    return _triton.kernel("random_mask")(x, out, (2**31, 0, 1), key=(1, 2), stream=0, offset=0)


@scenario("random_mask bf16, rescaled")
def _() -> object:
    x, out = tensors(2, torch.bfloat16)
    return _triton.kernel("random_mask")(x, out, (2**31, 0, 1), key=(1, 2), stream=0, offset=0, factor=2.0)


@scenario("random_mask, by rank, inside a call")
def _() -> object:
    (x,) = tensors(1, torch.float32)
    out = torch.zeros(ODD, dtype=torch.bool)
    ranks = torch.zeros(ODD, dtype=torch.int64)
    return _triton.kernel("random_mask")(x, out, (2**30, 2**29, 77), key=(1, 2), stream=0, offset=3, ranks=ranks)


@scenario("topk_mask fp32, one tensor")
def _() -> object:
    (x,) = tensors(1, torch.float32, 1, 2_000_001)
    return _triton.kernel("topk_mask")(x, 400_000, torch.zeros(x.shape, dtype=torch.bool))


@scenario("topk_mask bf16, long rows")
def _() -> object:
    (x,) = tensors(1, torch.bfloat16, 3, 20_001)
    return _triton.kernel("topk_mask")(x, 2000, torch.zeros(x.shape, dtype=torch.bool))


@scenario("topk_mask fp32, rows of 4096")
def _() -> object:
    (x,) = tensors(1, torch.float32, 8, 4096)
    return _triton.kernel("topk_mask")(x, 400, torch.zeros(x.shape, dtype=torch.bool))


@scenario("topk_mask bf16, rows of 16384")
def _() -> object:
    (x,) = tensors(1, torch.bfloat16, 8, 16384)
    return _triton.kernel("topk_mask")(x, 400, torch.zeros(x.shape, dtype=torch.bool))


@scenario("selection of bf16 deltas")
def _() -> object:
    from fastmerge.triton_kernels._select import Segment, select

    base, x = tensors(2, torch.bfloat16, 40_001)
    return select([Segment(base, x, 2000)], torch.zeros(1, 2, dtype=torch.int64), [0])


@scenario("selection of fp64 deltas and of small bf16 ones")
def _() -> object:
    from fastmerge.triton_kernels._select import Segment, select

    segments = [Segment(*tensors(2, torch.float64, 20_001), 4000), Segment(*tensors(2, torch.bfloat16, 1001), 100)]
    return select(segments, torch.zeros(2, 2, dtype=torch.int64), [0, 1])


def _consensus(dtype: torch.dtype, count: int, **options: object) -> object:
    base, out, *models = tensors(count + 2, dtype)
    job = _triton.kernel("consensus_merge", "Job")(
        base=base, models=models, out=out, weights=[0.3] * count, coefficients=[0.3] * count, **options
    )
    return _triton.kernel("consensus_merge")(job)


@scenario("consensus_merge bf16, ties with thresholds, normalised")
def _() -> object:
    return _consensus(torch.bfloat16, 4, trim=1, divisor=1.2, rules=[(5, 6, 2**31 - 1, -1)] * 4)


@scenario("consensus_merge fp32, ties by count")
def _() -> object:
    return _consensus(torch.float32, 3, trim=1, elect=1, rules=[(5, 6, 2**31 - 1, -1)] * 3)


@scenario("consensus_merge bf16, breadcrumbs without election")
def _() -> object:
    return _consensus(torch.bfloat16, 3, trim=2, elect=2, rules=[(5, 6, 7, 8)] * 3)


@scenario("consensus_merge bf16, dare_ties")
def _() -> object:
    return _consensus(torch.bfloat16, 3, trim=3, key=(1, 2), limits=[2**30] * 3)


@scenario("consensus_merge bf16, byte masks and l1 norms")
def _() -> object:
    base, out, *models = tensors(5, torch.bfloat16)
    job = _triton.kernel("consensus_merge", "Job")(
        base=base, models=models, out=out, weights=[0.3] * 3, coefficients=None, trim=4,
        masks=tensors(3, torch.bool),
    )  # fmt: skip
    return _triton.kernel("consensus_merge")(job)


def _highpass(
    which: str,
    height: int,
    width: int,
    cutoff: float,
    dtype: torch.dtype = torch.float32,
    models: int = 0,
    many: int = 0,
) -> object:
    """The filter of one matrix, or a whole merge of `models`, or `many` of them in shared launches."""
    from fastmerge.ops._spectral_mask import spectral_mask

    x, out = tensors(2, dtype, height, width)
    merge = {"base": x, "weights": [0.5] * models, "add_base": True} if models else {}
    mask = spectral_mask(height, width, cutoff, "radial", False)
    if many:
        jobs = [_triton.kernel("highpass_filter", "Job")([x] * max(1, models), out, mask, **merge) for _ in range(many)]
        return _triton.kernel("highpass_filter", "highpass_filter_many")(jobs, which=which)
    return _triton.kernel("highpass_filter")([x] * max(1, models), out, mask, which=which, **merge)


@scenario("highpass_filter fp32, pruned")
def _() -> object:
    return _highpass("pruned", 66, 130, 0.2)


@scenario("highpass_filter fp32, pruned, large tiles")
def _() -> object:
    return _highpass("pruned", 16384, 128, 0.4)


@scenario("highpass_filter fp32, pruned, folded rows")
def _() -> object:
    return _highpass("pruned", 2048, 2048, 0.1)


@scenario("highpass_filter bf16, whole merge, pruned, folded columns")
def _() -> object:
    return _highpass("pruned", 1024, 1536, 0.1, torch.bfloat16, 3)


@scenario("highpass_filter bf16, whole merge, pruned")
def _() -> object:
    return _highpass("pruned", 144, 80, 0.2, torch.bfloat16, 3)


@scenario("highpass_filter fp32, one tile")
def _() -> object:
    return _highpass("staged", 32, 32, 0.5)


@scenario("highpass_filter fp32, staged, the kept part")
def _() -> object:
    return _highpass("staged", 768, 1024, 0.9)


@scenario("highpass_filter bf16, whole merge, staged")
def _() -> object:
    return _highpass("staged", 1024, 1024, 0.3, torch.bfloat16, 3)


@scenario("highpass_filter bf16, fft")
def _() -> object:
    return _highpass("fft", 66, 130, 0.2, torch.bfloat16)


@scenario("highpass_filter bf16, whole merges, pruned, many matrices")
def _() -> object:
    return _highpass("pruned", 144, 80, 0.2, torch.bfloat16, 3, many=3)


@scenario("highpass_filter bf16, whole merges, pruned, folded, many matrices")
def _() -> object:
    return _highpass("pruned", 512, 512, 0.2, torch.bfloat16, 3, many=2)


@scenario("highpass_filter bf16, whole merges, one tile, many matrices")
def _() -> object:
    return _highpass("staged", 32, 32, 0.5, torch.bfloat16, 3, many=3)


@scenario("highpass_filter bf16, whole merges, staged, many matrices")
def _() -> object:
    return _highpass("staged", 1024, 1024, 0.3, torch.bfloat16, 3, many=3)


@scenario("highpass_filter bf16, whole merges, fft, many matrices")
def _() -> object:
    return _highpass("fft", 64, 130, 0.2, torch.bfloat16, 3, many=3)


@scenario("abs_sum bf16 deltas")
def _() -> object:
    base, *models = tensors(4, torch.bfloat16, 9001)
    return _triton.kernel("abs_sum")(base, models)
