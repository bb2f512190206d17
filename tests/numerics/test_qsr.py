"""Rounds that grow as the learning rate falls: their lengths, the parameters they give, and what is counted before."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import yaml

from lowcomm.algorithms.base import step
from lowcomm.algorithms.composed import After
from lowcomm.algorithms.data_parallel import DataParallel
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.algorithms.local_sgd import LocalSGD
from lowcomm.cli import parse_run
from lowcomm.comm.echo import EchoComm
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.comm.solo import SoloComm
from lowcomm.compress.cast import Cast
from lowcomm.config import Run, describe
from lowcomm.engine.torch_engine import TorchEngine
from lowcomm.optim.schedule import Constant, Cosine, Linear
from lowcomm.outer.nesterov import Nesterov
from lowcomm.outer.sgd import SGD
from lowcomm.predict import predict
from lowcomm.reduce import Reducer
from lowcomm.rounds.qsr import QSR
from tests.replicas import flat, make_batch, make_model, mse
from tests.world import run_world

N, STEPS, PEAK = 3, 40, 0.1
SCHEDULE = Linear(num_warmup_steps=6, final=0.0)
RULE = QSR(base=2, alpha=0.18, num_warmup_steps=6, peak_lr=PEAK)


def make_engine(schedule=SCHEDULE, num_steps=STEPS):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=PEAK, momentum=0.5)
    return TorchEngine(model, optimizer, loss=mse, clip_norm=None, schedule=schedule.build(optimizer, num_steps))


def train(algorithm, comm, schedule=SCHEDULE, num_steps=STEPS):
    """This replica's parameters and the number of rounds after each step, and at last after `finish`."""
    engine = make_engine(schedule, num_steps)
    state = algorithm.init(engine, comm)
    trace = []
    for t in range(1, num_steps + 1):
        step(algorithm, t, engine, state, comm, make_batch(comm.rank, t))
        trace.append((flat(engine.slots()["param"]), algorithm.num_rounds(state)))
    algorithm.finish(num_steps, engine, state, comm)
    return [*trace, (flat(engine.slots()["param"]), algorithm.num_rounds(state))]


def ends(rule, schedule, num_steps=STEPS, start=0, peak=PEAK):
    """The steps that end a round, the last one with the run."""
    found, t = [], start
    while t < num_steps:
        # the rate of the round's first step
        lr = peak * schedule.factor(t + 1, num_steps)
        if t < rule.num_warmup_steps:
            lr = rule.peak_lr
        length = num_steps if lr == 0 else max(rule.base, math.floor((rule.alpha / lr) ** rule.power))
        t = min(t + length, num_steps)
        found.append(t)
    return found


def reference(syncs, lr, momentum, start=0):
    """Explicit replicas that sync after the given steps."""
    models = [make_model() for _ in range(N)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=PEAK, momentum=0.5) for m in models]
    anchor, buffer, trace = flat(list(models[0].parameters())), 0.0, []
    for t in range(1, STEPS + 1):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = PEAK * SCHEDULE.factor(t, STEPS)
            mse(model, make_batch(rank, t)).backward()
        if t <= start:
            for params in zip(*(m.parameters() for m in models), strict=True):
                mean = sum(p.grad for p in params) / N
                for p in params:
                    p.grad = mean.clone()
        for optimizer in optimizers:
            optimizer.step()
        if t <= start:
            anchor = flat(list(models[0].parameters()))
        elif t in syncs:
            delta = sum(anchor - flat(list(m.parameters())) for m in models) / N
            buffer = momentum * buffer + delta
            anchor = anchor - lr * (delta + momentum * buffer)
            for m in models:
                torch.nn.utils.vector_to_parameters(anchor.clone(), m.parameters())
        trace.append([flat(list(m.parameters())) for m in models])
    return trace


def test_lengths_by_hand():
    """ViT-B of the paper: peak rate 0.008, alpha 0.0175; 0.0175 / 0.008 = 2.1875."""
    assert [QSR().round_steps(0, lr) for lr in (0.008, 0.004, 0.002, 0.001)] == [4, 19, 76, 306]
    assert [QSR(power=1).round_steps(0, lr) for lr in (0.008, 0.004, 0.002, 0.001)] == [4, 4, 8, 17]
    assert [QSR(power=3).round_steps(0, lr) for lr in (0.008, 0.004, 0.002, 0.001)] == [10, 83, 669, 5359]
    assert QSR(base=1).round_steps(0, 1.0) == 1, "a rate far above alpha"


@pytest.mark.parametrize("power", [1, 2, 3, 50])
@pytest.mark.parametrize("lr", [0.0, 5e-324, 1e-300, 1e-30])
def test_a_rate_of_nothing_is_a_round_without_end(lr, power):
    assert QSR(power=power).round_steps(10, lr) > 10**12


