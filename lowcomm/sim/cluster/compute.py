"""Times of inner steps: the interface, deterministic models, and products of models.

`lowcomm.sim.cluster.drawn` has the random ones. Times are seconds; a model is a function of (rank, t) and of the step's
start.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lowcomm.sim.cluster.inputs import check_positive, of_rank, parsed, read_csv


class ComputeModel(ABC):
    """The time of inner steps."""

    @abstractmethod
    def seconds(self, rank: int, t: int, start: float) -> float:
        """Seconds of inner step ``t`` = 1, 2, ... on ``rank``, started at virtual second ``start``."""

    def needs_calibration(self) -> bool:
        """Whether a real step must be timed before `seconds` can be asked, see `Measured`."""
        return False

    def calibrated(self, step_s: float) -> ComputeModel:
        """This model with ``step_s``, the time of a real step, if it needs one."""
        return self

    def streams(self) -> Sequence[tuple[str, int]]:
        """Which random numbers it draws, as (class, seed)."""
        return ()


@dataclass(frozen=True)
class Around(ComputeModel, ABC):
    """A model that changes another model's times.

    Attributes:
        model: the other.
    """

    model: ComputeModel

    def needs_calibration(self) -> bool:
        return self.model.needs_calibration()

    def calibrated(self, step_s: float) -> ComputeModel:
        return replace(self, model=self.model.calibrated(step_s))

    def streams(self) -> Sequence[tuple[str, int]]:
        return self.model.streams()


@dataclass(frozen=True)
class Constant(ComputeModel):
    """Every step takes the same time."""

    mean_s: float = 1.0

    def __post_init__(self) -> None:
        check_positive("mean_s", self.mean_s)

    def seconds(self, rank: int, t: int, start: float) -> float:
        return self.mean_s


@dataclass(frozen=True)
class Diurnal(ComputeModel):
    """Slower by day: ``usual_s * (1 + swing * cos(2 pi (start - peak_s) / period_s))``.

    The factor is the one at the step's start, and its mean over a day is 1.

    Attributes:
        usual_s: the mean over a day.
        swing: how much slower at the peak and faster at the trough, in [0, 1).
        peak_s: when the day is at its slowest.
        period_s: of a day.
        shift_s: how much later each rank's day is, one number for each rank; None for none.
    """

    usual_s: float = 1.0
    swing: float = 0.3
    peak_s: float = 43200.0
    period_s: float = 86400.0
    shift_s: Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_positive("usual_s", self.usual_s)
        check_positive("period_s", self.period_s)
        if not 0 <= self.swing < 1:
            raise ValueError(f"swing is {self.swing}; it must lie in [0, 1), for steps to take time at the trough")

    def seconds(self, rank: int, t: int, start: float) -> float:
        peak_s = self.peak_s + (0.0 if self.shift_s is None else of_rank("shift_s", self.shift_s, rank))
        return self.usual_s * (1 + self.swing * math.cos(2 * math.pi * (start - peak_s) / self.period_s))


@dataclass(frozen=True)
class Replay(ComputeModel):
    """Times that were recorded: a CSV file with the header ``rank,t,seconds`` and every step 1, 2, ... of each rank.

    Attributes:
        path: the file, read at once.
        repeat: start again from a rank's first step after its last; without it, a step beyond is an error.
    """

    path: str
    repeat: bool = False
    _recorded: dict[int, Sequence[float]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rows: dict[int, dict[int, float]] = {}
        for where, row in read_csv(self.path, ("rank", "t", "seconds")):
            rank, t, seconds = parsed(where, row[0], int), parsed(where, row[1], int), parsed(where, row[2], float)
            check_positive(f"{where}: seconds", seconds)
            if t in rows.setdefault(rank, {}):
                raise ValueError(f"{where}: step {t} of rank {rank} stands there a second time; keep one")
            rows[rank][t] = seconds
        for rank, steps in rows.items():
            if sorted(steps) != list(range(1, len(steps) + 1)):
                raise ValueError(f"{self.path}: the {len(steps)} steps of rank {rank} are not 1 to {len(steps)}")
            self._recorded[rank] = array("d", [steps[t] for t in sorted(steps)])

    def seconds(self, rank: int, t: int, start: float) -> float:
        """What the file says.

        Raises:
            ValueError: for a rank that it lacks, or without ``repeat`` a step beyond the last.
        """
        if rank not in self._recorded:
            raise ValueError(
                f"{self.path} has no rank {rank}, only {sorted(self._recorded)}; record it, or simulate less"
            )
        assert t >= 1, "inner steps count from 1"
        recorded = self._recorded[rank]
        if t > len(recorded) and not self.repeat:
            raise ValueError(f"{self.path} ends at step {len(recorded)} of rank {rank}, before {t}; set repeat: true")
        return recorded[(t - 1) % len(recorded)]


@dataclass(frozen=True)
class Measured(ComputeModel):
    """The measured time of a real step on this machine; `Scaled` makes it faster or slower.

    Attributes:
        step_s: None until `calibrated` with the time of a real step, see `lowcomm.sim.cluster.calibrate`.
    """

    step_s: float | None = None

    def __post_init__(self) -> None:
        if self.step_s is not None:
            check_positive("step_s", self.step_s)

    def seconds(self, rank: int, t: int, start: float) -> float:
        """The measured time; ValueError before there is one."""
        if self.step_s is None:
            raise ValueError("Measured has no time yet: give step_s, or time a step and use calibrated(step_s)")
        return self.step_s

    def needs_calibration(self) -> bool:
        return self.step_s is None

    def calibrated(self, step_s: float) -> ComputeModel:
        """With this time, unless it already has one."""
        return replace(self, step_s=step_s) if self.step_s is None else self


@dataclass(frozen=True)
class Scaled(Around):
    """A model on machines of different speeds; ``model`` has the times at speed 1.

    Attributes:
        speeds: of each rank; twice the speed takes half the time.
    """

    speeds: Sequence[float]

    def __post_init__(self) -> None:
        for rank, speed in enumerate(self.speeds):
            check_positive(f"speeds[{rank}]", speed)

    def seconds(self, rank: int, t: int, start: float) -> float:
        return self.model.seconds(rank, t, start) / of_rank("speeds", self.speeds, rank)


@dataclass(frozen=True)
class Product(ComputeModel):
    """The product of models: a base in seconds, times factors whose usual value is 1.

    For example Product([Measured(), Bimodal(), LogNormal(sigma=0.3)]).
    """

    factors: Sequence[ComputeModel]

    def __post_init__(self) -> None:
        if not self.factors:
            raise ValueError("factors is empty; a product needs at least one model")
        streams = self.streams()
        for name, seed in streams:
            if streams.count((name, seed)) > 1:
                raise ValueError(
                    f"two factors are {name} with seed {seed} and would draw the same numbers; change a seed"
                )

    def seconds(self, rank: int, t: int, start: float) -> float:
        return math.prod(factor.seconds(rank, t, start) for factor in self.factors)

    def needs_calibration(self) -> bool:
        return any(factor.needs_calibration() for factor in self.factors)

    def calibrated(self, step_s: float) -> ComputeModel:
        return replace(self, factors=[factor.calibrated(step_s) for factor in self.factors])

    def streams(self) -> Sequence[tuple[str, int]]:
        return [stream for factor in self.factors for stream in factor.streams()]
