"""The laws of every compressor."""

import pytest
import torch

from lowcomm.comm.base import Task
from lowcomm.comm.echo import EchoComm
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.tensors import digest, rng
from tests.compressors import all_compressors
from tests.world import run_world

SHAPES = [(), (1,), (17,), (4, 6), (3, 5, 2), (0,), (257,)]
KINDS = ["normal", "heavy", "zero", "constant", "rows"]


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
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

    results = run_world(num_ranks, program)
    means = [mean for _, mean in results]
    assert all(digest([m]) == digest([means[0]]) for m in means), "ranks differ"
    sent = torch.stack([sent for sent, _ in results]).mean(0)
    largest = max(float(x.abs().max()) if x.numel() else 0.0 for x, _ in results)
    assert torch.allclose(sent, means[0], rtol=1e-12, atol=1e-12 * largest)


@pytest.mark.parametrize("shape", [(1,), (257,), (24, 40), (0,)], ids=str)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_bytes_are_those_of_the_closed_form(compressor, shape, num_ranks):
    """Counted on tensors without values, which also shows that traffic can be predicted for models that fit nowhere."""
    x = given(compressor, torch.empty(shape, device="meta"))
    meter = Meter()
    comm = MeteredComm(EchoComm(num_ranks), meter)
    state = compressor.init(x)
    for _ in range(2):  # a closed form may be the average of two rounds in a row
        sent, mean, state = Task(compressor.mean(x, state, comm)).result()
        assert sent.shape == mean.shape == x.shape
    expected = 2 * compressor.sent_bytes(x.shape, 4, num_ranks)
    # a meter counts whole bytes of each message
    assert abs(meter.bytes_sent - expected) <= 1 * sum(t.num_exchanges for t in meter.by_tag.values())


def test_state_is_not_modified(compressor):
    """A round that fails must be able to start again from the state before it."""
    x = given(compressor, draw("normal", (24, 40), 0))
    state = compressor.init(x)
    _, first, _ = Task(compressor.mean(x, state, EchoComm(1))).result()
    _, again, _ = Task(compressor.mean(x, state, EchoComm(1))).result()
    assert digest([first]) == digest([again])


@pytest.mark.parametrize("shape", [(257,), (24, 40), (0,)], ids=str)
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

    results = run_world(3, program)
    assert len({digest([mean]) for _, mean in results}) == 1, "ranks differ"
    sent = torch.stack([sent for sent, _ in results]).mean(0)
    assert torch.allclose(sent, results[0][1], rtol=1e-12, atol=1e-11)
