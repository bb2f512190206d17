"""Sources: the standard library, files of every kind and what is wrong with them, local Hugging Face datasets."""

import gzip
import json
import lzma
from functools import partial
from typing import Any

import pytest

from lowcomm.data import Files, HuggingFace, StandardLibrary

OPENERS: dict[str, Any] = {"": open, ".gz": gzip.open, ".xz": lzma.open}
TEXTS = ["first", "zweites äöü", "third\nof two lines"]


def lines(texts, field="text"):
    return "".join(json.dumps({field: text, "n": 1}) + "\n" for text in texts)


def read(*paths, field="text", separator=None):
    return list(Files([str(path) for path in paths], field, separator).documents())


def test_standard_library_is_large_and_deterministic():
    documents = list(StandardLibrary().documents())
    assert documents == list(StandardLibrary().documents())
    assert sum(map(len, documents)) > 5_000_000
    assert any("class OrderedDict" in text for text in documents)
    assert not any("class TestOrderedDict" in text for text in documents)
    assert all(documents)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_json_lines(tmp_path, suffix):
    opener = OPENERS[suffix]
    path = tmp_path / f"a.jsonl{suffix}"
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(lines([*TEXTS, ""], "body") + "\n")
    assert read(path, field="body") == TEXTS


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_text(tmp_path, suffix):
    opener = OPENERS[suffix]
    path = tmp_path / f"a.txt{suffix}"
    with opener(path, "wb") as file:
        file.write("\0".join([*TEXTS, "", "with\r\nreturn", ""]).encode())
    assert read(path) == ["\0".join([*TEXTS, "", "with\r\nreturn", ""])]
    assert read(path, separator="\0") == [*TEXTS, "with\r\nreturn"]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
def test_separator_across_chunks(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("lowcomm.data.files._CHUNK_CHARACTERS", chunk)
    path = tmp_path / "a.txt"
    path.write_text("ab--cd---ef----g-", encoding="utf-8")
    assert read(path, separator="--") == ["ab", "cd", "-ef", "g-"]


def test_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [*TEXTS, ""], "n": [1, 2, 3, 4]}), path, row_group_size=2)
    assert read(path) == TEXTS
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'body'.*\['text', 'n'\]"):
        read(path, field="body")
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: field 'n' is a int"):
        read(path, field="n")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.parquet is not a whole Parquet file"):
        read(path)


def test_globs_are_sorted_and_paths_keep_their_order(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.txt"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert read(tmp_path / "deep/c.txt", tmp_path / "*.txt") == ["deep/c.txt", "a.txt", "b.txt"]
    assert read(tmp_path / "**/*.txt") == ["a.txt", "b.txt", "deep/c.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", lines(["x"]) + '{"other": 1}\n', r"a\.jsonl, line 2 has no field 'text'.*\['other'\]"),
        ("a.jsonl", lines(["x"]) + '{"text": 3}\n', r"a\.jsonl, line 2: field 'text' is a int"),
        ("a.json", '{"text": "x"}\n\n{"te', r"a\.json, line 3 is not one whole JSON value"),
        ("a.json", "[1, 2]\n", r"a\.json, line 1 is a list"),
        ("a.jsonl", '{"text": "\\ud800"}\n', r"a\.jsonl, line 1: field 'text' is no valid text"),
        ("a.txt", "", r"a\.txt holds no text"),
        ("a.txt", b"abc\xff", r"a\.txt cannot be read to its end"),
        ("a.txt.gz", gzip.compress(b"some text", mtime=0)[:-9], r"a\.txt\.gz cannot be read to its end"),
        ("a.txt.xz", b"not xz", r"a\.txt\.xz cannot be read to its end"),
        ("a.csv", "x", r"a\.csv has the unknown kind '\.csv'"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read(path)


def test_paths_that_name_nothing(tmp_path):
    for name in ("missing.txt", "*.txt"):
        with pytest.raises(ValueError, match="names no file"):
            read(tmp_path / name)
    with pytest.raises(ValueError, match="at least one file"):
        Files([])
    with pytest.raises(ValueError, match="give a list"):
        Files("a.txt")
    with pytest.raises(ValueError, match="separator is empty"):
        Files(["a.txt"], separator="")


def test_identity_follows_content_not_place(tmp_path):
    def identity(folder, text):
        (tmp_path / folder).mkdir(exist_ok=True)
        path = tmp_path / folder / "a.txt"
        path.write_text(text, encoding="utf-8")
        return Files([str(path)]).identity()

    assert identity("one", "abc") == identity("two", "abc") != identity("one", "abcd")
    path = str(tmp_path / "one" / "a.txt")
    assert len({Files([path], *how).identity() for how in ((), ("body",), ("text", "b"))}) == 3


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    for shard in range(3):
        texts = [f"document {shard}-{i}" for i in range(5)] + [""] * (shard == 1)
        (tmp_path / "data" / f"train-0000{shard}.jsonl").write_text(lines(texts), encoding="utf-8")
    return str(tmp_path / "data")


EXPECTED = [f"document {shard}-{i}" for shard in range(3) for i in range(5)]


@pytest.mark.parametrize("streaming", [True, False])
def test_hugging_face_documents(folder, streaming):
    source = HuggingFace(folder, streaming=streaming)
    assert list(source.documents()) == EXPECTED
    assert source.is_streamed() == streaming


def remaining(cursor):
    return list(iter(partial(next, cursor, None), None))


@pytest.mark.parametrize("streaming", [True, False])
def test_hugging_face_cursor_resumes_at_every_document(folder, streaming):
    source = HuggingFace(folder, streaming=streaming)
    cursor = source.cursor()
    states = [cursor.state_dict()]
    for expected in EXPECTED:
        assert next(cursor) == expected
        states.append(cursor.state_dict())
    for num_documents, state in enumerate(states):
        assert state["num_documents"] == num_documents
        resumed = source.cursor(source.cursor(state).state_dict())  # also when nothing was read in between
        if num_documents < len(EXPECTED):
            assert next(resumed) == EXPECTED[num_documents]
            again = source.cursor(resumed.state_dict())
            assert remaining(again) == EXPECTED[num_documents + 1 :]
        else:
            assert remaining(resumed) == []


def test_a_dataset_that_resumes_in_the_wrong_place_is_caught(folder):
    source = HuggingFace(folder)
    cursor = source.cursor()
    states = [cursor.state_dict() for _ in EXPECTED[:8] if next(cursor)]
    frozen = {**states[6], "before_last_row": states[0]["before_last_row"]}
    with pytest.warns(UserWarning, match="in another place than it was left; reading over 6 rows"):
        resumed = source.cursor(frozen)
    assert remaining(source.cursor(resumed.state_dict())) == remaining(resumed) == EXPECTED[7:]
    with (
        pytest.warns(UserWarning, match="another place"),
        pytest.raises(ValueError, match=r"row 7 of .* has changed"),
    ):
        source.cursor({**states[6], "last_row": "of another dataset"})


@pytest.mark.parametrize("streaming", [True, False])
def test_hugging_face_errors(folder, streaming):
    with pytest.raises(ValueError, match=r"no column 'body'.*\['text', 'n'\]"):
        next(HuggingFace(folder, field="body", streaming=streaming).documents())
    with pytest.raises(ValueError, match="field 'n' is a int"):
        next(HuggingFace(folder, field="n", streaming=streaming).documents())
    with pytest.raises(ValueError, match=r"split 'nosuch'\) cannot be opened"):
        next(HuggingFace(folder, split="nosuch", streaming=streaming).documents())
