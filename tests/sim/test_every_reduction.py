"""Every compressor x feedback x method on four simulated ranks; on gloo, and on two: tests/multiprocess."""

import pytest

from tests.same_code.every_reduction import simulated


@pytest.mark.timeout(500)  # about 80 s on an idle core
def test_all_simulated_ranks_agree_after_each_round():
    """`run_all` compares the ranks."""
    assert len(simulated(4)) > 300
