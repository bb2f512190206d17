"""Faults through `lowcomm simulate`: what each does to a run's seconds, or how it ends."""

import json

import pytest

from lowcomm.cli import main
from lowcomm.metrics import read
from lowcomm.sim.record.trace import read_chrome_trace
from tests.multiprocess.launch import write_tiny

# 14 steps of a second, in two rounds; the wire is slow enough to be seen, and has no latency
CLUSTER = {"num_hosts": 3, "bits_per_s": 1e6, "latency_s": 0.0, "transport": {"bandwidth_factor": 1.0}}


@pytest.fixture
def run(tmp_path):
    """Simulate under some faults, as (class, arguments): the exit code and the directory."""
    flags = ["--config", str(write_tiny(tmp_path)), "--checkpoint.every", "0", "--num_steps", "14"]
    num_runs = 0

    def go(*faults, cluster="Uniform", on_loss="stop", **changes):
        nonlocal num_runs
        num_runs += 1
        described = [{"class_path": kind, "init_args": arguments} for kind, arguments in faults]
        path, out = tmp_path / f"cluster{num_runs}.yaml", tmp_path / f"out{num_runs}"
        init_args = (CLUSTER if cluster == "Uniform" else {}) | {"faults": described} | changes
        path.write_text(json.dumps({"class_path": cluster, "init_args": init_args}))
        return main(["simulate", *flags, "--on_loss", on_loss, "--cluster", str(path), "--out", str(out)]), out

    return go


def summary(out):
    last = read(out / "metrics.jsonl")[-1]
    assert last["kind"] == "summary"
    return last


def files(out):
    return {x.name: x.read_bytes() for x in out.iterdir() if x.name not in ("environment.json", "cluster.yaml")}


def flows(out):
    """(start, end) in seconds and the sender of every message."""
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    return [(x["ts"] / 1e6, (x["ts"] + x["dur"]) / 1e6, x["pid"]) for x in events if x.get("cat") == "flow"]


def first_sync(out):
    """When the first round's exchange begins and ends: the longest one after 7 s."""
    return max((flow[:2] for flow in flows(out) if 6.5 < flow[0] < 10), key=lambda flow: flow[1] - flow[0])


def test_what_delays_a_run_changes_its_seconds_and_nothing_else(run):
    code, plain = run()
    assert code == 0
    whole_s, (begin_s, end_s) = summary(plain)["time_s"], first_sync(plain)
    assert end_s - begin_s > 0.5 and whole_s > 14 + 2 * (end_s - begin_s)
    wire_s = whole_s - 14.0
    middle_s = (begin_s + end_s) / 2
    cases = [
        # 6 s of which a third is used
        (("SlowDown", {"rank": 1, "factor": 3.0, "at_s": 2.0, "seconds": 6.0}), whole_s + 4.0),
        (
            ("SlowDown", {"rank": 1, "factor": 3.0, "at_s": 0.0, "seconds": 1e6, "what": "network"}),
            14.0 + 3.0 * wire_s,
        ),
        (("Pause", {"rank": 2, "at_s": 3.5, "seconds": 5.0}), whole_s + 5.0),
        # frozen after its bytes were handed over: the exchange ends for the others, and rank 2 goes on 5 s later
        (("Pause", {"rank": 2, "at_s": middle_s, "seconds": end_s - middle_s + 5.0}), whole_s + 5.0),
        (("Partition", {"groups": [[0], [1, 2]], "at_s": middle_s, "seconds": 10.0}), whole_s + 10.0),
        (("Partition", {"groups": [[0], [1, 2]], "at_s": 2.0, "seconds": 3.0}), whole_s),  # nobody talks then
        (("Preempt", {"rank": 1, "at_s": 3.0, "notice_s": 120.0}), whole_s),  # over before the notice is
        (("Poisson", {"mtbf_s": 1e9, "until_s": 1e3}), whole_s),
        (("Weibull", {"mtbf_s": 1e9, "until_s": 1e3, "shape": 1.0}), whole_s),
    ]
    for fault, expected_s in cases:
        code, out = run(fault)
        assert code == 0 and summary(out)["time_s"] == pytest.approx(expected_s, rel=1e-6), fault
        assert (out / "final.safetensors").read_bytes() == (plain / "final.safetensors").read_bytes(), fault


@pytest.mark.parametrize(
    ("fault", "lost", "at_s"),
    [
        (("Crash", {"rank": 1, "at_s": 3.5}), "1", 7),
        (("Crash", {"rank": 0, "at_s": 3.5}), "0", 7),
        (("Preempt", {"rank": 2, "at_s": 1.0, "notice_s": 2.0}), "2", 7),
        (("Poisson", {"mtbf_s": 20.0, "until_s": 12.0, "seed": 1}), None, None),
        (("Weibull", {"mtbf_s": 20.0, "until_s": 12.0, "seed": 1}), None, None),
        (("Preemptions", {"mean_s": 40.0, "until_s": 8.0, "notice_min_s": 0, "notice_max_s": 1, "seed": 1}), "2", 7),
    ],
    ids=str,
)
def test_a_crash_ends_the_run_of_those_who_wait_with_a_clear_message(fault, lost, at_s, run, capsys):
    (code, one), (_, two) = run(fault), run(fault)
    assert code == 1
    error = capsys.readouterr().err.splitlines()[0]
    assert error.startswith("lowcomm: error:") and "cannot end: ranks" in error and "are gone" in error
    if lost is not None:
        assert f"ranks {lost} are gone" in error and f"raised this at {at_s}" in error
    assert files(one) == files(two) and "trace.json" in files(one)


