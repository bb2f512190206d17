"""Data parallel, Local SGD and DiLoCo against references of explicit replicas, and the identities between them."""

import copy
from functools import partial

import pytest
import torch

from lowcomm.algorithms.base import step
from lowcomm.algorithms.composed import After
from lowcomm.algorithms.data_parallel import DataParallel
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.algorithms.local_sgd import LocalSGD
from lowcomm.comm.echo import EchoComm
from lowcomm.comm.solo import SoloComm
from lowcomm.compress.cast import Cast
from lowcomm.compress.dct import DCT
from lowcomm.compress.hierarchical import Hierarchical
from lowcomm.compress.random_k import RandomK
from lowcomm.compress.top_k import TopK
from lowcomm.feedback.ef14 import EF14
from lowcomm.outer.nesterov import Nesterov
from lowcomm.outer.sgd import SGD
from lowcomm.reduce import Reducer
from lowcomm.rounds.participation import DroppedRounds
from tests.replicas import adamw, flat, make_batch, make_engine, make_model, mse, sgd, step_all, train
from tests.world import run_world

N, STEPS = 3, 12


def close(a, b, atol=1e-12):
    return torch.allclose(a, b, rtol=0, atol=atol)


def reference(num_replicas, every, inner, *, lr, momentum, start=0, weights=None, dropped=None, num_steps=STEPS):
    """Explicit replicas in one list, one line of Algorithm 1 a line. Returns each replica's parameters by step."""
    models = [make_model() for _ in range(num_replicas)]
    optimizers = [inner(list(m.parameters())) for m in models]
    anchor, buffer, round = flat(list(models[0].parameters())), 0.0, 0
    base = torch.tensor(weights or [1.0] * num_replicas, dtype=torch.float64)
    trace = [[] for _ in models]
    for t in range(1, num_steps + 1):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            mse(model, make_batch(rank, t)).backward()
        if t <= start:
            for params in zip(*(m.parameters() for m in models), strict=True):
                mean = sum(w * p.grad for w, p in zip(base / base.sum(), params, strict=True))
                for p in params:
                    p.grad = mean.clone()
        for optimizer in optimizers:
            optimizer.step()
        if t <= start:
            anchor = flat(list(models[0].parameters()))
        elif (t - start) % every == 0:
            round += 1
            here = [True] * num_replicas if dropped is None else dropped.arrived(round, num_replicas)
            w = base * torch.tensor(here)
            if w.sum() > 0:
                w = w / (base.sum() if dropped and dropped.divide_by == "all" else w.sum())
                delta = sum(w[i] * (anchor - flat(list(m.parameters()))) for i, m in enumerate(models))
                buffer = momentum * buffer + delta
                anchor = anchor - lr * (delta + momentum * buffer)
            for m, arrived in zip(models, here, strict=True):
                if arrived:
                    torch.nn.utils.vector_to_parameters(anchor.clone(), m.parameters())
        for rank, m in enumerate(models):
            trace[rank].append(flat(list(m.parameters())))
    return trace


def made(method, start=0, weights=None, **options):
    """With weights, and so many steps of data parallel before it."""
    algorithm = method(weights=weights, **options)
    return After(start, DataParallel(weights=weights), algorithm) if start else algorithm


@pytest.mark.parametrize("inner", [sgd, adamw])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"start": 5},
        {"weights": [1.0, 2.0, 5.0]},
        {"weights": [1.0, 2.0, 5.0], "start": 5},
        {"dropped": DroppedRounds(0.4, "survivors", seed=3)},
        {"dropped": DroppedRounds(0.4, "all", seed=3)},
        {"dropped": DroppedRounds(0.9, "survivors", seed=1), "weights": [1.0, 2.0, 5.0]},
        {"dropped": DroppedRounds(0.4, "survivors", seed=3), "weights": [1.0, 2.0, 5.0], "start": 5},
    ],
    ids=lambda o: "-".join(o) or "plain",
)
@pytest.mark.parametrize("every", [1, 4])
def test_diloco_is_the_reference(inner, options, every):
    expected = reference(N, every, inner, lr=0.7, momentum=0.9, **options)
    algorithm = made(partial(DiLoCo, every, Nesterov(0.7, 0.9)), **options)
    got = run_world(N, lambda comm: train(algorithm, comm, STEPS, inner))
    for rank in range(N):
        for t in range(STEPS):
            assert close(got[rank][t], expected[rank][t]), f"rank {rank}, step {t + 1}"


