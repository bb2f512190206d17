"""What the launcher's environment variables say, checked: a run that was meant for many ranks never trains alone."""

from __future__ import annotations

import os
import re
import socket
import time
from dataclasses import dataclass
from typing import Any

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# how launchers that do not set these say how many processes they started
_NUM_TASKS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "LOCAL_WORLD_SIZE")
_START = "start the program with torchrun, or set them for each process"
_RETRY_S, _POLL_S = 0.2, 0.01
_HEARD_S = 1.0  # how long whoever holds the store stays, for the others to read why it leaves


@dataclass(frozen=True)
class Launch:
    """One process of many, as torchrun's variables describe it.

    Attributes:
        host, port: where rank 0 is met.
        attempt: torchrun's number of restarts where torchrun itself holds the store; None where rank 0 does.
    """

    rank: int
    num_ranks: int
    host: str
    port: int
    attempt: int | None

    @property
    def address(self) -> str:
        """Where the ranks meet, as messages name it."""
        return f"MASTER_ADDR:MASTER_PORT {self.host}:{self.port}"

    @property
    def holds_store(self) -> bool:
        """Whether the others meet at this process."""
        return self.rank == 0 and self.attempt is None

    def reach(self, timeout_s: float) -> None:
        """Wait until somebody listens where the ranks meet; names may come to be known meanwhile.

        Raises:
            ValueError: when nobody does in time.
        """
        ends_s = time.monotonic() + timeout_s
        while True:
            try:
                left_s = max(_RETRY_S, ends_s - time.monotonic())
                socket.create_connection((self.host, self.port), left_s).close()
                return
            except (OSError, UnicodeError) as error:  # the latter: what is no name of a host at all
                if time.monotonic() + _RETRY_S > ends_s:
                    raise ValueError(
                        f"rank {self.rank} found nobody at {self.address} within {timeout_s:g} s ({error}); check that "
                        "rank 0 runs there and was started, that the name is right and no firewall is between, or "
                        "raise timeout_s"
                    ) from error
            time.sleep(_RETRY_S)

    def meet(self, store: Any, timeout_s: float) -> None:
        """Wait until every rank is there once and all expect equally many, by a key-value store of torch.

        Raises:
            ValueError: on all who are there, when that is not so in time.
        """
        me = f"process {os.getpid()} on {socket.gethostname()}"
        if (other := store.compare_set(f"rank {self.rank}", "", me).decode()) != me:
            raise ValueError(
                f"RANK is {self.rank} in {me}, but {other} came to {self.address} with that rank before; give each "
                "process a RANK of its own, and where one was started again start all again"
            )
        if (others := store.compare_set("number of ranks", "", str(self.num_ranks)).decode()) != str(self.num_ranks):
            self._refuse(
                store,
                f"WORLD_SIZE is {self.num_ranks} on rank {self.rank}, but {others} on another at {self.address}; start "
                "all ranks with the same WORLD_SIZE",
            )
        if store.add("arrived", 1) == self.num_ranks:
            store.set("verdict", "")
        ends_s = time.monotonic() + timeout_s
        while not store.check(["verdict"]):
            if time.monotonic() >= ends_s:
                missing = [rank for rank in range(self.num_ranks) if not store.check([f"rank {rank}"])]
                self._refuse(
                    store,
                    f"of WORLD_SIZE {self.num_ranks}, ranks {missing} did not come to {self.address} within "
                    f"{timeout_s:g} s; start them with the same WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or raise "
                    "timeout_s",
                )
            time.sleep(_POLL_S)
        if verdict := store.get("verdict").decode():
            raise ValueError(verdict)

    def _refuse(self, store: Any, why: str) -> None:
        store.set("verdict", why)
        if self.holds_store:
            time.sleep(_HEARD_S)
        raise ValueError(why)


def launched() -> Launch | None:
    """This process among those of its launcher; None when it was started alone.

    Raises:
        ValueError: when some variables are missing, or are no numbers in their range.
    """
    if not any(name in os.environ for name in NAMES):
        for name in _NUM_TASKS:
            if os.environ.get(name) and (num_tasks := number(name, 1)) > 1:
                raise ValueError(
                    f"{name} is {num_tasks}, so this is one process of many, but {', '.join(NAMES)} are not set; "
                    f"{_START}; to train alone, start one task or unset {name}"
                )
        return None
    if missing := [name for name in NAMES if not os.environ.get(name)]:
        there = [f"{name}={os.environ[name]}" for name in NAMES if os.environ.get(name)]
        raise ValueError(
            f"the variables {missing} are not set or empty, but others are ({', '.join(there) or 'all empty'}), so "
            f"this is one process of many; {_START}; to train alone, unset all of {', '.join(NAMES)}"
        )
    num_ranks = number("WORLD_SIZE", 1)
    agent_has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Launch(
        rank=number("RANK", 0, num_ranks - 1, f"WORLD_SIZE is {num_ranks}"),
        num_ranks=num_ranks,
        host=os.environ["MASTER_ADDR"],
        port=number("MASTER_PORT", 1, 65535),
        attempt=number("TORCHELASTIC_RESTART_COUNT", 0) if agent_has_store else None,
    )


def number(name: str, at_least: int, at_most: int | None = None, why: str = "") -> int:
    """A variable as a number; where it is not set, ``at_least``.

    Raises:
        ValueError: when it is none, or out of range.
    """
    text = os.environ.get(name, str(at_least))
    value = int(text) if re.fullmatch(r"\s*[+-]?\d+\s*", text) else None
    if value is None or value < at_least or (at_most is not None and value > at_most):
        limits = f"from {at_least} to {at_most}" if at_most is not None else f"of at least {at_least}"
        raise ValueError(
            f"the variable {name} is {text!r}, not a whole number {limits}{why and f' ({why})'}; correct it, or start "
            "the program with torchrun"
        )
    return value


def check_interfaces() -> None:
    """Check that the interfaces which gloo is told to use are here.

    Raises:
        ValueError: naming the variable and those that are.
    """
    here = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME"):
        for name in filter(None, os.environ.get(variable, "").split(",")):
            if name not in here:
                raise ValueError(
                    f"the variable {variable} is {os.environ[variable]!r}, but this machine has no interface {name!r}, "
                    f"only {', '.join(here)}; name the one that leads to the other ranks"
                )
