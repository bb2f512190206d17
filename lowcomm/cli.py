"""The command line: ``lowcomm train``, ``simulate``, ``retime``, ``data``, ``report`` and ``coordinator``.

Flags mirror the config objects (``--algorithm.every 50``); a YAML file given with --config has the same shape.
Exit codes: 0 done, 1 failed while training, 2 bad input (nothing was started or lost), 130 and 143 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_loader

import lowcomm
from lowcomm.assemble import run_replica
from lowcomm.claim import claimed
from lowcomm.comm.base import Late, PeerLost
from lowcomm.comm.launched import number
from lowcomm.config import Run, describe
from lowcomm.console import abandon_dead_streams, open_closed_streams, show
from lowcomm.coordinator.server import serve
from lowcomm.coordinator.settings import Serving
from lowcomm.data import BPE, Source, Tokenizer, train_bpe, write_shards
from lowcomm.data.shards import check_target
from lowcomm.ledger import Diverged
from lowcomm.parsing import instantiate, load_yaml, reason
from lowcomm.places import name_of
from lowcomm.predict import predict
from lowcomm.reduce import NonFinite
from lowcomm.report.page import write_report
from lowcomm.report.runs import load_runs
from lowcomm.report.table import summary_table
from lowcomm.sim.cluster.cluster import Cluster
from lowcomm.sim.retime import retime
from lowcomm.sim.simulate import simulate
from lowcomm.sim.wire.clock import Deadlock

_USAGE = """usage: lowcomm COMMAND [FLAGS]

  train      train a model; alone, or one replica a process under torchrun
  simulate   train one replica on each host of a cluster, in virtual time on this machine
  retime     give a simulated run the times of another cluster, without training again
  data       write tokens into memory-mapped shards
  report     compare runs: a table, and pictures in one HTML file
  coordinator
             decide who takes part in each round of a run, and show it on a live page

lowcomm COMMAND --help lists the flags of a command.
"""


class Interrupted(BaseException):
    """A signal asked this process to stop; as KeyboardInterrupt, no error to recover from wherever it comes."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; also in a thread, and with no console to speak to."""
    open_closed_streams()
    try:
        return _command(sys.argv[1:] if argv is None else list(argv))
    finally:
        abandon_dead_streams()


def _command(argv: list[str]) -> int:
    commands = {"train": _train, "simulate": _simulate, "retime": _retime, "data": _data, "report": _report}
    commands |= {"coordinator": _coordinator}
    if argv and argv[0] in commands:
        try:
            return commands[argv[0]](argv[1:])
        except argparse.ArgumentError as error:
            return _say(
                f"error: {reason(error)}\nlowcomm {argv[0]} --help lists flags and the classes that they take", 2
            )
        except ValueError as error:
            return _say(f"error: {error}", 2)
        except OSError as error:  # a disk that is full or not ours to write
            return _say(f"error: {error}", 1)
        except KeyboardInterrupt:
            return _say("stopped by SIGINT", 128 + signal.SIGINT)
    if argv == ["--version"]:
        show(lowcomm.__version__)
        return 0
    show(_USAGE.rstrip("\n"))
    return 0 if argv in ([], ["-h"], ["--help"]) else _say(f"error: there is no command {argv[0]!r}", 2)


def parse_run(argv: Sequence[str]) -> tuple[Run, argparse.Namespace]:
    """The run that flags and YAML describe, and the flags of `lowcomm train` itself (out, resume, dry_run).

    Raises:
        ValueError, argparse.ArgumentError: for an unknown key, a wrong type, a value out of range.
    """
    parser = _run_parser("train", "Train a model; alone, or one replica a process under torchrun.")
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint in --out")
    parser.add_argument("--dry_run", action="store_true", help="print the resolved run and its traffic, train nothing")
    parts = _parse(parser, argv)
    own = argparse.Namespace(
        out=Path(parts.pop("out", _OUT)), resume=parts.pop("resume", False), dry_run=parts.pop("dry_run", False)
    )
    return Run(**parts), own


def parse_simulation(argv: Sequence[str]) -> tuple[Run, Cluster, argparse.Namespace]:
    """The run, the cluster, and the other flags of `lowcomm simulate` (out, ...); raises as `parse_run`."""
    parser = _run_parser("simulate", "Train one replica on each host of a cluster, in virtual time on this machine.")
    parser.add_argument("--cluster", type=Cluster, sub_configs=True, required=True, help="YAML, or a preset's name")
    parser.add_argument("--timing_only", type=bool, default=False, help="true: shapes without values, so no losses")
    parser.add_argument(
        "--num_resident", type=int, default=None, help="replicas on the device at once, others moved out"
    )
    parser.add_argument("--stacked", type=bool, default=False, help="true: compute many replicas' gradients at once")
    parts = _parse(parser, argv)
    if "cluster" not in parts:
        raise ValueError("--cluster is missing; give a YAML file or a preset such as Uniform")
    cluster = parts.pop("cluster")
    own = argparse.Namespace(
        out=Path(parts.pop("out", _OUT)),
        timing_only=parts.pop("timing_only", False),
        num_resident=parts.pop("num_resident", None),
        stacked=parts.pop("stacked", False),
    )
    return Run(**parts), cluster, own


