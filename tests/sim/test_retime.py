"""New times for an old run: exactly those that a simulation on the other cluster would have given."""

import json
import shutil
from dataclasses import dataclass, replace

import pytest
import torch

from lowcomm.algorithms.data_parallel import DataParallel
from lowcomm.assemble import open_ledger
from lowcomm.cli import main, parse_run, parse_simulation
from lowcomm.metrics import read
from lowcomm.rounds.base import GradientsState, Rounds
from lowcomm.sim.cluster.compute import Measured, Replay
from lowcomm.sim.cluster.faults import Crash
from lowcomm.sim.cluster.presets import LAN, Home
from lowcomm.sim.retime import retime as retime_of
from lowcomm.sim.simulate import simulate
from tests.multiprocess.launch import write_tiny

# three hosts each; links that differ both ways and by host, steps of random length, pauses and slow-downs
HERE = """
class_path: Custom
init_args:
  hosts_and_paths:
    hosts:
    - {count: 2, up_bits_per_s: 2.0e+6, down_bits_per_s: 9.0e+6}
    - {count: 1, up_bits_per_s: 1.0e+6, down_bits_per_s: 3.0e+7, speed: 1.7}
    latency_s: [[0.02]]
  compute: {class_path: LogNormal, init_args: {mean_s: 0.9, seed: 3}}
"""
THERE = """
class_path: Custom
init_args:
  hosts_and_paths:
    hosts:
    - {count: 1, up_bits_per_s: 3.0e+5, down_bits_per_s: 2.0e+6, speed: 0.6}
    - {count: 2, up_bits_per_s: 4.0e+6, down_bits_per_s: 1.0e+6, region: far}
    regions: [here, far]
    latency_s: [[0.001, 0.09], [0.11, 0.002]]
    path_bits_per_s: [[1.0e+9, 2.5e+6], [3.0e+6, 1.0e+9]]
  compute:
    class_path: Product
    init_args:
      factors: [{class_path: Pareto, init_args: {mean_s: 0.4, alpha: 1.5}}, Diurnal, {class_path: Markov}]
  faults:
  - {class_path: SlowDown, init_args: {rank: 0, at_s: 1.0, seconds: 8.0, factor: 2.0, what: network}}
  - {class_path: SlowDown, init_args: {rank: 2, at_s: 2.0, seconds: 9.0, factor: 3.0}}
  - {class_path: Pause, init_args: {rank: 1, at_s: 3.3, seconds: 4.0}}
"""
METHODS = {
    "DataParallel": ["--algorithm", "DataParallel"],
    "DataParallel, overlapped": ["--algorithm", "DataParallel", "--algorithm.overlap", "true"],
    "StreamingDiLoCo, overlapped": [
        *("--algorithm", "StreamingDiLoCo", "--algorithm.every", "3", "--algorithm.delay", "0"),
        *("--algorithm.blocks_per_fragment", "1", "--algorithm.overlap", "true", "--clip_norm", "null"),
    ],
    "LocalSGD": ["--algorithm", "LocalSGD", "--algorithm.every", "3"],
    "After": ["--algorithm", "After", "--algorithm.num_steps", "2", "--algorithm.then.every", "4"],
}


@pytest.fixture
def clusters(tmp_path):
    for name, text in (("here", HERE), ("there", THERE)):
        (tmp_path / f"{name}.yaml").write_text(text)
    return {name: str(tmp_path / f"{name}.yaml") for name in ("here", "there")}


@pytest.fixture
def flags(tmp_path):
    config = str(write_tiny(tmp_path))
    return ["--config", config, "--checkpoint.every", "0", "--num_steps", "11", "--evaluation.every", "5"]


def files(out):
    """All that a run wrote but its weights, and but the moment at which it did."""
    return {x.name: x.read_bytes() for x in out.iterdir() if x.name not in ("environment.json", "final.safetensors")}


@pytest.mark.parametrize("compressor", ["Identity", "Cast"])
@pytest.mark.parametrize("method", METHODS)
def test_new_times_are_byte_for_byte_those_of_a_simulation_there(method, compressor, flags, clusters, tmp_path):
    reducer = "--algorithm.then.reducer" if method == "After" else "--algorithm.reducer"
    flags = [*flags, *METHODS[method], f"{reducer}.compressor", compressor]
    flags += [f"{reducer}.bucket_bytes", "20000", "--log.every", "2"]  # several messages are under way
    for name, cluster in clusters.items():
        assert main(["simulate", *flags, "--cluster", cluster, "--out", str(tmp_path / name)]) == 0
    for name, cluster in clusters.items():
        out = tmp_path / f"here as {name}"
        assert main(["retime", str(tmp_path / "here"), "--cluster", cluster, "--out", str(out)]) == 0
        assert files(out) == files(tmp_path / name)
    assert files(tmp_path / "here")["metrics.jsonl"] != files(tmp_path / "there")["metrics.jsonl"]


