"""The laws of every compressor."""

from math import prod

import pytest
import torch

from lowcomm import Meter, MeteredComm, Task
from lowcomm.comm.echo import EchoComm
from lowcomm.tensors import digest, rng
from tests.compressors import DCT, Chosen, EF21Plus, Gathered, Identity, TopK, all_compressors
from tests.contraction import contraction
from tests.world import run_world

KINDS = ["normal", "heavy", "zero", "constant", "rows"]
# each kind, shape and number of ranks, and most pairs of them
AVERAGED = [
    *[("normal", (), 2), ("heavy", (1,), 3), ("zero", (17,), 2), ("constant", (4, 6), 3), ("rows", (3, 5, 2), 2)],
    *[("normal", (0,), 3), ("heavy", (257,), 2), ("rows", (4, 6), 1), ("heavy", (3, 5, 2), 8), ("normal", (257,), 8)],
    *[("constant", (), 8), ("rows", (24, 40), 3)],
]
CONTRACTED = [("normal", (23, 29), 3), ("heavy", (257,), 1), ("rows", (24, 40), 1), ("heavy", (24, 40), 3)]
CONTRACTED += [("constant", (24, 40), 1), ("zero", (24, 40), 3), ("normal", (1,), 3)]
COUNTED = [
    ((1,), 2),
    ((2,), 3),
    ((3,), 8),
    ((5,), 2),
    ((7, 11), 1),
    ((7, 11), 3),
    ((257,), 8),
    ((24, 40), 3),
    ((0,), 2),
]
NUM_ROUNDS = 100  # for means
# shapes that codes, tiles and blocks do not fit
ODD = [*((num,) for num in [*range(71), 97, 127, 257, 509, 4097, 4099, 10_007]), (), (1, 1), (1, 67), (67, 1), (3, 5)]
ODD += [(7, 11), (13, 64), (65, 65), (129, 3), (5, 3, 3, 3), (2, 0), (31, 4097)]


