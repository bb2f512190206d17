"""What counts as waiting: that of training."""

from dataclasses import dataclass

import torch

from lowcomm.comm.metered import Meter
from lowcomm.ledger import Ledger


@dataclass
class Event:
    """One of a GPU stream, as a meter uses it; at so many seconds."""

    at_s: float

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.at_s - self.at_s)


def test_waits_before_and_beside_training_are_not_its_own():
    now, meter, lines = [0.0], Meter(), []
    ledger = Ledger(lines.append, meter, lambda: now[0], 0, 2, 10, 100, None, None)

    def passes(seconds, waiting=0.0):
        now[0] += seconds
        meter.wait_s += waiting

    passes(5.0, waiting=4.0)  # for a rank that began late
    ledger.start()
    passes(3.0, waiting=1.0)
    ledger.step(1, torch.tensor(1.0), 0.1, 1)
    ledger.flush(0.1, 1)
    with ledger.paused():
        passes(2.0, waiting=1.5)
    passes(4.0, waiting=0.5)
    ledger.step(2, torch.tensor(1.0), 0.1, 2)
    ledger.flush(0.1, 2)
    found = [(x["time_s"], x["comm_wait_s"], x["compute_s"]) for x in lines if x["kind"] == "step"]
    assert found == [(3.0, 1.0, 2.0), (9.0, 1.5, 5.5)]
    other = Ledger(lines.append, Meter(), lambda: now[0], 0, 2, 10, 100, None, None)
    other.load_state_dict(ledger.state_dict())
    other.start()
    summary = other.summary("", 0, 1.0)
    assert (summary["comm_wait_s"], summary["compute_s"]) == (1.5, 5.5)


def test_waits_of_a_stream_before_the_start_are_not_those_of_training():
    now, meter, lines = [0.0], Meter(), []
    ledger = Ledger(lines.append, meter, lambda: now[0], 0, 2, 10, 1, None, None)
    meter._events.append((Event(0.0), Event(4.0)))
    now[0] = 5.0
    ledger.start()
    meter._events.append((Event(5.0), Event(6.0)))
    now[0] = 8.0
    ledger.step(1, torch.tensor(1.0), 0.1, 1)
    assert (lines[0]["comm_wait_s"], lines[0]["compute_s"]) == (1.0, 2.0)
