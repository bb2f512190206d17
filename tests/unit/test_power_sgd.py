"""PowerSGD: its bytes, its easy set, its memory, and the messages of a model's round."""

from math import prod

import pytest
import torch

from lowcomm import Meter, MeteredComm, Reducer, Task
from lowcomm.comm.echo import EchoComm
from lowcomm.tensors import rng
from tests.compressors import EF14, PowerSGD
from tests.world import run_world

STEPS_PER_EPOCH = 24
MIB = 2**20


def resnet18():
    """Shapes of the ResNet-18 for 32 x 32 images: 11,173,962 parameters."""
    convolutions, planes_in = [(64, 3, 3, 3)], 64
    for planes in (64, 128, 256, 512):
        for block in range(2):
            convolutions += [(planes, planes_in, 3, 3), (planes, planes, 3, 3)]
            if planes != planes_in and block == 0:
                convolutions.append((planes, planes_in, 1, 1))
            planes_in = planes
    norms = [(c[0],) for c in convolutions for _ in range(2)]
    return [*convolutions, *norms, (10, 512), (10,)]


def normal(*shape, key=0):
    return torch.randn(shape, generator=rng(0, "test", key), dtype=torch.float64)


@pytest.mark.parametrize(("rank", "mib"), [(None, "1023.0"), (1, "4.2"), (2, "7.5"), (4, "14.2"), (7, "24.2")], ids=str)
def test_bytes_of_an_epoch_are_the_published_ones(rank, mib):
    """The paper's table, to its last digit. A ring of 2 sends the payload once; the paper compresses every matrix."""
    like = [torch.empty(shape, device="meta") for shape in resnet18()]
    assert sum(x.numel() for x in like) == 11_173_962
    reducer = Reducer() if rank is None else Reducer(PowerSGD(rank, min_compression=1), bucket_bytes=2**30)
    meter = Meter()
    _, state = reducer.mean(like, reducer.init(like), MeteredComm(EchoComm(2), meter)).result()
    flags = 0 if rank is None else 1  # whether this one of two ranks is finite
    assert f"{(meter.bytes_sent - flags) * STEPS_PER_EPOCH / MIB:.1f}" == mib
    if rank is not None:
        stacks = [[shape for shape in resnet18() if shape == kind] for kind in dict.fromkeys(resnet18())]
        stated = sum(reducer.compressor.sent_bytes((len(s), *s[0]), 4, 2) for s in stacks)
        assert stated == meter.bytes_sent - flags
        assert meter.by_tag["sync"].num_exchanges == 3, "flags; vectors with P, all shapes together; Q"
        assert len(state.buckets) == len(stacks)


@pytest.mark.parametrize("alternate", [False, True])
@pytest.mark.parametrize("shape", [(4,), (), (3, 3), (8, 8), (1, 100), (100, 1), (7, 0)], ids=str)
def test_what_would_not_shrink_is_exact_and_never_larger(shape, alternate):
    compressor, comm = PowerSGD(rank=2, alternate=alternate), EchoComm(2)
    x = normal(2, *shape)
    sent, mean, _ = Task(compressor.mean(x, compressor.init(x), comm)).result()
    assert torch.equal(sent, x)
    assert torch.equal(mean, x)
    assert compressor.sent_bytes(x.shape, 4, 2) == prod(x.shape) * 4


@pytest.mark.parametrize("true_rank", [0, 1, 3])
@pytest.mark.parametrize("shape", [(12, 17), (20, 3, 5), (9, 40)], ids=str)
def test_exact_on_low_ranks(shape, true_rank):
    """Several matrices of one shape, of which the last is zero; ranks below the compressor's too."""
    m = prod(shape[1:])
    shared = normal(3, true_rank, m, key=1)

    def program(comm):
        x = (normal(3, shape[0], true_rank, key=2 + comm.rank) @ shared).view(3, *shape)
        x[2] = 0
        compressor = PowerSGD(rank=3, min_compression=1)
        return x, *Task(compressor.mean(x, compressor.init(x), comm)).result()

    results = run_world(3, program)
    exact = sum(x for x, *_ in results) / 3
    for x, sent, mean, _ in results:
        assert torch.allclose(mean, exact, atol=1e-12)
        assert torch.allclose(sent, x, atol=1e-12) or true_rank > 0
        assert mean[2].count_nonzero() == 0


