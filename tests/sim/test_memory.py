"""Replicas moved off the device and back: the same bits, the same tensors, and nothing left behind."""

import json

import pytest
import torch

from lowcomm.cli import main
from lowcomm.sim.memory import Residence
from tests.multiprocess.launch import write_tiny

CPU = torch.device("cpu")
with_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, with_cuda])]


def test_the_longest_waiting_goes_first(tmp_path):
    x = {rank: torch.full((5,), float(rank)) for rank in range(3)}
    with Residence(CPU, 2, tmp_path) as residence:
        for rank in (0, 1, 0, 2):
            residence.enter(rank)
            residence.own(rank, lambda rank=rank: [x[rank]])
        assert [x[rank].untyped_storage().nbytes() for rank in range(3)] == [20, 0, 20]
        residence.enter(1)
        assert [x[rank].untyped_storage().nbytes() for rank in range(3)] == [0, 20, 20]
        assert x[1].tolist() == [1.0] * 5
        assert residence.num_moves == 2, "who is there is not moved"


def test_views_and_identities_outlive_a_move(tmp_path):
    flat = torch.arange(10, dtype=torch.float32)
    parts = list(flat.split([4, 6]))
    alias = flat.view(2, 5)
    with Residence(CPU, 1, tmp_path) as residence:
        residence.enter(0)
        residence.own(0, lambda: parts)
        residence.enter(1)
        assert flat.untyped_storage().nbytes() == 0
        residence.enter(0)
        parts[1][0] = -1.0
    assert alias.tolist() == [[0, 1, 2, 3, -1], [5, 6, 7, 8, 9]]
    assert residence.num_moves == 1 and residence.state_bytes == 40


def test_what_grows_and_shrinks_between_moves_is_followed(tmp_path):
    state = [torch.ones(3)]
    with Residence(CPU, 1, tmp_path) as residence:
        residence.own(0, lambda: state)
        for number in (1, 2, 3):
            residence.enter(0)
            assert [x.tolist() for x in state] == [[1.0] * 3, *[[2.0] * 1000] * (number - 1)]
            state.append(torch.full((1000,), 2.0))
            residence.enter(1)
        residence.enter(0)
        del state[1:]
        residence.enter(1)
        residence.enter(0)
        assert state[0].tolist() == [1.0] * 3


def test_memory_of_numpy_stays_and_is_counted(tmp_path):
    fixed, x = torch.ones(8), torch.ones(2)
    fixed.numpy()
    with Residence(CPU, 1, tmp_path) as residence:
        residence.enter(0)
        residence.own(0, lambda: [fixed, x])
        residence.enter(1)
        assert (fixed.untyped_storage().nbytes(), x.untyped_storage().nbytes()) == (32, 0)
    measured = residence.measured()
    assert (measured["state_bytes_per_replica"], measured["unmoved_bytes_per_replica"]) == (40, 32)


def test_somebody_must_be_there(tmp_path):
    with pytest.raises(ValueError, match="num_resident is 0; at least 1 replica"):
        Residence(CPU, 0, tmp_path)


# through `lowcomm simulate`


@pytest.fixture(params=DEVICES)
def flags(request, tmp_path):
    method = ["--algorithm", "DiLoCo", "--algorithm.every", "4", "--num_steps", "10", "--checkpoint.every", "0"]
    cluster = ["--cluster", "Home", "--cluster.num_hosts", "4", "--cluster.compute", "LogNormal"]
    return ["--config", str(write_tiny(tmp_path)), "--device", request.param, *method, *cluster]


def test_a_simulation_learns_the_same_with_one_or_two_replicas_in_memory(flags, request, tmp_path, capsys):
    written, moves = {}, {}
    for name, more in (("all", []), ("one", ["--num_resident", "1"]), ("two", ["--num_resident", "2"])):
        out = tmp_path / name
        assert main(["simulate", *flags, *more, "--out", str(out)]) == 0
        assert "MB a replica" in capsys.readouterr().out
        memory = json.loads((out / "environment.json").read_text())["memory"]
        assert memory["device"] == request.node.callspec.params["flags"] and memory["unmoved_bytes_per_replica"] == 0
        assert memory["peak_bytes"] > memory["state_bytes_per_replica"] > 0
        moves[name] = memory["num_moves"]
        assert not list(out.glob("moved_out_*"))
        written[name] = {x.name: x.read_bytes() for x in out.iterdir() if x.name != "environment.json"}
    assert written["one"] == written["two"] == written["all"] and "final.safetensors" in written["all"]
    assert moves["one"] >= moves["two"] > moves["all"] == 0


def test_a_simulation_that_fails_leaves_no_files(flags, tmp_path):
    crash = ["--cluster.faults", '[{"class_path": "Crash", "init_args": {"rank": 1, "at_s": 5.5}}]']
    assert main(["simulate", *flags, *crash, "--num_resident", "2", "--out", str(tmp_path / "out")]) == 1
    assert (tmp_path / "out" / "trace.json").exists() and not list((tmp_path / "out").glob("moved_out_*"))


@pytest.mark.parametrize("more", [["--num_resident", "0"], ["--num_resident", "2", "--timing_only", "true"]])
def test_what_cannot_be_moved_is_refused(more, flags, tmp_path, capsys):
    assert main(["simulate", *flags, *more, "--out", str(tmp_path / "out")]) == 2
    assert "num_resident is" in capsys.readouterr().err and not (tmp_path / "out").exists()
