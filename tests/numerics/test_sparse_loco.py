"""SparseLoCo, a combination of DiLoCo, top-k, 2-bit values and error feedback, against the paper's equations."""

import math

import pytest
import torch
from torch import nn

from lowcomm.algorithms.base import step
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.codecs.float32 import Float32
from lowcomm.codecs.sign_magnitude import SignMagnitude
from lowcomm.comm.echo import EchoComm
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.compress.top_k import TopK
from lowcomm.engine.torch_engine import TorchEngine
from lowcomm.feedback.ef14 import EF14
from lowcomm.outer.sgd import SGD
from lowcomm.reduce import Reducer
from tests.replicas import adamw, flat, make_batch, make_engine, make_model, step_all, train
from tests.world import run_world

N, STEPS, EVERY, CHUNK, KEPT = 3, 16, 4, 16, 4


def exact(values):
    return [float(torch.tensor(v, dtype=torch.float32)) for v in values]


def two_magnitudes(values, block=4):
    """Signs, and for each block the mean of the small and of the large magnitudes, as Lloyd's algorithm parts them."""
    coded = []
    for start in range(0, len(values), block):
        sizes = [abs(v) for v in exact(values[start : start + block])]
        border = sum(sizes) / len(sizes)
        for _ in range(9):
            means = []
            for part in ([s for s in sizes if s <= border], [s for s in sizes if s > border]):
                means.append(sum(part) / len(part) if part else 0.0)
            split, border = border, sum(means) / 2
        means = [float(torch.tensor(m).bfloat16()) for m in means]
        coded += [means[abs(v) > split] * (-1 if v < 0 else 1) for v in exact(values[start : start + block])]
    return coded


CODES = {"float32": (Float32(), exact), "2 bits": (SignMagnitude(block=4), two_magnitudes)}


def places(a):
    """Of each chunk's largest entries, a shorter last chunk in proportion."""
    found = []
    for start in range(0, len(a), CHUNK):
        chunk = list(range(start, min(start + CHUNK, len(a))))
        kept = -(-KEPT * len(chunk) // CHUNK)
        found += sorted(sorted(chunk, key=lambda i: -abs(a[i]))[:kept])
    return found


def reference(alpha, beta, code, divide_by):
    """The paper's equations over explicit replicas; parameters by step, and what each has not sent at the end."""
    models = [make_model() for _ in range(N)]
    optimizers = [adamw(list(m.parameters())) for m in models]
    theta = flat(list(models[0].parameters()))
    errors, trace = [torch.zeros_like(theta) for _ in models], [[] for _ in models]
    for t in range(1, STEPS + 1):
        step_all(models, optimizers, t)
        if t % EVERY == 0:
            total, senders = torch.zeros_like(theta), torch.zeros_like(theta)
            for r, model in enumerate(models):
                a = beta * errors[r] + (theta - flat(list(model.parameters())))
                where = places(a.tolist())
                sent = torch.zeros_like(a)
                sent[where] = torch.tensor(code([float(a[i]) for i in where]), dtype=a.dtype)
                errors[r] = a - sent
                total += sent
                senders[where] += 1
            theta = theta - alpha * total / (N if divide_by == "all" else senders.clamp(min=1))
            for model in models:
                nn.utils.vector_to_parameters(theta.clone(), model.parameters())
        for r, model in enumerate(models):
            trace[r].append(flat(list(model.parameters())))
    return trace, errors


def sparse_loco(alpha, beta, code, divide_by):
    compressor = TopK(num=KEPT, chunk=CHUNK, values=CODES[code][0], divide_by=divide_by)
    return DiLoCo(every=EVERY, outer=SGD(alpha), reducer=Reducer(compressor, EF14(beta)))


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("divide_by", ["all", "present"])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.95), (0.65, 0.95), (1.0, 0.0)])
def test_it_is_the_equations_of_the_paper(alpha, beta, divide_by, code):
    expected, _ = reference(alpha, beta, CODES[code][1], divide_by)
    got = run_world(N, lambda comm: train(sparse_loco(alpha, beta, code, divide_by), comm, STEPS, adamw))
    for rank in range(N):
        for t in range(STEPS):
            assert torch.allclose(got[rank][t], expected[rank][t], rtol=0, atol=1e-9), f"rank {rank}, step {t + 1}"


