"""Where a rank runs, what it draws, and that ranks which differ refuse to begin."""

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lowcomm import Comm, Meter, MeteredComm, TorchEngine
from lowcomm.assemble import Place, _run_replica, assemble, build_engine, checkpoint_bytes, place
from lowcomm.checkpoint import Checkpoints, state_bytes
from lowcomm.cli import parse_run
from lowcomm.comm.echo import EchoComm
from lowcomm.config import Run
from lowcomm.models.llama import Llama
from lowcomm.optim.schedule import Cosine
from tests.multiprocess.launch import write_tiny
from tests.world import run_world


@pytest.mark.parametrize(
    ("num_gpus", "local_rank", "local_ranks", "flags", "expected"),
    [
        (2, None, 1, {}, ("cuda:0", None)),
        (2, 1, 2, {}, ("cuda:1", "nccl")),
        (2, 2, 3, {}, ("cuda:0", "gloo")),  # two ranks on one GPU, which NCCL refuses
        (2, 1, 2, {"backend": "gloo"}, ("cuda:1", "gloo")),
        (2, 1, 2, {"device": "cpu"}, ("cpu", "gloo")),
        (0, 1, 2, {}, ("cpu", "gloo")),
    ],
)
def test_a_rank_has_a_gpu_of_its_own_where_there_are_enough(
    monkeypatch, num_gpus, local_rank, local_ranks, flags, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    ranks = {"LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_ranks, "RANK": local_rank, "WORLD_SIZE": local_ranks}
    ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in ranks.items():
        if local_rank is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, str(value))
    assert place(Run(num_steps=1, **flags)) == Place(torch.device(expected[0]), expected[1])


@pytest.fixture
def tiny(tmp_path):
    """A run of 4 steps."""
    return parse_run(["--config", str(write_tiny(tmp_path)), "--num_steps", "4"])[0]


def test_replicas_that_would_evaluate_other_text_refuse(tiny):
    alike = tiny.data.load()
    others = replace(tiny.data, validation_fraction=0.3).load().validation

    def program(comm: Comm) -> str:
        loaded = replace(alike, validation=others if comm.rank == 1 else alike.validation)
        with pytest.raises(ValueError, match=r"the validation text of ranks \[1\] differs from rank 0's") as refused:
            assemble(tiny, loaded, MeteredComm(comm, Meter()), torch.device("cpu"), lambda line: None)
        return str(refused.value)

    assert len(set(run_world(2, program))) == 1


def test_replicas_begin_with_one_model_on_data_and_draws_of_their_own(tmp_path):
    run, _ = parse_run(["--config", str(write_tiny(tmp_path))])
    loaded, lines = run.data.load(), []
    found = []
    for rank in (0, 1, 1):
        comm = MeteredComm(EchoComm(2, rank), Meter())
        assembled = assemble(run, loaded, comm, torch.device("cpu"), lines.append)
        found.append((assembled, torch.rand(3), assembled.replica.stream.next()))
    first, second, again = found
    for (a, _, _), (b, _, _) in ((first, second), (first, again)):
        assert a.run_id == b.run_id
        for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True):
            assert torch.equal(x, y)
    for k in (1, 2):
        assert not torch.equal(first[k], second[k]) and torch.equal(second[k], again[k])
    assert first[0].replica.ledger.step_tokens == 2 * 32
    plan = first[0].plan
    assert (plan.num_steps, plan.evaluate_every, plan.save_every) == (40, 20, 10)
    assert {batch.shape for batch in plan.validation} == {(4, 33)} and len(plan.validation) == 512 // (4 * 32)


@pytest.mark.parametrize(
    ("precision", "dtype", "autocast"),
    [
        ("fp32", torch.float32, None),
        ("bf16_mixed", torch.float32, torch.bfloat16),
        ("bf16", torch.bfloat16, None),
    ],
)
def test_an_engine_has_the_settings_of_its_run(precision, dtype, autocast, tmp_path, monkeypatch):
    given = {}

    def engine(*parts, **settings):
        given.update(settings)
        return TorchEngine(*parts, **(settings | {"compile": False}))

    monkeypatch.setattr("lowcomm.assemble.TorchEngine", engine)
    flags = ["--precision", precision, "--compile", "true", "--clip_norm", "0.5", "--batch.num_micro_batches", "2"]
    run, _ = parse_run(["--config", str(write_tiny(tmp_path)), *flags])
    assembled = assemble(run, run.data.load(), MeteredComm(EchoComm(2), Meter()), torch.device("cpu"), [].append)
    assert {p.dtype for p in assembled.model.parameters()} == {dtype}
    names = ("autocast", "compile", "clip_norm", "num_micro_batches")
    assert [given[name] for name in names] == [autocast, True, 0.5, 2]


