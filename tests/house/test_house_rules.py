"""The house rules hold on the tree, and each of them can fail."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

from tests.house import rules
from tests.house.rules import Rule, Source

ROOT = Path(__file__).resolve().parents[2]
CODE = ("lowcomm", "tests", "benchmarks", "launch")
# home folders, and hosts that packages come from: neither is anybody else's business
PRIVATE = re.compile(r"/(work|root|home)/|pythonhosted\.org|pypi\.org|registry\.npmjs")
SLOW_TO_IMPORT = ("transformers", "datasets", "matplotlib", "rich", "jsonargparse", "tensorboard")


def tracked_files() -> Iterator[Path]:
    """All files of the repository but what .gitignore names: it also works where git is not."""
    ignored = [".git", *(line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines())]

    def walk(folder: Path) -> Iterator[Path]:
        for path in sorted(folder.iterdir()):
            if not any(fnmatch(path.name, pattern) for pattern in ignored):
                yield from walk(path) if path.is_dir() else [path]

    return walk(ROOT)


@cache
def sources() -> list[Source]:
    """All Python files that the rules speak of."""
    paths = (path.relative_to(ROOT) for path in tracked_files() if path.suffix == ".py")
    return [Source(path.as_posix(), (ROOT / path).read_text("utf-8")) for path in paths if path.parts[0] in CODE]


def private_words(name: str, text: str) -> list[str]:
    """Findings of machine paths and registry hosts in a text."""
    return [f"{name}:{i}: {line.strip()}" for i, line in enumerate(text.splitlines(), 1) if PRIVATE.search(line)]


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule) -> None:
    found = list(rule(sources()))
    assert not found, "\n".join(["", rule.__doc__ or "", *found])


def test_no_private_words() -> None:
    found: list[str] = []
    for path in tracked_files():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found += private_words(path.relative_to(ROOT).as_posix(), text)
    assert not found, "\n".join(["", *found])


def test_import_is_light() -> None:
    code = f"import lowcomm, sys; print(*({{*{SLOW_TO_IMPORT}, *{rules.LAZY}}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip(), f"`import lowcomm` also imports {done.stdout}"


ABSTRACT = "from abc import ABC\nclass A(ABC): ...\nclass B(A): ..."
# rule, path, text that breaks it, line of the finding
BROKEN = [
    (rules.layering, "lowcomm/outer/x.py", "import torch\nfrom lowcomm.reduce import Reducer", 2),
    (rules.layering, "lowcomm/engine/x.py", "from lowcomm.comm.base import Comm", 1),
    (rules.layering, "lowcomm/algorithms/x.py", "from lowcomm.engine.torch_engine import TorchEngine", 1),
    (rules.layering, "lowcomm/algorithms/x.py", "def f():\n    import lowcomm.comm.solo", 2),
    (rules.layering, "lowcomm/algorithms/x.py", "from lowcomm import comm", 1),
    (rules.layering, "lowcomm/algorithms/x.py", "from .base import Algorithm", 1),
    (rules.layering, "lowcomm/attic/x.py", "", 1),
    (rules.purity, "lowcomm/reduce.py", "import torch.distributed as dist", 1),
    (rules.purity, "lowcomm/reduce.py", "import torch\ntorch.distributed.barrier()", 2),
    (rules.purity, "lowcomm/outer/x.py", "from time import perf_counter", 1),
    (rules.purity, "lowcomm/outer/x.py", "import numpy as np\nnp.random.rand()", 2),
    (rules.purity, "lowcomm/outer/x.py", "from os import environ", 1),
    (rules.no_print_or_item, "lowcomm/compress/x.py", "print(1)", 1),
    (rules.no_print_or_item, "lowcomm/compress/x.py", "y = x.norm().item()", 1),
    (rules.seeded_randomness, "lowcomm/compress/x.py", "import torch\ntorch.randn(3)", 2),
    (rules.seeded_randomness, "lowcomm/compress/x.py", "from torch import randperm as p\np(3)", 2),
    (rules.seeded_randomness, "lowcomm/compress/x.py", "import torch\ntorch.manual_seed(0)", 2),
    (rules.seeded_randomness, "lowcomm/compress/x.py", "x.normal_(0, 1)", 1),
    (rules.torch_distributed_in_its_place, "lowcomm/train.py", "import torch.distributed", 1),
    (rules.torch_distributed_in_its_place, "lowcomm/train.py", "import torch\ntorch.distributed.barrier()", 2),
    (rules.lazy_libraries, "lowcomm/models/x.py", "import transformers", 1),
    (rules.lazy_libraries, "lowcomm/metrics.py", "from torch.utils.tensorboard import SummaryWriter", 1),
    (rules.lazy_libraries, "lowcomm/report/x.py", "try:\n    import matplotlib\nexcept ImportError: ...", 2),
    (rules.short_files, "benchmarks/x.py", "\n" * 401, 401),
    (rules.short_files, "lowcomm/train.py", "\n" * 151, 151),
    (rules.docstrings, "lowcomm/x.py", "x = 1", 1),
    (rules.docstrings, "lowcomm/x.py", '"""Doc."""\nclass A: ...', 2),
    (rules.docstrings, "lowcomm/x.py", '"""Doc."""\n\ndef f(): ...', 3),
    (rules.docstrings, "lowcomm/x.py", '"""Doc."""\ndef f():\n    """See `g`."""', 2),
    (rules.docstrings, "lowcomm/x.py", '"""Doc."""\nclass _A:\n    def f(self):\n        """See `B.f`."""', 3),
    (rules.docstrings, "lowcomm/x.py", '"""Doc."""\nclass _A:\n    def f(self):\n        """The inner one\'s."""', 3),
    (rules.docstrings, "lowcomm/x.py", '"""Doc."""\nclass _A:\n    def f(self):\n        """As the base\'s."""', 3),
    (rules.says_what_differs, "lowcomm/algorithms/x.py", '"""A method (arXiv:0000.00000)."""', 1),
    (rules.no_kwargs, "lowcomm/x.py", "class A:\n    def f(self, **rest): ...", 2),
    (rules.honest_names, "lowcomm/x.py", "class RunManager: ...", 1),
    (rules.honest_names, "lowcomm/x.py", "class A:\n    def io_utils(self): ...", 2),
    (rules.abstract_or_final, "lowcomm/x.py", "class A: ...\nclass B(A): ...", 2),
    (rules.abstract_or_final, "lowcomm/x.py", f"{ABSTRACT}\nclass C(B): ...", 4),
]


