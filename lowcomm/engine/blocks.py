"""When a model's forward uses which parameters: some at any time, the others as each of its blocks begins.

A block is a direct child of an nn.ModuleList or nn.Sequential that lies in no other block and has a forward: another
nn.ModuleList among them is not called, so its own children are blocks. Assumed, as by FSDP: what is in a block is used
by that block's own forward, called as ``block(...)``, and by nothing before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lowcomm.engine.base import Wanted


@dataclass(frozen=True)
class Uses:
    """Attributes:
    first: places of the parameters that do not lie in blocks alone.
    blocks: the blocks, in the model's order, and the places of all parameters in each.
    """

    first: list[int]
    blocks: list[tuple[nn.Module, list[int]]]

    def in_order(self) -> list[int]:
        """Every parameter once, as they are used where blocks take their turns in the model's order."""
        return list(dict.fromkeys([*self.first, *(i for _, numbers in self.blocks for i in numbers)]))


def uses(model: nn.Module, parameters: Sequence[Tensor]) -> Uses:
    """Where the parameters, all of them the model's, are used; without blocks if something in it is compiled.

    Hooks on modules that torch.compile has seen may not run.
    """
    compiled = any(hasattr(x, "_orig_mod") or x._compiled_call_impl is not None for x in model.modules())
    number = {p: i for i, p in enumerate(parameters)}
    blocks: dict[nn.Module, list[int]] = {}
    outside: set[int] = set()

    def walk(module: nn.Module) -> None:
        outside.update(number[p] for p in module.parameters(recurse=False) if p in number)
        for child in module.children():
            called = type(child).forward is not nn.Module.forward
            if isinstance(module, nn.ModuleList | nn.Sequential) and called and not compiled:
                blocks[child] = sorted(number[p] for p in child.parameters() if p in number)
            else:
                walk(child)

    walk(model)
    return Uses(sorted(outside), list(blocks.items()))


@contextmanager
def asking(model: nn.Module, parameters: Sequence[Tensor], wanted: Wanted) -> Iterator[None]:
    """Around a forward: ``wanted`` is told the place of each parameter once, before it is used.

    First of those outside of blocks, then of each block's as its forward begins, and at the end of those whose block's
    was not called. No autocast is on while it is told.
    """
    found = uses(model, parameters)
    waiting = dict.fromkeys(found.in_order())
    device = parameters[0].device.type
    casts = torch.amp.is_autocast_available(device)

    def tell(numbers: Sequence[int], *called: object) -> None:
        with torch.autocast(device, enabled=False) if casts else nullcontext():
            for i in numbers:
                if i in waiting:
                    del waiting[i]
                    wanted(i)

    tell(found.first)
    hooks = [block.register_forward_pre_hook(partial(tell, numbers)) for block, numbers in found.blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    tell(list(waiting))
