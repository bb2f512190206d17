"""Streaming DiLoCo against references of explicit replicas, and what must hold while averages are under way."""

import copy
from functools import partial

import pytest
import torch

from lowcomm.algorithms.base import step
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.algorithms.streaming_diloco import StreamingDiLoCo
from lowcomm.codecs.absmax import Absmax
from lowcomm.codecs.e3m0 import E3M0
from lowcomm.comm.echo import EchoComm
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.comm.solo import SoloComm
from lowcomm.compress.cast import Cast
from lowcomm.compress.gathered import Gathered
from lowcomm.compress.hierarchical import Hierarchical
from lowcomm.compress.power_sgd import PowerSGD
from lowcomm.compress.quantized import Quantized
from lowcomm.feedback.ef14 import EF14
from lowcomm.outer.nesterov import Nesterov
from lowcomm.outer.sgd import SGD
from lowcomm.reduce import Reducer
from lowcomm.rounds.fragments import cut, offsets
from lowcomm.tensors import digest
from tests.replicas import adamw, flat, make_batch, make_engine, make_model, mse, scripted_engine, train
from tests.world import run_world

N, STEPS, LR, MOMENTUM = 3, 13, 0.4, 0.9
NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]  # of the small model: blocks 0 and 2


class Replica:
    """One replica of the reference, with anchors and momenta of its own."""

    def __init__(self):
        self.model = make_model()
        self.optimizer = adamw(list(self.model.parameters()))
        self.anchor = [p.detach().clone() for p in self.model.parameters()]
        self.momentum = [torch.zeros_like(a) for a in self.anchor]

    def step(self, rank, t):
        self.optimizer.zero_grad()
        mse(self.model, make_batch(rank, t)).backward()
        self.optimizer.step()

    def delta(self, numbers):
        params = list(self.model.parameters())
        return {i: self.anchor[i] - params[i].detach() for i in numbers}

    def outer(self, mean):
        for i, x in mean.items():
            self.momentum[i] = MOMENTUM * self.momentum[i] + x
            self.anchor[i] = self.anchor[i] - LR * (x + MOMENTUM * self.momentum[i])

    def blend(self, numbers, share):
        params = list(self.model.parameters())
        for i in numbers:
            params[i].data = share * params[i].data + (1 - share) * self.anchor[i]


def mean_of(deltas):
    return {i: sum(d[i] for d in deltas) / len(deltas) for i in deltas[0]}


def reference(*, every, delays, blend, fragments, firsts, num_steps=STEPS):
    """Algorithm 2 line by line; `firsts` are the steps of the first syncs. Parameters by rank and step, and at last."""
    replicas = [Replica() for _ in range(N)]
    sent = [None] * len(fragments)  # the step and the mean of the last deltas
    applied = [[0] * N for _ in fragments]  # the step of the deltas that each replica applied last
    trace = [[] for _ in replicas]

    def apply(p, m):
        if sent[p] is not None and applied[p][m] < sent[p][0]:
            replicas[m].outer(sent[p][1])
            applied[p][m] = sent[p][0]
        replicas[m].blend(fragments[p], blend)

    def take(p, t):
        mean = mean_of([r.delta(fragments[p]) for r in replicas])
        for m in range(N):
            if delays[m] == every:
                apply(p, m)
        sent[p] = (t, mean)

    for t in range(1, num_steps + 1):
        for rank, replica in enumerate(replicas):
            replica.step(rank, t)
        for p, first in enumerate(firsts):
            if t >= first and (t - first) % every == 0:
                take(p, t)
        for p in range(len(fragments)):
            for m in range(N):
                if sent[p] is not None and t == sent[p][0] + delays[m] and delays[m] < every:
                    apply(p, m)
        for rank, r in enumerate(replicas):
            trace[rank].append(flat(list(r.model.parameters())))

    for p in range(len(fragments)):
        for m in range(N):
            if sent[p] is not None and applied[p][m] < sent[p][0] and delays[m] < every:
                apply(p, m)
        age = num_steps if sent[p] is None else num_steps - sent[p][0]
        discarded = sent[p] is not None and blend == 0 and max(delays) < every and age <= min(delays)
        if age > 0 and not discarded:
            take(p, num_steps)
        for m in range(N):
            if sent[p] is not None and applied[p][m] < sent[p][0]:
                apply(p, m)
    for rank, r in enumerate(replicas):
        trace[rank].append(torch.cat([a.reshape(-1) for a in r.anchor]))
    return trace


