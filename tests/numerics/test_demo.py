"""DeMo against explicit replicas that transform by matrices, and its limits: signSGD, exact residuals, few bytes."""

import math
from dataclasses import replace

import pytest
import torch

from lowcomm.algorithms.base import step
from lowcomm.algorithms.demo import DeMo
from lowcomm.codecs.float32 import Float32
from lowcomm.comm.echo import EchoComm
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.comm.solo import SoloComm
from lowcomm.compress.dct import DCT
from lowcomm.compress.top_k import TopK
from lowcomm.engine.around import Around
from lowcomm.engine.torch_engine import TorchEngine
from lowcomm.feedback.ef14 import EF14
from lowcomm.optim.muon_adamw import MuonAdamW
from lowcomm.reduce import Reducer
from tests.replicas import adamw, flat, make_batch, make_engine, make_model, mse, scaled_sgd
from tests.world import run_world

N, STEPS = 3, 12
LR, WEIGHT_DECAY, DECAY = 0.02, 0.1, 0.4


def plain(params):
    return torch.optim.SGD(params, lr=LR, weight_decay=WEIGHT_DECAY)


def with_schedule(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 / (1 + t))


def demo(num, tile, decay=DECAY, divide_by="present"):
    """One chunk is one matrix's coefficients here, or more where tiles are several."""
    return DeMo(Reducer(DCT(TopK(num=num, chunk=tile * tile, divide_by=divide_by), tile=tile), EF14(decay)))


def basis(n):
    """The orthonormal DCT-II, entry by entry."""
    return torch.tensor(
        [
            [math.sqrt((1 if j == 0 else 2) / n) * math.cos(math.pi * (i + 0.5) * j / n) for i in range(n)]
            for j in range(n)
        ],
        dtype=torch.float64,
    )


def kept(coefficients, num):
    """The largest ones of a chunk, in float32 as they travel, and which they are."""
    places = sorted(range(len(coefficients)), key=lambda i: -abs(float(coefficients[i])))[:num]
    sent = torch.zeros_like(coefficients)
    for i in places:
        sent[i] = float(coefficients[i].float())
    return sent, places


