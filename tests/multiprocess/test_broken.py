"""What is heard of ranks that are slow or gone, on three gloo processes."""

import pytest
import torch

from tests.multiprocess.broken import TIMEOUT_S
from tests.torchrun import torchrun


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What rank 2 heard of rank 1."""
    out = tmp_path_factory.mktemp("broken")
    torchrun(3, "tests/multiprocess/broken.py", str(out))
    return torch.load(out / "heard.pt")


def test_the_time_out_holds_in_smaller_views_too(results):
    """For a message in one, and for the first, which its members must all come to."""
    assert results["slow"] == ["Late", "Late"]
    assert results["slow_s"] < 4 * TIMEOUT_S


def test_who_waits_hears_that_a_peer_is_gone(results):
    assert results["gone"] == dict.fromkeys(results["gone"], "PeerLost")


def test_who_came_first_is_named_by_its_rank_in_the_world(results):
    assert results["source"] == 1
