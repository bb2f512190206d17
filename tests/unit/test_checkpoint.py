"""Checkpoints come back exactly, survive a death at any moment, and refuse what is damaged or not theirs."""

from __future__ import annotations

import io
import math
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lowcomm.checkpoint import MANIFEST, TREE, Checkpoints, state_bytes
from lowcomm.comm.echo import EchoComm
from lowcomm.places import place_of

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool]


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of small files need not wait for a busy disk; test_flushed_before_renamed counts the waits."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def checkpoints(run: Path, rank: int = 0, num_ranks: int = 2, run_id: str = "run", keep: int = 2) -> Checkpoints:
    return Checkpoints(run / "checkpoints", place_of(EchoComm(num_ranks, rank), 1), run_id, keep)


def small_state(value: float = 0.0) -> dict[str, Any]:
    return {"x": torch.full((3,), value), "t": int(value), "nested": {"y": [torch.tensor(value), None]}}


def plain(x: Any) -> Any:
    """Equal for the same types and bits all the way down alone: NaN equals NaN, and -0.0 differs from 0.0."""
    if isinstance(x, Tensor):
        return x.dtype, x.shape, x.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
    if isinstance(x, dict):
        return [(type(key), key, plain(value)) for key, value in x.items()]
    return (type(x), [plain(value) for value in x]) if isinstance(x, (list, tuple)) else (type(x), repr(x))


def assert_equal(a: Any, b: Any) -> None:
    assert plain(a) == plain(b)


