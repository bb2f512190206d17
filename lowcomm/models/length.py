"""Checks by trial whether a model takes sequences as long as the data's."""

from __future__ import annotations

import torch
from torch import nn


class _FarEnough(Exception):
    """Forward reached the first layer."""


def check_length(model: nn.Module, seq_len: int) -> None:
    """Run one sequence of ``seq_len`` tokens up to the first layer; most models look positions up before it.

    The first layer is the first module in an nn.ModuleList or nn.Sequential. Rotary positions have no limit.

    Args:
        model: on the CPU, where an index that is too large is an error that can be caught; left as it was.
        seq_len: tokens of a sequence.

    Raises:
        ValueError: when it fails and shorter sequences do not; names the longest that the model takes.
    """
    error = _failure(model, seq_len)
    if error is None or _failure(model, 1) is not None:
        return
    longest, too_long = 1, seq_len
    while too_long - longest > 1:
        middle = (longest + too_long) // 2
        longest, too_long = (middle, too_long) if _failure(model, middle) is None else (longest, middle)
    raise ValueError(
        f"seq_len is {seq_len}, but the model takes {longest} tokens at most ({error}); lower data.seq_len to that, or "
        "choose a model with more positions"
    ) from error


def _failure(model: nn.Module, seq_len: int) -> Exception | None:
    def enough(*_: object) -> None:
        raise _FarEnough

    modes = [(module, module.training) for module in model.modules()]
    hooks = [layer.register_forward_pre_hook(enough) for layer in _layers(model)[:1]]
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, seq_len, dtype=torch.int64))
    except _FarEnough:
        return None
    except Exception as error:  # an index too large, shapes that do not fit, an assertion of the model's own
        return error
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return None


def _layers(model: nn.Module) -> list[nn.Module]:
    """The members of lists and sequences of modules, but for those that cannot be called, such as lists."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential))
    return [x for one in lists for x in one.children() if type(x).forward is not nn.Module.forward]
