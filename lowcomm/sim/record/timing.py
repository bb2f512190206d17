"""Timing only: replicas of shapes without values, for models too large to simulate.

The training loop and the method run unchanged on meta tensors: all messages are sent and time passes, but nothing is
computed. So there is no loss, no text is read, and what a method sends must not depend on values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowcomm.assemble import Assembled, build_engine, open_ledger, without_values
from lowcomm.attendance import Seat, attend
from lowcomm.comm.metered import MeteredComm
from lowcomm.config import Batch, Run
from lowcomm.engine.base import Engine, Ready
from lowcomm.engine.torch_engine import TorchEngine
from lowcomm.membership import Members
from lowcomm.replica import Replica
from lowcomm.train import Plan


class Shapes:
    """What all replicas of a run share: they differ in values alone, and there are none.

    Args:
        inner: on the meta device; its optimizer takes one step, to see what states it has.
        batch: without values; the engine computes its gradients, to see in which order. None where nobody asks.

    Attributes:
        model: as it would be trained.
        params, gradients: in the order of `Engine.slots`.
        names: of the parameters, likewise.
        buffers: those that training changes.
        ready: their places in the order in which backward finishes them; empty without batch.
        first_states, states: of the optimizer by name before and after its first step, likewise.
        needs_all_gradients: see `Engine.needs_all_gradients`.
        ways: see `Engine.standing`.
    """

    def __init__(self, inner: TorchEngine, batch: Tensor | None) -> None:
        self.model = inner.model
        self.ready: list[int] = []
        if batch is not None:
            inner.backward(batch, lambda i, gradient: self.ready.append(i))
        self.params, self.names, self.buffers = inner.slots()["param"], inner.names(), inner.buffers()
        self.gradients = [torch.empty(x.shape, dtype=x.dtype, device="meta") for x in self.params]
        self.needs_all_gradients = inner.needs_all_gradients()
        self._inner, self._lrs = inner, [inner.lr()]
        for parameter in inner.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        self.first_states = _states(inner)
        inner.update()
        self._lrs.append(inner.lr())
        self.states = _states(inner)
        with inner.standing(self.params) as self.ways:
            pass

    def lr(self, num_updates: int) -> float:
        """The learning rate after so many updates."""
        while len(self._lrs) <= num_updates:
            if self._inner.schedule is not None:
                self._inner.schedule.step()
            self._lrs.append(self._inner.lr())
        return self._lrs[num_updates]


class TimingEngine(Engine):
    """One replica's inner loop without arithmetic."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self._num_updates = 0
        self._is_between = False  # backward and update

    def backward(self, batch: Any, ready: Ready | None = None) -> Tensor:
        """Gradients become final in the order of a real backward."""
        assert ready is None or self._shapes.ready, "the algorithm says that it does not send then"
        self._is_between = True
        if ready is not None:
            for i in self._shapes.ready:
                ready(i, self._shapes.gradients[i])
        return torch.empty((), device="meta")

    def update(self) -> None:
        self._is_between = False
        self._num_updates += 1

    def update_part(self, numbers: Sequence[int]) -> None:
        """Takes no time and changes no value."""

    def needs_all_gradients(self) -> str | None:
        return self._shapes.needs_all_gradients

    def evaluate(self, batch: Any) -> Tensor:
        """NaN, where its sum with others' is taken."""
        return torch.full((), math.nan)

    def standing(self, params: list[Tensor]) -> AbstractContextManager[list[Tensor]]:
        return nullcontext(self._shapes.ways if self._num_updates else [])

    def has_stepped(self) -> bool:
        return self._num_updates > 0

    def slots(self) -> Mapping[str, list[Tensor]]:
        slots = {"param": self._shapes.params}
        if self._is_between:
            slots["grad"] = self._shapes.gradients
        return slots | (self._shapes.states if self._num_updates else self._shapes.first_states)

    def buffers(self) -> list[Tensor]:
        return self._shapes.buffers

    def names(self) -> list[str]:
        return self._shapes.names

    def lr(self) -> float:
        return self._shapes.lr(self._num_updates)

    def skip(self, num_steps: int) -> None:
        self._num_updates += num_steps

    def state_dict(self) -> dict[str, Any]:
        """The number of updates."""
        return {"num_updates": self._num_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._num_updates, self._is_between = state["num_updates"], False


class NoText:
    """A stream of batches without tokens."""

    def next(self) -> Tensor:
        """Nothing."""
        return torch.empty(0, dtype=torch.int64)

    def state_dict(self) -> dict[str, Any]:
        """Nothing to go on from."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to go on from."""


def shapes_of(run: Run, num_replicas: int, vocab_size: int | None = None) -> Shapes:
    """The shapes of a run.

    Args:
        vocab_size: of its tokenizer; None asks it.

    Raises:
        ValueError: when the model or the optimizer depends on values.
    """
    # the meta device knows no autocast, and needs no compiling; the order of gradients is that of any one micro-batch
    precision = "fp32" if run.precision == "bf16_mixed" else run.precision
    plain = replace(run, precision=precision, compile=False, batch=Batch(size=1))
    batch = torch.empty(1, run.data.seq_len + 1, dtype=torch.int64, device="meta")
    with explained():
        model = without_values(run, run.data.tokenizer.vocab_size if vocab_size is None else vocab_size)
        engine = build_engine(plain, model, run.steps(num_replicas))
        return Shapes(engine, batch if run.algorithm.sends_in_backward() else None)


def assemble_shapes(
    run: Run,
    shapes: Shapes,
    comm: MeteredComm,
    write: Callable[[dict[str, Any]], None],
    around: Callable[[Engine], Engine],
    seat: Seat | None = None,
) -> Assembled:
    """One member's replica, as `lowcomm.assemble.assemble` would build it, but of shapes.

    Args:
        write: where metrics lines go.
        around: what is put around the engine: a virtual clock.
        seat: as `lowcomm.assemble.assemble`'s.
    """
    device = torch.device("cpu")  # of what the loop itself sums
    engine = around(TimingEngine(shapes))
    comm.tagged("start").all_gather(torch.empty(*_DIGESTS, dtype=torch.uint8, device="meta")).wait()

    def write_known(line: dict[str, Any]) -> None:
        for name in ("val_loss", "val_bits_per_byte"):
            line.pop(name, None)
        write(line)

    ledger = open_ledger(run, shapes.model, comm, device, write_known)
    members = Members(comm, run.on_loss == "go_on")
    state = run.algorithm.init(engine, comm)
    attendance = attend(run.participation, seat, comm, run.algorithm, state)
    replica = Replica(run.algorithm, engine, state, NoText(), ledger, members, device, attendance)
    holds_out = run.data.validation is not None or run.data.validation_fraction > 0
    window = torch.empty(1, 2, dtype=torch.int64)  # however many there are, their losses make one sum
    plan = Plan(run.steps(len(comm.members)), run.evaluation.every, 0, [window] if holds_out else [], math.nan)
    return Assembled(replica, plan, shapes.model, "")


_DIGESTS = (3, 16)  # those that `lowcomm.assemble.check_agreement` compares, in bytes


def _states(engine: Engine) -> dict[str, list[Tensor]]:
    return {name: xs for name, xs in engine.slots().items() if name not in ("param", "grad")}


@contextmanager
def explained() -> Iterator[None]:
    """Inside, what wants a value that is not there is the user's mistake.

    Raises:
        ValueError: saying so.
    """
    try:
        yield
    except RuntimeError as error:
        if "meta" not in str(error).lower():
            raise
        raise ValueError(
            f"timing alone knows shapes but no values, and something in this run depends on values ({error}); choose "
            "another optimizer or compressor, or simulate the arithmetic too: timing_only false"
        ) from error
