"""Torch's per-thread and per-process state, kept for each rank of a simulation.

Simulated ranks share a thread: a rank that waits inside ``torch.no_grad()`` must not switch off another's gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import _autograd
from torch.overrides import _pop_mode as pop_function_mode
from torch.overrides import _push_mode as push_function_mode
from torch.utils import _device
from torch.utils._python_dispatch import _pop_mode as pop_dispatch_mode
from torch.utils._python_dispatch import _push_mode as push_dispatch_mode

_AUTOCAST_DEVICES = ("cpu", "cuda")


@dataclass(slots=True)
class TorchState:
    """Gradient, inference and autocast modes, mode stacks (``with torch.device(...)``), default dtype and generators.

    Hooks on saved tensors too, as activation checkpointing has them around a block. Not kept: CUDA's state where CUDA
    is initialised only while ranks run.

    Attributes:
        leave_neutral: the guard that took the thread out of this state's inference mode; None where it had none.
        autocast: (on, dtype) for each of `_AUTOCAST_DEVICES`.
        nesting: how many autocast contexts are open; the outermost empties torch's cache of casts when it closes.
        modes, dispatch_modes, saved_hooks: the stacks, top first.
        current_device: the default device as torch.compile sees it.
        default_device: what `torch.set_default_device` keeps.
        cuda: generators' states of all devices and the current stream; None before CUDA is initialised.
    """

    grad: bool
    leave_neutral: torch.inference_mode | None
    autocast: tuple[tuple[bool, torch.dtype], ...]
    autocast_cache: bool
    nesting: int
    modes: list[Any]
    dispatch_modes: list[Any]
    saved_hooks: list[Any]
    current_device: torch.device | None
    default_device: Any
    default_dtype: torch.dtype
    cpu_generator: Tensor
    cuda: tuple[list[Tensor], torch.cuda.Stream] | None

    def restore(self) -> None:
        """Put the thread, left neutral by `take`, into this state; only once where `leave_neutral` is set."""
        if self.leave_neutral is not None:
            self.leave_neutral.__exit__(None, None, None)
        torch._C._set_grad_enabled(self.grad)
        for device, (on, dtype) in zip(_AUTOCAST_DEVICES, self.autocast, strict=True):
            torch.set_autocast_enabled(device, on)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        for _ in range(self.nesting):
            torch.autocast_increment_nesting()
        for mode in reversed(self.modes):
            push_function_mode(mode)
        for mode in reversed(self.dispatch_modes):
            push_dispatch_mode(mode)
        for pack, unpack in reversed(self.saved_hooks):
            _autograd._push_saved_tensors_default_hooks(pack, unpack)
        _device.CURRENT_DEVICE = self.current_device
        torch._GLOBAL_DEVICE_CONTEXT.device_context = self.default_device
        if self.default_dtype != torch.get_default_dtype():
            torch.set_default_dtype(self.default_dtype)
        torch.default_generator.set_state(self.cpu_generator)
        if self.cuda is not None:
            generators, stream = self.cuda
            torch.cuda.set_rng_state_all(generators)
            torch.cuda.set_stream(stream)


def take() -> TorchState:
    """Take the thread's state off it: mode stacks, nesting and inference mode are left neutral for whoever follows."""
    dispatch_modes = [pop_dispatch_mode() for _ in range(torch._C._len_torch_dispatch_stack())]
    modes = [pop_function_mode() for _ in range(torch._C._len_torch_function_stack())]
    saved_hooks = []
    while (hooks := _autograd._top_saved_tensors_default_hooks(True)) is not None:
        saved_hooks.append(hooks)
        _autograd._pop_saved_tensors_default_hooks()
    grad = torch.is_grad_enabled()
    autocast = tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _AUTOCAST_DEVICES)
    autocast_cache = torch.is_autocast_cache_enabled()
    nesting = torch.autocast_increment_nesting() - 1
    for _ in range(nesting + 1):
        torch.autocast_decrement_nesting()
    if nesting:
        torch.clear_autocast_cache()  # those who follow may or may not: let it not depend on them
    leave_neutral = None
    if torch.is_inference_mode_enabled():
        leave_neutral = torch.inference_mode(False)
        leave_neutral.__enter__()
    cuda = None
    if torch.cuda.is_initialized():
        cuda = (torch.cuda.get_rng_state_all(), torch.cuda.current_stream())
    return TorchState(
        grad,
        leave_neutral,
        autocast,
        autocast_cache,
        nesting,
        modes,
        dispatch_modes,
        saved_hooks,
        _device.CURRENT_DEVICE,
        getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None),
        torch.get_default_dtype(),
        torch.default_generator.get_state(),
        cuda,
    )
