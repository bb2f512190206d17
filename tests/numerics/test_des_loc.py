"""DES-LOC against explicit replicas, its special cases, its traffic, and what a lossy wire may do to its states."""

import pytest
import torch
from torch import nn

from lowcomm.algorithms.base import step
from lowcomm.algorithms.composed import After
from lowcomm.algorithms.data_parallel import DataParallel
from lowcomm.algorithms.des_loc import DESLOC
from lowcomm.algorithms.local_sgd import LocalSGD
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.comm.solo import SoloComm
from lowcomm.compress.cast import Cast
from lowcomm.compress.quantized import Quantized
from lowcomm.compress.top_k import TopK
from lowcomm.feedback.ef14 import EF14
from lowcomm.optim.qhadopt import QHADOPT
from lowcomm.outer.nesterov import Nesterov
from lowcomm.outer.sgd import SGD
from lowcomm.reduce import Reducer
from lowcomm.state import restore, state_tree
from tests.replicas import adamw, flat, make_batch, make_engine, make_model, mse, sgd, step_all, train
from tests.world import run_world

N, STEPS = 3, 13
PERIODS = {"param": 2, "exp_avg": 3, "exp_avg_sq": 4}
LOSSY = [
    Reducer(Cast(), bucket_bytes=64),
    Reducer(Quantized()),
    Reducer(TopK(0.25, chunk=8)),
    Reducer(TopK(0.25, chunk=8), EF14()),
]


def close(a, b, atol=1e-12):
    return torch.allclose(a, b, rtol=0, atol=atol)


def qhadopt(params):
    return QHADOPT(params, lr=0.02, betas=(0.9, 0.95), omega=0.8)


def after(start, algorithm):
    """So many steps of data parallel first, with the same reducer."""
    return After(start, DataParallel(algorithm.reducer), algorithm) if start else algorithm


def trace_slots(algorithm, comm, num_steps=STEPS, inner=adamw, on_sync=None):
    """All slots after each step, flat, by name; ``on_sync(t, engine, state)`` may look closer."""
    engine = make_engine(inner)
    state = algorithm.init(engine, comm)
    seen = []
    for t in range(1, num_steps + 1):
        step(algorithm, t, engine, state, comm, make_batch(comm.rank, t))
        seen.append({name: flat(xs) for name, xs in engine.slots().items()})
        if on_sync is not None:
            on_sync(t, engine, state)
    return seen


def step_together(models, optimizers, t):
    """Inner step ``t`` of explicit replicas on the mean of their gradients."""
    for i, model in enumerate(models):
        model.zero_grad()
        mse(model, make_batch(i, t)).backward()
    for ps in zip(*(m.parameters() for m in models), strict=True):
        mean = sum(p.grad for p in ps) / len(ps)
        for p in ps:
            p.grad = mean.clone()
    for optimizer in optimizers:
        optimizer.step()


def reference(periods, inner, *, lr=1.0, momentum=0.0, start=0):
    """Replicas in one list, each with a torch optimizer, and plain means. Every replica's slots by step."""
    models = [make_model() for _ in range(N)]
    optimizers = [inner(list(m.parameters())) for m in models]
    anchor, buffer = flat(list(models[0].parameters())), 0.0
    trace = [[] for _ in models]
    for t in range(1, STEPS + 1):
        (step_together if t <= start else step_all)(models, optimizers, t)
        if t == start:
            anchor = flat(list(models[0].parameters()))
        is_due = {name: t > start and (t - start) % every == 0 for name, every in periods.items()}
        if is_due["param"]:
            delta = anchor - torch.stack([flat(list(m.parameters())) for m in models]).mean(0)
            buffer = momentum * buffer + delta
            anchor = anchor - lr * (delta + momentum * buffer)
            for m in models:
                nn.utils.vector_to_parameters(anchor.clone(), m.parameters())
        for name in periods.keys() - {"param"}:
            if is_due[name]:
                for ps in zip(*(m.parameters() for m in models), strict=True):
                    states = [o.state[p] for o, p in zip(optimizers, ps, strict=True)]
                    mean = sum(state[name] for state in states) / N
                    for state in states:
                        state[name].copy_(mean)
        for rank, (m, o) in enumerate(zip(models, optimizers, strict=True)):
            slots = {name: flat([o.state[p][name] for p in m.parameters()]) for name in ("exp_avg", "exp_avg_sq")}
            trace[rank].append({"param": flat(list(m.parameters())), **slots})
    return trace


