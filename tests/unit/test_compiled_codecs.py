"""Codes through torch.compile, on the CPU with a backend that compiles nothing: they can be traced, and stay right."""

import copy
import pickle

import pytest
import torch

from lowcomm.codecs import blocks
from lowcomm.tensors import rng
from tests.compressors import FP8, NF4, Absmax, Bins, Sign

CODECS = [
    *(Absmax(4, 16, "float16", stochastic=True), NF4(16), FP8("e5m2", 16, "e8m0"), Bins(block=16), Sign(16)),
]


@pytest.fixture
def traced(monkeypatch):
    """Codes of 64 values and more go through torch.compile here; a list that grows by one with each graph."""
    graphs = []
    compile_ = torch.compile

    def backend(graph, given):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(blocks, "COMPILED_ON", ("cpu",))
    monkeypatch.setattr(blocks, "COMPILED_FROM", 64)
    monkeypatch.setattr(
        torch, "compile", lambda f, fullgraph, options: compile_(f, fullgraph=fullgraph, backend=backend)
    )
    return graphs


def both(codec, x):
    """The payload and the values that come back."""
    payload = codec.encode(x, rng(0, "rounding"))
    return payload, codec.decode(payload, x.shape[1])


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_traced_codes_are_the_plain_ones(codec, traced, monkeypatch):
    """Whatever the number of blocks, with few graphs; sums may be added up in another order."""
    block = codec.layout().block
    sizes = [7 * block, 9 * block, 20 * block + 3, 64 * block, 5 * block + 1]
    xs = [torch.randn(1, num, generator=rng(0, "x", num)) for num in sizes]
    got = [both(codec, x) for x in xs]
    graphs = len(traced)
    assert 2 <= graphs <= 4, "one for each direction, aligned or not"
    monkeypatch.setattr(blocks, "COMPILED_ON", ())
    for x, (payload, y) in zip(xs, got, strict=True):
        plain = codec.decode(payload, x.shape[1])
        assert torch.equal(y, plain), "decoding must not depend on the path"
        assert torch.allclose(both(codec, x)[1], y, rtol=1e-5)
    assert len(traced) == graphs


def test_a_way_around_the_compiler_is_refused(traced):
    """Ranks would decode in different ways, silently."""
    x = torch.randn(1, 512, generator=rng(0, "x"))
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match=r"Absmax.*without compiling"):
        Absmax().encode(x)


def test_too_many_programs_are_refused(traced):
    codec, x = Absmax(), torch.randn(1, 512, generator=rng(0, "x"))
    codec.encode(x)
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(RuntimeError, match=r"recompile limit \(1\)"):
        codec.encode(x.double())


def test_copies_start_anew(traced):
    codec = NF4(16)
    x = torch.randn(1, 640, generator=rng(0, "x"))
    payload, _ = both(codec, x)
    for twin in (pickle.loads(pickle.dumps(codec)), copy.deepcopy(codec)):
        assert twin == codec and torch.equal(twin.encode(x), payload)
