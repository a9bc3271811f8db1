"""What the frequency filter sees: radial spectra of task deltas, their interference, and the energy a mask removes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .errors import BadInput
from .experts.collect import task_names
from .experts.extract import fr_rule, open_model, streams
from .io.checkpoint import listed
from .io.pipeline import opened
from .ops._spectral_mask import spectral_mask

Model = str | Path | Mapping[str, Tensor] | nn.Module


@dataclass(frozen=True)
class Spectrum:
    """Measured over every filtered (two-dimensional, selected) tensor.

    frequency: [B] middles of the bands of radial frequency sqrt(fy² + fx²), Nyquist = 1, up to sqrt(2).
    amplitude: task -> [B] root mean square amplitude of the bins of a band, over tensors; |F| / sqrt(H·W).
    variance: task -> variance of the amplitudes of all bins relative to their squared mean.
    interference: "a, b" -> [B] cosine between the two deltas within a band; 0 where one is zero.
    removed: tensor -> task -> share of the delta's energy the mask takes away.
    """

    frequency: list[float]
    amplitude: dict[str, list[float]]
    variance: dict[str, float]
    interference: dict[str, list[float]]
    removed: dict[str, dict[str, float]]

    def json(self) -> dict[str, Any]:
        return asdict(self)


def spectrum(
    base: Model,
    models: Sequence[Model],
    *,
    tasks: Sequence[str] | None = None,
    bands: int = 48,
    allow_pickle: bool = False,
    **fr: Any,
) -> Spectrum:
    """Spectra of the deltas modelᵢ − base. `fr`: the parameters of method `fr` whose mask and selection are looked at.

    Cost: one real FFT per tensor and model, and the spectra of all models of one tensor in memory.
    Raises: BadInput when no tensor is selected, models do not fit the base, or parameters are unknown.
    """
    if bands < 1:
        raise BadInput(f"bands must be at least 1, not {bands}", remedy="give the number of radial bands, e.g. 48")
    models = listed(models)
    rule, _ = fr_rule(fr, len(models))
    names = task_names(tasks, [str(m) if isinstance(m, (str, Path)) else None for m in models])
    origin = open_model(base, "base", allow_pickle)
    others = [open_model(m, str(n), allow_pickle) for m, n in zip(models, names, strict=True)]
    pairs = [(i, j) for i in range(len(models)) for j in range(i + 1, len(models))]
    energy = torch.zeros(len(models), bands, dtype=torch.float64, device="cpu")
    cross = torch.zeros(len(pairs), bands, dtype=torch.float64, device="cpu")
    count = torch.zeros(bands, dtype=torch.float64, device="cpu")
    moments = torch.zeros(len(models), 2, dtype=torch.float64, device="cpu")
    removed: dict[str, dict[str, float]] = {}
    with opened(1) as (pool, files), torch.no_grad():
        for stream in streams(origin, others, pool, files):
            if not stream.numel or not rule.filters(stream.name, stream.shape):
                continue
            start, tensors = stream.whole()
            assert start is not None
            height, width = stream.shape
            fy = 2 * torch.fft.fftfreq(height, dtype=torch.float64, device="cpu")
            fx = 2 * torch.fft.rfftfreq(width, dtype=torch.float64, device="cpu")
            radius = torch.sqrt(fy[:, None] ** 2 + fx[None] ** 2)
            band = (radius * (bands / 2**0.5)).long().clamp_max(bands - 1).view(-1)
            # A half spectrum stands for the whole: its inner columns count twice.
            twice = torch.full((width // 2 + 1,), 2.0, dtype=torch.float64, device="cpu")
            twice[0] = 1.0
            if width % 2 == 0:
                twice[-1] = 1.0
            weight = twice.expand(height, -1).reshape(-1)
            count += torch.bincount(band, weight, bands)
            lost = (1 - spectral_mask(height, width, rule.cutoff, rule.mask, rule.ring_double).gain()).view(-1)
            spectra: list[Tensor] = []
            for i, m in enumerate(tensors):
                delta = ops.weighted_sum(start, [m], 1.0, add_base=False, dtype=stream.compute)
                f = (torch.fft.rfft2(delta) / (height * width) ** 0.5).reshape(-1)
                power = f.abs().double().square()
                energy[i] += torch.bincount(band, power * weight, bands)
                moments[i, 0] += (power.sqrt() * weight).sum()
                moments[i, 1] += (power * weight).sum()
                total = float((power * weight).sum())
                share = float((power * weight * (1 - (1 - lost).square()).clamp_min(0)).sum()) / total if total else 0.0
                removed.setdefault(stream.name, {})[names[i]] = share
                spectra.append(f)
            for p, (i, j) in enumerate(pairs):
                product = (spectra[i] * spectra[j].conj()).real.double()
                cross[p] += torch.bincount(band, product * weight, bands)
    if not removed:
        raise BadInput("no tensor is filtered", remedy="check select: only two-dimensional floating tensors can be")
    bins = count.clamp_min(1)
    amplitude = (energy / bins).sqrt()
    mean, square = (moments / count.sum()).unbind(1)
    variance = torch.where(mean > 0, square / mean.square().clamp_min(1e-300) - 1, 0.0)
    scale = torch.stack([(energy[i] * energy[j]).sqrt() for i, j in pairs]) if pairs else cross
    cosine = torch.where(scale > 0, cross / scale.clamp_min(1e-300), 0.0)
    return Spectrum(
        frequency=((torch.arange(bands, device="cpu") + 0.5) * (2**0.5 / bands)).tolist(),
        amplitude={n: amplitude[i].tolist() for i, n in enumerate(names)},
        variance={n: float(variance[i]) for i, n in enumerate(names)},
        interference={f"{names[i]}, {names[j]}": cosine[p].tolist() for p, (i, j) in enumerate(pairs)},
        removed=removed,
    )


def draw(found: Spectrum, path: str | Path) -> None:
    """One picture (PNG or SVG by its ending): amplitudes, interference, and energy removed per tensor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(10, 11), layout="constrained")
    for task, values in found.amplitude.items():
        top.plot(found.frequency, values, label=f"{task} (variance {found.variance[task]:.3f})")
    top.set(title="Amplitude of the task deltas", xlabel="radial frequency (Nyquist = 1)", ylabel="RMS amplitude")
    levels = [v for values in found.amplitude.values() for v in values if v > 0]
    if levels and max(levels) > 10 * min(levels):
        top.set_yscale("log")
    else:  # a flat spectrum is to look flat
        top.set_ylim(bottom=0)
    for pair, values in found.interference.items():
        middle.plot(found.frequency, values, label=pair)
    middle.axhline(0, color="0.7", linewidth=0.8)
    middle.set(title="Interference: cosine between deltas", xlabel="radial frequency (Nyquist = 1)", ylabel="cosine")
    tensors = list(found.removed)
    for task in found.amplitude:
        bottom.plot(range(len(tensors)), [found.removed[t][task] for t in tensors], ".-", label=task)
    bottom.set(title="Share of energy the mask removes", ylabel="share", xlabel="tensor")
    bottom.set_ylim(bottom=0)
    short = [re.sub(r"\.weight$", "", t) for t in tensors]
    step = max(1, len(short) // 24)
    bottom.set_xticks(range(0, len(short), step), short[::step], rotation=90, fontsize=7)
    for axis in (top, middle, bottom):
        if len(axis.lines) <= 13:
            axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
    plt.close(figure)
