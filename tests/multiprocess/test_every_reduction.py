"""Every compressor x feedback x method, in the simulator and on gloo processes."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from lowcomm.sim.clock import Clock
from lowcomm.sim.comm import World
from tests.same_code.every_reduction import run_all

ROOT = Path(__file__).resolve().parents[2]


def simulated(num_ranks: int) -> dict[str, list[str]]:
    """The digests of rank 0; `run_all` compares the ranks."""
    clock = Clock()
    world = World(clock)
    for rank in range(num_ranks):
        clock.spawn(rank, partial(run_all, world.comm(rank, range(num_ranks))))
    return clock.run()[0]


@pytest.mark.timeout(500)  # about 50 s each on two idle cores
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_all_ranks_agree_after_each_round(num_ranks, tmp_path):
    """On two ranks, where a sum has one order only, gloo also computes bit for bit what the simulator does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    done = subprocess.run(
        [*command, "tests/same_code/every_reduction.py", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    gloo = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]
    assert all(digests == gloo[0] for digests in gloo)
    in_simulator = simulated(num_ranks)
    assert in_simulator.keys() == gloo[0].keys() and len(gloo[0]) > 300
    if num_ranks == 2:
        differing = [name for name, digests in in_simulator.items() if digests != gloo[0][name]]
        assert not differing, differing