def test_warm_up_does_not_go_by_the_rising_rate():
    """At the first steps the rate is near 0, and a round by it would be longer than the run."""
    assert QSR(base=4).round_steps(0, 1e-6) > 10**6
    assert QSR(base=4, num_warmup_steps=10).round_steps(9, 1e-6) == 4
    assert QSR(base=4, num_warmup_steps=10, peak_lr=0.004).round_steps(9, 1e-6) == 19
    assert QSR(base=4, num_warmup_steps=10, peak_lr=0.004).round_steps(10, 0.008) == 4
    rule = QSR(base=4, alpha=1.0, num_warmup_steps=1)
    assert rule.round_steps(1, PEAK) == 100
    assert LocalSGD(rule).init(make_engine(Linear()), SoloComm()).ends_t == 4, "the first round begins in warm-up"


@pytest.mark.parametrize(
    "rule",
    [
        RULE,
        replace(RULE, power=1.0),
        replace(RULE, power=3.0, alpha=0.15),
        replace(RULE, alpha=0.1975, num_warmup_steps=7),  # a round begins after step 6, the last that is of warm-up
    ],
    ids=str,
)
@pytest.mark.parametrize("start", [0, 9])
@pytest.mark.parametrize("method", ["LocalSGD", "DiLoCo"])
def test_it_is_the_reference(rule, start, method):
    syncs = ends(rule, SCHEDULE, start=start)
    lengths = [b - a for a, b in zip([start, *syncs], syncs, strict=False)]
    assert lengths[:-1] == sorted(lengths[:-1]) and len(set(lengths)) > 2, "rounds do grow"
    method, outer = {
        "LocalSGD": (LocalSGD(rule), (1.0, 0.0)),
        "DiLoCo": (DiLoCo(rule, Nesterov(0.7, 0.9)), (0.7, 0.9)),
    }[method]
    algorithm = After(start, DataParallel(), method) if start else method
    expected = reference(syncs, *outer, start=start)
    got = run_world(N, lambda comm: train(algorithm, comm))
    for rank in range(N):
        finished = [*got[rank][: STEPS - 1], got[rank][-1]]  # the last round ends with the run
        for t, (params, num_rounds) in enumerate(finished, start=1):
            assert torch.allclose(params, expected[t - 1][rank], rtol=0, atol=1e-12), f"rank {rank}, step {t}"
            assert num_rounds == min(t, start) + sum(s <= t for s in syncs)
        assert torch.equal(got[rank][-1][0], got[0][-1][0])


@pytest.mark.parametrize("compressor", [None, Cast()])
def test_overlap_changes_no_bit(compressor):
    """The last step of a round is known while its backward goes on."""
    reducer = Reducer(compressor) if compressor else Reducer()
    plain, overlapped = (
        DiLoCo(RULE, reducer=reducer),
        DiLoCo(RULE, reducer=replace(reducer, bucket_bytes=64), overlap=True),
    )
    for xs, ys in zip(*(run_world(2, lambda comm, a=a: train(a, comm)) for a in (plain, overlapped)), strict=True):
        assert all(torch.equal(x, y) and i == j for (x, i), (y, j) in zip(xs, ys, strict=True))


def test_a_rule_that_never_leaves_base_is_that_number():
    for every in (1, 7):
        constant, rule = (train(LocalSGD(e), SoloComm()) for e in (every, QSR(base=every, alpha=1e-9)))
        # but for the round that begins at a rate of 0, the last step of this schedule
        assert all(torch.equal(x, y) and i == j for (x, i), (y, j) in zip(constant[:-2], rule[:-2], strict=True))


def test_traffic_is_the_number_of_rounds_times_that_of_one():
    meter = Meter()
    train(LocalSGD(RULE), MeteredComm(EchoComm(4), meter))
    num_bytes = 8 * flat(list(make_model().parameters())).numel()
    assert meter.bytes_sent == pytest.approx(len(ends(RULE, SCHEDULE)) * 2 * 3 / 4 * num_bytes)


def tiny_run(**parts):
    argv = ["--model", "Llama", "--model.size", "500k", "--model.num_layers", "1", "--model.dim", "32"]
    argv += ["--model.num_heads", "2", "--model.num_kv_heads", "1", "--model.ffn_dim", "64"]
    run, _ = parse_run([*argv, "--num_steps", "300", "--optimizer.args", "{lr: 0.1}"])
    return replace(run, **parts)


@pytest.mark.parametrize("schedule", [Cosine(20), Linear(20, 0.1), Constant(20)], ids=str)
def test_a_dry_run_counts_its_rounds(schedule):
    rule = QSR(base=3, alpha=0.19, num_warmup_steps=20, peak_lr=0.1)
    run = tiny_run(algorithm=LocalSGD(rule), schedule=schedule)
    num_rounds = len(ends(rule, schedule, 300))
    seen = predict(run, 4, 256)
    assert (seen.num_rounds, seen.num_steps) == (num_rounds, 300)
    assert seen.round_bytes == pytest.approx(2 * 3 / 4 * 4 * seen.num_parameters)
    assert seen.step_bytes == pytest.approx(seen.round_bytes * num_rounds / 300)
    assert 10 < num_rounds <= 100
    assert (num_rounds == 100) == isinstance(schedule, Constant)