tensors = st.builds(
    lambda dtype, shape: torch.arange(math.prod(shape)).reshape(shape).to(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3),
)
keys = st.text(max_size=4) | st.integers()
states = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=40)
@given(state=st.dictionaries(keys, states, max_size=3))
def test_round_trip(state: dict[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    saved = checkpoints(tmp_path_factory.mktemp("run"))
    saved.save(1, state)
    assert_equal(saved.load(1), state)


def test_optimizer_and_views_round_trip(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    big = torch.arange(1000.0)
    state = {
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "p": model.weight,
        "view": big[5:7],
    }
    folder = checkpoints(tmp_path).save(1, state)
    assert_equal(checkpoints(tmp_path).load(1), state)
    size = sum(f.stat().st_size for f in folder.iterdir())
    assert size <= state_bytes(state) < size + 50_000
    for x in (torch.zeros(10**6), "a" * 4 * 10**6):
        assert state_bytes({"x": x}) == pytest.approx(4e6, rel=0.01)


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"a": [object()]}, r"state\['a'\]\[0\] is a builtins.object"),
        ({"a": {1.5: 0}}, r"state\['a'\] has the key 1.5"),
        ({"a": torch.zeros(2, device="meta")}, r"state\['a'\].*meta"),
        ({"a": torch.eye(2).to_sparse()}, r"state\['a'\].*sparse"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path: Path, state: dict[str, Any], where: str) -> None:
    with pytest.raises(ValueError, match=where):
        checkpoints(tmp_path).save(1, state)
    assert checkpoints(tmp_path).steps() == []


def test_ranks_stand_beside_each_other(tmp_path: Path) -> None:
    for rank, steps in enumerate([(1, 2, 3), (1, 2)]):
        for t in steps:
            checkpoints(tmp_path, rank).save(t, small_state(10 * rank + t))
    assert (checkpoints(tmp_path, 0).newest(), checkpoints(tmp_path, 1).newest()) == (3, 2)
    assert checkpoints(tmp_path, 0).newest([[1, 2], (2, 1)]) == 2
    assert checkpoints(tmp_path, 0).newest([[4]]) is None
    assert_equal(checkpoints(tmp_path, 1).load(2), small_state(12))
    with pytest.raises(ValueError, match=r"replica00001 has those of steps \[1, 2\]"):
        checkpoints(tmp_path, 1).load(3)


def test_flushed_before_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and the folder's names are on the disk before the folder counts as whole, its own name after."""
    flushed: set[int] = set()
    before_rename: set[int] = set()
    rename = os.rename

    def noted_rename(source: Any, target: Any) -> None:
        if Path(source).is_dir():
            before_rename.update(flushed)
            flushed.clear()
        rename(source, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.add(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "rename", noted_rename)
    folder = checkpoints(tmp_path).save(1, small_state())
    assert {path.stat().st_ino for path in (*folder.iterdir(), folder)} <= before_rename
    assert {path.stat().st_ino for path in (folder.parent, folder.parent.parent, tmp_path)} <= flushed


class Killed(BaseException):
    """No library may mistake it for an error to recover from."""


def kill_at(
    n: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | OSError = Killed
) -> Callable[[], int]:
    """Die at the n-th touch of the file system (from 0), leaving half a file when it is a write; counts touches."""
    touched = 0

    def dies(function: Callable[..., Any]) -> Callable[..., Any]:
        def touch(*args: Any, **kwargs: Any) -> Any:
            nonlocal touched
            touched += 1
            if touched > n:
                if function is io.open and "w" in (args[1] if len(args) > 1 else kwargs.get("mode", "r")):
                    Path(os.fspath(args[0])).touch()
                raise error
            return function(*args, **kwargs)

        return touch

    names = ["mkdir", "rename", "fsync", "open", "unlink", "rmdir"]
    for module, name in [*((os, name) for name in names), (io, "open")]:
        monkeypatch.setattr(module, name, dies(getattr(module, name)))
    return lambda: touched


def assert_unsuffixed_is_whole(saved: Checkpoints) -> None:
    assert saved.steps() == sorted(int(folder.parent.name[1:]) for folder in saved.dir.glob("t*/replica00000"))


@pytest.mark.parametrize("t", [2, 3])
def test_death_at_every_moment_of_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, t: int) -> None:
    """A new step (3), or one that replaces an old one (2): what is listed is whole, step 1 is always there."""
    saved = checkpoints(tmp_path)
    finished = False
    n = 0
    while not finished:
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        for old in (1, 2):
            saved.save(old, small_state(old))
        with monkeypatch.context() as patch:
            touched = kill_at(n, patch)
            try:
                saved.save(t, small_state(9))
                finished = True
            except BaseException:  # DCP wraps what it meets
                assert touched() > n
        assert {1} <= set(saved.steps()) <= {1, 2, 3}
        assert_unsuffixed_is_whole(saved)
        for step in saved.steps():
            values = [9, step] if step == t else [step]
            assert saved.load(step)["t"] in values
        saved.save(t, small_state(9))  # the next life is not hindered by what the dead one left
        assert saved.newest() == t
        assert_equal(saved.load(t), small_state(9))
        saved.prune(t)
        assert not list(tmp_path.rglob("*.partial"))
        n += 1
    assert n > 15


def test_a_full_disk_at_every_moment_of_saving_names_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Python's own error names none, as that of a flush."""
    saved, n, finished = checkpoints(tmp_path), 0, False
    saved.save(1, small_state(1))
    while not finished:
        with monkeypatch.context() as patch:
            touched = kill_at(n, patch, OSError(28, "No space left on device"))
            message = ""
            try:
                saved.save(2, small_state(2))
            except OSError as error:
                message = str(error)
        finished = touched() <= n
        assert not message if finished else "No space left" in message and "is the disk full?" in message
        assert finished or str(tmp_path / "checkpoints/t00000002/replica00000.partial") in message
        assert saved.load(1)["t"] == 1
        shutil.rmtree(tmp_path / "checkpoints/t00000002", ignore_errors=True)
        n += 1
    assert n > 15


def test_death_at_every_moment_of_pruning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = checkpoints(tmp_path, keep=1)
    n, finished = 0, False
    while not finished:
        for t in (1, 2, 3):
            saved.save(t, small_state(t))
        with monkeypatch.context() as patch:
            kill_at(n, patch)
            try:
                saved.prune(3)
                finished = True
            except Killed:
                pass
        assert_unsuffixed_is_whole(saved)
        for step in saved.steps():
            assert_equal(saved.load(step), small_state(step))
        assert saved.newest() == 3
        n += 1
    assert n > 3
    assert saved.steps() == [3]


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", TREE])
def test_flipped_byte_is_refused_and_named(tmp_path: Path, name: str) -> None:
    path = checkpoints(tmp_path).save(1, small_state()) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert checkpoints(tmp_path).steps() == [1]  # cheap: sizes only
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        checkpoints(tmp_path).load(1)


@pytest.mark.parametrize("name", ["__0_0.distcp", TREE, MANIFEST])
@pytest.mark.parametrize("lost", [True, False])
def test_lost_and_cut_files_make_it_not_whole(tmp_path: Path, name: str, lost: bool) -> None:
    path = checkpoints(tmp_path).save(1, small_state()) / name
    if lost:
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1 if name != MANIFEST else 10)
    assert checkpoints(tmp_path).steps() == []
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        checkpoints(tmp_path).load(1)


