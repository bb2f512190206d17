"""Flows take the time that arithmetic says, share fairly, and lose no byte whatever changes under way."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowcomm.sim.wire.links import BARE, Links
from lowcomm.sim.wire.network import Network
from tests.sim.fake_clock import FakeClock

MBIT = 1e6
MBYTE_S = 8e6  # bits per second that move a megabyte a second


def links(up, down=None, latency_s=0.0, path_bits_per_s=None, **transport):
    """Links of the bare model, but for what is said of the transport: one latency for all pairs."""
    down = up if down is None else down
    paths = None if path_bits_per_s is None else table(path_bits_per_s)
    return Links(up, down, lambda a, b: latency_s, paths, replace(BARE, **transport))


def table(rows):
    """A matrix as a function of (source, to)."""
    return lambda a, b: rows[a][b]


def end_times(wires, flows, then=()):
    """When each flow (source, to, num_bytes[, at]) ends; ``then`` are (time, what to do with the network)."""
    clock, ends = FakeClock(), [None] * len(flows)
    network = Network(clock, wires)

    def send(i, source, to, num_bytes):
        network.send(source, to, num_bytes, lambda: ends.__setitem__(i, clock.now))

    for i, (source, to, num_bytes, *at) in enumerate(flows):
        clock.at(at[0] if at else 0.0, partial(send, i, source, to, num_bytes))
    for time, action in then:
        clock.at(time, partial(action, network))
    clock.run()
    return ends


def test_one_flow_takes_its_latency_and_its_bytes():
    wires = links([MBYTE_S] * 2, latency_s=0.05)
    assert end_times(wires, [(0, 1, 2e6)]) == pytest.approx([2.05])
    there_and_back = table([[0.0, 0.05], [0.2, 0.0]])
    lv08 = replace(
        wires, latency_s=there_and_back, transport=replace(BARE, latency_factor=13.01, bandwidth_factor=0.97)
    )
    assert end_times(lv08, [(0, 1, 2e6)]) == pytest.approx([2 / 0.97 + 13.01 * 0.05])


def test_two_flows_share_an_uplink_until_one_ends():
    # a megabyte a second each until the short one ends at 1 s, then the long one has both
    assert end_times(links([2 * MBYTE_S] * 3), [(0, 1, 1e6), (0, 2, 3e6)]) == pytest.approx([1.0, 2.0])


def test_a_flow_that_comes_later_takes_its_share_from_then_on():
    # alone to 1 s (2 MB), shared until 3 s (2 MB each)
    assert end_times(links([2 * MBYTE_S] * 3), [(0, 1, 4e6), (0, 2, 2e6, 1.0)]) == pytest.approx([3.0, 3.0])


def test_directions_are_separate_and_may_differ():
    wires = links([MBYTE_S] * 2, down=[4 * MBYTE_S, 2 * MBYTE_S])
    assert end_times(wires, [(0, 1, 1e6), (1, 0, 1e6)]) == pytest.approx([1.0, 1.0])
    fan_in = links([4 * MBYTE_S] * 3, down=[MBYTE_S] * 3)
    assert end_times(fan_in, [(0, 2, 1e6), (1, 2, 1e6)]) == pytest.approx([2.0, 2.0])


def test_half_duplex_shares_both_directions():
    wires = links([MBYTE_S] * 2, half_duplex=True)
    assert end_times(wires, [(0, 1, 1e6), (1, 0, 1e6)]) == pytest.approx([2.0, 2.0])


def test_a_path_is_shared_by_the_flows_of_its_pair_alone():
    wires = links([9 * MBYTE_S] * 3, path_bits_per_s=[[0, 1 * MBYTE_S, float("inf")]] + [[MBYTE_S] * 3] * 2)
    flows = [(0, 1, 1e6), (0, 1, 1e6), (0, 2, 7e6)]
    assert end_times(wires, flows) == pytest.approx([2.0, 2.0, 7 / 8])
    halved = replace(wires, transport=replace(BARE, bandwidth_factor=0.5))
    assert end_times(halved, flows) == pytest.approx([4.0, 4.0, 7 / 4])


def test_windows_cap_a_flow_by_its_round_trip():
    wires = links([100 * MBYTE_S] * 2, latency_s=0.1, window_bytes=1e6)
    assert end_times(wires, [(0, 1, 10e6)]) == pytest.approx([0.1 + 10 / (1 / 0.2)])
    four = replace(wires, transport=replace(wires.transport, streams=4))
    assert end_times(four, [(0, 1, 10e6)]) == pytest.approx([0.1 + 10 / (4 / 0.2)])
    # what a capped flow leaves, others have
    slow = replace(wires, up_bits_per_s=[20 * MBYTE_S] * 3, down_bits_per_s=[20 * MBYTE_S] * 3)
    uneven = replace(slow, latency_s=table([[0, 0.1, 0], [0.1, 0, 0], [0, 0, 0]]))
    assert end_times(uneven, [(0, 1, 10e6), (0, 2, 15e6)]) == pytest.approx([2.1, 0.1 + (15 - 2) / 15])


def test_links_change_in_mid_flow():
    slow_down = [(1.0, lambda network: network.set_rate(0, up_bits_per_s=MBYTE_S))]
    half = links([4 * MBYTE_S] * 2, bandwidth_factor=0.5)  # of the new rate, too
    assert end_times(half, [(0, 1, 4e6)], slow_down) == pytest.approx([5.0])
    speed_up = [(1.0, lambda network: network.set_rate(1, down_bits_per_s=4 * MBYTE_S))]
    assert end_times(links([8 * MBYTE_S] * 2, down=[MBYTE_S] * 2), [(0, 1, 9e6)], speed_up) == pytest.approx([3.0])


@pytest.mark.parametrize("from_s", [0.0, 0.05, 0.5])
def test_a_blocked_flow_waits_where_it_is(from_s):
    then = [(from_s, lambda network: network.block(0, 1)), (5.0, lambda network: network.unblock(0, 1))]
    wires = links([MBYTE_S] * 3, latency_s=0.1)
    moved_before = max(0.0, from_s - 0.1) / 2  # while both share the uplink
    blocked, other, back = end_times(wires, [(0, 1, 1e6), (0, 2, 1e6), (1, 0, 1e6)], then)
    assert blocked == pytest.approx(5.0 + 1 - moved_before)
    assert other == pytest.approx(1.1 + moved_before)  # it has the uplink to itself
    assert back == pytest.approx(1.1)


def test_cancel_gives_the_rate_to_others_and_calls_nobody():
    clock, ends, records = FakeClock(), [], []
    network = Network(clock, links([2 * MBYTE_S] * 3), records.append)
    flow = network.send(0, 1, 9e6, lambda: ends.append("cancelled"))
    network.send(0, 2, 3e6, lambda: ends.append(clock.now))
    clock.at(1.0, lambda: network.cancel(flow))
    clock.at(1.2, lambda: network.cancel(flow))  # over already
    assert clock.run() == pytest.approx(2.0)
    assert ends == pytest.approx([2.0]) and flow.over
    assert [(r.to, r.end_s, r.moved_bytes) for r in records] == [(1, 1.0, 1e6), (2, 2.0, 3e6)]


def test_cancel_before_the_first_byte_and_at_the_last():
    clock, ends, records = FakeClock(), [], []
    network = Network(clock, links([MBYTE_S] * 4, latency_s=1.0), records.append)
    early = network.send(2, 1, 1e6, lambda: ends.append("early"))  # it would share the uplink of rank 2
    clock.at(0.5, lambda: network.cancel(early))
    network.send(2, 3, 1e6, lambda: network.cancel(twin))  # both end at 2 s, this one first
    twin = network.send(3, 2, 1e6, lambda: ends.append("twin"))
    assert clock.run() == 2.0
    assert ends == []
    assert records[0] == (2, 1, 1e6, 0.0, 0.5, 0.5, 0.0) and len(records) == 3


def test_flows_that_end_together_end_in_the_order_in_which_they_were_sent():
    clock, ends = FakeClock(), []
    network = Network(clock, links([2 * MBYTE_S] * 5))
    for i, (source, to, num_bytes) in enumerate([(0, 1, 3e6), (0, 2, 1e6), (3, 4, 4e6)]):
        network.send(source, to, num_bytes, partial(ends.append, i))  # the end of 2 is in sight before that of 0
    assert clock.run() == 2.0 and ends == [1, 0, 2]


# any network, any flows, and links that slow down, speed up and fall out under way


@dataclass(frozen=True)
class Case:
    """A network of few ranks and what happens on it."""

    wires: Links
    flows: list[tuple[int, int, float, float]]
    changes: list[tuple[float, int, float, float]]


@st.composite
def cases(draw):
    n = draw(st.integers(2, 5))
    rate = st.sampled_from([1.0, 2.0, 3.0, 10.0])
    rates = st.lists(rate.map(lambda x: x * MBYTE_S), min_size=n, max_size=n)
    matrix = st.lists(st.lists(rate.map(lambda x: x * MBYTE_S), min_size=n, max_size=n), min_size=n, max_size=n)
    up, half_duplex = draw(rates), draw(st.booleans())
    wires = links(
        up,
        down=up if half_duplex else draw(rates),
        latency_s=draw(st.sampled_from([0.0, 0.1])),
        half_duplex=half_duplex,
        path_bits_per_s=draw(st.none() | matrix),
        window_bytes=draw(st.none() | st.just(2e5)),
    )
    rank, time = st.integers(0, n - 1), st.sampled_from([0.0, 0.3, 0.7, 1.0])
    pair = st.tuples(rank, rank).filter(lambda ends: ends[0] != ends[1])
    flow = st.tuples(pair, st.floats(0, 5e6), time).map(lambda x: (*x[0], x[1], x[2]))
    change = st.tuples(time, rank, rate.map(lambda x: x * MBYTE_S), st.sampled_from([0.1, 0.5]))
    return Case(wires, draw(st.lists(flow, min_size=1, max_size=8)), draw(st.lists(change, max_size=3)))


class Watched:
    """A case on its way, with the rates looked at whenever time passes."""

    def __init__(self, case, look=None):
        self.clock, self.records, self.flows = FakeClock(self.watch), [], []
        self.network, self.case, self.look = Network(self.clock, case.wires, self.records.append), case, look
        self.moved, wires, n = {}, case.wires, len(case.wires.up_bits_per_s)
        sides = {"up": wires.up_bits_per_s, "down": wires.down_bits_per_s}
        self.rates = {(self.side(way), rank): rates[rank] / 8 for way, rates in sides.items() for rank in range(n)}
        for source, to, num_bytes, at in case.flows:
            self.clock.at(at, partial(self.send, source, to, num_bytes))
        for at, rank, rate, blocked_s in case.changes:
            self.clock.at(at, partial(self.change, rank, rate))
            self.clock.at(at, partial(self.network.block, rank, (rank + 1) % n))
            self.clock.at(at + blocked_s, partial(self.network.unblock, rank, (rank + 1) % n))
        self.clock.run()

    def side(self, way):
        return "both" if self.case.wires.transport.half_duplex else way

    def send(self, source, to, num_bytes):
        flow = self.network.send(source, to, num_bytes, lambda: None)
        self.flows.append(flow)
        self.moved[flow] = 0.0

    def change(self, rank, rate):
        self.network.set_rate(rank, up_bits_per_s=rate)
        self.rates[self.side("up"), rank] = rate / 8

    def watch(self, seconds):
        running = [flow for flow in self.flows if flow.begin_s is not None and not flow.over]
        for flow in running:
            self.moved[flow] += flow.rate_bytes_per_s * seconds
        if self.look is not None:
            self.look(self, running)

    def links_of(self, flow):
        """The names and rates of the links that a flow takes, off the case rather than the network."""
        taken = {name: self.rates[name] for name in ((self.side("up"), flow.source), (self.side("down"), flow.to))}
        if self.case.wires.path_bits_per_s is not None:
            taken["path", flow.source, flow.to] = self.case.wires.path(flow.source, flow.to) / 8
        return taken


@given(cases())
@settings(max_examples=60)
def test_no_link_carries_more_than_it_can_and_every_flow_has_a_bottleneck(case):
    """Max-min fair: each flow is at its cap, or fills a link on which no flow is faster (Bertsekas, Gallager 6.5.2)."""

    def look(run, running):
        load, fastest = {}, {}
        for flow in running:
            for link in run.links_of(flow):
                load[link] = load.get(link, 0.0) + flow.rate_bytes_per_s
                fastest[link] = max(fastest.get(link, 0.0), flow.rate_bytes_per_s)
        for flow in running:
            rate, taken = flow.rate_bytes_per_s, run.links_of(flow)
            assert all(load[link] <= limit * (1 + 1e-9) for link, limit in taken.items())
            assert rate >= flow.cap_bytes_per_s * (1 - 1e-9) or any(
                load[link] >= limit * (1 - 1e-9) and rate >= fastest[link] * (1 - 1e-9) for link, limit in taken.items()
            )

    Watched(case, look)


@given(cases())
@settings(max_examples=60)
def test_every_byte_moves_once_whatever_changes_under_way(case):
    run = Watched(case)
    assert all(flow.over for flow in run.flows) and len(run.records) == len(run.flows)
    for flow in run.flows:
        assert run.moved[flow] == pytest.approx(flow.num_bytes, rel=1e-9, abs=1e-3)
    assert all(record.moved_bytes == record.num_bytes for record in run.records)


@given(cases(), st.data())
@settings(max_examples=60)
def test_more_bytes_never_finish_sooner(case, data):
    i = data.draw(st.integers(0, len(case.flows) - 1))
    source, to, num_bytes, at = case.flows[i]
    more = [*case.flows[:i], (source, to, num_bytes * 1.5 + 1, at), *case.flows[i + 1 :]]
    before, after = (end_times(case.wires, flows)[i] for flows in (case.flows, more))
    assert after >= before


# mistakes


def test_a_half_duplex_link_has_one_rate():
    with pytest.raises(ValueError, match="half_duplex needs equal"):
        links([MBIT] * 2, [2 * MBIT] * 2, half_duplex=True)


@pytest.mark.parametrize("flow", [(1, 1, 1.0), (0, 1, -1.0), (-1, 1, 1.0)])
def test_impossible_flows_are_refused(flow):
    with pytest.raises(AssertionError):
        Network(FakeClock(), links([MBIT] * 2)).send(*flow, lambda: None)
