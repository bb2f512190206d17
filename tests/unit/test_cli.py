"""The command line: what it refuses, what it resolves, and that a run alone works from end to end."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError

from lowcomm import DiLoCo, LocalSGD
from lowcomm.cli import main, parse_run
from lowcomm.config import Optimizer, describe
from lowcomm.data import Files
from lowcomm.ledger import Diverged
from lowcomm.metrics import read
from tests.compressors import SGD, Nesterov
from tests.multiprocess.launch import write_tiny

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


@pytest.fixture
def config(tmp_path):
    return write_tiny(tmp_path)


def refused(capsys, *argv):
    """The one-paragraph message of a command that must end with exit code 2."""
    assert main(list(argv)) == 2
    error = capsys.readouterr().err
    assert error.startswith("lowcomm: error:") and "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--algorithm.evry", "3"], ["evry"]),
        (["--nonsense", "3"], ["nonsense"]),
        (["--algorithm.every", "many"], ["every", "many"]),
        (["--algorithm.every", "0"], ["every is 0", "at least 1"]),
        (["--algorithm.outer.momentum", "1"], ["momentum=1"]),
        (["--algorithm.weights", "[1,2,3]"], ["weights has 3 entries for 1 replicas"]),
        (["--algorithm", "NoSuchMethod"], ["NoSuchMethod"]),
        (["--num_tokens", "1000"], ["num_steps or num_tokens"]),
        (["--data.source.paths", "[/no/such/file.txt]"], ["/no/such/file.txt"]),
        (["--data.seq_len", "100000"], ["tokens"]),
        (["--model.vocab_size", "100"], ["100", "256"]),
        (["--backend", "nccl"], ["nccl", "CUDA", "gloo"]),
        (["--device", "cuda"], ["cuda", "GPU"]),
        (["--precision", "fp8"], ["precision", "fp8"]),
        (["--optimizer.path", "torch.optim.Adamm"], ["torch.optim.Adamm"]),
        (["--optimizer.args", "{lr: 0.1, momentun: 0.9}"], ["momentun"]),
        (["--optimizer.args.lr", "-1"], ["lr is -1"]),
        (["--schedule.num_warmup_steps", "41"], ["num_warmup_steps 41"]),
        (["--optimizer.args", "{lr: 0.1, betas: 3}"], ["torch.optim.AdamW", "'betas': 3", "leave out"]),
        (["--optimizer.args", "{lr: null}"], ["torch.optim.AdamW", "'lr': None"]),
        (["--optimizer.args", "{lr: 0.1, params: 1}"], ["does not take ['params']"]),
        (["--algorithm", "diloco"], ["diloco", "lowcomm train --help lists"]),
        (["--algorithm.every", "null"], ["algorithm.every is null", "leave it out"]),
        (["--config", "/no/such/config.yaml"], ["/no/such/config.yaml"]),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_bad_input_is_refused_before_training(capsys, config, tmp_path, flags, words):
    if torch.cuda.is_available() and ("nccl" in flags or "cuda" in flags):
        pytest.skip("only wrong where there is no CUDA")
    error = refused(capsys, "train", "--config", str(config), "--out", str(tmp_path / "out"), *flags)
    assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists(), "nothing was started"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("evaluation:\n", ["evaluation is null"]),
        ("optimizer: {args: }\n", ["optimizer.args is null"]),
        ("data: {source: }\n", ["data.source is null"]),
        ("algorithm: {class_path: LocalSGD, init_args: {reducer: {compressor: }}}\n", ["reducer.compressor is null"]),
        ("batch: {size: 4}\nbatch: {num_micro_batches: 2}\n", ["'batch' stands here twice"]),
        ("batch: {size: 4, num_micro_batches: 2, size: 8}\n", ["'size' stands here twice"]),
        ("optimizer: {args: {params: [{lr: 1, lr: 2}]}}\n", ["'lr' stands here twice"]),
    ],
)
def test_keys_without_a_value_and_keys_that_stand_twice_are_refused(capsys, tmp_path, text, words):
    (tmp_path / "run.yaml").write_text(f"num_steps: 3\n{text}")
    error = refused(capsys, "train", "--config", str(tmp_path / "run.yaml"), "--dry_run")
    assert all(word in error for word in words), error


def test_null_stays_a_value_where_it_is_one_and_text_stays_text(tmp_path):
    """`---` and `# ` alone are null in YAML, but text within quotes."""
    (tmp_path / "run.yaml").write_text("num_steps: 3\nclip_norm:\nnum_tokens: null\n")
    run, _ = parse_run(["--config", str(tmp_path / "run.yaml"), "--data.validation", "null"])
    assert (run.clip_norm, run.num_tokens, run.data.validation) == (None, None, None)
    for separator in ("---", "# ", "\n", "\0"):
        source = {"class_path": "Files", "init_args": {"paths": ["a.txt"], "separator": separator}}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"num_steps": 3, "data": {"source": source}}))
        run, _ = parse_run(["--config", str(tmp_path / "run.yaml")])
        assert run.data.source == Files(["a.txt"], separator=separator)


OWN = """
from __future__ import annotations
from dataclasses import dataclass
from typing import TYPE_CHECKING
from lowcomm.outer.base import Outer
if TYPE_CHECKING:
    from collections.abc import Sequence

