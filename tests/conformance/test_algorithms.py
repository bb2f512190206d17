"""The laws of every algorithm."""

import copy
import inspect

import pytest
import torch
from torch.utils._pytree import tree_leaves

import lowcomm
from lowcomm.algorithms.base import Algorithm, step
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.algorithms.noloco import NoLoCo
from lowcomm.algorithms.sparta import SPARTA
from lowcomm.algorithms.streaming_diloco import StreamingDiLoCo
from lowcomm.comm.echo import EchoComm
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.comm.solo import SoloComm
from lowcomm.compress.power_sgd import PowerSGD
from lowcomm.compress.quantized import Quantized
from lowcomm.compress.top_k import TopK
from lowcomm.feedback.ef21 import EF21
from lowcomm.feedback.none import NoFeedback
from lowcomm.reduce import NonFinite, Reducer
from lowcomm.state import restore, state_tree
from lowcomm.tensors import digest
from tests.algorithms import all_algorithms, expected_rounds, inner_of
from tests.compressors import all_feedbacks
from tests.replicas import flat, make_batch, make_engine, make_model, mse, tensors_in, train
from tests.roles import players
from tests.world import Passing, run_world

STEPS = 11


@pytest.fixture(params=all_algorithms(), ids=str)
def algorithm(request):
    return request.param


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_all_ranks_end_with_the_same_parameters(algorithm, num_ranks):
    final = [
        trace[-1] for trace in run_world(num_ranks, lambda comm: train(algorithm, comm, STEPS, inner_of(algorithm)))
    ]
    assert all(torch.equal(final[0], x) for x in final)
    assert torch.isfinite(final[0]).all()


def test_all_ranks_refuse_a_nan_of_one(algorithm):
    def program(comm):
        engine = make_engine(inner_of(algorithm))
        state = algorithm.init(engine, comm)

        def steps():
            for t in range(1, STEPS + 1):
                if t == 3 and comm.rank == 1:
                    engine.slots()["param"][0].fill_(float("nan"))
                step(algorithm, t, engine, state, comm, make_batch(comm.rank, t))
            algorithm.finish(STEPS, engine, state, comm)

        with pytest.raises(NonFinite, match="to the round of step") as refused:
            steps()
        return refused.value.ranks, all(x.isfinite().all() for x in engine.slots()["param"])

    (other, untouched), (guilty, _) = run_world(2, program)
    assert other in ((), (1,)) and guilty == (1,) and untouched


