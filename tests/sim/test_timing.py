"""`lowcomm simulate --timing_only true`: the times and bytes of the run with its arithmetic, and no other numbers."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.compute_utilisation import COLUMNS, MATCHING, PUBLISHED, VARIANTS, cell, utilisation
from lowcomm.algorithms.base import Algorithm
from lowcomm.algorithms.data_parallel import DataParallel
from lowcomm.cli import main, parse_run
from lowcomm.config import Checkpointing, Optimizer, Run
from lowcomm.metrics import read
from lowcomm.optim.schedule import Cosine
from lowcomm.predict import predict
from lowcomm.sim.cluster.presets import Uniform
from lowcomm.sim.record.timing import TimingEngine, shapes_of
from lowcomm.sim.simulate import simulate
from tests.algorithms import FLAGS
from tests.multiprocess.launch import write_tiny
from tests.roles import players

NORMED = ["--model", "Module", "--model.path", "tests.sim.test_timing.Normed"]
CROOKED = ["--model", "Module", "--model.path", "tests.sim.test_timing.Crooked"]
ALGORITHMS = [[name.__name__] for name in players(Algorithm, "algorithms")] + [
    ["DataParallel", "--algorithm.overlap", "true", "--algorithm.reducer.bucket_bytes", "8192"],
    ["DiLoCo", "--algorithm.reducer.compressor", "Cast"],
    [
        *("DESLOC", "--algorithm.periods", "{param: 2, exp_avg: 3, exp_avg_sq: 4}"),
        *("--algorithm.reducer.compressor", "Cast", "--optimizer.path", "lowcomm.optim.qhadopt.QHADOPT"),
        *("--optimizer.args", "{lr: 1.0e-3}"),
    ],
    ["Then", "--algorithm.first.fraction", "0.2", "--algorithm.first.delay", "3"],
    ["StreamingDiLoCo", "--algorithm.every", "4", "--algorithm.blocks_per_fragment", "1", "--algorithm.delay", "2"],
    [
        *("DiLoCo", "--algorithm.overlap", "true", "--algorithm.every", "4", "--clip_norm", "null"),
        *("--algorithm.reducer.bucket_bytes", "8192"),
    ],
    ["DataParallel", "--algorithm.overlap", "true", "--algorithm.reducer.bucket_bytes", "512", *CROOKED],
    ["DataParallel", *NORMED],
    ["NoLoCo", "--algorithm.every", "4", *NORMED],
    [
        *("StreamingDiLoCo", "--algorithm.overlap", "true", "--algorithm.every", "4", "--clip_norm", "null"),
        *("--algorithm.blocks_per_fragment", "1", "--algorithm.delay", "0", *CROOKED),
    ],
    [
        *("StreamingDiLoCo", "--algorithm.overlap", "true", "--algorithm.every", "4", "--clip_norm", "null"),
        *("--algorithm.blocks_per_fragment", "1", "--algorithm.reducer.bucket_bytes", "8192", "--algorithm.delay", "0"),
    ],
]


class Normed(nn.Module):
    """Running statistics, and the vectors of a spectral norm, which training does depend on."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(256, 8), nn.BatchNorm1d(8)
        self.wide = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 24))
        self.head = nn.Linear(24, 256)

    def forward(self, tokens):
        return self.head(self.wide(self.norm(self.embedding(tokens).transpose(1, 2)).transpose(1, 2)))


