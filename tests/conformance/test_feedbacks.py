"""The laws of every feedback, around every compressor."""

import copy

import pytest
import torch

from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.comm.base import PeerLost
from lowcomm.comm.echo import EchoComm
from lowcomm.reduce import Reducer
from lowcomm.state import restore, state_tree
from lowcomm.tensors import digest, rng
from tests.compressors import Cast, EF21Plus, Identity, PowerSGD, Quantized, TopK, all_compressors, all_feedbacks
from tests.replicas import make_batch, make_engine, tensors_in
from tests.world import run_world

SHAPES = [(3, 4), (0,), (), (37,), (3, 4)]
FEW = [Identity(), Cast("bfloat16"), Quantized(), TopK(num=2, chunk=16), EF21Plus()]


def tensors(rank, round, scale=1.0):
    generator = rng(1, "feedback", rank, round)
    return [scale * torch.randn(shape, generator=generator) for shape in SHAPES]


def rounds(reducer, state, comm, numbers):
    """The means of each round and the last state."""
    found = []
    for number in numbers:
        means, state = reducer.mean(tensors(comm.rank, number), state, comm).result()
        found.append(digest(means))
    return found, state


# every feedback with some compressors, and every compressor with one of them
PAIRS = [(feedback, compressor) for feedback in all_feedbacks() for compressor in FEW]
PAIRS += [(all_feedbacks()[i % len(all_feedbacks())], compressor) for i, compressor in enumerate(all_compressors())]


@pytest.fixture(params=all_feedbacks(), ids=str)
def feedback(request):
    return request.param


@pytest.mark.parametrize(("feedback", "compressor"), PAIRS, ids=str)
def test_ranks_agree_bit_for_bit(feedback, compressor):
    reducer = Reducer(compressor, feedback)
    results = run_world(3, lambda comm: rounds(reducer, reducer.init(tensors(0, 0)), comm, range(1, 5))[0])
    assert results[0] == results[1] == results[2]
    assert len(set(results[0])) == 4, "what differs from round to round has the same mean"


@pytest.mark.parametrize(("feedback", "compressor"), PAIRS, ids=str)
def test_shapes_without_values_pass(feedback, compressor):
    """As when traffic is predicted; also after the round that may be dense."""
    reducer, xs = Reducer(compressor, feedback), [torch.empty(shape, device="meta") for shape in SHAPES]
    state = reducer.init(xs)
    for _ in range(2):
        means, state = reducer.mean(xs, state, EchoComm(3)).result()
        assert [(m.shape, m.dtype, m.is_meta) for m in means] == [(x.shape, x.dtype, True) for x in xs]
    reducer.resync(state, EchoComm(3)).result()


def test_states_are_not_modified_and_share_nothing_with_the_means(feedback):
    for compressor in FEW:
        check_states(Reducer(compressor, feedback), EchoComm(2))


def check_states(reducer, comm):
    state = reducer.init(tensors(0, 0))
    for number in range(1, 4):
        before = digest(tensors_in(state))
        means, after = reducer.mean(tensors(0, number), state, comm).result()
        again, _ = reducer.mean(tensors(0, number), state, comm).result()
        reducer.resync(state, comm).result()
        assert digest(means) == digest(again), "a round that failed would start again from another state"
        assert digest(tensors_in(state)) == before
        kept = digest(tensors_in(after))
        for mean in means:
            mean.fill_(7.0)
        assert digest(tensors_in(after)) == kept, "a mean is the caller's, the state is not"
        state = after