@dataclass(frozen=True)
class Talker(Rounds[GradientsState]):
    """Learns alone, and says things every second step; ``topic`` is what."""

    topic: str = "everything"
    every: int = 2

    def begin(self, engine, comm):
        return GradientsState()

    def round(self, t, engine, state, comm):
        getattr(self, self.topic)(t, comm, engine.slots()["param"][0])
        return []

    def rest(self, t, engine, state, comm):
        return None

    def commit(self, t, engine, state, sent, means):
        raise AssertionError("no average was sent")

    def stands(self, engine, state):
        return engine.slots()["param"]

    def everything(self, t, comm, param):
        """Every kind of message in views of several sizes, waited for in another order, late, twice and never."""
        n, me, x = len(comm.members), comm.rank, torch.ones(1000 * t)
        sent = comm.send(x[: 10 * (me + 1)], (me + 1) % n)
        swapped = comm.exchange(x[:300], n - 1 - me)
        pieces = comm.all_to_all(x[: 200 * n].view(n, 200))
        spread = comm.tagged("news").broadcast(x.double(), t % n)
        before = (me - 1) % n
        got = comm.recv(torch.empty(10 * (before + 1)), before)
        pair = comm.sub([0, 1]) if me < 2 else None
        summed = pair.all_sum(x) if pair is not None else None
        comm.all_gather(x[:7])
        for work in (spread, got, summed, swapped, pieces, sent, spread):
            if work is not None:
                work.wait()

    def clock(self, t, comm, param):
        comm.now()

    def anyone(self, t, comm, param):
        if comm.rank == 0:
            comm.send(torch.ones(3), 1).wait()
        if comm.rank == 1:
            comm.recv(torch.ones(3)).wait()

    def nothing(self, t, comm, param):
        pass

    def values(self, t, comm, param):
        comm.all_sum(param).wait().sum().item()

    def sizes(self, t, comm, param):
        comm.all_gather(torch.ones(3 if param.is_meta else 2)).wait()


def talk(flags, topic, cluster, out):
    """A simulated run of a `Talker`."""
    simulate(replace(parse_run(flags)[0], algorithm=Talker(topic)), cluster, out)


def retime(run_dir, cluster, out):
    """As the command calls it."""
    return retime_of(run_dir, parse_run(["--config", str(run_dir / "config.yaml")])[0], cluster, out)


def test_all_kinds_of_messages_get_new_times_and_the_old_ones_back(flags, clusters, tmp_path, monkeypatch):
    # as on a device whose speed is known, so that its utilisation is, too
    monkeypatch.setattr(
        "lowcomm.assemble.open_ledger", lambda *args: replace(open_ledger(*args), token_flops=1e3, peak_flops=1e9)
    )
    here, there = (parse_simulation([*flags, "--cluster", path])[1] for path in clusters.values())
    talk(flags, "everything", here, tmp_path / "here")
    talk(flags, "everything", there, tmp_path / "there")
    retime(tmp_path / "here", there, tmp_path / "here as there")
    assert files(tmp_path / "here as there") == files(tmp_path / "there")
    summary = retime(tmp_path / "here as there", here, tmp_path / "back")
    assert files(tmp_path / "back") == files(tmp_path / "here")
    assert summary == read(tmp_path / "here" / "metrics.jsonl")[-1]
    assert set(summary["traffic"]) == {"evaluation", "news", "start", "sync"}


def test_timing_alone_gets_new_times_too(flags, clusters, tmp_path):
    flags = [*flags, "--timing_only", "true"]
    for name, cluster in clusters.items():
        assert main(["simulate", *flags, "--cluster", cluster, "--out", str(tmp_path / name)]) == 0
    out = str(tmp_path / "out")
    assert main(["retime", str(tmp_path / "here"), "--cluster", clusters["there"], "--out", out]) == 0
    assert files(tmp_path / "out") == files(tmp_path / "there")


