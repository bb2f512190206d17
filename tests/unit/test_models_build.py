"""Models build the same weights whatever ran before; Hugging Face's and the user's own models."""

import shutil
import sys

import pytest
import torch
from torch import nn

from lowcomm.models.hugging_face import HuggingFace
from lowcomm.models.llama import Llama
from lowcomm.models.module import Module
from lowcomm.tensors import digest

TINY = Llama("500k", num_layers=1, dim=16, num_heads=2, num_kv_heads=2, ffn_dim=24)


class Bigram(nn.Module):
    """A user's model."""

    def __init__(self, vocab_size: int, width: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.drop = nn.Dropout(0.5).eval()
        self.head = nn.Linear(width, vocab_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.embedding(tokens)))


class Flat(Bigram):
    """A user's model that forgets the batch dimension."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens).flatten(0, 1)


@pytest.fixture(autouse=True)
def _importable_here(monkeypatch):
    monkeypatch.setitem(sys.modules, "users_models", sys.modules[__name__])


@pytest.fixture
def tiny_gpt2(tmp_path):
    import transformers

    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path)
    return str(tmp_path)


def weights(model: nn.Module) -> str:
    return digest(list(model.parameters()))


@pytest.mark.parametrize("kind", ["llama", "hugging_face", "module"])
def test_equal_seeds_give_equal_weights_and_leave_the_global_stream_alone(kind, tiny_gpt2):
    model = {
        "llama": TINY,
        "hugging_face": HuggingFace(tiny_gpt2),
        "module": Module("users_models.Bigram", {"vocab_size": 40}),
    }[kind]
    first = model.build(40, seed=5)
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    again = model.build(40, seed=5)
    assert torch.equal(torch.rand(3), wanted)
    assert weights(first) == weights(again)
    assert weights(first) != weights(model.build(40, seed=6))
    assert first.training
    assert {p.dtype for p in first.parameters()} == {torch.float32}


def test_an_accelerator_as_default_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda", 0))
    with pytest.raises(ValueError, match="initial weights are drawn on the CPU"):
        TINY.build(13, seed=0)


def test_hugging_face_loads_pretrained_weights_as_fp32_in_training_mode(tiny_gpt2):
    import transformers

    saved = transformers.GPT2LMHeadModel.from_pretrained(tiny_gpt2, dtype=torch.float32)
    model = HuggingFace(tiny_gpt2, pretrained=True).build(40, seed=0)
    assert weights(model) == weights(saved)
    assert weights(model) != weights(HuggingFace(tiny_gpt2).build(40, seed=0))
    assert all(module.training for module in model.modules())
    assert model(torch.zeros(2, 5, dtype=torch.int64)).logits.shape == (2, 5, 40)


def test_hugging_face_has_shapes_alone_on_the_meta_device(tiny_gpt2):
    model = HuggingFace(tiny_gpt2, pretrained=True)
    with torch.device("meta"):
        shapes = model.build(40, seed=0)
    assert {x.device.type for x in shapes.parameters()} == {"meta"}
    assert [x.shape for x in shapes.parameters()] == [x.shape for x in model.build(40, seed=0).parameters()]


def test_hugging_face_mistakes_are_told(tiny_gpt2, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="vocabulary of 40 tokens and the tokenizer needs 41"):
        HuggingFace(tiny_gpt2).build(41, seed=0)
    with pytest.raises(ValueError, match="name is empty"):
        HuggingFace("")
    (tmp_path / "weightless").mkdir()
    shutil.copy(f"{tiny_gpt2}/config.json", tmp_path / "weightless")
    for model in (HuggingFace("/no/such/model"), HuggingFace(str(tmp_path / "weightless"), pretrained=True)):
        with pytest.raises(ValueError, match=r"cannot be read: .* check name, revision and the network"):
            model.build(40, seed=0)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'lowcomm\[hf\]'"):
        HuggingFace(tiny_gpt2).build(40, seed=0)


def test_module_gets_its_arguments_and_is_in_training_mode():
    model = Module("users_models.Bigram", {"vocab_size": 50, "width": 6}).build(40, seed=0)
    assert model.head.weight.shape == (50, 6)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("path", "args", "message"),
    [
        ("Bigram", {}, "must look like 'package.module.Class'"),
        ("users_models.Bi gram", {}, "must look like 'package.module.Class'"),
        ("users_models.Trigram", {}, "names nothing that can be imported"),
        ("no_such_package.Model", {}, "names nothing that can be imported"),
        ("users_models.weights", {}, r"must be a subclass of torch\.nn\.Module"),
        ("users_models.Bigram", {}, "does not take the args {}: missing a required argument: 'vocab_size'"),
        ("users_models.Bigram", {"vocab_size": 40, "with": 4}, "got an unexpected keyword argument 'with'"),
        ("users_models.Bigram", {"vocab_size": 39}, "does not accept token id 39 .* a vocabulary of 40"),
        ("users_models.Flat", {"vocab_size": 40}, r"maps tokens \[1, 2\] to \[2, 40\]"),
    ],
)
def test_module_mistakes_are_told(path, args, message):
    with pytest.raises(ValueError, match=message):
        Module(path, args).build(40, seed=0)
