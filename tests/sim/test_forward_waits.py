"""Simulated runs whose forward waits for what it needs: they learn the same, sooner, and every second is known."""

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from lowcomm.cli import main
from lowcomm.metrics import read
from lowcomm.sim.clock import Clock
from lowcomm.sim.compute import Constant
from lowcomm.sim.pace import Pace
from lowcomm.sim.trace import Span, Trace, read_chrome_trace
from tests.multiprocess.launch import write_tiny

OPTIONS = {
    "without delay": ["--algorithm.delay", "0"],
    "moved out and in": [
        *("--algorithm.delay", "0", "--num_resident", "1", "--num_steps", "5", "--model.num_layers", "1"),
        *("--algorithm.blocks_per_fragment", "1"),
    ],
    # what feedback keeps depends on who owns which part of a message: with this, a message is a parameter
    "mixed, with feedback": [
        *("--precision", "bf16_mixed", "--algorithm.reducer.compressor", "Cast"),
        *("--algorithm.reducer.feedback", "EF14", "--algorithm.reducer.bucket_bytes", "1"),
    ],
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_overlap_learns_the_same_bits_sooner(options, tmp_path):
    flags = ["--config", str(write_tiny(tmp_path)), "--checkpoint.every", "0", "--num_steps", "10"]
    flags += ["--evaluation.every", "3", "--clip_norm", "null", "--model.num_layers", "3"]
    flags += ["--algorithm", "StreamingDiLoCo", "--algorithm.every", "3", "--algorithm.blocks_per_fragment", "2"]
    flags += ["--algorithm.reducer.bucket_bytes", "4096"]  # or a fragment were one group, as without overlap
    flags += ["--cluster", "Uniform", "--cluster.num_hosts", "2", "--cluster.bits_per_s", "3e5", *options]
    for name in ("false", "true"):
        assert main(["simulate", *flags, "--algorithm.overlap", name, "--out", str(tmp_path / name)]) == 0
    for file in ("metrics.jsonl", "metrics.rank1.jsonl"):
        plain, overlapped = (read(tmp_path / name / file) for name in ("false", "true"))
        assert [x["kind"] for x in overlapped] == [x["kind"] for x in plain]
        for x, y in zip(plain, overlapped, strict=True):
            same = ("t", "round", "loss", "val_loss", "bytes_sent")
            assert [x.get(key) for key in same] == [y.get(key) for key in same]
            if x["t"] == plain[-1]["t"] - 1:  # what the end of a run sends does not overlap
                assert x["comm_wait_s"] > y["comm_wait_s"] >= 0 and x["time_s"] > y["time_s"]
    weights, same = (load_file(tmp_path / name / "final.safetensors") for name in ("false", "true"))
    assert all(weights[name].equal(same[name]) for name in weights)
    trace = Trace(read_chrome_trace(tmp_path / "true" / "trace.json"))
    for rank in (0, 1):
        end_s = max(span.end_s for span in trace.spans if span.rank == rank and span.kind != "flow")
        compute_s, wait_s = (
            sum(x.end_s - x.start_s for x in trace.spans if (x.rank, x.kind) == (rank, kind))
            for kind in ("compute", "wait")
        )
        assert compute_s == pytest.approx(plain[-1]["t"] * 1.0, rel=1e-9)
        assert compute_s + wait_s == pytest.approx(end_s, rel=1e-9)


class Blocks(torch.nn.Module):
    """A model whose blocks may be computed again in backward instead of being kept."""

    def __init__(self, vocab_size, again):
        super().__init__()
        self.again = again
        self.embedding, self.head = torch.nn.Embedding(vocab_size, 8), torch.nn.Linear(8, vocab_size)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8)) for _ in range(3)
        )

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.again else block(x))
        return self.head(x)


def test_activations_that_are_computed_again_are_those_of_each_rank(tmp_path):
    text = write_tiny(tmp_path).read_text()
    start, end = text.index("model:"), text.index("data:")
    for again in ("true", "false"):
        model = (
            f"{{class_path: Module, init_args: {{path: {__name__}.Blocks, args: {{vocab_size: 256, again: {again}}}}}}}"
        )
        (tmp_path / "run.yaml").write_text(f"{text[:start]}model: {model}\n{text[end:]}")
        flags = ["--config", str(tmp_path / "run.yaml"), "--checkpoint.every", "0", "--num_steps", "10"]
        flags += ["--algorithm", "StreamingDiLoCo", "--algorithm.every", "4", "--algorithm.overlap", "true"]
        flags += ["--algorithm.delay", "1", "--clip_norm", "null", "--cluster", "Home", "--cluster.num_hosts", "3"]
        flags += ["--cluster.compute.mean_s", "0.05", "--out", str(tmp_path / again)]
        assert main(["simulate", *flags]) == 0
    written = [(tmp_path / name / "final.safetensors").read_bytes() for name in ("true", "false")]
    assert written[0] == written[1]


def test_what_is_waited_for_in_the_midst_of_a_step_comes_on_top_of_it():
    clock, trace = Clock(), Trace()
    pace = Pace(clock, Constant(10.0), trace, 0)

    def program():
        pace.begin(1)
        trace.add(1, "wait", 0.0, 0.0, "another's")
        for share, waited_s in ((0.0, 2.0), (0.25, 1.0), (0.5, 0.0), (1.0, 4.0)):
            pace.go_on(share)
            found.append(clock.now)
            clock.sleep(waited_s)
        pace.begin(2)
        pace.go_on(1.0)
        found.append(clock.now)

    found: list[float] = []
    clock.spawn(0, program)
    clock.run()
    assert found == [0.0, 4.5, 8.0, 13.0, 27.0]
    spans = [(0.0, 0.0, 1), (2.0, 4.5, 1), (5.5, 13.0, 1), (17.0, 27.0, 2)]
    assert [x for x in trace.spans if x.rank == 0] == [Span(0, "compute", a, b, f"step {t}") for a, b, t in spans]
