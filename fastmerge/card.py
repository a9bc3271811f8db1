"""The small files of a merged checkpoint: model card, recipe, configuration."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml

from . import __version__

if TYPE_CHECKING:
    from .recipe import Recipe
    from .report import Report

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def output_files(recipe: Recipe, config: Mapping[str, Any] | None, report: Report | None = None) -> dict[str, bytes]:
    """README.md, mergekit_config.yml and, where the template has one, config.json, by file name.

    The YAML is the recipe as the user wrote it, or an equivalent one for merges called from Python.
    """
    files = {
        "README.md": model_card(recipe, report).encode(),
        "mergekit_config.yml": recipe.to_yaml().encode(),
    }
    if config:
        files["config.json"] = (json.dumps(updated_config(config, recipe), indent=2) + "\n").encode()
    return files


def updated_config(config: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """`config` with the stored dtype and, for slices, the number of layers and every list with one entry per layer."""
    out = dict(config)
    if recipe.stored_dtype:
        key = "dtype" if "dtype" in out else "torch_dtype"
        out[key] = recipe.stored_dtype
    sources = recipe.layer_sources()
    if sources is None:
        return out
    nested = out.get("text_config")
    if isinstance(nested, dict) and not any(key in out for key in _LAYER_COUNTS):
        return out | {"text_config": _with_layers(nested, [layer for _, layer in sources])}
    return _with_layers(out, [layer for _, layer in sources])


def _with_layers(config: dict[str, Any], layers: list[int]) -> dict[str, Any]:
    before = next((config[key] for key in _LAYER_COUNTS if isinstance(config.get(key), int)), None)
    out = dict(config)
    for key, value in config.items():
        if key in _LAYER_COUNTS and value == before:
            out[key] = len(layers)
        elif isinstance(value, list) and before and len(value) == before and max(layers) < before:
            out[key] = [value[i] for i in layers]  # layer_types and the like
    return out


def model_card(recipe: Recipe, report: Report | None = None) -> str:
    """The README of a merged model: metadata for hubs, what was merged, the exact recipe, what it took."""
    method = recipe.method
    refs = [*([recipe.base] if recipe.base else []), *recipe.inputs]
    hub = [ref.path for ref in refs if _HUB_ID.fullmatch(ref.path) and not os.path.exists(ref.path)]
    metadata: dict[str, Any] = {"base_model": list(dict.fromkeys(hub))} if hub else {}
    metadata |= {"library_name": "transformers", "tags": ["merge", "fastmerge", "mergekit"]}
    paper = f" ([{method.paper}]({_link(method.paper)}))" if method.paper else ""
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False).strip(),
        "---",
        "",
        "# Merged model",
        "",
        f"Merged with fastmerge {__version__} by `{method.name}`{paper}: {method.summary}",
        "",
        *([f"Base: `{recipe.base}`", ""] if recipe.base else []),
        "Models:",
        "",
        *[f"- `{ref}`" for ref in recipe.inputs],
        "",
        "## Recipe",
        "",
        "```yaml",
        recipe.to_yaml().strip(),
        "```",
        "",
    ]
    if report is not None and not report.planned:
        lines += [
            "## Run",
            "",
            f"{report.wall_s:.1f} s wall, {report.cpu_s:.1f} CPU seconds, {report.bytes_read / 1e9:.2f} GB read, "
            f"{report.bytes_written / 1e9:.2f} GB written, peak memory {report.peak_rss / 1e9:.2f} GB "
            f"on {report.device}; {', '.join(f'{k} {v}' for k, v in report.versions.items())}. "
            "Details per tensor are in `fastmerge_report.json`.",
            "",
        ]
    return "\n".join(lines)


def _link(paper: str) -> str:
    return f"https://arxiv.org/abs/{paper.removeprefix('arXiv:')}" if paper.startswith("arXiv:") else paper
