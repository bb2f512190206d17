"""The same `lowcomm train` on GPUs: one replica on one GPU, one for each of two over NCCL. Skipped without CUDA."""

import math
from functools import partial

import pytest
import torch

from lowcomm.metrics import read
from tests.algorithms import inner_of
from tests.multiprocess.launch import write_tiny
from tests.replicas import train
from tests.same_code.cases import CASES, STEPS
from tests.torchrun import torchrun
from tests.world import run_world

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300), pytest.mark.skipif(NUM_GPUS < 1, reason="needs CUDA")]
run = partial(torchrun, timeout_s=280)
two_gpus = pytest.mark.skipif(NUM_GPUS < 2, reason="needs two CUDA devices")


@two_gpus
def test_nccl_computes_what_the_simulator_does(tmp_path):
    run(2, "tests/same_code/program.py", str(tmp_path), "nccl")
    for rank in range(2):
        traces = torch.load(tmp_path / f"rank{rank}.pt")
        for trace, algorithm in zip(traces, CASES, strict=True):
            expected = run_world(2, lambda comm, a=algorithm: train(a, comm, STEPS, inner_of(a)))[rank]
            assert all(torch.equal(a, b) for a, b in zip(trace, expected, strict=True)), algorithm


def losses(out):
    return [r["loss"] for r in read(out / "metrics.jsonl") if r["kind"] == "step"]


@pytest.mark.parametrize(
    ("num_replicas", "precision", "compiles"),
    [(1, "bf16_mixed", "true"), pytest.param(2, "bf16", "false", marks=two_gpus)],
)
def test_a_run_learns_and_resumes(num_replicas, precision, compiles, tmp_path):
    flags = ["--config", str(write_tiny(tmp_path)), "--precision", precision, "--compile", compiles]
    run(num_replicas, "-m", "lowcomm", "train", *flags, "--out", str(tmp_path / "whole"))
    whole = losses(tmp_path / "whole")
    assert len(whole) == 40 and all(map(math.isfinite, whole)) and whole[-1] < whole[0] - 0.5
    summary = read(tmp_path / "whole" / "metrics.jsonl")[-1]
    assert summary["tokens_per_s"] > 0 and summary["mfu"] > 0
    assert (summary["bytes_sent"] > 0) == (num_replicas > 1)

    last = sorted((tmp_path / "whole" / "checkpoints").glob("t*"))[-1]
    (tmp_path / "whole" / "metrics.jsonl").rename(tmp_path / "whole.jsonl")
    for file in last.rglob("*"):  # as if the last checkpoint had been cut short
        if file.is_file():
            file.write_bytes(b"")
    run(num_replicas, "-m", "lowcomm", "train", *flags, "--out", str(tmp_path / "whole"), "--resume")
    # compiled kernels may add in any order, so bit for bit is promised on the CPU only
    assert losses(tmp_path / "whole") == pytest.approx(whole[30:], rel=0.02)


def test_two_replicas_share_one_gpu_over_gloo(tmp_path):
    flags = ["--config", str(write_tiny(tmp_path)), "--backend", "gloo", "--precision", "bf16_mixed"]
    run(2, "-m", "lowcomm", "train", *flags, "--out", str(tmp_path / "out"))
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0] - 0.5
