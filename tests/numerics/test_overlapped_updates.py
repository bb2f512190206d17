"""The updates before a round or a fragment's turn, and their deltas, within backward: the bits of those after it."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import lowcomm
from lowcomm.algorithms.base import step
from lowcomm.algorithms.composed import After
from lowcomm.algorithms.data_parallel import DataParallel
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.algorithms.streaming_diloco import StreamingDiLoCo
from lowcomm.codecs.absmax import Absmax
from lowcomm.comm.solo import SoloComm
from lowcomm.compress.cast import Cast
from lowcomm.compress.gathered import Gathered
from lowcomm.compress.identity import Identity
from lowcomm.engine.torch_engine import TorchEngine
from lowcomm.feedback.ef14 import EF14
from lowcomm.reduce import Reducer
from lowcomm.rounds.exchanges import cut_backwards
from lowcomm.rounds.participation import DroppedRounds
from tests.replicas import flat, make_batch, make_engine, make_model, mse, train
from tests.world import run_world

STEPS = 11
BUCKETS = [1, 256, 2**20]  # make_model has tensors of 240, 40, 40 and 8 bytes


def momentum(params, **options):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01, **options)


def adamw(params, **options):
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1, **options)


def in_two_groups(params):
    return torch.optim.AdamW(
        [{"params": params[1::2], "lr": 0.03}, {"params": params[::2], "weight_decay": 0}], lr=0.01
    )


INNERS = {
    f"{inner.__name__} {' '.join(options)}": partial(inner, **options)
    for inner in (momentum, adamw)
    for options in ({"foreach": False}, {"foreach": True}, {"fused": True})
} | {"two groups": in_two_groups}


def assert_same(plain, overlapped, inner, num_ranks=2):
    expected, got = (run_world(num_ranks, partial(train, x, num_steps=STEPS, inner=inner)) for x in (plain, overlapped))
    for xs, ys in zip(expected, got, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


@pytest.mark.parametrize("inner", INNERS.values(), ids=INNERS)
@pytest.mark.parametrize("compressor", [Identity(), Cast()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("bucket_bytes", BUCKETS)
def test_overlap_changes_no_bit(inner, compressor, bucket_bytes):
    overlapped = DiLoCo(4, reducer=Reducer(compressor, bucket_bytes=bucket_bytes), overlap=True)
    assert_same(DiLoCo(4, reducer=Reducer(compressor)), overlapped, inner)


OPTIONS = {
    "every step": {"every": 1},
    "weights": {"every": 3, "weights": [1.0, 2.0, 4.0]},
    "dropped": {"every": 2, "dropped": DroppedRounds(0.6, seed=3)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nor_do_the_other_options(options):
    dropped = options.get("dropped")
    if dropped is not None:
        arrivals = [sum(dropped.arrived(round, 3)) for round in range(1, STEPS // 2 + 1)]
        assert {0, 1} <= set(arrivals), "a round that nobody reaches, and one that some do"
    overlapped = DiLoCo(**options, reducer=Reducer(bucket_bytes=64), overlap=True)
    assert_same(DiLoCo(**options), overlapped, adamw, num_ranks=3)
    after = After(2, DataParallel(), DiLoCo(**options)), After(2, DataParallel(overlap=True), overlapped)
    assert_same(*after, adamw, num_ranks=3)


# Elementwise, so that where groups end is nothing to them; the block is one value, and all ranks' are added in order.
CODE = Gathered(Absmax(8, block=1, scale="e8m0"))
STREAMS = {
    "delay 0": {"delay": 0},
    "delay 1": {"delay": 1},
    "delay 3": {"delay": 3, "blend": 0.0},
    "delays": {"delays": [0, 3, 1]},
    "without guard": {"delay": 2, "first_round_guard": False},
    "all at once": {"delay": 1, "blocks_per_fragment": None},
    "every step": {"delay": 0, "every": 1},
    "two messages": {"delay": 2, "reducer": Reducer(Cast())},
    "a code with feedback": {"delay": 1, "reducer": Reducer(CODE, EF14())},
}


@pytest.mark.parametrize("options", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("bucket_bytes", BUCKETS)
def test_nor_does_that_of_fragments(options, bucket_bytes):
    """With rounds of one step both fragments are sent at every step."""
    options = {"every": 4, "blocks_per_fragment": 1} | options
    reducer = replace(options.pop("reducer", Reducer()), bucket_bytes=bucket_bytes)
    overlapped = StreamingDiLoCo(**options, reducer=reducer, overlap=True)
    assert_same(
        StreamingDiLoCo(**options, reducer=reducer), overlapped, adamw, num_ranks=3 if options.get("delays") else 2
    )


def test_fragments_that_are_sent_together_take_turns_by_depth_whoever_is_ready_first():
    """Blocks 0, 2 and 4 are strided over two fragments; a layer is final before or after others."""

    class Noted(SoloComm):
        def __init__(self):
            super().__init__()
            self.sizes = []

        def issue(self, call):
            self.sizes.append(call.x.numel())
            return super().issue(call)

    def sizes(order):
        model = nn.Sequential(*(nn.Linear(n, 1, bias=False) for n in (5, 6, 7)))
        engine = TorchEngine(model, momentum(list(model.parameters())), loss=lambda m, b: b, clip_norm=None)
        algorithm = StreamingDiLoCo(1, 0, blocks_per_fragment=2, reducer=Reducer(bucket_bytes=1), overlap=True)
        comm = Noted()
        state = algorithm.init(engine, comm)
        assert [f.numbers for f in state.fragments] == [[0, 2], [1]]
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        ready = algorithm.during_backward(1, engine, state, comm)
        found = []
        for i in order:
            ready(i, torch.zeros(()))
            found.append(list(comm.sizes))
        return found

    assert sizes([2, 1, 0]) == [[7], [7, 6], [7, 6, 5]]
    assert sizes([0, 2, 1]) == [[], [7], [7, 6, 5]]
    assert sizes([1, 0, 2]) == [[], [], [7, 6, 5]]


def test_groups_set_out_in_the_order_in_which_they_are_complete():
    """Which of several dtypes is not that of their last parameters."""
    dtypes = torch.float32, torch.bfloat16, torch.bfloat16, torch.float32
    like = [torch.zeros(2, dtype=dtype) for dtype in dtypes]
    assert cut_backwards(like, 2**20) == [[2, 1], [3, 0]]


PER_PARAMETER = [
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ASGD",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
]


@pytest.mark.parametrize("name", PER_PARAMETER)
def test_an_update_in_parts_is_the_update(name):
    def inner(params):
        return getattr(torch.optim, name)(params, lr=0.01)

    whole, parts = make_engine(inner), make_engine(inner)
    for t in range(1, 5):
        for engine in (whole, parts):
            engine.backward(make_batch(0, t))
        parts.update_part([3])
        parts.update_part([1, 0])
        assert not torch.equal(parts.slots()["param"][0], whole.slots()["param"][0])
        assert torch.equal(parts.slots()["param"][2], whole.slots()["param"][2]), "this one is not updated yet"
        for engine in (whole, parts):
            engine.update()
        for key, tensors in whole.slots().items():
            assert torch.equal(flat(parts.slots()[key]), flat(tensors)), key


def test_all_of_an_update_may_be_taken_in_parts():
    whole, parts = make_engine(adamw), make_engine(adamw)
    for t in (1, 2):
        whole.backward(make_batch(0, t))
        whole.update()
        parts.backward(make_batch(0, t), lambda i, gradient: parts.update_part([i]))
        parts.update()
        assert torch.equal(flat(parts.slots()["param"]), flat(whole.slots()["param"]))


def scheduled(algorithm, comm, num_micro_batches):
    """Learning rates of the steps and the parameters after them, of a run with a schedule."""
    model = make_model()
    optimizer = adamw(list(model.parameters()))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    options = {"num_micro_batches": num_micro_batches, "schedule": schedule, "clip_norm": None}
    engine = TorchEngine(model, optimizer, loss=mse, **options)
    state = algorithm.init(engine, comm)
    lrs = []
    for t in range(1, 7):
        lrs.append(engine.lr())
        step(algorithm, t, engine, state, comm, make_batch(comm.rank, t))
    return lrs, flat(engine.slots()["param"])


@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_the_schedule_moves_once_a_step_and_micro_batches_add_up_before_an_update(num_micro_batches):
    algorithms = DiLoCo(every=2), DiLoCo(every=2, reducer=Reducer(bucket_bytes=1), overlap=True)
    (plain, _), (overlapped, _) = (
        run_world(2, partial(scheduled, x, num_micro_batches=num_micro_batches)) for x in algorithms
    )
    assert overlapped[0] == plain[0] == pytest.approx([0.01 / t for t in range(1, 7)])
    assert torch.equal(overlapped[1], plain[1])


def test_clipping_by_the_norm_is_refused():
    model = make_model()
    engine = TorchEngine(model, adamw(list(model.parameters())), clip_norm=0.5)
    with pytest.raises(ValueError, match=r"clip_norm is 0\.5.*set it to None, or set overlap to False"):
        DiLoCo(overlap=True).init(engine, SoloComm())
    with pytest.raises(ValueError, match=r"StreamingDiLoCo.*clip_norm is 0\.5.*or set overlap to False"):
        StreamingDiLoCo(overlap=True).init(engine, SoloComm())
    DiLoCo().init(engine, SoloComm())
    StreamingDiLoCo().init(engine, SoloComm())


def test_an_optimizer_that_wants_a_closure_is_refused():
    engine = make_engine(lambda params: torch.optim.LBFGS(params))
    with pytest.raises(ValueError, match="LBFGS computes the loss anew.*overlap to False"):
        DiLoCo(overlap=True).init(engine, SoloComm())


class CountsForAll(torch.optim.SGD):
    """Keeps the number of its steps for all parameters together."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["num_steps"] = group.get("num_steps", 0) + 1


def test_an_optimizer_that_counts_steps_for_all_parameters_together_is_refused():
    engine = make_engine(lambda params: CountsForAll(params, lr=0.1))
    with pytest.raises(ValueError, match="CountsForAll changes what all its parameters share"):
        engine.backward(make_batch(0, 1), lambda i, gradient: engine.update_part([i]))


def test_a_loop_of_ones_own_refuses_overlap():
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="set overlap to False"):
        lowcomm.attach(model, momentum(list(model.parameters())), DiLoCo(overlap=True), SoloComm())