@pytest.mark.parametrize(
    ("topic", "words"),
    [
        ("clock", "rank 0 reads the clock"),
        ("anyone", "rank 1 takes messages from whoever comes first"),
    ],
)
def test_a_program_that_other_times_could_change_is_refused(topic, words, flags, tmp_path):
    talk(flags, topic, LAN(num_hosts=2), tmp_path / "run")
    with pytest.raises(ValueError, match=f"cannot be timed anew: {words}.*simulate it on the other cluster"):
        retime(tmp_path / "run", LAN(num_hosts=2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def refused(run, out, cluster, words):
    """The new times of a run are refused before anything is written."""
    with pytest.raises(ValueError, match=words):
        retime(run, cluster, out)
    assert not out.exists()


def test_what_cannot_be_timed_anew_is_refused(flags, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    with pytest.raises(ValueError, match="there is no .*environment.json.*simulate it anew"):
        retime_of(run, parse_run(flags)[0], LAN(num_hosts=2), out)
    talk(flags, "everything", LAN(num_hosts=2), run)
    refused(run, out, LAN(num_hosts=3), "3 hosts.*2 replicas")
    refused(run, out, LAN(num_hosts=2, faults=[Crash(rank=1, at_s=3.0)]), "crashes")
    refused(run, out, LAN(num_hosts=2, compute=Measured()), "give Measured a step_s")
    with pytest.raises(ValueError, match="already holds a run"):
        retime(run, Home(num_hosts=2), run)

    compiled = replace(parse_run(flags)[0], algorithm=DataParallel(overlap=True), compile=True)
    with pytest.raises(ValueError, match="only the compiled code knows"):
        retime_of(run, compiled, LAN(num_hosts=2), out)
    assert main(["retime", str(tmp_path / "none"), "--cluster", "LAN", "--out", str(out)]) == 2
    assert "give the directory of a simulated run" in capsys.readouterr().err

    steps = tmp_path / "steps.csv"
    steps.write_text("rank,t,seconds\n0,1,1\n1,1,1\n")
    refused(run, out, LAN(num_hosts=2, compute=Replay(str(steps))), "ends at step 1 of rank 0, before 11")
    (tmp_path / "rest").mkdir()
    (tmp_path / "rest" / "metrics.replica00001.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="already holds a run"):
        retime(run, LAN(num_hosts=2), tmp_path / "rest")

    environment = json.loads((run / "environment.json").read_text())
    for broken in ("", "[]", json.dumps({**environment, "simulated": None}), json.dumps({"torch": "2"})):
        (run / "environment.json").write_text(broken)
        refused(run, out, LAN(num_hosts=2), "is not of a simulation that ended")


def test_metrics_that_are_of_another_run_are_refused(flags, tmp_path):
    for name, num_steps in (("long", "11"), ("short", "7")):
        talk([*flags, "--num_steps", num_steps], "everything", LAN(num_hosts=2), tmp_path / name)
    for name, other in (("long", "short"), ("short", "long")):
        shutil.copytree(tmp_path / name, tmp_path / "mixed", dirs_exist_ok=True)
        shutil.copy(tmp_path / other / "metrics.jsonl", tmp_path / "mixed")
        refused(tmp_path / "mixed", tmp_path / "out", LAN(num_hosts=2), "metrics.jsonl .*not of one run")
    shutil.copytree(tmp_path / "long", tmp_path / "mixed", dirs_exist_ok=True)
    lines = (tmp_path / "long" / "metrics.replica00001.jsonl").read_text()
    for changed in (lines.replace('"bytes_sent": ', '"bytes_sent": 1'), lines[: lines.rindex("{")]):
        (tmp_path / "mixed" / "metrics.replica00001.jsonl").write_text(changed)
        refused(
            tmp_path / "mixed", tmp_path / "out", LAN(num_hosts=2), "metrics.replica00001.jsonl .*depended on values"
        )


def test_what_depends_on_values_is_refused(flags, tmp_path):
    talk(flags, "values", LAN(num_hosts=2), tmp_path / "run")
    refused(tmp_path / "run", tmp_path / "out", LAN(num_hosts=2), "something in this run depends on values")
    talk(flags, "sizes", LAN(num_hosts=2), tmp_path / "other")
    refused(tmp_path / "other", tmp_path / "out", LAN(num_hosts=2), "bytes_sent .* sizes or order depended on values")


def test_a_run_that_lost_a_rank_is_refused(flags, tmp_path):
    flags = [*flags, "--data.validation_fraction", "0"]  # nobody waits for it
    talk(flags, "nothing", LAN(num_hosts=3, faults=[Crash(rank=2, at_s=3.0)]), tmp_path / "run")
    refused(tmp_path / "run", tmp_path / "out", LAN(num_hosts=3), "metrics.replica00002.jsonl .*lines")


def test_neither_text_nor_tokenizer_is_read(flags, clusters, tmp_path):
    shards, bpe = str(tmp_path / "shards"), str(tmp_path / "bpe.json")
    text = ["--source", "Files", "--source.paths", f"[{tmp_path}/text/*.txt]"]
    tokenizer = ["--tokenizer", "BPE", "--tokenizer.path", bpe, "--train_bpe", "300"]
    assert main(["data", *text, *tokenizer, "--out", shards]) == 0
    flags += ["--data.source", "Shards", "--data.source.path", shards]
    flags += ["--data.tokenizer", "BPE", "--data.tokenizer.path", bpe]
    for name, cluster in clusters.items():
        assert main(["simulate", *flags, "--cluster", cluster, "--out", str(tmp_path / name)]) == 0
    for gone in ("text", "shards"):
        shutil.rmtree(tmp_path / gone)
    (tmp_path / "bpe.json").unlink()
    out = tmp_path / "out"
    assert main(["retime", str(tmp_path / "here"), "--cluster", clusters["there"], "--out", str(out)]) == 0
    assert files(out) == files(tmp_path / "there")
