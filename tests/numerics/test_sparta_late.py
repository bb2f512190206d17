"""SPARTA with averages that take longer than a round: no value is corrected twice for one disagreement."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowcomm.algorithms.base import step
from lowcomm.algorithms.sparta import SPARTA, part_size, places
from lowcomm.comm.echo import EchoComm
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.compress.cast import Cast
from lowcomm.engine.torch_engine import TorchEngine
from lowcomm.reduce import Reducer
from tests.replicas import adamw, flat, make_batch, make_engine, mse
from tests.world import run_world


@given(st.integers(0, 300), st.integers(2, 60), st.data())
def test_with_late_averages_places_return_after_a_fixed_number_of_rounds(num, num_parts, data):
    num_late = data.draw(st.integers(1, num_parts - 1))
    numbers = range(1, 3 * num_parts + 1)
    parts = [places([torch.empty(num)], num_parts, number, 0, num_late)[0].tolist() for number in numbers]
    assert all(len(part) == len(set(part)) <= part_size(num, num_parts) for part in parts)
    for place in range(num):
        rounds = [number for number, part in zip(numbers, parts, strict=True) if place in part]
        assert rounds[0] <= num_parts
        assert len({b - a for a, b in pairwise(rounds)}) == 1
        assert num_late < rounds[1] - rounds[0] <= num_parts


LATE = [(0.005, 1, 5), (0.25, 1, 3), (0.1, 1, 9), (0.1, 1, 1), (0.5, 1, 1), (0.3, 2, 7), (0.2, 3, 3), (0.2, 3, 2)]


class Rows(torch.nn.Module):
    """Parameters of 1 to 12 values."""

    def __init__(self):
        super().__init__()
        self.rows = torch.nn.ParameterList(torch.zeros(n, dtype=torch.float64) for n in range(1, 13))


def rows_engine(loss, lr=0.02):
    model = Rows()
    return TorchEngine(model, torch.optim.SGD(model.parameters(), lr=lr), loss=loss, clip_norm=None)


@pytest.mark.parametrize(("fraction", "every", "delay"), LATE)
def test_no_value_is_sent_while_its_average_is_under_way_and_all_are_in_each_pass(fraction, every, delay):
    """Parameters that hold the places of their values, which averages of equal replicas leave there."""
    engine, comm = rows_engine(mse), EchoComm(2)
    rows = engine.slots()["param"]
    for row in rows:
        row.copy_(torch.arange(row.numel()))
    algorithm = SPARTA(fraction, every, delay)
    state = algorithm.init(engine, comm)
    sent_t = [[[] for _ in range(row.numel())] for row in rows]
    pass_steps = every * algorithm.num_parts
    num_steps = 4 * pass_steps
    for t in range(1, num_steps + 1):
        before = algorithm.num_rounds(state)
        under_way = [[set(own.tolist()) for own in sent.memo[0]] for sent in state.under_way]
        algorithm.after_update(t, engine, state, comm)
        if algorithm.num_rounds(state) > before and delay > 0:
            new = state.under_way[-1]
            assert new.sent_t == t
            for k, own in enumerate(new.memo[0]):
                assert all(not set(own.tolist()) & parts[k] for parts in under_way), f"{k + 1} values, step {t}"
                for place in own.tolist():
                    sent_t[k][int(place)].append(t)
    for times in (times for row in sent_t for times in row):
        assert all(b - a > delay for a, b in pairwise(times))
        for begin in range(0, num_steps, pass_steps):
            assert any(begin < t <= begin + pass_steps for t in times)


@pytest.mark.parametrize(("fraction", "every", "delay"), LATE)
def test_late_averages_keep_replicas_together_whatever_a_parameters_size(fraction, every, delay):
    """Two replicas pulled to -1 and 1. Left alone for k steps, equal ones are 2 (1 - 0.98^k) apart; so far at most may
    they be between the averages of a value: since it was sent the last time, a pass and a delay go by.
    """

    def run(delay):
        def program(comm):
            engine = rows_engine(lambda model, target: sum((row - target).square().sum() / 2 for row in model.rows))
            algorithm = SPARTA(fraction, every, delay)
            state, seen = algorithm.init(engine, comm), []
            for t in range(1, 151):
                step(algorithm, t, engine, state, comm, torch.tensor(2.0 * comm.rank - 1))
                seen.append([row.clone() for row in engine.slots()["param"]])
            return seen

        low, high = run_world(2, program)
        return [
            [(b - a).abs().max().item() for a, b in zip(*rows, strict=True)] for rows in zip(low, high, strict=True)
        ]

    def apart(num_steps):
        return 2 * (1 - 0.98**num_steps)

    num_parts = SPARTA(fraction, every, delay).num_parts
    late, at_once = run(delay), run(0)
    for n, by_step in enumerate(zip(*late, strict=True), 1):
        rounds = min(num_parts, max(n, delay // every + 1))
        # without a delay a value may come first in one pass and last in the next
        limit = apart((rounds if delay >= every else 2 * num_parts) * every + delay)
        assert max(by_step) <= limit + 1e-12, f"{n} values"
        more = apart((delay // every + 1) * every + delay)
        assert max(by_step) <= max(spread[n - 1] for spread in at_once) + more, f"{n} values"


@pytest.mark.parametrize(("delay", "arrived"), [(1, 1), (3, 2), (6, 3), (25, 13)])
def test_the_second_message_sets_out_before_its_average_is_due(delay, arrived, monkeypatch):
    """And leaves the values as they are when it does not."""

    def program(comm):
        metered = MeteredComm(comm, Meter())
        engine, algorithm = make_engine(adamw), SPARTA(0.2, every=10, delay=delay, reducer=Reducer(Cast()))
        state, seen, steps, before = algorithm.init(engine, metered), [], [], 0
        for t in range(1, 46):
            step(algorithm, t, engine, state, metered, make_batch(comm.rank, t))
            now = sum(traffic.num_exchanges for traffic in metered.meter.by_tag.values())
            steps += [t] * (now - before)
            before = now
            seen.append(flat(engine.slots()["param"]))
        return steps, torch.stack(seen)

    staggered = run_world(2, program)
    first = [10, 20, 30, 40]
    expected = sorted([*first, *(t + arrived for t in first if t + arrived <= 45)])
    assert all(steps == expected for steps, _ in staggered)
    monkeypatch.setattr("lowcomm.rounds.exchanges.Exchange.advance", lambda *_: None)
    for (_, seen), (steps, held_back) in zip(staggered, run_world(2, program), strict=True):
        assert steps != expected or delay == arrived
        assert torch.equal(seen, held_back)
