"""The Llama against transformers' with the same weights, its sizes, dtypes, devices and compilation."""

import pytest
import torch

from lowcomm.models.llama import SIZES, Llama, Rotary
from tests.refusals import refused

TINY = Llama("500k", num_layers=2, dim=16, num_heads=4, num_kv_heads=4, ffn_dim=24)
TOKENS = torch.arange(22).reshape(2, 11) * 7 % 13


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_same_weights_give_the_logits_of_transformers(num_kv_heads, tied):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        rope_theta=500.0,
        rms_norm_eps=1e-3,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():  # far from the initial values: gains other than 1, sharp attention
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.3 + (p.ndim == 1))
    shape = Llama("500k", 2, 16, 4, num_kv_heads, 24, rope_theta=500.0, tie_embeddings=tied, norm_eps=1e-3)
    ours = shape.build(13, seed=0)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)
    theirs.load_state_dict(ours.state_dict())
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("size", SIZES)
def test_a_size_has_the_parameters_that_its_name_says(size):
    wanted = float(size[:-1]) * {"k": 1e3, "m": 1e6, "b": 1e9}[size[-1]]
    with torch.device("meta"):
        model = Llama(size).build(vocab_size=256 if wanted <= 30e6 else 32_000, seed=0)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(wanted, rel=0.1)


def test_weights_begin_small_and_smaller_on_the_way_back_into_the_residual_stream():
    model = Llama("500k", num_layers=8, tie_embeddings=True).build(256, seed=0)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert torch.equal(p, torch.ones_like(p)), name
        else:
            wanted = 0.02 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert p.std().item() == pytest.approx(wanted, rel=0.05), name
            assert abs(p.mean().item()) < 0.1 * wanted, name


def test_no_token_sees_the_future():
    model = TINY.build(13, seed=0)
    changed = TOKENS.clone()
    changed[:, 6:] = 12 - changed[:, 6:]
    before, after = model(TOKENS), model(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


def test_pure_bf16_keeps_its_positions_in_fp32():
    model = TINY.build(13, seed=0)
    wanted = model(TOKENS)
    table = model.model.rotary.inverse_frequency.clone()
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary.inverse_frequency.dtype == torch.float32
    assert torch.equal(model.model.rotary.inverse_frequency, table)
    logits = model(TOKENS)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), wanted, rtol=0.1, atol=0.01)


def test_positions_survive_the_way_through_the_meta_device():
    rotary = Rotary(8, 10_000.0)
    with torch.device("meta"):
        empty = Rotary(8, 10_000.0)
    assert torch.equal(empty.to_empty(device="cpu").inverse_frequency, rotary.inverse_frequency)
    assert "rotary" not in "".join(TINY.build(13, seed=0).state_dict())


def test_compiles_as_one_graph():
    model = Llama("500k", 2, 16, 4, 2, 24).build(13, seed=0)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(TOKENS), model(TOKENS))
    compiled(TOKENS).sum().backward()


test_mistakes_are_told = refused(
    (lambda: Llama("2m"), "size is '2m'; choose one of 500k"),
    (lambda: Llama("1m", num_layers=0), "num_layers is 0"),
    (lambda: Llama("1m", vocab_size=0), "vocab_size is 0"),
    (lambda: Llama("1m", norm_eps=0.0), "norm_eps is 0.0"),
    (lambda: Llama("1m", dim=100, num_heads=8), "dim 100 over num_heads 8"),
    (lambda: Llama("1m", num_kv_heads=3), "num_heads 4 is not a multiple of num_kv_heads 3"),
    (
        lambda: Llama("1m", vocab_size=100).build(256, seed=0),
        "vocabulary of 100 tokens and the tokenizer needs 256",
    ),
)
