"""Schedules move the bytes that each collective needs, in the time that their formulas say."""

from collections import Counter

import pytest
import torch

from lowcomm.comm.echo import EchoComm
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.sim.wire.collectives import Hierarchical, Pairwise, Ring, Schedule, Star, Transfer, Tree, TwoShot
from lowcomm.sim.wire.gloo import Gloo
from lowcomm.sim.wire.links import BARE, Links
from lowcomm.sim.wire.network import Network
from tests.sim.fake_clock import FakeClock

ISLANDS = Hierarchical(((0, 1, 2), (3, 4), (9,), (7, 8, 5, 6)))
SCHEDULES = [Gloo(), Ring(), Tree(), TwoShot(), Star(center=3), Pairwise(), ISLANDS]
MEMBERS = [(1, 3), (0, 3, 8), (0, 1, 3, 4, 6, 9), tuple(range(10))]


def sent_and_received(transfers):
    sent, received = Counter(), Counter()
    for transfer in transfers:
        sent[transfer.source] += transfer.num_bytes
        received[transfer.to] += transfer.num_bytes
    return sent, received


def seconds(transfers, links):
    """When the last transfer ends."""
    clock = FakeClock()
    network = Network(clock, links)
    for transfer in transfers:
        network.send(transfer.source, transfer.to, transfer.num_bytes, lambda: None, transfer.num_latencies)
    return clock.run()


def uniform(num_ranks, bits_per_s, latency_s, transport=BARE):
    rates = [bits_per_s] * num_ranks
    return Links(rates, rates, lambda a, b: latency_s, transport=transport)


every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
every_group = pytest.mark.parametrize("members", MEMBERS, ids=len)


# bytes


@every_schedule
@every_group
def test_a_sum_moves_each_payload_in_and_out_once_unless_everybody_sums_alone(schedule, members):
    n, size = len(members), 1000
    transfers = schedule.transfers("all_sum", members, size)
    total = sum(transfer.num_bytes for transfer in transfers)
    whole = n * (n - 1) * size if isinstance(schedule, Pairwise) else 2 * (n - 1) * size
    assert whole - n < total <= whole  # a ring drops fractions of a byte
    sent, received = sent_and_received(transfers)
    for rank in members:  # everybody has something that no other knows, and must learn of the others
        assert sent[rank] >= size - 1 and received[rank] >= size - 1


@every_schedule
@every_group
def test_a_gather_brings_everybody_exactly_what_others_have(schedule, members):
    _, received = sent_and_received(schedule.transfers("all_gather", members, 10))
    assert received == dict.fromkeys(members, 10 * (len(members) - 1))


@every_schedule
@every_group
def test_a_broadcast_brings_everybody_the_payload_once(schedule, members):
    for source in members:
        transfers = schedule.transfers("broadcast", members, 100, source)
        _, received = sent_and_received(transfers)
        assert received == {rank: 100 for rank in members if rank != source}
        have = {source}
        for _ in members:
            have |= {transfer.to for transfer in transfers if transfer.source in have}
        assert have == set(members), "some got it from nowhere"


def test_two_shots_carry_uneven_pieces():
    # 10 bytes are owned 3, 3, 4: each edge carries the receiver's piece to be summed and the sender's summed
    transfers = TwoShot().transfers("all_sum", (0, 1, 2), 10)
    assert sorted(transfer[:3] for transfer in transfers) == [
        (0, 1, 6), (0, 2, 7), (1, 0, 6), (1, 2, 7), (2, 0, 7), (2, 1, 7)
    ]  # fmt: skip


@every_schedule
def test_pieces_and_messages_go_directly(schedule):
    pieces = schedule.transfers("all_to_all", (1, 3, 4), 10)
    expected = [(1, 3, 10), (1, 4, 10), (3, 1, 10), (3, 4, 10), (4, 1, 10), (4, 3, 10)]
    latencies = 2 if isinstance(schedule, Gloo) else 1  # a word that it may come, and the message
    assert sorted(pieces) == [Transfer(*x, latencies) for x in expected]
    assert schedule.transfers("exchange", (3, 8), 7) == [Transfer(3, 8, 7, latencies), Transfer(8, 3, 7, latencies)]


@every_schedule
@pytest.mark.parametrize("kind", ["all_sum", "all_gather", "all_to_all", "broadcast"])
def test_alone_there_is_nobody_to_send_to(schedule, kind):
    assert schedule.transfers(kind, (3,), 10, 3 if kind == "broadcast" else None) == []


