"""Eager DiLoCo against explicit replicas; how far their anchors may be apart, whatever the wire does to deltas."""

import copy

import pytest
import torch

from lowcomm.algorithms.base import step
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.algorithms.eager_diloco import EagerDiLoCo
from lowcomm.codecs.absmax import Absmax
from lowcomm.comm.echo import EchoComm
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.comm.solo import SoloComm
from lowcomm.compress.cast import Cast
from lowcomm.compress.gathered import Gathered
from lowcomm.compress.power_sgd import PowerSGD
from lowcomm.compress.quantized import Quantized
from lowcomm.compress.top_k import TopK
from lowcomm.feedback.ef14 import EF14
from lowcomm.feedback.ef21 import EF21
from lowcomm.outer.nesterov import Nesterov
from lowcomm.outer.sgd import SGD
from lowcomm.reduce import Reducer
from tests.replicas import adamw, flat, make_batch, make_engine, make_model, scripted_engine, sgd, step_all, train
from tests.world import run_world

N, STEPS, LR, MOMENTUM = 3, 14, 0.4, 0.9
INT4 = Absmax(4, block=8)


def decoded(x):
    """What others know of rows of values after they went through 4 bits."""
    return INT4.decode(INT4.encode(x, None), x.shape[-1]).to(x.dtype)


def outer_step(anchor, buffer, delta):
    buffer = MOMENTUM * buffer + delta
    return anchor - LR * (delta + MOMENTUM * buffer), buffer


def reference(num_replicas, every, inner, wire=lambda x: x, num_steps=STEPS):
    """Explicit replicas in one list, an equation a line.

    Returns each replica's parameters and the common anchor after every step, and the common anchor at the end.
    """
    models = [make_model() for _ in range(num_replicas)]
    optimizers = [inner(list(m.parameters())) for m in models]
    start = flat(list(models[0].parameters()))
    anchors, buffers = [start] * num_replicas, [0.0] * num_replicas
    common, common_buffer = start, 0.0
    last, last_mean = [torch.zeros_like(start)] * num_replicas, torch.zeros_like(start)
    trace, commons = [[] for _ in models], []
    for t in range(1, num_steps + 1):
        step_all(models, optimizers, t)
        if t % every == 0:
            common, common_buffer = outer_step(common, common_buffer, last_mean)
            deltas = [a - flat(list(m.parameters())) for a, m in zip(anchors, models, strict=True)]
            for i, m in enumerate(models):
                eager = last_mean + (deltas[i] - last[i]) / num_replicas
                anchors[i], buffers[i] = outer_step(anchors[i], buffers[i], eager)
                torch.nn.utils.vector_to_parameters(anchors[i].clone(), m.parameters())
            last, last_mean = deltas, sum(wire(x) for x in deltas) / num_replicas
        for rank, m in enumerate(models):
            trace[rank].append(flat(list(m.parameters())))
        commons.append(common)
    if num_steps >= every:
        common, common_buffer = outer_step(common, common_buffer, last_mean)
    if num_steps % every:
        rest = [a - flat(list(m.parameters())) for a, m in zip(anchors, models, strict=True)]
        common, _ = outer_step(common, common_buffer, sum(wire(x) for x in rest) / num_replicas)
    return trace, commons, common


def consensus(algorithm, comm, inner, num_steps=STEPS):
    """What stands for the run after each step."""
    engine = make_engine(inner)
    state = algorithm.init(engine, comm)
    seen = []
    for t in range(1, num_steps + 1):
        step(algorithm, t, engine, state, comm, make_batch(comm.rank, t))
        seen.append(flat(algorithm.consensus(engine, state)))
    return seen


@pytest.mark.parametrize("inner", [sgd, adamw])
@pytest.mark.parametrize("every", [1, 4, 5, 7, 100])
@pytest.mark.parametrize("wire", [None, INT4], ids=["exact", "int4"])
def test_it_is_the_reference(inner, every, wire):
    algorithm = EagerDiLoCo(every, Nesterov(LR, MOMENTUM), Reducer(Gathered(wire)) if wire else Reducer())
    expected, commons, final = reference(N, every, inner, (lambda x: decoded(x[None])[0]) if wire else lambda x: x)
    got = run_world(N, lambda comm: train(algorithm, comm, STEPS, inner))
    shared = run_world(N, lambda comm: consensus(algorithm, comm, inner))
    for rank in range(N):
        for t in range(STEPS):
            assert torch.allclose(got[rank][t], expected[rank][t], rtol=0, atol=1e-12), f"rank {rank}, step {t + 1}"
            assert torch.allclose(shared[rank][t], commons[t], rtol=0, atol=1e-12), f"rank {rank}, step {t + 1}"
        assert torch.allclose(got[rank][-1], final, rtol=0, atol=1e-12)


@pytest.mark.parametrize("outer", [Nesterov(LR, MOMENTUM), SGD(0.7)])
@pytest.mark.parametrize("every", [1, 4, 100])
def test_alone_it_is_diloco_bit_for_bit(outer, every):
    """What was taken back of the last delta is all that the average brings."""
    eager, plain = (train(cls(every, outer), SoloComm(), STEPS, adamw) for cls in (EagerDiLoCo, DiLoCo))
    assert all(torch.equal(a, b) for a, b in zip(eager, plain, strict=True))


