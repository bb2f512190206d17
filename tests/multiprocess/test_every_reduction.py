"""Every compressor with every feedback and under every method, on gloo processes and in the simulator."""

import json

import pytest

from tests.same_code.every_reduction import run_all
from tests.torchrun import torchrun
from tests.world import run_world


@pytest.mark.timeout(400)  # about 15 s each on two idle cores
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_all_ranks_agree_after_each_round(num_ranks, tmp_path):
    """On two ranks, where a sum has one order only, gloo also computes bit for bit what the simulator does."""
    torchrun(num_ranks, "tests/same_code/every_reduction.py", str(tmp_path), timeout_s=300)
    gloo = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]
    assert all(digests == gloo[0] for digests in gloo) and len(gloo[0]) > 250
    simulated = run_world(num_ranks, run_all)[0]
    differing = [name for name in simulated if simulated[name] != gloo[0][name]]
    assert simulated.keys() == gloo[0].keys() and (num_ranks > 2 or not differing), differing
