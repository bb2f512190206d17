"""Who listens to forward hears of each parameter once, before it is used, and may change it until then."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lowcomm.engine.blocks import uses
from lowcomm.engine.torch_engine import TorchEngine
from lowcomm.models.llama import Llama
from lowcomm.tensors import rng

VOCAB = 7


class Model(nn.Module):
    """An embedding, blocks that are called in some order, and a head."""

    def __init__(self, order=(0, 1, 2), tied=False):
        super().__init__()
        self.order, self.events = order, []
        self.embedding = nn.Embedding(VOCAB, 4)
        # the outermost count: what is in a block is the block's
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4, False)) for _ in range(3))
        self.head = nn.Linear(4, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        self.events.append("forward")
        x = self.embedding(tokens)
        for k in self.order:
            self.events.append(f"block {k}")
            x = x + self.blocks[k](x)
        self.events.append("head")
        logits: Tensor = self.head(x)
        return logits


def engine_of(model, **options):
    return TorchEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), clip_norm=None, **options)


def batch(t=0, size=4):
    return torch.randint(VOCAB, (size, 6), generator=rng(0, "batch", t))


def heard(model, **options):
    """What happens in a step: numbers of parameters, what the model does, and when backward begins."""
    engine = engine_of(model, **options)
    events = model.events

    def ready(i, gradient):
        if events[-1] != "backward":
            events.append("backward")

    engine.backward(batch(), ready, events.append)
    found = list(events)
    engine.backward(batch(1))
    engine.evaluate(batch(2))
    assert not any(isinstance(x, int) for x in events[len(found) :]), "nobody listens any more"
    return found


def test_parameters_are_wanted_as_their_blocks_begin():
    """0 is the embedding's, 1 to 9 are three blocks', 10 is the head's, which is no block."""
    begin = [0, 10, "forward"]
    blocks = [[f"block {k}", *range(1 + 3 * k, 4 + 3 * k)] for k in range(3)]
    assert heard(Model()) == [*begin, *blocks[0], *blocks[1], *blocks[2], "head", "backward"]
    assert heard(Model(order=(2, 0, 1))) == [*begin, *blocks[2], *blocks[0], *blocks[1], "head", "backward"]
    # a block that is called twice is asked for once, and one that is not called after the others
    expected = [*begin, *blocks[1], "block 1", *blocks[0], "head", 7, 8, 9, "backward"]
    assert heard(Model(order=(1, 1, 0))) == expected


def test_what_is_shared_is_wanted_before_its_first_use():
    assert heard(Model(tied=True))[:3] == [0, "forward", "block 0"], "the head's is the embedding's"
    with_outside, with_another = Model(), Model(order=(2, 1, 0))
    with_outside.alone = with_outside.blocks[1][0]
    with_another.blocks[2][0] = with_another.blocks[0][0]
    assert [x for x in heard(with_outside) if x != "forward"][:4] == [0, 4, 5, 10]
    # without two of its own there, the last block has number 7 and the two that are the first one's
    found = [x for x in heard(with_another) if not isinstance(x, str)]
    assert found == [0, 8, 1, 2, 7, 4, 5, 6, 3]


def test_with_micro_batches_the_first_forward_asks():
    found = heard(Model(), num_micro_batches=2)
    again = found.index("forward", found.index("forward") + 1)
    assert [x for x in found[:again] if isinstance(x, int)] == [0, 10, *range(1, 10)]
    assert not any(isinstance(x, int) for x in found[again:])


def test_a_compiled_model_is_asked_for_before_forward_begins(monkeypatch):
    for make in (lambda model: model.blocks[1].compile(backend="eager"), lambda model: model.compile(backend="eager")):
        model = Model()
        make(model)
        assert uses(model, list(model.parameters())).blocks == []
    monkeypatch.setattr(torch, "compile", lambda loss: loss)
    assert heard(Model(), compile=True)[:12] == [0, 10, *range(1, 10), "forward"]


def test_without_values_too():
    model = Model().to("meta")
    told: list[int] = []
    assert engine_of(model).backward(batch().to("meta"), wanted=told.append).is_meta
    assert told == [0, 10, *range(1, 10)]


def test_a_frozen_parameter_is_not_wanted():
    model = Model()
    model.blocks[1].requires_grad_(False)
    model.embedding.requires_grad_(False)
    assert [x for x in heard(model) if isinstance(x, int)] == [6, *range(6)]


def test_nothing_is_left_behind_by_a_step_that_fails():
    model = Model()
    engine = engine_of(model)

    def fails(i):
        if i == 4:
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        engine.backward(batch(), wanted=fails)
    assert not any(module._forward_pre_hooks for module in model.modules())
    engine.backward(batch())


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_to_change_a_parameter_when_it_is_wanted_is_to_change_it_before_the_step(autocast, num_micro_batches):
    """With all of what is yet to come in its block, as parameters that travel together are; autocast is off for it."""
    config = Llama(num_layers=3, dim=16, num_heads=2, num_kv_heads=1, ffn_dim=24, tie_embeddings=True)
    llama = config.build(VOCAB, seed=0)
    options = {"autocast": autocast, "num_micro_batches": num_micro_batches}
    late, early = engine_of(copy.deepcopy(llama), **options), engine_of(llama, **options)
    matrix = torch.randn(16, 16, generator=rng(0, "matrix"))
    told: list[int] = []

    def change(engine, i):
        p = engine.slots()["param"][i]
        p.add_(p.mul(3.0) @ matrix if p.shape[-1] == 16 else 0.5)

    def wanted(i):
        if i not in told:
            for k in range(i, min(i + 3, len(late.slots()["param"]))):
                if k not in told:
                    change(late, k)
                    told.append(k)

    for t in range(3):
        told.clear()
        for i in range(len(early.slots()["param"])):
            change(early, i)
        losses = early.backward(batch(t)), late.backward(batch(t), wanted=wanted)
        assert torch.equal(*losses)
        for x, y in zip(early.slots()["grad"], late.slots()["grad"], strict=True):
            assert torch.equal(x, y)
        for engine in (early, late):
            engine.update()
    for x, y in zip(early.slots()["param"], late.slots()["param"], strict=True):
        assert torch.equal(x, y)


class Nested(nn.Module):
    """Layers in containers that are not called themselves."""

    def __init__(self, container):
        super().__init__()
        self.container = container
        pairs = [(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)) for _ in range(2)]
        self.layers = nn.ModuleList(container(pair) for pair in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            first, second = layer.values() if isinstance(layer, nn.ModuleDict) else layer
            x = x + second(torch.tanh(first(x)))
        return x


def test_containers_without_a_forward_are_no_blocks():
    """No hook of theirs would ever run. Children of a list are blocks; what is in a dictionary is wanted at once."""
    for container, first, blocks in (
        (nn.ModuleList, [], [[0], [1], [2], [3]]),
        (lambda pair: nn.ModuleDict(zip("ab", pair, strict=True)), [0, 1, 2, 3], []),
    ):
        model = Nested(container)
        found = uses(model, list(model.parameters()))
        assert (found.first, [numbers for _, numbers in found.blocks]) == (first, blocks)
