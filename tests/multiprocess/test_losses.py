"""Of three gloo processes one is killed in a round, and the other two go on to one end."""

import os
import subprocess
import sys

import pytest

from lowcomm.metrics import read
from tests.multiprocess.launch import ROOT, free_port, launch, write_tiny

LOST = 2


# in the first rounds, in the middle, at the end
@pytest.mark.parametrize("call", [3, 6, 10])
def test_a_run_goes_on(call, tmp_path):
    flags = ["train", "--config", str(write_tiny(tmp_path)), "--on_loss", "go_on", "--grace_s", "5"]
    ended = launch([*flags, "--out", str(tmp_path / "out")], 3, f"{LOST}:call:{call}:SIGKILL")
    assert ended.codes == [0, 0, -9], ended.errors
    ends = [read(tmp_path / "out" / name)[-1] for name in ("metrics.jsonl", "metrics.replica00001.jsonl")]
    assert all(end["kind"] == "summary" and end["t"] == 40 and end["members"] == 2 for end in ends)
    same = ("val_loss", "tokens", "round")
    assert [ends[0][key] for key in same] == [ends[1][key] for key in same]
    assert 2 * 40 * 64 <= ends[0]["tokens"] < 3 * 40 * 64, "those of the lost one count up to its loss"


def test_a_run_that_may_not_go_on_stops(tmp_path):
    flags = ["train", "--config", str(write_tiny(tmp_path)), "--out", str(tmp_path / "out")]
    ended = launch(flags, 3, f"{LOST}:call:6:SIGKILL")
    assert ended.codes == [1, 1, -9], ended.errors


@pytest.mark.parametrize("call", [7, 8])
def test_loops_of_ones_own_go_on(call, tmp_path):
    port, processes = free_port(), []
    for rank in range(3):
        variables = {"RANK": rank, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = os.environ | {name: str(value) for name, value in variables.items()} | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.multiprocess.attached", str(rank), str(call), str(tmp_path)]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=env))
    try:
        codes = [process.wait(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0, -9]
    first, second = ((tmp_path / str(rank)).read_text() for rank in (0, 1))
    assert first == second and first.startswith("2 ")
