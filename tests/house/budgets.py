"""How much code each part of the house may hold: lines without docstrings, comments and blank lines."""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter
from collections.abc import Iterable

from tests.house.rules import MAY_IMPORT, Source

# part: its rooms, and the most lines of them all. A room named here has those below it, such as sim.wire.
BUDGETS: dict[str, tuple[tuple[str, ...], int]] = {
    "core": (
        (
            *("tensors", "comm", "codecs", "compress", "feedback", "reduce", "outer", "rounds", "algorithms"),
            *("engine", "train", "replica", "joined", "pairwise", "places", "membership"),
        ),
        5000,
    ),
    "sim": (("sim",), 2700),
    "data, models, optim": (("data", "models", "optim"), 1800),
    "run, record, report, command line": (
        (
            *("__init__", "__main__", "optional", "state", "environment", "ledger", "metrics", "checkpoint", "config"),
            *("resume", "assemble", "predict", "attach", "hooks", "report", "parsing", "cli", "claim", "console"),
        ),
        1900,
    ),
    "participation": (("participation", "attendance"), 600),
    "coordinator": (("coordinator",), 600),
    "coding": (("coding",), 600),
    "tests": (("tests",), 14500),
}
# part: what it may hold meanwhile, and why. The number falls, unless a later part brings a room or a feature.
LARGER: dict[str, tuple[int, str]] = {
    "core": (5670, "what replicas hold is compared, buffers are kept right, and memories wait for a commit"),
    "sim": (2990, "gloo's own schedules and TCP's windows came after the budget was set; then seats at a meeting"),
    "data, models, optim": (1875, "optimizers are tried before training"),
    "run, record, report, command line": (2370, "what starts a run is checked, and it goes on without a console"),
    "coordinator": (1010, "a server, a client, a page and their messages"),
    "tests": (19400, "methods and codes of the package are each held against a plain reference"),
}
NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
}


def lines_of_code(source: Source) -> int:
    """The lines on which a token stands that is no comment and in no docstring."""
    documented: set[int] = set()
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(
            node, clean=False
        ):
            documented |= lines_between(node.body[0].lineno, node.body[0].end_lineno)
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type not in NO_CODE:
            code |= lines_between(token.start[0], token.end[0])
    return len(code - documented)


def lines_between(first: int, last: int | None) -> set[int]:
    """Both included."""
    return set(range(first, (last or first) + 1))


def part_of(source: Source) -> str:
    """The part of `BUDGETS` that a file counts for; "" for one outside all, such as a benchmark."""
    room = source.module.split(".")[1] if "." in source.module else "__init__"
    room = room if source.path.startswith("lowcomm/") else source.path.split("/")[0]
    return next((part for part, (rooms, _) in BUDGETS.items() if room in rooms), "")


def sizes(sources: Iterable[Source]) -> Counter[str]:
    """Lines of code by part."""
    counted: Counter[str] = Counter()
    for source in sources:
        counted[part_of(source)] += lines_of_code(source)
    return counted


def limit(part: str) -> int:
    """What a part may hold now."""
    return LARGER[part][0] if part in LARGER else BUDGETS[part][1]


def rooms_without_a_budget() -> set[str]:
    """Rooms of the layering rule that no part counts."""
    counted = {room for rooms, _ in BUDGETS.values() for room in rooms}
    return {room.split(".")[0] for room in MAY_IMPORT} - counted
