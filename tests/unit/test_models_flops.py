"""Counted operations against the closed form, and the peaks of known devices."""

import pytest
import torch
from torch import nn

from lowcomm.models.flops import flops_per_token, peak_flops
from lowcomm.models.hugging_face import HuggingFace
from lowcomm.models.llama import Llama


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seq_len", [1, 32])
def test_llama_has_the_operations_of_the_palm_formula(num_kv_heads, tied, seq_len):
    model = Llama("500k", 3, 16, 4, num_kv_heads, 24, tie_embeddings=tied).build(50, seed=0)
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2) + 50 * 16
    assert flops_per_token(model, seq_len) == 6 * matrices + 12 * 3 * 16 * seq_len


def test_a_hugging_face_model_is_counted_alike(tmp_path):
    import transformers

    transformers.GPT2Config(vocab_size=40, n_positions=32, n_embd=8, n_layer=2, n_head=2).save_pretrained(tmp_path)
    model = HuggingFace(str(tmp_path)).build(40, seed=0)
    per_layer = 12 * 8 * 8
    assert flops_per_token(model, 32) == 6 * (2 * per_layer + 40 * 8) + 12 * 2 * 8 * 32


def test_counting_changes_nothing():
    model = nn.Sequential(Llama("500k", 1, 16, 4, 4, 24).build(50, seed=0), nn.Dropout(0.5))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state = torch.get_rng_state()
    flops_per_token(model, 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[name]) and not x.is_meta for name, x in model.state_dict().items())


def test_a_forward_that_looks_at_values_cannot_be_counted():
    class Peeks(nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens if tokens.sum() > 0 else -tokens

    assert flops_per_token(Peeks(), 4) is None
    with pytest.raises(ValueError, match="seq_len is 0"):
        flops_per_token(Peeks(), 0)


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA L4", 121e12),
        ("Tesla V100-SXM2-16GB", None),
        ("cpu", None),
    ],
)
def test_peaks(name, flops):
    assert peak_flops(name) == flops
