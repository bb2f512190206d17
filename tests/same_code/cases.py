"""What runs in both worlds."""

import pytest
import torch

from lowcomm import Comm, DiLoCo, DroppedRounds
from lowcomm.pairwise import Pairwise
from tests.algorithms import all_algorithms

STEPS = 12
CASES = [*all_algorithms(), DiLoCo(every=3, dropped=DroppedRounds(0.3, seed=2))]


def wire_laws(comm: Comm, device: str = "cpu") -> None:
    """The promises of `Comm`, each checked against what the others must have sent."""
    with torch.device(device):
        _wire_laws(comm)


def _wire_laws(comm: Comm) -> None:
    n, me = len(comm.members), comm.members.index(comm.rank)
    assert comm.place == me
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8):
        x = torch.full((2, 3), me + 1).to(dtype)
        total = comm.all_sum(x).wait()
        assert total.dtype == dtype and (total == n * (n + 1) // 2).all(), dtype
        assert (x == me + 1).all(), "the input was modified"
    with pytest.raises(ValueError, match="cannot be summed"):
        comm.all_sum(torch.ones(2, dtype=torch.bool))
    for dtype in (torch.bfloat16, torch.bool, torch.complex64, torch.int16, torch.float8_e4m3fn, torch.float64):
        for shape in [(), (3,), (2, 0), (2, 5)]:
            x = torch.full(shape, me % 2, dtype=torch.float32).to(dtype)
            for rank, got in enumerate(comm.all_gather(x).wait()):
                assert got.shape == x.shape and got.dtype == dtype
                assert (got.to(torch.float32) == rank % 2).all()
            got = comm.broadcast(x, comm.members[-1]).wait()
            assert got.dtype == dtype and (got.to(torch.float32) == (n - 1) % 2).all()
    rows = (10.0 * me + torch.arange(n)).bfloat16()[:, None].expand(n, 3)
    crossed = comm.all_to_all(rows).wait()
    assert crossed.shape == (n, 3) and crossed.dtype == torch.bfloat16 and crossed.is_contiguous()
    for sender, got in enumerate(crossed):
        assert (got == 10.0 * sender + me).all()
    for unfit in (torch.ones(n + 1), torch.ones(())):
        with pytest.raises(ValueError, match=f"for {n} members; give one row for each"):
            comm.all_to_all(unfit)
    # whatever their strides, which torch does not look at where there is one element
    for x in (torch.tensor([[float(me), 0.0]])[:, :1], torch.tensor([[float(me), 0.0]] * 3)[:, 0]):
        travelled = [list(comm.all_gather(x).wait()), list(comm.all_to_all(torch.stack([x] * n)).wait())]
        travelled.append([comm.broadcast(x, source).wait() for source in comm.members])
        for copies in travelled:
            assert all(y.shape == x.shape and (y == rank).all() for rank, y in enumerate(copies))
        assert torch.equal(comm.exchange(x, comm.rank).wait(), x)
    x = torch.arange(6.0).view(2, 3).t() if me % 2 else torch.arange(6.0).view(2, 3).t().contiguous()
    assert torch.equal(comm.all_sum(x).wait(), n * x)
    # what was there when it was sent travels, whatever becomes of it, and what was sent stays what it is
    for start in (comm.all_gather, lambda x: comm.all_to_all(x.view(n, -1))):
        big = torch.full((500_000 * n,), float(me))
        work = start(big)
        big.fill_(-1.0)
        for rank, got in enumerate(work.wait()):
            assert (got == rank).all()
    for begin, expected in ((comm.all_sum, n * (n - 1) / 2), (lambda x: comm.broadcast(x, comm.members[-1]), n - 1)):
        big = torch.full((500_000,), float(me))
        coming = begin(big)
        assert (big == me).all()
        big.fill_(-1.0)
        assert torch.equal(coming.wait(), torch.full_like(big, expected)) and (big == -1.0).all()
    # several all-to-alls under way at once, large and empty, with another message to the same rank between them
    many = [(100.0 * k + 10 * me + torch.arange(n))[:, None].expand(n, k) for k in (30_000, 0, 3)]
    first = comm.all_to_all(many[0])
    aside = comm.recv(torch.zeros(1), comm.members[(me - 1) % n]) if n > 1 and comm.rank != 0 else None
    if n > 1 and comm.members[(me + 1) % n] != 0:
        comm.send(torch.tensor([7.0]), comm.members[(me + 1) % n]).wait()
    others = [comm.all_to_all(x) for x in many[1:]]
    for k, work in [(3, others[1]), (30_000, first), (0, others[0])]:
        for sender, got in enumerate(work.wait()):
            assert got.shape == (k,) and (got == 100.0 * k + 10 * sender + me).all()
    assert aside is None or aside.wait()[1].item() == 7.0
    # several under way at once, waited for in another order
    works = [comm.all_sum(torch.tensor([float(i + me)])) for i in range(4)]
    for i in (2, 0, 3, 1):
        assert works[i].wait().item() == n * i + n * (n - 1) / 2
    _exchange_laws(comm)
    right, left = comm.members[(me + 1) % n], comm.members[(me - 1) % n]
    if n > 1:
        for turn in (0, 1):  # NCCL: where two ranks send to each other, one of them must receive first
            if me % 2 == turn:
                messages = [torch.tensor([me, k]) for k in range(2)]
                sent = [comm.send(x, right) for x in messages]
                for x in messages:
                    x.zero_()
            else:
                received = [comm.recv(torch.zeros(2, dtype=torch.int64), left) for _ in range(2)]
        for k, arrival in enumerate(received):  # in order
            source, got = arrival.wait()
            assert source == left and got.tolist() == [comm.members.index(left), k]
        for departure in sent:
            departure.wait()
    pair = comm.members[: max(1, n // 2)]
    if comm.rank in pair:  # the others need not know of it
        smaller = comm.sub(pair)
        assert smaller.members == tuple(pair)
        assert smaller.all_sum(torch.ones(1)).wait().item() == len(pair)


def _exchange_laws(comm: Comm) -> None:
    n, me = len(comm.members), comm.members.index(comm.rank)
    x = torch.arange(3.0)
    alone = comm.exchange(x, comm.rank).wait()
    assert torch.equal(alone, x) and alone.data_ptr() != x.data_ptr()
    for dtype in (torch.bfloat16, torch.bool, torch.float8_e4m3fn, torch.float64):
        for shape in [(), (2, 0), (2, 5)]:
            x = torch.full(shape, me % 2, dtype=torch.float32).to(dtype)
            peer = n - 1 - me  # with three, who is in the middle is alone
            work = comm.exchange(x, comm.members[peer])
            x.zero_()
            got = work.wait()
            assert got.shape == x.shape and got.dtype == dtype and (got.to(torch.float32) == peer % 2).all()
    # with everybody, several at once, large and small, of which others know nothing; waited for in another order
    sizes = (100_000, 1, 7)
    works = [[comm.exchange(torch.full((k,), 10.0 * me + k), peer) for k in sizes] for peer in comm.members]
    for peer in reversed(range(n)):
        for k, work in zip(sizes[::-1], works[peer][::-1], strict=True):
            got = work.wait()
            assert got.shape == (k,) and (got == 10.0 * peer + k).all()
    # as any Comm: groups of which the others know nothing
    for group in (comm.members, comm.members[: n - n % 2][me // 2 * 2 :][:2]):
        if comm.rank in group and len(group) > 0:
            pairs = Pairwise(comm, group[::-1])
            assert pairs.members == group, "in order, as those of any Comm"
            _wire_laws_of_pairs(pairs)


def _wire_laws_of_pairs(comm: Comm) -> None:
    """What `Pairwise` makes of exchanges."""
    n, me = len(comm.members), comm.members.index(comm.rank)
    x = torch.tensor([[1e8, 3.0, -1e8, 1.0][me % 4]])
    works = comm.all_sum(x), comm.all_gather(x.bfloat16()), comm.broadcast(x, comm.members[-1])
    rows = (10.0 * me + torch.arange(n)).bfloat16()[:, None].expand(n, 2)
    crossed = comm.all_to_all(rows)
    x.zero_()
    values = torch.tensor([1e8, 3.0, -1e8, 1.0])[torch.arange(n) % 4]
    total = torch.zeros(())
    for value in values:  # in members' order, whoever adds
        total = total + value
    assert torch.equal(works[0].wait(), total.view(1)), "the sum is in members' order"
    assert torch.equal(works[1].wait(), values.bfloat16().view(n, 1))
    assert torch.equal(works[2].wait(), values[-1].view(1))
    for sender, got in enumerate(crossed.wait()):
        assert got.shape == (2,) and (got == 10.0 * sender + me).all()
    with pytest.raises(ValueError, match="cannot be summed"):
        comm.all_sum(torch.ones(2, dtype=torch.bool))
