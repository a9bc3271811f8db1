"""What `fr` does to a tensor: the parameters of a recipe, or a published script's, as one resolved rule."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import BadInput


@dataclass(frozen=True)
class Rule:
    """How tensors are chosen, filtered and weighted."""

    mask: str = "radial"
    cutoff: float | None = None  # None: the mask's default
    ring_double: bool = False
    lambda_: float = 1.0
    policy: str = "mean"
    scope: str = "model"
    select: str = ""  # pattern of the names that are filtered, if two-dimensional
    merges: str = ""  # pattern of the names that change at all
    others: bool = True  # False: only filtered tensors change
    weight: float = 1.0  # of every delta, before signs are elected
    elect: bool = False  # keep only what agrees with the sign of the weighted sum
    align_filtered: bool = False  # E is measured on the filtered tensor, as published, not on the model
    bugs: bool = False

    def filters(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the tensor goes through the high-pass filter."""
        return len(shape) == 2 and all(re.search(p, name) for p in (self.merges, self.select))

    def takes(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the tensor changes at all."""
        return re.search(self.merges, name) is not None if self.others else self.filters(name, shape)

    @property
    def linear(self) -> bool:
        """Whether the filter of the weighted sum is the weighted sum of the filtered deltas, to be used so."""
        return not (self.elect or self.align_filtered)

    @property
    def measured(self) -> bool:
        """Whether the coefficients need E, the mean magnitude of the deltas."""
        return self.linear and self.policy != "constant"


# The published scripts (FREE-Merging's code). Constant coefficients, masks around Nyquist with the doubled ring.
_PUBLISHED = Rule(mask="disc_min", cutoff=0.7, ring_double=True, policy="constant")
PRESETS = {
    # merge_vit, ViT-B-32_8_FR: every tensor scaled up to the largest mean magnitude among the models
    "vit8": replace(
        _PUBLISHED, lambda_=0.7, select=r"(?=.*weight).*(?:attn|mlp)", merges="attn|mlp", policy="align", scope="tensor",
        align_filtered=True,
    ),
    # merge_vit, 30 ViT-B/16
    "vit30": replace(
        _PUBLISHED, lambda_=0.15, select=r"(?=.*weight).*(?:attention|output|intermediate)",
        merges="attention|output|intermediate",
    ),
    # merge_lm, merge_roberta_glue
    "roberta": replace(
        _PUBLISHED, lambda_=0.5, select=r"^(?!.*classifier).*weight", others=False),
    # merge_lm, merge.py
    "lm": replace(
        _PUBLISHED, mask="disc_max", cutoff=0.6, lambda_=0.4, select="weight", merges=r"^(?!.*classifier)(?!.*bias)"
    ),
    # merge_llm, the mergekit fork's `fourier`
    "llm": replace(_PUBLISHED, cutoff=0.9, lambda_=1.1, weight=0.8, elect=True),
}  # fmt: skip


@functools.lru_cache(maxsize=256)
def _resolve(preset: str | None, overrides: tuple[tuple[str, Any], ...]) -> Rule:
    given = {k: v for k, v in overrides if v is not None}
    bugs = bool(given.pop("bugs"))
    if bugs and preset is None:
        raise BadInput(
            "reference_bugs reproduces a published script, but no preset names one",
            remedy=f"add preset: one of {', '.join(PRESETS)}",
        )
    rule = replace(Rule() if preset is None else PRESETS[preset], bugs=bugs)
    if given.get("mask", rule.mask) != rule.mask:
        rule = replace(rule, cutoff=None, ring_double=False)  # a preset's belong to its own mask
    if {"policy", "scope"} & given.keys():
        rule = replace(rule, align_filtered=False)
    rule = replace(rule, **given)
    if rule.ring_double and rule.mask == "radial":
        raise BadInput("ring_double belongs to the masks disc_min and disc_max", remedy="add mask: disc_min")
    try:
        re.compile(rule.select)
    except re.error as error:
        raise BadInput(
            f"select {rule.select!r} is not a regular expression: {error}",
            remedy="write one that finds the names to filter, e.g. 'mlp|attn'",
        ) from None
    return rule


def resolve(parameters: Mapping[str, Any]) -> Rule:
    """The rule of a tensor's parameters by recipe name (lambda, which is per model, apart). Raises BadInput."""
    names = {
        "cutoff": "cutoff",
        "mask": "mask",
        "ring_double": "ring_double",
        "policy": "lambda_policy",
        "scope": "scope",
        "select": "select",
        "bugs": "reference_bugs",
    }
    return _resolve(parameters["preset"], tuple((field, parameters[key]) for field, key in names.items()))
