"""The engine around a module and an optimizer: against a bare torch loop, bit for bit."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowcomm.engine.torch_engine import TorchEngine, next_token_loss
from lowcomm.models.llama import Llama
from lowcomm.optim.schedule import Cosine
from lowcomm.tensors import rng

VOCAB = 13


def batches(num: int) -> list[Tensor]:
    return [torch.randint(VOCAB, (4, 9), generator=rng(0, "batch", t)) for t in range(num)]


class CountsCalls(nn.Module):
    """The identity, with a buffer that changes in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return x


def language_model(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Embedding(VOCAB, 8), nn.Dropout(dropout), CountsCalls(), nn.LayerNorm(8), nn.Linear(8, VOCAB)
    )


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.9, weight_decay=0.01)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def engine_of(model, make=adamw, schedule=None, **options):
    optimizer = make(model.parameters())
    return TorchEngine(model, optimizer, schedule=schedule and schedule.build(optimizer, 10), **options)


def train(engine, some_batches) -> list[float]:
    losses = []
    for batch in some_batches:
        losses.append(engine.backward(batch).item())
        engine.update()
    return losses


def assert_same_model(a: nn.Module, b: nn.Module) -> None:
    a_state, b_state = a.state_dict(), b.state_dict()
    assert list(a_state) == list(b_state)
    for name, x in a_state.items():
        assert torch.equal(x, b_state[name]), name