@pytest.mark.parametrize("compressor", FEW, ids=str)
def test_only_a_commit_changes_anything_and_in_place_it_does_what_it_does_with_a_copy(feedback, compressor):
    reducer, comm = Reducer(compressor, feedback), EchoComm(2)
    state = reducer.init(tensors(0, 0))
    for number in range(1, 5):
        before = digest(tensors_in(state))
        means, after = reducer.mean(tensors(0, number), state, comm).result()
        arrived = reducer.arrival(tensors(0, number), state, comm).result()
        assert digest(tensors_in(state)) == before, "others may be lost when this average has arrived"
        found, state = arrived.commit(in_place=True)
        assert digest(found) == digest(means)
        assert digest(tensors_in(state)) == digest(tensors_in(after))
        for mean in found:
            mean.fill_(7.0)
        assert digest(tensors_in(state)) == digest(tensors_in(after))


def test_a_round_that_one_process_of_a_replica_failed_leaves_all_as_it_was(feedback):
    """After its own messages have arrived; taken again, it is what it would have been."""

    class Failing(EchoComm):
        fails = False

        def agree(self, error):
            if self.fails:
                raise PeerLost("another process of this replica")

    def run(failing):
        method = DiLoCo(1, reducer=Reducer(TopK(num=2, chunk=16), feedback, bucket_bytes=64))
        engine, comm = make_engine(), Failing(2)
        state = method.init(engine, comm)

        def all_of():
            return digest([*engine.slots()["param"], *tensors_in(state)])

        for t in range(1, 4):
            engine.backward(make_batch(0, t))
            engine.update()
            before, comm.fails = all_of(), t in failing
            if comm.fails:
                with pytest.raises(PeerLost):
                    method.after_update(t, engine, state, comm)
                method.forgo(state)
                comm.fails = False
                assert all_of() == before
            method.after_update(t, engine, state, comm)
        return all_of()

    assert run({1, 3}) == run(set())


def test_members_that_stay_lose_nothing_when_they_meet_again(feedback):
    reducer, comm = Reducer(TopK(num=2, chunk=16), feedback), EchoComm(2)
    _, state = rounds(reducer, reducer.init(tensors(0, 0)), comm, range(1, 4))
    again = reducer.resync(state, comm).result()
    assert digest(tensors_in(again)) == digest(tensors_in(state))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compressor", [TopK(num=2, chunk=16), PowerSGD(1, min_compression=1), EF21Plus()], ids=str)
def test_means_keep_the_dtype_and_memories_have_32_bits_or_more(feedback, compressor, dtype):
    """Values as large as scaled gradients, of which float16 could not hold the squares."""

    def drawn(number):
        return [x.to(dtype) for x in tensors(0, number, scale=300.0)]

    reducer, wide = Reducer(compressor, feedback), torch.promote_types(dtype, torch.float32)
    state = reducer.init(drawn(0))
    for number in range(1, 4):
        means, state = reducer.mean(drawn(number), state, EchoComm(2)).result()
        assert all(mean.dtype == dtype and mean.isfinite().all() for mean in means)
        assert {x.dtype for x in tensors_in(state)} <= {wide, torch.uint8}


def test_zeros_stay_zero(feedback):
    for compressor in FEW:
        reducer, xs = Reducer(compressor, feedback), tensors(0, 0, scale=0.0)
        state = reducer.init(xs)
        for _ in range(3):
            means, state = reducer.mean(xs, state, EchoComm(2)).result()
            assert all(mean.count_nonzero() == 0 for mean in means), compressor


@pytest.mark.parametrize("compressor", FEW, ids=str)
def test_a_state_restored_in_the_middle_goes_on_bitwise(feedback, compressor):
    reducer, stop = Reducer(compressor, feedback), 2

    def program(comm):
        whole, _ = rounds(reducer, reducer.init(tensors(0, 0)), comm, range(1, 7))
        first, state = rounds(reducer, reducer.init(tensors(0, 0)), comm, range(1, stop + 1))
        tree = copy.deepcopy(state_tree(state))
        rounds(reducer, state, comm, range(8, 10))  # what happens later to the state that was saved is no matter
        second, _ = rounds(reducer, restore(reducer.init(tensors(0, 0)), tree), comm, range(stop + 1, 7))
        return whole, first + second

    for whole, parts in run_world(2, program):
        assert whole == parts
