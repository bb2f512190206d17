"""`Data`: the parts put together, from Python and from YAML."""

import time

import pytest
import torch

from lowcomm.data import Bytes, Data, Files, HuggingFace, Shards, write_shards


@pytest.fixture
def path(tmp_path):
    (tmp_path / "a.txt").write_text("|".join(f"document {i} " * 5 for i in range(40)), encoding="utf-8")
    return str(tmp_path / "a.txt")


def test_default_is_fast_and_complete():
    started = time.perf_counter()
    opened = Data().open(replica=1, num_replicas=4, batch_size=8, seed=0)
    assert time.perf_counter() - started < 10  # about 0.2 s; the limit allows for a busy machine
    assert opened.train.next().shape == (8, 257)
    assert opened.vocab_size == 256
    assert opened.num_train_tokens is not None
    assert opened.num_train_tokens > 5_000_000
    validation = opened.validation(8, 20_000)
    assert validation.bytes_per_token == pytest.approx(1, abs=0.001)
    assert sum(batch.numel() for batch in validation.batches) == 9 * 8 * 257


@pytest.mark.parametrize("split", ["windows", "documents"])
def test_replicas_share_validation_and_fingerprint(path, split):
    data = Data(Files([path], separator="|"), seq_len=8, split=split, validation_fraction=0.1)
    loaded = data.load()
    opened = [loaded.open(replica, 3, 2, seed=0) for replica in range(3)]
    assert len({one.fingerprint for one in opened}) == 1
    assert opened[0].fingerprint == data.open(0, 3, 2, 0).fingerprint
    first, *others = [one.validation(2, 100) for one in opened]
    assert all(torch.equal(a, b) for x in others for a, b in zip(x.batches, first.batches, strict=True))
    assert {x.bytes_per_token for x in others} == {first.bytes_per_token}
    batches = [one.train.next() for one in opened]
    assert not torch.equal(batches[0], batches[1])


def test_held_out_documents_are_never_trained_on(path):
    for streaming in (False, True):
        opened = Data(Files([path], separator="|", streaming=streaming), seq_len=16, validation_fraction=0.1).open(
            0, 1, 4, seed=0
        )
        trained = "".join(map(chr, torch.cat([opened.train.next() for _ in range(40)]).flatten().tolist()))
        judged = "".join(map(chr, torch.cat([*opened.validation(1, 10**6).batches]).flatten().tolist()))
        assert "document 9 " in judged
        assert "document 9 " not in trained
        assert "document 10 " in trained
        assert "document 10 " not in judged


def test_shards_are_the_same_data(path, tmp_path):
    source = Files([path], separator="|")
    write_shards(source, Bytes(), str(tmp_path / "shards"), shard_tokens=200)
    held = Data(source, seq_len=8).open(1, 2, 3, seed=5)
    mapped = Data(Shards(str(tmp_path / "shards")), seq_len=8).open(1, 2, 3, seed=5)
    for _ in range(60):
        assert torch.equal(held.train.next(), mapped.train.next())
    assert held.validation(2, 100).bytes_per_token == mapped.validation(2, 100).bytes_per_token
    assert held.num_train_tokens == mapped.num_train_tokens
    assert held.fingerprint != mapped.fingerprint


def test_validation_of_its_own_and_none_at_all(path, tmp_path):
    (tmp_path / "v.txt").write_text("judge " * 50, encoding="utf-8")
    source = Files([path], separator="|")
    own = Data(source, seq_len=8, validation=Files([str(tmp_path / "v.txt")])).open(0, 1, 2, 0)
    assert "".join(map(chr, own.validation(1, 8).batches[0][0].tolist())) == "judge jud"
    none = Data(source, seq_len=8, validation_fraction=0).open(0, 1, 2, 0)
    assert own.num_train_tokens == none.num_train_tokens
    assert not none.validation(1, 8).batches


def test_streamed_with_a_validation_of_its_own_trains_on_every_document(path, tmp_path):
    (tmp_path / "v.txt").write_text("judge " * 50, encoding="utf-8")
    judged = Files([str(tmp_path / "v.txt")], separator=" ", streaming=True)
    source = Files([path], separator="|", streaming=True)
    opened = Data(source, seq_len=8, validation=judged, streamed_validation_tokens=20).open(0, 1, 4, 0)
    trained = "".join(map(chr, torch.cat([opened.train.next()[:, 1:] for _ in range(80)]).flatten().tolist()))
    assert all(f"document {i} " in trained for i in range(1, 40))
    assert sum(map(len, opened.validation(1, 10**6).batches)) == 2  # of four documents of six tokens


def test_streamed(path):
    source = Files([path], separator="|", streaming=True)
    opened = Data(source, seq_len=8, streamed_validation_tokens=60).open(1, 2, 2, 0)
    assert opened.num_train_tokens is None
    # document 19 alone: 12 bytes five times and the separator are 61 tokens
    assert sum(map(len, opened.validation(1, 10**6).batches)) == 60 // 8
    assert opened.train.next().shape == (2, 9)
    bare = Data(source, seq_len=8, validation_fraction=0).open(1, 2, 2, 0)
    assert not bare.validation(1, 8).batches
    assert bare.fingerprint != opened.fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_len": 0}, "seq_len is 0"),
        ({"split": "rows"}, "split is 'rows'"),
        ({"validation_fraction": 1.0}, r"validation_fraction is 1\.0"),
        ({"validation_fraction": -0.1}, r"validation_fraction is -0\.1"),
        ({"streamed_validation_tokens": 0}, "streamed_validation_tokens is 0"),
        ({"source": HuggingFace("x"), "split": "documents"}, "is streamed; set streaming to False"),
    ],
)
def test_config_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Data(**arguments)
