"""Checks what jsonargparse accepts too easily, and finds the cause of its errors.

jsonargparse accepts null anywhere, takes the last of two equal keys, and reads "---" as null.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader


def instantiate(parser: ArgumentParser, given: Namespace, kinds: Mapping[str, Any]) -> Namespace:
    """Build the described objects; ``kinds`` are their types by name.

    Raises:
        ValueError: for a null where None is not allowed, or whatever the objects refuse.
    """
    for name, value in vars(given).items():
        _refuse_null(kinds.get(name, Any), value, name)
    made: Namespace = parser.instantiate(given)
    return made


def load_yaml(text: str) -> Any:
    """Load YAML as the parser does, but refuse duplicate keys, and keep text such as "---" as text.

    Raises:
        yaml.YAMLError: for invalid YAML or a duplicate key; says where.
    """
    _refuse_twice(yaml.compose(text, yaml.SafeLoader))
    value = get_loader("yaml")(text)
    return text if value is None and text.strip().lower() not in ("", "~", "null") else value


def reason(error: BaseException) -> str:
    """The message of the underlying error.

    A YAML file that is invalid for its part makes jsonargparse report a "config file loop"; the real error is that
    one's context.
    """
    seen: BaseException | None = error
    while seen is not None:
        if str(seen).startswith("Config file loop detected") and isinstance(seen.__context__, ValueError):
            return f"{str(error).splitlines()[0]}\n{seen.__context__}"
        seen = seen.__cause__ or seen.__context__
    return str(error)


def _refuse_null(kind: Any, given: Any, place: str) -> None:
    """Raise ValueError where null is given for a type without None."""
    if given is None and kind is not Any and type(None) not in get_args(kind):
        raise ValueError(f"{place} is null; give it a value, or leave it out")
    if isinstance(given, Namespace):
        entries = vars(given)
        if "class_path" in entries:
            module, _, name = entries["class_path"].rpartition(".")
            kind = getattr(importlib.import_module(module), name)
            entries = vars(entries["init_args"]) if "init_args" in entries else {}
        else:
            kind = next((x for x in (kind, *get_args(kind)) if is_dataclass(x)), object)
        hints = _hints(kind)
        for name, value in entries.items():
            _refuse_null(hints.get(name, Any), value, f"{place}.{name}")


def _hints(kind: Any) -> dict[str, Any]:
    """The types of the fields; empty when a user's annotations cannot be resolved."""
    try:
        return get_type_hints(kind)
    except (NameError, TypeError):
        return {}


def _refuse_twice(node: yaml.Node | None) -> None:
    inner = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in inner]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.MarkedYAMLError(problem=f"the key {twice!r} stands here twice", problem_mark=node.start_mark)
        inner = [value for _, value in inner]
    for child in inner:
        _refuse_twice(child)
