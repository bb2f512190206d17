"""launch/slow_network limits rates as it says, passes on how its ranks end, and leaves nothing behind."""

import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from launch import hosts, slow_network
from tests.multiprocess.launch import ROOT

SCRIPT = str(ROOT / "launch" / "slow_network")
NUM_BYTES = 1_000_000

# what a rank does that talks to rank 0
CONNECT = """    while True:
        try:
            connection = socket.create_connection(address)
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
"""
# rank 0 takes NUM_BYTES from rank 1 three times, and prints the seconds of each
SOCKETS = f"""
import os, socket, time
address = (os.environ["MASTER_ADDR"], 5000)
if os.environ["RANK"] == "0":
    connection, _ = socket.create_server(address).accept()
    for _ in range(3):
        connection.sendall(b"x")
        start, missing = time.perf_counter(), {NUM_BYTES}
        while missing:
            missing -= len(connection.recv(min(missing, 2**16)))
        print("seconds", time.perf_counter() - start)
else:
{CONNECT}    for _ in range(3):
        connection.recv(1)
        connection.sendall(bytes({NUM_BYTES}))
"""
UP_AND_SLEEP = ("sh", "-c", "echo up; exec sleep 1000")
# rank 0 asks rank 1 five times, and prints the seconds until each answer
QUESTIONS = f"""
import os, socket, time
address = (os.environ["MASTER_ADDR"], 5000)
if os.environ["RANK"] == "0":
    connection, _ = socket.create_server(address).accept()
    for _ in range(5):
        start = time.perf_counter()
        connection.sendall(b"x")
        connection.recv(1)
        print("seconds", time.perf_counter() - start)
elif os.environ["RANK"] == "1":
{CONNECT}    while connection.recv(1):
        connection.sendall(b"x")
"""


def missing() -> str:
    """Why network namespaces cannot be made here, or nothing."""
    try:
        slow_network.require([])
    except ValueError as error:
        return str(error)
    return ""


# in CI the tests run, and fail for this reason, rather than pass unseen
pytestmark = pytest.mark.skipif(bool(missing()) and "CI" not in os.environ, reason=missing())


def namespaces(pid: int) -> list[str]:
    """Those of the run with this process id."""
    return hosts.namespaces(f"{hosts.PREFIX}-{pid}")


def links() -> list[str]:
    """The machine's own network interfaces: "7: eth0@if6"."""
    return re.findall(r"^\d+: [^:]+", hosts.ip("ip", "-oneline", "link"), re.MULTILINE)


