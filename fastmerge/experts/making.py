"""``fm.free``: FREE-Merging from Python, in memory or into a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..io.checkpoint import listed
from ..merging import merge
from ..report import Report
from .extract import Model, extract, method_parameters
from .runtime import FreeModel
from .storage import Expert, save


@dataclass(frozen=True)
class Free:
    """What FREE-Merging makes: the backbone, a module or a state dict as the base was, and one expert per task."""

    backbone: Any
    experts: dict[str, Expert]
    base: Any  # as given; experts that override need it

    def serve(
        self,
        module: nn.Module | None = None,
        *,
        router: Callable[..., Tensor] | None = None,
        heads: Mapping[str, nn.Module] | None = None,
        head: str | None = None,
        combine: Literal["add", "override"] | None = None,
    ) -> FreeModel:
        """A FreeModel over the backbone; `module` takes its weights first where the backbone is a state dict."""
        if module is not None:
            state = self.backbone.state_dict() if isinstance(self.backbone, nn.Module) else self.backbone
            module.load_state_dict(state)
        elif isinstance(self.backbone, nn.Module):
            module = self.backbone
        else:
            raise BadInput("the backbone is a state dict", remedy="pass the module that it belongs to")
        base = self.base if isinstance(self.base, (nn.Module, Mapping)) else None
        return FreeModel(module, self.experts, combine=combine, base=base, heads=heads, head=head, router=router)

    def save(self, folder: str | Path) -> dict[str, int]:
        """Writes FOLDER/<task>.safetensors; {task: bytes}."""
        return {t: save(e, Path(folder) / f"{t}.safetensors") for t, e in self.experts.items()}


def free(
    base: Model,
    models: Sequence[Model],
    *,
    tasks: Sequence[str] | None = None,
    out: str | Path | None = None,
    dtype: torch.dtype | None = None,
    nan: str = "error",
    seed: int = 0,
    allow_pickle: bool = False,
    **parameters: Any,
) -> Free | Report:
    """FREE-Merging: a backbone by `fr` and one expert per model (arXiv:2411.16815).

    Args:
        base, models: state dicts, modules or checkpoint paths.
        tasks: names of the experts; default: the folders' names, else ``task1`` …
        out: a folder, for checkpoint paths: the backbone as a checkpoint there, the experts in its ``experts``.
        dtype, nan, seed, allow_pickle: as ``fm.merge``.
        parameters: of method ``free``: density, trim, by, mu, combine … (see fm.experts.extract), and fr's.

    Returns: a :class:`Free`, or a Report with `out`.
    Raises: BadInput, naming tensor and model.
    Cost: fr's merge and one more read of every tensor.
    """
    models = listed(models)
    if out is not None:
        more = {} if tasks is None else {"tasks": list(tasks)}
        report: Report = merge(
            "free",
            base,
            models,
            out=out,
            dtype=dtype,
            nan=nan,
            seed=seed,
            allow_pickle=allow_pickle,
            **parameters,
            **more,
        )
        return report
    method_parameters("free", parameters, len(models))  # names what is wrong before any work
    for_backbone = {k: v for k, v in parameters.items() if k.rstrip("_") in method_parameters("fr", {}, 1)}
    made = extract(base, models, tasks=tasks, allow_pickle=allow_pickle, seed=seed, **parameters)
    backbone = merge("fr", base, models, dtype=dtype, nan=nan, seed=seed, allow_pickle=allow_pickle, **for_backbone)
    return Free(backbone, {e.task: e for e in made}, base)