@pytest.mark.parametrize(
    ("make", "num_micro_batches", "clip_norm", "bf16"),
    [(sgd, 1, None, "off"), (adamw, 2, 0.1, "off"), (sgd, 2, 0.1, "autocast"), (adamw, 1, None, "pure")],
)
def test_equals_a_bare_torch_loop_bit_for_bit(make, num_micro_batches, clip_norm, bf16):
    model = language_model(dropout=0.1).to(torch.bfloat16 if bf16 == "pure" else torch.float32)
    bare = copy.deepcopy(model)
    autocast = torch.bfloat16 if bf16 == "autocast" else None
    engine = engine_of(
        model, make, Cosine(2), num_micro_batches=num_micro_batches, clip_norm=clip_norm, autocast=autocast
    )
    torch.manual_seed(0)
    losses = train(engine, batches(5))

    optimizer = make(bare.parameters())
    schedule = Cosine(2).build(optimizer, 10)
    torch.manual_seed(0)
    wanted = []
    for batch in batches(5):
        optimizer.zero_grad()
        total = 0.0
        for part in batch.chunk(num_micro_batches):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16 == "autocast"):
                logits = bare(part[:, :-1])
            loss = F.cross_entropy(logits.reshape(-1, VOCAB).float(), part[:, 1:].reshape(-1)) / num_micro_batches
            loss.backward()
            total += loss.item()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(bare.parameters(), clip_norm)
        optimizer.step()
        schedule.step()
        wanted.append(total)
    for (name, p), q in zip(model.named_parameters(), bare.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert losses == pytest.approx(wanted, rel=1e-6)
    assert losses[-1] != losses[0]


def test_the_loss_is_the_mean_surprise_at_each_next_token():
    model, (batch,) = language_model(), batches(1)
    probability = model(batch[:, :-1]).softmax(-1)
    wanted = [-probability[i, j, batch[i, j + 1]].log() for i in range(4) for j in range(8)]
    torch.testing.assert_close(next_token_loss(model, batch), torch.stack(wanted).mean())


def test_micro_batches_give_the_gradient_and_loss_of_the_whole_batch():
    whole, parts = engine_of(language_model()), engine_of(language_model(), num_micro_batches=4)
    (batch,) = batches(1)
    torch.testing.assert_close(parts.backward(batch), whole.backward(batch))
    torch.testing.assert_close(parts.slots()["grad"], whole.slots()["grad"])


@pytest.mark.parametrize(
    ("make", "schedule", "num_before"), [(sgd, None, 4), (adamw, Cosine(3, final=0.1), 4), (adamw, None, 0)]
)
def test_a_resumed_run_goes_on_bit_for_bit(make, schedule, num_before, tmp_path):
    engine = engine_of(language_model(dropout=0.5), make, schedule)
    train(engine, batches(num_before))
    torch.save(engine.state_dict(), tmp_path / "state")
    wanted = train(engine, batches(4))

    resumed = engine_of(language_model(dropout=0.5), make, schedule)
    for p in resumed.model.parameters():
        nn.init.ones_(p.data)
    torch.rand(100)
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert train(resumed, batches(4)) == wanted
    assert_same_model(resumed.model, engine.model)
    assert resumed.model[2].calls == num_before + 4
    assert resumed.lr() == engine.lr()


def test_loading_is_in_place_and_shares_nothing_with_the_state():
    engine = engine_of(language_model())
    train(engine, batches(2))
    state = copy.deepcopy(engine.state_dict())
    untouched = copy.deepcopy(state)
    handed_out = engine.slots()
    wanted = {name: [x.clone() for x in tensors] for name, tensors in handed_out.items()}
    train(engine, batches(3))
    engine.backward(batches(1)[0])
    engine.load_state_dict(state)
    assert list(engine.slots()) == ["param", "exp_avg", "exp_avg_sq"]  # gradients of before are gone
    for name, tensors in engine.slots().items():
        for live, old, value in zip(tensors, handed_out[name], wanted[name], strict=True):
            assert live.data_ptr() == old.data_ptr()
            assert torch.equal(live, value)
    fresh = engine_of(language_model())
    fresh.load_state_dict(state)
    train(fresh, batches(3))
    train(engine, batches(3))
    torch.testing.assert_close(state["optimizer"]["state"], untouched["optimizer"]["state"], rtol=0, atol=0)


class Fp32Momentum(torch.optim.Optimizer):
    """Momentum in fp32, whatever the parameter's dtype; it is absent until the first gradient."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            momentum = state.setdefault("momentum", torch.zeros_like(p, dtype=torch.float32))
            momentum.mul_(0.9).add_(p.grad)
            p.sub_(self.param_groups[0]["lr"] * momentum)


def test_fp32_states_of_bf16_parameters_are_not_rounded_on_the_way():
    engine = engine_of(language_model().to(torch.bfloat16), Fp32Momentum)
    train(engine, batches(3))
    state = copy.deepcopy(engine.state_dict())
    wanted = train(engine, batches(3))
    for resumed in (engine, engine_of(language_model().to(torch.bfloat16), Fp32Momentum)):
        resumed.load_state_dict(state)
        assert {x.dtype for x in resumed.slots()["momentum"]} == {torch.float32}
        assert train(resumed, batches(3)) == wanted


def test_slots_before_between_and_after():
    engine = engine_of(language_model())
    assert list(engine.slots()) == ["param"]
    engine.backward(batches(1)[0])
    assert list(engine.slots()) == ["param", "grad"]
    engine.update()
    assert list(engine.slots()) == ["param", "exp_avg", "exp_avg_sq"]
    shapes = [p.shape for p in engine.model.parameters()]
    assert all([x.shape for x in tensors] == shapes for tensors in engine.slots().values())
    plain = engine_of(language_model(), lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    train(plain, batches(1))
    assert list(plain.slots()) == ["param"]


def test_the_step_count_of_a_scalar_parameter_is_no_slot():
    model = nn.Module()
    model.x = nn.Parameter(torch.tensor(1.0))
    engine = engine_of(model, loss=lambda model, batch: (model.x * batch).mean())
    train(engine, [torch.ones(3)])
    assert list(engine.slots()) == ["param", "exp_avg", "exp_avg_sq"]


def test_slots_are_live_and_record_no_graph():
    engine = engine_of(language_model(), lambda parameters: torch.optim.SGD(parameters, lr=1.0), clip_norm=None)
    slots = engine.slots()
    slots["param"][0].fill_(0.25)
    assert (engine.model[0].weight == 0.25).all()
    assert not (slots["param"][0] * 2).requires_grad
    slots["param"].clear()
    assert len(engine.slots()["param"]) == 5
    engine.backward(batches(1)[0])
    for grad in engine.slots()["grad"]:
        grad.fill_(0.5)
    engine.update()
    assert (engine.model[0].weight == -0.25).all()


class TiedUnusedFrozen(nn.Module):
    """A tied weight, a parameter without gradient and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 4)
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.head = nn.Linear(4, VOCAB, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.embedding(tokens) * self.frozen))


def test_tied_unused_and_frozen_parameters():
    model = TiedUnusedFrozen()
    before = model.embedding.weight.clone()
    engine = engine_of(model, lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0), clip_norm=None)
    engine.backward(batches(1)[0])
    assert engine.names() == ["unused", "embedding.weight"]
    pointers = [x.data_ptr() for x in engine.slots()["param"]]
    assert pointers == [model.unused.data_ptr(), model.embedding.weight.data_ptr()]
    zeros, tied = engine.slots()["grad"]
    assert torch.equal(zeros, torch.zeros(3))
    assert tied.abs().sum() > 0
    zeros.fill_(1.0)  # an algorithm writes what other replicas got
    engine.update()
    assert torch.allclose(model.unused, torch.tensor(0.9))
    assert torch.equal(model.frozen, torch.ones(4))
    assert not torch.equal(model.embedding.weight, before)
    assert model.head.weight is model.embedding.weight
    assert [len(tensors) for tensors in engine.slots().values()] == [2, 2, 2]
    assert model.frozen.grad is None


def test_gradients_of_a_backward_outside_of_the_engine_are_complete_too():
    model = TiedUnusedFrozen()
    engine = engine_of(model)
    next_token_loss(model, batches(1)[0]).backward()
    zeros, tied = engine.slots()["grad"]
    assert zeros is model.unused.grad
    assert torch.equal(zeros, torch.zeros(3))
    assert tied is model.head.weight.grad


