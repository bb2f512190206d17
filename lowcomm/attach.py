"""Adds lowcomm to a training loop of your own, in two lines.

sync = lowcomm.attach(model, optimizer, DiLoCo(every=100), comm) ...                       # per step: loss.backward();
optimizer.step(); sync.step()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from lowcomm.algorithms.base import Algorithm
from lowcomm.comm.base import Comm
from lowcomm.engine.torch_engine import TorchEngine
from lowcomm.membership import Members
from lowcomm.rounds.buffers import align
from lowcomm.state import restore, state_tree


class Sync:
    """Synchronises a model with its replicas; made by `attach`.

    Attributes:
        t: inner steps so far.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        algorithm: Algorithm[Any],
        comm: Comm,
        on_loss: Literal["stop", "go_on"],
    ) -> None:
        self.t = 0
        self._engine = TorchEngine(model, optimizer, clip_norm=None)
        self._algorithm, self._members = algorithm, Members(comm, on_loss == "go_on")
        self._device = self._engine.slots()["param"][0].device
        tensors = [x.detach() for x in [*model.parameters(), *model.buffers()]]
        arrivals = [comm.broadcast(x, comm.members[0]) for x in tensors]
        for x, arrival in zip(tensors, arrivals, strict=True):
            x.copy_(arrival.wait())
        self._watch, self._is_first = self._engine.watch_forward(), True
        self._state = algorithm.init(self._engine, comm)
        if algorithm.sends_in_backward():
            raise ValueError(
                f"{algorithm} sends while backward goes on, but in a loop of one's own lowcomm does not see it; set "
                "overlap to False"
            )
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Arguments for the optimizer in place of ``args``, which begin with the optimizer itself, and ``kwargs``."""
        rest = dict(kwargs)
        closure = rest.pop("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._before_update()
            return None

        def evaluate() -> Any:
            loss = closure()
            self._before_update()  # not sooner: these are the gradients of the step
            return loss

        return (optimizer, evaluate, *args[2:]), rest

    def _before_update(self) -> None:
        self._talk(partial(self._algorithm.before_update, self.t + 1, self._engine, self._state))

    def step(self) -> None:
        """Call after each optimizer step; communicates when the algorithm does."""
        self.t += 1
        if self._is_first and (self._algorithm.keeps_equal() or not self._engine.buffers()):
            self._watch.remove()  # nothing will be recalculated, so nothing to hold inputs for
        self._is_first = False
        self._talk(partial(self._algorithm.after_update, self.t, self._engine, self._state))

    def _talk(self, call: Callable[[Comm], None]) -> None:
        self._members.take(self._algorithm, self._engine, self._state, call)

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks that train now."""
        return self._members.comm.members

    def finish(self) -> None:
        """Call after the last step: synchronises the replicas and their buffers, and removes the hooks."""
        self._talk(partial(self._algorithm.complete, self.t, self._engine, self._state))
        self._talk(partial(self._algorithm.finish, self.t, self._engine, self._state))
        self._hook.remove()
        self._watch.remove()
        self._talk(partial(align, self._algorithm, self._engine))

    def state_dict(self) -> dict[str, Any]:
        """State to save beside the model's and the optimizer's. All replicas save after the same step."""
        self._algorithm.settle(self._state)
        return {"t": self.t, "algorithm": state_tree(self._state)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`; load this replica's model and optimizer too."""
        self.t = state["t"]
        restore(self._state, state["algorithm"], self._device)


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    algorithm: Algorithm[Any],
    comm: Comm,
    on_loss: Literal["stop", "go_on"] = "stop",
) -> Sync:
    """Train ``model`` together with the other members of ``comm``.

    All replicas start from the first member's parameters and buffers, which this call broadcasts. Unscale and clip
    gradients before ``optimizer.step()``; `DataParallel` averages them inside it. With a closure, gradients are
    averaged at each call. Optimizers that call it a varying number of times, such as LBFGS, need an algorithm that
    averages no gradients.

    A gradient scaler may skip an update on one replica alone only if no gradients are averaged. With `DataParallel`,
    `SAVIC`, `DeMo`, or `After` with one of them, the replicas would deadlock.

    Buffers that forward changes, such as running statistics, stay local until `Sync.finish`. It averages them, and
    where it moves the parameters it recalculates them before, from the last inputs on which ``model`` was called in
    training mode; so up to 8 inputs stay in memory (`lowcomm.rounds.buffers.align`).

    Args:
        on_loss: when a replica is lost, "stop" raises `PeerLost` or `Late`; with "go_on" the others continue, and
            pending exchanges are repeated or dropped.

    Raises:
        ValueError: when the model has nothing to train, the optimizer does not hold its parameters, or the algorithm
            would send during backward.
    """
    return Sync(model, optimizer, algorithm, comm, on_loss)