def test_dropped_rounds_really_drop():
    """The options above would prove nothing if nobody were ever missing."""
    for dropped in (DroppedRounds(0.4, seed=3), DroppedRounds(0.9, seed=1)):
        arrivals = [dropped.arrived(round, N) for round in range(1, 13)]
        assert any(not all(a) for a in arrivals) and any(any(a) for a in arrivals)
    assert any(not any(DroppedRounds(0.9, seed=1).arrived(round, N)) for round in range(1, 13)), (
        "a round nobody reaches"
    )


def test_shares_are_refused_where_they_would_not_be_kept():
    present = TopK(0.5, divide_by="present")
    for compressor in (present, DCT(present), Hierarchical(1, outer=present), RandomK(values=present)):
        for options in ({"weights": [1.0, 3.0]}, {"dropped": DroppedRounds(0.5)}):
            with pytest.raises(ValueError, match="divide_by='all'"):
                LocalSGD(reducer=Reducer(compressor), **options)
        LocalSGD(reducer=Reducer(compressor))
    with pytest.raises(ValueError, match="lost replica"):
        DiLoCo(reducer=Reducer(TopK(), EF14()), dropped=DroppedRounds(0.5))
    DiLoCo(reducer=Reducer(TopK(), EF14()), weights=[1.0, 3.0])
    with pytest.raises(ValueError, match="weights has 2 entries for 1 replicas"):
        DiLoCo(weights=[1.0, 3.0]).init(make_engine(), SoloComm())
    with pytest.raises(ValueError, match=r"num_steps=-1\): it is a number of steps"):
        After(-1)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_weights_that_are_no_shares_are_refused(weight):
    with pytest.raises(ValueError, match=rf"weights \[1.0, {weight}\]: each must be positive and finite"):
        DiLoCo(weights=[1.0, weight])


def test_nothing_comes_from_a_lost_replica():
    """Whatever it holds, NaN too: the others go on as without it."""
    dropped = DroppedRounds(0.5, seed=2)
    round = next(round for round in range(1, 20) if sum(dropped.arrived(round, N)) == 1)
    lost = [rank for rank, here in enumerate(dropped.arrived(round, N)) if not here]

    def program(comm, broken):
        engine, algorithm = make_engine(sgd), DiLoCo(every=1, dropped=dropped)
        state = algorithm.init(engine, comm)
        for t in range(1, round + 1):
            engine.backward(make_batch(comm.rank, t))
            engine.update()
            if broken and t == round and comm.rank in lost:
                for p in engine.slots()["param"]:
                    p.detach().fill_(float("nan"))
            algorithm.after_update(t, engine, state, comm)
        return flat(state.anchor)

    whole, broken = (run_world(N, partial(program, broken=broken)) for broken in (False, True))
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(whole, broken, strict=True))


@pytest.mark.parametrize("inner", [sgd, adamw])
@pytest.mark.parametrize("options", [{}, {"start": 5}, {"weights": [1.0, 2.0, 5.0]}])
def test_local_sgd_averages_parameters(inner, options):
    expected = reference(N, 4, inner, lr=1.0, momentum=0.0, **options)
    got = run_world(N, lambda comm: train(made(partial(LocalSGD, 4), **options), comm, STEPS, inner))
    for rank in range(N):
        for t in range(STEPS):
            assert close(got[rank][t], expected[rank][t]), f"rank {rank}, step {t + 1}"


