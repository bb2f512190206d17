"""A model whose first weights depend on who builds it, which no replica may have."""

import os

import torch
from torch import Tensor, nn


class Drifting(nn.Module):
    """One table of logits, filled with the rank's number."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.full((256, 256), float(os.environ["RANK"])), freeze=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens)