@every_schedule
@pytest.mark.parametrize("kind", ["all_sum", "all_gather", "all_to_all", "broadcast"])
def test_transfers_stay_among_members_and_never_go_to_oneself(schedule, kind):
    members = MEMBERS[2]
    transfers = schedule.transfers(kind, members, 60, 3 if kind == "broadcast" else None)
    for transfer in transfers:
        assert {transfer.source, transfer.to} <= set(members) and transfer.source != transfer.to
        assert isinstance(transfer.num_bytes, int) and transfer.num_bytes >= 0 and transfer.num_latencies >= 1


@pytest.mark.parametrize("num_members", [2, 3, 5, 8])
def test_the_bytes_of_a_ring_are_those_that_the_meter_counts(num_members):
    members, x = tuple(range(num_members)), torch.zeros(7)

    def counted(rank, exchange):
        meter = Meter()
        comm = MeteredComm(EchoComm(num_members, rank), meter)
        exchange(comm)
        return meter.bytes_sent, meter.bytes_received

    cases = [
        (lambda comm: comm.all_sum(x), ("all_sum", members, 28)),
        (lambda comm: comm.all_gather(x), ("all_gather", members, 28)),
        (lambda comm: comm.all_to_all(x.expand(num_members, 7)), ("all_to_all", members, 28)),
        (lambda comm: comm.broadcast(x, 1), ("broadcast", members, 28, 1)),
    ]
    for exchange, asked in cases:
        sent, received = sent_and_received(Ring().transfers(*asked))
        for rank in members:
            assert (sent[rank], received[rank]) == counted(rank, exchange), asked


# time: the table at the head of the module

S, B, A = 8e6, 80e6, 0.01  # bytes, bits per second, seconds
T = S / (B / 8)


@pytest.mark.parametrize(
    ("schedule", "all_sum", "all_gather", "broadcast"),
    [
        (Ring(), 2 * 7 / 8 * T + 14 * A, 7 * T + 7 * A, 7 * T + A),
        (Tree(), 3 * T + 6 * A, 17 * T + 6 * A, 2 * T + 3 * A),
        (TwoShot(), 2 * 7 / 8 * T + 2 * A, 7 * T + A, T + 2 * A),
        (Star(center=0), 7 * T + 2 * A, 49 * T + 2 * A, 7 * T + A),
        (Pairwise(), 7 * T + A, 7 * T + A, 7 * T + A),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Schedule) else None,
)
def test_times_are_those_of_the_table(schedule, all_sum, all_gather, broadcast):
    links, members = uniform(8, B, A), tuple(range(8))
    for kind, expected in (("all_sum", all_sum), ("all_gather", all_gather), ("broadcast", broadcast)):
        transfers = schedule.transfers(kind, members, int(S), 0 if kind == "broadcast" else None)
        assert seconds(transfers, links) == pytest.approx(expected, rel=1e-5), kind


@pytest.mark.parametrize("num_members", range(2, 18))
def test_a_tree_takes_as_many_steps_as_its_lowest_leaf_is_deep(num_members):
    members = tuple(range(num_members))
    down, depth = Tree().transfers("broadcast", members, 1, 0), {0: 0}
    for transfer in down:
        depth[transfer.to] = depth[transfer.source] + 1
    assert {transfer.num_latencies for transfer in down} == {max(depth.values())}
    both_ways = {transfer.num_latencies for transfer in Tree().transfers("all_sum", members, 1)}
    assert both_ways == {2 * max(depth.values())}


@pytest.mark.parametrize(("kind", "inside", "between"), [("all_sum", 2, 2), ("all_gather", 2, 1), ("broadcast", 1, 1)])
def test_within_an_island_a_step_is_an_edge_of_its_chain(kind, inside, between):
    islands, source = Hierarchical(((0, 1, 2, 3), (4, 5, 6))), 0 if kind == "broadcast" else None
    for transfer in islands.transfers(kind, tuple(range(7)), 5, source):
        is_first, is_same = transfer.source < 4, (transfer.source < 4) == (transfer.to < 4)
        assert transfer.num_latencies == (inside * (3 if is_first else 2) if is_same else between)


# mistakes


def test_a_star_needs_its_center():
    with pytest.raises(ValueError, match="Star's center is rank 3, which is not among the members"):
        Star(center=3).transfers("all_sum", (0, 1), 1)


def test_islands_hold_each_rank_once():
    with pytest.raises(ValueError, match=r"ranks \[1\] are in Hierarchical's islands more than once"):
        Hierarchical(((0, 1), (1, 2)))
    with pytest.raises(ValueError, match=r"ranks \[5\] are in none of Hierarchical's 1 islands"):
        Hierarchical(((0, 1),)).transfers("all_sum", (0, 5), 1)
