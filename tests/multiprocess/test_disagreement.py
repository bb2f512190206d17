"""Replicas that were not started alike refuse to train, each of them, with exit code 2."""

import pytest

from tests.multiprocess.launch import launch, write_tiny

DRIFTING = ["--model", "lowcomm.models.module.Module", "--model.path", "tests.multiprocess.drifting.Drifting"]
CASES = {
    "config": ([[], ["--optimizer.args.lr", "1e-3"]], "the config of ranks [1] differs from rank 0's"),
    "model": ([DRIFTING, DRIFTING], "the model of ranks [1] differs from rank 0's"),
}


@pytest.mark.parametrize("what", CASES)
def test_replicas_that_differ_are_refused(what, tmp_path):
    by_rank, message = CASES[what]
    config = write_tiny(tmp_path)
    ended = launch(["train", "--config", str(config), "--out", str(tmp_path / "out")], by_rank=by_rank)
    assert ended.codes == [2, 2], ended.errors
    for rank, error in enumerate(ended.errors):
        assert message in error and len(error.strip().splitlines()) == 1, error
        assert error.startswith("lowcomm: error:" if rank == 0 else "lowcomm (rank 1): error:")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