def draw(kind, shape, rank):
    generator = rng(0, kind, rank)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "rows" and len(shape) > 1:
        return x * torch.logspace(-3, 3, shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    return {"normal": x, "heavy": x**5, "zero": x * 0, "constant": x * 0 + rank - 1.0, "rows": x}[kind]


def given(compressor, x):
    """As a reducer would hand it over: a stack where shapes matter."""
    return x if compressor.elementwise else torch.stack([x, x.flip(0) if x.dim() else x])


@pytest.fixture(params=all_compressors(), ids=str)
def compressor(request):
    return request.param


def check_means(results):
    """All ranks have one mean, which is the mean of what they sent."""
    means = [mean for _, mean in results]
    assert len({digest([mean]) for mean in means}) == 1, "ranks differ"
    sent = torch.stack([sent for sent, _ in results])
    largest = float(sent.abs().max()) if sent.numel() else 0.0
    assert torch.allclose(sent.mean(0), means[0], rtol=1e-12, atol=1e-12 * largest)


@pytest.mark.parametrize(("kind", "shape", "num_ranks"), AVERAGED, ids=str)
def test_mean_of_what_was_sent_is_the_mean(compressor, kind, shape, num_ranks):
    def program(comm):
        x = given(compressor, draw(kind, shape, comm.rank))
        before = digest([x])
        state = compressor.init(x)
        for _ in range(3):
            sent, mean, state = Task(compressor.mean(x, state, comm)).result()
        assert digest([x]) == before, "the input was modified"
        assert sent.shape == mean.shape == x.shape and sent.dtype == mean.dtype == x.dtype
        return sent, mean

    check_means(run_world(num_ranks, program))


def losses(compressor, kind, shape, num_ranks, num_rounds, anew):
    """What all ranks together lose, ``[num_rounds]``, of how much, and by how much the mean of rounds misses.

    All of it as squares, in float32; ``anew``: of another vector in each round, for which states were not made.
    """

    def program(comm):
        x = given(compressor, draw(kind, shape, comm.rank).float())
        state, lost, sizes, total = compressor.init(x), [], [], torch.zeros_like(x, dtype=torch.float64)
        for t in range(num_rounds):
            if anew:
                x = given(compressor, draw(kind, shape, comm.rank + t).float())
            sent, _, state = Task(compressor.mean(x, state, comm)).result()
            missed = x.double() - sent.double()
            lost.append(missed.square().sum())
            sizes.append(x.double().square().sum())
            total += missed / num_rounds
        return torch.stack(lost), torch.stack(sizes), total.square().sum()

    return [sum(part) for part in zip(*run_world(num_ranks, program), strict=True)]


@pytest.mark.parametrize(("kind", "shape", "num_ranks"), CONTRACTED, ids=str)
def test_contracts_as_it_states(compressor, kind, shape, num_ranks):
    """In every round, or on average; and where it says that it is unbiased, errors average out."""
    states = contraction(compressor, given(compressor, torch.empty(shape)).shape, num_ranks)
    if not states.in_expectation:
        lost, size, _ = losses(compressor, kind, shape, num_ranks, 4, anew=True)
        assert (lost <= states.loss * size * (1 + 1e-5) + 1e-11 * size).all()
        return
    lost, size, bias = losses(compressor, kind, shape, num_ranks, NUM_ROUNDS, anew=False)
    margin = 5 * lost.std() / NUM_ROUNDS**0.5
    assert lost.mean() <= states.loss * size[0] + margin + 1e-11 * size[0]
    if states.unbiased:
        assert bias <= 16 * lost.mean() / NUM_ROUNDS + 1e-11 * size[0]


def most_bytes(compressor, num, num_ranks):
    """Of a round: an exact all-reduce, or where messages go to everybody, the values in float32."""
    if isinstance(compressor, (DCT, Chosen)):
        return most_bytes(compressor.inner if isinstance(compressor, DCT) else compressor.values, num, num_ranks)
    if isinstance(compressor, (TopK, Gathered, EF21Plus)):
        return (num_ranks - 1) * 4 * num
    return Identity().sent_bytes((num,), 4, num_ranks)


def test_no_shape_is_expanded(compressor):
    for num_ranks in (1, 2, 3, 8, 64):
        for shape in ODD:
            for stack in [shape] if compressor.elementwise else [(1, *shape), (2, *shape)]:
                most = most_bytes(compressor, prod(stack), num_ranks)
                assert compressor.sent_bytes(stack, 4, num_ranks) <= most, (stack, num_ranks)


@pytest.mark.parametrize(("shape", "num_ranks"), COUNTED, ids=str)
def test_bytes_are_those_of_the_closed_form(compressor, shape, num_ranks):
    """Counted on tensors without values, which also shows that traffic can be predicted for models that fit nowhere."""
    x = given(compressor, torch.empty(shape, device="meta"))
    meter = Meter()
    comm = MeteredComm(EchoComm(num_ranks), meter)
    state, num_messages = compressor.init(x), []
    for _ in range(2):  # a closed form may be the average of two rounds in a row
        task = Task(compressor.mean(x, state, comm))
        num_messages.append(0)
        while task.pending is not None:
            task.advance()
            num_messages[-1] += 1
        sent, mean, state = task.result()
        assert sent.shape == mean.shape == x.shape
    expected = 2 * compressor.sent_bytes(x.shape, 4, num_ranks)
    # a meter counts whole bytes of each message
    assert abs(meter.bytes_sent - expected) <= 1 * sum(t.num_exchanges for t in meter.by_tag.values())
    assert max(num_messages) <= compressor.num_messages(), "more of them in a row than it says"


def test_state_is_not_modified(compressor):
    """A round that fails must be able to start again from the state before it."""
    x = given(compressor, draw("normal", (24, 40), 0))
    state = compressor.init(x)
    _, first, _ = Task(compressor.mean(x, state, EchoComm(1))).result()
    _, again, _ = Task(compressor.mean(x, state, EchoComm(1))).result()
    assert digest([first]) == digest([again])


@pytest.mark.parametrize("shape", [(24, 40), (0,)], ids=str)
def test_a_fresh_member_takes_part_after_a_resync(compressor, shape):
    """Two ranks have come far, a third brings `init`'s state: after the resync the laws hold among the three."""

    def program(comm):
        x = given(compressor, draw("normal", shape, comm.rank))
        state = compressor.init(x)
        if comm.rank < 2:
            early = comm.sub([0, 1])
            for _ in range(3):
                _, _, state = Task(compressor.mean(x, state, early)).result()
        state = Task(compressor.resync(state, comm)).result()
        for _ in range(2):
            sent, mean, state = Task(compressor.mean(x, state, comm)).result()
        return sent, mean

    check_means(run_world(3, program))
