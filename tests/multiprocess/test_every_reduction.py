"""Every compressor x feedback x method on gloo processes, beside the simulator."""

import json

import pytest

from tests.same_code.every_reduction import simulated
from tests.torchrun import torchrun


@pytest.mark.timeout(500)  # about 50 s each on two idle cores
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_all_ranks_agree_after_each_round(num_ranks, tmp_path):
    """On two ranks, where a sum has one order only, gloo also computes bit for bit what the simulator does."""
    torchrun(num_ranks, "tests/same_code/every_reduction.py", str(tmp_path), timeout_s=400)
    gloo = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]
    assert all(digests == gloo[0] for digests in gloo) and len(gloo[0]) > 300
    if num_ranks == 2:
        in_simulator = simulated(num_ranks)
        assert in_simulator.keys() == gloo[0].keys()
        differing = [name for name, digests in in_simulator.items() if digests != gloo[0][name]]
        assert not differing, differing
