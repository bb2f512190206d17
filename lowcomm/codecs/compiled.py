"""Expressions over blocks, each compiled into one GPU program by torch.compile.

Decoded values must be bitwise equal on all ranks, so a program always runs compiled: where torch would silently fall
back to eager mode, it raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

# In order: casts to 16 bits round as in eager mode; blocks and the values in them are one axis; launches are tuned at
# compilation, which takes some seconds.
OPTIONS: dict[str, Any] = {
    "emulate_precision_casts": True,
    "triton.max_tiles": 1,
    "coordinate_descent_tuning": True,
}


Expression = Callable[..., Any]


class Programs:
    """One codec's programs, compiled at first use. Copies and pickles start empty."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, bool], Expression] = {}
        self._tables: dict[torch.device, tuple[Tensor, ...]] = {}

    def __reduce__(self) -> tuple[type[Programs], tuple[()]]:
        return Programs, ()

    def tables(self, made: Callable[[], tuple[Tensor, ...]], device: torch.device) -> tuple[Tensor, ...]:
        """What ``made`` returns, on a device; kept from the first call on."""
        if device not in self._tables:
            self._tables[device] = tuple(table.to(device) for table in made())
        return self._tables[device]

    def run(
        self, expression: Expression, rows: Sequence[Tensor | None], tables: tuple[Tensor, ...], of: object, name: str
    ) -> Any:
        """``expression(*rows, tables)``, compiled.

        Args:
            rows: contiguous tensors ``[num, width]``; ``num`` may differ from call to call, widths may not.
            of: the codec, for error messages.
            name: tells the codec's expressions apart.

        Raises:
            RuntimeError: when torch would not run it compiled.
        """
        rows = [None if x is None else x.data for x in rows]  # of views torch would guard what they are views of
        given = [x for x in rows if x is not None]
        for x in given:
            if x.shape[0] > 1:
                torch._dynamo.maybe_mark_dynamic(x, 0)
        # wide loads need whole 16 bytes; torch would copy tensors that lie otherwise
        key = name, all(x.data_ptr() % 16 == 0 for x in given)
        if key not in self._made:
            self._made[key] = _program(expression, f"{of}.{name}")
        try:
            with torch.no_grad():
                return self._made[key](*rows, tables)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise _refusal(f"{of}.{name}") from error


def _program(expression: Expression, name: str) -> Expression:
    def checked(*given: Any) -> Any:
        if not torch.compiler.is_compiling():
            raise _refusal(name)
        return expression(*given)

    # torch keeps what it compiled, its limit and which sizes it takes to vary with the code object: one for each
    code = checked.__code__.replace(co_name=name)
    own = FunctionType(code, checked.__globals__, name, None, checked.__closure__)
    return torch.compile(own, fullgraph=True, options=OPTIONS)


def _refusal(name: str) -> RuntimeError:
    return RuntimeError(
        f"torch would run {name} without compiling it, by TORCH_COMPILE_DISABLE, a stance or its recompile limit "
        f"({torch._dynamo.config.recompile_limit}). All ranks must take one path, so on GPUs long rows are coded by "
        f"compiled programs only: lift that"
    )
