"""Streaming DiLoCo with overlap applies an average as late as the forward that needs it: what may happen until then."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.algorithms.sparta import SPARTA
from lowcomm.algorithms.streaming_diloco import StreamingDiLoCo
from lowcomm.checkpoint import Checkpoints
from lowcomm.comm.solo import SoloComm
from lowcomm.compress.cast import Cast
from lowcomm.compress.power_sgd import PowerSGD
from lowcomm.engine.torch_engine import TorchEngine
from lowcomm.feedback.ef14 import EF14
from lowcomm.outer.sgd import SGD
from lowcomm.reduce import Reducer
from lowcomm.state import restore, state_tree
from lowcomm.tensors import digest, rng
from tests.replicas import adamw, backward, flat, make_batch, make_engine, train
from tests.world import run_world

STEPS = 11
OPTIONS: dict[str, dict[str, Any]] = {
    "delay 0": {"delay": 0},
    "delay 1, two messages": {"delay": 1, "reducer": Reducer(Cast(), bucket_bytes=64)},
    "delay 0, two messages": {"delay": 0, "reducer": Reducer(PowerSGD(1), EF14(), bucket_bytes=64)},
    "delay 3, no blend": {"delay": 3, "blend": 0.0},
    "delays": {"delays": [2, 0]},
    "every step": {"delay": 0, "every": 1},
    "one fragment": {"delay": 0, "blocks_per_fragment": None, "first_round_guard": False},
}


@pytest.fixture(params=OPTIONS.values(), ids=list(OPTIONS))
def options(request):
    """Of a run on two ranks, whose sums have no order."""
    return {"every": 4, "blocks_per_fragment": 1, "reducer": Reducer(bucket_bytes=64)} | request.param


def step(algorithm, t, engine, state, comm):
    backward(algorithm, t, engine, state, comm, make_batch(comm.rank, t))
    engine.update()
    algorithm.after_update(t, engine, state, comm)


def due(state):
    return any(fragment.is_due for fragment in state.fragments)


def evaluated(algorithm, comm, every):
    """After every step: the anchors where asked for, whether they had to wait for something, and the rounds."""
    engine = make_engine(adamw)
    state = algorithm.init(engine, comm)
    rounds, found, waited = [], [], 0
    for t in range(1, STEPS + 1):
        step(algorithm, t, engine, state, comm)
        rounds.append(algorithm.num_rounds(state))
        if t % every == 0:
            waited += due(state)
            found.append(digest([*algorithm.consensus(engine, state), *engine.slots()["param"]]))
            assert not due(state) and algorithm.num_rounds(state) == rounds[-1]
    algorithm.finish(STEPS, engine, state, comm)
    return [*found, rounds, digest(engine.slots()["param"]), algorithm.num_rounds(state)], waited


@pytest.mark.parametrize("every", [1, 3])
def test_an_evaluation_finds_what_it_would_have_and_changes_nothing(options, every):
    plain, overlapped = (StreamingDiLoCo(**options, overlap=overlap) for overlap in (False, True))
    expected, got = (run_world(2, partial(evaluated, x, every=every)) for x in (plain, overlapped))
    for (xs, never), (ys, waited) in zip(expected, got, strict=True):
        assert xs == ys
        assert not never and (waited or every > 1)


def test_a_run_that_is_saved_before_that_forward_goes_on_bitwise(options, tmp_path):
    algorithm = StreamingDiLoCo(**options, overlap=True)

    def to_the_end(engine, state, first, comm):
        for t in range(first, STEPS + 1):
            step(algorithm, t, engine, state, comm)
        algorithm.finish(STEPS, engine, state, comm)
        return digest(engine.slots()["param"])

    def program(comm):
        whole = make_engine(adamw)
        expected = to_the_end(whole, algorithm.init(whole, comm), 1, comm)
        engine = make_engine(adamw)
        state = algorithm.init(engine, comm)
        checkpoints = Checkpoints(tmp_path / str(comm.rank), 0, 1, "run")
        for t in range(1, 8):
            step(algorithm, t, engine, state, comm)
            before = digest(engine.slots()["param"])
            algorithm.settle(state)
            assert digest(engine.slots()["param"]) == before, "it is not applied by this"
            if t >= 4:
                checkpoints.save(t, {"engine": engine.state_dict(), "algorithm": state_tree(state)})
                saved = checkpoints.load(t)
                fresh = make_engine(adamw)
                fresh_state = algorithm.init(fresh, comm)
                fresh.load_state_dict(saved["engine"])
                restore(fresh_state, saved["algorithm"])
                stopped.add(due(fresh_state))
                assert to_the_end(fresh, fresh_state, t + 1, comm) == expected

    stopped: set[bool] = set()
    run_world(2, program)
    assert True in stopped, "that moment was among them"


class Noted(SoloComm):
    """Notes which sums are waited for."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def issue(self, call):
        work, events = super().issue(call), self.events

        class Waited:
            def wait(self):
                events.append(f"sum of {call.x.numel()}")
                return work.wait()

        return Waited()


class Layer(nn.Linear):
    """Notes when it is used."""

    def __init__(self, size, events):
        super().__init__(size, 1, bias=False)
        self.events = events

    def forward(self, x):
        self.events.append(f"layer of {self.in_features}")
        return super().forward(x[:, : self.in_features])


