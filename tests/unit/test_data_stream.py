"""Corpora, streams and validation by hand-made examples; laws over all sizes stand in properties/test_streams.py."""

import math

import numpy as np
import pytest
import torch

from lowcomm.data import Bytes, Files, HuggingFace, PackedStream, WindowStream, bits_per_byte, tokenize, window_stream
from lowcomm.data.corpus import token_dtype
from lowcomm.data.packed import stream_fingerprint
from lowcomm.data.stream import document_groups
from lowcomm.data.tokenizer import Tokenizer
from lowcomm.data.validation import bytes_per_target, hold_out, validation_batches

TEXTS = [chr(97 + i) * (i + 1) for i in range(10)]  # "a", "bb", ... 55 bytes, 65 tokens


@pytest.fixture
def corpus():
    return tokenize(TEXTS, Bytes())


def test_corpus_counts(corpus):
    assert (corpus.num_tokens, corpus.num_documents, corpus.num_text_bytes) == (65, 10, 55)
    assert corpus.vocab_size == 256
    assert corpus.bytes_per_token == 55 / 65
    assert bytes(corpus.read(0, 9).astype(np.uint8)) == b"a\0bb\0ccc\0"


def test_corpus_fingerprint():
    prints = [tokenize(texts, Bytes()).fingerprint for texts in (["ab"], ["ab"], ["ac"], ["a\0"], ["a", ""])]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4  # also where tokens agree and only the documents differ


def test_each_choice_of_documents_has_a_fingerprint_of_its_own(corpus):
    chosen = [corpus.select(np.arange(10) % 2 == k) for k in (0, 1)]
    assert len({x.fingerprint for x in [corpus, *chosen]}) == 3


def test_whole_documents_until_there_are_enough_tokens():
    assert [tokenize(TEXTS, Bytes(), limit).num_tokens for limit in (1, 2, 3, 5, 6)] == [2, 2, 5, 5, 9]


def test_ids_fit_in_the_dtype_of_their_vocabulary():
    assert [token_dtype(vocab_size).itemsize for vocab_size in (2**16, 2**16 + 1)] == [2, 4]


def test_epochs_and_seeds_differ(corpus):
    def epoch(stream):
        return [tuple(row) for _ in range(4) for row in stream.next().tolist()]

    stream, other = WindowStream(corpus, 4, 4, seed=0), WindowStream(corpus, 4, 4, seed=1)
    first, second = epoch(stream), epoch(stream)
    assert sorted(first) == sorted(second)
    assert first != second != epoch(other)


def test_too_little_text_says_how_much_is_needed(corpus):
    WindowStream(corpus, 4, 8, seed=0, replica=0, num_replicas=2)  # 16 windows take 65 tokens
    with pytest.raises(ValueError, match=r"has 65 tokens, but one batch of 17 windows of 4 .* takes 69"):
        WindowStream(corpus, 4, 17, seed=0)
    for replica in (0, 1):  # of 35 and of 30 tokens
        with pytest.raises(ValueError, match=r"leave 30 tokens in the smallest, .* takes 33"):
            window_stream(corpus, "documents", 4, 8, 0, replica, num_replicas=2)
    with pytest.raises(ValueError, match=r"10 documents cannot be split over 11 replicas.*separator"):
        window_stream(corpus, "documents", 1, 1, 0, replica=0, num_replicas=11)


def test_shares_that_cannot_be(corpus):
    with pytest.raises(ValueError, match=r"replica is 2; with 2 replicas it must lie in 0\.\.1"):
        WindowStream(corpus, 4, 1, 0, replica=2, num_replicas=2)
    with pytest.raises(ValueError, match="batch_size 0; both must be at least 1"):
        WindowStream(corpus, 4, 0, 0)


def test_document_groups_are_balanced(corpus):
    assert document_groups(corpus, 1) == [0, 10]
    assert document_groups(corpus, 2) == [0, 7, 10]  # 35 and 30 tokens
    assert document_groups(corpus, 10) == list(range(11))
    giant = tokenize(["x" * 1000, "a", "b", "c"], Bytes())
    assert document_groups(giant, 3) == [0, 1, 2, 4] or document_groups(giant, 3) == [0, 1, 3, 4]


def test_replicas_with_equal_documents_shuffle_them_in_orders_of_their_own():
    equal = tokenize([bytes(range(1, 60)).decode()] * 2, Bytes())
    first, second = (window_stream(equal, "documents", 4, 12, 0, replica, 2).next() for replica in (0, 1))
    assert not torch.equal(first, second)


def test_state_of_other_data_is_refused(corpus):
    state = WindowStream(corpus, 4, 2, seed=0).state_dict()
    WindowStream(corpus, 4, 1, seed=0, replica=1, num_replicas=2).load_state_dict(state)  # the same global batch
    for other in (
        WindowStream(corpus, 4, 3, seed=0),
        WindowStream(corpus, 5, 2, seed=0),
        WindowStream(corpus, 4, 2, seed=1),
        WindowStream(tokenize(["other text " * 9], Bytes()), 4, 2, seed=0),
    ):
        with pytest.raises(ValueError, match=r"another stream of tokens: .* there and .* here"):
            other.load_state_dict(state)


