"""A run that is interrupted, again and again, ends as if it had not been: bit for bit."""

import shutil
import signal
from pathlib import Path

import pytest

from lowcomm.cli import main
from lowcomm.metrics import read
from tests.multiprocess.launch import launch, write_tiny

# rank : where : how often : signal, in the order in which one run suffers them (checkpoints at steps 10, 20, 30, 40)
BLOWS = [
    "0:step:4:SIGINT",  # before there is a checkpoint: starts again
    "1:step:14:SIGTERM",  # in the middle of a round; goes on from 10
    "0:step:1:SIGKILL",  # at once
    "1:flush:3:SIGKILL",  # while step 20 is written, before it is renamed
    "0:rename:1:SIGKILL",  # just before step 20 becomes whole: rank 1 may have it, rank 0 does not
    "0:step:11:SIGKILL",  # at the first step after 20
    "1:step:17:SIGKILL",  # in the last round
]


def history(out: Path) -> tuple[list, list, bytes]:
    """All that must not depend on interruptions: losses of both ranks by step, evaluations, final weights."""
    losses = [
        [(r["t"], r["loss"], r["lr"], r["round"], r["tokens"]) for r in read(out / name) if r["kind"] == "step"]
        for name in ("metrics.jsonl", "metrics.replica00001.jsonl")
    ]
    evaluations = [(r["t"], r["val_loss"]) for r in read(out / "metrics.jsonl") if r["kind"] == "eval"]
    return losses, evaluations, (out / "final.safetensors").read_bytes()


@pytest.mark.timeout(300)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path):
    flags = ["train", "--config", str(write_tiny(tmp_path)), "--out"]
    whole = launch([*flags, str(tmp_path / "whole")])
    assert whole.codes == [0, 0], whole.errors
    out = tmp_path / "broken"
    for i, blow in enumerate(BLOWS):
        ended = launch([*flags, str(out), *(["--resume"] if i else [])], stop_at=blow)
        rank, signum = int(blow[0]), signal.Signals[blow.rsplit(":", 1)[1]]
        expected = -signum if signum == signal.SIGKILL else 128 + signum
        assert ended.codes[rank] == expected, (blow, ended.codes, ended.errors)
        assert ended.codes[1 - rank] == 1, f"{blow}: the other rank must see that it is alone: {ended.errors}"
        assert "--resume" in ended.errors[1 - rank] or "--resume" in ended.errors[rank]
    last = launch([*flags, str(out), "--resume"])
    assert last.codes == [0, 0], last.errors

    losses, evaluations, weights = history(tmp_path / "whole")
    assert [len(x) for x in losses] == [40, 40] and [t for t, _ in evaluations] == [20, 40]
    assert history(out) == (losses, evaluations, weights)
    summaries = [
        [r["kind"] for r in read(folder / "metrics.jsonl")].count("summary") for folder in (tmp_path / "whole", out)
    ]
    assert summaries == [1, 1]


@pytest.mark.timeout(120)
def test_what_was_left_to_the_next_forward_is_applied_by_that_of_a_resumed_run(tmp_path):
    """And all is as if nothing had been left to it, in the simulator too."""
    flags = ["--config", str(write_tiny(tmp_path)), "--clip_norm", "null", "--num_steps", "12"]
    flags += ["--evaluation.every", "0", "--algorithm", "StreamingDiLoCo", "--algorithm.every", "5"]
    flags += ["--algorithm.delay", "0", "--algorithm.blocks_per_fragment", "1", "--algorithm.reducer.bucket_bytes", "1"]
    out = tmp_path / "broken"
    run = ["train", *flags, "--checkpoint.every", "5", "--algorithm.overlap", "true", "--out", str(out)]
    assert launch(run, stop_at="1:step:11:SIGKILL").codes == [1, -signal.SIGKILL]  # goes on from 10
    last = launch([*run, "--resume"])
    assert last.codes == [0, 0], last.errors
    whole = tmp_path / "whole"
    cluster = ["--cluster", "LAN", "--cluster.num_hosts", "2", "--checkpoint.every", "0", "--out", str(whole)]
    assert main(["simulate", *flags, *cluster]) == 0
    assert history(out) == history(whole)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("lost", [["10"], ["10", "20"]])
def test_a_rank_that_lost_its_checkpoints_makes_all_refuse_and_costs_nothing(lost, tmp_path):
    """Whether one was made so far (10) or two (10, 20)."""
    out = tmp_path / "out"
    run = ["train", "--config", str(write_tiny(tmp_path)), "--out", str(out)]
    first = launch([*run, "--num_steps", "40"], stop_at=f"0:step:{lost[-1][0]}8:SIGKILL")
    assert first.codes == [-signal.SIGKILL, 1], first.errors
    moved = [out / "checkpoints" / f"t000000{t}" / "replica00001" for t in lost]
    for folder in moved:
        shutil.move(folder, tmp_path / folder.parent.name)
    kept = {x: x.read_bytes() for x in out.rglob("*") if x.is_file() and x.suffix != ".claim"}
    refused = launch([*run, "--resume"])
    assert refused.codes == [2, 2], refused.errors
    assert all(f"step {lost[-1]} on ranks [0]; none on ranks [1]" in error for error in refused.errors), refused.errors
    assert {x: x.read_bytes() for x in out.rglob("*") if x.is_file() and x.suffix != ".claim"} == kept
    for folder in moved:
        shutil.move(tmp_path / folder.parent.name, folder)
    again = launch([*run, "--resume"])
    assert again.codes == [0, 0], again.errors
    assert [r["t"] for r in read(out / "metrics.jsonl") if r["kind"] == "step"] == list(range(1, 41))


@pytest.mark.timeout(200)
def test_newer_checkpoints_outlast_a_common_one_that_does_not_load(tmp_path):
    out = tmp_path / "out"
    run = ["train", "--config", str(write_tiny(tmp_path)), "--out", str(out)]
    assert launch(run, stop_at="1:step:28:SIGKILL").codes == [1, -signal.SIGKILL]
    folders = out / "checkpoints"
    shutil.rmtree(folders / "t00000020" / "replica00001")
    tree = folders / "t00000010" / "replica00001" / "tree.json"
    tree.write_text(tree.read_text().replace("0", "1", 1))
    refused = launch([*run, "--resume"])
    assert refused.codes[1] == 2 and "is damaged" in refused.errors[1], refused.errors
    assert refused.codes[0] == 1 and (folders / "t00000020" / "replica00000").exists()


@pytest.mark.timeout(200)
def test_a_run_interrupted_while_it_writes_its_first_checkpoint_starts_again(tmp_path):
    out = tmp_path / "out"
    run = ["train", "--config", str(write_tiny(tmp_path)), "--out", str(out)]
    assert launch(run, stop_at="0:rename:1:SIGKILL").codes == [-signal.SIGKILL, 1]
    assert (out / "checkpoints/t00000010/replica00001").exists() and not (
        out / "checkpoints/t00000010/replica00000"
    ).exists()
    again = launch([*run, "--resume"])
    assert again.codes == [0, 0], again.errors