@pytest.mark.parametrize(("rule", "path", "text", "line"), BROKEN)
def test_rule_can_fail(rule: Rule, path: str, text: str, line: int) -> None:
    found = list(rule([Source(path, text)]))
    assert found
    assert all(finding.startswith(f"{path}:{line}: ") for finding in found), found


def test_every_rule_has_a_snippet_that_breaks_it() -> None:
    assert {rule for rule, *_ in BROKEN} == set(rules.RULES)


def test_final_across_files() -> None:
    base = Source("lowcomm/outer/sgd.py", "class SGD: ...")
    direct = Source("lowcomm/outer/x.py", "from lowcomm.outer.sgd import SGD\nclass X(SGD[int]): ...")
    passed_on = Source("lowcomm/outer/y.py", "from lowcomm import SGD\nclass Y(SGD): ...")
    theirs = Source("lowcomm/optim/x.py", "import torch\nclass Z(torch.optim.SGD): ...")
    found = list(rules.abstract_or_final([base, direct, passed_on, theirs]))
    assert [finding.split(": ")[0] for finding in found] == ["lowcomm/outer/x.py:2", "lowcomm/outer/y.py:2"]


# what the rules must let pass
FINE = [
    (rules.layering, "lowcomm/reduce.py", "from lowcomm.comm.base import Comm\nfrom lowcomm.tensors import flatten"),
    (rules.layering, "lowcomm/outer/nesterov.py", "from lowcomm.outer.base import Outer"),
    (rules.purity, "lowcomm/outer/x.py", "import torch\nround.time = 1"),
    (rules.purity, "lowcomm/comm/x.py", "import time, os, threading"),
    (rules.no_print_or_item, "lowcomm/compress/x.py", "d.items()"),
    (rules.seeded_randomness, "lowcomm/compress/x.py", "import torch\ntorch.randn(3, generator=rng(0))"),
    (rules.seeded_randomness, "lowcomm/compress/x.py", "x.normal_(generator=g)"),
    (rules.seeded_randomness, "lowcomm/compress/x.py", "import torch\ntorch.Generator().manual_seed(1)"),
    (rules.torch_distributed_in_its_place, "lowcomm/comm/distributed.py", "import torch.distributed as dist"),
    (rules.lazy_libraries, "lowcomm/models/x.py", "def f():\n    import transformers"),
    (rules.lazy_libraries, "lowcomm/models/x.py", "import typing\nif typing.TYPE_CHECKING:\n    import ray"),
    (rules.docstrings, "lowcomm/x.py", '"""Doc."""\ndef _f(): ...\nclass _A: ...'),
    (rules.docstrings, "lowcomm/x.py", '"""Doc."""\nclass A:\n    """It."""\n    def f(self): ...'),
    (rules.docstrings, "lowcomm/x.py", '"""Doc."""\ndef f():\n    """Drop it; see `g`."""'),
    (rules.says_what_differs, "lowcomm/outer/x.py", '"""X (2020).\n\nDiffers from the paper in: nothing.\n"""'),
    (rules.says_what_differs, "lowcomm/outer/base.py", '"""The role."""'),
    (rules.abstract_or_final, "lowcomm/x.py", "class A(Exception): ...\nclass B(A): ...\nclass C(B): ..."),
    (rules.abstract_or_final, "lowcomm/x.py", "import typing\nclass A(typing.Protocol[T]): ...\nclass B(A): ..."),
]


@pytest.mark.parametrize(("rule", "path", "text"), FINE)
def test_rule_lets_pass(rule: Rule, path: str, text: str) -> None:
    assert list(rule([Source(path, text)])) == []


@pytest.mark.parametrize("place", ["work", "root", "home"])
def test_private_words_are_found(place: str) -> None:
    assert private_words("x.md", f"fine\nsee /{place}/data") == [f"x.md:2: see /{place}/data"]
    assert private_words("x.md", f"my{place} and {place}/data") == []
