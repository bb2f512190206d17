"""Resumes a run from the newest checkpoint that is whole on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from lowcomm.checkpoint import Checkpoints
from lowcomm.comm.base import Comm
from lowcomm.comm.metered import MeteredComm
from lowcomm.config import Run, decisive, describe
from lowcomm.metrics import read
from lowcomm.replica import Replica
from lowcomm.state import restore


def resume(replica: Replica, checkpoints: Checkpoints) -> int:
    """Load the newest checkpoint that is whole on all members; returns its step, 0 without one.

    Newer ones are deleted after all members have loaded and before any trains.

    Raises:
        ValueError: as `newest_common`, `Checkpoints.steps` and `Checkpoints.load`; nothing is deleted then.
    """
    comm = replica.comm.tagged("checkpoint")
    newest = newest_common(*whole_here(checkpoints), comm)
    loaded = None if newest is None else checkpoints.load(newest)
    if loaded is not None:
        replica.engine.load_state_dict(loaded["engine"])
        restore(replica.state, loaded["algorithm"], replica.device)
        replica.stream.load_state_dict(loaded["stream"])
    checkpoints.place.meet(comm)
    checkpoints.discard_after(newest or 0)
    checkpoints.place.meet(comm)
    if loaded is not None:  # last, for its meter goes on as if nothing had been sent here
        replica.ledger.load_state_dict(loaded["ledger"])
    return newest or 0


def whole_here(checkpoints: Checkpoints) -> tuple[list[int], bool]:
    """The steps whose checkpoints are whole on all ranks of this replica, and whether one knows that all had one."""
    steps, one_knows = _gathered(checkpoints.steps(), checkpoints.were_on_all(), checkpoints.place.within)
    return sorted(set.intersection(*steps)), one_knows


def newest_common(steps: Sequence[int], were_on_all: bool, comm: MeteredComm) -> int | None:
    """The largest step in all members' ``steps``; None if the run never had a checkpoint on all.

    Args:
        were_on_all: whether this member knows that all once had a checkpoint, see `Checkpoints.were_on_all`.

    Raises:
        ValueError: on every member, when all once had a checkpoint and now have none in common; says who has what.
    """
    gathered, one_knows = _gathered(steps, were_on_all, comm)
    common = max(set.intersection(*gathered), default=None)
    if common is None and one_knows:
        ranks: dict[int, list[int]] = {}
        for rank, theirs in zip(comm.members, gathered, strict=True):
            ranks.setdefault(max(theirs, default=0), []).append(rank)
        newest = "; ".join(f"{f'step {t}' if t else 'none'} on ranks {ranks[t]}" for t in sorted(ranks, reverse=True))
        raise ValueError(
            f"no checkpoint is whole on all ranks, though one was; the newest are: {newest}. Nothing was deleted: "
            "bring back what is missing (each machine keeps its own ranks' checkpoints: start the same machines in the "
            "same order, or share the directory), or start a new run in another --out"
        )
    return common


def _gathered(steps: Sequence[int], were_on_all: bool, comm: Comm) -> tuple[list[set[int]], bool]:
    """Each member's steps, and whether one knows that all had a checkpoint."""
    if len(comm.members) == 1:  # no process group is made for one rank
        return [set(steps)], were_on_all
    heads = [x.tolist() for x in comm.all_gather(torch.tensor([len(steps), int(were_on_all)])).wait()]
    longest = max(length for length, _ in heads)
    padded = torch.tensor([*sorted(steps), *[-1] * (longest - len(steps))], dtype=torch.int64)
    return [set(x.tolist()) - {-1} for x in comm.all_gather(padded).wait()], any(knows for _, knows in heads)


def check_beginning(run: Run, path: Path) -> None:
    """Check that a run resumed without a checkpoint, which starts over, replaces only its own beginning.

    Args:
        path: this rank's metrics file.

    Raises:
        ValueError: when it is of a finished run, or of another config.
    """
    if path.exists() and any(record["kind"] == "summary" for record in read(path)):
        raise ValueError(
            f"{path.parent} holds a run that ended, and no checkpoint to go on from; choose another --out, or delete "
            "that directory to train again"
        )
    config = path.parent / "config.yaml"
    if config.exists():
        try:
            known = yaml.safe_load(config.read_text(encoding="utf-8"))
        except yaml.YAMLError:
            known = None
        if not isinstance(known, dict) or decisive(known) != decisive(describe(run)):
            raise ValueError(
                f"{config} is of another run, and there is no checkpoint to go on from; give the config that it began "
                "with, or choose another --out"
            )