def test_evaluation_is_without_dropout_and_gradients_and_puts_the_modes_back():
    model = language_model(dropout=0.5)
    model[3].eval()
    engine = engine_of(model, autocast=torch.bfloat16)
    (batch,) = batches(1)
    loss = engine.evaluate(batch)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert not loss.requires_grad
    assert torch.equal(loss, engine.evaluate(batch))
    assert [module.training for module in model.modules()] == [True, True, True, True, False, True]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss, next_token_loss(copy.deepcopy(model).eval(), batch))
    with pytest.raises(IndexError):
        engine.evaluate(batch + VOCAB)
    assert model.training


def test_the_learning_rate_is_that_of_the_next_update():
    engine = engine_of(language_model(), sgd, Cosine(num_warmup_steps=2))
    assert engine.lr() == 0.25
    engine.backward(batches(1)[0])
    assert engine.lr() == 0.25
    engine.update()
    assert engine.lr() == 0.5
    groups = engine_of(language_model(), lambda p: sgd([{"params": [x], "lr": 0.1 * k} for k, x in enumerate(p, 1)]))
    assert groups.lr() == 0.1, "of the first group"


def test_compiles_forward_and_loss_as_one_graph(monkeypatch):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda loss: compiler(loss, backend=count, fullgraph=True))
    model = Llama("500k", num_layers=1, dim=8, num_heads=2, num_kv_heads=1, ffn_dim=8).build(VOCAB, seed=0)
    plain, compiled = engine_of(copy.deepcopy(model)), engine_of(model, compile=True, num_micro_batches=2)
    assert train(compiled, batches(3)) == pytest.approx(train(plain, batches(3)), rel=1e-5)
    assert len(graphs) == 1
    assert list(compiled.state_dict()["model"]) == list(plain.state_dict()["model"])


def sharing_memory() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight.data = model[0].weight.data
    return model


def of_another_optimizer(model: nn.Module) -> TorchEngine:
    return TorchEngine(model, sgd(model.parameters()), schedule=Cosine().build(sgd(model.parameters()), 10))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: engine_of(m, num_micro_batches=0), "num_micro_batches is 0"),
        (lambda m: engine_of(m, clip_norm=0.0), "clip_norm is 0.0"),
        (of_another_optimizer, "built for another optimizer"),
        (lambda m: engine_of(m.requires_grad_(False)), "no trainable parameter"),
        (lambda m: TorchEngine(m, sgd(m[0].parameters())), r"does not hold: 3\.weight, 3\.bias, 4\.weight, 4\.bias"),
        (lambda m: TorchEngine(m[0], sgd(m.parameters())), "parameters that are not the model's"),
        (lambda m: engine_of(sharing_memory()), "two parameters share memory"),
        (lambda m: engine_of(m, num_micro_batches=3).backward(batches(1)[0]), "a batch of 4 .* num_micro_batches 3"),
        (lambda m: engine_of(m, num_micro_batches=2).backward({}), "a batch is a dict"),
        (lambda m: engine_of(m).load_state_dict(engine_of(m, schedule=Cosine()).state_dict()), "the state has a"),
        (lambda m: engine_of(m, schedule=Cosine()).load_state_dict(engine_of(m).state_dict()), "the engine has a"),
    ],
)
def test_mistakes_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        make(language_model())


def test_an_update_without_gradients_is_our_mistake():
    with pytest.raises(AssertionError, match="update comes after backward"):
        engine_of(language_model()).update()


@pytest.mark.parametrize("reports", [False, True])
def test_sparse_gradients_become_dense(reports):
    """So a step is that of a model whose gradients were dense: momentum and decay go on in rows without tokens."""

    def trained(sparse: bool) -> list[Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Embedding(VOCAB, 4, sparse=sparse), nn.Linear(4, VOCAB))
        engine = TorchEngine(model, torch.optim.AdamW(model.parameters()), num_micro_batches=2)
        found: list[Tensor] = []
        for batch in batches(3):
            ready: list[Tensor] = []
            keep = ready.append
            engine.backward(batch, (lambda i, gradient: keep(gradient)) if reports else None)  # noqa: B023
            found += ready
            found += engine.slots()["grad"]
            engine.update()
        return [*found, *engine.slots()["param"]]

    for x, y in zip(trained(True), trained(False), strict=True):
        assert x.layout == torch.strided
        torch.testing.assert_close(x, y)


def test_complex_parameters_are_refused_and_frozen_ones_carried():
    model = nn.Linear(2, 2)
    model.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"'phase' is of torch.complex64.*view_as_complex"):
        TorchEngine(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model.phase.requires_grad_(False)
    TorchEngine(model, torch.optim.SGD(model.parameters(), lr=0.1))
