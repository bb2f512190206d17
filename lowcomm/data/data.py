"""The data of a run as a config: text, windows, tokenizer, held-out documents."""

from __future__ import annotations

from dataclasses import dataclass

from lowcomm.data.corpus import Corpus, digest, tokenize
from lowcomm.data.packed import PackedStream, stream_fingerprint
from lowcomm.data.shards import Shards
from lowcomm.data.source import Origin, Source, StandardLibrary
from lowcomm.data.stream import Split, TokenStream, window_stream
from lowcomm.data.tokenizer import Bytes, Tokenizer
from lowcomm.data.validation import Validation, bytes_per_target, hold_out, is_held_out, validation_batches


@dataclass(frozen=True)
class OpenedData:
    """One replica's view of the data.

    Attributes:
        train: the stream of batches.
        vocab_size: one more than the largest token id possible.
        fingerprint: equal on all replicas of a run, different for other training data.
        num_train_tokens: over all replicas; None for a streamed source, whose end nobody knows.
    """

    train: TokenStream
    vocab_size: int
    fingerprint: str
    num_train_tokens: int | None
    _data: Data
    _validation: Corpus | None

    @property
    def validation_fingerprint(self) -> str:
        """Equal on all replicas that evaluate the same text, or none."""
        return digest(b"" if self._validation is None else self._validation.fingerprint.encode())

    def validation(self, batch_size: int, max_tokens: int) -> Validation:
        """What to evaluate on, see `validation_batches`; without batches when nothing is held out."""
        if self._validation is None:
            return Validation()
        batches = validation_batches(self._validation, self._data.seq_len, batch_size, max_tokens)
        num_targets = sum(batch[:, 1:].numel() for batch in batches)
        return Validation(batches, bytes_per_target(self._validation, self._data.tokenizer, num_targets))


@dataclass(frozen=True)
class Data:
    """Which tokens to train and to validate on.

    Attributes:
        source: text, or shards of tokens written before.
        tokenizer: for shards, the one that made them.
        seq_len: targets in a window.
        split: "windows" deals shuffled windows of all text to the replicas (iid); "documents" gives each replica a
            group of documents of its own (non-iid).
        validation: text of its own; None holds documents of ``source`` out.
        validation_fraction: the share of documents held out, evenly spread, when ``validation`` is None; 0 for none,
            and then nothing is evaluated.
        streamed_validation_tokens: how much of a streamed source is read for validation, before the run starts.
    """

    source: Origin = StandardLibrary()
    tokenizer: Tokenizer = Bytes()
    seq_len: int = 256
    split: Split = "windows"
    validation: Origin | None = None
    validation_fraction: float = 0.05
    streamed_validation_tokens: int = 1_000_000

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise ValueError(f"seq_len is {self.seq_len}; it must be at least 1")
        if self.split not in ("windows", "documents"):
            raise ValueError(f'split is {self.split!r}; it must be "windows" or "documents"')
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}; it must lie in [0, 1)")
        if self.streamed_validation_tokens < 1:
            raise ValueError(f"streamed_validation_tokens is {self.streamed_validation_tokens}; it must be at least 1")
        if self.split == "documents" and self.source.is_streamed():
            raise ValueError(
                f'split="documents" groups all documents of a source, but {self.source} is streamed; '
                'set streaming to False, write shards, or use split="windows"'
            )

    def load(self) -> LoadedData:
        """Read and tokenise what all replicas share: done once, it serves all replicas of a process."""
        if isinstance(self.source, Source) and self.source.is_streamed():
            return LoadedData(self, None, self._streamed_validation(self.source))
        train = self._corpus(self.source)
        if self.validation is not None:
            return LoadedData(self, train, self._corpus(self.validation))
        if self.validation_fraction == 0:
            return LoadedData(self, train, None)
        return LoadedData(self, *hold_out(train, self.validation_fraction))

    def open(self, replica: int, num_replicas: int, batch_size: int, seed: int) -> OpenedData:
        """`load`, then `LoadedData.open`: for a process with one replica."""
        return self.load().open(replica, num_replicas, batch_size, seed)

    def _corpus(self, source: Origin) -> Corpus:
        if isinstance(source, Shards):
            return source.read(self.tokenizer)
        assert isinstance(source, Source), "an origin is text or shards"
        limit = self.streamed_validation_tokens if source.is_streamed() else None
        return tokenize(source.documents(), self.tokenizer, limit)

    def _streamed_validation(self, source: Source) -> Corpus | None:
        if self.validation is not None:
            return self._corpus(self.validation)
        if self.validation_fraction == 0:
            return None
        held_out = (
            text for index, text in enumerate(source.documents()) if is_held_out(index, self.validation_fraction)
        )
        return tokenize(held_out, self.tokenizer, self.streamed_validation_tokens)


@dataclass(frozen=True)
class LoadedData:
    """Tokens in memory or mapped from disk, from which every replica of a process opens its stream.

    Attributes:
        train: None for a streamed source.
        validation: None when nothing is held out.
    """

    data: Data
    train: Corpus | None
    validation: Corpus | None

    def open(self, replica: int, num_replicas: int, batch_size: int, seed: int) -> OpenedData:
        """One replica's stream of ``batch_size`` windows a batch; ``seed`` is the same on all replicas.

        Raises:
            ValueError: when the text does not hold one batch for every replica.
        """
        data = self.data
        if self.train is not None:
            stream: TokenStream = window_stream(
                self.train, data.split, data.seq_len, batch_size, seed, replica, num_replicas
            )
            fingerprint = self.train.fingerprint
        else:
            assert isinstance(data.source, Source)
            held_out = data.validation_fraction if data.validation is None else 0.0
            stream = PackedStream(
                data.source, data.tokenizer, data.seq_len, batch_size, replica, num_replicas, held_out
            )
            fingerprint = stream_fingerprint(data.source, data.tokenizer, held_out)
        return OpenedData(
            train=stream,
            vocab_size=data.tokenizer.vocab_size,
            fingerprint=fingerprint,
            num_train_tokens=None if self.train is None else self.train.num_tokens,
            _data=data,
            _validation=self.validation,
        )
