"""The closed forms of gloo's collectives, against its loops played message by message."""

import heapq
import math
from functools import partial

import pytest
import torch

from lowcomm.sim.wire.clock import Clock
from lowcomm.sim.wire.comm import World
from lowcomm.sim.wire.gloo import Gloo, ring_latencies
from lowcomm.sim.wire.links import Links, Transport
from lowcomm.sim.wire.network import Network
from tests.sim.fake_clock import FakeClock

PLAIN = Transport(bandwidth_factor=1.0, window_bytes=None, initial_window_bytes=None)


class Played:
    """gloo's ring, rank by rank: two messages under way, each leaving once its receiver has said that it is ready.

    A message needs `latency_s`, a link carries one after the other, and the word that one is ready needs `latency_s`;
    between two ranks that send each other on one connection it stands in line behind the message that is being sent.
    """

    def __init__(self, n, latency_s, bytes_per_s):
        self.n, self.latency_s, self.bytes_per_s = n, latency_s, bytes_per_s
        self.ready, self.posted, self.arrived = {}, {}, {}
        self.free, self.busy_from = [0.0] * n, [math.inf] * n  # of each rank's link
        self.events, self.number = [], 0
        self.ended = [None] * n

    def play(self, programs):
        self.programs, self.wanted = programs, [None] * self.n
        for rank in range(self.n):
            self.advance(rank, None)
        while self.events:
            time, _, _, kind, key = heapq.heappop(self.events)
            if kind == "word":
                self.ready[key] = time
                self.try_to_send(key, time)
            elif kind == "leave":
                self.leave(key, time)
            else:
                self.arrive(key, time)
        return max(self.ended)

    def at(self, time, kind, key):
        self.number += 1
        # gloo's thread sends what it may before the rank that a message woke has added it up
        heapq.heappush(self.events, (round(time, 9), kind == "arrive", self.number, kind, key))

    def advance(self, rank, value):
        try:
            while True:
                what = self.programs[rank].send(value)
                value = None
                if what[0] == "end":
                    self.ended[rank] = what[1]
                elif what[0] == "recv":  # key = (sender, i)
                    _, key, time = what
                    in_line = self.n == 2 and self.busy_from[rank] <= time < self.free[rank]
                    self.at((self.free[rank] if in_line else time) + self.latency_s, "word", key)
                elif what[0] == "send":
                    _, key, time, size = what
                    self.posted[key] = (time, size)
                    self.try_to_send(key, time)
                else:
                    key = what[1]
                    if key not in self.arrived:
                        self.wanted[rank] = key
                        return
                    value = self.arrived[key]
        except StopIteration:
            return

    def try_to_send(self, key, time):
        if key in self.ready and key in self.posted:
            self.at(max(self.ready[key], self.posted[key][0], time), "leave", key)

    def leave(self, key, time):
        sender = key[0]
        begin = max(time, self.free[sender])
        self.free[sender] = begin + self.posted[key][1] / self.bytes_per_s
        self.busy_from[sender] = begin
        self.at(self.free[sender] + self.latency_s, "arrive", key)

    def arrive(self, key, time):
        self.arrived[key] = time
        receiver = key[1]
        if self.wanted[receiver] == key:
            self.wanted[receiver] = None
            self.advance(receiver, time)


