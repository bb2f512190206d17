"""Arithmetic per token and per second: what model-FLOPs utilisation is made of (PaLM, arXiv:2204.02311, appendix B)."""

from __future__ import annotations

import re

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def flops_per_token(model: nn.Module, seq_len: int) -> float | None:
    """Floating-point operations per trained token, in PaLM's convention; None where they cannot be counted.

    For a transformer this is 6 x the matrix parameters (the head counts, the embedding's look-up does not) plus
    12 x num_layers x dim x seq_len: attention counts the full square, although a causal kernel may skip half of it.
    It is measured: the matrix products of one forward of ``seq_len`` tokens on fake tensors, which have shapes and no
    values, times three for forward and backward. So it holds for any architecture. Recomputed activations do not count,
    and frozen parameters count as if they were trained. A forward whose work depends on values, such as a mixture of
    experts, cannot be counted.

    Raises:
        ValueError: when ``seq_len`` is below 1.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}; it must be at least 1")
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
    # The counter knows matrix products on every device, fused attention only on some.
    plain_attention = sdpa_kernel(SDPBackend.MATH)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with torch.no_grad(), plain_attention, fake, FlopCounterMode(display=False) as counter:
            tokens = torch.zeros(1, seq_len, dtype=torch.int64, device=device)
            functional_call(model, {name: fake.from_tensor(x) for name, x in tensors.items()}, (tokens,))
    except RuntimeError:  # what torch raises where a fake tensor is asked for its value, or has no kernel
        return None
    return 3.0 * int(counter.get_total_flops()) / seq_len


# Vendors' data sheets: dense bf16 with fp32 accumulation, in FLOP/s. All words stand in the name; first match wins.
_PEAK_FLOPS: list[tuple[tuple[str, ...], float]] = [
    (("B200",), 2250e12),
    (("GH200",), 989.4e12),
    (("H200", "NVL"), 835e12),
    (("H200",), 989.4e12),
    (("H100", "PCIe"), 756e12),
    (("H100", "NVL"), 835e12),
    (("H100",), 989.4e12),
    (("A100",), 312e12),
    (("L40S",), 362e12),
    (("L40",), 181e12),
    (("L4",), 121e12),
    (("A40",), 149.7e12),
    (("A30",), 165e12),
    (("A10",), 125e12),
    (("RTX", "A6000"), 154.8e12),
    (("RTX", "4090"), 165.2e12),
    (("RTX", "3090"), 71e12),
]


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of dense bf16 matrix products at best, by ``torch.cuda.get_device_name()``; None for unknown devices."""
    words = set(re.split(r"[\s\-]+", device_name))
    return next((flops for needed, flops in _PEAK_FLOPS if words.issuperset(needed)), None)