def reference(num_replicas, num, tile, divide_by, num_steps=STEPS):
    """The published program line by line, on matrices and vectors of one tile: its parameters after each step."""
    models = [make_model() for _ in range(num_replicas)]
    shapes = [p.shape for p in models[0].parameters()]
    residuals = [[torch.zeros(shape, dtype=torch.float64) for shape in shapes] for _ in models]
    trace = []
    for t in range(1, num_steps + 1):
        lr = LR / t
        for rank, model in enumerate(models):
            model.zero_grad()
            mse(model, make_batch(rank, t)).backward()
        for k, shape in enumerate(shapes):
            rows, columns = basis(1 if len(shape) < 2 else shape[0]), basis(shape[-1])
            size = shape.numel()
            limit = -(-num * size // (tile * tile))  # of a chunk that is not full
            total, count = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
            for model, residual in zip(models, residuals, strict=True):
                gradient = list(model.parameters())[k].grad
                momentum = DECAY * residual[k] + lr * gradient
                coefficients = (rows @ momentum.view(len(rows), -1) @ columns.T).reshape(-1)
                sent, places = kept(coefficients, limit)
                residual[k] = momentum - (rows.T @ sent.view(len(rows), -1) @ columns).view(shape)
                total += sent
                for i in places:
                    count[i] += 1
            mean = total / (num_replicas if divide_by == "all" else count.clamp(min=1))
            step = (rows.T @ mean.view(len(rows), -1) @ columns).view(shape).sign()
            for model in models:
                p = list(model.parameters())[k]
                p.data = p.data * (1 - lr * WEIGHT_DECAY) - lr * step  # decoupled
        trace.append([flat(list(model.parameters())) for model in models])
    return trace


def run(algorithm, comm, num_steps=STEPS, dtype=torch.float64):
    """Parameters after each step."""
    model = make_model(dtype)
    optimizer = plain(model.parameters())
    engine = TorchEngine(model, optimizer, loss=mse, clip_norm=None, schedule=with_schedule(optimizer))
    state = algorithm.init(engine, comm)
    trace = []
    for t in range(1, num_steps + 1):
        step(algorithm, t, engine, state, comm, make_batch(comm.rank, t, dtype))
        trace.append(flat(engine.slots()["param"]))
    return trace


@pytest.mark.parametrize("divide_by", ["present", "all"])
@pytest.mark.parametrize("num", [4, 12])
def test_it_is_the_reference(num, divide_by):
    """With a learning rate that changes, and weight decay, coupled here and decoupled there."""
    expected = reference(N, num, 8, divide_by)
    for rank, trace in enumerate(run_world(N, lambda comm: run(demo(num, 8, divide_by=divide_by), comm))):
        for t in range(STEPS):
            assert torch.allclose(trace[t], expected[t][rank], rtol=0, atol=1e-12), f"rank {rank}, step {t + 1}"


def test_who_is_counted_changes_signs():
    """Coefficients of a tile are divided by different counts, so it matters in spite of the sign."""
    one, other = (run_world(N, lambda comm, d=d: run(demo(4, 8, divide_by=d), comm))[0] for d in ("present", "all"))
    assert not torch.equal(one[-1], other[-1])
    assert not DeMo().reducer.compressor.divides_by_all(), "as the authors' program does"


def test_whole_blocks_without_decay_on_one_worker_are_sign_sgd():
    """Spec section 11, test 12."""
    got = run(demo(64, 8, decay=0.0), SoloComm())
    model = make_model()
    for t in range(1, STEPS + 1):
        model.zero_grad()
        mse(model, make_batch(0, t)).backward()
        for p in model.parameters():
            p.data = p.data * (1 - LR / t * WEIGHT_DECAY) - LR / t * p.grad.sign()
        assert torch.allclose(got[t - 1], flat(list(model.parameters())), rtol=0, atol=1e-12)


def test_without_compression_it_is_sign_sgd_on_the_mean_gradient():
    got = run_world(N, lambda comm: run(DeMo(Reducer()), comm))
    model = make_model()
    for t in range(1, STEPS + 1):
        model.zero_grad()
        sum(mse(model, make_batch(rank, t)) for rank in range(N)).backward()
        for p in model.parameters():
            p.data = p.data * (1 - LR / t * WEIGHT_DECAY) - LR / t * p.grad.sign()
        assert all(torch.allclose(trace[t - 1], flat(list(model.parameters())), rtol=0, atol=1e-12) for trace in got)


def test_every_value_moves_by_the_learning_rate():
    before = flat(list(make_model(torch.float64).parameters()))
    for t, after in enumerate(run(demo(8, 8), SoloComm()), start=1):
        moved = (after - before * (1 - LR / t * WEIGHT_DECAY)).abs()
        assert torch.allclose(moved, torch.full_like(moved, LR / t), rtol=0, atol=1e-12)
        before = after


def test_what_nobody_sends_anything_about_stays():
    """sign(0) is 0: a tensor without gradients, such as that of a part that is not used, does not move."""
    model = make_model()
    model.unused = torch.nn.Parameter(torch.ones(70, 70, dtype=torch.float64))
    engine = TorchEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), loss=mse, clip_norm=None)
    algorithm, comm = DeMo(), SoloComm()
    state = algorithm.init(engine, comm)
    for t in range(1, 4):
        step(algorithm, t, engine, state, comm, make_batch(0, t))
    assert torch.equal(model.unused, torch.ones(70, 70, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(64, 64), (61, 67), (131,), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_residual_and_sent_are_the_momentum_exactly(shape, dtype):
    """The residual is momentum less sent in one subtraction of tensors, whatever codes and rounding did to sent."""
    reducer = DeMo().reducer
    generator = torch.Generator().manual_seed(0)
    state, residual = reducer.init([torch.empty(shape, dtype=dtype)]), torch.zeros(shape, dtype=dtype)
    for _ in range(5):
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        momentum = x.add(residual, alpha=0.999)
        (sent,), state = reducer.mean([x], state, SoloComm()).result()  # alone, the mean is what was sent
        residual = state.buckets[0].feedback.error[0]
        assert torch.equal(residual, momentum - sent)
        assert 0 < sent.norm() < momentum.norm()


def test_parameters_in_bfloat16_have_a_finer_residual():
    def program(comm):
        engine = make_engine(plain, torch.bfloat16)
        algorithm = demo(4, 8, decay=1.0)
        state = algorithm.init(engine, comm)
        for t in range(1, 4):
            engine.backward(make_batch(comm.rank, t, torch.bfloat16))
            algorithm.before_update(t, engine, state, comm)
            assert all(
                g.dtype == torch.bfloat16 and set(g.unique().tolist()) <= {-1, 0, 1} for g in engine.slots()["grad"]
            )
            engine.update()
        return [bucket.feedback.error.dtype for bucket in state.kept["momentum"][0].buckets]

    assert all(set(dtypes) == {torch.float32} for dtypes in run_world(2, program))


def test_the_rate_times_a_gradient_in_bfloat16_is_not_rounded():
    engine, comm = make_engine(plain, torch.bfloat16), SoloComm()
    algorithm = DeMo(Reducer(TopK(num=1, chunk=64), EF14()))
    state = algorithm.init(engine, comm)
    engine.backward(make_batch(0, 1, torch.bfloat16))
    scaled = engine.lr() * flat([g.float() for g in engine.slots()["grad"]])
    algorithm.before_update(1, engine, state, comm)
    residual = flat([bucket.feedback.error for bucket in state.kept["momentum"][0].buckets])
    assert (residual != scaled).sum() == 1, "all but the one that was sent"


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize(
    ("options", "tile_bytes"),
    [
        ({}, 32 * 2 + 32 * 9 // 8),  # Elias-Fano: 7 + 1 bits a place, and 32 bits for the chunk
        ({"indices": "packed"}, 32 * 2 + 32 * 12 // 8),
        ({"indices": "packed", "values": Float32()}, 32 * 4 + 32 * 12 // 8),
    ],
    ids=["default", "12-bit places", "12-bit places, float32"],
)
def test_traffic_is_the_closed_form(n, options, tile_bytes):
    inner = DeMo().reducer.compressor.inner
    algorithm = DeMo(replace(DeMo().reducer, compressor=DCT(replace(inner, **options), tile=64)))
    comm = MeteredComm(EchoComm(n), Meter())
    model = torch.nn.Linear(256, 128, bias=False)  # 2 x 4 tiles
    engine = TorchEngine(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loss=lambda m, x: m(x).sum(), clip_norm=None
    )
    state = algorithm.init(engine, comm)
    engine.backward(torch.randn(4, 256, generator=torch.Generator().manual_seed(0)))
    algorithm.before_update(1, engine, state, comm)
    flags = n - 1  # whether all is finite: a byte to each other rank
    assert comm.meter.bytes_sent == (n - 1) * 8 * tile_bytes + flags
    assert tile_bytes / (2 * 4096) == pytest.approx({100: 0.0122, 112: 0.0137, 176: 0.0215}[tile_bytes], rel=0.01)


@pytest.mark.parametrize("shape", [(61, 67), (127, 1), (29, 1733), (8191,), (3, 5, 7, 11), (1,)], ids=str)
def test_primes_are_not_expanded(shape):
    """By the divisor rule, 29 x 1733 would be tiles of 29 x 1, of which 29 coefficients are kept: all."""
    compressor, num = DeMo().reducer.compressor, math.prod(shape)
    assert compressor.transform(torch.ones(1, *shape)).shape == (num,)
    size = compressor.sent_bytes([1, *shape], 4, 2)
    chunks, rest = divmod(num, 4096)
    assert size <= min(4 * num, 100 * chunks + 2 * 32 * rest / 4096 + 36 * rest / 4096 + 4)


def test_clipping_is_refused():
    model = make_model()
    engine = TorchEngine(model, plain(model.parameters()), loss=mse, clip_norm=1.0)
    with pytest.raises(ValueError, match=r"step of size lr.*clip_norm is 1.0.*set it to None"):
        DeMo().init(engine, SoloComm())


@pytest.mark.parametrize(
    "inner", [adamw, lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)], ids=["adamw", "momentum"]
)
def test_an_inner_optimizer_with_a_state_is_refused_after_its_first_step(inner):
    engine, algorithm, comm = make_engine(inner), DeMo(), SoloComm()
    state = algorithm.init(engine, comm)
    engine.backward(make_batch(0, 1))
    algorithm.before_update(1, engine, state, comm)
    engine.update()
    with pytest.raises(ValueError, match=r"inner optimizer keeps \['.*torch.optim.SGD with lr and weight_decay alone"):
        algorithm.after_update(1, engine, state, comm)


def test_it_is_refused_after_the_first_step_that_is_taken_even_if_one_was_skipped():
    """As a gradient scaler does."""
    engine, algorithm, comm = make_engine(adamw), DeMo(), SoloComm()
    state = algorithm.init(engine, comm)
    for t in (1, 2):
        engine.backward(make_batch(0, t))
        algorithm.before_update(t, engine, state, comm)
        if t == 1:
            algorithm.after_update(t, engine, state, comm)
    engine.update()
    with pytest.raises(ValueError, match="inner optimizer keeps"):
        algorithm.after_update(2, engine, state, comm)


class Nested(Around):
    """As the simulator's engine, it saves more than the engine within."""

    def backward(self, batch, ready=None):
        return self._inner.backward(batch, ready)

    def state_dict(self):
        return {"inner": super().state_dict(), "t": 0}


def with_hidden(params):
    """Muon for the first matrix, AdamW for the rest."""
    return MuonAdamW([(f"layers.{i}" if i == 0 else f"out{i}", p) for i, p in enumerate(params)])


@pytest.mark.parametrize(
    "inner",
    [
        with_hidden,
        lambda params: torch.optim.Adafactor(params, lr=0.1),
        lambda params: torch.optim.SGD([{"params": params[1:]}, {"params": params[:1], "momentum": 0.9}], lr=0.1),
    ],
    ids=["muon", "adafactor", "momentum of one group"],
)
@pytest.mark.parametrize("around", [lambda engine: engine, Nested], ids=["plain", "nested"])
def test_a_state_is_refused_also_where_parameters_have_it_in_other_shapes_or_not_at_all(inner, around):
    """`Engine.slots` does not list all of them."""
    engine, algorithm, comm = around(make_engine(inner)), DeMo(), SoloComm()
    state = algorithm.init(engine, comm)
    engine.backward(make_batch(0, 1))
    algorithm.before_update(1, engine, state, comm)
    engine.update()
    assert set(engine.slots()) <= {"param", "momentum_buffer"}
    with pytest.raises(ValueError, match=r"inner optimizer keeps \['"):
        algorithm.after_update(1, engine, state, comm)


class Noting(torch.optim.SGD):
    """Says of each parameter that it keeps no momentum."""

    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["momentum_buffer"] = None


def test_an_entry_that_is_none_is_no_state():
    engine, algorithm, comm = make_engine(lambda params: Noting(params, lr=0.1)), DeMo(), SoloComm()
    state = algorithm.init(engine, comm)
    step(algorithm, 1, engine, state, comm, make_batch(0, 1))
    assert algorithm.num_rounds(state) == 1


def test_a_state_that_is_there_from_the_start_is_refused_at_once():
    with pytest.raises(ValueError, match=r"inner optimizer keeps \['scale'\]"):
        DeMo().init(make_engine(scaled_sgd), SoloComm())
