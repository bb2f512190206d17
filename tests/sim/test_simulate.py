"""`lowcomm simulate`: the same run as `lowcomm train`, on a cluster that is not there."""

import json
from itertools import cycle

import pytest
import torch
from safetensors.torch import load_file

from lowcomm.algorithms.base import Algorithm
from lowcomm.cli import main
from lowcomm.compress.base import Compressor
from lowcomm.metrics import read
from tests.algorithms import FLAGS
from tests.multiprocess.launch import launch, write_tiny
from tests.roles import players


@pytest.fixture
def flags(tmp_path):
    return ["--config", str(write_tiny(tmp_path)), "--checkpoint.every", "0"]


def losses(out, rank=0):
    name = "metrics.jsonl" if rank == 0 else f"metrics.replica{rank:05d}.jsonl"
    return [(r["t"], r["loss"]) for r in read(out / name) if r["kind"] == "step"]


def files(out):
    """All that a run wrote but the moment at which it did."""
    return {x.name: x.read_bytes() for x in out.iterdir() if x.name != "environment.json"}


METHODS = [cls.__name__ for cls in players(Algorithm, "algorithms")]
COMPRESSORS = [cls.__name__ for cls in players(Compressor, "compress")]


@pytest.mark.parametrize(("algorithm", "compressor"), zip(cycle(METHODS), COMPRESSORS, strict=False))
def test_every_method_and_compressor_runs_and_two_simulations_are_bitwise_equal(algorithm, compressor, flags, tmp_path):
    part = "--algorithm.then" if algorithm in ("After", "Then") else "--algorithm"
    method = ["--algorithm", algorithm, f"{part}.reducer.compressor", compressor, "--num_steps", "10"]
    method += FLAGS.get(algorithm, [])
    cluster = ["--cluster", "Home", "--cluster.num_hosts", "3", "--cluster.compute", "LogNormal"]
    for name in ("one", "two"):
        assert main(["simulate", *flags, *method, *cluster, "--out", str(tmp_path / name)]) == 0
    assert files(tmp_path / "one") == files(tmp_path / "two") and len(METHODS) <= len(COMPRESSORS)
    summary = read(tmp_path / "one" / "metrics.jsonl")[-1]
    assert summary["kind"] == "summary" and summary["time_s"] > 5 and summary["comm_wait_s"] > 0
    assert json.loads((tmp_path / "one" / "trace.json").read_text())["traceEvents"]


def test_two_replicas_compute_bit_for_bit_what_two_gloo_processes_compute(flags, tmp_path):
    assert launch(["train", *flags, "--out", str(tmp_path / "real")]).codes == [0, 0]
    cluster = ["--cluster", "LAN", "--cluster.num_hosts", "2"]
    assert main(["simulate", *flags, *cluster, "--out", str(tmp_path / "simulated")]) == 0
    for rank in range(2):
        assert losses(tmp_path / "real", rank) == losses(tmp_path / "simulated", rank)
    weights = [(tmp_path / name / "final.safetensors").read_bytes() for name in ("real", "simulated")]
    assert weights[0] == weights[1]


def test_four_replicas_stay_within_1e_5_of_four_gloo_processes_for_50_rounds(flags, tmp_path):
    flags = [*flags, "--algorithm", "LocalSGD", "--algorithm.every", "2", "--num_steps", "100", "--batch.size", "1"]
    assert launch(["train", *flags, "--out", str(tmp_path / "real")], num_ranks=4).codes == [0] * 4
    cluster = ["--cluster", "LAN", "--cluster.num_hosts", "4"]
    assert main(["simulate", *flags, *cluster, "--out", str(tmp_path / "simulated")]) == 0
    assert read(tmp_path / "simulated" / "metrics.jsonl")[-1]["round"] == 50
    real, simulated = (load_file(tmp_path / name / "final.safetensors") for name in ("real", "simulated"))
    for name, x in real.items():
        assert torch.linalg.norm(simulated[name] - x) <= 1e-5 * torch.linalg.norm(x), name


def test_a_slower_link_takes_longer_and_learns_the_same(flags, tmp_path):
    times = []
    for rate in ("1e6", "1e7"):
        out = tmp_path / rate
        cluster = ["--cluster", "Uniform", "--cluster.num_hosts", "2", "--cluster.bits_per_s", rate]
        assert main(["simulate", *flags, *cluster, "--out", str(out)]) == 0
        times.append(read(out / "metrics.jsonl")[-1]["time_s"])
    assert times[0] > times[1] > 40  # 40 steps of a second
    assert losses(tmp_path / "1e6") == losses(tmp_path / "1e7")


@pytest.mark.parametrize(
    ("schedule", "slower"),
    [
        (["TwoShot"], 1.0),
        (["Star", "--cluster.schedule.center", "1"], 1.5),
        (['{"class_path": "Hierarchical", "init_args": {"islands": [[0, 1], [2]]}}'], 1.5),
    ],
    ids=lambda x: x[0].split('"')[-1] if isinstance(x, list) else "",
)
def test_a_schedule_changes_seconds_and_neither_results_nor_the_bytes_of_the_metrics(schedule, slower, flags, tmp_path):
    def run(name, *schedule):
        cluster = ["--cluster", "Uniform", "--cluster.num_hosts", "3", "--cluster.latency_s", "0"]
        slow = ["--cluster.bits_per_s", "1e6", "--num_steps", "7", "--evaluation.num_tokens", "64"]
        assert main(["simulate", *flags, *cluster, *slow, *schedule, "--out", str(tmp_path / name)]) == 0
        return read(tmp_path / name / "metrics.jsonl")[-1], (tmp_path / name / "final.safetensors").read_bytes()

    (ring, weights), (other, same) = run("ring"), run("other", "--cluster.schedule", *schedule)
    assert same == weights and other["bytes_sent"] == ring["bytes_sent"]
    # the sum of all deltas is nearly all there is: 4/3 S over a link of the ring, 2 S over the busiest of the others
    assert (other["time_s"] - 7) / (ring["time_s"] - 7) == pytest.approx(slower, rel=0.01)


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        (["Uniform", "--cluster.bits_per_s", "0"], ["0"]),
        (["NoSuchCluster"], ["NoSuchCluster"]),
        (["LAN", "--cluster.faults", '[{"class_path": "Crash", "init_args": {"rank": 99, "at_s": 1}}]'], ["99"]),
    ],
    ids=str,
)
def test_a_bad_cluster_is_refused(cluster, words, flags, tmp_path, capsys):
    assert main(["simulate", *flags, "--out", str(tmp_path / "out"), "--cluster", *cluster]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lowcomm: error:") and all(word in error for word in words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("class_path: LAN\ninit_args: {num_hosts: 2, hots: 3}", "Option 'hots' is not accepted"),
        ("class_path: LAN\ninit_args: {bits_per_s: 1 Gbit}", "Got value: 1 Gbit"),
        ("", "Not a valid subclass of Cluster"),
    ],
)
def test_what_is_wrong_with_a_cluster_file_is_said(text, words, tmp_path, capsys):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    assert main(["simulate", "--config", str(write_tiny(tmp_path)), "--cluster", str(path)]) == 2
    error = capsys.readouterr().err
    assert words in error and "loop" not in error
