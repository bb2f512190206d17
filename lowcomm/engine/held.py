"""What of a model and an optimizer is trained, and whether that is still so."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def trainable(model: nn.Module, optimizer: Optimizer) -> list[nn.Parameter]:
    """The model's trainable parameters, once each.

    Raises:
        ValueError: when there are none, one has no plain real values or shares memory, or the optimizer holds others.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("the model has no trainable parameter: requires_grad is False for all, or there are none")
    for name, p in named.items():
        require_plain(name, p)
        require_real(name, p)
    optimized = {id(p) for p in held_by(optimizer)}
    left_out = [name for name, p in named.items() if id(p) not in optimized]
    if left_out:
        raise ValueError(
            f"trainable parameters that the optimizer does not hold: {', '.join(left_out)}; give them to it or freeze "
            "them with requires_grad_(False)"
        )
    if optimized - {id(p) for p in model.parameters()}:
        raise ValueError("the optimizer holds parameters that are not the model's; their state could not be saved")
    addresses = [p.data_ptr() for p in named.values() if p.data_ptr()]
    if len(set(addresses)) < len(addresses):
        raise ValueError("two parameters share memory; tie them as one nn.Parameter, which then has one gradient")
    return list(named.values())


def held_by(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    """All parameters of the optimizer's groups."""
    return (p for group in optimizer.param_groups for p in group["params"])


def require_plain(name: str, x: Tensor) -> None:
    """Check that a parameter or buffer is an ordinary dense tensor.

    Raises:
        ValueError: for a DTensor or another kind of tensor, a sparse one, or one of a lazy module.
    """
    if nn.parameter.is_lazy(x):
        raise ValueError(f"{name!r} has no shape yet: run the lazy module once, then attach or build the optimizer")
    kind = type(x.detach())
    if kind is not Tensor or x.layout != torch.strided:
        what = kind.__name__ if kind is not Tensor else f"tensor of layout {x.layout}"
        raise ValueError(
            f"{name!r} is a {what}, and only ordinary dense tensors can be exchanged with other replicas; average the "
            "gradients of a model sharded by fully_shard with fsdp_hook, and leave others as plain tensors"
        )


def require_real(name: str, x: Tensor) -> None:
    """Check that a parameter has real values of at least 16 bits.

    Raises:
        ValueError: when it has not.
    """
    if not x.is_floating_point() or x.element_size() < 2:
        raise ValueError(
            f"{name!r} is of {x.dtype}, and only real values of 16 bits or more are averaged: keep a complex parameter "
            "as a real one with a last dimension of 2, and use torch.view_as_complex in forward"
        )


class Held:
    """What a model and an optimizer held when made, to compare later; quick when nothing has changed."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._values = [p.detach() for p in self._trained.values()]  # so that no other memory has these addresses
        self._note()

    def check(self) -> None:
        """Compare.

        Raises:
            ValueError: when other parameters are trained, one has other memory, or the optimizer holds others; says
                which.
        """
        if self._seen() == self._was:
            return
        changes = list(self._changes())
        if changes:
            more = f", and {len(changes) - 1} more" if len(changes) > 1 else ""
            raise ValueError(
                f"since attach, {changes[0]}{more}; rounds would go over what is trained no more: call finish() before "
                "such a change, and attach() again after it"
            )
        self._note()

    def __contains__(self, p: Tensor) -> bool:
        return id(p) in self._ids

    def _note(self) -> None:
        """Remember where to look, and what is there."""
        self._modules = list(self._model.modules())  # which also keeps their ids from being used again
        self._tables = [table for module in self._modules for table in (module._modules, module._parameters)]
        self._parameters = list(self._model.parameters())
        self._ids = {id(p) for p in self._trained.values()}
        self._was = self._seen()

    def _seen(self) -> list[list[int]]:
        """The same numbers as long as nothing changes."""
        trained = self._trained.values()
        return [
            [id(x) for table in self._tables for x in table.values()],
            [p.requires_grad for p in self._parameters],
            list(map(Tensor.data_ptr, trained)),
            list(map(Tensor.numel, trained)),
            [id(p) for p in held_by(self._optimizer)],
        ]

    def _changes(self) -> Iterator[str]:
        """What changed, in words."""
        names = {id(p): name for name, p in self._model.named_parameters()}
        live = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        held = {id(p) for p in held_by(self._optimizer)}
        for (name, p), was in zip(self._trained.items(), self._values, strict=True):
            if id(p) not in names:
                what = "was replaced by another" if name in live else "is no longer in the model"
                yield f"parameter {name!r} {what}, as after load_state_dict(assign=True) or with a new module"
            elif not p.requires_grad:
                yield f"parameter {name!r} was frozen"
            elif (p.data_ptr(), p.numel()) != (was.data_ptr(), was.numel()):
                yield f"the memory of parameter {name!r} was replaced ({_described(was)}, now {_described(p)})"
            elif id(p) not in held:
                yield f"parameter {name!r} left the optimizer's groups"
        for name, p in live.items():
            if id(p) not in self._ids and name not in self._trained:
                yield f"parameter {name!r} became trainable"
        for p in held_by(self._optimizer):
            if id(p) not in names and id(p) not in self._was[-1]:
                yield f"the optimizer was given a parameter that is not the model's ({_described(p)})"


def _described(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)} on {x.device}"