@pytest.mark.parametrize("bucket_bytes", [1, 44])
def test_each_group_is_waited_for_where_forward_uses_it(bucket_bytes):
    """Layers of 5, 6 and 7 float32 numbers, which are three groups, or two of at most 11 numbers."""
    events = []
    model = nn.ModuleList(Layer(n, events) for n in (5, 6, 7))

    def loss(model, x):
        return sum(layer(x).sum() for layer in model)

    engine = TorchEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), loss=loss, clip_norm=None)
    reducer = Reducer(bucket_bytes=bucket_bytes)
    algorithm = StreamingDiLoCo(2, 0, blocks_per_fragment=None, outer=SGD(0.5), reducer=reducer, overlap=True)
    comm = Noted(events)
    state = algorithm.init(engine, comm)
    for t in (1, 2, 3):
        events.append(f"step {t}")
        backward(algorithm, t, engine, state, comm, torch.ones(2, 7))
        engine.update()
        algorithm.after_update(t, engine, state, comm)
    without = ["layer of 5", "layer of 6", "layer of 7"]
    apart = ["sum of 5", "layer of 5", "sum of 6", "layer of 6", "sum of 7", "layer of 7"]
    together = ["sum of 11", "layer of 5", "layer of 6", "sum of 7", "layer of 7"]
    with_sums = apart if bucket_bytes == 1 else together
    assert events == ["step 1", *without, "step 2", *without, "step 3", *with_sums]


def test_a_loop_that_does_not_ask_is_told():
    engine, comm = make_engine(), SoloComm()
    algorithm = StreamingDiLoCo(2, 0, overlap=True)
    state = algorithm.init(engine, comm)
    for t in (1, 2):
        step(algorithm, t, engine, state, comm)
    engine.backward(make_batch(0, 3))
    engine.update()
    with pytest.raises(AssertionError, match="forward has asked"):
        algorithm.after_update(3, engine, state, comm)


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("num_steps", [9, 10, 11])
def test_after_sparse_averages_it_may_come_late_too(delay, num_steps):
    """At the end of a run, other sparse averages come in after what the last step left to a forward."""
    reducer = Reducer(bucket_bytes=64)
    then = StreamingDiLoCo(4, delay, blend=0.25, blocks_per_fragment=1, reducer=reducer, overlap=True)
    algorithm = SPARTA(fraction=0.3, delay=2, then=then)

    def program(comm, at_once):
        engine = make_engine(adamw)
        state, num_due = algorithm.init(engine, comm), 0
        for t in range(1, num_steps + 1):
            step(algorithm, t, engine, state, comm)
            num_due += due(state.then)
            if at_once:
                algorithm.consensus(engine, state)
        assert num_due >= 3 and algorithm.num_rounds(state) == num_steps + num_due
        algorithm.finish(num_steps, engine, state, comm)
        return digest([*engine.slots()["param"], *state.last])

    early, late = (run_world(2, partial(program, at_once=at_once)) for at_once in (True, False))
    assert early == late


@pytest.mark.parametrize("every", [1, 3])
def test_one_fragment_without_delay_and_blend_is_diloco_bit_for_bit(every):
    reducer = Reducer(bucket_bytes=64)
    streaming = StreamingDiLoCo(every, 0, blend=0.0, blocks_per_fragment=None, reducer=reducer, overlap=True)
    diloco = DiLoCo(every, streaming.outer, reducer)
    expected, got = (run_world(2, partial(train, x, num_steps=STEPS, inner=adamw)) for x in (diloco, streaming))
    for xs, ys in zip(expected, got, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))
    assert not torch.equal(flat(make_engine().slots()["param"]), got[0][-1])


def square(model, batch):
    return model(batch).square().mean()


class Nested(nn.Module):
    """Layers in a list of lists, of which only the inner ones' children are called."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]) for _ in range(3))

    def forward(self, x):
        for first, second in self.layers:
            x = x + second(torch.tanh(first(x)))
        return x


@pytest.mark.parametrize("biases_alone", [False, True])
def test_layers_in_lists_of_lists_learn_what_they_do_without_overlap(biases_alone):
    first = Nested().double()  # not by the ranks, whose threads share torch's generator

    def program(comm, overlap):
        model = copy.deepcopy(first)
        for name, p in model.named_parameters():
            p.requires_grad_(name.endswith("bias") or not biases_alone)
        params = [p for p in model.parameters() if p.requires_grad]
        engine = TorchEngine(model, torch.optim.SGD(params, lr=0.1), loss=square, clip_norm=None)
        algorithm = StreamingDiLoCo(4, 1, blocks_per_fragment=1, overlap=overlap)
        state = algorithm.init(engine, comm)
        for t in range(1, STEPS + 1):
            batch = torch.randn(8, 6, generator=rng(0, "batch", comm.rank, t), dtype=torch.float64)
            backward(algorithm, t, engine, state, comm, batch)
            engine.update()
            algorithm.after_update(t, engine, state, comm)
        algorithm.finish(STEPS, engine, state, comm)
        return digest(engine.slots()["param"])

    assert run_world(2, partial(program, overlap=False)) == run_world(2, partial(program, overlap=True))
