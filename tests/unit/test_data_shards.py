"""Shards on disk: what is read is what was written, and anything else is refused."""

import struct
from pathlib import Path

import numpy as np
import pytest

from lowcomm.data import Bytes, Files, Shards, tokenize, train_bpe, write_shards

TEXTS = ["one", "twenty-two", "drei äöü", "4", "five five five"]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "a.txt").write_text("|".join(TEXTS), encoding="utf-8")
    return Files([str(tmp_path / "a.txt")], separator="|")


@pytest.fixture
def folder(source, tmp_path):
    write_shards(source, Bytes(), str(tmp_path / "out"), shard_tokens=12)
    return tmp_path / "out"


@pytest.mark.parametrize(("shard_tokens", "num_shards"), [(1, 5), (12, 3), (10**6, 1)])
def test_round_trip(source, tmp_path, shard_tokens, num_shards):
    out = tmp_path / "deep" / "out"
    summary = write_shards(source, Bytes(), str(out), shard_tokens)
    mapped, held = Shards(str(out)).read(Bytes()), tokenize(TEXTS, Bytes())
    assert (summary.num_shards, len(list(out.iterdir()))) == (num_shards, num_shards)
    assert (summary.num_documents, summary.num_tokens, summary.num_text_bytes) == (5, 44, 39)
    assert isinstance(mapped.arrays[0], np.memmap)
    np.testing.assert_array_equal(mapped.read(0, 44), held.read(0, 44))
    np.testing.assert_array_equal(mapped.document_ends, held.document_ends)
    np.testing.assert_array_equal(mapped.text_byte_ends, held.text_byte_ends)
    assert mapped.vocab_size == 256
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_fingerprint_follows_content(tmp_path):
    def fingerprint(text, name):
        (tmp_path / "b.txt").write_text(text, encoding="utf-8")
        write_shards(Files([str(tmp_path / "b.txt")]), Bytes(), str(tmp_path / name))
        return Shards(str(tmp_path / name)).read(Bytes()).fingerprint

    assert fingerprint("abc", "x") == fingerprint("abc", "y") != fingerprint("abd", "z")


def test_wide_tokens(source, tmp_path, monkeypatch):
    monkeypatch.setattr(Bytes, "vocab_size", 70_000)
    write_shards(source, Bytes(), str(tmp_path / "wide"))
    corpus = Shards(str(tmp_path / "wide")).read(Bytes())
    assert corpus.arrays[0].dtype == np.uint32
    assert bytes(corpus.read(0, 3).astype(np.uint8)) == b"one"


def test_out_dir_with_content_is_refused_and_untouched(source, folder, tmp_path):
    with pytest.raises(ValueError, match="out is there already"):
        write_shards(source, Bytes(), str(folder))
    assert Shards(str(folder)).read(Bytes()).num_documents == 5
    (tmp_path / "empty").mkdir()
    write_shards(source, Bytes(), str(tmp_path / "empty"))
    assert Shards(str(tmp_path / "empty")).read(Bytes()).num_documents == 5


def test_nothing_is_left_of_a_failed_write(source, tmp_path, monkeypatch):
    (tmp_path / "b.jsonl").write_text('{"text": "good"}\n{"text": 5}\n', encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="line 2"):
        write_shards(Files([str(tmp_path / "b.jsonl")]), Bytes(), str(tmp_path / "out"), shard_tokens=1)
    with pytest.raises(ValueError, match="shard_tokens is 0"):
        write_shards(source, Bytes(), str(tmp_path / "out"), shard_tokens=0)

    def interrupted(header, shard, num_shards):
        raise KeyboardInterrupt

    monkeypatch.setattr("lowcomm.data.shards.replace", interrupted)  # when all tokens are written
    with pytest.raises(KeyboardInterrupt):
        write_shards(source, Bytes(), str(tmp_path / "out"))
    assert sorted(tmp_path.iterdir()) == before


def overwrite(path: Path, offset: int, content: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[offset : offset + len(content)] = content
    path.write_bytes(whole)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: overwrite(path, 0, b"\x89PNG"), "is no shard of tokens"),
        (lambda path: path.write_bytes(b""), "is no shard of tokens"),
        (lambda path: path.write_bytes(path.read_bytes()[:50]), "truncated within its header"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is truncated or was changed"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "is truncated or was changed"),
        (lambda path: overwrite(path, 8, struct.pack("<I", 9)), "has version 9 of the format, this lowcomm reads 1"),
        (lambda path: path.unlink(), r"holds the shards \[0, 2\] of 3"),
    ],
)
def test_damage_is_seen(folder, damage, message):
    damage(folder / "tokens-00001.bin")
    with pytest.raises(ValueError, match=message):
        Shards(str(folder)).read(Bytes())


def test_last_shard_missing_and_no_shard_at_all(folder, tmp_path):
    (folder / "tokens-00002.bin").unlink()
    with pytest.raises(ValueError, match=r"holds the shards \[0, 1\] of 3"):
        Shards(str(folder)).read(Bytes())
    with pytest.raises(ValueError, match="holds no shards"):
        Shards(str(tmp_path / "nowhere")).read(Bytes())


def test_a_shard_of_another_folder_is_seen(source, folder, tmp_path):
    write_shards(source, Bytes(), str(tmp_path / "five"), shard_tokens=1)
    (tmp_path / "five" / "tokens-00001.bin").replace(folder / "tokens-00001.bin")
    with pytest.raises(ValueError, match=r"holds the shards \[0, 1, 2\] of 3; copy the folder again"):
        Shards(str(folder)).read(Bytes())


def test_other_tokenizer(folder, source, tmp_path):
    bpe = train_bpe(source, 260, str(tmp_path / "bpe.json"))
    with pytest.raises(ValueError, match=r"made by a tokenizer with fingerprint .* not BPE"):
        Shards(str(folder)).read(bpe)
