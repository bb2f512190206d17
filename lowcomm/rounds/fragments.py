"""Cuts the parameters of a model into fragments that are synced separately (Streaming DiLoCo, arXiv:2501.18512, section
2.2), and schedules them.

The first number in a parameter's dotted name is its block: "layers.3.attention.weight" is in block 3. With L blocks,
`num` per fragment and P = ceil(L / num) fragments, fragment p holds

    strided:     blocks p, p + P, p + 2 P ...
    sequential:  blocks p num to (p + 1) num - 1

Parameters without a number, such as embeddings, head and final norm, form one more fragment, the last.

Differs from the paper in: nothing that it states; the embeddings' own fragment is only in a figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Pattern = Literal["strided", "sequential"]


def cut(names: Sequence[str], blocks_per_fragment: int | None, pattern: Pattern) -> list[list[int]]:
    """The parameter indices (in ``names``) of each fragment, ascending; each parameter is in one fragment.

    ``blocks_per_fragment`` None, or a model without blocks, gives one fragment.
    """
    blocks: dict[int, list[int]] = {}
    others: list[int] = []
    for i, name in enumerate(names):
        block = next((int(part) for part in name.split(".") if part.isdecimal()), None)
        (others if block is None else blocks.setdefault(block, [])).append(i)
    if blocks_per_fragment is None or not blocks:
        return [list(range(len(names)))]
    num_fragments = -(-len(blocks) // blocks_per_fragment)
    fragments: list[list[int]] = [[] for _ in range(num_fragments)]
    for k, block in enumerate(sorted(blocks)):
        fragments[k % num_fragments if pattern == "strided" else k // blocks_per_fragment].extend(blocks[block])
    return [sorted(fragment) for fragment in [*fragments, others] if fragment]


def offsets(num_fragments: int, every: int) -> list[int]:
    """The step within a round at which each fragment is sent, evenly spaced from 0."""
    return [p * every // num_fragments for p in range(num_fragments)]
