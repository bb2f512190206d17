"""Replicas computed at once: each other engine's numbers, the same times, and a clear word where it cannot be done."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lowcomm.cli import main
from lowcomm.engine.torch_engine import TorchEngine, next_token_loss
from lowcomm.metrics import read
from lowcomm.sim.stacked import Stack
from tests.multiprocess.launch import write_tiny

with_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, with_cuda])]
VOCAB_SIZE = 11


class Tied(nn.Module):
    """Tied embeddings, a parameter out of use, a frozen one, a buffer, and whatever else is asked for."""

    def __init__(self, extra):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, 6)
        self.inner, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, VOCAB_SIZE, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.full((6,), 0.5), requires_grad=False)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 6))
        self.extra = extra

    def forward(self, tokens):
        x = self.embedding(tokens) * self.scale.to(self.norm.weight) + self.frozen
        return self.head(self.extra(self.norm(x + torch.tanh(self.inner(x)))))


class LooksAtValues(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, x):
        self.num_calls += 1
        return x


def loss_in_its_dtype(model, batch):
    logits = model(batch[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def engines(num, dtype=torch.float64, device="cpu", autocast=None, loss=loss_in_its_dtype, extra=None):
    """Replicas that differ in weights, learning rate and clipping."""
    found = []
    for rank in range(num):
        torch.manual_seed(rank)
        model = Tied(extra or nn.Identity()).to(device, dtype)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01 * (rank + 1))
        found.append(TorchEngine(model, optimizer, loss=loss, clip_norm=0.3 * (rank + 1), autocast=autocast))
    return found


def batches(num_steps, num, device="cpu"):
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randint(VOCAB_SIZE, (num_steps, num, 4, 8), generator=generator).to(device)
    return [list(step) for step in drawn]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "autocast", "loss", "tolerance"),
    [
        (torch.float64, None, loss_in_its_dtype, 1e-12),
        (torch.float32, None, next_token_loss, 1e-5),
        (torch.float32, torch.bfloat16, next_token_loss, 0.02),
        (torch.bfloat16, None, next_token_loss, 0.02),
    ],
)
def test_each_replica_gets_the_gradients_that_it_would_alone(dtype, autocast, loss, tolerance, device):
    alone, inner = (engines(3, dtype, device, autocast, loss) for _ in range(2))
    stack = Stack(autocast, loss)
    together = [stack.join(rank, engine) for rank, engine in enumerate(inner)]
    data, step, lent = batches(9, 3, device), [0, 0, 0], [x.slots()["param"] for x in together]
    for turn in "abcABCacAbaBCcAC":  # small: this replica begins its step; capital: it takes its gradients
        rank = "abc".index(turn.lower())
        batch = data[step[rank]][rank]
        if turn.islower():
            together[rank].announce(batch)
            continue
        losses = [x[rank].backward(batch) for x in (alone, together)]
        assert losses[1].dtype == torch.float32 and losses[1].shape == ()
        torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=tolerance)
        gradients = [x[rank].slots()["grad"] for x in (alone, together)]
        largest = max(x.abs().max().item() for x in gradients[0])
        for x, y in zip(*gradients, strict=True):
            assert y.is_contiguous() and (x.dtype, x.device) == (y.dtype, y.device)
            torch.testing.assert_close(y, x, rtol=tolerance, atol=tolerance * largest)
        for x in (alone, together):
            x[rank].update()
        assert "grad" not in together[rank].slots()
        # the same start for the next step: Adam makes much of a small difference where a gradient is about 0
        torch._foreach_copy_(together[rank].slots()["param"], alone[rank].slots()["param"])
        step[rank] += 1
    assert (stack.num_gradients, stack.num_calls, sum(step)) == (8, 4, 8)
    for x, y in zip(lent, together, strict=True):
        assert all(a is b for a, b in zip(x, y.slots()["param"], strict=True))


def test_autocast_is_on_for_all_replicas_at_once():
    seen = []

    def loss(model, batch):
        seen.append(model(batch).dtype)
        return next_token_loss(model, batch)

    Stack(torch.bfloat16, loss).join(0, engines(1, torch.float32)[0]).backward(batches(1, 1)[0][0])
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_it_computes_the_same(device):
    alone, inner = (engines(3, device=device) for _ in range(2))
    stack = Stack(loss=loss_in_its_dtype, compile=True)
    together = [stack.join(rank, engine) for rank, engine in enumerate(inner)]
    for step in batches(3, 3, device):
        for engine, batch in zip(together, step, strict=True):
            engine.announce(batch)
        for x, y, batch in zip(alone, together, step, strict=True):
            torch.testing.assert_close(y.backward(batch), x.backward(batch), rtol=1e-6, atol=1e-6)
            for a, b in zip(x.slots()["grad"], y.slots()["grad"], strict=True):
                torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)
            x.update()
            y.update()
    assert stack.num_calls == 3


def test_who_has_left_is_computed_no_more():
    stack = Stack(loss=loss_in_its_dtype)
    together = [stack.join(rank, engine) for rank, engine in enumerate(engines(2))]
    mine, yours = batches(1, 2)[0]
    together[0].announce(mine)
    together[1].announce(yours)
    stack.leave(1)
    together[0].backward(mine)
    assert (stack.num_calls, stack.num_gradients) == (1, 1)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("extra", [partial(nn.Dropout, 0.5), partial(nn.BatchNorm1d, 7), LooksAtValues, Counts])
def test_a_model_that_cannot_be_stacked_is_refused(extra, compile):
    engine = Stack(loss=loss_in_its_dtype, compile=compile).join(0, engines(1, extra=extra())[0])
    with pytest.raises(ValueError, match="cannot be computed for several replicas at once.*set stacked to false"):
        engine.backward(batches(1, 1)[0][0])


@pytest.mark.parametrize("name", ["scale", "frozen"])
def test_what_is_shared_must_be_equal(name):
    first, second = engines(2)
    getattr(second.model, name).data[0] = 7.0
    stack = Stack()
    stack.join(0, first)
    with pytest.raises(ValueError, match=f"rank 1's buffers or frozen parameters .*{name}.*set stacked to false"):
        stack.join(1, second)


# through `lowcomm simulate`


@pytest.fixture
def flags(tmp_path):
    return ["--config", str(write_tiny(tmp_path)), "--checkpoint.every", "0", "--num_steps", "12"]


def simulated(flags, out, *more):
    assert main(["simulate", *flags, *more, "--out", str(out)]) == 0
    return {x.name: x.read_bytes() for x in out.iterdir() if x.name != "environment.json"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("method", "compute"),
    [(["DataParallel"], "LogNormal"), (["LocalSGD", "3"], "Constant"), (["DiLoCo", "4"], "LogNormal")],
)
def test_it_learns_the_same_in_exactly_the_same_virtual_time(method, compute, device, flags, tmp_path, capsys):
    every = ["--algorithm.every", method[1]] if method[1:] else []
    cluster = ["--cluster", "Home", "--cluster.num_hosts", "4", "--cluster.compute", compute]
    flags = [*flags, "--algorithm", method[0], *every, *cluster, "--device", device]
    alone = simulated(flags, tmp_path / "alone")
    capsys.readouterr()
    stacked = simulated(flags, tmp_path / "stacked", "--stacked", "true")
    printed = capsys.readouterr().out
    assert simulated(flags, tmp_path / "again", "--stacked", "true") == stacked

    assert alone.keys() == stacked.keys()
    assert all(alone[name] == stacked[name] for name in ("trace.json", "cluster.yaml"))
    for name in (x for x in alone if x.startswith("metrics")):
        for x, y in zip(*(read(tmp_path / out / name) for out in ("alone", "stacked")), strict=True):
            assert x.keys() == y.keys()
            assert {k for k in x if x[k] != y[k]} <= {"loss", "val_loss", "val_bits_per_byte", "val_perplexity"}
            torch.testing.assert_close(y.get("loss"), x.get("loss"), rtol=1e-5, atol=1e-5)
    before, after = (load_file(tmp_path / out / "final.safetensors") for out in ("alone", "stacked"))
    for name, x in before.items():
        assert torch.linalg.norm(after[name] - x) <= 1e-5 * torch.linalg.norm(x), name
    num_calls = int(printed.split("gradients computed ")[1].split()[0])
    assert num_calls == 12 if method == ["DataParallel"] else 12 <= num_calls < 4 * 12


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--timing_only", "true"], "timing_only is true"),
        (["--num_resident", "2"], "num_resident is 2"),
        (["--algorithm.overlap", "true", "--clip_norm", "null"], "the algorithm's overlap is on"),
        (["--batch.num_micro_batches", "2"], "num_micro_batches is 2"),
    ],
)
def test_what_cannot_be_stacked_is_refused(more, words, flags, tmp_path, capsys):
    cluster = ["--cluster", "Home", "--cluster.num_hosts", "2", "--stacked", "true"]
    assert main(["simulate", *flags, *cluster, *more, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error and "set stacked to false" in error and not (tmp_path / "out").exists()