def test_hold_out_spreads_whole_documents():
    corpus = tokenize([f"{i:02d}" for i in range(20)], Bytes())
    train, held_out = hold_out(corpus, 0.2)
    assert bytes(held_out.read(0, held_out.num_tokens).astype(np.uint8)) == b"04\00009\00014\00019\0"
    assert (train.num_documents, held_out.num_documents) == (16, 4)
    with pytest.raises(ValueError, match=r"validation_fraction 0\.01 of 20 documents is not one"):
        hold_out(corpus, 0.01)


@pytest.mark.parametrize(
    ("batch_size", "max_tokens", "rows", "num_batches"),
    [(4, 10**9, 4, 4), (3, 10**9, 3, 5), (100, 10**9, 16, 1), (2, 23, 2, 2), (8, 12, 3, 1)],
)
def test_validation_batches(corpus, batch_size, max_tokens, rows, num_batches):
    batches = validation_batches(corpus, 4, batch_size, max_tokens)
    assert [batch.shape for batch in batches] == [(rows, 5)] * num_batches
    targets = torch.cat(batches)[:, 1:].flatten()
    assert len(targets) <= max_tokens
    assert targets.tolist() == corpus.read(1, 1 + len(targets)).tolist()


def test_validation_errors(corpus):
    with pytest.raises(ValueError, match="has 65 tokens and may use 3, but one window of 4 takes 5"):
        validation_batches(corpus, 4, 1, 3)
    with pytest.raises(ValueError, match="one window of 65 takes 66"):
        validation_batches(corpus, 65, 1, 1000)
    with pytest.raises(ValueError, match="batch_size is 0"):
        validation_batches(corpus, 4, 0, 1000)


def test_bytes_per_target_are_those_of_the_windows_evaluated():
    mixed = tokenize(["a" * 400] + ["b"] * 400, Bytes())
    assert bytes_per_target(mixed, Bytes(), 256) == 1  # and not 2/3, as of the whole corpus
    assert bytes_per_target(mixed, Bytes(), 403) == 401 / 403  # from the second "a" on, and one "b"
    assert bytes_per_target(tokenize(["", "a\0b", ""], Bytes()), Bytes(), 4) == 3 / 4  # a zero byte may be text
    with pytest.raises(ValueError, match="first 1 tokens of validation hold no text"):
        bytes_per_target(tokenize(["a", "b"], Bytes()), Bytes(), 1)


def test_bytes_per_target_of_tokens_of_unknown_length(monkeypatch):
    monkeypatch.setattr(Bytes, "num_bytes", Tokenizer.num_bytes)
    mixed = tokenize(["aaa", "b", "cccc"], Bytes())  # whole documents count as they are, cut ones in proportion
    assert bytes_per_target(mixed, Bytes(), 5) == pytest.approx((3 * 3 / 4 + 1) / 5)
    assert bytes_per_target(mixed, Bytes(), 7) == pytest.approx((3 * 3 / 4 + 1 + 4 * 2 / 5) / 7)


def test_bits_per_byte():
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8)
    assert bits_per_byte(math.log(256), 4.0) == pytest.approx(2)


@pytest.fixture
def jsonl(tmp_path):
    (tmp_path / "data").mkdir()
    for shard in range(2):
        rows = "".join(f'{{"text": "{text}"}}\n' for text in TEXTS[shard * 5 : shard * 5 + 5])
        (tmp_path / "data" / f"train-{shard}.jsonl").write_text(rows, encoding="utf-8")
    return tmp_path / "data"


def test_packed_stream_errors(jsonl):
    source = Files([f"{jsonl}/*.jsonl"], streaming=True)
    with pytest.raises(ValueError, match="has 10 documents, none of them for replica 10 of 11"):
        PackedStream(source, Bytes(), 4, 1, 10, 11).next()
    state = PackedStream(source, Bytes(), 4, 1, 0, 2).state_dict()
    with pytest.raises(ValueError, match="replica 0 there and 1 here"):
        PackedStream(source, Bytes(), 4, 1, 1, 2).load_state_dict(state)
    with pytest.raises(ValueError, match="num_replicas 2 there and 3 here"):
        PackedStream(source, Bytes(), 4, 1, 0, 3).load_state_dict(state)


def test_fingerprint_of_a_stream_tells_sources_tokenizers_and_shares_apart(monkeypatch):
    def fingerprint(name="a", held_out=0.0):
        return stream_fingerprint(HuggingFace(name), Bytes(), held_out)

    found = [fingerprint(), fingerprint("b"), fingerprint(held_out=0.1)]
    monkeypatch.setattr(Bytes, "fingerprint", "0" * 32)
    assert len({*found, fingerprint()}) == 4