class Crooked(nn.Module):
    """Uses its parameters in another order than it lists them."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 256)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 8)) for _ in range(3))
        self.embedding = nn.Embedding(256, 8)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for i in (1, 2, 0):
            x = x + self.blocks[i](x)
        return self.head(x)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=" ".join)
def test_times_and_bytes_are_those_of_the_run_with_its_arithmetic(algorithm, tmp_path):
    flags = ["--config", str(write_tiny(tmp_path)), "--checkpoint.every", "0", "--num_steps", "10"]
    flags += ["--evaluation.every", "3", "--algorithm", *algorithm, *FLAGS.get(algorithm[0], [])]
    flags += ["--cluster", "Uniform", "--cluster.num_hosts", "3"]
    flags += ["--cluster.bits_per_s", "1e6", "--cluster.latency_s", "0.01"]
    for name in ("false", "true"):
        assert main(["simulate", *flags, "--timing_only", name, "--out", str(tmp_path / name)]) == 0
    real, timing = (read(tmp_path / name / "metrics.jsonl") for name in ("false", "true"))
    assert len([x for x in real if x["kind"] == "step"]) == 10 and len([x for x in real if x["kind"] == "eval"]) == 4
    losses = ("loss", "val_loss", "val_bits_per_byte")
    assert [{key: x[key] for key in x if key not in losses} for x in real] == timing
    buffers = {"buffers"} if NORMED[-1] in algorithm else set()
    assert set(timing[-1]["traffic"]) == {"start", "sync", "evaluation"} | buffers
    assert (tmp_path / "false" / "trace.json").read_bytes() == (tmp_path / "true" / "trace.json").read_bytes()
    assert not (tmp_path / "true" / "final.safetensors").exists()


def test_buffers_are_sent_as_predicted_and_an_evaluation_leaves_them_alone(tmp_path):
    flags = ["--config", str(write_tiny(tmp_path)), "--checkpoint.every", "0", "--num_steps", "9", *NORMED]
    flags += ["--algorithm", "DiLoCo", "--algorithm.every", "4"]
    cluster = ["--cluster", "Uniform", "--cluster.num_hosts", "3"]
    for name in ("0", "2"):
        out = str(tmp_path / name)
        assert main(["simulate", *flags, *cluster, "--evaluation.every", name, "--out", out]) == 0
    weights = [load_file(tmp_path / name / "final.safetensors") for name in ("0", "2")]
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())
    assert "norm.running_mean" in weights[0]
    out = tmp_path / "unevaluated"
    assert main(["simulate", *flags, *cluster, "--data.validation_fraction", "0", "--out", str(out)]) == 0
    traffic = read(out / "metrics.jsonl")[-1]["traffic"]
    run, _ = parse_run(flags)
    predicted = predict(run, 3, run.data.tokenizer.vocab_size)
    found = [read(out / f"metrics{rank}.jsonl")[-1]["traffic"] for rank in ("", ".replica00001", ".replica00002")]
    assert predicted.step_bytes * 9 == sum(traffic[tag]["bytes_sent"] for tag in ("sync", "buffers"))
    # twice: running statistics and vectors are averaged, a count is the first member's
    floats, whole = 4 * (8 + 8 + 8 + 24), 8
    sums = 2 * 2 * floats // 3
    assert [x["buffers"]["bytes_sent"] for x in found] == [2 * (sums + 2 * whole), 2 * sums, 2 * sums]


def test_no_text_is_read(tmp_path):
    flags = ["--config", str(write_tiny(tmp_path)), "--checkpoint.every", "0", "--data.source.paths", "[/no/such.txt]"]
    flags += ["--cluster", "LAN", "--cluster.num_hosts", "2", "--timing_only", "true"]
    assert main(["simulate", *flags, "--out", str(tmp_path / "out")]) == 0


class AsksForValues(torch.optim.SGD):
    """Steps by the largest gradient."""

    def step(self, closure=None):
        return max(p.grad.max().item() for group in self.param_groups for p in group["params"])


def run_of(**options):
    return Run(algorithm=DataParallel(overlap=True), checkpoint=Checkpointing(every=0), num_steps=4, **options)


def test_an_optimizer_that_asks_for_values_is_timed(tmp_path):
    optimizer = Optimizer("tests.sim.test_timing.AsksForValues", {"lr": 0.1})
    summary = simulate(run_of(optimizer=optimizer), Uniform(num_hosts=2), tmp_path / "out", timing_only=True)
    assert summary["round"] == 4


def test_slots_are_those_of_a_real_engine_and_the_learning_rate_moves():
    run = run_of(schedule=Cosine(num_warmup_steps=2))
    shapes = shapes_of(run, 2)
    engine, other = TimingEngine(shapes), TimingEngine(shapes)
    assert list(engine.slots()) == ["param"]
    ready: list[int] = []
    assert engine.backward(None, lambda i, x: ready.append(i)).is_meta
    assert sorted(ready) == list(range(len(engine.slots()["param"])))
    assert list(engine.slots()) == ["param", "grad"]
    lrs = [engine.lr()]
    for _ in range(3):
        engine.update()
        lrs.append(engine.lr())
    assert lrs == pytest.approx([5e-4, 1e-3, 5e-4, 0.0]) and other.lr() == lrs[0]
    assert list(engine.slots()) == ["param", "exp_avg", "exp_avg_sq"] and list(other.slots()) == ["param"]
    for tensors in engine.slots().values():
        assert [x.shape for x in tensors] == [x.shape for x in shapes.params] and all(x.is_meta for x in tensors)


def test_gradients_are_of_the_dtype_of_their_parameters():
    shapes = shapes_of(run_of(precision="bf16"), 2)
    assert {x.dtype for x in [*shapes.params, *shapes.gradients]} == {torch.bfloat16}


AFTER_UPDATE = next(x for x in VARIANTS if x.row == "DiLoCo" and x.name == "after the update" and x.wire == "16 bits")


def test_the_published_compute_utilisation_in_a_few_cells():
    assert [x.row for x in MATCHING] == list(PUBLISHED)
    data_parallel, diloco, streaming, delayed, four_bits = MATCHING
    assert cell("1B", data_parallel, 0.50).is_met() and cell("10B", data_parallel, 0.99).points_off == 0
    assert cell("1B", diloco, 0.99).is_met() and not cell("1B", AFTER_UPDATE, 0.99).is_met()
    assert cell("10B", streaming, 0.95).is_met() and cell("10B", streaming, 0.99).points_off == 2
    assert cell("1B", delayed, 0.80).points_off == 0 and cell("1B", four_bits, 0.50).points_off == 0


def test_compute_utilisation_by_hand():
    data_parallel, diloco, streaming, delayed, _ = MATCHING
    # 1e9 parameters of 16 bits, once from each of two replicas to the other, after 100 steps of 0.1 s
    assert utilisation(COLUMNS["1B"], AFTER_UPDATE, 16.0) == pytest.approx(10 / 11, rel=1e-6)
    # at 160 Gbit/s all 24 layers take one step; the first sets out 1/24 into the two thirds of a step that are backward
    within_steps = 2 / 3 * 23 / 24
    assert utilisation(COLUMNS["1B"], data_parallel, 160.0) == pytest.approx(1 / (2 - within_steps), rel=1e-6)
    assert utilisation(COLUMNS["1B"], diloco, 160.0) == pytest.approx(100 / (101 - within_steps), rel=1e-6)
    # at 25 Gbit/s a layer of 10B takes 1/6 of a step, less than backward needs from one layer of a fragment to its
    # next; so what is waited for is the last one: of fragment j of 16, the one that has j/48 of backward behind it
    waited_steps = sum(max(0, 1 / 6 - 2 / 3 * j / 48) for j in range(16))
    assert utilisation(COLUMNS["10B"], streaming, 25.0) == pytest.approx(100 / (100 + waited_steps), rel=1e-6)
    # at 8 Gbit/s a fragment of 1B takes 2.5 steps from when its first layer is final, and a delay hides one step more;
    # its last layer comes last
    waited_steps = sum(2.5 - 1 - 2 / 3 * (16 + j) / 24 for j in range(8))
    assert utilisation(COLUMNS["1B"], delayed, 8.0) == pytest.approx(100 / (100 + waited_steps), rel=1e-6)
