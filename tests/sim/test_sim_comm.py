"""SimComm: the promises of Comm, and when waits end in virtual time."""

import pytest
import torch

from lowcomm.sim.wire.clock import Clock, Deadlock
from lowcomm.sim.wire.collectives import Ring, Star, Tree
from lowcomm.sim.wire.comm import World
from lowcomm.tensors import digest
from tests.algorithms import inner_of
from tests.replicas import train
from tests.same_code.cases import CASES, STEPS, wire_laws
from tests.sim.slow import byte, simulate
from tests.world import run_world

# ---- the promises of Comm -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_wire_laws(num_ranks):
    for slow in (False, True):
        simulate(*[lambda comm, clock: wire_laws(comm)] * num_ranks, slow=slow, isolate_torch=True)


@pytest.mark.parametrize("algorithm", CASES[::3], ids=str)
def test_a_network_changes_no_number_and_its_times_are_the_same_again(algorithm):
    def program(comm, clock=None):
        trace = train(algorithm, comm, STEPS, inner_of(algorithm))
        return digest(trace), clock and clock.now

    slow, again = (simulate(*[program] * 3, isolate_torch=True) for _ in range(2))
    assert slow == again and min(time for _, time in slow) > 0
    assert [x for x, _ in slow] == [x for x, _ in run_world(3, program)]


def test_results_are_fresh_and_inputs_are_read_at_the_call():
    def program(comm, clock):
        x = torch.full((2,), 1.0 + comm.rank)
        works = [comm.all_sum(x), comm.all_gather(x), comm.all_to_all(torch.stack([x, x])), comm.broadcast(x, 1)]
        sent = comm.send(x, 1 - comm.rank)
        x.zero_()
        received = comm.recv(x)
        total, gathered, crossed, spread = (work.wait() for work in works)
        sent.wait()
        mail = received.wait()[1]
        for y in (total, *gathered, *crossed, spread, mail):
            before = y.clone()
            y.add_(100.0 * (1 + comm.rank))  # nobody else sees it
            clock.sleep(1.0)
            assert torch.equal(y, before + 100.0 * (1 + comm.rank))
        return [y[0].item() - 100.0 * (1 + comm.rank) for y in (total, *gathered, *crossed, spread, mail)]

    assert simulate(program, program) == [[3, 1, 2, 1, 2, 2, 2], [3, 1, 2, 1, 2, 2, 1]]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_results_are_contiguous_whatever_the_strides_of_inputs(device):
    def program(comm, clock):
        x = torch.arange(6.0, device=device).view(2, 3).t()
        peer = 1 - comm.rank
        works = [comm.all_sum(x), comm.broadcast(x, 0), comm.exchange(x, peer), comm.exchange(x, comm.rank)]
        lists = [comm.all_gather(x), comm.all_to_all(x.expand(2, 3, 2))]
        sent = comm.send(x, peer)
        found = [*(work.wait() for work in works), *(y for work in lists for y in work.wait()), comm.recv(x).wait()[1]]
        sent.wait()
        assert all(y.shape == (3, 2) and y.is_contiguous() for y in found)
        assert device == "meta" or all(torch.equal(y, x) for y in found[1:])

    simulate(program, program)


def test_sums_are_in_rank_order_whoever_comes_first():
    values = [1e8, 3.0, -1e8, 1.0]  # in float32, 1e8 + 3 is 1e8

    def program(comm, clock):
        clock.sleep((3 - comm.rank) * 1.0)
        return comm.all_sum(torch.tensor(values[comm.rank])).wait().item()

    assert simulate(*[program] * 4) == [1.0] * 4


def test_meta_tensors_take_time_but_have_no_values():
    def program(comm, clock):
        x = torch.empty(10, dtype=torch.uint8, device="meta")
        works = [comm.all_sum(x), comm.all_gather(x), comm.broadcast(x, 0), comm.all_to_all(x.expand(3, 10))]
        works += [comm.send(x, (comm.rank + 1) % 3), comm.recv(x)]
        total, gathered, spread, crossed, _, (source, mail) = [work.wait() for work in works]
        assert source == (comm.rank - 1) % 3 and len(gathered) == len(crossed) == 3
        assert all(y.is_meta and y.shape == (10,) for y in (total, *gathered, spread, *crossed, mail))
        return clock.now

    times = simulate(*[program] * 3)
    assert times == [20.0] * 3  # all at once, and the gather takes longest


