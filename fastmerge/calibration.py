"""Calibration data from files: JSON lines or parquet records become batches, and gradients of Hugging Face models.

Records, by kind::

    text   {"text": ..., "text_pair": optional, "label": class or number, "task": optional}
    lm     {"prompt": ..., "response": ...} (the response's tokens count) or {"text": ...} (all tokens do)
    image  {"image": path, relative to the data file, "label": class, "task": optional}

Labels are only needed by losses that use them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import BadInput, did_you_mean
from .gradients import Gradient, gradient
from .losses import LOSSES

KINDS = ("text", "lm", "image")
AUTO = {
    "text": "AutoModelForSequenceClassification",
    "lm": "AutoModelForCausalLM",
    "image": "AutoModelForImageClassification",
}
Record = dict[str, Any]


def read_records(path: str | Path, kind: str, *, labelled: bool = True, limit: int | None = None) -> list[Record]:
    """The records of a .jsonl or .parquet file, checked; raises BadInput naming the line and the key."""
    path = Path(path)
    if kind not in KINDS:
        raise BadInput(f"unknown kind {kind!r} of data", remedy=f"one of {', '.join(KINDS)}")
    if path.suffix in (".jsonl", ".json", ".ndjson"):
        records = _json_lines(path)
    elif path.suffix == ".parquet":
        records = _parquet(path)
    else:
        raise BadInput(
            f"{path.suffix!r} is not a known kind of data", where=str(path), remedy="give .jsonl or .parquet"
        )
    if not records:
        raise BadInput("the file holds no records", where=str(path), remedy="write one JSON object per line")
    for number, record in enumerate(records, 1):
        where = f"{path}, record {number}"
        needed = ["image"] if kind == "image" else ["text"]
        if kind == "lm" and "text" not in record:
            needed = ["prompt", "response"]
        for key in needed:
            if not isinstance(record.get(key), str):
                raise BadInput(f"the record lacks {key!r}", where=where, remedy=f"a {kind} record needs {needed}")
        if kind != "lm" and labelled and not isinstance(record.get("label"), (int, float)):
            raise BadInput(
                "the record lacks a numeric 'label'",
                where=where,
                remedy="add it, or use --loss entropy for unlabelled data",
            )
    return records[:limit]


def _json_lines(path: Path) -> list[Record]:
    records = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise BadInput(
                        "is not a JSON object", where=f"{path}:{number}", remedy='write {"text": …, "label": …}'
                    )
                records.append(record)
    except OSError as error:
        raise BadInput(f"can not be read: {error.strerror}", where=str(path), remedy="check the path") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(
            f"is not valid JSON ({error})", where=f"{path}:{number}", remedy="write one JSON object per line"
        ) from error
    return records


def _parquet(path: Path) -> list[Record]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise BadInput("parquet files need pyarrow", where=str(path), remedy="pip install pyarrow") from error
    try:
        records: list[Record] = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise BadInput(
            f"is not a readable parquet file ({error})", where=str(path), remedy="check or rewrite the file"
        ) from error
    return records


def by_task(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by their "task" ("" where there is none), in order of first use."""
    tasks: dict[str, list[Record]] = {}
    for record in records:
        tasks.setdefault(str(record.get("task", "")), []).append(record)
    return tasks


def text_batches(records: Sequence[Record], tokenizer: Any, *, batch: int, max_length: int) -> list[Record]:
    """Padded classification batches, in the records' order."""
    out = []
    for at in range(0, len(records), batch):
        part = records[at : at + batch]
        pairs = [r.get("text_pair") for r in part]
        texts = [r["text"] for r in part]
        made = dict(
            tokenizer(
                texts, pairs if all(p is not None for p in pairs) else None, padding=True, truncation=True,
                max_length=max_length, return_tensors="pt",
            )
        )  # fmt: skip
        if all("label" in r for r in part):
            made["labels"] = torch.tensor([r["label"] for r in part], device="cpu")
        out.append(made)
    return out


def lm_batches(records: Sequence[Record], tokenizer: Any, *, batch: int, max_length: int) -> list[Record]:
    """Causal batches padded at the right; prompts and padding are labelled -100 (they do not count)."""
    rows: list[tuple[list[int], int]] = []
    for record in records:
        if "text" in record:
            tokens, skip = tokenizer(record["text"])["input_ids"], 0
        else:
            prompt = tokenizer(record["prompt"])["input_ids"]
            tokens = prompt + tokenizer(record["response"], add_special_tokens=False)["input_ids"]
            skip = len(prompt)
            if tokenizer.eos_token_id is not None:
                tokens = [*tokens, tokenizer.eos_token_id]
        rows.append((tokens[:max_length], min(skip, max_length)))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    out = []
    for at in range(0, len(rows), batch):
        part = rows[at : at + batch]
        width = max(len(t) for t, _ in part)
        ids = torch.full((len(part), width), pad, device="cpu")
        mask = torch.zeros(len(part), width, dtype=torch.long, device="cpu")
        labels = torch.full((len(part), width), -100, device="cpu")
        for i, (tokens, skip) in enumerate(part):
            ids[i, : len(tokens)] = torch.tensor(tokens, device="cpu")
            mask[i, : len(tokens)] = 1
            labels[i, skip : len(tokens)] = torch.tensor(tokens[skip:], device="cpu")
        out.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return out


