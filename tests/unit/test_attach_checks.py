"""What `attach` refuses: changes behind its back, replicas that differ, and tensors that cannot be averaged."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import lowcomm
from lowcomm.algorithms.data_parallel import DataParallel
from lowcomm.algorithms.demo import DeMo
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.algorithms.local_sgd import LocalSGD
from lowcomm.algorithms.savic import SAVIC
from lowcomm.comm.solo import SoloComm
from lowcomm.outer.nesterov import Nesterov
from lowcomm.reduce import Reducer
from tests.compressors import Quantized
from tests.replicas import adamw, make_batch, make_model, mse, scaled_sgd, sgd
from tests.world import run_world


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        return x / 2


class Passing(torch.optim.Optimizer):
    """Passes steps on without torch's hooks, as accelerate's wrapper does."""

    def __init__(self, inner):
        self.optimizer = inner

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        return self.optimizer.step(closure)


def frozen_first():
    model = make_model()
    model[0].weight.requires_grad_(False)
    return model, adamw(list(model.parameters()))


def loop(model, optimizer, algorithm=None, comm=None):
    """Attached, and a function that takes a step."""
    sync = lowcomm.attach(model, optimizer, algorithm or DiLoCo(every=2), comm or SoloComm())

    def step(by=optimizer):
        mse(model, make_batch(0, 1, next(model.parameters()).dtype)).backward()
        by.step()
        by.zero_grad()
        sync.step()

    return sync, step


def regroup(model, optimizer, params):
    del model
    optimizer.param_groups[0]["params"] = params


CHANGES = {
    "double": (lambda m, o: m.float(), "memory of parameter '0.bias' .*float64.*now torch.float32.*and 2 more"),
    "bf16": (lambda m, o: m.to(torch.bfloat16), "memory of parameter '0.bias'"),
    "data": (lambda m, o: setattr(m[2].bias, "data", m[2].bias.data.clone()), "memory of parameter '2.bias'"),
    "part": (lambda m, o: setattr(m[0].bias, "data", m[0].bias.data[:3]), "memory of parameter '0.bias'"),
    "assigned": (
        lambda m, o: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
        "'0.bias' was replaced by another, .* and 2 more",
    ),
    "replaced": (lambda m, o: setattr(m, "2", nn.Linear(5, 1)), "'2.weight' was replaced"),
    "removed": (lambda m, o: m.__delitem__(2), "'2.weight' is no longer in the model"),
    "added": (lambda m, o: m[1].register_parameter("gain", nn.Parameter(torch.ones(1))), "'1.gain' became trainable"),
    "frozen": (lambda m, o: m[2].requires_grad_(False), "'2.weight' was frozen"),
    "thawed": (lambda m, o: m[0].weight.requires_grad_(True), "'0.weight' became trainable"),
    "parametrized": (lambda m, o: nn.utils.parametrizations.weight_norm(m[2]), "'2.weight' is no longer"),
    "emptied": (lambda m, o: regroup(m, o, []), "'0.bias' left the optimizer's groups"),
    "foreign": (lambda m, o: o.add_param_group({"params": nn.Linear(1, 1).weight}), "not the model's"),
}
HARMLESS = {
    "added": lambda m, o: m.append(nn.Dropout(0.0)),
    "loaded": lambda m, o: m.load_state_dict(copy.deepcopy(m.state_dict())),
    "optimizer loaded": lambda m, o: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "another name": lambda m, o: m.insert(0, nn.Identity()),
    "scheduled": lambda m, o: torch.optim.lr_scheduler.StepLR(o, 1),
    "compiled": lambda m, o: m.compile(backend="eager"),
    "regrouped": lambda m, o: regroup(m, o, list(m.parameters())[::-1]),
    "frozen meanwhile": lambda m, o: [
        m.requires_grad_(False),
        m.requires_grad_(True),
        m[0].weight.requires_grad_(False),
    ],
    "parametrized, frozen": lambda m, o: parametrize.register_parametrization(m[0], "weight", Doubled()),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_of_what_is_trained_is_refused_at_the_next_call(what):
    change, message = CHANGES[what]
    for call in ("step", "finish"):
        model, optimizer = frozen_first()
        sync, step = loop(model, optimizer)
        step()
        change(model, optimizer)
        with pytest.raises(ValueError, match=f"since attach, .*{message}.*attach\\(\\) again"):
            getattr(sync, call)()


@pytest.mark.parametrize("what", HARMLESS)
def test_other_changes_are_fine(what):
    model, optimizer = frozen_first()
    sync, step = loop(model, optimizer)
    step()
    HARMLESS[what](model, optimizer)
    step()
    step()
    sync.finish()


@pytest.mark.parametrize("algorithm", [DiLoCo(every=2), DataParallel()], ids=str)
def test_another_optimizer_is_noticed_but_a_skipped_step_is_none(algorithm):
    model = make_model()
    optimizer = adamw(list(model.parameters()))
    sync, step = loop(model, optimizer, algorithm)
    step()
    sync.step()  # as after a step that a gradient scaler skipped
    sgd(list(make_model().parameters())).step()
    sync.step()
    with pytest.raises(ValueError, match=r"another optimizer \(SGD\)"):
        step(sgd(list(model.parameters())))


def test_an_optimizer_is_attached_once_at_a_time():
    model = make_model()
    optimizer = sgd(list(model.parameters()))
    first, step = loop(model, optimizer)
    with pytest.raises(ValueError, match="attached already"):
        loop(model, Passing(optimizer))
    step()
    first.finish()
    first.finish()
    with pytest.raises(ValueError, match="finish"):
        first.step()
    second = loop(model, optimizer)[0]
    model.float()
    with pytest.raises(ValueError, match="since attach"):
        second.finish()
    loop(model, optimizer)[1]()


def test_a_wrapper_without_hooks_is_looked_through_or_refused():
    def program(comm):
        model = make_model()
        wrapper = Passing(sgd(list(model.parameters())))
        lowcomm.attach(model, wrapper, DataParallel(), comm)
        mse(model, make_batch(comm.rank, 1)).backward()
        wrapper.step()
        return model[0].weight.detach()

    first, second = run_world(2, program)
    assert torch.equal(first, second)
    with pytest.raises(ValueError, match="calls no step hooks"):
        lowcomm.attach(make_model(), Passing(None), DiLoCo(), SoloComm())


def test_what_is_dropped_is_freed():
    model = make_model()
    kept = weakref.ref(loop(model, sgd(list(model.parameters())))[0])
    del model
    gc.collect()
    assert kept() is None


def linear(rank, **how):
    return nn.Linear(4, 2, **how)


DIFFERENT = {
    "algorithm": (linear, sgd, [DiLoCo(every=2), LocalSGD(every=2)]),
    "algorithm of another period": (linear, sgd, [DiLoCo(every=2), DiLoCo(every=3)]),
    "algorithm of another reducer": (linear, sgd, [DataParallel(), DataParallel(Reducer(Quantized()))]),
    "algorithm of another outer step": (linear, sgd, [DiLoCo(), DiLoCo(outer=Nesterov(lr=0.6))]),
    "parameter list": (lambda rank: nn.Linear(4, 2 + rank), sgd, [DiLoCo()] * 2),
    "parameter list of another dtype": (
        lambda rank: linear(rank).to([torch.float32, torch.half][rank]),
        sgd,
        [DiLoCo()] * 2,
    ),
    "parameter list of another name": (
        lambda rank: linear(rank) if rank else nn.Sequential(linear(rank)),
        sgd,
        [DiLoCo()] * 2,
    ),
    "parameter list of fewer": (lambda rank: linear(rank, bias=bool(rank)), sgd, [DiLoCo()] * 2),
    "buffer list": (
        lambda rank: nn.Sequential(linear(rank), nn.BatchNorm1d(2 + rank, affine=False)),
        sgd,
        [DiLoCo()] * 2,
    ),
    "optimizer": (linear, [sgd, adamw], [DiLoCo()] * 2),
    "optimizer of another rate": (linear, [sgd, lambda p: torch.optim.SGD(p, lr=0.2)], [DataParallel()] * 2),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_replicas_that_differ_are_refused_on_each_of_them(what):
    def program(comm):
        make, optimizers, algorithms = DIFFERENT[what]
        model = make(comm.rank)
        optimizer = (optimizers[comm.rank] if isinstance(optimizers, list) else optimizers)(list(model.parameters()))
        with pytest.raises(ValueError, match=rf"the {what.split(' of ')[0]} of ranks \[1\] differs from rank 0's"):
            lowcomm.attach(model, optimizer, algorithms[comm.rank], comm)

    run_world(2, program)


def test_replicas_may_differ_in_what_is_their_own():
    def program(comm):
        model = linear(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * (1 + comm.rank), momentum=0.9)
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        attached = torch.compile(model, backend="eager") if comm.rank else model
        lowcomm.attach(attached, optimizer, DiLoCo(), comm).finish()
        if comm.rank:
            optimizer.state.clear()
        optimizer.param_groups[0]["lr"] = 0.1
        with pytest.raises(ValueError, match="optimizer state of ranks"):
            lowcomm.attach(model, optimizer, DataParallel(), comm)

    run_world(2, program)


def test_states_of_different_steps_are_refused_on_each_rank():
    def program(comm):
        model = make_model()
        sync, step = loop(model, sgd(list(model.parameters())), DiLoCo(every=9), comm)
        states = []
        for _ in range(2):
            step()
            states.append(copy.deepcopy(sync.state_dict()))
        with pytest.raises(
            ValueError, match=r"the step of ranks \[1\] differs from rank 0's: 2 on rank 1, 1 on rank 0"
        ):
            sync.load_state_dict(states[comm.rank])

    run_world(2, program)


def with_parameter(p):
    model = nn.Linear(2, 1)
    model.odd = nn.Parameter(p)
    return model


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: with_parameter(torch.ones(3, dtype=torch.complex64)), "'odd' is of torch.complex64"),
        (lambda: with_parameter(torch.ones(3).to_sparse()), "'odd' is a tensor of layout torch.sparse_coo"),
        (lambda: with_parameter(torch.ones(3).as_subclass(type("Odd", (torch.Tensor,), {}))), "'odd' is a Odd"),
        (lambda: nn.Sequential(nn.LazyLinear(2)), "'0.weight' has no shape yet"),
    ],
)
def test_parameters_that_cannot_be_averaged_are_refused_at_once(make, why):
    model = make()
    with pytest.raises(ValueError, match=why):
        lowcomm.attach(model, sgd(list(model.parameters())), DiLoCo(), SoloComm())


def test_sparse_gradients_are_refused_where_they_would_be_averaged():
    def program(comm):
        for algorithm in (DiLoCo(every=2), DataParallel()):
            model = nn.Embedding(9, 4, sparse=True)
            optimizer = torch.optim.SparseAdam(list(model.parameters()))
            sync = lowcomm.attach(model, optimizer, algorithm, comm)
            model(torch.tensor([1, 2 + comm.rank])).sum().backward()
            if isinstance(algorithm, DataParallel):
                with pytest.raises(ValueError, match="gradient of 'weight' is sparse"):
                    optimizer.step()
                return model.weight.detach()
            optimizer.step()
            sync.step()
            sync.finish()

    run_world(2, program)


@pytest.mark.parametrize(
    ("algorithm", "inner"),
    [(DataParallel(), sgd), (DeMo(), sgd), (SAVIC(every=1), scaled_sgd)],
    ids=lambda x: str(x)[:12],
)
def test_a_replica_without_a_backward_brings_gradients_of_zero(algorithm, inner):
    def program(comm, zeros):
        model = make_model()
        optimizer = inner(list(model.parameters()))
        sync = lowcomm.attach(model, optimizer, algorithm, comm)
        for t in range(2):
            optimizer.zero_grad()
            if not (t and comm.rank):
                mse(model, make_batch(comm.rank, t)).backward()
            elif zeros:
                for p in model.parameters():
                    p.grad = torch.zeros_like(p)
            optimizer.step()
            sync.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    missing, explicit = (run_world(2, lambda comm, z=zeros: program(comm, z)) for zeros in (False, True))
    assert all(torch.equal(x, explicit[0]) for x in [*missing, *explicit])
