"""Whoever is missing, the messages of the others give the sum of all gradients."""

from __future__ import annotations

from itertools import combinations
from math import comb

import pytest
import torch

from lowcomm.codecs.float32 import Float32
from lowcomm.codecs.half import Half
from lowcomm.coding.base import Code, Decoder, encode
from lowcomm.coding.cyclic import CyclicRepetition
from lowcomm.coding.fractional import FractionalRepetition
from lowcomm.tensors import rng

SMALL: list[Code] = [CyclicRepetition(n, s) for n in range(1, 11) for s in range(n)]
SMALL += [FractionalRepetition(n, s) for n in range(1, 11) for s in range(n) if n % (s + 1) == 0]
LARGE: list[Code] = [CyclicRepetition(n, s) for n, s in ((16, 3), (32, 8), (48, 1), (64, 15))]
LARGE += [FractionalRepetition(n, s) for n, s in ((16, 3), (32, 7), (48, 2), (64, 15))]


def gradients(num, dtype=torch.float64):
    drawn = torch.randn(num, 7, generator=rng(num, "gradients"), dtype=torch.float64).to(dtype)
    return {i: [drawn[i, :3].reshape(3, 1), drawn[i, 3:]] for i in range(num)}


def worst_error(code, left_out):
    """Over sets of missing workers, relative to the largest value."""
    n, of = code.num_workers, gradients(code.num_workers)
    messages = {worker: encode(code, worker, of) for worker in range(n)}
    exact = [sum(tensors) for tensors in zip(*of.values(), strict=True)]
    scale, decoder, worst = max(float(x.abs().max()) for x in exact), Decoder(code), 0.0
    for missing in left_out:
        decoded = decoder.decode({worker: x for worker, x in messages.items() if worker not in missing})
        worst = max(worst, *(float((a - b).abs().max()) / scale for a, b in zip(decoded, exact, strict=True)))
    return worst


@pytest.mark.parametrize("code", SMALL, ids=str)
def test_decodes_for_every_set_of_stragglers(code):
    s, n = code.num_stragglers, code.num_workers
    left_out = [missing for num in range(s + 1) for missing in combinations(range(n), num)]
    assert len(left_out) == sum(comb(n, num) for num in range(s + 1))
    assert worst_error(code, left_out) < 1e-9


@pytest.mark.parametrize("code", LARGE, ids=str)
def test_decodes_for_random_sets_of_stragglers(code):
    random = rng(0, "stragglers")
    draws = [torch.randperm(code.num_workers, generator=random).tolist() for _ in range(30)]
    assert worst_error(code, [tuple(order[: code.num_stragglers]) for order in draws]) < 1e-8


@pytest.mark.parametrize("code", [CyclicRepetition(7, 2), FractionalRepetition(6, 2)], ids=str)
def test_too_few_messages_are_refused(code):
    few = {worker: encode(code, worker, gradients(code.num_workers)) for worker in range(3)}
    with pytest.raises(ValueError, match="wait for"):
        Decoder(code).decode(few)


@pytest.mark.parametrize("code", SMALL + LARGE, ids=str)
def test_each_worker_computes_its_load_and_no_more(code):
    for worker in range(code.num_workers):
        partitions = [partition for partition, _ in code.coefficients(worker)]
        assert len(set(partitions)) == len(partitions) == round(code.load * code.num_workers)


def test_factors_are_worked_out_once_for_each_set(monkeypatch):
    code = CyclicRepetition(5, 1)
    asked: list[frozenset[int]] = []
    weights = CyclicRepetition.weights
    monkeypatch.setattr(CyclicRepetition, "weights", lambda self, who: asked.append(who) or weights(self, who))
    decoder, messages = Decoder(code), {worker: encode(code, worker, gradients(5)) for worker in range(5)}
    for missing in (1, 2, 1, 2):
        decoder.decode({worker: x for worker, x in messages.items() if worker != missing})
    assert len(asked) == 2


def test_cyclic_messages_go_over_exact_wires_only():
    for code in (CyclicRepetition(8, 2), FractionalRepetition(8, 1)):
        code.check_wire(None)
        code.check_wire(Float32())
    FractionalRepetition(8, 1).check_wire(Half("float16"))
    with pytest.raises(ValueError, match="send float32"):
        CyclicRepetition(8, 2).check_wire(Half("float16"))


def test_half_precision_gradients_are_sent_in_float32():
    message = encode(CyclicRepetition(4, 1), 0, gradients(4, torch.bfloat16))
    assert {x.dtype for x in message} == {torch.float32}


def test_a_copy_that_differs_is_named():
    code = FractionalRepetition(6, 2)
    assert code.disagreeing({0: "a", 1: "a", 4: "b", 5: "b"}) == []
    assert code.disagreeing({0: "a", 2: "c", 4: "b", 5: "a"}) == [2, 5]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: CyclicRepetition(4, 4), "0 to 3 may be missing"),
        (lambda: FractionalRepetition(6, 3), "do not divide 6 workers"),
    ],
)
def test_impossible_codes_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("code", [FractionalRepetition(6, 2), CyclicRepetition(6, 2)], ids=str)
def test_coded_and_uncoded_training_give_equal_parameters(code):
    """A small model, six partitions of each batch, and other workers missing at every step."""

    def trained(coded):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        decoder, data = Decoder(code), rng(1, "data")
        for t in range(20):
            x = torch.randn(6, 5, 4, generator=data, dtype=torch.float64)
            parts = {}
            for partition in range(6):
                model.zero_grad()
                (model(x[partition]) - x[partition].sum(1, keepdim=True)).square().mean().backward()
                parts[partition] = [p.grad.clone() for p in model.parameters()]
            total = [sum(tensors) for tensors in zip(*parts.values(), strict=True)]
            if coded:
                came = [worker for worker in range(6) if worker not in (t % 6, (t * t + 1) % 6)]
                total = decoder.decode({worker: encode(code, worker, parts) for worker in came})
            for p, gradient in zip(model.parameters(), total, strict=True):
                p.grad = gradient / 6
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    for ours, theirs in zip(trained(coded=True), trained(coded=False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