@pytest.mark.parametrize("inner", [adamw, qhadopt])
@pytest.mark.parametrize(
    "periods",
    [
        PERIODS,
        {"param": 4, "exp_avg": 4, "exp_avg_sq": 4},
        {"param": 1, "exp_avg": 1, "exp_avg_sq": 1},
        {"param": 3, "exp_avg_sq": 2},
        {"param": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize(("outer", "options"), [(SGD(), {}), (Nesterov(0.7, 0.9), {"lr": 0.7, "momentum": 0.9})])
@pytest.mark.parametrize("start", [0, 1, 5])
def test_it_is_the_reference(inner, periods, outer, options, start):
    expected = reference(periods, inner, start=start, **options)
    got = run_world(N, lambda comm: trace_slots(after(start, DESLOC(periods, outer)), comm, inner=inner))
    for rank in range(N):
        for t in range(STEPS):
            for name in ("param", "exp_avg", "exp_avg_sq"):
                assert close(got[rank][t][name], expected[rank][t][name]), f"rank {rank}, step {t + 1}, {name}"


def test_equal_periods_are_local_adam():
    """Of replicas that know no torch optimizer: Adam's equations, and every four steps the mean of all they hold."""
    models = [make_model() for _ in range(N)]
    u, v = [0.0] * N, [0.0] * N
    periods = {"param": 4, "exp_avg": 4, "exp_avg_sq": 4}
    adam = lambda params: torch.optim.Adam(params, lr=0.01, betas=(0.9, 0.99))  # noqa: E731
    got = run_world(N, lambda comm: trace_slots(DESLOC(periods), comm, inner=adam))
    x = [flat(list(m.parameters())) for m in models]
    for t in range(1, STEPS + 1):
        for i, model in enumerate(models):
            nn.utils.vector_to_parameters(x[i], model.parameters())
            g = flat(list(torch.autograd.grad(mse(model, make_batch(i, t)), list(model.parameters()))))
            u[i] = 0.9 * u[i] + 0.1 * g
            v[i] = 0.99 * v[i] + 0.01 * g**2
            x[i] = x[i] - 0.01 * (u[i] / (1 - 0.9**t)) / ((v[i] / (1 - 0.99**t)).sqrt() + 1e-8)
        if t % 4 == 0:
            x, u, v = ([torch.stack(ys).mean(0)] * N for ys in (x, u, v))
        for i in range(N):
            for name, ys in {"param": x, "exp_avg": u, "exp_avg_sq": v}.items():
                assert close(got[i][t - 1][name], ys[i]), f"rank {i}, step {t}, {name}"


@pytest.mark.parametrize("start", [0, 3, STEPS, STEPS + 1])
@pytest.mark.parametrize("reducer", [Reducer(), *LOSSY], ids=str)
def test_without_periods_of_states_it_is_local_sgd(reducer, start):
    """Bit for bit."""
    des_loc = after(start, DESLOC({"param": 4}, reducer=reducer))
    local = after(start, LocalSGD(every=4, reducer=reducer))
    traces = [run_world(N, lambda comm, a=a: train(a, comm, STEPS, adamw)) for a in (des_loc, local)]
    for a, b in zip(*traces, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("reducer", [Reducer(), *LOSSY], ids=str)
def test_a_slot_is_equal_on_all_replicas_after_its_sync_and_only_then(reducer, start):
    algorithm = after(start, DESLOC(PERIODS, Nesterov(), reducer))
    traces = run_world(N, lambda comm: trace_slots(algorithm, comm))
    for t in range(1, STEPS + 1):
        for name, every in PERIODS.items():
            first, *others = (trace[t - 1][name] for trace in traces)
            equal = [torch.equal(first, x) for x in others]
            is_due = t <= start or (t - start) % every == 0
            assert all(equal) if is_due else not any(equal), f"step {t}, {name}"


@pytest.mark.parametrize("num_ranks", [2, 5])
def test_traffic_is_the_formula(num_ranks):
    """1 / K_x + the sum of 1 / K_j all-reduces a step, over a common multiple of the periods.

    The first of each state carries a number for each tensor besides.
    """

    def program(comm):
        metered = MeteredComm(comm, Meter())
        trace_slots(DESLOC(PERIODS), metered, num_steps=24)
        return metered.meter.bytes_sent

    params = list(make_model().parameters())
    ring = 2 * (num_ranks - 1) / num_ranks * 8  # a number in float64
    expected = ring * (24 * sum(p.numel() for p in params) * (1 / 2 + 1 / 3 + 1 / 4) + 2 * len(params))
    for sent in run_world(num_ranks, program):
        assert sent == pytest.approx(expected, abs=24)  # a meter counts whole bytes of each message


def test_lossy_traffic_is_the_formula():
    """The first round of each state is exact; all carry a number for each tensor besides."""
    compressor = Quantized()

    def program(comm):
        metered = MeteredComm(comm, Meter())
        trace_slots(DESLOC(PERIODS, reducer=Reducer(compressor)), metered, num_steps=24)
        return metered.meter.bytes_sent

    params = list(make_model().parameters())
    num_parameters = sum(p.numel() for p in params)
    dense = 2 * 3 / 4 * 8 * num_parameters
    finite = 3  # a byte to each other rank: whether this one is finite
    lossy = compressor.sent_bytes([num_parameters], 8, 4) + finite
    signs = 2 * 3 / 4 * 4 * len(params)
    present = 2 * 3 / 4 * 8 * len(params)
    expected = 12 * lossy + 2 * (dense + present) + 12 * (lossy + signs)
    for sent in run_world(4, program):
        assert sent == pytest.approx(expected, abs=50)


@pytest.mark.parametrize("reducer", LOSSY, ids=str)
def test_the_first_average_of_a_state_is_exact_and_later_ones_start_from_it(reducer):
    """What a compressor leaves out must not turn to zero."""
    alone = {"param": 100, "exp_avg": 3, "exp_avg_sq": 4}  # parameters and so gradients as in an exact run
    exact = run_world(N, lambda comm: trace_slots(DESLOC(alone), comm))
    lossy = run_world(N, lambda comm: trace_slots(DESLOC(alone, reducer=reducer), comm))
    for name in ("exp_avg", "exp_avg_sq"):
        every = alone[name]
        assert close(lossy[0][every - 1][name], exact[0][every - 1][name], atol=1e-15)
        later, before = lossy[0][2 * every - 1][name], lossy[0][every - 1][name]
        assert torch.isfinite(later).all() and not torch.equal(later, exact[0][2 * every - 1][name])
        if isinstance(reducer.compressor, TopK):  # some entries nobody sent: they are those of the last average
            unsent = later == before
            assert 0 < unsent.sum() < len(later) and (before[unsent] != 0).all()


@pytest.mark.parametrize("reducer", LOSSY, ids=str)
def test_after_data_parallel_the_first_average_of_a_state_is_lossy_and_starts_from_its_last(reducer):
    """All replicas have that one, so no exact round is needed; what nobody sends keeps its value."""
    alone = {"param": 100, "exp_avg": 3, "exp_avg_sq": 4}
    anchors = []

    def look(t, engine, state):
        if t == 2:
            anchors.append({name: flat(average) for name, average in state.then.averages.items()})

    lossy = run_world(N, lambda comm: trace_slots(after(2, DESLOC(alone, reducer=reducer)), comm, on_sync=look))
    for name in ("exp_avg", "exp_avg_sq"):
        before, due = lossy[0][1][name], 2 + alone[name]
        assert all(torch.equal(anchor[name], before) for anchor in anchors)
        first = lossy[0][due - 1][name]
        assert torch.isfinite(first).all() and not torch.equal(first, before)
        if isinstance(reducer.compressor, TopK):
            unsent = first == before
            assert 0 < unsent.sum() < len(first)


def test_traffic_after_data_parallel_is_the_formula():
    """A dense all-reduce for each of the first steps, then 1 / K of each slot; no round of a state is exact."""
    compressor, start = Quantized(), 3

    def program(comm, reducer):
        metered = MeteredComm(comm, Meter())
        trace_slots(after(start, DESLOC(PERIODS, reducer=reducer)), metered, num_steps=start + 24)
        return metered.meter.bytes_sent

    params = list(make_model().parameters())
    num_parameters = sum(p.numel() for p in params)
    dense = 2 * 3 / 4 * 8 * num_parameters
    for sent in run_world(4, lambda comm: program(comm, Reducer())):
        assert sent == pytest.approx((start + 12 + 8 + 6) * dense, abs=27)
    finite = 3
    lossy = compressor.sent_bytes([num_parameters], 8, 4) + finite
    signs = 2 * 3 / 4 * 4 * len(params)
    for sent in run_world(4, lambda comm: program(comm, Reducer(compressor))):
        assert sent == pytest.approx((start + 12) * lossy + (8 + 6) * (lossy + signs), abs=60)


def test_all_that_is_due_is_under_way_before_anything_is_waited_for():
    class Noted(SoloComm):
        def __init__(self):
            super().__init__()
            self.log = []

        def issue(self, call):
            self.log.append("sent")
            return Awaited(super().issue(call), self.log)

    class Awaited:
        def __init__(self, work, log):
            self.work, self.log = work, log

        def wait(self):
            self.log.append("waited")
            return self.work.wait()

    comm = Noted()
    train(DESLOC({"param": 1, "exp_avg": 1, "exp_avg_sq": 1}), comm, 1, adamw)
    assert comm.log == ["sent"] * 3 + ["waited"] * 3


def test_twice_as_many_replicas_go_on_from_copies():
    """Where all slots are due, any replica's state is everybody's; copies that see the same data add nothing."""
    algorithm = DESLOC(PERIODS, Nesterov())

    def steps(comm, engine, state, first, last):
        for t in range(first, last + 1):
            step(algorithm, t, engine, state, comm, make_batch(comm.rank % 2, t))
        return flat(engine.slots()["param"])

    def few(comm):
        engine = make_engine(adamw)
        state = algorithm.init(engine, comm)
        steps(comm, engine, state, 1, 12)
        saved = state_tree(engine.state_dict()), state_tree(state)
        saved = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, saved)
        return saved, steps(comm, engine, state, 13, 24)

    (saved, expected), (other, _) = run_world(2, few)
    assert all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(*(torch.utils._pytree.tree_leaves(x) for x in (saved, other)), strict=True)
    )

    def many(comm):
        engine = make_engine(adamw)
        state = algorithm.init(engine, comm)
        engine.load_state_dict(saved[0])
        restore(state, saved[1])
        return steps(comm, engine, state, 13, 24)

    for got in run_world(4, many):
        assert close(got, expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DESLOC({"exp_avg": 4}), "has none for 'param'"),
        (lambda: DESLOC({"param": 0}), "period of 'param' is 0"),
        (lambda: DESLOC({"param": 4, "exp_avg": -1}), "period of 'exp_avg' is -1"),
        (lambda: DESLOC({"param": 4, "grad": 1}), "gradients are not kept"),
    ],
)
def test_mistakes_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("inner", "names"), [(adamw, r"\['exp_avg', 'exp_avg_sq'\]"), (sgd, r"\[\]")], ids=["adamw", "sgd"]
)
def test_a_state_that_the_optimizer_lacks_is_told_at_its_first_step(inner, names):
    with pytest.raises(ValueError, match=rf"periods names \['momentum_buffer'\].* are {names}: choose"):
        train(DESLOC({"param": 50, "momentum_buffer": 60}), SoloComm(), 1, inner)
