"""Training needs nobody who watches, and no thread or notebook of its own."""

import asyncio
import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lowcomm.cli import Interrupted, main
from lowcomm.console import show
from lowcomm.metrics import Metrics, ProgressSink, Sink, read
from tests.multiprocess.launch import ROOT, write_tiny

STEPS = 20


@pytest.fixture
def flags(tmp_path):
    text = ["--config", str(write_tiny(tmp_path)), "--num_steps", str(STEPS), "--out", str(tmp_path / "out")]
    return ["train", *text, "--device", "cpu"]


def check_whole(out: Path) -> None:
    assert read(out / "metrics.jsonl")[-1]["kind"] == "summary" and (out / "final.safetensors").exists()
    assert not list(out.glob("*.claim"))


# The last is a terminal that goes away: half of a pair, whose other half is closed.
@pytest.mark.parametrize("streams", ["{} | head -c 1", "{} >&- 2>&-", "{} >/dev/full 2>/dev/full", "terminal"])
def test_a_run_outlives_its_console(flags, tmp_path, streams):
    command = f"{sys.executable} -m lowcomm " + " ".join(f"'{flag}'" for flag in flags)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if streams == "terminal":
        ours, theirs = os.openpty()
        process = subprocess.Popen(command, shell=True, env=env, stdout=theirs, stderr=theirs, start_new_session=True)
        os.close(theirs)
        assert os.read(ours, 1)
        os.close(ours)
        code = process.wait(100)
    else:
        command = f"set -o pipefail; {streams.format(command)}"
        code = subprocess.run(["bash", "-c", command], env=env, capture_output=True, timeout=100).returncode
    assert code == 0
    check_whole(tmp_path / "out")


@pytest.mark.parametrize("where", ["thread", "event loop", "thread of an event loop"])
def test_a_run_needs_not_the_main_thread_nor_to_own_it(flags, tmp_path, where):
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    codes = []
    if where == "thread":
        thread = threading.Thread(target=lambda: codes.append(main(flags)))
        thread.start()
        thread.join()
    else:

        async def cell():
            codes.append(main(flags) if where == "event loop" else await asyncio.to_thread(main, flags))

        asyncio.run(cell())
    assert codes == [0]
    check_whole(tmp_path / "out")
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before


class Failing(Sink):
    """Fails from its second line on."""

    def __init__(self, error):
        self.error, self.num_lines = error, 0

    def write(self, record):
        self.num_lines += 1
        if self.num_lines == 2:
            raise self.error

    def close(self):
        raise self.error


LINES = [{"kind": "step", "t": t} for t in (1, 2, 3)]
DISPLAY_FAILS = [BrokenPipeError(32, "gone"), OSError(5, "tty"), ValueError("I/O operation on closed file"),
                 UnicodeEncodeError("ascii", "ä", 0, 1, "no"), RuntimeError("no network"), SystemExit(1)]  # fmt: skip


@pytest.mark.parametrize("error", DISPLAY_FAILS, ids=lambda x: type(x).__name__)
def test_a_sink_that_fails_is_left_out_and_said_to_be(capsys, tmp_path, error):
    failing, sound = Failing(error), Failing(None)
    sound.write = lambda record: setattr(sound, "num_lines", sound.num_lines + 1)
    sound.close = lambda: None
    metrics = Metrics(tmp_path / "m", [failing, sound])
    for line in LINES:
        metrics.write(line)
    metrics.close()
    assert read(tmp_path / "m") == LINES and (failing.num_lines, sound.num_lines) == (2, 3)
    assert capsys.readouterr().err.count("Failing failed") == 1


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), Interrupted(signal.SIGTERM)])
def test_who_stops_a_run_while_it_shows_a_line_does_stop_it(tmp_path, stop):
    metrics = Metrics(tmp_path / "m", [Failing(stop)])
    metrics.write(LINES[0])
    with pytest.raises(type(stop)):
        metrics.write(LINES[1])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_a_console_cannot_spell_is_shown_in_other_letters(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    show("Δ loss")
    sink = ProgressSink(3)
    sink.write({"kind": "fault", "t": 1, "message": "Δ is lost"})
    sys.stdout.flush()
    delta = "Δ" if encoding == "utf-8" else "\\u0394"
    assert raw.getvalue().decode(encoding) == f"{delta} loss\nfault at step 1: {delta} is lost\n"


def test_there_may_be_no_console_at_all(monkeypatch, tmp_path):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    show("nobody reads this")
    metrics = Metrics(tmp_path / "m", [ProgressSink(3)])
    for line in LINES:
        metrics.write(line)
    assert main(["--version"]) == 0 and main(["no such command"]) == 2
