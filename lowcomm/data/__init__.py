"""Token streams for language-model training that are disjoint per replica and resume exactly."""

from lowcomm.data.bpe import BPE, train_bpe
from lowcomm.data.corpus import Corpus, tokenize
from lowcomm.data.data import Data, LoadedData, OpenedData
from lowcomm.data.files import Files
from lowcomm.data.huggingface import HuggingFace
from lowcomm.data.packed import PackedStream
from lowcomm.data.shards import Shards, ShardsSummary, write_shards
from lowcomm.data.source import Source, StandardLibrary
from lowcomm.data.stream import TokenStream, WindowStream, window_stream
from lowcomm.data.tokenizer import Bytes, Tokenizer
from lowcomm.data.validation import Validation, bits_per_byte, validation_batches

__all__ = [
    "BPE",
    "Bytes",
    "Corpus",
    "Data",
    "Files",
    "HuggingFace",
    "LoadedData",
    "OpenedData",
    "PackedStream",
    "Shards",
    "ShardsSummary",
    "Source",
    "StandardLibrary",
    "TokenStream",
    "Tokenizer",
    "Validation",
    "WindowStream",
    "bits_per_byte",
    "tokenize",
    "train_bpe",
    "validation_batches",
    "window_stream",
    "write_shards",
]
