"""What a launcher left unsaid, or said wrongly, is refused before a run of many ranks trains alone or waits."""

import itertools
import os
import re
import socket
import threading

import pytest
import torch.distributed as dist

import lowcomm
from lowcomm.cli import main
from lowcomm.comm.distributed import under_torchrun
from lowcomm.comm.launched import NAMES, Launch, launched
from tests.multiprocess.launch import free_port

WHOLE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TASKS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "LOCAL_WORLD_SIZE")
SOME = [names for n in (1, 2, 3) for names in itertools.combinations(NAMES, n)]


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in (*NAMES, *TASKS, "LOCAL_RANK", "TORCHELASTIC_USE_AGENT_STORE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)


def set_variables(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def refused_everywhere(capsys, tmp_path, *words):
    """By a loop of one's own and by `lowcomm train`, in one paragraph with these words, and nothing is written."""
    errors = []
    for call in (launched, under_torchrun, lambda: lowcomm.connect("gloo", timeout_s=1)):
        with pytest.raises(ValueError, match=r"^.+$") as refused:
            call()
        errors.append(str(refused.value))
    assert main(["train", "--num_steps", "1", "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    errors.append(capsys.readouterr().err)
    assert all(word in error for word in words for error in errors), errors
    assert errors[-1].count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", SOME, ids="+".join)
@pytest.mark.parametrize("rest", ["absent", "empty"])
def test_some_of_the_variables_are_not_none(capsys, monkeypatch, tmp_path, names, rest):
    if rest == "empty":
        set_variables(monkeypatch, dict.fromkeys(NAMES, ""))
    set_variables(monkeypatch, {name: WHOLE[name] for name in names})
    refused_everywhere(capsys, tmp_path, str([name for name in NAMES if name not in names]))


def test_all_empty_is_not_none_either(capsys, monkeypatch, tmp_path):
    set_variables(monkeypatch, dict.fromkeys(NAMES, ""))
    refused_everywhere(capsys, tmp_path, str(list(NAMES)))


@pytest.mark.parametrize("name", TASKS)
def test_one_task_of_many_without_variables_is_refused(capsys, monkeypatch, tmp_path, name):
    assert launched() is None
    monkeypatch.setenv(name, "1")
    assert launched() is None
    monkeypatch.setenv(name, "2")
    refused_everywhere(capsys, tmp_path, f"{name} is 2", *NAMES)
    set_variables(monkeypatch, WHOLE)
    assert launched() == Launch(0, 1, "127.0.0.1", 29500, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("RANK", x) for x in ("x", "-1", "1", "0.0", "1_0", "²")),
        *(("WORLD_SIZE", x) for x in ("two", "0", "-2")),
        *(("MASTER_PORT", x) for x in ("http", "0", "-1", "65536", "70000")),
    ],
)
def test_a_variable_that_is_no_number_in_its_range_is_named(capsys, monkeypatch, tmp_path, name, value):
    set_variables(monkeypatch, {**WHOLE, name: value})
    refused_everywhere(capsys, tmp_path, f"{name} is {value!r}")


def test_nobody_comes(monkeypatch):
    set_variables(monkeypatch, {**WHOLE, "WORLD_SIZE": "3", "MASTER_PORT": str(free_port())})
    with pytest.raises(ValueError, match=r"WORLD_SIZE 3, ranks \[1, 2\] did not come to .* within 1 s; .*timeout_s"):
        lowcomm.connect("gloo", timeout_s=1)
    assert not dist.is_initialized()


def test_a_port_that_is_taken(monkeypatch):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        set_variables(monkeypatch, {**WHOLE, "MASTER_PORT": str(port)})
        with pytest.raises(ValueError, match=f"cannot listen on MASTER_PORT {port} .*; end it, or give all ranks ano"):
            lowcomm.connect("gloo", timeout_s=1)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "127.0.0.1", "a" * 70])
def test_nobody_is_where_the_ranks_meet(monkeypatch, host):
    port = free_port()
    set_variables(monkeypatch, {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": str(port)})
    with pytest.raises(ValueError, match=f"rank 1 found nobody at .*{host}:{port} within 1 s .*firewall"):
        lowcomm.connect("gloo", timeout_s=1)


@pytest.mark.parametrize("variable", ["GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME"])
@pytest.mark.parametrize("value", ["eth99", "lo,eth99"])
def test_an_interface_that_is_not_there(monkeypatch, variable, value):
    set_variables(monkeypatch, {**WHOLE, variable: value})
    with pytest.raises(ValueError, match=f"{variable} is '{value}', but .* no interface 'eth99', only .*lo"):
        lowcomm.connect("gloo", timeout_s=1)


def test_what_torch_says_while_connecting_is_one_paragraph(monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("Gloo connectFullMesh failed\nException raised from x\nframe #0")

    set_variables(monkeypatch, {**WHOLE, "MASTER_PORT": str(free_port())})
    monkeypatch.setattr(dist, "init_process_group", fail)
    with pytest.raises(ValueError, match=r"rank 0 of 1 .*connectFullMesh failed\. .*GLOO_SOCKET_IFNAME") as refused:
        lowcomm.connect("gloo", timeout_s=1)
    assert "\n" not in str(refused.value)


def meet(launches, timeout_s=20.0):
    """What becomes of ranks that meet at one store: None, or why not."""
    store, found = dist.HashStore(), [None] * len(launches)

    def arrive(i, launch):
        try:
            launch.meet(store, timeout_s)
        except ValueError as error:
            found[i] = str(error)

    threads = [threading.Thread(target=arrive, args=x) for x in enumerate(launches)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def rank_of(rank, num_ranks):
    return Launch(rank, num_ranks, "here", 1, None)


def test_ranks_that_agree_meet():
    assert meet([rank_of(rank, 5) for rank in range(5)]) == [None] * 5


@pytest.mark.parametrize("numbers", [(2, 3), (3, 2), (1, 2), (4, 4, 3)])
def test_ranks_that_count_themselves_otherwise_all_say_so_at_once(numbers):
    found = meet([rank_of(rank, number) for rank, number in enumerate(numbers)])
    agreed = 1 if numbers == (1, 2) else 0  # a run of one rank waits for nobody, unless it comes second
    assert sum(x is None for x in found) <= agreed
    assert all(re.search(r"WORLD_SIZE is \d on rank \d, but \d on another", x) for x in found if x), found


def test_two_processes_of_one_rank_are_refused(monkeypatch):
    store = dist.HashStore()
    store.set("rank 1", "process 7 on elsewhere")
    with pytest.raises(ValueError, match=f"RANK is 1 in process {os.getpid()} .*but process 7 on elsewhere came"):
        rank_of(1, 2).meet(store, 1.0)
