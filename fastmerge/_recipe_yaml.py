"""YAML 1.1 as plain Python values, plus the line every value came from: errors then point into the user's file."""

from __future__ import annotations

from typing import Any

import yaml

from .errors import BadInput

Path = tuple[str | int, ...]
_TAGS = frozenset(
    f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "timestamp", "seq", "map")
)
_MOST_VALUES = 200_000


class Marks:
    """Where each value of a document stands; empty for documents that did not come from text."""

    def __init__(self, source: str | None = None, lines: dict[Path, int] | None = None) -> None:
        self.source = source
        self.lines = lines or {}

    def where(self, path: Path) -> str | None:
        """``recipe.yml:7 (models[1].parameters.density)`` for the nearest value at or above `path`."""
        key = dotted(path)
        if self.source is None:
            return key or None
        at = path
        while at and at not in self.lines:
            at = at[:-1]
        place = f"{self.source}:{self.lines.get(at, 1)}"
        return f"{place} ({key})" if key else place


def dotted(path: Path) -> str:
    """``models[1].parameters.density``."""
    out = ""
    for part in path:
        out += f"[{part}]" if isinstance(part, int) else f".{part}" if out else part
    return out


def load(text: str, source: str) -> tuple[Any, Marks]:
    """The single document of `text` and its marks. `source` is the name shown in messages.

    Raises: BadInput with line and column for text that is not YAML, for several documents, duplicate keys, keys that
    are not strings, and tags that are not plain YAML.
    """
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        marks = Marks(source)
        return (None if root is None else _value(loader, root, (), marks)), marks
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}, column {mark.column + 1}" if mark else source
        if error.problem == "but found another document":
            raise BadInput(
                "the file holds several YAML documents",
                where=where,
                remedy="put each merge in a file of its own and run them one after the other",
            ) from None
        problem = error.problem or "can not be parsed"
        raise BadInput(
            f"not valid YAML: {problem}", where=where, remedy="check indentation, quotes and colons"
        ) from None
    except yaml.YAMLError as error:
        raise BadInput(f"not valid YAML: {error}", where=source, remedy="save the file as UTF-8 text") from None
    except RecursionError:
        raise BadInput(
            "a YAML alias contains itself, or the file is nested too deeply",
            where=source,
            remedy="write the values out instead of using aliases",
        ) from None
    finally:
        if loader is not None:
            loader.dispose()


def _value(loader: yaml.SafeLoader, node: yaml.Node, path: Path, marks: Marks) -> Any:
    marks.lines.setdefault(path, node.start_mark.line + 1)
    if len(marks.lines) > _MOST_VALUES:
        raise BadInput(
            "the recipe expands to more values than any recipe needs (aliases inside aliases?)",
            where=marks.source,
            remedy="write the values out instead of using aliases",
        )
    if node.tag not in _TAGS:
        raise BadInput(
            f"the YAML tag {node.tag!r} is not allowed",
            where=f"{marks.source}:{node.start_mark.line + 1}",
            remedy="write plain numbers, words, lists and mappings",
        )
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, item, (*path, i), marks) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        own = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        loader.flatten_mapping(node)  # resolves "<<" merge keys; what the mapping says itself comes last and wins
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            here = f"{marks.source}:{key_node.start_mark.line + 1}"
            if key is None:
                raise BadInput(
                    "a key must be a plain word", where=here, remedy="write key: value, one word before the colon"
                )
            if key in out and own.count(key) > 1:
                raise BadInput(
                    f"key {key!r} is written twice in the same place", where=here, remedy="remove one of them"
                )
            at: Path = (*path, key)
            marks.lines[at] = key_node.start_mark.line + 1
            out[key] = _value(loader, value_node, at, marks)
        return out
    return loader.construct_object(node, deep=True)
