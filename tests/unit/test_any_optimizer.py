"""Optimizers of others: what they keep is resumed and foreseen, modes are heeded, and what cannot work says so."""

from __future__ import annotations

import copy
import re
from functools import partial
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from pytorch_optimizer import ScheduleFreeAdamW
from torch import Tensor, nn

import lowcomm
from lowcomm.algorithms.base import standing, step
from lowcomm.algorithms.des_loc import DESLOC
from lowcomm.algorithms.local_sgd import LocalSGD
from lowcomm.comm.base import Comm
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.config import Optimizer
from lowcomm.engine.torch_engine import TorchEngine
from lowcomm.membership import Members
from lowcomm.models.llama import Llama
from lowcomm.optim.groups import parameter_groups
from lowcomm.optim.schedule import Cosine
from lowcomm.replica import Replica
from lowcomm.tensors import rng
from lowcomm.train import evaluate
from tests.replicas import flat, make_batch, make_engine, make_model, mse
from tests.world import run_world

VOCAB = 17


class KeepsNests(torch.optim.Optimizer):
    """Momentum in a list within a dict, in float32 whatever the parameter is in, beside its name."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                wide = p.grad.float()
                kept = state.setdefault("kept", {"momenta": [torch.zeros_like(wide)], "name": "momentum"})
                assert kept["name"] == "momentum"
                p.sub_(group["lr"] * kept["momenta"][0].mul_(0.9).add_(wide))


THEIRS = "SPAM AggMo SOAP Adan Prodigy SPlus ScheduleFreeAdamW Lion Lamb Shampoo StableSPAM AdamP"
TRIED: list[tuple[str, dict[str, Any]]] = [
    ("torch.optim.AdamW", {"amsgrad": True}),
    ("torch.optim.Adafactor", {}),
    ("torch.optim.SGD", {"momentum": 0.9}),
    ("torch.optim.NAdam", {}),
    ("tests.unit.test_any_optimizer.KeepsNests", {}),
    ("lowcomm.optim.muon_adamw.MuonAdamW", {}),
    ("lowcomm.optim.qhadopt.QHADOPT", {}),
    *((f"pytorch_optimizer.{name}", {}) for name in THEIRS.split()),
]
REFUSED = [
    ("torch.optim.SparseAdam", {}, "does not support dense gradients"),
    ("torch.optim.AdamW", {"capturable": True}, "capturable"),
    ("torch.optim.Muon", {}, "only supports 2D"),
    ("pytorch_optimizer.SophiaH", {}, "does not require grad"),
    ("pytorch_optimizer.AdaHessian", {}, "does not require grad"),
    ("pytorch_optimizer.Muon", {}, "use_muon"),
    ("pytorch_optimizer.Ranger21", {}, "num_iterations"),
]


def engine_of(path: str, args: dict[str, Any], dtype: torch.dtype = torch.float32, device: str = "cpu") -> TorchEngine:
    model = (
        Llama(size="500k", num_layers=1, dim=16, num_heads=2, num_kv_heads=2, ffn_dim=24)
        .build(VOCAB, 0)
        .to(device, dtype)
    )
    optimizer = Optimizer(path, {"lr": 1e-2, **args}).build(parameter_groups(model))
    return TorchEngine(model, optimizer, schedule=Cosine().build(optimizer, 20))


def trained(engine: TorchEngine, first: int, last: int) -> list[Tensor]:
    for t in range(first, last):
        engine.backward(torch.randint(VOCAB, (2, 9), generator=rng(0, "batch", t)))
        engine.update()
    return [x.clone() for x in engine.model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("path", "args"), TRIED)
def test_a_resumed_optimizer_goes_on_bitwise(path: str, args: dict[str, Any], dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and path.endswith(("SOAP", "Shampoo")):
        pytest.skip("torch has no QR and no singular values in bfloat16")
    engine, other = engine_of(path, args, dtype), engine_of(path, args, dtype)
    trained(engine, 0, 3)
    saved = copy.deepcopy(engine.state_dict())
    expected = trained(engine, 3, 6)
    trained(other, 7, 9)  # what it has of its own is replaced
    other.load_state_dict(saved)
    assert all(map(torch.equal, trained(other, 3, 6), expected))
    other.load_state_dict(saved)  # which the steps between have not changed
    assert all(map(torch.equal, trained(other, 3, 6), expected))


@pytest.mark.parametrize(("path", "args"), TRIED)
def test_a_dry_step_finds_the_states_of_a_real_one(path: str, args: dict[str, Any]) -> None:
    real, dry = engine_of(path, args), engine_of(path, args, device="meta")
    trained(real, 0, 1)
    for p in dry.model.parameters():
        p.grad = torch.empty_like(p)
    dry.update()
    found = {name: [(x.shape, x.dtype) for x in xs] for name, xs in dry.slots().items()}
    assert found == {name: [(x.shape, x.dtype) for x in xs] for name, xs in real.slots().items()}
    assert all(x.is_meta for xs in dry.slots().values() for x in xs)


@pytest.mark.parametrize(("path", "args", "why"), REFUSED)
def test_what_cannot_be_trained_with_is_refused_in_a_paragraph(path: str, args: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)) as refused:
        trained(engine_of(path, args), 0, 1)
    text = str(refused.value)
    assert "\n" not in text and path.rpartition(".")[2] in text and "choose" in text


def test_an_optimizer_that_needs_a_closure_is_refused_by_its_config() -> None:
    with pytest.raises(ValueError, match="takes no closure"):
        Optimizer("torch.optim.LBFGS", {"lr": 1.0})


def test_running_out_of_memory_is_not_the_optimizers_fault() -> None:
    engine = engine_of("torch.optim.SGD", {})
    engine.optimizer.step = MagicMock(side_effect=torch.OutOfMemoryError("out of memory"))  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError):
        trained(engine, 0, 1)


class Extrapolates(torch.optim.SGD):
    """In evaluation its parameters are twice those of training; it starts there, and takes no step there."""

    is_training = False

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert self.is_training
        super().step(closure)

    def _times(self, factor: float) -> None:
        for p in self.param_groups[0]["params"]:
            p.data.mul_(factor)

    def train(self) -> None:
        self._times(0.5 if not self.is_training else 1.0)
        self.is_training = True

    def eval(self) -> None:
        self._times(2.0 if self.is_training else 1.0)
        self.is_training = False


def schedule_free(params: list[nn.Parameter]) -> ScheduleFreeAdamW:
    return ScheduleFreeAdamW(params, lr=0.05)


@pytest.mark.parametrize("inner", [schedule_free, partial(Extrapolates, lr=0.1)])
def test_an_evaluation_is_where_the_optimizer_wants_it_and_leaves_training_as_it_was(inner: Any) -> None:
    engine, undisturbed, bare = (make_engine(inner) for _ in range(3))
    engine.evaluate(make_batch(0, 9))
    for t in range(1, 6):
        for each in (engine, undisturbed, bare):
            each.backward(make_batch(0, t))
            each.update()
        said = engine.evaluate(make_batch(0, 9))
    assert torch.equal(flat(engine.slots()["param"]), flat(undisturbed.slots()["param"]))
    at_y = flat(bare.slots()["param"])
    bare.optimizer.eval()  # type: ignore[attr-defined]
    assert not torch.allclose(at_y, flat(bare.slots()["param"]))
    bare.optimizer.train = bare.optimizer.eval = lambda: None  # type: ignore[attr-defined]
    assert said == bare.evaluate(make_batch(0, 9))


def x_of(engine: TorchEngine) -> Tensor:
    """(y - (1 - beta) z) / beta, the point of schedule-free averages."""
    return (flat(engine.slots()["param"]) - 0.1 * flat(engine.slots()["z"])) / 0.9


PARAMS_ALONE = LocalSGD(every=4)
WITH_Z = DESLOC({"param": 4, "z": 4})


@pytest.mark.parametrize("algorithm", [PARAMS_ALONE, WITH_Z], ids=["params alone", "with z"])
def test_rounds_of_a_schedule_free_optimizer_stand_for_the_mean_of_its_averages(algorithm: Any) -> None:
    """Evaluated and saved is the mean x, as it is linear in y and z; each replica has it if z is averaged with y."""

    def program(comm: Comm) -> tuple[Tensor, Tensor, Tensor, float, float]:
        engine, metered = make_engine(schedule_free), MeteredComm(comm, Meter())
        state = algorithm.init(engine, metered)
        for t in range(1, 9):
            step(algorithm, t, engine, state, metered, make_batch(comm.rank, t))
        own, live = x_of(engine), flat(engine.slots()["param"])
        with standing(algorithm, engine, state, metered):
            stands, loss = flat(engine.slots()["param"]), engine.evaluate(make_batch(0, 99)).item()
        assert torch.equal(flat(engine.slots()["param"]), live)
        replica = Replica(algorithm, engine, state, MagicMock(), MagicMock(), Members(metered), torch.device("cpu"))
        return own, live, stands, loss, evaluate_on(replica, metered)

    found = run_world(3, program)
    mean = torch.stack([own for own, *_ in found]).mean(0)
    for own, live, stands, loss, evaluated in found:
        assert torch.allclose(stands, mean, rtol=0, atol=1e-6) and evaluated == pytest.approx(loss, rel=1e-5)
        assert torch.equal(live, found[0][1]) and not torch.allclose(live, mean, rtol=0, atol=1e-3)
        assert torch.allclose(own, mean, rtol=0, atol=1e-12) == (algorithm is WITH_Z)


def evaluate_on(replica: Replica, comm: MeteredComm) -> float:
    """The loop's own evaluation, of one batch that behaves as if it were text."""
    batch = MagicMock()
    batch.to.return_value = make_batch(0, 99)
    batch.__getitem__.return_value.numel.return_value = 1
    return evaluate(replica, [batch] * 3, comm)


def test_in_a_loop_of_ones_own_all_end_at_the_mean_average_and_never_average_it_as_if_it_were_y() -> None:
    def program(comm: Comm) -> tuple[Tensor, Tensor]:
        model = make_model(seed=comm.rank)
        optimizer = schedule_free(list(model.parameters()))
        sync = lowcomm.attach(model, optimizer, LocalSGD(every=4), comm)
        for t in range(1, 9):
            optimizer.zero_grad()
            mse(model, make_batch(comm.rank, t)).backward()
            optimizer.step()
            sync.step()
        own = x_of(sync._engine)
        optimizer.eval()
        with pytest.raises(ValueError, match="call optimizer.train"):
            sync.finish()
        optimizer.train()
        sync.finish()
        optimizer.eval()
        return own, flat(list(model.parameters()))

    found = run_world(3, program)
    mean = torch.stack([own for own, _ in found]).mean(0)
    assert all(torch.allclose(x, mean, rtol=0, atol=1e-9) and torch.equal(x, found[0][1]) for _, x in found)
