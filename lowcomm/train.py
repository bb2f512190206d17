"""The training loop, and what it saves on the way; `lowcomm.resume` goes on from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lowcomm.algorithms.base import Algorithm, step
from lowcomm.checkpoint import Checkpoints
from lowcomm.comm.metered import MeteredComm
from lowcomm.engine.base import Engine
from lowcomm.ledger import Ledger
from lowcomm.state import state_tree


class Stream(Protocol):
    """Training batches without end."""

    def next(self) -> Tensor:
        """The next batch, on the CPU."""

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""


@dataclass(frozen=True)
class Replica:
    """What trains: all that changes during a run, and nothing else."""

    algorithm: Algorithm[Any]
    engine: Engine
    state: Any
    stream: Stream
    ledger: Ledger
    comm: MeteredComm
    device: torch.device


@dataclass(frozen=True)
class Plan:
    """How far to train and what to do on the way.

    Attributes:
        num_steps: inner steps of the whole run.
        evaluate_every: inner steps between evaluations; 0 evaluates at the end only.
        save_every: inner steps between checkpoints; 0 saves none.
        validation: batches, the same on every rank; without any nothing is evaluated.
        bytes_per_token: of the validation text.
    """

    num_steps: int
    evaluate_every: int
    save_every: int
    validation: Sequence[Tensor]
    bytes_per_token: float


def train(replica: Replica, plan: Plan, checkpoints: Checkpoints) -> None:
    """Train to the end of the plan from wherever the replica stands."""
    algorithm, engine, state, comm = replica.algorithm, replica.engine, replica.state, replica.comm
    ledger = replica.ledger
    ledger.start()
    for t in range(ledger.t + 1, plan.num_steps + 1):
        lr = engine.lr()
        loss = step(algorithm, t, engine, state, comm, replica.stream.next().to(replica.device))
        if t == plan.num_steps:
            algorithm.finish(t, engine, state, comm)
        ledger.step(t, loss, lr, algorithm.num_rounds(state))

        if _due(t, plan.evaluate_every) or t == plan.num_steps:
            ledger.flush(lr, algorithm.num_rounds(state))
            if plan.validation:
                with ledger.paused():
                    ledger.evaluation(evaluate(replica, plan.validation), plan.bytes_per_token)
        if _due(t, plan.save_every):
            ledger.flush(lr, algorithm.num_rounds(state))
            with ledger.paused():
                save(replica, checkpoints, t)


def evaluate(replica: Replica, batches: Sequence[Tensor]) -> float:
    """The mean loss of the parameters that stand for the run, batches shared out among the members; equal on all."""
    engine, comm = replica.engine, replica.comm.tagged("evaluation")
    live, standing = engine.slots()["param"], replica.algorithm.consensus(engine, replica.state)
    kept = [x.clone() for x in live]
    torch._foreach_copy_(live, standing)
    total = torch.zeros(2, dtype=torch.float64, device=replica.device)  # summed loss, number of targets
    for batch in batches[comm.place :: len(comm.members)]:
        num_targets = batch[:, 1:].numel()
        total[0] += engine.evaluate(batch.to(replica.device)) * num_targets
        total[1] += num_targets
    torch._foreach_copy_(live, kept)
    loss, num_targets = comm.all_sum(total).wait().tolist()
    return float(loss / num_targets)


def save(replica: Replica, checkpoints: Checkpoints, t: int) -> None:
    """Save this rank; older checkpoints go once every member has saved."""
    replica.algorithm.settle(replica.state)
    checkpoints.save(t, snapshot(replica))
    replica.comm.tagged("checkpoint").all_sum(torch.ones(1)).wait()
    checkpoints.confirm(t)
    checkpoints.prune(t)


def snapshot(replica: Replica) -> dict[str, Any]:
    """Everything that a restart of this rank needs."""
    return {
        "engine": replica.engine.state_dict(),
        "algorithm": state_tree(replica.state),
        "stream": replica.stream.state_dict(),
        "ledger": replica.ledger.state_dict(),
    }


def _due(t: int, every: int) -> bool:
    return every > 0 and t % every == 0
