"""A step that is timed for real, once, and what a simulation does with it."""

import itertools
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml

from lowcomm.assemble import assemble
from lowcomm.cli import main, parse_run
from lowcomm.metrics import read
from lowcomm.sim.cluster.calibrate import measured_step_s
from tests.multiprocess.launch import write_tiny


@pytest.fixture
def flags(tmp_path):
    return ["--config", str(write_tiny(tmp_path)), "--checkpoint.every", "0", "--num_steps", "14"]


def builder(flags):
    run, _ = parse_run(flags)
    loaded = run.data.load()
    nothing = partial(assemble, run, loaded, device=torch.device("cpu"), write=lambda record: None)
    return lambda comm: nothing(comm=comm)


def test_the_median_of_five_steps_after_one_that_warms_up(flags):
    readings = iter(itertools.accumulate([0, 99, 0, 3, 0, 1, 0, 2, 0, 50, 0, 4]))  # what passes in steps is odd places
    assert measured_step_s(builder(flags), 2, lambda: next(readings)) == 3
    assert next(readings, None) is None


def test_on_a_gpu_a_step_has_ended_when_the_gpu_is_done(flags, monkeypatch):
    """The engine stays on the CPU here; only the replica says that it is on a GPU."""
    seen, cuda = [], torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append(device))

    def on_a_gpu(comm):
        assembled = builder(flags)(comm)
        batch = assembled.replica.stream.next()
        moved = SimpleNamespace(next=lambda: SimpleNamespace(to=lambda device: batch))
        return replace(assembled, replica=replace(assembled.replica, device=cuda, stream=moved))

    measured_step_s(on_a_gpu, 2, lambda: seen.append("read") or 0.0)
    assert seen == ["read", cuda, "read"] * 6


def test_steps_are_those_of_one_replica_and_leave_no_trace(flags):
    sizes, shares = [], {"replica": 2, "run": 1}
    for per, size in shares.items():
        build, before = builder([*flags, "--batch.per", per]), torch.get_rng_state()

        def spied(comm, build=build):
            assembled = build(comm)
            engine = assembled.replica.engine
            real = engine.backward
            engine.backward = lambda batch: (sizes.append(len(batch)), torch.rand(1), real(batch))[-1]
            return assembled

        assert measured_step_s(spied, 2) > 0
        assert sizes == [size] * 6 and torch.equal(torch.get_rng_state(), before)
        sizes.clear()


def test_a_simulation_measures_once_and_its_cluster_file_gives_the_same_again(flags, tmp_path, capsys):
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("""
        class_path: Custom
        init_args:
          compute: {class_path: Product, init_args: {factors: [Measured, {class_path: LogNormal, init_args: {sigma: 0.1}}]}}
          hosts_and_paths:
            hosts: [{count: 1, up_bits_per_s: 1e12, down_bits_per_s: 1e12}, {count: 1, up_bits_per_s: 1e12, down_bits_per_s: 1e12, speed: 0.5}]
        """)  # noqa: E501
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["simulate", *flags, "--cluster", str(cluster), "--out", str(one)]) == 0
    said = capsys.readouterr().out
    compute = yaml.safe_load((one / "cluster.yaml").read_text())["init_args"]["compute"]
    step_s = compute["init_args"]["factors"][0]["init_args"]["step_s"]
    assert 0 < step_s < 5 and f"a step takes {step_s:.4g} s on this machine" in said

    assert main(["simulate", *flags, "--cluster", str(one / "cluster.yaml"), "--out", str(two)]) == 0
    assert "on this machine" not in capsys.readouterr().out
    for path in one.iterdir():
        if path.name != "environment.json":
            assert path.read_bytes() == (two / path.name).read_bytes(), path.name
    slowest_s = 14 * step_s * 2  # of the host at half speed, which both wait for
    assert read(one / "metrics.jsonl")[-1]["time_s"] == pytest.approx(slowest_s, rel=0.2)


def test_timing_alone_cannot_measure(flags, tmp_path, capsys):
    cluster = ["--cluster", "LAN", "--cluster.compute", "Measured", "--timing_only", "true"]
    assert main(["simulate", *flags, *cluster, "--out", str(tmp_path / "out")]) == 2
    assert "give Measured a step_s" in capsys.readouterr().err and not (tmp_path / "out").exists()
