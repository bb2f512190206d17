"""Counts tokens, seconds, bytes and losses during training, and writes them as metrics lines.

Losses on the meta device have no value, so their lines have no loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowcomm.comm.metered import Meter
from lowcomm.data.validation import bits_per_byte


class Diverged(Exception):
    """A loss became infinite or NaN.

    Attributes:
        t: the inner step that computed it.
    """

    def __init__(self, t: int, loss: float) -> None:
        super().__init__(f"the loss of inner step {t} is {loss}")
        self.t = t


@dataclass
class Ledger:
    """The metrics of one rank.

    Attributes:
        write: receives each line, a dict with the keys of `lowcomm.metrics`.
        meter: counts this rank's traffic.
        now: the clock, in seconds; virtual in a simulation.
        rank: of this process.
        num_replicas: that train now.
        step_tokens: training tokens of one inner step of one replica.
        log_every: inner steps between lines.
        token_flops: floating-point operations per training token; None: not counted.
        peak_flops: peak bfloat16 FLOP/s of this device; None: unknown.
    """

    write: Callable[[dict[str, Any]], None]
    meter: Meter
    now: Callable[[], float]
    rank: int
    num_replicas: int
    step_tokens: int
    log_every: int
    token_flops: float | None
    peak_flops: float | None

    t: int = 0
    tokens: int = 0
    time_s: float = 0.0
    train_s: float = 0.0
    wait_s: float = 0.0
    steady_s: float = 0.0
    steady_tokens: int = 0
    val_loss: float | None = None
    _written_tokens: int = 0
    _losses: list[Tensor] = field(default_factory=list)
    _loss: float | None = None
    _since_s: float | None = None
    _waited_s: float = 0.0
    _warm: bool = False
    _round: int = 0

    def start(self) -> None:
        """Start the clock."""
        self.meter.settle()
        self._since_s, self._waited_s = self.now(), self.meter.wait_s

    def step(self, t: int, loss: Tensor, lr: float, round: int, num_replicas: int, tokens: int) -> None:
        """Count an inner step of the present replicas; write a line every `log_every` steps.

        Args:
            tokens: that the run has gained since the last step.

        Raises:
            Diverged: when a loss since the last line is not finite.
        """
        self._losses.append(loss.detach())
        self.t, self.num_replicas = t, num_replicas
        self.tokens += tokens
        if t % self.log_every == 0:
            self.flush(lr, round)

    def flush(self, lr: float, round: int) -> None:
        """Write the steps since the last line, if any. Waits for the device."""
        if not self._losses:
            return
        num_steps = len(self._losses)
        losses = [] if self._losses[0].is_meta else torch.stack(self._losses).double().tolist()
        self._losses.clear()
        window_s = self._pass_time(training=True)
        for i, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise Diverged(self.t - num_steps + 1 + i, loss)
        window_tokens = self.tokens - self._written_tokens
        self._written_tokens = self.tokens
        if self._warm:  # the first window holds compilation and first touches
            self.steady_s, self.steady_tokens = self.steady_s + window_s, self.steady_tokens + window_tokens
        self._warm = True
        self._loss = sum(losses) / num_steps if losses else None
        speed = self._speed(window_tokens, window_s)
        self.write(self._line("step") | {"round": round} | _known(loss=self._loss) | {"lr": lr} | speed)
        if round != self._round:
            self._round = round
            self.write(self._line("round") | {"round": round, "members": self.num_replicas})

    def evaluation(self, loss: float, bytes_per_token: float) -> None:
        """Write a validation loss, in nats per token and bits per byte."""
        self.val_loss = loss
        bits = bits_per_byte(loss, bytes_per_token)
        self.write(self._line("eval") | {"round": self._round, "val_loss": loss, "val_bits_per_byte": bits})

    def summary(self, algorithm: str, num_parameters: int, bytes_per_token: float) -> dict[str, Any]:
        """Write and return the last line."""
        line = self._line("summary") | {
            "round": self._round,
            "algorithm": algorithm,
            "num_parameters": num_parameters,
            "members": self.num_replicas,
            **_known(loss=self._loss, val_loss=self.val_loss),
            "traffic": {
                tag: {"bytes_sent": x.bytes_sent, "bytes_received": x.bytes_received, "exchanges": x.num_exchanges}
                for tag, x in sorted(self.meter.by_tag.items())
            },
        }
        if self.val_loss is not None:
            line["val_bits_per_byte"] = bits_per_byte(self.val_loss, bytes_per_token)
        # A run of a single window has no steady part: its only window counts.
        tokens, seconds = (self.steady_tokens, self.steady_s) if self.steady_s > 0 else (self.tokens, self.train_s)
        line |= self._speed(tokens, seconds)
        self.write(line)
        return line

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time within (evaluation, checkpoints) from the training speed, but not from the run's time."""
        self._pass_time(training=True)
        try:
            yield
        finally:
            self._pass_time(training=False)

    def state_dict(self) -> dict[str, Any]:
        """The counts, for a resumed run."""
        assert not self._losses, "flush before saving"
        counts = {name: getattr(self, name) for name in _SAVED}
        return counts | {"meter": self.meter.state_dict(), "round": self._round, "loss": self._loss}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for name in _SAVED:
            setattr(self, name, state[name])
        self._round, self._loss, self._written_tokens = state["round"], state["loss"], self.tokens
        self.meter.load_state_dict(state["meter"])

    def _pass_time(self, training: bool) -> float:
        assert self._since_s is not None, "start() first"
        self.meter.settle()
        now, waited_s = self.now(), self.meter.wait_s
        seconds, self._since_s = now - self._since_s, now
        self.time_s += seconds
        if training:
            self.train_s += seconds
            self.wait_s += waited_s - self._waited_s
        self._waited_s = waited_s
        return seconds

    def _line(self, kind: str) -> dict[str, Any]:
        return {
            "kind": kind,
            "t": self.t,
            "rank": self.rank,
            "time_s": self.time_s,
            "tokens": self.tokens,
            "bytes_sent": self.meter.bytes_sent,
            "bytes_received": self.meter.bytes_received,
            "comm_wait_s": self.wait_s,
            "compute_s": max(0.0, self.train_s - self.wait_s),
        }

    def _speed(self, tokens: int, seconds: float) -> dict[str, float | None]:
        per_s = tokens / seconds if seconds > 0 else None
        mfu = (
            per_s
            and self.peak_flops
            and self.token_flops
            and per_s / self.num_replicas * self.token_flops / self.peak_flops
        )
        return {"tokens_per_s": per_s, "mfu": mfu}


def _known(loss: float | None, val_loss: float | None = None) -> dict[str, float]:
    """The losses that have a value, as entries of a line."""
    return {name: x for name, x in (("loss", loss), ("val_loss", val_loss)) if x is not None}


_SAVED = ("t", "tokens", "time_s", "train_s", "wait_s", "steady_s", "steady_tokens", "val_loss")
