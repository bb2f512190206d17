"""Whether all members were started alike."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from itertools import zip_longest

import torch
from torch import Tensor

from lowcomm.comm.base import Comm


def check_agreement(comm: Comm, facts: Mapping[str, str], remedy: str) -> None:
    """Check that all members bring the same facts: they exchange digests, and texts only where those differ.

    Args:
        facts: texts by name; the names are the same on all members.
        remedy: ends the message.

    Raises:
        ValueError: on every rank, naming what differs and where.
    """
    digests = [list(blake2b(text.encode(), digest_size=16).digest()) for text in facts.values()]
    gathered = comm.all_gather(torch.tensor(digests, dtype=torch.uint8)).wait()
    for i, (what, text) in enumerate(facts.items()):
        differing = [place for place, x in enumerate(gathered) if not torch.equal(x[i], gathered[0][i])]
        if differing:
            texts = [found.split("\n") for found in _texts(comm, text)]
            lines = zip_longest(texts[differing[0]], texts[0], fillvalue="nothing")
            theirs, first = next(pair for pair in lines if pair[0] != pair[1])
            ranks = [comm.members[place] for place in differing]
            raise ValueError(
                f"the {what} of ranks {ranks} differs from rank {comm.members[0]}'s: {theirs} on rank {ranks[0]}, "
                f"{first} on rank {comm.members[0]}; {remedy}"
            )


def _texts(comm: Comm, text: str) -> list[str]:
    """All members' texts."""
    mine = torch.tensor(list(text.encode()), dtype=torch.uint8)
    sizes = comm.all_gather(torch.tensor([len(mine)])).wait().flatten().tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(mine)] = mine
    rows: list[Tensor] = list(comm.all_gather(padded).wait())
    return [bytes(row[:size].tolist()).decode() for row, size in zip(rows, sizes, strict=True)]