# ---- when waits end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute_s", [0.0, 3.0, 8.0, 20.0])
def test_what_is_under_way_moves_while_ranks_compute(compute_s):
    def program(comm, clock):
        work = comm.all_sum(torch.zeros(8, dtype=torch.uint8))  # ring of two: 8 bytes each way
        clock.sleep(compute_s)
        work.wait()
        return clock.now

    assert simulate(program, program) == [max(8.0, compute_s)] * 2


def test_an_exchange_that_is_over_is_forgotten():
    def program(comm, clock):
        works = [
            comm.all_sum(byte(1)),
            comm.all_to_all(torch.stack([byte(1)] * 2)),
            comm.exchange(byte(1), 1 - comm.rank),
        ]
        assert len(comm._view.exchanges) == 3
        clock.sleep(9.0)
        assert not comm._view.exchanges, "its tensors would stay to the end of the run"
        for work in works:
            work.wait()

    simulate(program, program)


ALL = torch.zeros(4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("schedule", "call", "ends"),
    [
        (Ring(), lambda c: c.broadcast(ALL, 0), [12, 12, 4, 4]),
        (Ring(), lambda c: c.all_to_all(torch.stack([ALL] * 4)), [12, 12, 4, 4]),
        (Tree(), lambda c: c.all_to_all(torch.stack([ALL] * 4)), [12, 12, 4, 4]),
        (Star(0), lambda c: c.all_sum(ALL), [12] * 4),
        (Tree(), lambda c: c.broadcast(ALL, 0), [12] * 4),  # rank 3 has it from rank 1
        (Tree(), lambda c: c.all_gather(ALL), [24] * 4),  # on this edge is what ranks 0 and 2 put in
    ],
)
def test_a_slow_path_delays_its_ends_alone_or_a_whole_pipeline(schedule, call, ends):
    def program(comm, clock):
        call(comm).wait()
        return clock.now

    assert simulate(*[program] * 4, schedule=schedule, slow_path=(0, 1)) == ends


def test_views_count_their_own_exchanges():
    def program(comm, clock):
        pair = comm.sub([1, 0]) if comm.rank < 2 else None
        works = [comm.all_sum(byte(1))]
        if pair is not None:
            clock.sleep(comm.rank * 1.0)
            works += [pair.all_sum(byte(10)), comm.sub((0, 1)).all_sum(byte(20))]  # one view, two objects
            assert pair.members == (0, 1)
        return [work.wait().item() for work in works]

    assert simulate(*[program] * 3) == [[3, 20, 40], [3, 20, 40], [3]]


# ---- one to one -----------------------------------------------------------------------------------------------------


def test_a_list_of_members_may_be_used_again_for_others():
    def program(comm, clock):
        members, views = [0, 0], []
        for other in (1, 2):
            members[1] = other
            if comm.rank in members:
                views.append(comm.sub(members))
        return [view.all_sum(byte(comm.rank)).wait().item() for view in views]

    assert simulate(program, program, program) == [[1, 2], [1], [2]]


def test_receive_from_whoever_comes_first():
    def sender(comm, clock):
        clock.sleep([0.0, 4.0, 1.0, 1.0, 0.0][comm.rank])
        comm.send(byte(comm.rank), 0).wait()
        return clock.now

    def server(comm, clock):
        got = []
        for _ in range(2):
            source, x = comm.recv(byte(0)).wait()
            got.append((clock.now, source, x.item()))
        clock.sleep(10.0)  # the others queue up
        works = [comm.recv(byte(0)), comm.recv(byte(0), 1)]
        return [*got, works[1].wait()[0], works[0].wait()[0]]

    # a byte takes a second; ranks 2 and 3 arrive together, and the lower rank comes first
    results = simulate(server, sender, sender, sender, sender)
    assert results == [[(1.0, 4, 4), (2.0, 2, 2), 1, 3], 5.0, 2.0, 2.0, 1.0]


def test_messages_at_one_moment_come_in_rank_order_even_if_sent_otherwise():
    def sender(comm, clock):
        clock.sleep(3.0 - comm.rank)  # rank 2 sends first, but longer
        comm.send(torch.zeros(comm.rank, dtype=torch.uint8), 0)

    def server(comm, clock):
        clock.sleep(1.0)
        works = [comm.recv(torch.zeros(1, dtype=torch.uint8)), comm.recv(torch.zeros(2, dtype=torch.uint8))]
        return [work.wait()[0] for work in works]

    assert simulate(server, sender, sender)[0] == [1, 2]


