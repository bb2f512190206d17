"""The house rules of docs/architecture.md, read off syntax trees; no code of ours is imported.

A rule takes sources and yields findings, "path:line: what is wrong".
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

# room: the rooms that it may import, besides itself. A module is in the room named after its first part under
# lowcomm, except that a row such as comm.base or sim.wire is a room of its own. A new room needs a row here.
PARTS: dict[str, set[str]] = {
    "tensors": set(),
    "optional": set(),
    "comm.base": set(),
    "comm": {"tensors", "comm.base"},
    "codecs": {"tensors"},
    "joined": {"tensors", "comm.base"},
    "pairwise": {"comm.base"},
    "places": {"comm.base"},
    "compress": {"tensors", "comm.base", "codecs"},
    "feedback": {"tensors", "comm.base", "codecs"},
    "outer": {"tensors", "comm.base"},
    "reduce": {"tensors", "comm.base", "codecs", "joined", "compress", "feedback"},
    "optim": {"tensors"},
    "engine.base": set(),
    "engine": {"tensors", "engine.base", "optim", "models"},
    "algorithms.base": {"comm.base", "engine.base"},
    "rounds": {
        *("tensors", "comm.base", "engine.base", "codecs", "compress", "feedback", "reduce", "pairwise"),
        "algorithms.base",
    },
    "algorithms": {
        *("tensors", "comm.base", "engine.base", "codecs", "compress", "feedback", "outer", "reduce", "pairwise"),
        *("algorithms.base", "rounds"),
    },
    "participation": set(),
    "coding": {"tensors", "codecs"},
    "models": {"tensors", "optional"},
    "data": {"tensors", "optional"},
}
RUN: dict[str, set[str]] = {
    "state": {"tensors"},
    "claim": set(),
    "console": set(),
    "environment": {"__init__"},
    "ledger": {"tensors", "comm", "data"},
    "report.si": set(),
    "metrics": {"tensors", "optional", "places", "comm", "ledger", "console", "report.si"},
    "checkpoint": {"tensors", "places", "state"},
    "config": {*PARTS},
    "attendance": {"comm.base", "engine.base", "algorithms.base", "rounds", "participation"},
    "membership": {"comm.base", "engine.base", "algorithms.base"},
    "replica": {"comm", "engine.base", "algorithms.base", "rounds", "ledger", "membership", "attendance"},
    "train": {"comm", "algorithms.base", "rounds", "state", "checkpoint", "replica"},
    "resume": {"comm.base", "comm", "state", "checkpoint", "config", "metrics", "replica"},
    "assemble": {*PARTS, "claim", "resume", "state", "environment", "ledger", "metrics", "membership", "attendance"}
    | {"replica", "checkpoint", "config", "train"},
    "predict": {*PARTS, "config", "assemble"},
    "attach": {"tensors", "comm.base", "comm", "engine.base", "engine"}
    | {"algorithms.base", "rounds", "state", "membership"},
    "hooks": {"comm.base", "comm", "engine.base", "engine", "reduce", "state"},
    "coordinator": {"optional", "participation"},
    "report": {"optional", "config", "metrics", "report.si", "sim.record"},
}
MAY_IMPORT: dict[str, set[str]] = {
    **PARTS,
    **RUN,
    "__init__": {*PARTS, "attach", "hooks"},  # the public names
    "sim.wire": {"comm.base"},
    "sim.cluster": {"tensors", "comm", "assemble", "sim.wire"},
    "sim.record": {
        *("tensors", "optional", "comm", "engine.base", "engine", "membership", "attendance", "replica", "train"),
        *("config", "assemble", "sim.wire"),
    },
    "sim": {*PARTS, *RUN, "sim.wire", "sim.cluster", "sim.record"} - {"report", "coordinator"},  # the command line's
    "parsing": set(),
    "cli": {*PARTS, *RUN, "sim", "sim.wire", "sim.cluster", "parsing", "__init__"},
    "__main__": {"cli"},
}
# the pure rooms: the same arithmetic in every world, so no world may show through
PURE = {"codecs", "joined", "pairwise", "compress", "feedback", "outer", "reduce", "rounds", "algorithms"}
IMPURE_MODULES = ("torch.distributed", "time", "random", "numpy.random", "threading", "os")
TORCH_DISTRIBUTED_IN = {"lowcomm/comm/distributed.py", "lowcomm/checkpoint.py"}
# optional or slow to import: only inside the functions that need them
LAZY = (
    *("ray", "deepspeed", "aiohttp", "triton", "transformers", "datasets", "tokenizers", "pyarrow"),
    *("wandb", "tensorboard", "torch.utils.tensorboard", "matplotlib", "jinja2"),
)
# files of the method rooms that are no published method
NOT_A_METHOD = {
    *(
        f"lowcomm/compress/{name}.py"
        for name in ("hierarchical", "identity", "cast", "quantized", "two_shot", "gathered", "chosen")
    ),
    "lowcomm/feedback/none.py",
    "lowcomm/feedback/tracked.py",
    "lowcomm/outer/sgd.py",
    *(f"lowcomm/rounds/{name}.py" for name in ("anchors", "buffers", "exchanges", "gossip", "participation")),
    "lowcomm/algorithms/data_parallel.py",
    "lowcomm/algorithms/composed.py",
}
MAX_LINES = 400
SHORTER = {"lowcomm/train.py": 150}
# torch's draws that take a generator, those that never do, and those into a tensor
DRAWS = ("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson")
GLOBAL_DRAWS = ("manual_seed", "seed", "rand_like", "randn_like", "randint_like")
DRAWS_IN_PLACE = ("random_", "normal_", "log_normal_", "uniform_", "bernoulli_", "exponential_", "geometric_")

# docstrings that only say whose docstring to read, as "See `Engine.update`." and "The inner one's." do
ECHO = re.compile(
    r"(see (`[^`]+`|the class)|(as |that of |those of )?the (base|inner( \w+)?)'s|(as|that of) the (base|inner)[\w ]*"
    r"|(as|that of|those of) `+\w+`+|(of )?both|both, in turn|where (both|one of them) do(es)?"
    r"|that of whose time it is|the (first|second)'s)\.?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Source:
    """A Python file: its path under the root and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree; line numbers count from 1."""
        return ast.parse(self.text, self.path)

    @property
    def module(self) -> str:
        """The dotted name: "lowcomm.outer.sgd", and "lowcomm.outer" for its __init__.py."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def room(self) -> str:
        """See `room_of`."""
        return room_of(self.module)

    @cached_property
    def names(self) -> dict[str, str]:
        """What each imported name stands for: {"F": "torch.nn.functional"}."""
        names: dict[str, str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:  # `import a.b` binds a, `import a.b as c` binds a.b
                    first = alias.name.split(".")[0]
                    names.update({alias.asname: alias.name} if alias.asname else {first: first})
            elif isinstance(node, ast.ImportFrom):
                names.update({a.asname or a.name: f"{node.module}.{a.name}" for a in node.names})
        return names

    def dotted(self, node: ast.expr) -> str:
        """The full name of an expression like `F.relu`, imports followed; "" for any other expression."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            owner = self.dotted(node.value)
            return f"{owner}.{node.attr}" if owner else ""
        return ""

    def at(self, node: ast.AST, message: str) -> str:
        """A finding at a node."""
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {message}"


Rule = Callable[[Sequence[Source]], Iterator[str]]


def room_of(module: str) -> str:
    """The room of a dotted name under lowcomm; "__init__" is the package itself."""
    parts = [*module.split(".")[1:], "__init__"]
    pair = ".".join(parts[:2])
    return pair if pair in MAY_IMPORT else parts[0]


def imports(source: Source, nodes: Iterator[ast.AST] | None = None) -> Iterator[tuple[ast.AST, str]]:
    """Every imported name in full, wherever the import stands (or among the given nodes)."""
    for node in nodes or ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            yield from ((node, f"{dots}{node.module or ''}.{alias.name}") for alias in node.names)


def mentions(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Every imported name and every dotted name in use."""
    yield from imports(source)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and (name := source.dotted(node)):
            yield node, name


def at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """What runs when a module is imported: all nodes outside functions and `if TYPE_CHECKING`."""
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            todo.extend(node.orelse)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            todo.extend(ast.iter_child_nodes(node))


def is_within(name: str, modules: Sequence[str]) -> bool:
    """Whether a dotted name is one of the modules or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def calls(source: Source) -> Iterator[tuple[ast.Call, str]]:
    """Every call with the full name of what is called, "" where that is no name."""
    yield from ((node, source.dotted(node.func)) for node in ast.walk(source.tree) if isinstance(node, ast.Call))


def definitions(nodes: Iterable[ast.AST]) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """The classes and functions among the nodes."""
    yield from (node for node in nodes if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)))


def in_package(sources: Sequence[Source]) -> list[Source]:
    """The sources of lowcomm itself."""
    return [source for source in sources if source.path.startswith("lowcomm/")]


def pure(sources: Sequence[Source]) -> list[Source]:
    """The sources of the pure rooms."""
    return [source for source in in_package(sources) if source.room in PURE]


# ---- the rules ------------------------------------------------------------------------------------------------------


def layering(sources: Sequence[Source]) -> Iterator[str]:
    """A room imports only the rooms that its row allows."""
    for source in in_package(sources):
        if source.room not in MAY_IMPORT:
            yield f"{source.path}:1: the room {source.room!r} has no row in MAY_IMPORT of tests/house"
            continue
        for node, name in imports(source):
            if name.startswith("."):
                yield source.at(node, f"relative import {name}: write the full name")
            elif is_within(name, ["lowcomm"]) and room_of(name) not in MAY_IMPORT[source.room] | {source.room}:
                yield source.at(node, f"{source.room} may not import {name}, only {sorted(MAY_IMPORT[source.room])}")


def purity(sources: Sequence[Source]) -> Iterator[str]:
    """The pure rooms know no world: no process group, clock, thread, environment or global random numbers."""
    for source in pure(sources):
        for node, name in mentions(source):
            if is_within(name, IMPURE_MODULES):
                yield source.at(node, f"{name} in the pure room {source.room}")


def no_print_or_item(sources: Sequence[Source]) -> Iterator[str]:
    """The pure rooms never wait for the device (`.item()`) and never write to the terminal."""
    for source in pure(sources):
        for node, name in calls(source):
            if name == "print":
                yield source.at(node, "print in a pure room")
            if isinstance(node.func, ast.Attribute) and node.func.attr == "item":
                yield source.at(node, ".item() waits for the device")


def seeded_randomness(sources: Sequence[Source]) -> Iterator[str]:
    """The pure rooms draw random numbers only from a generator that they name."""
    for source in pure(sources):
        for node, name in calls(source):
            method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            drawn = name.removeprefix("torch.") if name.startswith("torch.") else ""
            has_generator = any(keyword.arg == "generator" for keyword in node.keywords)
            if drawn in GLOBAL_DRAWS or (not has_generator and (drawn in DRAWS or method in DRAWS_IN_PLACE)):
                yield source.at(node, f"{name or method} uses the global generator: pass generator=rng(seed, purpose)")


def torch_distributed_in_its_place(sources: Sequence[Source]) -> Iterator[str]:
    """Only the wire, the checkpoint and the engines that need it know torch.distributed."""
    for source in in_package(sources):
        if source.path not in TORCH_DISTRIBUTED_IN:
            for node, name in mentions(source):
                if is_within(name, ["torch.distributed"]):
                    yield source.at(node, f"{name}: only {sorted(TORCH_DISTRIBUTED_IN)} may name it")


def lazy_libraries(sources: Sequence[Source]) -> Iterator[str]:
    """Optional and slow libraries are imported inside the functions that need them."""
    for source in in_package(sources):
        for node, name in imports(source, at_import(source.tree)):
            if is_within(name, LAZY):
                yield source.at(node, f"import {name} inside the function that needs it")


def short_files(sources: Sequence[Source]) -> Iterator[str]:
    """A file fits in a reader's head."""
    for source in sources:
        num_lines, limit = len(source.text.splitlines()), SHORTER.get(source.path, MAX_LINES)
        if num_lines > limit:
            yield f"{source.path}:{num_lines}: {num_lines} lines, at most {limit}: split it by what it does"


def docstrings(sources: Sequence[Source]) -> Iterator[str]:
    """Modules, public classes and public functions say what they are; nothing only points elsewhere.

    A method that implements, overrides or delegates one of a base class needs no docstring.
    """
    for source in in_package(sources):
        if not ast.get_docstring(source.tree):
            yield f"{source.path}:1: the module has no docstring"
        for node in definitions(source.tree.body):
            if not node.name.startswith("_") and not ast.get_docstring(node):
                yield source.at(node, f"{node.name} has no docstring")
        for node in definitions(ast.walk(source.tree)):
            if ECHO.fullmatch(ast.get_docstring(node) or ""):
                yield source.at(node, f"the docstring of {node.name} only echoes: say something of its own, or drop it")


def says_what_differs(sources: Sequence[Source]) -> Iterator[str]:
    """A file of a published method says where it departs from the paper."""
    for source in in_package(sources):
        in_method_room = source.room in PURE - {
            "reduce",
            "codecs",
            "joined",
            "pairwise",
            "rounds",
        } and not source.path.endswith(("/__init__.py", "/base.py"))
        is_method = in_method_room and source.path not in NOT_A_METHOD
        if is_method and "Differs from the paper in" not in (ast.get_docstring(source.tree) or ""):
            yield f'{source.path}:1: its docstring lacks "Differs from the paper in: ..." (or "nothing")'


def no_kwargs(sources: Sequence[Source]) -> Iterator[str]:
    """Every argument has a name: a misspelt one must be an error."""
    for source in in_package(sources):
        for node in ast.walk(source.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and node.args.kwarg:
                yield source.at(node, f"**{node.args.kwarg.arg}: name the arguments")


def honest_names(sources: Sequence[Source]) -> Iterator[str]:
    """No class or function is called after its emptiness."""
    for source in in_package(sources):
        for node in definitions(ast.walk(source.tree)):
            if re.search("manager|handler|helper|utils", node.name, re.IGNORECASE):
                yield source.at(node, f"{node.name}: say what it does")


def abstract_or_final(sources: Sequence[Source]) -> Iterator[str]:
    """A class of ours that can be made is never a base; exceptions may be refined."""
    found = [
        (source, node) for source in in_package(sources) for node in source.tree.body if isinstance(node, ast.ClassDef)
    ]
    ours = {f"{source.module}.{node.name}": (source, node) for source, node in found}
    by_last_part = {name.split(".")[-1]: name for name in ours}

    def bases(source: Source, node: ast.ClassDef) -> Iterator[str]:
        for base in node.bases:
            name = source.dotted(base.value if isinstance(base, ast.Subscript) else base)
            if f"{source.module}.{name}" in ours:
                yield f"{source.module}.{name}"
            elif is_within(name, ["lowcomm"]):  # also where a package passes the class on, as lowcomm.DiLoCo
                yield by_last_part.get(name.split(".")[-1], name)
            else:
                yield name

    def is_exception(name: str) -> bool:
        builtin = getattr(builtins, name, None)
        is_builtin = isinstance(builtin, type) and issubclass(builtin, BaseException)
        return is_builtin or (name in ours and any(is_exception(base) for base in bases(*ours[name])))

    def is_abstract(name: str) -> bool:
        return any(base.split(".")[-1] in {"ABC", "Protocol"} for base in bases(*ours[name]))

    for source, node in found:
        for base in bases(source, node):
            if base in ours and not is_abstract(base) and not is_exception(base):
                yield source.at(node, f"{node.name} inherits from the concrete class {base}: compose instead")


RULES: list[Rule] = [
    layering,
    purity,
    no_print_or_item,
    seeded_randomness,
    torch_distributed_in_its_place,
    lazy_libraries,
    short_files,
    docstrings,
    says_what_differs,
    no_kwargs,
    honest_names,
    abstract_or_final,
]
