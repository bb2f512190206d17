"""Moves replicas of a simulation off the device while others compute, and measures memory.

All replicas compute on one device, one at a time. If it cannot hold them all, those that have waited longest are moved
from GPU to host memory, or from host memory to files, and back before they continue. A moved tensor keeps its identity
and views: its storage is emptied, and later refilled bitwise.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, UntypedStorage


class Residence:
    """Which ranks' tensors are on the device; call `enter` before a rank gets its turn.

    A context manager: the files are gone when it is left. A rank's tensors must be its own, and used only in its turns.

    Args:
        device: where all replicas compute.
        num_resident: the largest number of replicas there; None: all.
        folder: an existing folder for the files of moved replicas, if the device is the CPU.

    Attributes:
        num_moves: how often a replica was moved out.
        state_bytes: the largest size seen of a replica's tensors on the device.
        unmoved_bytes: the largest part of them that stayed there, since torch cannot resize their storage (memory that
            belongs to numpy or to a file).

    Raises:
        ValueError: when ``num_resident`` is below 1.
    """

    def __init__(self, device: torch.device, num_resident: int | None, folder: Path) -> None:
        if num_resident is not None and num_resident < 1:
            raise ValueError(
                f"num_resident is {num_resident}; at least 1 replica must be on the device to compute: give 1 or more, "
                "or leave it out to keep all there"
            )
        self.num_moves = self.state_bytes = self.unmoved_bytes = 0
        self._device, self._num_resident = device, num_resident
        self._folder, self._files = folder, ExitStack()
        self._owned: dict[int, Callable[[], Any]] = {}
        self._resident: dict[int, None] = {}  # the one that has waited longest first
        self._out: dict[int, list[tuple[UntypedStorage, int]]] = {}
        self._host: dict[int, list[Tensor]] = {}

    def __enter__(self) -> Residence:
        if self._num_resident is not None and self._device.type == "cpu":
            where = tempfile.TemporaryDirectory(prefix="moved_out_", dir=self._folder)
            self._folder = Path(self._files.enter_context(where))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def own(self, rank: int, state: Callable[[], Any]) -> None:
        """Register a rank's tensors: a nest of lists, tuples and dicts."""
        self._owned[rank] = state

    def enter(self, rank: int) -> None:
        """Move a rank's tensors to the device, and others' off it if too many are there."""
        self._resident.pop(rank, None)
        while self._num_resident is not None and len(self._resident) >= self._num_resident:
            longest = next(iter(self._resident))
            del self._resident[longest]
            self._move_out(longest)
        if rank in self._out:
            self._move_in(rank)
        self._resident[rank] = None

    def leave(self, rank: int) -> None:
        """A rank has ended in its turn; its tensors are counted and forgotten."""
        self._storages(rank)
        self._owned.pop(rank, None)
        self._resident.pop(rank, None)

    def measured(self) -> dict[str, Any]:
        """Memory figures after a run; the peak is that of the whole process."""
        return {
            "device": self._device.type,
            "num_resident": self._num_resident,
            "num_moves": self.num_moves,
            "state_bytes_per_replica": self.state_bytes,
            "unmoved_bytes_per_replica": self.unmoved_bytes,
            "peak_bytes": peak_bytes(self._device),
        }

    def line(self) -> str:
        whose = "the process" if self._device.type == "cpu" else "torch on the GPU"
        peak = f"{peak_bytes(self._device) / 1e6:,.0f} MB {whose} at most"
        return f"memory: {self.state_bytes / 1e6:,.1f} MB a replica, {peak}"

    def _move_out(self, rank: int) -> None:
        storages = self._storages(rank)
        self.num_moves += bool(storages)
        self._out[rank] = [(storage, storage.nbytes()) for storage in storages]
        for storage, kept in zip(storages, self._outside(rank), strict=True):
            kept.copy_(_bytes(storage))
            storage.resize_(0)

    def _move_in(self, rank: int) -> None:
        for (storage, num_bytes), kept in zip(self._out[rank], self._outside(rank), strict=True):
            storage.resize_(num_bytes)
            _bytes(storage).copy_(kept)
        del self._out[rank]
        self._host.pop(rank, None)

    def _outside(self, rank: int) -> Iterator[Tensor]:
        """Room for each storage of a rank that is out, as uint8; in files it is mapped only while it is used."""
        sizes = [num_bytes for _, num_bytes in self._out[rank]]
        if self._device.type != "cpu":
            if rank not in self._host:
                self._host[rank] = [torch.empty(size, dtype=torch.uint8, device="cpu") for size in sizes]
            yield from self._host[rank]
            return
        path = self._folder / f"rank{rank}"
        with path.open("ab") as file:
            file.truncate(sum(sizes))
        offset = 0
        for size in sizes:
            yield torch.from_numpy(np.memmap(path, np.uint8, "r+", offset, size))
            offset += size

    def _storages(self, rank: int) -> list[UntypedStorage]:
        """The movable storages of a rank's tensors, each once."""
        if rank not in self._owned:
            return []
        tensors = [x for x in _tensors(self._owned[rank]()) if x.device.type == self._device.type]
        found = {storage.data_ptr(): storage for storage in (x.untyped_storage() for x in tensors) if storage.nbytes()}
        movable = [storage for storage in found.values() if storage.resizable()]
        total = sum(storage.nbytes() for storage in found.values())
        self.state_bytes = max(self.state_bytes, total)
        self.unmoved_bytes = max(self.unmoved_bytes, total - sum(storage.nbytes() for storage in movable))
        return movable


def peak_bytes(device: torch.device) -> int:
    """The peak of torch's GPU memory, or of this process's physical memory for the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux: what `resource` tells there starts from the peak of the process that started this one
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        if value.is_leaf and value.grad is not None:
            yield value.grad
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
