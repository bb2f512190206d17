"""What counts as waiting: that of training; and the numbers of each line."""

import math
from dataclasses import dataclass

import pytest
import torch

from lowcomm.comm.metered import Meter
from lowcomm.ledger import Diverged, Ledger


@dataclass
class Event:
    """One of a GPU stream, as a meter uses it; at so many seconds."""

    at_s: float

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.at_s - self.at_s)


def test_waits_before_and_beside_training_are_not_its_own():
    now, meter, lines = [0.0], Meter(), []
    ledger = Ledger(lines.append, meter, lambda: now[0], 0, 2, 5, 100, None, None)

    def passes(seconds, waiting=0.0):
        now[0] += seconds
        meter.wait_s += waiting

    passes(5.0, waiting=4.0)  # for a rank that began late
    ledger.start()
    passes(3.0, waiting=1.0)
    ledger.step(1, torch.tensor(1.0), 0.1, 1, 2, 2 * ledger.step_tokens)
    ledger.flush(0.1, 1)
    with ledger.paused():
        passes(2.0, waiting=1.5)
    passes(4.0, waiting=0.5)
    ledger.step(2, torch.tensor(1.0), 0.1, 2, 2, 2 * ledger.step_tokens)
    ledger.flush(0.1, 2)
    found = [(x["time_s"], x["comm_wait_s"], x["compute_s"]) for x in lines if x["kind"] == "step"]
    assert found == [(3.0, 1.0, 2.0), (9.0, 1.5, 5.5)]
    other = Ledger(lines.append, Meter(), lambda: now[0], 0, 2, 5, 100, None, None)
    other.load_state_dict(ledger.state_dict())
    other.start()
    summary = other.summary("", 0, 1.0)
    assert (summary["comm_wait_s"], summary["compute_s"]) == (1.5, 5.5)


def test_waits_of_a_stream_before_the_start_are_not_those_of_training():
    now, meter, lines = [0.0], Meter(), []
    ledger = Ledger(lines.append, meter, lambda: now[0], 0, 2, 5, 1, None, None)
    meter._events.append((Event(0.0), Event(4.0)))
    now[0] = 5.0
    ledger.start()
    meter._events.append((Event(5.0), Event(6.0)))
    now[0] = 8.0
    ledger.step(1, torch.tensor(1.0), 0.1, 1, 2, 2 * ledger.step_tokens)
    assert (lines[0]["comm_wait_s"], lines[0]["compute_s"]) == (1.0, 2.0)


def noted(losses, log_every, seconds, **state):
    """The ledger of 2 replicas, 10 tokens a step, steps of so many seconds, a round every two; and its lines."""
    now, lines = [0.0], []
    ledger = Ledger(lines.append, Meter(), lambda: now[0], 3, 2, 5, log_every, 6.0, 50.0)
    ledger.load_state_dict(ledger.state_dict() | state)
    ledger.start()
    for t, (loss, passed) in enumerate(zip(losses, seconds, strict=True), ledger.t + 1):
        now[0] += passed
        ledger.step(t, torch.tensor(loss), 0.1, t // 2, 2, 2 * ledger.step_tokens)
    return ledger, lines


def test_lines_have_the_mean_loss_the_speed_of_all_and_the_share_of_the_peak_of_one():
    ledger, lines = noted([1.0, 2.0, 4.0, 6.0], 2, [3.0, 1.0, 1.0, 4.0])
    steps = [x for x in lines if x["kind"] == "step"]
    assert [(x["t"], x["tokens"], x["loss"], x["lr"], x["rank"]) for x in steps] == [
        (2, 20, 1.5, 0.1, 3),
        (4, 40, 5.0, 0.1, 3),
    ]
    assert [x["tokens_per_s"] for x in steps] == [5.0, 4.0]
    assert [x["mfu"] for x in steps] == pytest.approx([5 / 2 * 6 / 50, 4 / 2 * 6 / 50])
    assert [(x["kind"], x["t"], x["round"]) for x in lines] == [
        *(("step", 2, 1), ("round", 2, 1), ("step", 4, 2), ("round", 4, 2)),
    ]
    ledger.evaluation(2 * math.log(2), 4.0)
    assert lines[-1]["val_loss"] == 2 * math.log(2) and lines[-1]["val_bits_per_byte"] == 0.5
    ledger.meter.count("b", 3, 4)
    ledger.meter.count("a", 1, 2)
    ledger.meter.count("b", 10, 20)
    summary = ledger.summary("DiLoCo", 7, 4.0)
    assert summary == lines[-1] and summary["tokens_per_s"] == 4.0, "the first window is no steady one"
    assert summary["traffic"] == {
        "a": {"bytes_sent": 1, "bytes_received": 2, "exchanges": 1},
        "b": {"bytes_sent": 13, "bytes_received": 24, "exchanges": 2},
    }
    assert (summary["bytes_sent"], summary["bytes_received"], summary["round"]) == (14, 26, 2)
    assert (summary["loss"], summary["val_bits_per_byte"], summary["members"]) == (5.0, 0.5, 2)


def test_a_run_of_one_window_has_its_speed_and_one_that_goes_on_its_totals():
    ledger, _ = noted([1.0, 1.0], 2, [3.0, 1.0])
    assert ledger.summary("", 0, 1.0)["tokens_per_s"] == 5.0
    ledger, lines = noted([2.0, 2.0], 2, [3.0, 2.0], **ledger.state_dict())
    assert [x["kind"] for x in lines] == ["step", "round"] and (lines[0]["t"], lines[0]["time_s"]) == (4, 9.0)
    ledger, lines = noted([3.0] * 3, 1, [1.0, 2.0, 8.0], **ledger.state_dict())
    assert [x["kind"] for x in lines] == ["step", "step", "round", "step"]
    state = ledger.state_dict()
    assert (state["steady_tokens"], state["steady_s"], state["train_s"]) == (20, 10.0, 20.0)
    again, _ = noted([], 1, [], **state)
    assert again.summary("", 0, 1.0)["tokens_per_s"] == 2.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_step_that_diverged_is_named(bad):
    with pytest.raises(Diverged, match="inner step 5 is") as caught:
        noted([1.0, 1.0, 1.0, 1.0, bad, math.nan], 3, [1.0] * 6)
    assert caught.value.t == 5
