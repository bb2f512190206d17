"""Tokenizers: bytes, and BPE trained on a little text."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from lowcomm.data import BPE, Bytes, Files, train_bpe
from lowcomm.data.bpe import END_OF_DOCUMENT

TEXT = "the cat sat on the mat, the cat äöü 猫 sat on the hat. " * 20


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "a.txt").write_text(TEXT, encoding="utf-8")
    return train_bpe(Files([str(folder / "a.txt")]), 300, str(folder / "bpe.json"))


def test_bytes():
    ids = Bytes().encode("aä\0")
    assert ids.tolist() == [97, 195, 164, 0]
    assert (Bytes().vocab_size, Bytes().separator, len(Bytes().fingerprint)) == (256, 0, 32)


def test_bpe_is_reversible_and_shorter_than_bytes(bpe):
    ids = bpe.encode(TEXT)
    assert len(ids) < len(TEXT.encode()) / 2
    assert bpe._tokenizer.decode(ids.tolist()) == TEXT
    assert bpe.vocab_size <= 300
    assert ids.max() < bpe.vocab_size
    assert bpe.separator == 0
    # text never seen still encodes: bytes are tokens
    assert bpe._tokenizer.decode(bpe.encode("Привет\x01").tolist()) == "Привет\x01"


def test_special_token_in_text_is_text(bpe):
    ids = bpe.encode("a<|endoftext|>b").tolist()
    assert bpe.separator not in ids
    assert bpe._tokenizer.decode(ids) == "a<|endoftext|>b"


START = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": END_OF_DOCUMENT, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {END_OF_DOCUMENT: {"id": END_OF_DOCUMENT, "ids": [0], "tokens": [END_OF_DOCUMENT]}},
}


@pytest.mark.parametrize(
    "setting",
    [
        {"truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}},
        {
            "padding": {"strategy": {"Fixed": 5000}, "direction": "Right", "pad_to_multiple_of": None}
            | {"pad_id": 0, "pad_type_id": 0, "pad_token": END_OF_DOCUMENT}
        },
        {"post_processor": START},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_in_the_file_that_would_lose_or_add_tokens_are_off(bpe, tmp_path, setting):
    content = json.loads(Path(bpe.path).read_text(encoding="utf-8")) | setting
    (tmp_path / "b.json").write_text(json.dumps(content), encoding="utf-8")
    other = BPE(str(tmp_path / "b.json"))
    assert other.encode(TEXT).tolist() == other.encode_batch([TEXT])[0].tolist() == bpe.encode(TEXT).tolist()
    assert other.fingerprint != bpe.fingerprint


def test_ids_may_have_gaps_and_added_tokens_count_their_bytes(bpe, tmp_path):
    content = json.loads(Path(bpe.path).read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    vocab[max(vocab, key=vocab.get)] = 400
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    content["added_tokens"].append({"id": 401, "content": "öäü", **flags})
    (tmp_path / "b.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    other = BPE(str(tmp_path / "b.json"))
    assert other.vocab_size == 401
    assert other.num_bytes(other.encode("the öäü")) == 10


def test_bpe_knows_the_bytes_of_its_tokens(bpe):
    text = TEXT + "Привет<|endoftext|>\x01"
    ids = bpe.encode(text)
    assert bpe.num_bytes(ids) == len(text.encode())
    head = next(n for n in range(5, len(ids)) if "\ufffd" not in bpe._tokenizer.decode(ids[:n].tolist()))
    assert bpe.num_bytes(ids[:head]) == len(bpe._tokenizer.decode(ids[:head].tolist()).encode())


@pytest.mark.parametrize(
    "other",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": None},
    ],
)
def test_tokens_of_a_tokenizer_that_changes_text_have_no_bytes_of_their_own(bpe, tmp_path, other):
    content = json.loads(Path(bpe.path).read_text(encoding="utf-8")) | other
    (tmp_path / "b.json").write_text(json.dumps(content), encoding="utf-8")
    assert BPE(str(tmp_path / "b.json")).num_bytes(np.array([5, 6])) is None


def test_bpe_survives_pickling_and_equals_its_copy(bpe):
    bpe.encode("load it")
    copy = pickle.loads(pickle.dumps(bpe))
    assert copy == bpe == BPE(bpe.path)
    assert copy.encode("the cat").tolist() == bpe.encode("the cat").tolist()


def test_errors(bpe, tmp_path):
    with pytest.raises(ValueError, match=r"missing\.json cannot be read.*train_bpe"):
        _ = BPE(str(tmp_path / "missing.json")).vocab_size
    (tmp_path / "bad.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad\.json is no tokenizer"):
        BPE(str(tmp_path / "bad.json")).encode("x")
    with pytest.raises(ValueError, match=r"no token '</s>'; set end_of_document"):
        _ = BPE(bpe.path, end_of_document="</s>").separator
    with pytest.raises(ValueError, match=r"vocab_size is 256; .* at least 257"):
        train_bpe(Files([bpe.path]), 256, str(tmp_path / "c.json"))
