"""A compact Llama: RMSNorm, rotary positions, SwiGLU, grouped-query attention (Touvron et al. 2023, arXiv:2307.09288).

Parameter names and layouts are those of transformers' LlamaForCausalLM, so weights go both ways.
Initial weights are normal with standard deviation 0.02; projections back into the residual stream have
0.02 / sqrt(2 num_layers), as in GPT-2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowcomm.models.base import ModelConfig, check_vocabulary


class Shape(NamedTuple):
    """The dimensions of a Llama; each head has ``dim / num_heads`` channels."""

    num_layers: int
    dim: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int


# The name is the number of parameters with an untied head and a vocabulary of 256 (bytes) up to 30m, of 32,000 above.
# 60m, 125m, 350m are GaLore's Llamas (arXiv:2403.03507, table 5) and 7b is Llama 2's.
SIZES = {
    "500k": Shape(4, 96, 3, 3, 256),
    "1m": Shape(5, 128, 4, 4, 320),
    "3m": Shape(6, 192, 6, 6, 576),
    "10m": Shape(8, 320, 5, 5, 832),
    "30m": Shape(9, 512, 8, 8, 1408),
    "60m": Shape(8, 512, 8, 8, 1376),
    "125m": Shape(12, 768, 12, 12, 2048),
    "350m": Shape(24, 1024, 16, 16, 2736),
    "1b": Shape(20, 2048, 32, 4, 5632),
    "3b": Shape(28, 3072, 24, 8, 8192),
    "7b": Shape(32, 4096, 32, 32, 11008),
}


@dataclass(frozen=True)
class Llama(ModelConfig):
    """A Llama by size, every dimension of which can be overridden.

    Attributes:
        size: a name in `SIZES`, from "500k" to "7b".
        num_layers, dim, num_heads, num_kv_heads, ffn_dim: None takes the size's.
        vocab_size: room for token ids; None takes as many as the tokenizer needs.
        rope_theta: the base of the rotary frequencies.
        tie_embeddings: the head shares the embedding's weight.
        norm_eps: added to the mean square in RMSNorm.
    """

    size: str = "1m"
    num_layers: int | None = None
    dim: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    ffn_dim: int | None = None
    vocab_size: int | None = None
    rope_theta: float = 10_000.0
    tie_embeddings: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size is {self.size!r}; choose one of {', '.join(SIZES)}")
        for name, value in [*self.shape._asdict().items(), ("vocab_size", self.vocab_size)]:
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for name, number in [("rope_theta", self.rope_theta), ("norm_eps", self.norm_eps)]:
            if number <= 0:
                raise ValueError(f"{name} is {number}; it must be above 0")
        _, dim, num_heads, num_kv_heads, _ = self.shape
        if dim % (2 * num_heads):
            raise ValueError(
                f"dim {dim} over num_heads {num_heads} is {dim / num_heads:g} channels a head; rotary positions need "
                "an even whole number: change dim or num_heads"
            )
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads {num_heads} is not a multiple of num_kv_heads {num_kv_heads}; each key-value head serves "
                "equally many heads: change one of them"
            )

    @property
    def shape(self) -> Shape:
        """The size's dimensions with the overrides put in."""
        overrides = {name: getattr(self, name) for name in Shape._fields if getattr(self, name) is not None}
        return SIZES[self.size]._replace(**overrides)

    def construct(self, vocab_size: int) -> nn.Module:
        num_embeddings = vocab_size if self.vocab_size is None else self.vocab_size
        check_vocabulary(f"Llama(size={self.size!r}, vocab_size={self.vocab_size})", num_embeddings, vocab_size)
        return LlamaModel(self.shape, num_embeddings, self.rope_theta, self.tie_embeddings, self.norm_eps)


class LlamaModel(nn.Module):
    """Tokens ``[batch, seq]`` to logits ``[batch, seq, vocab]``."""

    def __init__(self, shape: Shape, vocab_size: int, rope_theta: float, tie_embeddings: bool, norm_eps: float) -> None:
        super().__init__()
        self.model = Decoder(shape, vocab_size, rope_theta, norm_eps)
        self.lm_head = nn.Linear(shape.dim, vocab_size, bias=False)
        if tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * shape.num_layers) if into_residual else 1.0))

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.model(tokens))
        return logits


class Decoder(nn.Module):
    """Tokens ``[batch, seq]`` to normalised features ``[batch, seq, dim]``."""

    def __init__(self, shape: Shape, vocab_size: int, rope_theta: float, norm_eps: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, shape.dim)
        self.rotary = Rotary(shape.dim // shape.num_heads, rope_theta)
        self.layers = nn.ModuleList(Layer(shape, norm_eps) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.dim, norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        cos, sin = self.rotary(tokens.shape[1])
        for layer in self.layers:
            x = layer(x, cos, sin)
        features: Tensor = self.norm(x)
        return features


class Layer(nn.Module):
    """One block on ``[batch, seq, dim]``: attention, then the feed-forward, each normalised before and added after."""

    def __init__(self, shape: Shape, norm_eps: float) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.dim, norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.dim, norm_eps)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Attention(nn.Module):
    """Causal self-attention in which groups of heads share keys and values (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.dim // shape.num_heads
        self.grouped = shape.num_kv_heads != shape.num_heads
        self.q_proj = nn.Linear(shape.dim, shape.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.dim, shape.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.dim, shape.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.num_heads * self.head_dim, shape.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # [batch, seq, heads * head_dim] -> [batch, heads, seq, head_dim]
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # Grouped only where needed: fewer fused kernels know enable_gqa.
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate x) * up x)`` (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.dim, shape.ffn_dim, bias=False)
        self.up_proj = nn.Linear(shape.dim, shape.ffn_dim, bias=False)
        self.down_proj = nn.Linear(shape.ffn_dim, shape.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Rotary(nn.Module):
    """The tables of rotary positions (Su et al. 2021, arXiv:2104.09864), in fp32 whatever the model's dtype."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta
        self.inverse_frequency: Tensor
        self.register_buffer("inverse_frequency", self._inverse_frequency(), persistent=False)

    def _inverse_frequency(self) -> Tensor:
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        return 1.0 / self.theta**exponent

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Moves follow the model, casts do not: bf16 frequencies would turn late positions by whole radians.
        # Computed anew rather than copied because a meta tensor has nothing to copy.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.inverse_frequency = self._inverse_frequency().to(self.inverse_frequency.device)
        return self

    def forward(self, seq: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[seq, head_dim]`` of the angles of positions 0 to seq - 1."""
        position = torch.arange(seq, device=self.inverse_frequency.device, dtype=torch.float32)
        angle = torch.outer(position, self.inverse_frequency).repeat(1, 2)
        return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (i, i + head_dim / 2) of ``x [..., seq, head_dim]`` by their angle, computed in fp32."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).type_as(x)