def _run_parser(command: str, description: str) -> ArgumentParser:
    parser = _parser(command, description)
    parser.add_argument("--config", action="config", help="YAML in the shape of these flags")
    parser.add_argument("--out", type=str, default=_OUT, help="the run's directory")
    parser.add_class_arguments(Run)
    return parser


def _parse(parser: ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """What was given, as objects by name."""
    # Without the parser's own defaults the dataclasses' apply, so that naming another class never keeps settings of
    # the default one; the classes that flags like --algorithm.every refer to are therefore named first.
    classes = {name: describe(getattr(_DEFAULT, name))["class_path"] for name in ("model", "algorithm", "schedule")}
    named = [f"--{name}={path}" for name, path in classes.items()]
    if not any(flag.startswith("--optimizer.path") for flag in argv):  # --optimizer.args.lr changes the lr alone
        named.append(f"--optimizer.args={json.dumps(_DEFAULT.optimizer.args)}")
    given = parser.parse_args([*named, *argv], defaults=False)
    parts = vars(instantiate(parser, given, {**get_type_hints(Run), "cluster": Cluster, "out": str}))
    parts.pop("config", None)
    return parts


_OUT = "runs/latest"
_DEFAULT = Run(num_steps=1)


def _train(argv: list[str]) -> int:
    run, own = parse_run(argv)
    if own.dry_run:
        return _dry_run(run)
    _check_directory(own.out)
    try:
        with _interruptible():
            run_replica(run, own.out, own.resume)
    except Interrupted as stop:
        return _say(f"stopped by {stop}; {_saved(own.out)}; start it again with --resume", 128 + stop.signum)
    except Diverged as error:
        advice = "A lower learning rate or clip_norm may help."
        return _say(f"error: {error}, so training stopped; {_saved(own.out)}. {advice}", 1)
    except (PeerLost, Late, NonFinite) as error:
        return _say(f"error: {error}; {_saved(own.out)}; start it again with --resume", 1)
    except OSError as error:  # such as a disk that is full
        return _say(f"error: {error}; {_saved(own.out)}", 1)
    return 0


def _saved(out: Path) -> str:
    """The newest checkpoint of this machine, in words."""
    whole = {int(x.parent.name[1:]): x.parent for x in (out / "checkpoints").glob("t*[0-9]/replica*[0-9]")}
    if not whole:
        return "no checkpoint was saved before it"
    return f"the last good checkpoint is {whole[max(whole)]}, which --resume goes on from"


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `Interrupted`; in a thread, to which no signals come, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, _interrupt) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, action in before.items():
            signal.signal(signum, signal.SIG_DFL if action is None else action)


def _simulate(argv: list[str]) -> int:
    run, cluster, own = parse_simulation(argv)
    _check_directory(own.out)
    try:
        with claimed(own.out, name_of(0)):
            simulate(run, cluster, own.out, own.timing_only, own.num_resident, own.stacked)
    except Diverged as error:
        return _say(f"error: {error}, so the simulation stopped. A lower learning rate or clip_norm may help.", 1)
    except (PeerLost, Late, NonFinite, Deadlock) as error:
        return _say("; ".join([f"error: {error}", *getattr(error, "__notes__", [])]), 1)
    return 0


def _retime(argv: list[str]) -> int:
    parser = _parser("retime", "Give a simulated run the times of another cluster, without training again.")
    parser.add_argument("dir", type=str, help="the directory of a simulated run")
    parser.add_argument("--cluster", type=Cluster, sub_configs=True, required=True, help="YAML, or a preset's name")
    parser.add_argument("--out", type=str, required=True, help="a new directory")
    given = parser.parse_args(argv, defaults=False)  # the dataclasses' own apply, see _parse
    given = instantiate(parser, given, {"cluster": Cluster})
    config = Path(given.dir) / "config.yaml"
    if not config.exists():
        raise ValueError(f"there is no {config}; give the directory of a simulated run")
    run, _ = parse_run(["--config", str(config)])
    try:
        with claimed(Path(given.out), name_of(0)):
            summary = retime(Path(given.dir), run, given.cluster, Path(given.out))
    except Deadlock as error:
        return _say(f"error: {error}", 1)
    show(f"{given.out}: {summary['t']:,} steps in {summary['time_s']:,.1f} s of virtual time")
    return 0


