"""How a run decides who takes part in its rounds."""

from __future__ import annotations

from dataclasses import dataclass

from lowcomm.participation.base import Late, Rule
from lowcomm.participation.rules import All


@dataclass(frozen=True)
class Participation:
    """Rounds that need not wait for everyone.

    Attributes:
        rule: when a round goes on without those who are late.
        late: what becomes of work that missed its round: "carry" adds it to the next round, "drop" throws it away.
        discount: carried work counts this to the power of the rounds it missed; in [0, 1].
    """

    rule: Rule = All()
    late: Late = "carry"
    discount: float = 1.0

    def __post_init__(self) -> None:
        if self.late not in ("carry", "drop"):
            raise ValueError(f"Participation(late={self.late!r}): choose 'carry' or 'drop'")
        if not 0 <= self.discount <= 1:
            raise ValueError(f"Participation(discount={self.discount}): it must be in [0, 1]; 1 counts late work fully")
