"""The training loop and its checkpoints; `lowcomm.resume` continues from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowcomm.algorithms.base import standing
from lowcomm.checkpoint import Checkpoints
from lowcomm.comm.metered import MeteredComm
from lowcomm.replica import Replica
from lowcomm.rounds.buffers import align
from lowcomm.state import state_tree

T = TypeVar("T")


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
    """Train from the replica's current step to the end of the plan."""
    algorithm, engine, state, ledger = replica.algorithm, replica.engine, replica.state, replica.ledger
    ledger.start()
    t = ledger.t
    while t < plan.num_steps:
        t += 1
        lr, batch = engine.lr(), replica.stream.next().to(replica.device)
        loss = engine.backward(batch, algorithm.during_backward(t, engine, state, replica.comm))
        replica.talk(partial(algorithm.before_update, t, engine, state))
        engine.update()
        t = replica.meet(t, plan.num_steps)
        replica.talk(partial(algorithm.after_update, t, engine, state))
        if t == plan.num_steps:
            replica.gather(t)
            replica.talk(partial(algorithm.complete, t, engine, state))
            replica.talk(partial(algorithm.finish, t, engine, state))
            replica.talk(lambda comm: align(algorithm, engine, comm.tagged("buffers")))
        ledger.step(t, loss, lr, algorithm.num_rounds(state), len(replica.comm.members), replica.committed())

        if _due(t, plan.evaluate_every) or t == plan.num_steps:
            ledger.flush(lr, algorithm.num_rounds(state))
            if plan.validation:
                with ledger.paused():
                    val_loss = replica.talk(partial(evaluate, replica, plan.validation))
                    ledger.evaluation(val_loss, plan.bytes_per_token)
        if _due(t, plan.save_every):
            ledger.flush(lr, algorithm.num_rounds(state))
            with ledger.paused():
                replica.talk(partial(save, replica, checkpoints, t))


def evaluate(replica: Replica, batches: Sequence[Tensor], comm: MeteredComm) -> float:
    """The mean loss of the consensus parameters, equal on all members; each evaluates a share of the batches."""
    engine, tagged = replica.engine, comm.tagged("evaluation")
    total = torch.zeros(2, dtype=torch.float64, device=replica.device)  # summed loss, number of targets
    with standing(replica.algorithm, engine, replica.state, tagged):
        buffers = engine.buffers()
        kept = [x.clone() for x in buffers]
        try:
            align(replica.algorithm, engine, comm.tagged("buffers"))
            for batch in batches[comm.place :: len(comm.members)]:
                num_targets = batch[:, 1:].numel()
                total[0] += engine.evaluate(batch.to(replica.device)) * num_targets
                total[1] += num_targets
        finally:
            for x, old in zip(buffers, kept, strict=True):
                x.copy_(old)
    loss, num_targets = tagged.all_sum(total).wait().tolist()
    return float(loss / num_targets)


def save(replica: Replica, checkpoints: Checkpoints, t: int, comm: MeteredComm) -> None:
    """Save this rank; older checkpoints are deleted once every rank of every member has saved."""
    replica.algorithm.settle(replica.state)
    checkpoints.save(t, snapshot(replica))
    checkpoints.place.meet(comm.tagged("checkpoint"))
    checkpoints.confirm(t)
    checkpoints.prune(t)


def snapshot(replica: Replica) -> dict[str, Any]:
    """Everything that this rank needs to resume."""
    return {
        "engine": replica.engine.state_dict(),
        "algorithm": state_tree(replica.state),
        "stream": replica.stream.state_dict(),
        "ledger": replica.ledger.state_dict(),
    }


def _due(t: int, every: int) -> bool:
    return every > 0 and t % every == 0
