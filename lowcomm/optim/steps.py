"""Steps and states of any torch optimizer, also one that was never tried here."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def step(optimizer: Optimizer) -> None:
    """Take a step; see `dry_step` for parameters on the meta device.

    Raises:
        ValueError: when the optimizer cannot, whatever it raises itself.
    """
    on_meta = optimizer.param_groups[0]["params"][0].is_meta
    try:
        if on_meta:
            dry_step(optimizer)
        else:
            optimizer.step()
    except (ValueError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # it may be anybody's code
        name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        raise ValueError(
            f"a step of {name} fails ({said(error)}): lowcomm leaves it dense gradients without a graph and calls "
            "step() once, without a closure; choose an optimizer that makes do with that, or other arguments for it "
            "(docs/optimizers.md lists those that were tried)"
        ) from error


def needs_closure(kind: type[Optimizer]) -> bool:
    """Whether its step computes the loss anew, as often as it likes."""
    closure = signature(kind.step).parameters.get("closure")
    return closure is not None and closure.default is Parameter.empty


def said(error: Exception) -> str:
    """A foreign error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def dry_step(optimizer: Optimizer) -> None:
    """Give an optimizer of meta parameters the states that a first step would.

    Many optimizers look at values in a step, so it is taken for small stand-ins on the CPU. Each has as many dimensions
    as its parameter; their sizes are small numbers in the same order, equal where the parameter's are equal. States in
    a stand-in's shape become meta tensors in the parameter's; all others stay as they are.
    """
    stand_ins = {p: _stand_in(p) for group in optimizer.param_groups for p in group["params"]}
    of_groups = [group["params"] for group in optimizer.param_groups]
    _hand_over(optimizer, stand_ins)
    try:
        for group in optimizer.param_groups:
            group["params"] = [stand_ins[p] for p in group["params"]]
        with torch.random.fork_rng(devices=[]):
            optimizer.step()
    finally:
        for group, params in zip(optimizer.param_groups, of_groups, strict=True):
            group["params"] = params
        _hand_over(optimizer, {small: p for p, small in stand_ins.items()})


def load(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Load in place, so that the optimizer's state keeps its memory.

    torch's own loading replaces tensors, may share them with ``saved``, and casts them to the parameter's dtype, which
    would round fp32 moments of bf16 parameters.
    """
    before = {p: dict(state) for p, state in optimizer.state.items() if isinstance(p, Tensor)}
    optimizer.load_state_dict(dict(saved))
    saved_ids = [i for group in saved["param_groups"] for i in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in zip(saved_ids, parameters, strict=True):
        for name, value in saved["state"].get(i, {}).items():
            exact, old = _exact(value, optimizer.state[p][name]), before.get(p, {}).get(name)
            if isinstance(old, Tensor) and (old.shape, old.dtype) == (exact.shape, exact.dtype):
                exact = old.copy_(exact)
            optimizer.state[p][name] = exact
    for name in saved["state"].keys() - set(saved_ids):  # what is not of one parameter
        optimizer.state[name] = copy.deepcopy(saved["state"][name])


def _exact(value: Any, loaded: Any) -> Any:
    """A copy of a saved state, on the device that torch loaded it to."""
    if isinstance(value, Tensor):
        return value.detach().to(loaded.device, copy=True)
    if isinstance(value, dict):
        return {name: _exact(part, loaded[name]) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_exact(part, like) for part, like in zip(value, loaded, strict=True))
    return copy.deepcopy(value)


def _hand_over(optimizer: Optimizer, heirs: Mapping[Tensor, Tensor]) -> None:
    """Give each parameter's states to its heir, in the heir's shape where they had the parameter's."""
    for p, heir in heirs.items():
        state = optimizer.state.pop(p, None)
        if state:
            optimizer.state[heir] = {
                name: torch.ones(heir.shape, dtype=x.dtype, device=heir.device)
                if isinstance(x, Tensor) and x.shape == p.shape
                else x
                for name, x in state.items()
            }


def _stand_in(p: Tensor) -> Tensor:
    sizes = sorted({size for size in p.shape if size > 1})
    shape = [sizes.index(size) + 4 if size > 1 else size for size in p.shape]
    small = torch.nn.Parameter(torch.linspace(0.1, 1, max(1, torch.Size(shape).numel())).to(p.dtype).view(shape))
    small.grad = small.detach().clone()
    return small