def test_diloco_with_outer_sgd_1_is_plain_averaging():
    """By replicas that know nothing of anchors."""
    models = [make_model() for _ in range(N)]
    optimizers = [adamw(list(m.parameters())) for m in models]
    got = run_world(N, lambda comm: train(DiLoCo(every=3, outer=SGD(1.0)), comm, STEPS, adamw))
    for t in range(1, STEPS + 1):
        step_all(models, optimizers, t)
        if t % 3 == 0:
            mean = torch.stack([flat(list(m.parameters())) for m in models]).mean(0)
            for m in models:
                torch.nn.utils.vector_to_parameters(mean.clone(), m.parameters())
        for rank, m in enumerate(models):
            assert close(got[rank][t - 1], flat(list(m.parameters())))


def test_local_sgd_every_step_with_inner_sgd_is_data_parallel():
    local = run_world(N, lambda comm: train(LocalSGD(every=1), comm, STEPS))
    parallel = run_world(N, lambda comm: train(DataParallel(), comm, STEPS))
    for rank in range(N):
        for a, b in zip(local[rank], parallel[rank], strict=True):
            assert close(a, b)


@pytest.mark.parametrize("inner", [sgd, adamw])
def test_data_parallel_is_one_large_batch(inner):
    got = run_world(N, lambda comm: train(DataParallel(), comm, STEPS, inner))
    model = make_model()
    optimizer = inner(list(model.parameters()))
    for t in range(1, STEPS + 1):
        parts = [make_batch(rank, t) for rank in range(N)]
        optimizer.zero_grad()
        mse(model, (torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))).backward()
        optimizer.step()
        for rank in range(N):
            assert close(got[rank][t - 1], flat(list(model.parameters())))


@pytest.mark.parametrize("start", [STEPS, STEPS + 1])
def test_a_run_that_ends_before_local_steps_begin_is_data_parallel(start):
    parallel = run_world(N, lambda comm: train(DataParallel(), comm, STEPS))
    for got in run_world(N, lambda comm: train(After(start, DataParallel(), DiLoCo(every=4)), comm, STEPS)):
        assert all(torch.equal(a, b) for a, b in zip(got, parallel[0], strict=True))


def test_data_parallel_before_local_steps_takes_gradients_in_bf16_as_they_are():
    """In the same buckets as data parallel alone."""
    reducer = Reducer(Cast("float16"), EF14(), bucket_bytes=32)

    def program(comm, algorithm):
        engine = make_engine(dtype=torch.bfloat16)
        state = algorithm.init(engine, comm)
        for t in range(1, 5):
            step(algorithm, t, engine, state, comm, make_batch(comm.rank, t, torch.bfloat16))
        return flat(engine.slots()["param"])

    first, alone = (
        run_world(2, partial(program, algorithm=x))
        for x in (After(9, DataParallel(reducer), DiLoCo(reducer=reducer)), DataParallel(reducer))
    )
    assert all(torch.equal(x, alone[0]) for x in [*first, *alone])


@pytest.mark.parametrize(
    "algorithm", [DataParallel(), LocalSGD(every=4), DiLoCo(every=4), After(3, DataParallel(), DiLoCo(every=4))]
)
@pytest.mark.parametrize("k", [2, 4])
def test_k_identical_replicas_are_one(algorithm, k):
    """Bit for bit where k is a power of two: k x / k is exact."""
    alone = train(algorithm, SoloComm(), STEPS, adamw, data_rank=0)
    for got in run_world(k, lambda comm: train(algorithm, comm, STEPS, adamw, data_rank=0)):
        assert all(torch.equal(a, b) for a, b in zip(alone, got, strict=True))
    echoed = train(algorithm, EchoComm(k), STEPS, adamw, data_rank=0)
    assert all(torch.equal(a, b) for a, b in zip(alone, echoed, strict=True))


