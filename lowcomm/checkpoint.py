"""Checkpoints: every rank saves its whole state; a folder is either whole or ends in ``.partial``.

    <run>/checkpoints/t00000100/replica00000/    *.distcp .metadata    tensors, by torch.distributed.checkpoint
                                                 tree.json             all else, with a place for each tensor
                                                 manifest.json         run, step, who; bytes and sha256 of each file
                                                 on_all_ranks          empty; there once every rank had saved this step

Where a replica is many ranks, each has its own: replica00000.shard00000/, replica00000.shard00001/ (`Place.name`).
Replicas differ (local parameters, moments, data cursor) and may share no disk, so saving communicates nothing. A folder
is written under another name, flushed and then renamed, so a crash never damages earlier checkpoints.

`lowcomm.state` converts the dataclass states of algorithms to and from what can be saved.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

from lowcomm.places import Place

MANIFEST, TREE, ON_ALL = "manifest.json", "tree.json", "on_all_ranks"
_LEAVES = (bool, int, float, str, type(None))
# what torch.distributed.checkpoint adds to each tensor, measured with torch 2.13 and rounded up
_TENSOR_OVERHEAD_BYTES = 2048


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one rank of one run.

    A state is a nest of dicts with str or int keys, lists, tuples, tensors, and bool, int, float, str or None. It comes
    back exactly, without a template: tensors on the CPU, subclasses of dict as dict, parameters as tensors.

    Attributes:
        dir: the folder ``checkpoints`` of the run; made when first needed.
        place: of this rank, when the run was started. A checkpoint of other numbers of replicas and shards cannot be
            resumed.
        run_id: names the run; a folder that holds another run's checkpoints is refused.
        keep: whole checkpoints that `prune` leaves.
    """

    dir: Path
    place: Place
    run_id: str
    keep: int = 2

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep is {self.keep}; at least 1 checkpoint must be kept, 2 is usual")

    def save(self, t: int, state: Mapping[str, Any]) -> Path:
        """Write the state after inner step ``t`` and return its folder; the caller may change tensors afterwards.

        A checkpoint of the same step is replaced.

        Raises:
            ValueError: when the state holds something that cannot be saved; says where.
            OSError: when files cannot be written; the checkpoints before it stay.
        """
        tensors: dict[str, Tensor] = {}
        tree = _split(dict(state), "state", tensors)
        whole = self._folder(t)
        partial = whole.with_name(f"{whole.name}.partial")
        try:
            self._write(partial, t, tree, tensors)
            replaced = [_set_aside(whole)] if whole.exists() else []
            os.rename(partial, whole)
            for path in (whole.parent, self.dir, self.dir.parent):
                _flush(path)
        except (OSError, RuntimeError) as error:  # torch's writer of files knows no other
            raise OSError(f"{partial} cannot be written ({error}); is the disk full?") from error
        for path in replaced:
            shutil.rmtree(path)
        return whole

    def _write(self, folder: Path, t: int, tree: Any, tensors: dict[str, Tensor]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with _in_one_process():
            state_dict_saver.save(tensors, storage_writer=FileSystemWriter(folder, sync_files=False), no_dist=True)
        (folder / TREE).write_text(json.dumps(tree), encoding="utf-8")
        files = {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(folder.iterdir())}
        manifest = {**self._identity(t), "files": files}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in [*folder.iterdir(), folder]:
            _flush(path)

    def steps(self) -> list[int]:
        """The steps whose checkpoint is whole on this rank (all files there, in their size), oldest first.

        Raises:
            ValueError: when one of them is another run's or of another number of replicas or shards, or folders are
                called otherwise than this run's.
        """
        self._check_names()
        return [t for t in self._present() if self._manifest(t) is not None]

    def newest(self, others: Iterable[Iterable[int]] = ()) -> int | None:
        """The newest step that is whole here and in each of ``others``, the other ranks' `steps`; None if there is
        none.

        Raises:
            ValueError: as `steps`.
        """
        return max(set(self.steps()).intersection(*others), default=None)

    def load(self, t: int) -> dict[str, Any]:
        """The state that was saved after step ``t``, checked against its sha256.

        Raises:
            ValueError: when there is none, it is another run's, or a file is damaged; names the file.
        """
        folder, manifest = self._folder(t), self._manifest(t)
        if manifest is None:
            raise ValueError(
                f"{folder} holds no whole checkpoint; {self.place.name} has those of steps {self.steps()} in {self.dir}"
            )
        for name, file in manifest["files"].items():
            if (found := _sha256(folder / name)) != file["sha256"]:
                raise ValueError(
                    f"{folder / name} is damaged: its sha256 is {found}, the manifest says {file['sha256']}; delete "
                    f"{folder} to resume from an older step"
                )
        tree = json.loads((folder / TREE).read_text(encoding="utf-8"))
        tensors: dict[str, Tensor] = {}
        state = _join(tree, tensors)
        with _in_one_process():
            state_dict_loader.load(dict(tensors), storage_reader=FileSystemReader(folder), no_dist=True)
        assert isinstance(state, dict)
        return state

    def confirm(self, t: int) -> None:
        """Note that the checkpoint of step ``t`` is whole on all ranks."""
        (self._folder(t) / ON_ALL).touch()

    def were_on_all(self) -> bool:
        """Whether one of these checkpoints shows that all ranks had one.

        If so, ranks without one have lost theirs; otherwise the run was interrupted while writing its first.

        Raises:
            ValueError: as `steps`.
        """
        steps = self.steps()  # the next one is written only after the one before is on all ranks
        return len(steps) > 1 or any((self._folder(t) / ON_ALL).exists() for t in steps)

    def prune(self, confirmed_t: int) -> None:
        """Delete checkpoints older than the newest `keep` up to ``confirmed_t``, and remains of crashed writers.

        The checkpoint of ``confirmed_t``, which is whole on all ranks, and newer ones stay.
        """
        older = [t for t in self._present() if t < confirmed_t]
        whole = [t for t in older if self._manifest(t) is not None]
        kept = whole[max(len(whole) - (self.keep - 1), 0) :]
        self._delete(t for t in older if t not in kept)

    def discard_after(self, t: int) -> None:
        """Delete checkpoints newer than ``t``, once all ranks have resumed from it.

        Otherwise, after another crash, ranks could resume from a newer step that mixes both runs.
        """
        self._delete(newer for newer in self._present() if newer > t)

    def require_space(self, num_bytes: int) -> None:
        """Check that the disk takes `keep` checkpoints of ``num_bytes`` (see `state_bytes`) and one being written.

        Existing checkpoints of all ranks count as available. For ranks that share a disk, multiply ``num_bytes``.

        Raises:
            ValueError: when too little is free.
        """
        place = next(p for p in (self.dir, *self.dir.resolve().parents) if p.exists())
        free = shutil.disk_usage(place).free
        folders = (x for x in self.dir.glob("t*/replica*") if x.suffix != ".partial")
        there = sum(file.stat().st_size for folder in folders for file in folder.iterdir())
        needed = num_bytes * (self.keep + 1) - there
        if free < needed:
            raise ValueError(
                f"{place} has {free / 1e9:.2f} GB free, but {self.keep + 1} checkpoints of {num_bytes / 1e9:.2f} GB "
                f"(keep={self.keep} and the one being written) need {needed / 1e9:.2f} GB more than is there; free "
                "space, write to another disk or keep fewer"
            )

    def _identity(self, t: int) -> dict[str, Any]:
        # in the order of comparing: another number of replicas alone changes the run_id, and says more
        place = self.place
        numbers = {"num_replicas": len(place.across.members), "num_shards": place.num_shards}
        return {**numbers, "run_id": self.run_id, "name": place.name, "t": t}

    def _folder(self, t: int) -> Path:
        return self.dir / f"t{t:08d}" / self.place.name

    def _check_names(self) -> None:
        """Refuse folders of an earlier lowcomm (rank00000), and of shards where this run has none, or the reverse."""
        form = re.sub(r"\d{5}", r"\\d{5,}", re.escape(self.place.name))
        for folder in sorted(self.dir.glob("t*/r[ae]*")):
            if not re.fullmatch(rf"{form}(\.old)?(\.partial)?", folder.name):
                raise ValueError(
                    f"{folder} is called otherwise than this run's checkpoints, such as {self.place.name}: it is of "
                    "another number of shards, or of an earlier lowcomm (rank00000), whose checkpoints this one does "
                    "not read; go on with what wrote it, or start a new run in another --out"
                )

    def _present(self) -> list[int]:
        """All steps with a folder of this rank, whole or damaged, oldest first."""
        names = (folder.parent.name for folder in self.dir.glob(f"t*/{self._folder(0).name}"))
        return sorted(int(name[1:]) for name in names if re.fullmatch(r"t\d{8}|t[1-9]\d{8,}", name))

    def _manifest(self, t: int) -> dict[str, Any] | None:
        """The manifest of a step with all its files in their sizes, otherwise None."""
        folder = self._folder(t)
        try:
            manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if any((folder / name).stat().st_size != file["bytes"] for name, file in manifest["files"].items()):
                return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # the last two: JSON, but of another form
            return None
        for name, mine in self._identity(t).items():
            if (theirs := manifest.get(name)) != mine:
                config = self.dir.parent / "config.yaml"
                hint = f": the config or the data differ; the config it had is {config}" if name == "run_id" else ""
                raise ValueError(
                    f"{folder} was saved with {name} {theirs!r}, but here {name} is {mine!r}{hint}; resume with what "
                    "it was saved with, or start a new run in another folder"
                )
        return manifest

    def _delete(self, steps: Iterable[int]) -> None:
        """Delete steps and the remains of this rank's crashed writers; an interrupted deletion leaves no partial
        folder.
        """
        for t in steps:
            _set_aside(self._folder(t))
        name = self._folder(0).name
        for leftover in [*self.dir.glob(f"t*/{name}.partial"), *self.dir.glob(f"t*/{name}.old.partial")]:
            shutil.rmtree(leftover)
            with suppress(OSError):  # ranks that share the disk may still have theirs in it
                leftover.parent.rmdir()


def state_bytes(state: Mapping[str, Any]) -> int:
    """Bytes on the disk that a checkpoint of ``state`` takes, rounded up.

    An optimizer that has not stepped holds no moments; the caller adds their bytes.
    """
    tensors: dict[str, Tensor] = {}
    tree = _split(dict(state), "state", tensors)
    elements = sum(x.numel() * x.element_size() + _TENSOR_OVERHEAD_BYTES for x in tensors.values())
    return len(json.dumps(tree)) + elements + 2 * _TENSOR_OVERHEAD_BYTES


# ---- files ----------------------------------------------------------------------------------------------------------


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Flush a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _set_aside(folder: Path) -> Path:
    """Rename a folder so that it does not count as whole; a folder set aside before is deleted."""
    aside = folder.with_name(f"{folder.name}.old.partial")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    return aside


@contextmanager
def _in_one_process() -> Iterator[None]:
    """Suppress torch's warning about working in one process, which is intended.

    Raises:
        BaseException: the original error, also an interrupt, where torch raises a table of errors by rank.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        try:
            yield
        except CheckpointException as error:
            ((cause, _),) = error.failures.values()
            raise cause from error


# ---- a state as tensors by name and JSON ----------------------------------------------------------------------------


def _split(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """The JSON form of ``value``; its tensors are added to ``tensors``, named by their place."""
    if type(value) in _LEAVES:
        return value
    if isinstance(value, Tensor):
        data = value.detach()
        if type(data) is not Tensor or data.layout != torch.strided or data.is_meta:
            raise ValueError(
                f"{where} is a {type(data).__name__} on {data.device} with layout {data.layout}; only dense tensors "
                "with values can be saved: give the local shard"
            )
        tensors[where] = data
        return {"tensor": where, "shape": list(data.shape), "dtype": str(data.dtype).removeprefix("torch.")}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_split(v, f"{where}[{i}]", tensors) for i, v in enumerate(value)]}
    if isinstance(value, dict):
        if wrong := [key for key in value if type(key) not in (str, int)]:
            raise ValueError(f"{where} has the key {wrong[0]!r}; keys of a saved dict are str or int")
        return {"dict": [[key, _split(v, f"{where}[{key!r}]", tensors)] for key, v in value.items()]}
    raise ValueError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be saved; a state is made of "
        "dicts, lists, tuples, tensors, bool, int, float, str and None (state_tree turns dataclasses into these)"
    )


def _join(node: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_split`: the value with empty tensors, also put in ``tensors``, to be filled."""
    if not isinstance(node, dict):
        return node
    if "tensor" in node:
        return tensors.setdefault(node["tensor"], torch.empty(node["shape"], dtype=getattr(torch, node["dtype"])))
    if "dict" in node:
        return {key: _join(value, tensors) for key, value in node["dict"]}
    values = [_join(value, tensors) for value in node["list" if "list" in node else "tuple"]]
    return values if "list" in node else tuple(values)