@pytest.mark.parametrize("method", ["LocalSGD", "DiLoCo"])
@pytest.mark.parametrize(
    ("given", "every"),
    [
        ("16", 16),
        ("QSR", QSR()),
        ("{class_path: QSR, init_args: {base: 2, alpha: 0.5}}", QSR(2, 0.5)),
        ("{base: 2, alpha: 0.5, num_warmup_steps: 7, peak_lr: 1.0e-3}", QSR(2, 0.5, 2.0, 7, 1e-3)),
    ],
)
def test_yaml_takes_a_number_or_a_rule(method, given, every, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"algorithm: {{class_path: {method}, init_args: {{every: {given}}}}}\nnum_steps: 1\n")
    run, _ = parse_run(["--config", str(config)])
    assert run.algorithm.every == every
    flagged, _ = parse_run(["--num_steps", "1", "--algorithm", method, "--algorithm.every", given])
    assert flagged.algorithm == run.algorithm
    config.write_text(yaml.safe_dump(describe(run)))
    again: Run = parse_run(["--config", str(config)])[0]
    assert again == run, "the resolved run that lies beside the results is the run"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base": 0}, "base=0.*at least 1"),
        ({"alpha": 0.0}, "alpha=0.0.*set every to a number of steps"),
        ({"alpha": math.inf}, "alpha=inf"),
        ({"power": 0.0}, "power=0.0.*2 is the paper's"),
        ({"num_warmup_steps": -1}, "num_warmup_steps=-1"),
        ({"num_warmup_steps": 5, "peak_lr": 0.0}, "peak_lr=0.0"),
        ({"peak_lr": 0.1}, "peak_lr=0.1.*give its number of steps"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        QSR(**values)


@pytest.mark.parametrize("method", [LocalSGD, lambda every: DiLoCo(every, SGD())])
def test_no_steps_are_refused(method):
    with pytest.raises(ValueError, match="every is 0; a round needs at least 1"):
        method(0)


def test_a_rising_rate_is_not_gone_by():
    with pytest.raises(ValueError, match="QSR's num_warmup_steps is 5, but the learning rate rises for 9 steps"):
        Run(algorithm=LocalSGD(QSR(num_warmup_steps=5)), schedule=Cosine(num_warmup_steps=9), num_steps=20)


@pytest.mark.parametrize("every", [1, 7, 300, 1500, 2000, 2300])
def test_a_dry_run_of_a_long_run_counts_whole_rounds_alone(every):
    """It does not come to the end of the run, so it must not count the sync there."""
    run = replace(tiny_run(algorithm=LocalSGD(every)), num_steps=2500)
    seen = predict(run, 4, 256)
    whole = max(1, 2000 // every)
    assert (seen.num_rounds, seen.num_steps) == (whole, whole * every)
    assert seen.step_bytes == pytest.approx(2 * 3 / 4 * 4 * seen.num_parameters / every)


def test_a_dry_run_counts_the_end_of_the_run_where_it_comes_to_it():
    run = replace(tiny_run(algorithm=LocalSGD(5000)), num_steps=2100)
    seen = predict(run, 4, 256)
    assert (seen.num_rounds, seen.num_steps) == (1, 2100)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("lr", [3e-3, 8e-3, 1e-3, 0.1])
def test_a_whole_number_of_steps_is_not_rounded_down_to_one_less(power, lr):
    for n in range(2, 200):
        assert QSR(1, lr * n ** (1 / power), power).round_steps(0, lr) == n


@pytest.mark.parametrize("lowest", [0.0, 1e-12, 1e-3])
def test_a_rate_that_rises_shortens_the_round_it_rises_in(lowest):
    """As through `attach`, which knows no schedule: without it the first round would last as long as the run."""
    rates = [max(lowest, min(1.0, t / 20)) * PEAK for t in range(200)]
    model, rule = make_model(), QSR(base=4, alpha=2 * PEAK)
    optimizer = torch.optim.SGD(model.parameters(), lr=rates[0])
    engine, method, ended = TorchEngine(model, optimizer, loss=mse, clip_norm=None), LocalSGD(rule), [0]
    state = method.init(engine, SoloComm())
    for t in range(1, 200):
        step(method, t, engine, state, SoloComm(), make_batch(0, t))
        if state.synced_t == t:
            ended.append(t)
        optimizer.param_groups[0]["lr"] = rates[t]
    first, *later = [b - a for a, b in pairwise(ended)]
    # (2 / (t / 20))^2 = t at 11.7; the rate that is seen is that of the step before
    assert first in (12, 13) and set(later[2:]) == {4}
    assert later[0] <= first