@pytest.mark.parametrize("first", ["long", "short"])
def test_messages_of_one_sender_keep_their_order(first):
    def sender(comm, clock):
        comm.send(torch.zeros(9, dtype=torch.uint8), 1)
        comm.send(byte(7), 1).wait()  # overtakes on the wire
        return clock.now

    def receiver(comm, clock):
        works = {"long": comm.recv(torch.zeros(9, dtype=torch.uint8), 0), "short": comm.recv(byte(0))}
        works[first].wait()
        assert clock.now == 9.0
        assert works["short"].wait()[1].item() == 7 and works["long"].wait()[1].shape == (9,)
        return clock.now

    assert simulate(sender, receiver) == [1.0, 9.0]


def test_a_message_to_oneself_and_a_view_of_its_own():
    def program(comm, clock):
        comm.send(byte(3), comm.rank).wait()
        alone = comm.sub([comm.rank])
        alone.send(byte(4), comm.rank).wait()
        assert alone.all_sum(byte(5)).wait().item() == 5
        return [c.recv(byte(0)).wait() for c in (comm, alone)], clock.now  # views do not mix

    assert simulate(program, program) == [([(r, 3), (r, 4)], 0.0) for r in range(2)]


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mine", "message"),
    [
        (lambda c: c.all_gather(torch.ones(2)), r"rank 1 calls all_gather of float32 \[2\], but rank 0 called all_sum"),
        (lambda c: c.all_sum(torch.ones(3)), r"rank 1 calls all_sum of float32 \[3\], but rank 0 .* float32 \[2\]"),
        (lambda c: c.all_sum(torch.ones(2).double()), "rank 1 calls all_sum of float64"),
        (lambda c: c.broadcast(torch.ones(2), 1), "rank 1 calls broadcast of .* from rank 1, but rank 0 called"),
        (lambda c: c.all_to_all(torch.ones(2, 2)), "exchange number 2 among ranks 0, 1: rank 1 calls all_to_all"),
    ],
)
def test_members_must_call_the_same(mine, message):
    def program(comm, clock):
        comm.all_sum(torch.ones(2)).wait()
        (comm.all_sum(torch.ones(2)) if comm.rank == 0 else mine(comm)).wait()

    with pytest.raises(ValueError, match=message):
        simulate(program, program)


def test_a_message_must_look_as_it_is_received():
    def sender(comm, clock):
        comm.send(torch.ones(2), 1).wait()

    with pytest.raises(ValueError, match=r"rank 0 sent torch.float32 \[2\] to rank 1.* torch.float32 \[3\]"):
        simulate(sender, lambda comm, clock: comm.recv(torch.ones(3)).wait())


def test_bad_ranks():
    def program(comm, clock):
        x = torch.ones(1)
        for call in (lambda: comm.send(x, 5), lambda: comm.recv(x, 5), lambda: comm.broadcast(x, 5)):
            with pytest.raises(ValueError, match="rank 5 is not among the members 0"):
                call()
        with pytest.raises(ValueError, match="not all among 0"):
            comm.sub([0, 5])
        with pytest.raises(ValueError, match="for 1 members; give one row for each"):
            comm.all_to_all(torch.ones(2))

    simulate(program)
    for rank, members, message in ((3, [0, 1], "must hold this rank, 3"), (0, [0, 0], "distinct"), (0, [], "distinct")):
        with pytest.raises(ValueError, match=message):
            World(Clock()).comm(rank, members)


def test_deadlock_says_who_waits_for_whom():
    def program(comm, clock):
        clock.sleep(1.0)
        if comm.rank == 0:
            comm.recv(torch.ones(1), 3).wait()
        elif comm.rank == 1:
            comm.recv(torch.ones(1)).wait()
        elif comm.rank < 4:
            comm.all_sum(torch.ones(2)).wait()

    with pytest.raises(Deadlock) as caught:
        simulate(*[program] * 5)
    both = "all_sum of float32 [2], exchange number 1 among ranks 0, 1, 2, 3, 4, which ranks 0, 1, 4 have not called"
    assert caught.value.waiting == {
        0: "a message to rank 0 from rank 3",
        1: "a message to rank 1 from anyone of ranks 0, 1, 2, 3, 4",
        2: both,
        3: both,
    }


# ---- many -----------------------------------------------------------------------------------------------------------
