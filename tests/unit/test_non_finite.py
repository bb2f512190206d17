"""A round of values that a compressor cannot carry is refused on all ranks alike, and costs nothing."""

from functools import partial

import pytest
import torch

from lowcomm.comm.echo import EchoComm
from lowcomm.reduce import NonFinite, Reducer
from lowcomm.tensors import digest, rng
from tests.compressors import EF14, EF21, Absmax, Cast, EControl, Identity, PowerSGD, Quantized, TopK
from tests.replicas import tensors_in
from tests.world import run_world

SHAPES = [(4, 6), (9,), (3,)]


def tensors(rank, round):
    return [torch.randn(shape, generator=rng(0, rank, round)) for shape in SHAPES]


def stated(state):
    return [digest([x]) for x in tensors_in(state)]


@pytest.mark.parametrize("compressor", [Quantized(Absmax(8)), TopK(0.3), PowerSGD(2, min_compression=1)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("guilty", [(0,), (1, 2)])
def test_all_ranks_refuse_and_go_on(compressor, value, guilty):
    def program(comm):
        reducer = Reducer(compressor, EF14(), bucket_bytes=64)  # several buckets, of which one has the value
        _, state = reducer.mean(tensors(comm.rank, 1), reducer.init(tensors(0, 0)), comm).result()
        before = stated(state)
        bad = tensors(comm.rank, 2)
        if comm.rank in guilty:
            bad[1][4] = value
        with pytest.raises(NonFinite) as caught:
            reducer.mean(bad, state, comm).result()
        assert caught.value.ranks == guilty
        assert stated(state) == before
        means, _ = reducer.mean(tensors(comm.rank, 3), state, comm).result()
        return digest(means)

    def untroubled(comm):
        reducer = Reducer(compressor, EF14(), bucket_bytes=64)
        _, state = reducer.mean(tensors(comm.rank, 1), reducer.init(tensors(0, 0)), comm).result()
        return digest(reducer.mean(tensors(comm.rank, 3), state, comm).result()[0])

    assert run_world(3, program) == run_world(3, untroubled)


def test_a_smaller_view_names_who_it_was():
    def program(comm):
        if comm.rank == 0:
            return
        pair, reducer = comm.sub((1, 2)), Reducer(Quantized(Absmax(8)))
        x = torch.full((2,), float("nan") if comm.rank == 1 else 1.0)
        with pytest.raises(NonFinite) as caught:
            reducer.mean([x], reducer.init([x]), pair).result()
        assert caught.value.ranks == (1,)

    run_world(3, program)


def test_what_is_under_way_comes_to_its_end(monkeypatch):
    made, waited = [], []

    class Noted:
        def __init__(self, result):
            self.result = result
            made.append(self)

        def wait(self):
            waited.append(self)
            return self.result

    monkeypatch.setattr("lowcomm.comm.echo.Done", Noted)
    reducer, bad = Reducer(TopK(0.3), EF14(), bucket_bytes=64), tensors(0, 1)
    bad[1][4] = float("nan")
    with pytest.raises(NonFinite):
        reducer.mean(bad, reducer.init(bad), EchoComm(2)).result()
    assert len(made) == 3 and {id(work) for work in made} == {id(work) for work in waited}


def test_exact_means_carry_it():
    def program(comm):
        x = torch.full((2,), float("nan") if comm.rank == 1 else 1.0)
        (mean,), _ = Reducer(Identity()).mean([x], Reducer(Identity()).init([x]), comm).result()
        return mean

    assert all(mean.isnan().all() for mean in run_world(2, program))


@pytest.mark.parametrize("feedback", [EF14(), EF21(), EControl()], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("compressor", [Identity(), Cast()], ids=str)
def test_what_goes_through_is_not_remembered(compressor, feedback):
    def program(comm, rounds):
        reducer = Reducer(compressor, feedback)
        state = reducer.init(tensors(0, 0))
        for round in rounds:
            xs = tensors(comm.rank, round)
            if round == 3 and comm.rank == 1:
                xs[1][4] = float("inf")
            means, state = reducer.mean(xs, state, comm).result()
            assert (round == 3) == any(not mean.isfinite().all() for mean in means)
        return digest(means)

    troubled, untroubled = (run_world(2, partial(program, rounds=x)) for x in ([1, 2, 3, 4], [1, 2, 4]))
    assert troubled == untroubled
