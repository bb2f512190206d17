"""What the page and /metrics show: of each replica, of the last rounds, and who is late and why.

A replica is flagged when its work, or its exchange, takes longer than the median of the round's by three times their
median absolute deviation (`outliers`), ``SLOW_ROUNDS`` times in a row: C4 (Dong et al. 2024, arXiv:2406.04594) tells
slow machines from slow links so.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from lowcomm.coordinator.messages import Ended
from lowcomm.participation.meeting import View

SLOW_ROUNDS = 3
_NUM_ROUNDS = 120


@dataclass
class Replica:
    """What is known of one; times are on the coordinator's clock, None where nothing has been said yet.

    Attributes:
        state: "working" (or exchanging what a round is about), "waiting" for a decision, or "gone".
        since_s: when that began.
        work_s: the last time from a decision to the next arrival, without the exchange.
        why: in words, when it is late or gone.
        num_late: rounds decided without it while it was present.
        slow_work, slow_link: rounds in a row in which its work, or its exchange, was an outlier.
    """

    name: str
    state: str
    since_s: float
    why: str = ""
    version: int = 0
    step: int = 0
    num_tokens: float = 0.0
    loss: float | None = None
    work_s: float | None = None
    first_byte_s: float | None = None
    done_s: float | None = None
    num_bytes: int = 0
    num_rounds: int = 0
    num_late: int = 0
    slow_work: int = 0
    slow_link: int = 0


@dataclass
class Round:
    """One decision, ``took_s`` after the one before; ``late`` are 20 at most of those present who are not in it."""

    round: int
    epoch: int
    took_s: float
    num_members: int
    late: tuple[int, ...]
    tokens: float
    bytes: int = 0
    losses: list[float] = field(default_factory=list)


def outliers(values: Mapping[int, float]) -> set[int]:
    """Whose value lies above the median by 3 median absolute deviations, and by 15 % of it; none of fewer than 3."""
    if len(values) < 3:
        return set()
    middle = median(values.values())
    spread = max(median(abs(value - middle) for value in values.values()), 0.05 * middle)
    return {replica for replica, value in values.items() if value > middle + 3 * spread}


class History:
    """Told of all that happens, asked by readers; nothing depends on it."""

    def __init__(self, now_s: float) -> None:
        self.replicas: dict[int, Replica] = {}
        self.rounds: deque[Round] = deque(maxlen=_NUM_ROUNDS)
        self.num_rounds = self.num_bytes = self.num_refused = 0
        self.num_tokens = 0.0
        self._decided_s = self._begun_s = now_s

    def joined(self, replica: int, name: str, now_s: float) -> None:
        """A process was admitted; what is known of the replica before stays."""
        known = self.replicas.setdefault(replica, Replica(name, "working", now_s))
        known.name, known.state, known.since_s, known.why = name, "working", now_s, ""

    def gone(self, replica: int, why: str, now_s: float) -> None:
        """It left, died or stopped."""
        if replica in self.replicas:
            known = self.replicas[replica]
            known.state, known.since_s, known.why = "gone", now_s, why

    def arrived(self, replica: int, version: int, step: int, now_s: float) -> None:
        """It waits for a decision."""
        known = self.replicas[replica]
        if known.state != "waiting":
            known.work_s = max(0.0, now_s - known.since_s - (known.done_s or 0.0))
            known.state, known.since_s = "waiting", now_s
        known.version, known.step = version, step

    def decided(self, view: View, present: tuple[int, ...], now_s: float) -> None:
        """A round begins; those who are present and not in it are late."""
        late = tuple(replica for replica in present if replica not in view.members and replica in self.replicas)
        taking = {replica: self.replicas[replica] for replica in view.members if replica in self.replicas}
        waited = {replica: now_s - self.replicas[replica].since_s for replica in late}
        work = {replica: known.work_s for replica, known in taking.items() if known.work_s is not None} | waited
        link = {replica: known.done_s for replica, known in taking.items() if known.done_s is not None}
        slow_work, slow_link = outliers(work), outliers(link)
        usual_s = median(work.values()) if work else 0.0
        for replica in (*taking, *late):
            known = self.replicas[replica]
            known.slow_work = known.slow_work + 1 if replica in slow_work else 0
            known.slow_link = known.slow_link + 1 if replica in slow_link else 0
            known.why = self._why(known, usual_s, replica not in taking)
            known.num_late += replica not in taking
        for replica, tokens in zip(view.members, view.tokens, strict=True):
            if replica in taking:
                known = taking[replica]
                known.state, known.since_s = "working", now_s
                known.num_rounds, known.num_tokens = known.num_rounds + 1, known.num_tokens + tokens
        took_s, total = now_s - self._decided_s, sum(view.tokens)
        self.rounds.append(Round(view.round, view.epoch, took_s, len(view.members), late[:20], total))
        self._decided_s, self.num_rounds, self.num_tokens = now_s, self.num_rounds + 1, self.num_tokens + total

    def ended(self, replica: int, said: Ended) -> None:
        """It committed a round."""
        known = self.replicas[replica]
        known.first_byte_s, known.done_s, known.loss = said.first_byte_s, said.done_s, said.loss
        known.num_bytes, self.num_bytes = known.num_bytes + said.bytes, self.num_bytes + said.bytes
        for past in reversed(self.rounds):
            if past.round == said.round:
                past.bytes += said.bytes
                past.losses += [] if said.loss is None else [said.loss]
                break

    def status(self, now_s: float, silent_s: Mapping[int, float]) -> dict[str, Any]:
        """All of it, as JSON, with ages instead of times.

        Args:
            silent_s: for how long a replica has answered no ping, where that is too long.
        """
        recent = list(self.rounds)[-20:]
        span_s = sum(past.took_s for past in recent) + now_s - self._decided_s
        replicas = []
        for number, known in sorted(self.replicas.items()):
            row = asdict(known) | {"replica": number, "for_s": now_s - known.since_s}
            if not known.why and known.state == "working" and now_s - known.since_s > 1.5 * (known.work_s or math.inf):
                row["why"] = f"still at work; its last took {known.work_s:.2f} s"
            if number in silent_s:
                row["why"] = f"silent for {silent_s[number]:.1f} s"
            replicas.append(row)
        rounds = [asdict(past) | {"loss": median(past.losses) if past.losses else None} for past in self.rounds]
        return {
            "replicas": replicas,
            "rounds": rounds,
            "num_rounds": self.num_rounds,
            "num_bytes": self.num_bytes,
            "num_tokens": self.num_tokens,
            "num_refused": self.num_refused,
            "tokens_per_s": sum(past.tokens for past in recent) / span_s if span_s else 0.0,
            "up_s": now_s - self._begun_s,
        }

    def _why(self, known: Replica, usual_s: float, is_late: bool) -> str:
        if known.slow_link >= SLOW_ROUNDS:
            return f"slow link: its exchange took {known.done_s:.2f} s"
        if known.slow_work >= SLOW_ROUNDS:
            return f"slow machine: {known.work_s or 0:.2f} s of work, usual {usual_s:.2f} s"
        return f"late: missed the last round, usual work {usual_s:.2f} s" if is_late else ""