@dataclass(frozen=True)
class Own(Outer[None]):
    rates: Sequence[float] = (1.0,)
    def init(self, anchor): ...
    def apply(self, anchor, delta, state): ...
"""


def test_a_class_of_ones_own_may_have_annotations_that_cannot_be_read_here(tmp_path, monkeypatch):
    (tmp_path / "own_outer.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    outer = {"class_path": "own_outer.Own", "init_args": {"rates": [0.5]}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"num_steps": 3, "algorithm": {"outer": outer}}))
    run, _ = parse_run(["--algorithm", "DiLoCo", "--config", str(tmp_path / "run.yaml")])
    assert isinstance(run.algorithm, DiLoCo) and list(run.algorithm.outer.rates) == [0.5]


@pytest.mark.parametrize("where", ["describe_into", "save_file"])
def test_a_full_disk_is_told_in_a_sentence(capsys, config, tmp_path, monkeypatch, where):
    def full(*_):
        message = "No space left on device"
        raise SafetensorError(message) if where == "save_file" else OSError(28, message)

    monkeypatch.setattr(f"lowcomm.assemble.{where}", full)
    out = tmp_path / "out"
    assert main(["train", "--config", str(config), "--num_steps", "20", "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("lowcomm: error:") and "No space left on device" in error
    assert ("--resume" in error) == (where == "save_file"), "there is a checkpoint to go on from"


def test_a_disk_that_fills_up_while_training_is_told_with_what_was_saved(capsys, config, tmp_path, monkeypatch):
    def full(descriptor):
        if (tmp_path / "out" / "checkpoints" / "t00000020").exists():
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert main(["train", "--config", str(config), "--out", str(tmp_path / "out")]) == 1
    error, folder = capsys.readouterr().err, tmp_path / "out" / "checkpoints"
    assert f"{folder / 't00000020' / 'replica00000.partial'} cannot be written" in error and "No space left" in error
    assert f"the last good checkpoint is {folder / 't00000010'}, which --resume goes on from" in error
    assert error.count("\n") == 1


def test_a_run_of_former_names_is_refused(capsys, config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.rank1.jsonl").touch()
    for flags in ([], ["--resume"]):
        error = refused(capsys, "train", "--config", str(config), "--out", str(tmp_path / "out"), *flags)
        assert "metrics.rank1.jsonl is of an earlier lowcomm" in error
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["metrics.rank1.jsonl"]


def test_no_free_disk_is_refused(capsys, config, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    error = refused(capsys, "train", "--config", str(config), "--out", str(tmp_path / "out"))
    assert "free" in error
    assert main(["train", "--config", str(config), "--out", str(tmp_path / "out"), "--checkpoint.every", "0"]) == 0


def test_a_run_alone_writes_all_its_files_and_is_not_overwritten(capsys, config, tmp_path):
    out = tmp_path / "out"
    assert main(["train", "--config", str(config), "--out", str(out)]) == 0
    assert {x.name for x in out.iterdir()} == {
        "config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "final.safetensors",
    }  # fmt: skip
    lines = read(out / "metrics.jsonl")
    assert [r["t"] for r in lines if r["kind"] == "step"] == list(range(1, 41))
    assert lines[-1]["kind"] == "summary" and lines[-1]["tokens"] == 40 * 2 * 32
    first, last = (next(r for r in order if r["kind"] == "step") for order in (lines, lines[::-1]))
    assert last["loss"] < first["loss"] - 0.5, "it learns"
    assert "already holds a run" in refused(capsys, "train", "--config", str(config), "--out", str(out))


def test_without_validation_text_a_run_trains_and_evaluates_nothing(capsys, config, tmp_path):
    out, flags = tmp_path / "out", ["--data.validation_fraction", "0", "--num_steps", "20"]
    assert main(["train", "--config", str(config), "--out", str(out), *flags]) == 0
    lines = read(out / "metrics.jsonl")
    assert {line["kind"] for line in lines} == {"step", "round", "summary"}
    assert "loss" in lines[-1] and not {"val_loss", "val_bits_per_byte"} & lines[-1].keys()
    assert main(["report", str(out)]) == 0 and (out / "report.html").exists()


def test_train_bpe_keeps_a_tokenizer_whose_shards_are_there(capsys, config, tmp_path):
    bpe, text = tmp_path / "bpe.json", f"[{tmp_path}/text/*.txt]"
    flags = ["data", "--source", "Files", "--source.paths", text, "--out", str(tmp_path / "shards")]
    error = refused(capsys, *flags, "--train_bpe", "300")
    assert "--tokenizer BPE --tokenizer.path FILE" in error
    flags += ["--tokenizer", "BPE", "--tokenizer.path", str(bpe), "--train_bpe"]
    assert main([*flags, "300"]) == 0
    before = bpe.read_bytes()
    assert "is there already" in refused(capsys, *flags, "280")
    assert bpe.read_bytes() == before


def test_a_checkpoint_of_another_run_is_refused(capsys, config, tmp_path):
    flags = ["train", "--config", str(config), "--out", str(tmp_path / "out"), "--num_steps", "10"]
    assert main(flags) == 0
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    error = refused(capsys, *flags, "--resume", "--optimizer.args.lr", "1e-4")
    assert "run_id" in error or "another run" in error
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before, "nothing is lost"


def test_a_run_that_begins_again_replaces_no_other_one_and_none_that_ended(capsys, config, tmp_path):
    out = tmp_path / "out"
    flags = ["train", "--config", str(config), "--out", str(out), "--num_steps", "8", "--checkpoint.every", "0"]
    assert main(flags) == 0
    whole = {x: x.read_bytes() for x in out.iterdir()}
    assert "a run that ended" in refused(capsys, *flags, "--resume")
    assert {x: x.read_bytes() for x in out.iterdir()} == whole

    metrics = out / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:-3]))  # it was interrupted
    assert "of another run" in refused(capsys, *flags, "--resume", "--seed", "1")
    assert metrics.read_text() == "".join(lines[:-3])
    assert main([*flags, "--resume", "--log.every", "2"]) == 0
    assert [line["t"] for line in read(metrics) if line["kind"] == "step"] == [2, 4, 6, 8]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_checkpoint(capsys, config, tmp_path):
    flags = ["--optimizer", '{"path": "torch.optim.SGD", "args": {"lr": 1.0e30}}', "--schedule.num_warmup_steps", "30"]
    assert main(["train", "--config", str(config), "--out", str(tmp_path / "out"), *flags]) == 1
    error = capsys.readouterr().err
    step = int(error.split("inner step ")[1].split()[0])
    assert "nan" in error or "inf" in error
    saved = sorted((tmp_path / "out" / "checkpoints").glob("t*")) if step > 10 else []
    assert (str(saved[-1]) if saved else "no checkpoint was saved before it") in error


def test_where_a_loss_is_not_finite_the_newest_whole_checkpoint_is_named(capsys, config, tmp_path, monkeypatch):
    def diverge(run, out, resumes):
        for name in ("t00000007", "t00000020", "t00000010", "t00000030.partial"):
            (out / "checkpoints" / name / "replica00000").mkdir(parents=True)
        raise Diverged(24, float("nan"))

    monkeypatch.setattr("lowcomm.cli.run_replica", diverge)
    assert main(["train", "--config", str(config), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "inner step 24" in error and f"checkpoint is {tmp_path / 'out' / 'checkpoints' / 't00000020'}," in error


def test_naming_another_class_keeps_no_settings_of_the_default_one():
    run, _ = parse_run(["--num_steps", "1", "--algorithm.outer", "SGD"])
    assert run.algorithm == DiLoCo(outer=SGD(lr=1.0))
    run, _ = parse_run(["--num_steps", "1", "--algorithm", "LocalSGD"])
    assert run.algorithm == LocalSGD()
    run, _ = parse_run(["--num_steps", "1", "--algorithm.every", "7"])
    assert run.algorithm == DiLoCo(every=7, outer=Nesterov())


def test_a_flag_of_the_default_optimizer_changes_that_argument_alone(tmp_path):
    run, _ = parse_run(["--num_steps", "1", "--optimizer.args.lr", "0.5"])
    assert run.optimizer == Optimizer(args={**Optimizer().args, "lr": 0.5})
    (tmp_path / "run.yaml").write_text("num_steps: 1\noptimizer: {path: torch.optim.SGD, args: {lr: 0.1}}\n")
    run, _ = parse_run(["--config", str(tmp_path / "run.yaml"), "--optimizer.args.momentum", "0.9"])
    assert run.optimizer == Optimizer("torch.optim.SGD", {"lr": 0.1, "momentum": 0.9})
    run, _ = parse_run(["--num_steps", "1", "--optimizer.path", "torch.optim.SGD", "--optimizer.args.lr", "0.5"])
    assert run.optimizer == Optimizer("torch.optim.SGD", {"lr": 0.5})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_complete_runs_that_read_the_same_again(path, tmp_path):
    run, _ = parse_run(["--config", str(path)])
    described = yaml.safe_dump(describe(run))
    assert yaml.safe_load(described) == describe(run)
    (tmp_path / "run.yaml").write_text(described)
    assert parse_run(["--config", str(tmp_path / "run.yaml")])[0] == run


def test_dry_run_prints_the_run_and_its_traffic_and_writes_nothing(capsys, config, tmp_path):
    assert main(["train", "--config", str(config), "--dry_run", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["algorithm"]["init_args"]["every"] == 7
    run, _ = parse_run(["--config", str(config)])
    num_parameters = sum(p.numel() for p in run.model.build(256, 0).parameters())
    # 40 steps by 7: five rounds and a partial one; 2 (n - 1) / n x 4 bytes a parameter
    assert f"{4 * num_parameters:,} bytes a round, 6 rounds" in printed
    assert f"# 4 replicas, {num_parameters:,} parameters: each replica sends {6 * num_parameters:,} bytes" in printed
    assert not (tmp_path / "out").exists()


def test_dry_run_under_torchrun_is_of_that_world(capsys, config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["train", "--config", str(config), "--dry_run"]) == 0
    assert re.findall(r"# (\d+) replicas", capsys.readouterr().out) == ["3"]


@pytest.mark.parametrize("world", ["three", "0", "-1"])
def test_dry_run_of_no_number_of_ranks_is_refused(capsys, config, monkeypatch, world):
    monkeypatch.setenv("WORLD_SIZE", world)
    assert f"WORLD_SIZE is '{world}'" in refused(capsys, "train", "--config", str(config), "--dry_run")


def test_dry_run_says_what_it_cannot_count(capsys, config):
    flags = ["--optimizer.path", "torch.optim.SparseAdam", "--optimizer.args", "{lr: 0.1}"]
    assert main(["train", "--config", str(config), *flags, "--dry_run"]) == 0
    assert "# 4 replicas: a step of torch.optim.sparse_adam.SparseAdam fails (RuntimeError: " in capsys.readouterr().out
    flags = ["--algorithm", "DESLOC", "--algorithm.periods", "{param: 4, momentum: 8}"]
    assert main(["train", "--config", str(config), *flags, "--dry_run"]) == 0
    assert "# 4 replicas: periods names ['momentum'], but" in capsys.readouterr().out


def test_commands(capsys):
    assert main([]) == 0 and "lowcomm COMMAND" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert "no command 'trian'" in refused(capsys, "trian")


def flags_of(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    usage = capsys.readouterr().out.split("\n\n")[0]
    return set(re.findall(r"--([a-z_]+(?:\.[a-z_]+)*)", usage))


def test_the_command_line_is_frozen(capsys):
    """A new option goes into a config object that has the right to it; a new flag of a command goes here on purpose."""
    train = flags_of(capsys, "train")
    assert {flag for flag in train if "." not in flag} == {
        *(
            "config",
            "out",
            "resume",
            "dry_run",
            "model",
            "data",
            "algorithm",
            "participation",
            "optimizer",
            "schedule",
            "batch",
        ),
        *("evaluation", "checkpoint", "log", "num_steps", "num_tokens", "precision", "compile", "clip_norm"),
        *("seed", "device", "backend", "timeout_s", "on_loss", "grace_s", "participation"),
    }
    own = {"cluster", "timing_only", "num_resident", "stacked"}
    assert flags_of(capsys, "simulate") == (train - {"resume", "dry_run"}) | own
    assert flags_of(capsys, "retime") == {"cluster", "out"}
    assert flags_of(capsys, "data") == {"source", "tokenizer", "out", "shard_tokens", "train_bpe"}
    assert flags_of(capsys, "report") == {"out"}
