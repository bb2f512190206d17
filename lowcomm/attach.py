"""Adds lowcomm to a training loop of your own, in two lines.

sync = lowcomm.attach(model, optimizer, DiLoCo(every=100), comm) ...                       # per step: loss.backward();
optimizer.step(); sync.step()
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal
from weakref import WeakMethod, finalize

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from lowcomm.algorithms.base import Algorithm, share_states
from lowcomm.comm.agreement import check_agreement
from lowcomm.comm.base import Comm
from lowcomm.engine.held import Held, held_by, require_plain
from lowcomm.engine.torch_engine import TorchEngine
from lowcomm.membership import Members
from lowcomm.rounds.buffers import align
from lowcomm.state import restore, state_tree
from lowcomm.tensors import digest

_ALIKE = "attach replicas of one model, with the same optimizer and method, on all ranks"
# Options of an optimizer that change no result, and may follow the device.
_WAYS = {"foreach", "fused", "capturable", "differentiable"}


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
        optimizer = _innermost(optimizer)
        self._engine = TorchEngine(model, optimizer, clip_norm=None)
        self._algorithm, self._members = algorithm, Members(comm, on_loss == "go_on")
        self._device = self._engine.slots()["param"][0].device
        if algorithm.sends_in_backward():
            raise ValueError(
                f"{algorithm} sends while backward goes on, but in a loop of one's own lowcomm does not see it; set "
                "overlap to False"
            )
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, x in named.items():
            require_plain(name, x)
        check_agreement(comm, _facts(model, optimizer, algorithm), _ALIKE)
        tensors = [x.detach() for x in named.values()]
        arrivals = [comm.broadcast(x, comm.members[0]) for x in tensors]
        for x, arrival in zip(tensors, arrivals, strict=True):
            x.copy_(arrival.wait())
        self._watch, self._is_first = self._engine.watch_forward(), True
        self._state = algorithm.init(self._engine, comm)
        self._held = Held(model, optimizer)
        self._has_stepped, self._other = False, ""
        watches = WeakMethod(self._before_any_step)  # torch's list of such hooks keeps no model alive
        watch = register_optimizer_step_pre_hook(lambda *args: (call := watches()) and call(*args))
        finalize(self, watch.remove)
        self._hooks = [optimizer.register_step_pre_hook(self._before_step), watch]

    def _before_any_step(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        """Notice an optimizer that was put in the place of the attached one."""
        if optimizer is self._engine.optimizer:
            self._has_stepped = True
        elif any(p in self._held for p in held_by(optimizer)):
            self._other = type(optimizer).__name__

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
        """Call after each optimizer step; communicates when the algorithm does.

        Raises:
            ValueError: when model or optimizer are no longer as they were attached, or after `finish`.
        """
        self._check()
        self._has_stepped, self._other = False, ""
        self.t += 1
        if self._is_first and (self._algorithm.keeps_equal() or not self._engine.buffers()):
            self._watch.remove()  # nothing will be recalculated, so nothing to hold inputs for
        self._is_first = False
        self._talk(partial(self._algorithm.after_update, self.t, self._engine, self._state))

    def _check(self) -> None:
        if not self._hooks:
            raise ValueError("finish() has ended this; to go on, attach() the model and its optimizer again")
        self._held.check()
        if self._other and not self._has_stepped:
            raise ValueError(
                f"since attach, another optimizer ({self._other}) trains the parameters, and the attached one took no "
                "step: call finish() before such a change, and attach() again with the new one"
            )

    def _require_training_mode(self) -> None:
        if any(group.get("train_mode") is False for group in self._engine.optimizer.param_groups):
            raise ValueError(
                "the optimizer is in evaluation mode, whose parameters are not those that replicas average: call "
                "optimizer.train() before optimizer.step(), sync.step() and sync.finish()"
            )

    def _talk(self, call: Callable[[Comm], None]) -> None:
        self._require_training_mode()
        self._members.take(self._algorithm, self._engine, self._state, call)

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks that train now."""
        return self._members.comm.members

    def finish(self) -> None:
        """Call after the last step: synchronises replicas and their buffers, and frees the optimizer.

        A second call does nothing.

        Raises:
            ValueError: as `step`; also then the optimizer is free, unless it only was in evaluation mode.
        """
        if not self._hooks:
            return
        self._require_training_mode()
        try:
            self._check()
            self._talk(partial(self._algorithm.complete, self.t, self._engine, self._state))
            self._talk(partial(self._algorithm.finish, self.t, self._engine, self._state))
            if self._engine.has_modes and not self._algorithm.keeps_equal():
                self._talk(partial(share_states, self._engine))  # so that `optimizer.eval()` leads to one point
            self._watch.remove()
            self._talk(partial(align, self._algorithm, self._engine))
        finally:
            for hook in [*self._hooks, self._watch]:
                hook.remove()
            self._hooks.clear()

    def state_dict(self) -> dict[str, Any]:
        """State to save beside the model's and the optimizer's. All replicas save after the same step."""
        self._algorithm.settle(self._state)
        return {"t": self.t, "algorithm": state_tree(self._state)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`, on all replicas; load this replica's model and optimizer too.

        Raises:
            ValueError: on all replicas, when they load states of different steps.
        """
        check_agreement(
            self._members.comm, {"step": str(state["t"])}, "load what all replicas saved after the same step"
        )
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
    gradients before ``optimizer.step()``; `DataParallel` averages them inside it, and a missing one, as of a replica
    whose batch was empty, counts as zeros. With a closure, gradients are averaged at each call. Optimizers that call it
    a varying number of times, such as LBFGS, need an algorithm that averages no gradients.

    An optimizer with ``train()`` and ``eval()`` (schedule-free) is in training mode at each `step` and at `finish`. Its
    averages are those of one replica until then, unless DES-LOC averages "z" as often as "param".

    A gradient scaler may skip an update on one replica alone only if no gradients are averaged. With `DataParallel`,
    `SAVIC`, `DeMo`, or `After` with one of them, the replicas would deadlock.

    What is trained stays as it is until `Sync.finish`: other parameters, memory, dtype or optimizer need `attach` anew.

    Buffers that forward changes, such as running statistics, stay local until `Sync.finish`. It averages them, and
    where it moves the parameters it recalculates them before, from the last inputs on which ``model`` was called in
    training mode; so up to 8 inputs stay in memory (`lowcomm.rounds.buffers.align`).

    Args:
        on_loss: when a replica is lost, "stop" raises `PeerLost` or `Late`; with "go_on" the others continue, and
            pending exchanges are repeated or dropped.

    Raises:
        ValueError: when the model has nothing to train or tensors that cannot be averaged, the optimizer does not hold
            its parameters or is attached already, or the algorithm would send during backward; on all ranks, when they
            bring different models, optimizers or algorithms.
    """
    return Sync(model, optimizer, algorithm, comm, on_loss)


def _innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer within wrappers that pass ``step()`` on, as accelerate's do."""
    while not getattr(getattr(type(optimizer), "step", None), "hooked", False):  # as torch marks steps that call hooks
        if not isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
            raise ValueError(f"{type(optimizer).__name__} calls no step hooks; derive it from torch.optim.Optimizer")
        optimizer = inner
    if any(isinstance(getattr(h, "__self__", None), Sync) for h in optimizer._optimizer_step_pre_hooks.values()):
        raise ValueError(
            f"this {type(optimizer).__name__} is attached already, and would average twice: first call finish() of the "
            "Sync that attach returned for it"
        )
    return optimizer


def _facts(model: nn.Module, optimizer: Optimizer, algorithm: Algorithm[Any]) -> dict[str, str]:
    """What all replicas must have in common."""
    lines, states = [f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"], list[Tensor]()
    if algorithm.keeps_equal():  # by equal updates, to which also this belongs
        names = {id(p): name for name, p in model.named_parameters()}
        for group in optimizer.param_groups:
            options = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in group.items() if k not in _WAYS}
            options["params"] = [names[id(p)] for p in group["params"]]
            lines += [f"{name}={options[name]!r}" for name in sorted(options)]
        kept = [sorted(optimizer.state.get(p, {}).items()) for p in held_by(optimizer)]
        states = [x for state in kept for _, x in state if isinstance(x, Tensor)]
    facts = {
        "parameter list": _listed(model.named_parameters()),
        "buffer list": _listed(model.named_buffers()),
        "optimizer": "\n".join(lines),
        "optimizer state": digest(states),
        "algorithm": repr(algorithm),
    }
    # addresses of objects without a repr of their own, and what torch.compile adds to names
    return {name: re.sub(r" at 0x[0-9a-f]+|\b_orig_mod\.", "", text) for name, text in facts.items()}


def _listed(named: Iterable[tuple[str, Tensor]]) -> str:
    return "\n".join(f"{name} {x.dtype}{list(x.shape)}{' trained' if x.requires_grad else ''}" for name, x in named)
