"""Sharing is done where something changed and nowhere else; that it is fair is in test_network.py."""

from lowcomm.sim.wire.links import Links
from lowcomm.sim.wire.network import Network
from lowcomm.sim.wire.sharing import fair_rates
from tests.sim.fake_clock import FakeClock


def num_rates(num_groups, monkeypatch):
    """How often a rate is worked out while everybody sends to everybody in groups of five, unevenly."""
    counted = []

    def counting(changed):
        for flow, rate in fair_rates(changed):
            counted.append(flow)
            yield flow, rate

    monkeypatch.setattr("lowcomm.sim.wire.network.fair_rates", counting)
    clock = FakeClock()
    rates = [(5.0 + i % 7) * 8e6 for i in range(5)] * num_groups
    network = Network(clock, Links(rates, rates, lambda a, b: 0.0))
    for first in range(0, 5 * num_groups, 5):
        for a in range(5):
            for b in range(5):
                if a != b:  # hardly two groups have a moment in common
                    network.send(first + a, first + b, 1e6 * (1 + a + b + first / 500), lambda: None)
    clock.run()
    return len(counted)


def test_the_work_of_many_groups_is_that_of_each_of_them(monkeypatch):
    assert num_rates(30, monkeypatch) < 1.5 * 30 * num_rates(1, monkeypatch)
