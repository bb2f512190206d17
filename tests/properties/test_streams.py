"""Laws of the streams: disjoint, complete, resumable, and independent of how a batch is cut over replicas."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowcomm.data import Bytes, Files, PackedStream, WindowStream, tokenize, window_stream
from lowcomm.data.corpus import Corpus, join
from lowcomm.data.stream import document_groups


def numbered(lengths: list[int], cuts: int = 1) -> Corpus:
    """Documents of the given lengths whose tokens are their own positions, spread over several arrays."""
    arrays, ends, start = [], [], 0
    for part in np.array_split(np.array(lengths), min(cuts, len(lengths))):
        arrays.append(np.arange(start, start + part.sum()).astype("<u4"))
        ends.append(np.cumsum(part))
        start += int(part.sum())
    return join(arrays, ends, ends, vocab_size=start + 1, fingerprint=str(lengths))


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=20)
small = st.integers(1, 4)


@given(lengths, small, st.data())
def test_select_is_concatenation_of_the_chosen_documents(lengths, cuts, data):
    corpus = numbered(lengths, cuts)
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))))
    chosen[data.draw(st.integers(0, len(lengths) - 1))] = True
    documents = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    kept = [document for document, keep in zip(documents, chosen, strict=True) if keep]
    selected = corpus.select(chosen)
    again = selected.select(np.arange(len(kept)) % 2 == 0)
    for result, expected in ((selected, kept), (again, kept[::2])):
        tokens = np.concatenate(expected)
        assert result.document_ends.tolist() == np.cumsum([len(document) for document in expected]).tolist()
        assert result.text_byte_ends.tolist() == result.document_ends.tolist()
        start = data.draw(st.integers(0, len(tokens)))
        stop = data.draw(st.integers(start, len(tokens)))
        np.testing.assert_array_equal(result.read(start, stop), tokens[start:stop])


@given(st.integers(1, 3), small, small, st.integers(1, 5), st.integers(0, 40), st.integers(0, 9))
def test_every_token_is_a_target_once_an_epoch(num_replicas, batch_size, seq_len, num_batches, extra, seed):
    per_step = num_replicas * batch_size
    num_windows = per_step * num_batches + extra % per_step
    corpus = numbered([num_windows * seq_len + 1 + extra % seq_len], 1)
    streams = [WindowStream(corpus, seq_len, batch_size, seed, r, num_replicas) for r in range(num_replicas)]
    for _ in range(2):  # two epochs
        rows = torch.cat([stream.next() for _ in range(num_batches) for stream in streams])
        targets = Counter(rows[:, 1:].flatten().tolist())
        assert set(targets.values()) == {1}
        # what is missing is the first token, the dropped windows (fewer than a global batch) and the tail
        assert len(targets) == per_step * num_batches * seq_len
        assert set(targets) <= set(range(1, num_windows * seq_len + 1))
        assert torch.equal(rows[:, 1:], rows[:, :-1] + 1)


@given(st.integers(1, 4), small, small, st.integers(0, 60), st.integers(0, 9))
def test_replicas_together_take_the_windows_of_one_large_batch(num_replicas, batch_size, seq_len, extra, seed):
    corpus = numbered([num_replicas * batch_size * seq_len + 1 + extra])
    streams = [WindowStream(corpus, seq_len, batch_size, seed, r, num_replicas) for r in range(num_replicas)]
    alone = WindowStream(corpus, seq_len, batch_size * num_replicas, seed)
    for _ in range(7):
        assert torch.equal(torch.cat([stream.next() for stream in streams]), alone.next())


@given(st.sampled_from(["windows", "documents"]), st.integers(1, 3), st.integers(0, 12), st.integers(0, 9))
def test_resumed_equals_uninterrupted(split, num_replicas, num_batches, seed):
    corpus = numbered([20] * 6, 2)
    for replica in range(num_replicas):
        arguments = (corpus, split, 3, 2, seed, replica, num_replicas)
        stream, resumed = window_stream(*arguments), window_stream(*arguments)
        for _ in range(num_batches):
            stream.next()
        resumed.load_state_dict(stream.state_dict())
        for _ in range(9):
            assert torch.equal(stream.next(), resumed.next())


@given(lengths, st.integers(1, 5))
def test_groups_partition_the_documents(lengths, num_groups):
    corpus = numbered(lengths)
    if len(lengths) < num_groups:
        with pytest.raises(ValueError, match="cannot be split"):
            document_groups(corpus, num_groups)
        return
    bounds = document_groups(corpus, num_groups)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, len(lengths), num_groups + 1)
    sizes = [sum(lengths[start:stop]) for start, stop in itertools.pairwise(bounds)]
    assert min(np.diff(bounds)) >= 1
    # each bound is at most half a document off, unless a group had to be given its one document
    if max(lengths) * num_groups <= sum(lengths):
        assert max(sizes) - min(sizes) <= 2 * max(lengths)


@given(st.lists(st.integers(8, 30), min_size=3, max_size=12), st.integers(1, 3), st.integers(0, 9))
def test_replicas_stay_in_their_documents(lengths, num_replicas, seed):
    corpus = numbered(lengths)
    bounds = document_groups(corpus, num_replicas)
    ends = [0, *np.cumsum(lengths).tolist()]
    for replica in range(num_replicas):
        first, last = ends[bounds[replica]], ends[bounds[replica + 1]]
        stream = window_stream(corpus, "documents", 2, 1, seed, replica, num_replicas)
        rows = torch.cat([stream.next() for _ in range((last - first - 1) // 2)])
        covered = sorted(rows[:, 1:].flatten().tolist())
        assert covered == list(range(first + 1, first + 1 + len(covered)))
        assert len(covered) >= last - first - 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packed")


@given(
    st.lists(st.text("abc", min_size=1, max_size=9), min_size=4, max_size=12),
    st.integers(1, 3),
    st.integers(0, 6),
    st.sampled_from([0.0, 0.25]),
)
def test_packed_stream_is_the_dealt_documents_and_resumes(folder, texts, num_replicas, num_batches, held_out):
    path = folder / "a.txt"
    path.write_text("|".join(texts), encoding="utf-8")
    source = Files([str(path)], separator="|", streaming=True)
    kept = [text for i, text in enumerate(texts) if held_out == 0 or (i + 1) % 4]
    for replica in range(num_replicas):
        arguments = (source, Bytes(), 3, 2, replica, num_replicas, held_out)
        stream, resumed = PackedStream(*arguments), PackedStream(*arguments)
        one_pass = tokenize(kept[replica::num_replicas], Bytes())
        expected = np.tile(one_pass.read(0, one_pass.num_tokens), 60)
        for batch in range(num_batches + 4):
            if batch == num_batches:
                resumed.load_state_dict(stream.state_dict())
            rows = stream.next()
            for i, row in enumerate(rows):
                start = (batch * 2 + i) * 3
                assert row.tolist() == expected[start : start + 4].tolist()
            if batch >= num_batches:
                assert torch.equal(rows, resumed.next())