@contextmanager
def launched(*arguments):
    """The program, started, with all of its output to read from one pipe; killed at the end."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [SCRIPT, "--time_limit_s", "60", *arguments]
    with subprocess.Popen(
        command, env=env, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def finish(process) -> tuple[int, str]:
    """Its exit code and output; it must have left nothing on this machine."""
    output = process.communicate(timeout=80)[0]
    assert namespaces(process.pid) == [], output
    return process.returncode, output


def slow(*arguments) -> tuple[int, str]:
    """Run it to its end."""
    before = links()
    with launched(*arguments) as process:
        ended = finish(process)
    assert links() == before
    return ended


def timed(program, *network) -> tuple[list[float], str]:
    """The seconds that rank 0 printed, all of the three or five that it was to, and what was printed besides."""
    code, output = slow(*network, "--", sys.executable, "-c", program)
    assert code == 0, output
    seconds = [float(x) for x in re.findall(r"^\[0\] seconds (.*)$", output, re.MULTILINE)]
    assert len(seconds) == (3 if program is SOCKETS else 5), output
    return seconds, output


@pytest.mark.parametrize(
    ("flags", "mbit_per_s"),
    [(("--rate", "50"), 50), (("--up", "20", "--down", "80"), 20), (("--up", "80", "--down", "20"), 20)],
)
def test_a_transfer_takes_the_time_of_the_slower_end(flags, mbit_per_s):
    seconds, _ = timed(SOCKETS, "--hosts", "2", *flags)
    assert NUM_BYTES * 8 / statistics.median(seconds) / 1e6 == pytest.approx(mbit_per_s, rel=0.15)


@pytest.mark.parametrize(
    ("latency_ms", "round_trip_ms"), [("30", 60), ("5,15,100", 40), ("0,10,99;50,0,99;99,99,0", 60)]
)
def test_an_answer_takes_the_way_there_and_back(latency_ms, round_trip_ms):
    seconds, output = timed(QUESTIONS, "--hosts", "3", "--rate", "50", "--latency_ms", latency_ms)
    assert statistics.median(seconds) * 1e3 == pytest.approx(round_trip_ms, abs=6)
    assert min(seconds) * 1e3 >= round_trip_ms, "no packet is early"
    assert re.search(r"slow_network: the delay line carried \d+ packets", output)


def test_rates_hold_behind_latencies():
    seconds, _ = timed(SOCKETS, "--hosts", "2", "--rate", "50", "--latency_ms", "10")
    # the first opens its window, and each waits for the word that asks for it
    assert NUM_BYTES * 8 / (seconds[-1] - 0.02) / 1e6 == pytest.approx(50, rel=0.15)


def test_without_its_delay_line_a_network_is_given_up():
    with launched("--hosts", "2", "--rate", "50", "--latency_ms", "10", "--", *UP_AND_SLEEP) as process:
        process.stdout.readline()
        (line,) = hosts.ip("ip", "netns", "pids", f"{namespaces(process.pid)[0].rpartition('-')[0]}-switch").split()
        os.kill(int(line), signal.SIGKILL)
        code, output = finish(process)
    assert code == 1 and "the delay line ended before the ranks; they are stopped" in output


def test_ranks_get_what_torchrun_sets_and_are_told_apart():
    program = 'echo "$RANK of $WORLD_SIZE, $LOCAL_RANK of $LOCAL_WORLD_SIZE, $MASTER_ADDR $1"; echo oops >&2'
    code, output = slow("--hosts", "3", "--rate", "100", "sh", "-c", program, "sh", "--hosts")
    lines = [f"[{rank}] {rank} of 3, 0 of 1, 10.77.0.1 --hosts" for rank in range(3)]
    assert (code, sorted(output.splitlines())) == (0, sorted([*lines, *(f"[{rank}] oops" for rank in range(3))]))


def test_the_worst_code_counts_and_no_rank_outlives_a_failed_one():
    program = "case $RANK in 0) exit 3;; 1) kill -9 $$;; 2) sleep 1000 & wait;; esac"
    start_s = time.monotonic()
    code, output = slow("--hosts", "3", "--rate", "100", "--grace_s", "0.3", "--", "sh", "-c", program)
    assert code == 128 + signal.SIGKILL, output
    assert "others still run after 0.3 s" in output
    assert time.monotonic() - start_s < 30


def test_the_time_limit_stops_ranks_that_ignore_being_asked():
    program = "trap '' TERM; while :; do sleep 0.1; done"
    code, output = slow("--hosts", "2", "--rate", "100", "--time_limit_s", "0.5", "--", "sh", "-c", program)
    assert (code, "the time limit of 0.5 s is over" in output) == (124, True)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_leaves_nothing(signum):
    before = links()
    with launched("--hosts", "2", "--rate", "100", "--", "sh", "-c", "echo up; sleep 1000") as process:
        assert process.stdout.readline() in ("[0] up\n", "[1] up\n")
        assert len(namespaces(process.pid)) == 3
        assert links() == before  # all of it lies inside of the namespaces
        process.send_signal(signum)
        assert finish(process)[0] == 128 + signum


def test_what_a_killed_run_left_is_cleaned_away():
    with launched("--hosts", "2", "--rate", "100", "--", "sh", "-c", "echo up $$; exec sleep 1000") as process:
        pid = int(re.match(r"\[\d\] up (\d+)", process.stdout.readline())[1])
        alive = subprocess.run([SCRIPT, "--clean"], capture_output=True, text=True, check=True)
        assert "live ones left alone" in alive.stdout
        assert len(namespaces(process.pid)) == 3
        process.kill()
        process.wait()
    assert len(namespaces(process.pid)) == 3
    assert hosts.started(pid)  # its ranks live on, too
    done = subprocess.run([SCRIPT, "--clean"], capture_output=True, text=True, check=True)
    assert namespaces(process.pid) == [], done.stdout
    assert f"removed {hosts.PREFIX}-{process.pid}-" in done.stdout
    assert not hosts.started(pid)


def test_a_network_that_cannot_be_made_whole_is_taken_down(monkeypatch):
    network = hosts.Network(f"{hosts.PREFIX}-{os.getpid()}-0", 2, 1e6, 1e6)
    real = hosts.limit
    monkeypatch.setattr(hosts, "limit", lambda device, *rest: real(device.replace("port1", "nothing"), *rest))
    with pytest.raises(RuntimeError, match=r"tc -n .* dev nothing .* failed: .*SYS_ADMIN"):
        slow_network.run(network, ["true"], 10.0, 0.0, slow_network.Signals())
    assert namespaces(os.getpid()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hosts", "1", "--rate", "10", "--", "true"], "--hosts is 1; a network has at least 2 hosts"),
        (["--hosts", "2", "--rate", "0", "--", "true"], "the rate up is 0 Mbit/s; it must be positive"),
        (["--hosts", "2", "--rate", "5", "--down", "nan", "--", "true"], "the rate down is nan Mbit/s"),
        (["--hosts", "2", "--up", "5", "--", "true"], "give --hosts N and --rate MBITS"),
        (["--hosts", "2", "--rate", "10", "--"], "there is no command; give one after --"),
        (["--hosts", "2", "--rate", "10", "--time_limit_s", "0", "--", "true"], "--time_limit_s 0 must be positive"),
        (["--hosts", "2", "--rate", "10", "--", "no-such-program"], "'no-such-program' cannot be found"),
        (["--hosts", "3", "--rate", "10", "--latency_ms", "5,5", "--", "true"], "'5,5' is neither one number, nor one"),
        (["--hosts", "2", "--rate", "10", "--latency_ms", "far", "--", "true"], "'far' is neither one number"),
        (["--hosts", "2", "--rate", "10", "--latency_ms", "-5", "--", "true"], "each must be from 0 to 10000"),
    ],
)
def test_mistakes_are_told_in_one_paragraph(arguments, message, capsys):
    assert slow_network.main(arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("slow_network: error: ") and message in errors
    assert len(errors.splitlines()) == 1


def test_what_the_machine_lacks_is_named(monkeypatch, capsys):
    flags = ["--hosts", "2", "--rate", "10", "--", "true"]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert slow_network.main(flags) == 2
    assert "user 1000 may not make network namespaces; run this as root" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert slow_network.main(flags) == 2
    assert "ip and tc cannot be found; install iproute2" in capsys.readouterr().err