@pytest.mark.parametrize("alternate", [False, True])
def test_recovers_from_zeros_and_finds_the_best_approximation(alternate):
    """Rounds on zeros leave no direction behind; then, on one matrix, warm starts are a power iteration."""
    values = torch.tensor([8.0, 4.0, 1.0, 0.5, 0.2, 0.1], dtype=torch.float64)
    left, right = torch.linalg.qr(normal(20, 6, key=1))[0], torch.linalg.qr(normal(30, 6, key=2))[0]
    matrix = ((left * values) @ right.T)[None]
    compressor = PowerSGD(rank=2, alternate=alternate)
    state, comm = compressor.init(matrix), EchoComm(2)
    for x in [torch.zeros_like(matrix)] * 2 + [matrix] * 20:
        _, mean, state = Task(compressor.mean(x, state, comm)).result()
        assert mean.isfinite().all()
    best = (left[:, :2] * values[:2]) @ right[:, :2].T
    assert torch.allclose(mean[0], best, atol=1e-9)


def test_iterations_improve_the_approximation():
    x, comm = normal(1, 30, 40), EchoComm(1)

    def mean(compressor):
        return Task(compressor.mean(x, compressor.init(x), comm)).result()[1]

    once = mean(PowerSGD(4))
    assert (x - mean(PowerSGD(4, num_iterations=4))).norm() < 0.95 * (x - once).norm()
    assert torch.allclose(mean(PowerSGD(4, alternate=True, num_iterations=2)), once), "two halves make a whole"


def test_alternate_begins_each_round_with_the_first_half_where_a_round_has_two():
    """Two rounds of two halves, written out: project on q, then what is left on p, whatever round it is."""
    x, comm = normal(1, 30, 40), EchoComm(1)
    compressor = PowerSGD(4, alternate=True, num_iterations=2)
    state = compressor.init(x)
    q = state.q[0]
    for _ in range(2):
        _, mean, state = Task(compressor.mean(x, state, comm)).result()
        q = torch.linalg.qr(q)[0]
        first = x[0] @ q @ q.T
        p = torch.linalg.qr(x[0] @ q)[0]
        q = (x[0] - first).T @ p
        assert torch.allclose(mean[0], first + p @ q.T, atol=1e-12)


def memories(error, steps, size, num_ranks=4):
    """Norms of all ranks' memories when each has the same gradient in every round, unlike the others'."""
    gradients = [normal(1, size, size, key=rank) for rank in range(num_ranks)]
    reducer = Reducer(PowerSGD(rank=2, error=error), EF14())

    def program(comm):
        state = reducer.init(gradients[comm.rank])
        norms = []
        for _ in range(steps):
            _, state = reducer.mean(gradients[comm.rank], state, comm).result()
            norms.append(float(state.buckets[0].feedback.error.norm()))
        return norms

    return torch.tensor(run_world(num_ranks, program)).mean(0)


def test_memory_stays_bounded_where_ranks_differ():
    """With the local error it levels off; with the global one each rank adds its distance from the mean for ever."""
    ours, theirs = memories("local", 300, 16), memories("global", 300, 16)
    assert ours[150:].max() < 1.3 * ours[:150].max()
    assert theirs[-1] > 1.9 * theirs[149] and theirs[-1] > 3 * ours[-1]


@pytest.mark.parametrize("alternate", [False, True])
def test_a_newcomer_gets_the_factors(alternate):
    """Two ranks have come far, a third is fresh: after the resync all go on as the first."""
    compressor = PowerSGD(rank=2, alternate=alternate)

    def program(comm):
        x = normal(2, 20, 30)
        state = compressor.init(x)
        for _ in range(0 if comm.rank == 2 else 3):
            _, _, state = Task(compressor.mean(x, state, EchoComm(1))).result()
        alone = Task(compressor.mean(x, state, EchoComm(1))).result()[1]
        state = Task(compressor.resync(state, comm)).result()
        return Task(compressor.mean(x, state, comm)).result()[1], state.round, alone

    results = run_world(3, program)
    assert all(torch.equal(mean, results[0][0]) and count == 3 for mean, count, _ in results)
    assert torch.allclose(results[0][0], results[0][2], atol=1e-9), "as if nobody had come"


@pytest.mark.parametrize(
    "options",
    [
        *({"rank": 0}, {"num_iterations": 0}, {"min_compression": 0.5}, {"error": "both"}),
        {"alternate": True, "warm_start": False},
    ],
    ids=str,
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        PowerSGD(**options)