@pytest.mark.parametrize("reducer", [Reducer(Gathered(INT4)), Reducer(Quantized(), bucket_bytes=64)])
def test_the_common_anchor_and_its_outer_state_are_equal_on_all_ranks(reducer):
    def program(comm):
        engine, algorithm = make_engine(adamw), EagerDiLoCo(2, reducer=reducer)
        state = algorithm.init(engine, comm)
        seen = []
        for t in range(1, STEPS + 1):
            step(algorithm, t, engine, state, comm, make_batch(comm.rank, t))
            seen.append((flat(state.common), flat(state.common_outer.buffer), flat(state.own)))
        return seen

    traces = run_world(4, program)
    for steps in zip(*traces, strict=True):
        assert all(torch.equal(x, steps[0][i]) for s in steps for i, x in enumerate(s[:2]))
    assert not torch.equal(traces[0][-1][2], traces[1][-1][2]), "each replica has an anchor of its own"


def scripted(algorithm, comm, num_steps, size=24):
    """Deltas that depend on rank and step alone; each round's delta and distance from the common anchor."""
    engine = scripted_engine(size)
    state = algorithm.init(engine, comm)
    deltas, distances = [], []
    for t in range(1, num_steps + 1):
        gradient = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(1000 * comm.rank + t))
        step(algorithm, t, engine, state, comm, gradient)
        deltas.append(gradient)
        distances.append(flat(state.common) - flat(state.own))
    algorithm.finish(num_steps, engine, state, comm)
    return deltas, distances, flat(engine.slots()["param"])


REDUCERS = [
    Reducer(),
    Reducer(Gathered(INT4)),
    Reducer(Quantized(INT4), EF14()),
    Reducer(TopK(0.1), EF21()),
    Reducer(PowerSGD(1, min_compression=1), EF14()),
]


@pytest.mark.parametrize("reducer", REDUCERS, ids=str)
def test_anchors_are_apart_by_the_filtered_own_deltas_whatever_the_wire_loses(reducer):
    """Theta - Theta_m = lr / M (Delta_m + momentum b_m), never more than lr / M / (1 - momentum) of the largest."""
    algorithm = EagerDiLoCo(1, Nesterov(LR, MOMENTUM), reducer)
    for deltas, distances, _ in run_world(4, lambda comm: scripted(algorithm, comm, 60)):
        buffer, largest = 0.0, torch.stack(deltas).abs().max()
        for delta, distance in zip(deltas, distances, strict=True):
            buffer = delta + MOMENTUM * buffer
            assert torch.allclose(distance, LR / 4 * (delta + MOMENTUM * buffer), rtol=0, atol=1e-10)
            assert distance.abs().max() <= LR / 4 / (1 - MOMENTUM) * largest


def spread(added, taken_back, num_rounds, num_replicas=4):
    """How far replicas are apart after each round (root mean square), when these are the own terms of a random delta;
    with an exact wire they would be the delta itself, twice.
    """
    generator = torch.Generator().manual_seed(0)
    anchors, buffers = torch.zeros(num_replicas, 64), torch.zeros(num_replicas, 64)
    correction, found = torch.zeros(num_replicas, 64), []
    for _ in range(num_rounds):
        delta = torch.randn(num_replicas, 64, generator=generator)
        anchors, buffers = outer_step(anchors, buffers, correction + added(delta) / num_replicas)
        correction = decoded(delta).mean(0) - taken_back(delta) / num_replicas
        found.append(float((anchors - anchors.mean(0)).square().mean().sqrt()))
    return torch.tensor(found)


def test_own_terms_must_match_or_replicas_drift_apart():
    """Exact twice or as sent twice stay together; fresh exact and taken back as sent part without end."""
    matched = [spread(f, f, 400) for f in (torch.clone, decoded)]
    for found in matched:
        assert found[200:].mean() < 1.1 * found[20:100].mean()
    assert torch.allclose(*(x[20:].mean() for x in matched), rtol=0.05)
    drifting = spread(torch.clone, decoded, 400)
    assert drifting[300:].mean() > 1.5 * drifting[20:100].mean()
    assert drifting[300:].mean() > 2 * matched[0][300:].mean()


@pytest.mark.parametrize("num_steps", [8, 11])
def test_every_delta_counts_once(num_steps):
    """With outer SGD(1), gradients that are given and a start from 0, the end is less all mean deltas."""
    results = run_world(3, lambda comm: scripted(EagerDiLoCo(4, SGD(1.0)), comm, num_steps))
    moved = sum(sum(deltas) for deltas, _, _ in results) / 3
    for _, _, final in results:
        assert torch.allclose(final, -moved, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reducer", [Reducer(), Reducer(Cast())])
def test_zero_local_steps_change_nothing_in_bf16(reducer):
    def idle(comm):
        engine, algorithm = make_engine(dtype=torch.bfloat16), EagerDiLoCo(1, reducer=reducer)
        state = algorithm.init(engine, comm)
        with torch.no_grad():
            for xs in (state.own, state.common):  # as after some rounds: values between those that bfloat16 has
                torch._foreach_mul_(xs, 1 + 2**-12)
            torch._foreach_copy_(engine.slots()["param"], state.own)
        before = copy.deepcopy([state.own, state.common, engine.slots()["param"]])
        for t in range(1, 6):
            algorithm.after_update(t, engine, state, comm)
        return before, [state.own, state.common, engine.slots()["param"]]

    for before, after in run_world(2, idle):
        assert all(torch.equal(x, y) for xs, ys in zip(before, after, strict=True) for x, y in zip(xs, ys, strict=True))


def test_traffic_is_that_of_diloco():
    meter = Meter()
    train(EagerDiLoCo(4), MeteredComm(EchoComm(4), meter), STEPS)
    num_parameters, num_rounds = flat(list(make_model().parameters())).numel(), 4  # 14 steps: 3 and the rest
    assert meter.bytes_sent == pytest.approx(num_rounds * 2 * 3 / 4 * 8 * num_parameters)


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="every is 0; a round needs at least 1"):
        EagerDiLoCo(every=0)
