"""Sums of many small tensors in few messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowcomm.comm.base import Call, Comm, Work
from lowcomm.tensors import flatten, num_bytes, unflatten


class _Batch:
    """Tensors of one dtype and device that are summed together."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._work: Work[Tensor] | None = None
        self._totals: list[Tensor] | None = None

    def issue(self, comm: Comm) -> None:
        self._work = comm.all_sum(self.tensors[0] if len(self.tensors) == 1 else flatten(self.tensors))
        self.tensors = [x.to("meta") for x in self.tensors]  # who is summed may go

    def total(self, i: int) -> Tensor:
        if self._totals is None:
            assert self._work is not None, "flush before waiting"
            self._totals, self._work = unflatten(self._work.wait().reshape(-1), self.tensors), None
        return self._totals[i]


class _Piece:
    def __init__(self, batch: _Batch, i: int) -> None:
        self._batch, self._i = batch, i

    def wait(self) -> Tensor:
        return self._batch.total(self._i)


class JoinedComm(Comm):
    """A Comm whose `all_sum` calls are joined: those made until `flush` are one message.

    Totals are as exact as the inner Comm's. A batch of ``limit_bytes`` or more is sent at once.
    """

    def __init__(self, inner: Comm, limit_bytes: int) -> None:
        self.rank, self.members = inner.rank, inner.members
        self._inner, self._limit_bytes = inner, limit_bytes
        self._open: dict[tuple[torch.dtype, torch.device], _Batch] = {}

    def flush(self) -> None:
        """Send the waiting sums, in the order of their first calls."""
        for batch in self._open.values():
            batch.issue(self._inner)
        self._open.clear()

    def issue(self, call: Call) -> Work[Any]:
        """Sums are delayed: call ``flush`` before waiting for one, and do not change its input until then."""
        if call.kind != "all_sum":
            return self._inner.issue(call)
        key = (call.x.dtype, call.x.device)
        batch = self._open.setdefault(key, _Batch())
        batch.tensors.append(call.x)
        if num_bytes(batch.tensors) >= self._limit_bytes:
            self._open.pop(key).issue(self._inner)
        return _Piece(batch, len(batch.tensors) - 1)

    def sub(self, members: Sequence[int]) -> Comm:
        """A view that joins nothing."""
        return self._inner.sub(members)

    def now(self) -> float:
        return self._inner.now()
