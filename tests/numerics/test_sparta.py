"""SPARTA against explicit replicas, its partition by brute force, and what it has in common with Local SGD."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowcomm.algorithms.base import step
from lowcomm.algorithms.composed import Then
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.algorithms.local_sgd import LocalSGD
from lowcomm.algorithms.sparta import SPARTA, part_size, places
from lowcomm.codecs.absmax import Absmax
from lowcomm.comm.echo import EchoComm
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.compress.cast import Cast
from lowcomm.compress.quantized import Quantized
from lowcomm.feedback.ef14 import EF14
from lowcomm.outer.nesterov import Nesterov
from lowcomm.reduce import Reducer
from tests.compressors import all_compressors
from tests.replicas import adamw, flat, make_batch, make_engine, make_model, mse, sgd, step_all, train
from tests.world import run_world

N, STEPS = 3, 14
SIZES = [30, 5, 5, 1]  # of the parameters of `make_model`


def close(a, b, atol=1e-12):
    return torch.allclose(a, b, rtol=0, atol=atol)


def chosen(num_parts, number, seed=0, num_late=0):
    """The places of the average of this number in the flat vector of all parameters."""
    found, begin, like = [], 0, [torch.empty(n) for n in SIZES]
    for where, size in zip(places(like, num_parts, number, seed, num_late), SIZES, strict=True):
        found += [begin + i for i in where.tolist()]
        begin += size
    return found


def reference(num_replicas, inner, fraction, every=1, delay=0, h=None, num_steps=STEPS):
    """Explicit replicas, value by value; every `h` steps all that is under way, then a DiLoCo round. Each replica's
    parameters after each step, and after the run's end.
    """
    models = [make_model() for _ in range(num_replicas)]
    optimizers = [inner(list(m.parameters())) for m in models]
    anchor, buffer, trace, under_way = flat(list(models[0].parameters())), 0.0, [[] for _ in models], []

    def take_in(xs, arrived):
        _, where, values = arrived
        for k, i in enumerate(where):
            mean = sum(v[k] for v in values) / num_replicas
            for x, v in zip(xs, values, strict=True):
                x[i] += mean - v[k]

    def outer_step(xs):
        nonlocal anchor, buffer
        delta = sum(anchor - x for x in xs) / num_replicas
        buffer = 0.9 * buffer + delta
        anchor = anchor - 0.7 * (delta + 0.9 * buffer)
        return [anchor.clone() for _ in xs]

    for t in range(1, num_steps + 1):
        step_all(models, optimizers, t)
        xs = [flat(list(m.parameters())) for m in models]
        if t % every == 0:
            where = chosen(math.ceil(1 / fraction), t // every, num_late=delay // every)
            under_way.append((t, where, [[float(x[i]) for i in where] for x in xs]))
        syncs = bool(h) and t % h == 0
        while under_way and (under_way[0][0] + delay == t or syncs):
            take_in(xs, under_way.pop(0))
        if syncs:
            xs = outer_step(xs)
        for rank, (model, x) in enumerate(zip(models, xs, strict=True)):
            torch.nn.utils.vector_to_parameters(x.clone(), model.parameters())
            trace[rank].append(x.clone())
    for arrived in under_way:
        take_in(xs, arrived)
    if h is None:
        xs = [sum(xs) / num_replicas] * num_replicas
    elif num_steps % h:
        xs = outer_step(xs)
    else:
        xs = [anchor] * num_replicas
    for rank, x in enumerate(xs):
        trace[rank].append(x)
    return trace


@pytest.mark.parametrize("inner", [sgd, adamw])
@pytest.mark.parametrize("h", [None, 5, 7])
@pytest.mark.parametrize(
    "options",
    [
        {"fraction": 0.3},
        {"fraction": 0.05},
        {"fraction": 1.0, "every": 3},
        {"fraction": 0.5, "every": 3},
        {"fraction": 0.1, "delay": 3},
        {"fraction": 0.3, "delay": 3},  # nearly a pass: almost all values are under way at once
        {"fraction": 0.3, "every": 2, "delay": 7},
        {"fraction": 0.3, "every": 2, "delay": 1},
    ],
    ids=str,
)
def test_it_is_the_reference(inner, options, h):
    then = None if h is None else DiLoCo(every=h, outer=Nesterov(0.7, 0.9))
    expected = reference(N, inner, h=h, **options)
    got = run_world(
        N, lambda comm: train(Then(SPARTA(**options), then) if then else SPARTA(**options), comm, STEPS, inner)
    )
    for rank in range(N):
        for t in range(STEPS + 1):
            assert close(got[rank][t], expected[rank][t]), f"rank {rank}, step {t + 1}"


@given(st.integers(0, 300), st.integers(1, 60), st.integers(0, 5), st.integers(0, 9))
def test_a_pass_covers_every_place_in_parts_of_one_size(num, num_parts, seed, passes):
    """Also empty parameters, single values and primes: spec section 11, test 11."""
    parts = [
        places([torch.empty(num)], num_parts, passes * num_parts + k, seed)[0].tolist() for k in range(1, num_parts + 1)
    ]
    assert set().union(*parts) == set(range(num))
    for part in parts:
        assert len(part) == len(set(part)) == part_size(num, num_parts)
    once = num // part_size(num, num_parts) if num else 0  # before the last ones begin again with the first
    assert len({i for part in parts[:once] for i in part}) == sum(map(len, parts[:once]))


def test_passes_parameters_and_seeds_have_partitions_of_their_own():
    like = [torch.empty(101), torch.empty(101)]
    first, other = places(like, 4, 1, seed=0)
    assert not torch.equal(first, other)
    assert not torch.equal(first, places(like, 4, 5, seed=0)[0]), "the next pass"
    assert not torch.equal(first, places(like, 4, 1, seed=1)[0])
    assert all(torch.equal(a, b) for a, b in zip(places(like, 4, 1, 0), places(like, 4, 1, 0), strict=True))


def test_places_of_the_largest_tensors_are_right():
    """Products beyond 32 bits; a strided part of 3 billion values, checked with whole numbers of any size."""
    num, num_parts = 3_000_000_019, 10_000_000
    shape = torch.empty(num, device="meta")
    like = torch.empty((), device="cpu").expand(num)  # of this size, on one value
    for number in (1, 2, num_parts, num_parts + 1):
        where = places([like], num_parts, number, 0)[0].tolist()
        assert len(where) == len(set(where)) == 301 and all(0 <= i < num for i in where)
        assert len({(b - a) % num for a, b in pairwise(where)}) == 1, "a progression"
    assert places([shape], num_parts, 1, 0)[0].shape == (301,)


def test_the_defaults_cover_everything_in_200_steps():
    assert SPARTA().num_parts == 200
    like = [torch.empty(n) for n in (30, 5, 5, 1, 0, 4099)]
    seen = [set() for _ in like]
    for number in range(1, 201):
        for found, where in zip(seen, places(like, 200, number, 0), strict=True):
            found.update(where.tolist())
    assert seen == [set(range(x.numel())) for x in like]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("every", [1, 4])
def test_with_all_parameters_it_is_local_sgd_bit_for_bit(dtype, every):
    def run(algorithm):
        def program(comm):
            engine = make_engine(adamw, dtype)
            state = algorithm.init(engine, comm)
            trace = []
            for t in range(1, STEPS + 1):
                step(algorithm, t, engine, state, comm, make_batch(comm.rank, t, dtype))
                trace.append(flat(engine.slots()["param"]))
            algorithm.finish(STEPS, engine, state, comm)
            return [*trace, flat(engine.slots()["param"])], algorithm.num_rounds(state)

        return run_world(N, program)

    for (sparse, num_sparse), (local, num_local) in zip(
        run(SPARTA(fraction=1.0, every=every)), run(LocalSGD(every=every)), strict=True
    ):
        assert num_sparse == num_local
        assert all(torch.equal(a, b) for a, b in zip(sparse, local, strict=True))


@pytest.mark.parametrize("delay", [0, 3])
@pytest.mark.parametrize("reducer", [Reducer(), Reducer(Cast(), bucket_bytes=16)])
def test_the_mean_of_the_replicas_stays_where_their_steps_have_put_it(delay, reducer):
    """Exactly averaged, or by a lossy wire up to what that loses of the differences."""

    def program(comm):
        engine = make_engine(adamw)
        algorithm = SPARTA(fraction=0.3, delay=delay, reducer=reducer)
        state, seen = algorithm.init(engine, comm), []
        for t in range(1, STEPS + 1):
            engine.backward(make_batch(comm.rank, t))
            engine.update()
            before = flat(engine.slots()["param"])
            algorithm.after_update(t, engine, state, comm)
            seen.append((before, flat(engine.slots()["param"])))
        return seen

    for at_one_step in zip(*run_world(N, program), strict=True):
        before, after = (torch.stack(xs).mean(0) for xs in zip(*at_one_step, strict=True))
        assert close(before, after, atol=1e-12 if reducer == Reducer() else 1e-3)


@pytest.mark.parametrize("delay", [0, 2])
def test_the_last_averages_are_equal_on_all_ranks_and_those_of_the_values(delay):
    def program(comm):
        engine = make_engine(adamw)
        algorithm = SPARTA(fraction=0.2, delay=delay, reducer=Reducer(Quantized(Absmax(4, block=8))))
        state, seen = algorithm.init(engine, comm), []
        for t in range(1, STEPS + 1):
            step(algorithm, t, engine, state, comm, make_batch(comm.rank, t))
            seen.append((flat(state.last), flat(engine.slots()["param"])))
        return seen

    traces = run_world(4, program)
    for t in range(1, STEPS + 1):
        last, param = traces[0][t - 1]
        assert all(torch.equal(last, trace[t - 1][0]) for trace in traces)
        if delay == 0:  # a part that has just been averaged is the average
            assert torch.equal(last[chosen(5, t)], param[chosen(5, t)])


@pytest.mark.parametrize("compressor", all_compressors(), ids=str)
def test_every_compressor_ends_with_equal_replicas(compressor):
    algorithm = SPARTA(fraction=0.3, delay=1, reducer=Reducer(compressor, bucket_bytes=128))
    final = [trace[-1] for trace in run_world(2, lambda comm: train(algorithm, comm, 6, sgd))]
    assert torch.equal(final[0], final[1]) and torch.isfinite(final[0]).all()


@pytest.mark.parametrize("reducer", [Reducer(), Reducer(Cast())])
def test_zero_local_steps_change_nothing_in_bf16(reducer):
    """Parameters are never rounded to another grid, nor dragged to that of a last average that is finer."""

    def idle(comm):
        engine, algorithm = make_engine(dtype=torch.bfloat16), SPARTA(fraction=0.5, reducer=reducer)
        state = algorithm.init(engine, comm)
        for a, p in zip(state.last, engine.slots()["param"], strict=True):
            p.copy_(a.mul_(1 + 2**-12))
        before = flat(state.last), flat(engine.slots()["param"])
        for t in range(1, 6):
            algorithm.after_update(t, engine, state, comm)
        return before, (flat(state.last), flat(engine.slots()["param"]))

    for before, after in run_world(2, idle):
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_late_averages_of_bf16_are_rounded_once():
    def program(comm):
        engine, algorithm = make_engine(adamw, torch.bfloat16), SPARTA(fraction=0.5, delay=1)
        state = algorithm.init(engine, comm)
        for t in range(1, STEPS + 1):
            engine.backward(make_batch(comm.rank, t, torch.bfloat16))
            engine.update()
            params = engine.slots()["param"]
            sent, before = state.under_way[:1], [p.clone() for p in params]
            algorithm.after_update(t, engine, state, comm)
            for k, i in enumerate(places(params, 2, sent[0].sent_t, 0, 1) if sent else []):
                average, since = state.last[k].take(i), before[k].take(i).float() - sent[0].memo[0][k]
                assert torch.equal(params[k].take(i), (average + since).bfloat16())

    run_world(2, program)


def test_parameters_that_do_not_lie_in_one_row_of_memory():
    def program(comm):
        engine = make_engine(sgd)
        weight = next(iter(engine.model.parameters()))
        if comm.rank == 0:  # the same values, column by column
            weight.data = weight.data.T.contiguous().T
            engine = type(engine)(engine.model, sgd(list(engine.model.parameters())), loss=mse, clip_norm=None)
            assert not engine.slots()["param"][0].is_contiguous()
        algorithm = SPARTA(fraction=0.3)
        state = algorithm.init(engine, comm)
        for t in range(1, STEPS + 1):
            step(algorithm, t, engine, state, comm, make_batch(comm.rank, t))
        return flat(engine.slots()["param"])

    plain = run_world(2, lambda comm: train(SPARTA(fraction=0.3), comm, STEPS, sgd))
    for got, expected in zip(run_world(2, program), plain, strict=True):
        assert close(got, expected[STEPS - 1])


@pytest.mark.parametrize("n", [2, 4])
def test_traffic_is_the_closed_form_and_has_no_places(n):
    def traffic(comm, algorithm, num_steps):
        metered = MeteredComm(comm, Meter())
        engine = make_engine(sgd, torch.float32)
        state = algorithm.init(engine, metered)
        for t in range(1, num_steps + 1):
            step(algorithm, t, engine, state, metered, make_batch(comm.rank, t, torch.float32))
        by_step = metered.meter.bytes_sent
        algorithm.finish(num_steps, engine, state, metered)
        return by_step, metered.meter.bytes_sent - by_step

    algorithm = SPARTA(fraction=0.2)
    values = sum(-(-size // 5) for size in SIZES)  # 6 + 1 + 1 + 1
    found = traffic(EchoComm(n), algorithm, 10)
    assert found == (10 * 2 * (n - 1) * 4 * values // n, 2 * (n - 1) * 4 * sum(SIZES) // n)
    assert set(run_world(n, lambda comm: traffic(comm, algorithm, 10))) == {found}
    assert traffic(EchoComm(n), Then(SPARTA(fraction=0.2), DiLoCo(every=5)), 10) == (
        found[0] + 2 * found[1],
        0,
    ), "two rounds of DiLoCo, after which nothing is left to average"


def test_consensus_is_that_of_what_runs_after_it():
    engine, comm = make_engine(sgd), EchoComm(2)
    alone, followed = SPARTA(), Then(SPARTA(), DiLoCo(every=5))
    mine = alone.consensus(engine, alone.init(engine, comm))
    assert [x.data_ptr() for x in mine] == [x.data_ptr() for x in engine.slots()["param"]]
    state = followed.init(engine, comm)
    assert followed.consensus(engine, state) is state.then.anchor


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, "fraction=0.0.*above 0, at most 1"),
        ({"fraction": 1.5}, "at most 1"),
        ({"every": 0}, "every is 0.*at least 1"),
        ({"delay": -1}, "delay is -1"),
        ({"fraction": 0.25, "every": 2, "delay": 8}, "a pass through all parameters has 8 steps.*below that"),
        ({"fraction": 1.0, "delay": 1}, "below that"),
        ({"reducer": Reducer(feedback=EF14())}, "set the reducer's feedback to NoFeedback"),
    ],
    ids=str,
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SPARTA(**options)