def test_two_runs_are_bitwise_equal(algorithm):
    first, second = (run_world(3, lambda comm: train(algorithm, comm, STEPS, inner_of(algorithm))) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_state_restored_in_the_middle_of_a_run_goes_on_bitwise(algorithm, stop):
    def program(comm):
        def steps(engine, state, first, last):
            for t in range(first, last + 1):
                step(algorithm, t, engine, state, comm, make_batch(comm.rank, t))
            algorithm.settle(state)
            numbers = [x for x in tree_leaves(state_tree(state)) if not isinstance(x, torch.Tensor)]
            return numbers, digest([*engine.slots()["param"], *tensors_in(state)])

        engine = make_engine(inner_of(algorithm))
        state = algorithm.init(engine, comm)
        steps(engine, state, 1, stop)
        saved = copy.deepcopy((engine.state_dict(), state_tree(state)))
        expected = steps(engine, state, stop + 1, STEPS)

        fresh = make_engine(inner_of(algorithm))
        fresh_state = algorithm.init(fresh, comm)
        fresh.load_state_dict(saved[0])
        restore(fresh_state, saved[1])
        return expected, steps(fresh, fresh_state, stop + 1, STEPS)

    for expected, got in run_world(2, program):
        assert expected == got


OF_THREE = [DiLoCo(4, weights=[1.0, 2.0, 5.0]), StreamingDiLoCo(4, delays=[3, 1, 2]), NoLoCo(4, finalize="pick")]


@pytest.mark.parametrize("algorithm", [*all_algorithms(), *OF_THREE], ids=str)
def test_some_of_the_ranks_do_what_a_world_of_as_many_does(algorithm):
    """A replica's place among the members counts, not its rank."""
    members = (1, 3, 4)

    def program(comm):
        if comm.rank not in members:
            return []
        return train(algorithm, comm.sub(members), STEPS, inner_of(algorithm), members.index(comm.rank))

    expected = run_world(3, lambda comm: train(algorithm, comm, STEPS, inner_of(algorithm)))
    got = run_world(5, program)
    for rank, trace in zip(members, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(got[rank], trace, strict=True))


class Watched(Passing):
    """Keeps what was started and not waited for yet."""

    def __init__(self, inner):
        super().__init__(inner)
        self.pending = []

    def issue(self, call):
        work = super().issue(call)
        wait = work.wait

        def waited():
            self.pending = [other for other in self.pending if other is not work]
            return wait()

        work.wait = waited
        self.pending.append(work)
        return work


def test_all_that_was_started_is_waited_for(algorithm):
    """Before a checkpoint, and at the end of a run, which here is that of a round."""

    def program(comm):
        watched, engine = Watched(comm), make_engine(inner_of(algorithm))
        state = algorithm.init(engine, watched)
        for t in range(1, 9):
            step(algorithm, t, engine, state, watched, make_batch(comm.rank, t))
            if t == 4:
                algorithm.settle(state)
                assert not watched.pending
        algorithm.finish(8, engine, state, watched)
        assert not watched.pending

    run_world(3, program)


def num_rounds(tree):
    """How often each bucket of a state was averaged, by compressors that count it."""
    if isinstance(tree, dict):
        mine = [tree["compressor"]] if tree.get("__class__") == "BucketState" else []
        return mine + [n for value in tree.values() for n in num_rounds(value)]
    return [n for value in tree for n in num_rounds(value)] if isinstance(tree, list) else []


def with_reducers(reducer, left_out=""):
    """Every class with each of its reducers but one: NoLoCo's of anchors begins anew at the end of a run."""
    options = {"DESLOC": {"periods": {"param": 2, "exp_avg": 3}}, "SPARTA": {"fraction": 0.3, "delay": 2}}
    for cls in players(Algorithm, "algorithms"):
        fields = inspect.signature(cls).parameters
        given = options.get(cls.__name__, {"every": 2} if "every" in fields else {})
        for name, field in fields.items():
            if isinstance(field.default, Reducer) and name != left_out:
                # it averages other values in each round
                yield cls(**given, **{name: Reducer(reducer.compressor) if cls is SPARTA else reducer})


@pytest.mark.parametrize("algorithm", list(with_reducers(Reducer(Quantized()), "anchors")), ids=str)
def test_what_a_reducer_keeps_goes_on_from_round_to_round(algorithm):
    def program(comm):
        engine = make_engine(inner_of(algorithm))
        state = algorithm.init(engine, comm)
        for t in range(1, STEPS + 1):
            step(algorithm, t, engine, state, comm, make_batch(comm.rank, t))
        algorithm.finish(STEPS, engine, state, comm)
        return [n for n in num_rounds(state_tree(state)) if n is not None]

    for found in run_world(2, program):
        assert found and min(found) >= 2


def memories(tree, is_kept=False):
    """The floating-point tensors of compressors and feedbacks in a `state_tree`."""
    if isinstance(tree, torch.Tensor):
        return [tree] if is_kept and tree.is_floating_point() else []
    is_kept |= isinstance(tree, dict) and tree.get("__class__") == "BucketState"
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else []
    return [found for value in values for found in memories(value, is_kept)]


WARM = Reducer(PowerSGD(1, min_compression=1), EF21())


@pytest.mark.parametrize("algorithm", list(with_reducers(WARM)), ids=str)
def test_memories_of_parameters_in_bfloat16_have_32_bits(algorithm):
    engine, comm = make_engine(inner_of(algorithm), torch.bfloat16), EchoComm(2)
    state = algorithm.init(engine, comm)
    for t in range(1, 6):
        step(algorithm, t, engine, state, comm, make_batch(0, t, torch.bfloat16))
    found = memories(state_tree(state))
    assert {x.dtype for x in found} <= {torch.float32} and (found or isinstance(algorithm, SPARTA))


@pytest.mark.parametrize("feedback", all_feedbacks(), ids=str)
def test_memories_of_hooks_have_32_bits(feedback):
    hook = lowcomm.fsdp_hook(Reducer(TopK(0.5), feedback), EchoComm(2))
    gradient = torch.ones(8, dtype=torch.bfloat16)
    for _ in range(2):
        hook.average("part", gradient)
    found = {x.dtype for x in memories(hook.state_dict())}
    has_none = isinstance(feedback, NoFeedback) or getattr(feedback, "memory", None) is not None
    assert found == (set() if has_none else {torch.float32}) and gradient.dtype == torch.bfloat16


def test_it_says_whether_it_ever_sends_in_backward(algorithm):
    engine, comm = make_engine(inner_of(algorithm)), SoloComm()
    state = algorithm.init(engine, comm)
    listeners = [algorithm.during_backward(t, engine, state, comm) for t in range(1, STEPS + 1)]
    assert algorithm.sends_in_backward() == any(x is not None for x in listeners)


def test_rounds_are_counted_and_traffic_is_that_of_an_echo(algorithm):
    """What `--dry_run` predicts is what a real world sends."""

    def traffic(comm):
        metered = MeteredComm(comm, Meter())
        engine = make_engine(inner_of(algorithm))
        state = algorithm.init(engine, metered)
        for t in range(1, STEPS + 1):
            step(algorithm, t, engine, state, metered, make_batch(comm.rank, t))
        algorithm.finish(STEPS, engine, state, metered)
        return algorithm.num_rounds(state), metered.meter.bytes_sent, metered.meter.bytes_received

    real = run_world(4, traffic)
    assert real[0] == traffic(EchoComm(4)) and len(set(real)) == 1
    assert real[0][0] == expected_rounds(algorithm, STEPS)
    assert traffic(SoloComm())[1:] == (0, 0), "alone there is nothing to send"


LONG = 100
BATCH = make_batch(99, 1, size=256)


def loss_of(params):
    model = make_model()
    with torch.no_grad():
        for p, x in zip(model.parameters(), params.split([p.numel() for p in model.parameters()]), strict=True):
            p.copy_(x.view(p.shape))
        return float(mse(model, BATCH))


def test_training_gets_somewhere(algorithm):
    """Finished parameters are well below the start: the centre moves, and the right way."""
    start = loss_of(flat(list(make_model().parameters())))
    finished = run_world(3, lambda comm: train(algorithm, comm, LONG, inner_of(algorithm)))[0][-1]
    assert loss_of(finished) < 0.65 * start


def test_replicas_on_equal_data_stay_equal(algorithm):
    """Where all compute the same, nothing may part them: what a step applies does not hang on a rank."""
    # four, so that nobody is left over from pairs, alone, with values that no code has rounded
    traces = run_world(4, lambda comm: train(algorithm, comm, STEPS, inner_of(algorithm), data_rank=0))
    for after in zip(*traces, strict=True):
        assert all(torch.allclose(after[0], x, rtol=0, atol=1e-12) for x in after)
