"""What a replica of the training loop costs in timing alone does not grow with how many others there are."""

import json
import sys
import tracemalloc

import pytest

from lowcomm import DiLoCo, DroppedRounds, Reducer
from lowcomm.config import Checkpointing, Run
from lowcomm.models.llama import Llama
from lowcomm.sim.cluster.presets import Home
from lowcomm.sim.simulate import simulate
from lowcomm.sim.wire.collectives import MANY
from tests.compressors import Cast, Identity

FEW, MORE = 80, 240


def run_of(compressor, dropped=None):
    algorithm = DiLoCo(every=1, reducer=Reducer(compressor), dropped=dropped)
    # large enough that 16-bit chunks of the model are worth while on so many ranks
    return Run(model=Llama("500k"), algorithm=algorithm, checkpoint=Checkpointing(every=0), num_steps=2)


def calls_of(action):
    """How many calls of functions it made, of Python or of C."""
    num_calls = 0

    def count(frame, event, argument):
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(before)
    return num_calls


@pytest.mark.parametrize("compressor", [Identity(), Cast()], ids=["fp32", "bf16"])
def test_calls_and_flows_of_a_rank_are_as_many_among_more(compressor, tmp_path):
    assert FEW > MANY
    run = run_of(compressor)
    simulate(run, Home(num_hosts=2), tmp_path / "first", timing_only=True)  # what is imported and cached once
    calls, flows = {}, {}
    for num_ranks in (FEW, MORE):
        out, cluster = tmp_path / str(num_ranks), Home(num_hosts=num_ranks)
        calls[num_ranks] = calls_of(lambda out=out, cluster=cluster: simulate(run, cluster, out, timing_only=True))
        events = json.loads((out / "trace.json").read_text())["traceEvents"]
        flows[num_ranks] = sum(event.get("cat") == "flow" for event in events)
    num_exchanges = 2 + (2 if compressor == Identity() else 4)  # at the start, in the evaluation, and in two rounds
    assert flows == {n: n * num_exchanges for n in (FEW, MORE)}
    assert (calls[MORE] - calls[FEW]) / (MORE - FEW) <= 1.05 * calls[FEW] / FEW


@pytest.mark.parametrize(
    ("compressor", "dropped"), [(Identity(), None), (Cast(), DroppedRounds(0.1))], ids=["fp32", "bf16, dropped"]
)
def test_a_rank_takes_as_much_memory_among_more(compressor, dropped, tmp_path):
    run = run_of(compressor, dropped)
    simulate(run, Home(num_hosts=2), tmp_path / "first", timing_only=True)
    peaks = {}
    for num_ranks in (FEW, MORE):
        tracemalloc.start()
        try:
            simulate(run, Home(num_hosts=num_ranks), tmp_path / str(num_ranks), timing_only=True)
            peaks[num_ranks] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert (peaks[MORE] - peaks[FEW]) / (MORE - FEW) <= 1.1 * peaks[FEW] / FEW
