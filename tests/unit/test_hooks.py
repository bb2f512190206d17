"""The hooks of torch's own wrappers, given gradients without them or in a world of one."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lowcomm
from lowcomm import Reducer, SoloComm
from lowcomm.tensors import rng
from tests.compressors import EF14, Quantized
from tests.world import run_world


@pytest.fixture
def world_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def piece(of, at, last):
    """One of DDP's buckets, with gradients that equal the parameters."""
    flat = torch.cat([p.detach().reshape(-1) for p in of])
    gradients = [x.view(p.shape) for x, p in zip(flat.split([p.numel() for p in of]), of, strict=True)]
    calls = {"buffer": flat, "gradients": gradients, "parameters": of, "index": at, "is_last": last}
    return SimpleNamespace(**{name: partial(lambda x: x, answer) for name, answer in calls.items()})


def registered(model, reducer):
    hook = lowcomm.ddp_hook(reducer)
    hook.register(DistributedDataParallel(model))
    return hook


@pytest.mark.usefixtures("world_of_one")
def test_a_hook_serves_one_model():
    hook = registered(nn.Linear(2, 1), Reducer())
    with pytest.raises(ValueError, match="serves a model already"):
        hook.register(DistributedDataParallel(nn.Linear(2, 1)))


@pytest.mark.usefixtures("world_of_one")
def test_gradients_that_cannot_be_averaged_are_refused_before_training():
    tables = nn.Sequential(nn.EmbeddingBag(9, 4, sparse=True), nn.Linear(4, 1))
    turning = nn.Linear(2, 1)
    turning.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    for model, why in ((tables, "'0.weight' will have sparse"), (turning, "'phase' is of torch.complex64")):
        with pytest.raises(ValueError, match=why):
            registered(model, Reducer())


@pytest.mark.usefixtures("world_of_one")
def test_frozen_parameters_have_no_gradients_to_average():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    model[0].weight.requires_grad_(False)
    wrapped = DistributedDataParallel(model)
    lowcomm.ddp_hook(Reducer()).register(wrapped)
    wrapped(torch.ones(2, 3)).sum().backward()
    assert model[0].weight.grad is None and model[1].bias.grad.tolist() == [2.0]


@pytest.mark.usefixtures("world_of_one")
def test_what_a_backward_left_that_broke_off_is_forgotten():
    model = nn.Linear(3, 2)
    hook = registered(model, Reducer())
    hook.average(piece([model.bias], 0, last=False))
    futures = [hook.average(piece([model.bias], 0, last=False)), hook.average(piece([model.weight], 1, last=True))]
    assert torch.equal(futures[0].value(), model.bias) and torch.equal(futures[1].value(), model.weight.reshape(-1))


@pytest.mark.usefixtures("world_of_one")
def test_gradients_in_bfloat16_are_averaged_in_the_buckets_of_the_state():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1)).bfloat16()
    hook = registered(model, Reducer(Quantized(), EF14(), bucket_bytes=32))
    averaged = hook.average(piece(list(model.parameters()), 0, last=True)).value()
    assert averaged.dtype == torch.bfloat16
    assert all(b["feedback"]["error"].dtype == torch.float32 for b in hook.state_dict()["reducer"]["buckets"])


def test_shards_in_bfloat16_are_averaged_in_float32():
    gradients = [torch.randn(64, generator=rng(0, "gradient", rank)).bfloat16() for rank in range(3)]

    def program(comm):
        mine = gradients[comm.rank].clone()
        lowcomm.fsdp_hook(Reducer(), comm).average("", mine)
        return mine

    total = torch.stack(gradients).float().sum(0)
    expected = (total / 3).bfloat16()
    assert not torch.equal(total.bfloat16() / 3, expected), "which is not to round the sum"
    assert all(torch.equal(x, expected) for x in run_world(3, program))


class Sharded(nn.Linear):
    """As `fully_shard` leaves a module, as far as the hook asks."""

    def set_all_reduce_hook(self, hook):
        self.hook = hook


@pytest.mark.parametrize(
    ("odd", "what"),
    [
        ((Sharded(3, 2), Reducer(Quantized())), ("reducer", "Quantized")),
        ((Sharded(3, 3), Reducer()), ("gradient list", r"float32\[3, 3\] on rank 1")),
        ((nn.Sequential(Sharded(3, 2)), Reducer()), ("sharded modules", "0 on rank 1")),
    ],
)
def test_ranks_whose_shards_or_reducers_differ_refuse_on_each_of_them(odd, what):
    def program(comm):
        model, reducer = odd if comm.rank == 1 else (Sharded(3, 2), Reducer())
        with pytest.raises(ValueError, match=r"the {} of ranks \[1\] differs .*{}".format(*what)):
            lowcomm.fsdp_hook(reducer, comm).register(model)

    run_world(2, program)


def test_shards_that_are_not_finite_on_one_rank_become_nan_on_all():
    def program(comm):
        hook, seen = lowcomm.fsdp_hook(Reducer(Quantized(), EF14()), comm), []
        for spoilt in (False, True, False):
            gradient = torch.full((4,), float("inf") if spoilt and comm.rank == 1 else 1.0)
            hook.average("", gradient)
            seen.append(gradient.isnan().all().item() if spoilt else gradient.isfinite().all().item())
        return seen

    assert run_world(2, program) == [[True] * 3] * 2


def test_the_state_of_shards_has_what_was_loaded_until_each_goes_on():
    def states(hook):
        return {name: state["buckets"][0]["feedback"]["num_rounds"] for name, state in hook.state_dict().items()}

    make = partial(lowcomm.fsdp_hook, Reducer(Quantized(), EF14()), SoloComm())
    hook = make()
    for name in ("a", "a", "b"):
        hook.average(name, torch.ones(4))
    assert states(hook) == {"a": 2, "b": 1}
    resumed = make()
    resumed.average("a", torch.ones(4))
    resumed.load_state_dict(hook.state_dict())
    assert states(resumed) == {"a": 2, "b": 1}, "also before the first backward"
    resumed.average("a", torch.ones(4))
    assert states(resumed) == {"a": 3, "b": 1}
