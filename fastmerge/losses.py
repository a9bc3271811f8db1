"""Losses of calibration data: ``f(module, batch) -> [B]``, one number per item. A batch is (inputs, labels), a dict with
"labels", or bare inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .errors import BadInput

Loss = Callable[[nn.Module, Any], Tensor]


def _split(batch: Any) -> tuple[Any, Any]:
    """A batch's inputs and labels: (x, y), {..., "labels": y}, or inputs alone."""
    if isinstance(batch, Mapping):
        return {k: v for k, v in batch.items() if k != "labels"}, batch.get("labels")
    if isinstance(batch, (tuple, list)):
        return batch[0], batch[1] if len(batch) > 1 else None
    return batch, None


def _logits(model: nn.Module, inputs: Any) -> Tensor:
    out = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    out = getattr(out, "logits", out)
    logits = out[0] if isinstance(out, (tuple, list)) else out
    assert isinstance(logits, Tensor)
    return logits.float()


def _labels(name: str, labels: Any) -> Tensor:
    if not isinstance(labels, Tensor):
        raise BadInput(
            f"loss {name!r} needs labels and the batch has none",
            remedy="give batches of (inputs, labels) or dicts with 'labels', or use loss='entropy' for unlabelled data",
        )
    return labels


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """[B] cross entropies; labels [B] of classes. A float label is a regression target (squared error)."""
    inputs, labels = _split(batch)
    labels = _labels("cross_entropy", labels)
    logits = _logits(model, inputs)
    if labels.is_floating_point():
        return (logits.reshape(labels.shape) - labels).square().reshape(len(labels), -1).mean(1)
    return F.cross_entropy(logits, labels, reduction="none")


def causal_lm(model: nn.Module, batch: Any) -> Tensor:
    """[B] mean cross entropies of the next token; labels [B, T], -100 where a token does not count."""
    inputs, labels = _split(batch)
    labels = _labels("causal_lm", labels)
    logits = _logits(model, inputs)[:, :-1]
    target = labels[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), target, reduction="none", ignore_index=-100)
    return losses.sum(1) / (target != -100).sum(1).clamp(min=1)


def mse(model: nn.Module, batch: Any) -> Tensor:
    """[B] squared errors, mean over everything but the batch."""
    inputs, labels = _split(batch)
    labels = _labels("mse", labels)
    out = _logits(model, inputs)
    return (out.reshape(labels.shape) - labels).square().reshape(len(labels), -1).mean(1)


def entropy(model: nn.Module, batch: Any) -> Tensor:
    """[B] entropies of the predicted distribution (AdaMerging, arXiv:2310.02575): needs no labels."""
    logits = _logits(model, _split(batch)[0])
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).reshape(len(logits), -1).mean(1)


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "causal_lm": causal_lm, "mse": mse, "entropy": entropy}