@pytest.mark.parametrize("manifest", ["null", "[]", '{"files": null}', '{"files": {"tree.json": 1}}'])
def test_a_manifest_of_another_form_makes_it_not_whole(tmp_path: Path, manifest: str) -> None:
    (checkpoints(tmp_path).save(1, small_state()) / MANIFEST).write_text(manifest)
    assert checkpoints(tmp_path).steps() == []


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"run_id": "b"}, "run_id 'run', but here run_id is 'b': the config or the data differ.* is .*config.yaml;"),
        ({"run_id": "b", "num_ranks": 4}, "num_replicas 2, but here num_replicas is 4; resume"),
        ({"num_ranks": 4}, "num_replicas 2, but here num_replicas is 4"),
    ],
)
def test_other_runs_are_refused(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    checkpoints(tmp_path).save(1, small_state())
    for call in (Checkpoints.steps, Checkpoints.newest, lambda c: c.load(1)):
        with pytest.raises(ValueError, match=message):
            call(checkpoints(tmp_path, **other))


@pytest.mark.parametrize(
    ("there", "message"), [("t00000002/replica00001", "t is 2"), ("t00000001/replica00000", "name is 'replica00000'")]
)
def test_a_folder_of_another_step_or_rank_is_refused(tmp_path: Path, there: str, message: str) -> None:
    folder = checkpoints(tmp_path, rank=1).save(1, small_state())
    (folder.parents[1] / there).parent.mkdir(exist_ok=True)
    folder.rename(folder.parents[1] / there)
    with pytest.raises(ValueError, match=f"but here {message}"):
        checkpoints(tmp_path, rank=int(there[-1])).steps()


@pytest.mark.parametrize(
    ("keep", "confirmed_t", "left"),
    [(1, 4, [4, 5]), (2, 4, [3, 4, 5]), (2, 5, [4, 5]), (9, 5, [1, 2, 3, 4, 5]), (2, 1, [1, 2, 3, 4, 5])],
)
def test_prune(tmp_path: Path, keep: int, confirmed_t: int, left: list[int]) -> None:
    saved, other = checkpoints(tmp_path, keep=keep), checkpoints(tmp_path, rank=1)
    for t in (1, 2, 3, 4, 5):
        saved.save(t, {})
    other.save(1, {})
    (tmp_path / "checkpoints/t00000001/replica00000.partial").mkdir()
    theirs = tmp_path / "checkpoints/t00000001/replica00001.partial"
    theirs.mkdir()
    saved.prune(confirmed_t)
    assert saved.steps() == left
    assert other.steps() == [1]
    assert list(tmp_path.rglob("*.partial")) == [theirs]


def test_prune_deletes_what_is_older_and_damaged(tmp_path: Path) -> None:
    saved = checkpoints(tmp_path, keep=9)
    for t in (1, 2, 3):
        (saved.save(t, {}) / TREE).write_text("" if t == 1 else '{"dict": []}')
    saved.prune(3)
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["t00000002", "t00000003"]


def test_discard_after(tmp_path: Path) -> None:
    saved = checkpoints(tmp_path)
    for t in (1, 2, 10**8):  # of more digits than most
        saved.save(t, {})
    saved.discard_after(1)
    assert saved.steps() == [1]
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["t00000001"]


def test_keep_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep is 0"):
        checkpoints(tmp_path, keep=0)


def test_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = checkpoints(tmp_path / "new")
    saved.require_space(1)  # of a disk on which no folder of the run is yet
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 10**9))
    saved.require_space(10**9)
    with pytest.raises(ValueError, match=r"3\.00 GB free, but 3 checkpoints of 1\.10 GB .* need 3\.30 GB more"):
        saved.require_space(11 * 10**8)


def test_a_disk_that_fills_up_while_writing_is_named(tmp_path: Path) -> None:
    """The limit on a file's size stands for the end of the disk."""
    saved = checkpoints(tmp_path)
    saved.save(1, small_state(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"replica00000.partial cannot be written .*; is the disk full\?"):
            saved.save(2, {"x": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved.steps() == [1] and saved.load(1)["t"] == 1
    saved.save(2, small_state(2))
    assert saved.load(2)["t"] == 2


def test_an_interrupt_while_writing_is_no_error_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints(tmp_path).save(1, small_state(1))


def test_checkpoints_of_all_ranks_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in range(4):
        for t in (1, 2):
            checkpoints(tmp_path, rank, 4).save(t, {"x": torch.zeros(250_000)})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4_000_000))
    checkpoints(tmp_path, 3, 4).require_space(4_000_000)
    partial = tmp_path / "checkpoints" / "t00000003" / "replica00003.partial"  # which the next one replaces
    partial.mkdir(parents=True)
    (partial / "x").write_bytes(bytes(1_000_000))
    with pytest.raises(ValueError, match="free space"):
        checkpoints(tmp_path, 3, 4).require_space(4_100_000)