def all_sum(n, num_bytes, latency_s, bytes_per_s, element=4, most=2**20):
    """gloo's allreduce.cc: reduce-scatter, then all-gather, each with its own slots."""
    up = lambda x, to: -(-x // to) * to  # noqa: E731
    num = up(max(-(-num_bytes // most), 2 * n), n)
    own, size = num // n, up(-(-num_bytes // num), element)
    length = lambda i: max(0, min(size, num_bytes - (i % num) * size))  # noqa: E731

    def program(rank):
        time = 0.0
        for phase in (0, 1):
            shift = (rank + 1 - phase) * own
            for i in range(num - own + 2):
                if i >= 2 and length(shift + own + i - 2):
                    time = max(time, (yield ("wait", ((rank + 1) % n, rank, phase, i - 2))))
                if i < num - own:
                    if length(shift + own + i):
                        yield ("recv", ((rank + 1) % n, rank, phase, i), time)
                    if length(shift + i):
                        yield ("send", (rank, (rank - 1) % n, phase, i), time, length(shift + i))
        yield ("end", time)

    return Played(n, latency_s, bytes_per_s).play([program(rank) for rank in range(n)])


def all_gather(n, num_bytes, latency_s, bytes_per_s):
    """gloo's allgather.cc: halves, to the next."""

    def program(rank):
        time = 0.0
        for i in range(2 * (n - 1) + 2):
            if i >= 2:
                time = max(time, (yield ("wait", ((rank - 1) % n, rank, i - 2))))
            if i < 2 * (n - 1):
                yield ("send", (rank, (rank + 1) % n, i), time, num_bytes / 2)
                yield ("recv", ((rank - 1) % n, rank, i), time)
        yield ("end", time)

    return Played(n, latency_s, bytes_per_s).play([program(rank) for rank in range(n)])


def simulated(kind, n, num_bytes, latency_s, bytes_per_s):
    rates, clock = [8 * bytes_per_s] * n, FakeClock()
    network = Network(clock, Links(rates, rates, lambda a, b: latency_s, transport=PLAIN))
    for x in Gloo().transfers(kind, tuple(range(n)), num_bytes):
        network.send(x.source, x.to, x.num_bytes, lambda: None, x.num_latencies, x.turns)
    return clock.run()


@pytest.mark.parametrize("n", [2, 3, 5, 8, 16])
def test_sums_of_few_values_take_the_latencies_of_the_messages_that_are_not_empty(n):
    for num_owners in range(1, n + 1):
        played = all_sum(n, 4 * 2 * num_owners, 1.0, math.inf)
        assert ring_latencies(n, num_owners) == played
        assert simulated("all_sum", n, 4 * 2 * num_owners, 1.0, 1e18) == pytest.approx(played)
    assert ring_latencies(n, n) == 4 * (n - 1)


@pytest.mark.parametrize("n", [2, 3, 6])
@pytest.mark.parametrize("num_bytes", [4, 4_000, 400_000, 4_000_000, 64_000_000])
@pytest.mark.parametrize("bytes_per_s", [2.5e6, 62.5e6])
def test_rings_take_the_time_of_their_messages(n, num_bytes, bytes_per_s):
    for latency_s in (0.0, 0.05):
        seconds = simulated("all_sum", n, num_bytes, latency_s, bytes_per_s)
        assert seconds == pytest.approx(all_sum(n, num_bytes, latency_s, bytes_per_s), rel=0.03, abs=1e-4)
        seconds = simulated("all_gather", n, num_bytes, latency_s, bytes_per_s)
        assert seconds == pytest.approx(all_gather(n, num_bytes, latency_s, bytes_per_s), rel=0.03, abs=1e-4)


def ends_of_broadcast(n, num_bytes, latency_s, bytes_per_s):
    """When each rank has it, and has passed it on."""
    clock, ends, rates = Clock(isolate_torch=False), {}, [8 * bytes_per_s] * n
    world = World(clock, Network(clock, Links(rates, rates, lambda a, b: latency_s, transport=PLAIN)))

    def program(rank):
        world.comm(rank, range(n)).broadcast(torch.zeros(num_bytes, dtype=torch.uint8, device="meta"), 1).wait()
        ends[rank] = clock.now

    for rank in range(n):
        clock.spawn(rank, partial(program, rank))
    clock.run()
    return [ends[rank] for rank in range(n)]


def test_a_broadcast_goes_down_a_binomial_tree_level_after_level():
    # from rank 1 to 2 and 3, of which the first is 0.4 ahead: alone until then, they share the rest; then from 2 to 0
    assert ends_of_broadcast(4, 1000, 0.0, 1000.0) == pytest.approx([2.6, 2.0, 2.6, 2.0])
    # a word and a message to those that the source sends to, a message more for each level below
    assert ends_of_broadcast(8, 0, 1.0, 1000.0)[2:6] == [3.0, 3.0, 4.0, 2.0]
