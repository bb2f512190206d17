"""Models build the same weights whatever ran before; Hugging Face's and the user's own models."""

import json
import shutil
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from lowcomm.cli import main
from lowcomm.engine.torch_engine import next_token_loss
from lowcomm.models.hugging_face import HuggingFace
from lowcomm.models.length import check_length
from lowcomm.models.llama import Llama
from lowcomm.models.module import Module
from lowcomm.tensors import digest
from tests.multiprocess.launch import write_tiny

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


class Short(Bigram):
    """A user's model that says itself what it takes."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        assert tokens.shape[1] <= 7, "no more than 7"
        return super().forward(tokens)


@dataclass
class Output:
    """What a user's model may return."""

    logits: torch.Tensor


class Returns(Bigram):
    """A user's model that returns its logits in one of many forms."""

    def __init__(self, form: str) -> None:
        super().__init__(40)
        self.form = form

    def forward(self, tokens: torch.Tensor) -> Any:
        logits, loss = super().forward(tokens), torch.zeros(())
        return {
            "tensor": logits,
            "tuple": (logits, None),
            "loss first": (loss, logits),
            "list": [logits],
            "dict": {"loss": loss, "logits": logits},
            "object": Output(logits),
            "no logits": {"loss": loss},
            "nothing": None,
            "number": loss,
            "tokens": logits.argmax(-1, keepdim=True),
            "last": logits[:, -1:],
            "empty": (),
        }[self.form]


class Two(Bigram):
    """A user's model that wants more than tokens."""

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(tokens) * mask


class Fixed(Bigram):
    """A user's model with one length."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens) + torch.zeros(16, 40)


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
    assert not model.config.use_cache, "past tokens are of no use in training"
    assert model(torch.zeros(2, 5, dtype=torch.int64)).logits.shape == (2, 5, 40)


def test_hugging_face_reads_config_and_weights_of_one_revision(tiny_gpt2, monkeypatch):
    import transformers

    asked = []
    for kind in (transformers.AutoConfig, transformers.AutoModelForCausalLM):

        def told(name, revision, kind=kind, inner=kind.from_pretrained, **options):
            asked.append((kind.__name__, revision))
            return inner(name, **options)

        monkeypatch.setattr(kind, "from_pretrained", told)
    HuggingFace(tiny_gpt2, pretrained=True, revision="v2").build(40, seed=0)
    assert asked == [("AutoConfig", "v2"), ("AutoModelForCausalLM", "v2")]


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


SMALL = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("kind", "config", "longest"),
    [
        ("gpt2", {"vocab_size": 40, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}, 16),
        # two rows more, and two of its rows for other ends
        ("opt", {**SMALL, "max_position_embeddings": 16, "ffn_dim": 8, "word_embed_proj_dim": 8}, 16),
        ("roberta", {**SMALL, "max_position_embeddings": 16, "intermediate_size": 8, "is_decoder": True}, 14),
        ("llama", {**SMALL, "max_position_embeddings": 16, "intermediate_size": 8}, None),  # rotary
    ],
)
def test_sequences_longer_than_a_table_of_positions_are_refused(kind, config, longest, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **config}))
    model = HuggingFace(str(tmp_path)).build(40, seed=0)
    model.get_input_embeddings().eval()
    before = [module.training for module in model.modules()]
    if longest is None:
        check_length(model, 100)
    else:
        check_length(model, longest)
        for seq_len in (longest + 1, 100):
            with pytest.raises(ValueError, match=f"seq_len is {seq_len}, but the model takes {longest} tokens at most"):
                check_length(model, seq_len)
    assert [module.training for module in model.modules()] == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_that_fails_at_any_length_is_not_called_too_short():
    check_length(nn.Linear(4, 4), 100)
    with pytest.raises(ValueError, match=r"takes 7 tokens at most \(no more than 7"):
        check_length(Short(40), 100)


def test_a_run_with_sequences_longer_than_its_model_takes_is_refused(capsys, tmp_path):
    from transformers import GPT2Config

    GPT2Config(vocab_size=256, n_positions=31, n_embd=8, n_layer=1, n_head=2).save_pretrained(tmp_path / "model")
    model = json.dumps(
        {"class_path": "lowcomm.models.hugging_face.HuggingFace", "init_args": {"name": str(tmp_path / "model")}}
    )
    config = write_tiny(tmp_path)
    assert main(["train", "--config", str(config), "--model", model, "--out", str(tmp_path / "out")]) == 2
    assert "seq_len is 32, but the model takes 31 tokens at most" in capsys.readouterr().err


def test_module_gets_its_arguments_and_is_in_training_mode():
    model = Module("users_models.Bigram", {"vocab_size": 50, "width": 6}).build(40, seed=0)
    assert model.head.weight.shape == (50, 6)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("form", ["tensor", "tuple", "loss first", "list", "dict", "object"])
@pytest.mark.parametrize("compiles", [False, True])
def test_logits_are_found_in_what_forward_returns(form, compiles):
    model, plain = (Module("users_models.Returns", {"form": x}).build(40, seed=0).eval() for x in (form, "tensor"))
    loss = torch.compile(next_token_loss, backend="eager", fullgraph=True) if compiles else next_token_loss
    batch = torch.arange(12).view(2, 6)
    assert torch.equal(loss(model, batch), next_token_loss(plain, batch))


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
        *(
            ("users_models.Returns", {"form": form}, "forward returns .* there should be floating-point logits")
            for form in ("no logits", "nothing", "number", "tokens", "empty")
        ),
        ("users_models.Returns", {"form": "last"}, r"maps tokens \[1, 2\] to \[1, 1, 40\]"),
        ("users_models.Two", {"vocab_size": 40}, "cannot pass forward .*'mask'.* take tokens"),
        ("users_models.Fixed", {"vocab_size": 40}, "cannot pass forward .* of any length up to seq_len"),
        ("users_models.Flat", {"vocab_size": 40}, r"forward returns torch.float32\[2, 40\] where"),
    ],
)
def test_module_mistakes_are_told(path, args, message):
    with pytest.raises(ValueError, match=message):
        Module(path, args).build(40, seed=0)
