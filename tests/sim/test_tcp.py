"""What TCP adds to a transfer: windows that open round trip by round trip, and close when nobody sends."""

import pytest

from lowcomm.sim.wire.collectives import Turns
from lowcomm.sim.wire.links import Links, Transport
from lowcomm.sim.wire.network import Network
from lowcomm.sim.wire.tcp import Connections, turns_s
from tests.sim.fake_clock import FakeClock

BYTES_PER_S, ROUND_TRIP_S = 12.5e6, 0.04  # 500,000 bytes fill the way there and back


def packet_by_packet(window, num_bytes):
    """The time of the last byte's leaving, when what was acknowledged opens the window by as much; the slow way."""
    sent, acknowledged, time_s, acks = 0.0, 0.0, 0.0, []
    piece = 100.0
    while sent < num_bytes:
        while acks and acks[0] <= time_s + 1e-12:
            acks.pop(0)
            acknowledged += piece
            window += piece
        if sent - acknowledged + piece <= window:
            time_s += piece / BYTES_PER_S
            sent += piece
            acks.append(time_s + ROUND_TRIP_S)
        else:
            time_s = acks[0]
    return time_s


@pytest.mark.parametrize("num_bytes", [5_000, 20_000, 100_000, 400_000, 3_000_000])
def test_a_new_connection_opens_its_window_with_every_round_trip(num_bytes):
    waited_s = Connections(14_400).wait_s((0, 1), 0.0, num_bytes, BYTES_PER_S, ROUND_TRIP_S)
    expected_s = packet_by_packet(14_400.0, num_bytes) - num_bytes / BYTES_PER_S
    assert waited_s == pytest.approx(expected_s, abs=0.1 * ROUND_TRIP_S)


def test_a_used_connection_waits_no_more_until_it_was_idle():
    connections = Connections(14_480)
    ask = lambda path, now_s: connections.wait_s(path, now_s, 4e6, BYTES_PER_S, ROUND_TRIP_S)  # noqa: E731
    first_s = ask((0, 1), 0.0)
    assert first_s > 0.15
    connections.used((0, 1), 1.0)
    assert ask((0, 1), 1.1) == 0.0
    assert ask((1, 0), 1.1) == first_s, "each direction has its own"
    connections.used((0, 1), 2.0)
    assert 0 < ask((0, 1), 2.0 + 3 * (0.2 + ROUND_TRIP_S)) < first_s, "halved a few times"
    connections.used((0, 1), 4.0)
    assert ask((0, 1), 1e6) == first_s


@pytest.mark.parametrize(("latency_s", "initial_bytes"), [(0.0, 14_480), (0.02, None)])
def test_without_latency_or_a_window_nothing_waits(latency_s, initial_bytes):
    clock, transport = FakeClock(), Transport(initial_window_bytes=initial_bytes, bandwidth_factor=1.0)
    network = Network(clock, Links([1e8] * 2, [1e8] * 2, lambda a, b: latency_s, transport=transport))
    network.send(0, 1, 1.25e6, lambda: None)
    assert clock.run() == pytest.approx(0.1 + latency_s)


def test_turns_hide_behind_long_messages():
    latency_s = 0.02
    assert turns_s(Turns(6, 125_000), BYTES_PER_S, latency_s, latency_s) == pytest.approx(6 * 0.03)
    assert turns_s(Turns(6, 1_000_000), BYTES_PER_S, latency_s, latency_s) == 0.0
    # in line behind a message of the other direction
    assert turns_s(Turns(6, 1_000_000, both_ways=True), BYTES_PER_S, latency_s, latency_s) == pytest.approx(6 * 0.04)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("streams", 0), ("window_bytes", 0.0), ("initial_window_bytes", -1.0)],
        *[("latency_factor", -1.0), ("bandwidth_factor", 1.5)],
    ],
)
def test_impossible_transports_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        Transport(**{name: value})
