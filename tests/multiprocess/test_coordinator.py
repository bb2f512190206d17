"""The coordinator and its ranks as processes: killed, stopped, behind TLS."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from lowcomm.coordinator.client import Access, Coordinator, Expelled
from lowcomm.participation.base import Arrival
from tests.multiprocess.coordinated import DEAD_AFTER_S, rank
from tests.multiprocess.launch import ROOT, free_port

Popen = subprocess.Popen[str]


class Jobs:
    """Processes that end with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.all = folder, free_port(), list[Popen]()

    def start(self, *argv: str) -> Popen:
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.all.append(
            subprocess.Popen([sys.executable, "-m", *argv], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        )
        return self.all[-1]

    def serve(self, num_replicas: int) -> Popen:
        """Returns when it listens."""
        state = str(self.folder / "state.json")
        served = self.start("tests.multiprocess.coordinated", "serve", state, str(self.port), str(num_replicas))
        assert served.stdout is not None and served.stdout.readline().startswith("coordinator at ws://")
        return served

    def rank(self, replica: int, num_rounds: int, pause_s: float) -> Popen:
        url = f"ws://127.0.0.1:{self.port}"
        return self.start("tests.multiprocess.coordinated", "rank", url, str(replica), str(num_rounds), str(pause_s))

    def status(self) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/status.json", timeout=5) as answer:
            return json.load(answer)


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    made = Jobs(tmp_path)
    yield made
    for job in made.all:
        job.kill()
        job.communicate()


def until(condition: Any, limit_s: float = 60) -> None:
    """Wait for it."""
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, "it did not come to pass"
        time.sleep(0.03)


def rank_until_the_end(url: str) -> None:
    """Replica 0, until there is no coordinator any more."""
    with suppress(ConnectionError):
        rank(url, 0, 10**6, 0.02)


def test_a_killed_coordinator_loses_no_round_and_decides_none_twice(jobs: Jobs) -> None:
    served = jobs.serve(3)
    with ThreadPoolExecutor(3) as pool:
        ranks = [pool.submit(rank, f"ws://127.0.0.1:{jobs.port}", replica, 60, 0.02) for replica in range(3)]
        for at_least in (10, 25):
            until(lambda: jobs.status()["round"] >= at_least)  # noqa: B023 - called at once
            served.kill()
            served.wait()
            served = jobs.serve(3)
        views = [done.result(60) for done in ranks]
    assert views[0] == views[1] == views[2]  # the same rounds, epochs and tokens, whoever heard of them when
    assert [view.round for view in views[0]] == list(range(1, 61))
    assert all(view.members == (0, 1, 2) and view.tokens == (10.0, 10.0, 10.0) for view in views[0])
    epochs = [view.epoch for view in views[0]]
    assert epochs == sorted(epochs) and len(set(epochs)) == 3


def test_a_stopped_rank_is_noticed_and_comes_back(jobs: Jobs) -> None:
    jobs.serve(2)
    other = jobs.rank(1, 10**6, 0.02)
    Thread(target=rank_until_the_end, args=[f"ws://127.0.0.1:{jobs.port}"], daemon=True).start()
    until(lambda: jobs.status()["round"] >= 3)
    other.send_signal(signal.SIGSTOP)
    stopped_s = time.monotonic()
    until(lambda: jobs.status()["replicas"][1]["state"] == "gone")
    noticed_s = time.monotonic() - stopped_s
    alone = jobs.status()["round"]
    until(lambda: jobs.status()["round"] > alone + 2)  # the other goes on
    assert "dead, stopped" in jobs.status()["replicas"][1]["why"]
    other.send_signal(signal.SIGCONT)
    until(lambda: jobs.status()["replicas"][1]["state"] != "gone")
    together = jobs.status()["replicas"][1]["num_rounds"]
    until(lambda: jobs.status()["replicas"][1]["num_rounds"] > together)
    assert noticed_s <= DEAD_AFTER_S + 0.5


def test_a_killed_rank_is_noticed_at_once(jobs: Jobs) -> None:
    jobs.serve(2)
    other = jobs.rank(1, 10**6, 0.02)
    Thread(target=rank_until_the_end, args=[f"ws://127.0.0.1:{jobs.port}"], daemon=True).start()
    until(lambda: jobs.status()["round"] >= 3)
    other.kill()
    killed_s = time.monotonic()
    until(lambda: jobs.status()["replicas"][1]["state"] == "gone")
    assert time.monotonic() - killed_s < DEAD_AFTER_S / 2


def test_a_zombie_is_expelled(jobs: Jobs) -> None:
    jobs.serve(1)
    access = Access(f"ws://127.0.0.1:{jobs.port}", patience_s=20)
    old = Coordinator(access, 0, {"config": "same"})
    assert old.arrive(Arrival(0, 0.0, 0, 1, 10.0)).round == 1
    new = Coordinator(access, 0, {"config": "same"})
    with pytest.raises(Expelled, match="another process has joined as replica 0"):
        old.arrive(Arrival(0, 0.0, 1, 2, 20.0))
    with pytest.raises(ValueError, match="differs from those that are in, in its config"):
        Coordinator(access, 1, {"config": "other"})
    assert new.arrive(Arrival(0, 0.0, 0, 1, 10.0)).round == 2
    new.leave()


def test_who_finds_no_coordinator_says_so() -> None:
    with pytest.raises(ConnectionError, match="could not be reached for 0.2 s"):
        Coordinator(Access(f"ws://127.0.0.1:{free_port()}", patience_s=0.2), 0, {})


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl, which makes certificates, is missing")
def test_the_command_with_tls_and_a_secret(jobs: Jobs, tmp_path: Path) -> None:
    cert, key, secret = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "secret"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    secret.write_text("a long random word\n")
    flags = {"tls_cert": cert, "tls_key": key, "secret_file": secret, "state": tmp_path / "s.json", "port": 0}
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = jobs.start("lowcomm", "coordinator", "--rule", "FirstK", "--rule.k", "1", *argv)
    assert command.stdout is not None
    line = command.stdout.readline()
    found = re.match(r"coordinator at (wss://127\.0\.0\.1:\d+), its page at (https://[^;]+);", line)
    assert found, line
    access = Access(found[1], "a long random word", str(cert))
    seat = Coordinator(access, 0, {})
    assert seat.arrive(Arrival(0, 0.0, 0, 1, 10.0)).members == (0,)
    seat.leave()
    with pytest.raises(ValueError, match="has a secret that is not the one given"):
        Coordinator(Access(found[1], "another word", str(cert)), 0, {})
    with pytest.raises(ValueError, match="is no coordinator to trust"):
        Coordinator(Access(found[1], "a long random word"), 0, {})
    trusting = ssl.create_default_context(cafile=str(cert))
    with urllib.request.urlopen(f"{found[2]}?token=a%20long%20random%20word", context=trusting, timeout=5) as answer:
        assert "<title>lowcomm coordinator</title>" in answer.read().decode()
    command.terminate()
    assert command.wait(20) == 128 + signal.SIGTERM