def test_one_replica_of_local_sgd_is_plain_training():
    model = make_model()
    optimizer = adamw(list(model.parameters()))
    got = train(LocalSGD(every=4), SoloComm(), STEPS, adamw)
    for t in range(1, STEPS + 1):
        optimizer.zero_grad()
        mse(model, make_batch(0, t)).backward()
        optimizer.step()
        assert close(got[t - 1], flat(list(model.parameters())))


@pytest.mark.parametrize("reducer", [Reducer(), Reducer(Cast()), Reducer(Cast("float16"), bucket_bytes=16)])
@pytest.mark.parametrize("outer", [Nesterov(), SGD()])
def test_zero_local_steps_change_nothing_in_bf16(reducer, outer):
    """The anchor is finer than the parameters; a replica that did not train must not drag it onto their grid."""

    def idle(comm):
        engine = make_engine(dtype=torch.bfloat16)
        algorithm = DiLoCo(every=1, outer=outer, reducer=reducer)
        state = algorithm.init(engine, comm)
        with torch.no_grad():
            for a in state.anchor:  # as after some rounds: values between those that bfloat16 has
                a.mul_(1 + 2**-12)
            for p, a in zip(engine.slots()["param"], state.anchor, strict=True):
                p.copy_(a)
        assert all(a.dtype == torch.float32 for a in state.anchor)
        assert any(not torch.equal(a, a.bfloat16().float()) for a in state.anchor)
        before = copy.deepcopy([state.anchor, engine.slots()["param"]])
        for t in range(1, 6):
            algorithm.after_update(t, engine, state, comm)
        return before, [state.anchor, engine.slots()["param"]]

    for before, after in run_world(2, idle):
        for xs, ys in zip(before, after, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


@pytest.mark.parametrize("every", [1, 5, 7, 100])
def test_a_partial_last_round_is_synced_once(every):
    got = run_world(N, lambda comm: train(LocalSGD(every=every), comm, STEPS))
    last, final = [trace[-2] for trace in got], [trace[-1] for trace in got]
    assert all(torch.equal(final[0], x) for x in final)
    mean = torch.stack(last).mean(0)
    assert close(final[0], mean), "the final parameters are the mean of the last local ones"


def test_nobody_misses_a_partial_last_round():
    dropped = DroppedRounds(0.9, seed=0)
    assert not any(dropped.arrived(1, N)), "a full round would be lost on all"
    got = run_world(N, lambda comm: train(LocalSGD(every=100, dropped=dropped), comm, STEPS))
    mean = torch.stack([trace[-2] for trace in got]).mean(0)
    assert all(close(trace[-1], mean) for trace in got)


@pytest.mark.parametrize("dropped", [None, DroppedRounds(0.5, seed=2)])
def test_anchors_and_outer_state_are_equal_on_all_ranks(dropped):
    def program(comm):
        engine = make_engine(adamw)
        algorithm = DiLoCo(every=2, reducer=Reducer(Cast(), bucket_bytes=64), dropped=dropped)
        state = algorithm.init(engine, comm)
        seen = []
        for t in range(1, STEPS + 1):
            step(algorithm, t, engine, state, comm, make_batch(comm.rank, t))
            seen.append((flat(state.anchor), flat(state.outer.buffer)))
        return seen

    traces = run_world(4, program)
    for t in range(STEPS):
        for trace in traces[1:]:
            assert torch.equal(trace[t][0], traces[0][t][0]) and torch.equal(trace[t][1], traces[0][t][1])


def test_consensus_is_the_same_everywhere_at_every_step():
    def program(comm):
        engine, algorithm = make_engine(adamw), After(3, DataParallel(), DiLoCo(every=5))
        state = algorithm.init(engine, comm)
        seen = [flat(algorithm.consensus(engine, state))]
        for t in range(1, STEPS + 1):
            step(algorithm, t, engine, state, comm, make_batch(comm.rank, t))
            seen.append(flat(algorithm.consensus(engine, state)))
        return seen

    traces = run_world(N, program)
    for a, b in zip(*traces[:2], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(traces[0][0], traces[0][1]), "data parallel moves it at once"