@pytest.mark.parametrize("blend", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("delays", [[0] * N, [1] * N, [3] * N, [5] * N, [0, 2, 4], [1, 5, 3]], ids=str)
@pytest.mark.parametrize(
    "options", [{"blocks_per_fragment": 1}, {}, {"blocks_per_fragment": 1, "first_round_guard": False}], ids=str
)
def test_it_is_the_reference(blend, delays, options):
    fragments = cut(NAMES, options.get("blocks_per_fragment", 3), "strided")
    guard = 5 if options.get("first_round_guard", True) else 0
    firsts = [guard + offset or 5 for offset in offsets(len(fragments), 5)]
    assert firsts == {1: [5], 2: [5, 7 if guard else 2]}[len(fragments)]
    expected = reference(every=5, delays=delays, blend=blend, fragments=fragments, firsts=firsts)
    same = len(set(delays)) == 1
    algorithm = StreamingDiLoCo(
        5, delay=delays[0], delays=None if same else delays, blend=blend, outer=Nesterov(LR, MOMENTUM), **options
    )
    got = run_world(N, lambda comm: train(algorithm, comm, STEPS, adamw))
    for rank in range(N):
        for t, (a, b) in enumerate(zip(got[rank], expected[rank], strict=True)):
            assert torch.allclose(a, b, rtol=0, atol=1e-12), f"rank {rank}, step {t + 1}"


@pytest.mark.parametrize("num_steps", [12, 14])
def test_a_delay_of_a_whole_round_is_the_update_that_is_one_outer_step_late(num_steps):
    """Theta(r) = outer(Theta(r - 1), delta(r - 1)) by a loop over rounds that knows no fragments."""
    every, replicas = 3, [Replica() for _ in range(N)]
    late = {i: torch.zeros_like(a) for i, a in enumerate(replicas[0].anchor)}
    expected = []
    for start in range(0, num_steps, every):
        for t in range(start + 1, min(start + every, num_steps) + 1):
            for rank, r in enumerate(replicas):
                r.step(rank, t)
        mean = mean_of([r.delta(range(4)) for r in replicas])
        for r in replicas:
            r.outer(late)
            r.blend(range(4), 0.0)
        late = mean
        expected.append(flat(replicas[0].anchor))
    replicas[0].outer(late)
    expected.append(flat(replicas[0].anchor))

    algorithm = StreamingDiLoCo(every, delay=every, blend=0.0, blocks_per_fragment=None, outer=Nesterov(LR, MOMENTUM))
    for got in run_world(N, lambda comm: train(algorithm, comm, num_steps, adamw)):
        rounds = got[every - 1 : num_steps : every]
        for a, b in zip(rounds, expected, strict=False):
            assert torch.allclose(a, b, rtol=0, atol=1e-12)
        assert torch.allclose(got[-1], expected[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("reducer", [Reducer(), Reducer(Cast(), bucket_bytes=64), Reducer(Gathered(E3M0()), EF14())])
@pytest.mark.parametrize("every", [1, 4, 20])
def test_one_fragment_without_delay_and_blend_is_diloco_bit_for_bit(reducer, every):
    outer = Nesterov(LR, MOMENTUM)
    streaming = StreamingDiLoCo(every, 0, blend=0.0, blocks_per_fragment=None, outer=outer, reducer=reducer)
    expected = run_world(N, lambda comm: train(DiLoCo(every, outer, reducer), comm, STEPS, adamw))
    for xs, ys in zip(expected, run_world(N, lambda comm: train(streaming, comm, STEPS, adamw)), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def test_fragments_that_are_synced_at_once_are_diloco_bit_for_bit():
    """With a round of one step all offsets are 0."""
    outer = Nesterov(LR, MOMENTUM)
    streaming = StreamingDiLoCo(1, 0, blend=0.0, blocks_per_fragment=1, outer=outer)
    assert len(cut(NAMES, 1, "strided")) == 2
    expected = run_world(N, lambda comm: train(DiLoCo(1, outer), comm, STEPS, adamw))
    for xs, ys in zip(expected, run_world(N, lambda comm: train(streaming, comm, STEPS, adamw)), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


@pytest.mark.parametrize("delay", [0, 2, 4])
def test_a_blend_of_1_leaves_replicas_alone_while_anchors_move(delay):
    def program(comm):
        engine, algorithm = make_engine(adamw), StreamingDiLoCo(4, delay, blend=1.0, blocks_per_fragment=1)
        state = algorithm.init(engine, comm)
        first, alone = flat(state.anchor), make_engine(adamw)
        for t in range(1, STEPS + 1):
            alone.backward(make_batch(comm.rank, t))
            alone.update()
            step(algorithm, t, engine, state, comm, make_batch(comm.rank, t))
            assert torch.equal(flat(engine.slots()["param"]), flat(alone.slots()["param"]))
        assert not torch.equal(first, flat(state.anchor))

    run_world(2, program)


def scripted(steps, algorithm, gradient=-2.0):
    """A single parameter from 0 under a given gradient with lr 1: its value after each step, and the anchor's."""
    engine = scripted_engine()
    state, comm, values = algorithm.init(engine, SoloComm()), SoloComm(), []
    for t in range(1, steps + 1):
        step(algorithm, t, engine, state, comm, torch.tensor(gradient, dtype=torch.float64))
        values.append((float(engine.slots()["param"][0]), float(state.anchor[0])))
    return values


def test_a_scripted_gradient_by_hand():
    """Each step adds 2. Sent at 4: delta 0 - 8. Applied at 6: anchor 0 + 0.5 x 8, then 0.25 x 12 + 0.75 x 4.

    Sent at 8: delta 4 - (6 + 4); applied at 10: anchor 4 + 0.5 x 6, then 0.25 x (6 + 8) + 0.75 x 7.
    """
    values = scripted(10, StreamingDiLoCo(4, 2, blend=0.25, outer=SGD(0.5)))
    assert values[:5] == [(2.0 * t, 0.0) for t in range(1, 6)]
    assert values[5] == (6.0, 4.0)
    assert values[6:9] == [(8.0, 4.0), (10.0, 4.0), (12.0, 4.0)]
    assert values[9] == (0.25 * 14 + 0.75 * 7, 7.0)


WIRES = [
    Reducer(Gathered(E3M0(block=8))),
    Reducer(Gathered(Absmax(4, block=8, stochastic=True))),
    Reducer(Quantized(Absmax(4, block=8)), EF14(), bucket_bytes=64),
    Reducer(PowerSGD(1), EF14(), bucket_bytes=64),
    Reducer(PowerSGD(1, num_iterations=2), EF14()),
    Reducer(Hierarchical(2, Cast(), Quantized(Absmax(4, block=8)))),
]


def digests(state):
    """Of each fragment's anchor and outer state."""
    return [digest([*(state.anchor[i] for i in f.numbers), *f.outer.buffer]) for f in state.fragments]


def synced(algorithm, num_steps, comm):
    """The digests after every step, and at last."""
    engine = make_engine(adamw)
    state = algorithm.init(engine, comm)
    found = []
    for t in range(1, num_steps + 1):
        step(algorithm, t, engine, state, comm, make_batch(comm.rank, t))
        found.append(digests(state))
    algorithm.finish(num_steps, engine, state, comm)
    found.append(digests(state))
    assert digest(state.anchor) == digest(engine.slots()["param"])
    return found


@pytest.mark.parametrize("reducer", WIRES, ids=str)
@pytest.mark.parametrize("delay", [1, 3, 4])
def test_anchors_and_outer_states_are_equal_on_all_ranks_after_every_step(reducer, delay):
    algorithm = StreamingDiLoCo(4, delay, blend=0.5, blocks_per_fragment=1, reducer=reducer)
    traces = run_world(4, partial(synced, algorithm, 18))
    assert all(trace == traces[0] for trace in traces)
    for p in range(2):
        assert len({found[p] for found in traces[0]}) >= 5, "it moved"


@pytest.mark.parametrize("reducer", WIRES, ids=str)
@pytest.mark.parametrize("delays", [[0, 1, 2, 3], [3, 1, 4, 2], [4, 3, 4, 3]], ids=str)
@pytest.mark.parametrize("num_steps", [16, 19])
def test_with_delays_of_their_own_ranks_pass_through_the_same_anchors_at_other_times(reducer, delays, num_steps):
    algorithm = StreamingDiLoCo(4, delays=delays, blend=0.5, blocks_per_fragment=1, reducer=reducer)
    traces = run_world(4, partial(synced, algorithm, num_steps))
    assert all(trace[-1] == traces[0][-1] for trace in traces), "the end"
    for p in range(2):
        sequences = [list(dict.fromkeys(found[p] for found in trace[:-1])) for trace in traces]
        longest = max(sequences, key=len)
        assert len(longest) >= 3 and all(sequence == longest[: len(sequence)] for sequence in sequences)
        assert all(len(sequence) >= len(longest) - 1 for sequence in sequences)
        times = [[found[p] for found in trace].index(longest[1]) + 1 for trace in traces]
        # a delay of a whole round applies the first delta where the second is sent
        assert times == [4 + 2 * p + delay for delay in delays]


@pytest.mark.parametrize("reducer", [Reducer(), Reducer(Cast(), bucket_bytes=16)])
@pytest.mark.parametrize("blend", [0.0, 0.3, 0.5, 1.0])
def test_zero_local_steps_change_nothing_in_bf16(reducer, blend):
    def idle(comm):
        engine = make_engine(dtype=torch.bfloat16)
        algorithm = StreamingDiLoCo(2, 1, blend=blend, blocks_per_fragment=1, reducer=reducer)
        state = algorithm.init(engine, comm)
        with torch.no_grad():
            for a, p in zip(state.anchor, engine.slots()["param"], strict=True):
                a.mul_(1 + 2**-12)
                p.copy_(a)
        assert all(a.dtype == torch.float32 for a in state.anchor)
        assert any(not torch.equal(a, a.bfloat16().float()) for a in state.anchor)
        before = copy.deepcopy([*state.anchor, *engine.slots()["param"]])
        for t in range(1, 8):
            algorithm.after_update(t, engine, state, comm)
        algorithm.finish(7, engine, state, comm)
        assert algorithm.num_rounds(state) >= 6
        return before, [*state.anchor, *engine.slots()["param"]]

    for before, after in run_world(2, idle):
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("delay", [0, 1, 3, 4])
@pytest.mark.parametrize(("num_steps", "blend"), [(3, 0.0), (3, 1.0), (8, 1.0), (9, 1.0), (11, 1.0)])
def test_nothing_that_replicas_keep_is_lost_at_the_end(delay, num_steps, blend):
    """Replicas that load nothing, and an outer step that only averages: the end is the mean of the replicas."""
    algorithm = StreamingDiLoCo(4, delay, blend=blend, blocks_per_fragment=1, outer=SGD(1.0))
    got = run_world(N, lambda comm: train(algorithm, comm, num_steps, adamw))
    if delay < 4:  # otherwise the last two deltas overlap
        mean = torch.stack([trace[-2] for trace in got]).mean(0)
        assert torch.allclose(got[0][-1], mean, rtol=0, atol=1e-12)
    assert all(torch.equal(trace[-1], got[0][-1]) for trace in got)


@pytest.mark.parametrize("k", [2, 4])
def test_k_identical_replicas_are_one(k):
    algorithm = StreamingDiLoCo(4, 2, blocks_per_fragment=1)
    alone = train(algorithm, SoloComm(), STEPS, adamw, data_rank=0)
    for got in run_world(k, lambda comm: train(algorithm, comm, STEPS, adamw, data_rank=0)):
        assert all(torch.equal(a, b) for a, b in zip(alone, got, strict=True))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_traffic_is_that_of_the_closed_form(num_ranks):
    """Fragments of 35 and 6 parameters, each 3 times: codes of 4 bits, a byte for each 8, a flag to each rank."""
    algorithm = StreamingDiLoCo(4, 1, blocks_per_fragment=1, reducer=Reducer(Gathered(E3M0(block=8))))
    meter = Meter()
    train(algorithm, MeteredComm(EchoComm(num_ranks), meter), 11)
    codes = (4 * (4 + 1) + 2 + 1) + (3 + 1)
    flags = 2 * (num_ranks - 1)  # of both fragments
    assert meter.bytes_sent == 3 * ((num_ranks - 1) * codes + flags)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every is 0"),
        ({"every": 3, "delay": 4}, "at most every, 3"),
        ({"delay": -1}, "a delay of -1"),
        ({"delays": [1, 101]}, "a delay of 101"),
        ({"every": 4, "delay": 4, "overlap": True}, "must be below every, 4.*one step less"),
        ({"every": 4, "delays": [1, 4], "overlap": True}, "a delay of 4 inner steps with overlap=True"),
        ({"blend": 1.5}, r"blend is 1.5; it must lie within \[0, 1\]"),
        ({"blocks_per_fragment": 0}, "blocks_per_fragment is 0"),
        ({"pattern": "random"}, "choose 'strided' or 'sequential'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        StreamingDiLoCo(**options)


def test_delays_are_one_for_each_replica():
    with pytest.raises(ValueError, match="delays has 3 entries for 1 replicas"):
        StreamingDiLoCo(delays=[1, 2, 3]).init(make_engine(), SoloComm())
