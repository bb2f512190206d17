"""What ranks and the coordinator say to each other: JSON texts with a version, a kind and exactly a class's fields.

A text that is anything else is `Malformed`. Whole numbers are natural and below 2**53, other numbers are finite,
texts are short: nobody has to check again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar, get_type_hints

from lowcomm.participation.base import Measured
from lowcomm.participation.meeting import View

VERSION = 1
MOST_BYTES = 65536  # of a message of a rank
_MOST_REPLICAS, _MOST_LETTERS, _MOST_WHOLE, _LARGEST = 65536, 256, 2**53, 1e300

M = TypeVar("M")


class Malformed(ValueError):
    """The text is no message of the expected kinds."""


# ---- a rank says: each carries its process's incarnation and the newest epoch that it knows


@dataclass(frozen=True)
class Join:
    """The first message on a connection.

    Attributes:
        incarnation: a random word, of one process.
        epoch: 0 from a process that was never admitted.
        version: the newest round whose result it holds, or will when the exchange that it is in ends well.
        agree: digests, by name, of what must be equal on all replicas.
        name: for readers, such as its host.
        notices: whether it wants to hear of rounds that are decided without it.
    """

    replica: int
    incarnation: str
    epoch: int
    version: int
    agree: Mapping[str, str]
    name: str
    notices: bool

    def __post_init__(self) -> None:
        if not self.incarnation or self.replica >= _MOST_REPLICAS:
            raise Malformed(f"replica {self.replica} must be below {_MOST_REPLICAS}, and its incarnation not empty")


@dataclass(frozen=True)
class Ended:
    """How a round went, from a member that committed it. Times count from when it was told of the round.

    Attributes:
        first_byte_s: until the first byte of another replica came.
        done_s: until all had come.
        bytes: that it sent.
        loss: of its training, for readers.
    """

    round: int
    first_byte_s: float
    done_s: float
    bytes: int
    loss: float | None


@dataclass(frozen=True)
class Arrive:
    """It is ready for a round. What it brings is as in `lowcomm.participation.base.Arrival`.

    Attributes:
        seen: the newest round that it was told of and takes part in.
        broke: the round whose exchange failed, so that it has to be taken again; 0 for none.
        lost: replicas that it found gone in that exchange.
        ended: the last round that it committed, when it has not said so before.
    """

    incarnation: str
    epoch: int
    seen: int
    version: int
    step: int
    tokens_done: float
    seconds: float
    measured: Measured | None
    broke: int
    lost: tuple[int, ...]
    ended: Ended | None

    def __post_init__(self) -> None:
        if self.tokens_done < 0 or self.seconds < 0:
            raise Malformed(f"tokens_done {self.tokens_done} and seconds {self.seconds} cannot be negative")


@dataclass(frozen=True)
class Leave:
    """It ends, and is not waited for; ``ended`` as in `Arrive`."""

    incarnation: str
    epoch: int
    ended: Ended | None


# ---- the coordinator says; a decision is the `View` itself


@dataclass(frozen=True)
class Welcome:
    """The answer to `Join`: messages with an epoch before this one are refused from now on."""

    epoch: int
    round: int


@dataclass(frozen=True)
class Without:
    """A round was decided without this rank."""

    epoch: int
    round: int


@dataclass(frozen=True)
class Lost:
    """Members of the newest round who are gone: its exchange cannot end."""

    round: int
    replicas: tuple[int, ...]


@dataclass(frozen=True)
class Refused:
    """Why the coordinator ends this connection; when ``final``, coming back does not help."""

    reason: str
    final: bool


FromRank = Join | Arrive | Leave
FromCoordinator = Welcome | View | Without | Lost | Refused


def encode(message: FromRank | FromCoordinator) -> str:
    """The text of a message."""
    return _ENCODER.encode({"v": VERSION, "kind": type(message).__name__, **vars(message)})


def decode(text: str, kinds: Sequence[type[M]]) -> M:
    """The message in a text.

    Raises:
        Malformed: when it is none of ``kinds``; says what is wrong.
    """
    try:
        said = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"this is no JSON: {str(error)[:100]}") from None
    if not isinstance(said, dict):
        raise Malformed("a message is a JSON object")
    if said.pop("v", None) != VERSION:
        raise Malformed(f"the version v must be {VERSION}: run the same lowcomm on all machines")
    name = said.pop("kind", None)
    kind = next((kind for kind in kinds if kind.__name__ == name), None)
    if kind is None:
        raise Malformed(f"kind must be one of {[kind.__name__ for kind in kinds]} here")
    return _made(kind, said)


def _made(kind: type[M], said: dict[str, Any]) -> M:
    known = _SCHEMAS[kind]
    if said.keys() != known.keys():
        raise Malformed(f"{kind.__name__} has the fields {sorted(known)}, not {str(sorted(said))[:200]}")
    for field, fits in known.items():
        if not fits(said[field]):
            raise Malformed(f"{field} of {kind.__name__} cannot be {str(said[field])[:100]!r}")
        if type(said[field]) is list:
            said[field] = tuple(said[field])
    for field, part in (("measured", Measured), ("ended", Ended)):
        if type(said.get(field)) is dict:
            said[field] = _made(part, said[field])
    return kind(**said)


def _is_number(value: Any) -> bool:
    return abs(value) < _LARGEST if type(value) is float else type(value) is int and abs(value) < _MOST_WHOLE


def _is_natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST_WHOLE


def _is_short(value: Any) -> bool:
    return type(value) is str and len(value) <= _MOST_LETTERS


_FITS: dict[Any, Callable[[Any], bool]] = {
    bool: lambda value: type(value) is bool,
    int: _is_natural,
    float: _is_number,
    float | None: lambda value: value is None or _is_number(value),
    Measured | None: lambda value: value is None or type(value) is dict,
    Ended | None: lambda value: value is None or type(value) is dict,
    str: _is_short,
    tuple[int, ...]: lambda value: type(value) is list and all(map(_is_natural, value)),
    tuple[float, ...]: lambda value: type(value) is list and all(map(_is_number, value)),
    Mapping[str, str]: lambda value: type(value) is dict and all(map(_is_short, [*value, *value.values()])),
}
# of each kind: for each field, whether a value of JSON fits
_SCHEMAS: dict[type, dict[str, Callable[[Any], bool]]] = {
    kind: {field.name: _FITS[get_type_hints(kind)[field.name]] for field in fields(kind)}
    for kind in (Join, Arrive, Measured, Ended, Leave, Welcome, View, Without, Lost, Refused)
}


def _no_constant(name: str) -> Any:
    raise Malformed(f"{name} is no number here")


_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False, default=vars)
_DECODER = json.JSONDecoder(parse_constant=_no_constant)
