"""The collectives of gloo, which `lowcomm.comm.distributed` uses between machines.

gloo sends a message once the receiver has reported ready, so it takes two latencies if both sides start together: one
for the report, one for the message. Rings cut each rank's share into at least two messages and keep two in flight. For
n members with S bytes each, over links of B and one-way latencies a:

    all_sum      2(n-1)/n S/B + 4(n-1) a    a ring of 1 MiB messages at most; few values take fewer latencies
    all_gather   (n-1) S/B + 2(n-1) a       a ring of halves
    broadcast    store and forward down a binomial tree: (S/B + a) a level, and a
    all_to_all, exchange, send              directly: S/B + 2 a

Rings wait less if their messages last longer than a round trip, see `Turns`. The steps are those of gloo's
allreduce.cc, allgather.cc, broadcast.cc and transport/tcp/pair.cc of 2026-04.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowcomm.sim.wire.collectives import Schedule, Transfer, Turns

MAX_MESSAGE_BYTES = 2**20  # of a ring's sum
# Of several messages that a rank sends at once, how much of one is through before the next is on its way: its buffer is
# filled first. Measured: between none, where all share the link, and all, where they go one after the other.
HEAD_START = 0.4
ELEMENT_BYTES = 4  # what nearly all sums are of; it counts only for sums of fewer values than there are messages


@dataclass(frozen=True)
class Gloo(Schedule):
    """Rings, trees and pairs as in gloo; a message waits for the receiver's readiness."""

    direct_latencies = 2

    def all_sum(self, members: tuple[int, ...], num_bytes: int) -> list[Transfer]:
        """A ring, each to the one before."""
        n = len(members)
        num_own = max(2, -(-num_bytes // (n * MAX_MESSAGE_BYTES)))  # messages of what one rank owns
        message_bytes = -(-num_bytes // (n * num_own * ELEMENT_BYTES)) * ELEMENT_BYTES
        num_full = -(-num_bytes // (max(1, message_bytes) * num_own))  # ranks that own anything
        num_latencies, turns = ring_latencies(n, num_full), None
        if num_full == n:
            # two phases, each with a first message that nobody waited for, and two at a time
            num_turns = 2 * ((num_own * (n - 1) - 1) // 2)
            num_latencies, turns = 4, Turns(num_turns, message_bytes, both_ways=n == 2)
        size = 2 * (n - 1) * num_bytes // n
        return [Transfer(a, members[i - 1], size, num_latencies, turns) for i, a in enumerate(members)]

    def all_gather(self, members: tuple[int, ...], num_bytes: int) -> list[Transfer]:
        """A ring of halves, each to the next."""
        n = len(members)
        turns = Turns(n - 2, num_bytes // 2, both_ways=n == 2)
        return [Transfer(a, members[(i + 1) % n], (n - 1) * num_bytes, 2, turns) for i, a in enumerate(members)]

    def broadcast(self, members: tuple[int, ...], num_bytes: int, source: int) -> list[Transfer]:
        """Down a binomial tree, each level after the one above."""
        first = members.index(source)
        rooted = [*members[first:], *members[:first]]
        transfers: list[Transfer] = []
        came: dict[int, int] = {}  # by place: the transfer that brought it
        num_sent = [0] * len(rooted)
        distance = 1
        while distance < len(rooted):
            for place in range(min(distance, len(rooted) - distance)):
                after = came.get(place)
                came[place + distance] = len(transfers)
                # the word that it may come was said long ago where the sender had to wait itself
                num_latencies = 2 if after is None else 1
                turns = Turns(0, num_bytes, behind=HEAD_START * num_sent[place])
                num_sent[place] += 1
                to = rooted[place + distance]
                transfers.append(Transfer(rooted[place], to, num_bytes, num_latencies, turns, after))
            distance *= 2
        return transfers


def ring_latencies(num_members: int, num_owners: int) -> int:
    """Latencies of a ring's sum if only some ranks own values; empty messages are not sent.

    If all do, it is 4 (n - 1): each of 2 (n - 1) steps waits for a readiness report and a message.
    """
    waits = min(max(num_owners, 3 * num_owners - num_members), 2 * num_owners - 2)
    return 2 * (num_members - 1) + max(1, waits)
