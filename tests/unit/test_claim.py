"""A directory belongs to one run at a time, as long as its process lives and no longer."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lowcomm.claim import claimed
from lowcomm.cli import main
from lowcomm.data.data import Data
from tests.multiprocess.launch import ROOT, write_tiny

HOLD = """
import sys, time
from pathlib import Path
from lowcomm.claim import claimed
with claimed(Path(sys.argv[1]), "replica00000"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process, which holds the directory of a run."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_twin_is_refused_before_it_reads_anything_until_the_first_is_dead(capsys, holder, tmp_path, monkeypatch):
    out, config = tmp_path / "out", write_tiny(tmp_path)
    flags = ["--config", str(config), "--num_steps", "10", "--out", str(out)]
    commands = [["train"], ["train", "--resume"], ["simulate", "--cluster", "LAN", "--checkpoint.every", "0"]]
    with monkeypatch.context() as patch:
        patch.setattr(Data, "load", lambda self: pytest.fail("it read"))
        for command in commands:
            assert main([*command, *flags]) == 2
            error = capsys.readouterr().err
            words = f"{out} already is in use by process {holder.pid} on {socket.gethostname()} since 20"
            assert words in error and "another --out" in error
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert [path.name for path in out.iterdir()] == ["replica00000.claim"], "what a dead process leaves"
    assert main(["train", "--resume", *flags]) == 0
    assert not list(out.glob("*.claim"))


def test_the_ranks_of_one_run_share_a_directory(tmp_path):
    with claimed(tmp_path, "replica00000"), claimed(tmp_path, "replica00001"):
        for name in ("replica00000", "replica00001"):
            with pytest.raises(ValueError, match=f"process {os.getpid()} on"), claimed(tmp_path, name):
                pass
    with claimed(tmp_path, "replica00000"):
        pass


def test_many_who_come_and_go_never_hold_it_two_at_once(tmp_path):
    """The file is made and removed all the while, so whoever locks one must see that it is still the one there."""
    inside, times, most, reasons = 0, 0, 0, set()
    lock = threading.Lock()

    def come_and_go():
        nonlocal inside, times, most
        for _ in range(200):
            try:
                with claimed(tmp_path / "a" / "b", "replica00000"):
                    with lock:
                        inside, times = inside + 1, times + 1
                        most = max(most, inside)
                    with lock:
                        inside -= 1
            except ValueError as error:
                reasons.add("in use" if "already is in use" in str(error) else str(error))

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(reason == "in use" or "No such file" in reason for reason in reasons), reasons
    assert most == 1 and times > 10


@pytest.mark.parametrize("out", ["/proc/none/such", "/dev/null/out", "x" * 300])
def test_what_cannot_be_written_is_refused(capsys, tmp_path, out):
    flags = ["--config", str(write_tiny(tmp_path)), "--out", str(tmp_path / out)]
    assert main(["train", *flags]) == 2
    error = capsys.readouterr().err
    assert "--out is" in error and out in error and error.count("\n") == 1


def test_a_disk_that_locks_nothing_is_told(tmp_path, monkeypatch):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="cannot be locked .*unnoticed"), claimed(tmp_path / "out", "replica00000"):
        assert "process" in (tmp_path / "out" / "replica00000.claim").read_text()


def test_an_error_within_releases_it(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), claimed(tmp_path / "out", "replica00000"):  # noqa: PT012
            Path(tmp_path / "out" / "x").touch()
            raise KeyError
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]
    with claimed(tmp_path / "a" / "b", "replica00000"):
        pass
    assert not (tmp_path / "a").exists(), "what was made for nothing goes"