def test_what_was_not_sent_stays_with_its_replica():
    """One anchor for all, bit for bit, and an error memory of each one's own, which nobody may hand to another."""
    algorithm = sparse_loco(1.0, 0.95, "2 bits", "all")

    def program(comm):
        engine = make_engine(adamw)
        state = algorithm.init(engine, comm)
        for t in range(1, STEPS + 1):
            step(algorithm, t, engine, state, comm, make_batch(comm.rank, t))
        (reducer,) = state.kept["deltas"]
        return flat(state.anchor), reducer.buckets[0].feedback.error

    _, errors = reference(1.0, 0.95, two_magnitudes, "all")
    found = run_world(N, program)
    for (anchor, error), expected in zip(found, errors, strict=True):
        assert torch.equal(anchor, found[0][0])
        assert torch.allclose(error, expected, rtol=0, atol=1e-9) and error.any()
    assert not torch.equal(found[0][1], found[1][1])


def test_the_two_means_differ_by_how_many_sent_a_place():
    """So an outer learning rate tuned with one does not suit the other."""
    n, num = 4, 64

    def mean(divide_by):
        def program(comm):
            x = torch.zeros(num)
            x[0], x[1 + comm.rank] = 2.0, 1.0  # all send the first place, each its own besides
            reducer = Reducer(TopK(num=2, chunk=num, divide_by=divide_by))
            (got,), _ = reducer.mean([x], reducer.init([x]), comm).result()
            return got[:6].tolist()

        return run_world(n, program)[0]

    assert mean("all") == [2.0, 0.25, 0.25, 0.25, 0.25, 0.0]
    assert mean("present") == [2.0, 1.0, 1.0, 1.0, 1.0, 0.0]


def bytes_of_places(num, kept, indices):
    """Rows of 12 bits, say; or low bits as they are, and one bit for each place and each rise of the rest."""
    low = math.floor(math.log2(num / kept))
    bits = kept * math.ceil(math.log2(num)) if indices == "packed" else kept * (low + 1) + math.ceil(num / 2**low)
    return math.ceil(bits / 8)


@pytest.mark.parametrize(("indices", "limit"), [("elias_fano", 0.16), ("packed", 0.222)])
def test_bits_a_parameter_and_the_traffic_of_a_run(indices, limit):
    compressor = TopK(num=64, chunk=4096, values=SignMagnitude(), indices=indices)
    assert 8 * compressor.num_bytes(4096 * 1000) / (4096 * 1000) <= limit

    model = nn.Sequential(nn.Linear(255, 128, bias=False), nn.Linear(128, 100))  # 45,540 parameters
    chunks, rest = divmod(45_540, 4096)  # 11 whole chunks
    rest_kept = math.ceil(64 * rest / 4096)
    kept = 64 * chunks + rest_kept
    values = math.ceil(2 * kept / 8) + 4 * math.ceil(kept / 256)
    message = values + chunks * bytes_of_places(4096, 64, indices) + bytes_of_places(rest, rest_kept, indices)
    assert compressor.num_bytes(45_540) == message

    engine = TorchEngine(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loss=lambda m, x: m(x).square().mean(), clip_norm=None
    )
    n, comm = 4, MeteredComm(EchoComm(4), Meter())
    algorithm = DiLoCo(every=2, outer=SGD(), reducer=Reducer(compressor, EF14(0.95)))
    state = algorithm.init(engine, comm)
    for t in range(1, 7):
        step(algorithm, t, engine, state, comm, torch.ones(3, 255))
    flags = n - 1  # whose values are finite, a byte to each
    assert comm.meter.bytes_sent == 3 * ((n - 1) * message + flags)