def test_a_checkpoint_takes_about_what_was_said_before_the_first_step():
    run = Run(Llama("500k", num_layers=1, dim=192), num_steps=2, schedule=Cosine(1))
    engine = build_engine(run, run.model.build(256, 0), 2)
    said = checkpoint_bytes(engine, {})
    engine.backward(torch.zeros(1, 5, dtype=torch.int64))
    engine.update()
    assert said == pytest.approx(state_bytes({"engine": engine.state_dict(), "algorithm": {}}), rel=0.05)


def test_rank_0_alone_lays_down_the_config_and_the_disk_must_hold_the_checkpoints_of_all(tiny, tmp_path, monkeypatch):
    written, asked = [], []
    monkeypatch.setattr("lowcomm.assemble.describe_into", lambda run, out: written.append(out))
    monkeypatch.setattr("lowcomm.assemble.checkpoint_bytes", lambda engine, state: 1000)
    monkeypatch.setattr(Checkpoints, "require_space", lambda self, num_bytes: asked.append(num_bytes))
    out, where = tmp_path / "out", Place(torch.device("cpu"), None)
    run_world(3, lambda comm: _run_replica(tiny, out, False, where, comm))
    assert asked == [3000] * 3 and written == [out]
    assert {path.name for path in out.glob("metrics*")} == {
        "metrics.jsonl",
        "metrics.replica00001.jsonl",
        "metrics.replica00002.jsonl",
    }


class Kept(nn.Module):
    """Of each kind of state one: what it holds must be there after a run, digit by digit."""

    def __init__(self, extra: str = "none") -> None:
        super().__init__()
        self.extra = extra
        self.embedding, self.head = nn.Embedding(256, 4), nn.Linear(4, 256)
        self.norm = nn.BatchNorm1d(4)
        self.turn = nn.Parameter(torch.polar(torch.ones(3), torch.arange(3.0)), requires_grad=False)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.complex64, torch.int64, torch.bool):
            self.register_buffer(str(dtype).removeprefix("torch."), torch.tensor([1 / 3, 0.0, 3.0]).to(dtype))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        return self.head(self.norm(x.flatten(0, 1)).view(x.shape).to(x.dtype))

    def get_extra_state(self) -> Any:
        return {"none": torch.ones(2), "dict": {"a": 1}}[self.extra]

    def set_extra_state(self, state: Any) -> None:
        """There is nothing to set."""


@pytest.mark.parametrize("precision", ["fp32", "bf16_mixed", "bf16"])
def test_only_floating_parameters_take_the_precision(precision, tmp_path):
    flags = ["--precision", precision, "--model", "Module", "--model.path", f"{__name__}.Kept", "--num_steps", "4"]
    run, _ = parse_run(["--config", str(write_tiny(tmp_path)), *flags])
    run_world(2, lambda comm: _run_replica(run, tmp_path / "out", False, Place(torch.device("cpu"), None), comm))
    saved, fresh = load_file(tmp_path / "out" / "final.safetensors"), run.model.build(256, run.seed).state_dict()
    trained = {"embedding.weight", "head.weight", "head.bias"}
    assert {saved[name].dtype for name in trained} == {torch.bfloat16 if precision == "bf16" else torch.float32}
    for name in fresh.keys() - trained:
        assert saved[name].dtype == fresh[name].dtype, name
        assert name.startswith("norm.") or torch.equal(saved[name], fresh[name]), name
    assert not torch.equal(saved["norm.running_mean"], fresh["norm.running_mean"])


def test_state_and_optimizers_that_cannot_be_kept_or_stepped_are_refused_before_training(tmp_path):
    def refused(*flags: str) -> str:
        run, _ = parse_run(["--config", str(write_tiny(tmp_path)), *flags])
        shutil.rmtree(tmp_path / "text")
        with pytest.raises(ValueError, match="only tensors can be saved|a step of .* fails") as error:
            assemble(run, data, MeteredComm(EchoComm(2), Meter()), torch.device("cpu"), lambda line: None)
        return str(error.value)

    data = parse_run(["--config", str(write_tiny(tmp_path))])[0].data.load()
    shutil.rmtree(tmp_path / "text")
    model = ["--model", "Module", "--model.path", f"{__name__}.Kept", "--model.args", "{extra: dict}"]
    assert "'_extra_state', a dict, but only tensors can be saved: let its get_extra_state" in refused(*model)
    one_group = ["--optimizer.decay_vectors", "true"]
    before = torch.get_rng_state()
    message = refused("--optimizer.path", "torch.optim.SparseAdam", "--optimizer.args", "{lr: 0.1}", *one_group)
    assert "SparseAdam" in message and "choose an optimizer" in message
    assert torch.equal(torch.get_rng_state(), before)