def image_batches(records: Sequence[Record], processor: Any, *, batch: int, folder: Path) -> list[Record]:
    """Batches of processed images."""
    try:
        from PIL import Image
    except ImportError as error:
        raise BadInput("image data needs pillow", remedy="pip install pillow") from error
    out = []
    for at in range(0, len(records), batch):
        part = records[at : at + batch]
        images = []
        for record in part:
            try:
                with Image.open(folder / record["image"]) as image:
                    images.append(image.convert("RGB"))
            except OSError as error:
                raise BadInput(
                    f"the image can not be read ({error})",
                    where=str(folder / record["image"]),
                    remedy="image paths are relative to the folder of the records",
                ) from error
        made = {"pixel_values": processor(images=images, return_tensors="pt")["pixel_values"]}
        if all("label" in r for r in part):
            made["labels"] = torch.tensor([r["label"] for r in part], device="cpu")
        out.append(made)
    return out


def parse_heads(given: Sequence[str] | None) -> dict[str, str] | None:
    """{task: folder} of ``TASK=FOLDER`` texts; None for none."""
    out = {}
    for item in given or []:
        task, eq, folder = item.partition("=")
        if not eq or not task or not folder:
            raise BadInput(
                f"head {item!r} is not TASK=FOLDER", remedy="write the task's name, =, and the folder of its model"
            )
        out[task] = folder
    return out or None


def check_records(
    data: str | Path,
    kind: str = "text",
    *,
    loss: str | None = None,
    heads: Mapping[str, str | Path] | None = None,
    limit: int | None = None,
    **_: Any,
) -> dict[str, list[Record]]:
    """The records by task, and that they fit loss and heads: what can be known without loading a model."""
    loss = loss or ("causal_lm" if kind == "lm" else "cross_entropy")
    if loss not in LOSSES:
        raise BadInput(f"unknown loss {loss!r}{did_you_mean(loss, LOSSES)}", remedy=f"one of {', '.join(LOSSES)}")
    tasks = by_task(read_records(data, kind, labelled=loss not in ("entropy", "causal_lm"), limit=limit))
    if heads is not None:
        for task in tasks:
            if task not in heads:
                raise BadInput(f"no head is given for task {task!r}", remedy="add TASK=FOLDER for each")
            if not (Path(heads[task]).expanduser() / "config.json").is_file():
                raise BadInput(
                    f"the head of task {task!r} has no config.json", where=str(heads[task]),
                    remedy="give the folder of the task's fine-tuned model",
                )  # fmt: skip
    return tasks


def hugging_face_gradient(
    base: str | Path,
    data: str | Path,
    kind: str,
    *,
    loss: str | None = None,
    heads: Mapping[str, str | Path] | None = None,
    batch: int = 8,
    max_length: int = 512,
    limit: int | None = None,
    device: str | None = None,
    **options: Any,
) -> Gradient:
    """The gradient of a calibration file's loss for the transformers model in a checkpoint folder.

    Args:
        base: the folder whose config.json (and tokenizer or image processor) say what the model is.
        kind: "text", "lm" or "image": the form of the records, and the Auto class of the model.
        loss: default "cross_entropy", for lm "causal_lm"; "entropy" needs no labels.
        heads: per task, the folder of the fine-tuned model whose head judges it. Leave the heads' tensors out of the
            merge (``exclude=``).
        limit: use at most this many records.
        options: as :func:`fastmerge.gradient` (micro_batch, amp, checkpointing, train_mode, reduction).

    Raises: BadInput without transformers, for unreadable data, and for tasks without a head when heads are given.
    """
    try:
        import transformers
    except ImportError as error:
        raise BadInput(
            "calibration on a Hugging Face model needs transformers",
            remedy="pip install transformers, or give --gradient module:function",
        ) from error
    loss = loss or ("causal_lm" if kind == "lm" else "cross_entropy")
    tasks = check_records(data, kind, loss=loss, heads=heads, limit=limit)

    def load(folder: str | Path) -> nn.Module:
        model: nn.Module = _offline(lambda f: getattr(transformers, AUTO[kind]).from_pretrained(f), folder)
        return model.to(device or "cpu").eval()

    models: nn.Module | dict[str, nn.Module] = {t: load(heads[t]) for t in tasks} if heads is not None else load(base)
    if kind == "image":
        processor = _offline(transformers.AutoImageProcessor.from_pretrained, base)
        batches = {t: image_batches(r, processor, batch=batch, folder=Path(data).parent) for t, r in tasks.items()}
    else:
        tokenizer = _offline(transformers.AutoTokenizer.from_pretrained, base)
        make = text_batches if kind == "text" else lm_batches
        batches = {t: make(r, tokenizer, batch=batch, max_length=max_length) for t, r in tasks.items()}
    return gradient(models, loss, batches, **options)


def _offline(load: Callable[..., Any], folder: str | Path) -> Any:
    try:
        return load(str(folder))
    except ImportError as error:  # transformers imports its models late
        raise BadInput(
            f"transformers can not be used ({str(error).splitlines()[0]})",
            remedy="check the installation with `python -c 'import torchvision, transformers'`",
        ) from error
    except (OSError, ValueError) as error:
        raise BadInput(
            f"transformers can not load it ({str(error).splitlines()[0]})",
            where=str(folder),
            remedy="the base folder needs config.json and its tokenizer or image processor files",
        ) from error
