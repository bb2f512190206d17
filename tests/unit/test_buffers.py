"""Buffers that training changes: one set on all replicas, right for the parameters that stand."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowcomm
from lowcomm.algorithms.base import Algorithm
from lowcomm.algorithms.composed import After, Then
from lowcomm.algorithms.data_parallel import DataParallel
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.algorithms.gasloc import GASLoC
from lowcomm.algorithms.local_sgd import LocalSGD
from lowcomm.algorithms.noloco import NoLoCo
from lowcomm.algorithms.streaming_diloco import StreamingDiLoCo
from lowcomm.checkpoint import Checkpoints
from lowcomm.comm.base import Comm
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.engine.buffers import NUM_FORWARDS
from lowcomm.engine.torch_engine import TorchEngine
from lowcomm.places import place_of
from lowcomm.rounds.buffers import average
from lowcomm.tensors import rng
from tests.world import run_world

MOVES = [DiLoCo(every=8), LocalSGD(every=8), StreamingDiLoCo(every=8), NoLoCo(every=8), GASLoC(every=8)]
STEPS, CLASSES, WIDTH = 64, 6, 16


def batch(seed: int, size: int = 32) -> tuple[Tensor, Tensor]:
    centres = torch.randn(CLASSES, WIDTH, generator=rng(0, "centres"))
    labels = torch.randint(CLASSES, (size,), generator=rng(seed, "labels"))
    return 3 + centres[labels] + 0.5 * torch.randn(size, WIDTH, generator=rng(seed, "noise")), labels


def classifier() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hidden = [x for _ in range(3) for x in (nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(WIDTH, CLASSES))


def in_own_loop(comm: Comm, algorithm: Algorithm, model: nn.Module, steps: int = STEPS, lr: float = 0.02) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    sync = lowcomm.attach(model, optimizer, algorithm, comm)
    for t in range(steps):
        x, labels = batch(100 * t + comm.rank)
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        sync.step()
    sync.finish()
    return model


def accuracy(model: nn.Module) -> float:
    x, labels = batch(-1, 512)
    with torch.no_grad():
        return (model.eval()(x).argmax(1) == labels).float().mean().item()


@pytest.mark.parametrize("algorithm", [*MOVES, After(9, DataParallel(), DiLoCo(every=8))], ids=repr)
def test_batch_norm_is_as_accurate_as_with_data_parallel(algorithm):
    """Right after an outer step, running statistics of the weights before it are far off."""
    models = run_world(2, lambda comm: in_own_loop(comm, algorithm, classifier()))
    plain = run_world(2, lambda comm: in_own_loop(comm, DataParallel(), classifier()))
    assert accuracy(models[0]) > accuracy(plain[0]) - 0.01
    for name, x in models[0].state_dict().items():
        assert torch.equal(x, models[1].state_dict()[name]), name


@pytest.mark.parametrize("algorithm", MOVES, ids=repr)
def test_statistics_are_those_of_the_last_inputs_under_the_last_parameters(algorithm):
    models = run_world(3, lambda comm: in_own_loop(comm, algorithm, classifier()))
    first = models[0][0]
    inputs = [batch(100 * t + rank)[0] for t in range(STEPS - NUM_FORWARDS, STEPS) for rank in range(3)]
    features = torch.stack([first(x) for x in inputs])
    norm = models[0][1]
    torch.testing.assert_close(norm.running_mean, features.mean((0, 1)))
    torch.testing.assert_close(norm.running_var, features.var(1).mean(0))
    assert norm.num_batches_tracked == STEPS and norm.momentum == 0.1


def test_equal_replicas_keep_long_averages():
    """Data parallel does not move parameters at the end, and more batches than the last few are known."""
    models = run_world(2, lambda comm: in_own_loop(comm, DataParallel(), classifier()))
    alone = run_world(2, lambda comm: in_own_loop(comm.sub([comm.rank]), DataParallel(), classifier(), steps=1))
    assert torch.equal(models[0][1].running_mean, models[1][1].running_mean)
    x, y = (batch(rank)[0] for rank in range(2))
    expected = [0.1 * classifier()[0](z).mean(0) for z in (x, y)]
    for model, mean in zip(alone, expected, strict=True):
        torch.testing.assert_close(model[1].running_mean, mean)


@pytest.mark.parametrize("algorithm", [NoLoCo(every=8, finalize="ensemble"), GASLoC(every=8, finalize="ensemble")])
def test_replicas_that_end_apart_keep_statistics_of_their_own(algorithm):
    for method in (algorithm, Then(LocalSGD(every=100), algorithm)):
        models = run_world(2, lambda comm, method=method: in_own_loop(comm, method, classifier()))
        for rank, model in enumerate(models):
            features = [model[0](batch(100 * t + rank)[0]).mean(0) for t in range(STEPS - NUM_FORWARDS, STEPS)]
            torch.testing.assert_close(model[1].running_mean, torch.stack(features).mean(0))


class Odd(nn.Module):
    """Buffers of many kinds around a spectral norm; only some of them change."""

    seen: Tensor
    turn: Tensor
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, CLASSES))
        self.frozen = nn.BatchNorm1d(WIDTH).eval()
        self.register_buffer("constant", torch.tensor([float("nan"), 1.0]))
        self.register_buffer("nothing", None)
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64), persistent=False)
        self.register_buffer("turn", torch.ones(2, dtype=torch.complex64))
        self.register_buffer("last", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("replaced", torch.zeros(2, dtype=torch.bfloat16))
        self.register_buffer("late", None)
        self.also = self.seen

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += x.sum().double()
            self.turn *= torch.polar(torch.ones(2), x[0, :2])
            self.last.copy_((100 * x[0, :3]).long())
            self.replaced = x[0, :2].bfloat16()
            self.late = x[0, :1].detach()
        return self.layer(self.frozen(x))


def test_buffers_of_all_kinds_end_equal_and_constants_as_they_were():
    def program(comm: Comm) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Odd()
        return in_own_loop(comm, DiLoCo(every=7), model)

    models = run_world(3, program)
    for others in zip(*(dict(m.named_buffers()).items() for m in models), strict=True):
        assert all(str(x.tolist()) == str(others[0][1].tolist()) for _, x in others), others[0][0]
    model, fresh = models[2], Odd()
    assert model.constant.isnan()[0] and model.constant[1] == 1 and model.nothing is None
    assert torch.equal(model.frozen.running_mean, fresh.frozen.running_mean) and model.frozen.num_batches_tracked == 0
    assert model.also is model.seen and model.replaced.dtype == torch.bfloat16 and model.turn.dtype == torch.complex64
    largest = torch.linalg.matrix_norm(model.eval().layer.weight, 2)
    torch.testing.assert_close(largest, torch.tensor(1.0), rtol=2e-2, atol=0)
    assert model.training is False


def test_an_average_is_of_floats_and_the_first_of_whole_numbers():
    def program(comm: Comm) -> list[Tensor]:
        rank = comm.rank
        table = torch.full((2, 3), 2.0**rank)
        tensors = [table[0], table[:, 1], torch.tensor(rank), torch.tensor(rank * 1j), torch.tensor(rank == 0)]
        tensors.append(torch.tensor([1 / 3], dtype=torch.float64))
        average(tensors, comm)
        return tensors

    for got in run_world(2, program):
        assert got[0].tolist() == [1.5] * 3 and got[1].tolist() == [1.5] * 2
        assert [got[2].item(), got[3].item(), got[4].item(), got[5].item()] == [0, 0.5j, True, 1 / 3]


@pytest.mark.parametrize("algorithm", [*MOVES, DataParallel()], ids=repr)
def test_constant_buffers_send_nothing_and_hold_no_inputs(algorithm):
    def sent(comm: Comm, has_buffer: bool) -> tuple[int, int]:
        metered = MeteredComm(comm, Meter())
        model = nn.Sequential(nn.Linear(WIDTH, CLASSES))
        if has_buffer:
            model.register_buffer("table", torch.randn(5))
        in_own_loop(metered, algorithm, model, steps=9)
        return metered.meter.bytes_sent, len(model._forward_hooks)

    plain, buffered = (run_world(2, lambda comm, has=has: sent(comm, has)) for has in (False, True))
    start = 5 * 4  # which the first member sends to the others
    assert [b[0] - p[0] for b, p in zip(buffered, plain, strict=True)] == [start, 0]
    assert {hooks for _, hooks in [*plain, *buffered]} == {0}


def test_no_random_number_is_drawn_and_autocast_is_repeated():
    dtypes: list[torch.dtype] = []

    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = classifier()

        def forward(self, x: Tensor) -> Tensor:
            out = self.layers(F.dropout(x))
            dtypes.append(out.dtype)
            return out

    model = Drawing()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sync = lowcomm.attach(model, optimizer, DiLoCo(every=2), lowcomm.SoloComm())
    for t in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            F.cross_entropy(model(batch(t)[0]), batch(t)[1]).backward()
        optimizer.step()
        sync.step()
    before = torch.get_rng_state()
    model.eval()
    sync.finish()
    assert torch.equal(torch.get_rng_state(), before) and not model.training
    assert len(dtypes) == 6 and set(dtypes) == {torch.bfloat16}


def test_what_cannot_be_recalculated_is_told():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = classifier()

    def finished(model: nn.Module, call: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sync = lowcomm.attach(model, optimizer, DiLoCo(every=2), lowcomm.SoloComm())
        F.cross_entropy(call(batch(0)[0]), batch(0)[1]).backward()
        optimizer.step()
        sync.step()
        sync.finish()

    outer = Outer()
    with pytest.warns(UserWarning, match=r"could not be recalculated for .*: check an evaluation, or .*update_bn"):
        finished(outer, outer.inner)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        finished(outer.inner, outer.inner)


def test_a_model_can_be_copied_and_pickled_while_it_is_attached():
    model = classifier()
    sync = lowcomm.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), DiLoCo(every=2), lowcomm.SoloComm())
    model(batch(0)[0])
    size = len(pickle.dumps(classifier()))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(torch.full((4, WIDTH), 9.0))
    assert len(pickle.dumps(model)) < 3 * size
    F.cross_entropy(model(batch(1)[0]), batch(1)[1]).backward()
    sync.step()
    sync.finish()
    expected = torch.stack([model[0](batch(t)[0]).mean(0) for t in range(2)]).mean(0)
    torch.testing.assert_close(model[1].running_mean, expected)


def test_a_compiled_model_is_watched_too():
    model = classifier()
    called = torch.compile(model, backend="eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sync = lowcomm.attach(model, optimizer, DiLoCo(every=2), lowcomm.SoloComm())
    for t in range(3):
        F.cross_entropy(called(batch(t)[0]), batch(t)[1]).backward()
        optimizer.step()
        sync.step()
    sync.finish()
    expected = torch.stack([model[0](batch(t)[0]).mean(0) for t in range(3)]).mean(0)
    torch.testing.assert_close(model[1].running_mean, expected)


def test_a_resumed_engine_recalculates_from_what_it_saw_before(tmp_path):
    def engine() -> TorchEngine:
        model = classifier()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return TorchEngine(model, optimizer, loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]), num_micro_batches=2)

    def stepped(engine: TorchEngine, steps: range) -> TorchEngine:
        for t in steps:
            engine.backward(batch(t))
            engine.update()
        return engine

    whole, again = stepped(engine(), range(10)), engine()
    checkpoints = Checkpoints(tmp_path, place_of(lowcomm.SoloComm(), 1), "run")
    state = stepped(engine(), range(7)).state_dict()
    assert len(state["batches"]) == 7
    checkpoints.save(7, state)
    again.load_state_dict(checkpoints.load(7))
    stepped(again, range(7, 10))
    for one in (whole, again):
        one.recalculate()
    for x, y in zip(whole.model.buffers(), again.model.buffers(), strict=True):
        assert torch.equal(x, y)
    assert len(again.buffers()) == 9
