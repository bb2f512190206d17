"""Turns dataclass states into nested plain containers, and restores them in place.

Every part of a run keeps what changes in a dataclass of tensors, numbers, lists and further dataclasses. `state_tree`
takes one apart for a checkpoint or a joiner; `restore` puts the values back without replacing tensors that others hold.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_CLASS = "__class__"
_SCALARS = (bool, int, float, str)


def state_tree(value: Any) -> Any:
    """``value`` with each dataclass as a dict of its fields and its class name. Tensors are live, not copied.

    `lowcomm.checkpoint.Checkpoints.save` takes the result if it can save the leaves.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: state_tree(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {_CLASS: type(value).__name__, **fields}
    if type(value) in (list, tuple):
        return type(value)(state_tree(v) for v in value)
    if isinstance(value, dict):
        assert _CLASS not in value, f"{_CLASS} marks a dataclass and cannot be the key of a dict"
        return {key: state_tree(v) for key, v in value.items()}
    return value


def restore(state: T, tree: Any, device: torch.device | str = "cpu") -> T:
    """Load ``tree``, made by `state_tree`, into ``state``, in place where possible; return the result.

    Tensors are copied into the existing ones. Lists of another length, new dict keys and values that were None are
    built anew, with tensors on ``device``; their dataclasses are looked up by name in ``state`` and its annotations.
    After an error ``state`` is partly restored.

    Raises:
        ValueError: when the two differ in a class, its fields, or the shape or dtype of a tensor; says where.
    """
    return typing.cast(T, _Restoring(_classes(state, {}), device).into(state, tree, type(state).__name__))


@dataclass(frozen=True)
class _Restoring:
    """The context of one call of `restore`.

    Attributes:
        classes: dataclasses by name.
        device: of newly built tensors.
    """

    classes: dict[str, type]
    device: torch.device | str

    def into(self, old: Any, new: Any, where: str) -> Any:
        """Load ``new`` into ``old``; returns ``old`` if it can be changed in place."""
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            if (old.shape, old.dtype) != (new.shape, new.dtype):
                raise ValueError(
                    f"{where} is {old.dtype}{list(old.shape)}, but {new.dtype}{list(new.shape)} was saved; resume with "
                    "the model, the algorithm and the compression that the run had"
                )
            with torch.no_grad():
                return old.copy_(new)
        if dataclasses.is_dataclass(old):
            return self._into_dataclass(old, new, where)
        if type(old) is type(new) is list or type(old) is type(new) is tuple:
            if len(old) != len(new):
                values = self.built(new, where)
            else:
                values = [self.into(x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(old, new, strict=True))]
            if isinstance(old, list):
                old[:] = values
                return old
            return tuple(values)
        if isinstance(old, dict) and isinstance(new, dict) and _CLASS not in new:
            merged = {key: self.into(old.get(key), value, f"{where}[{key!r}]") for key, value in new.items()}
            old.clear()
            old.update(merged)
            return old
        if old is None or new is None or (type(old) in _SCALARS and type(new) in _SCALARS):
            return self.built(new, where)
        raise ValueError(f"{where} is a {type(old).__name__}, but a {_saved_name(new)} was saved")

    def built(self, new: Any, where: str) -> Any:
        """``new`` as fresh objects."""
        if isinstance(new, Tensor):
            return new.to(self.device, copy=True)
        if type(new) in (list, tuple):
            return type(new)(self.built(v, f"{where}[{i}]") for i, v in enumerate(new))
        if not isinstance(new, dict):
            return new
        values = {key: self.built(v, f"{where}.{key}") for key, v in new.items() if key != _CLASS}
        if _CLASS not in new:
            return values
        if new[_CLASS] not in self.classes:
            raise ValueError(f"{where} was a {new[_CLASS]}, which no annotation of the state names; annotate its field")
        return self.classes[new[_CLASS]](**values)

    def _into_dataclass(self, old: Any, new: Any, where: str) -> Any:
        name, names = type(old).__name__, {f.name for f in dataclasses.fields(old)}
        if new is None:
            return None
        if not isinstance(new, dict) or new.get(_CLASS) != name:
            raise ValueError(
                f"{where} is a {name}, but a {_saved_name(new)} was saved; resume with the algorithm the run had"
            )
        if differ := names ^ (new.keys() - {_CLASS}):
            raise ValueError(
                f"{where}: the fields {sorted(differ)} of {name} stand in only one of state and checkpoint"
            )
        values = {n: self.into(getattr(old, n), new[n], f"{where}.{n}") for n in names}
        changed = {n: value for n, value in values.items() if value is not getattr(old, n)}
        try:
            for n, value in changed.items():
                setattr(old, n, value)
        except dataclasses.FrozenInstanceError:
            return dataclasses.replace(old, **changed)
        return old


def _saved_name(tree: Any) -> str:
    """The name of the class that ``tree`` was made from."""
    return str(tree.get(_CLASS, "dict")) if isinstance(tree, dict) else type(tree).__name__


def _classes(value: Any, found: dict[str, type]) -> dict[str, type]:
    """All dataclasses in ``value`` (objects, classes, annotations) and in their fields, by name."""
    cls = value if isinstance(value, type) else type(value)
    if dataclasses.is_dataclass(cls) and cls.__name__ not in found:
        found[cls.__name__] = cls
        for hint in typing.get_type_hints(cls).values():
            _classes(hint, found)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, f.name) for f in dataclasses.fields(value)]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    for part in (*parts, *typing.get_args(value)):
        _classes(part, found)
    return found