def _dry_run(run: Run) -> int:
    show(yaml.safe_dump(describe(run), sort_keys=False).rstrip("\n"))
    world = os.environ.get("WORLD_SIZE")
    for num_replicas in [number("WORLD_SIZE", 1)] if world else [2, 4, 8]:
        try:
            seen = predict(run, num_replicas, run.data.tokenizer.vocab_size)
        except ValueError as error:
            if world:
                raise
            show(f"# {num_replicas} replicas: {error}")
            continue
        show(
            f"# {num_replicas} replicas, {seen.num_parameters:,} parameters: each replica sends "
            f"{seen.round_bytes:,.0f} bytes a round, {seen.num_rounds:,} rounds in {seen.num_steps:,} steps, "
            f"{seen.step_bytes:,.0f} bytes a step"
        )
    return 0


def _data(argv: list[str]) -> int:
    parser = _parser("data", "Write a source's tokens into memory-mapped shards.")
    parser.add_argument("--source", type=Source, required=True)
    parser.add_argument("--tokenizer", type=Tokenizer, required=True)
    parser.add_argument("--out", type=str, required=True, help="a new or empty directory")
    parser.add_argument("--shard_tokens", type=int, default=100_000_000, help="tokens in a shard file")
    parser.add_argument(
        "--train_bpe", type=int, default=None, help="first train a BPE of this vocabulary on the source"
    )
    if not any(x.startswith("--tokenizer") for x in argv):
        argv = ["--tokenizer=lowcomm.data.Bytes", *argv]
    given = instantiate(
        parser, parser.parse_args(argv), {"source": Source, "tokenizer": Tokenizer, "shard_tokens": int}
    )
    if given.train_bpe is not None:
        if not isinstance(given.tokenizer, BPE):
            raise ValueError(
                "--train_bpe writes a tokenizer to a file; name it with --tokenizer BPE --tokenizer.path FILE"
            )
        check_target(given.out, given.shard_tokens)  # before the file, which older shards may need, is replaced
        train_bpe(given.source, given.train_bpe, given.tokenizer.path)
    show(str(write_shards(given.source, given.tokenizer, given.out, given.shard_tokens)))
    return 0


def _report(argv: list[str]) -> int:
    parser = _parser("report", "Compare runs: a table here, and pictures in one HTML file.")
    parser.add_argument("dirs", type=str, nargs="+", help="run directories")
    parser.add_argument("--out", type=str, default=None, help="the HTML file; report.html in the first directory")
    given = parser.parse_args(argv)
    dirs = [Path(d) for d in given.dirs]
    show(summary_table([run.summary() for run in load_runs(dirs)]))
    show(" ".join(["runs:", *map(str, dirs)]))
    show("report: " + str(write_report(dirs, Path(given.out) if given.out else dirs[0] / "report.html")))
    return 0


def _coordinator(argv: list[str]) -> int:
    parser = _parser("coordinator", "Decide who takes part in each round of a run, and show it on a live page.")
    parser.add_argument("--config", action="config", help="YAML in the shape of these flags")
    parser.add_class_arguments(Serving)
    given = vars(instantiate(parser, parser.parse_args(argv, defaults=False), get_type_hints(Serving)))
    given.pop("config", None)
    stopped = serve(Serving(**given))
    return _say(f"stopped by {signal.Signals(stopped).name}; it goes on when started again", 128 + stopped)


def _parser(command: str, description: str) -> ArgumentParser:
    # Short class names (--algorithm LocalSGD) are known once their modules are.
    rooms = ["rounds", "algorithms", "codecs", "compress", "feedback", "outer", "models", "data", "optim", "sim"]
    for room in (*rooms, "participation"):
        package = importlib.import_module(f"lowcomm.{room}")
        for module in pkgutil.walk_packages(package.__path__, f"lowcomm.{room}."):
            importlib.import_module(module.name)
    set_loader("lowcomm", load_yaml, (yaml.YAMLError,))
    prog = f"lowcomm {command}"
    return ArgumentParser(prog=prog, description=description, exit_on_error=False, parser_mode="lowcomm")


def _check_directory(out: Path) -> None:
    parts = (out, *out.absolute().parents)
    place = next(path for path in parts if os.path.exists(path))  # `Path.exists` fails where it may not look
    if not place.is_dir():
        raise ValueError(f"--out is {out}, but {place} is a file; name a directory for the run")


def _interrupt(signum: int, frame: Any) -> None:
    raise Interrupted(signum)


def _say(message: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")
    show(f"lowcomm: {message}" if rank == "0" else f"lowcomm (rank {rank}): {message}", sys.stderr)
    return code
