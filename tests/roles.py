"""Finds every class that plays a role by walking the package: a new one is tested before its author writes a test."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import TypeVar

R = TypeVar("R")


def players(role: type[R], room: str) -> list[type[R]]:
    """The concrete classes of a role in one room of the package, in order of name."""
    package = importlib.import_module(f"lowcomm.{room}")
    found = set()
    for module in pkgutil.iter_modules(package.__path__):
        for _, value in inspect.getmembers(importlib.import_module(f"lowcomm.{room}.{module.name}"), inspect.isclass):
            if issubclass(value, role) and not inspect.isabstract(value):
                found.add(value)
    assert found, f"nobody plays {role.__name__} in {room}"
    return sorted(found, key=lambda c: c.__name__)