def test_the_others_go_on_without_the_lost_one(run):
    code, out = run(("Crash", {"rank": 1, "at_s": 3.5}), on_loss="go_on")
    last = summary(out)
    assert code == 0 and (last["t"], last["members"]) == (14, 2)
    other = read(out / "metrics.replica00002.jsonl")[-1]
    assert [last[key] for key in ("val_loss", "tokens")] == [other[key] for key in ("val_loss", "tokens")]


def test_nobody_computes_after_its_crash_or_the_end_of_the_run(run, capsys):
    code, out = run(("Crash", {"rank": 1, "at_s": 3.5}), compute={"class_path": "LogNormal"})
    assert code == 1
    end_s = float(capsys.readouterr().err.split("raised this at ")[1].split()[0])
    last_s = {}
    for x in read_chrome_trace(out / "trace.json"):
        if x.kind == "compute":
            last_s[x.rank] = max(last_s.get(x.rank, 0.0), x.end_s)
    ended = pytest.approx(end_s, abs=1e-4)  # it is told to four digits
    assert last_s == {0: ended, 1: pytest.approx(3.5), 2: ended}


def test_what_others_wrote_before_a_crash_of_rank_0_is_not_added_to(tmp_path, capsys):
    flags = ["--config", str(write_tiny(tmp_path)), "--checkpoint.every", "0", "--num_steps", "14"]
    flags += ["--cluster", "LAN", "--cluster.num_hosts", "3", "--out", str(tmp_path / "out")]
    crash = json.dumps([{"class_path": "Crash", "init_args": {"rank": 0, "at_s": 0.5}}])
    assert main(["simulate", *flags, "--cluster.faults", crash]) == 1
    written = (tmp_path / "out" / "metrics.replica00001.jsonl").read_bytes()
    assert written and not (tmp_path / "out" / "metrics.jsonl").exists()
    assert main(["simulate", *flags]) == 2
    assert "already holds a run; choose another --out" in capsys.readouterr().err
    assert (tmp_path / "out" / "metrics.replica00001.jsonl").read_bytes() == written


def test_a_region_goes_down_together(run, capsys):
    cluster = {"regions_used": ["Ohio", "Tokyo"], "hosts_per_region": 2}
    code, _ = run(("RegionShock", {"region": "Tokyo", "at_s": 12.0}), cluster="AWS10", **cluster)
    assert code == 1 and "ranks 2, 3 are gone" in capsys.readouterr().err


def test_availability(run, tmp_path, capsys):
    path = tmp_path / "there.csv"
    fault = ("Availability", {"path": str(path)})
    path.write_text("worker,t_up,t_down\n0,0,\n1,0,1e6\n2,0,\n")
    assert run(fault)[0] == 0
    path.write_text("worker,t_up,t_down\n0,0,\n1,0,3.5\n2,0,\n")
    assert run(fault)[0] == 1
    path.write_text("worker,t_up,t_down\n0,0,\n1,0,3.5\n1,9,\n2,0,\n")
    capsys.readouterr()
    code, out = run(fault)
    assert code == 2 and not out.exists()
    assert "rank 1 would come back at 9.0 s, but no method gives a rank the state" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ([("Poisson", {"mtbf_s": 1.0, "until_s": 100.0})], "all 3 ranks are down"),
        ([("Weibull", {"mtbf_s": 1.0, "until_s": 100.0})], "all 3 ranks are down"),
        ([("RegionShock", {"region": "here", "at_s": 2.0})], "all 3 ranks are down"),
        ([("Crash", {"rank": rank, "at_s": 2.0}) for rank in range(3)], "all 3 ranks are down"),
        ([("Crash", {"rank": 1, "at_s": 2.0}), ("Rejoin", {"rank": 1, "at_s": 4.0})], "would come back at 4.0 s"),
        ([("Preempt", {"rank": 1, "at_s": 2.0, "repair_s": 5.0})], "would come back at 37.0 s"),
        ([("RegionShock", {"region": "mars", "at_s": 2.0})], "no region 'mars'"),
        ([("Crash", {"rank": 1, "at_s": 2.0}), ("Pause", {"rank": 0, "at_s": 1.0, "seconds": 1.0})], "by time"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_anything_starts(faults, words, run, capsys):
    code, out = run(*faults)
    assert code == 2 and not out.exists()
    assert words in capsys.readouterr().err


def test_steps_without_a_time_are_refused_before_anything_starts(run, tmp_path, capsys):
    path = tmp_path / "steps.csv"
    path.write_text("rank,t,seconds\n" + "".join(f"{rank},{t},1\n" for rank in range(3) for t in range(1, 14)))
    code, out = run(compute={"class_path": "Replay", "init_args": {"path": str(path)}})
    assert code == 2 and not out.exists()
    assert "ends at step 13 of rank 0, before 14; set repeat: true" in capsys.readouterr().err
