"""How the parameters of a model are cut into fragments that are synced on their own (Streaming DiLoCo,
arXiv:2501.18512, section 2.2), and when each has its turn.

A block is what the first number in a parameter's dotted name says: "layers.3.attention.weight" is of block 3. With L
blocks, `num` of them in a fragment and P = ceil(L / num) fragments of blocks, fragment p holds

    strided:     blocks p, p + P, p + 2 P ...
    sequential:  blocks p num to (p + 1) num - 1

and parameters without a number, such as embeddings, head and final norm, are one more fragment, the last.

Differs from the paper in: nothing that it states; it shows the embeddings as a fragment of their own in a figure only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Pattern = Literal["strided", "sequential"]


def cut(names: Sequence[str], blocks_per_fragment: int | None, pattern: Pattern) -> list[list[int]]:
    """The numbers (places in ``names``) of each fragment's parameters, ascending; each number stands in one fragment.

    ``blocks_per_fragment`` None makes one fragment of all, as does a model without blocks.
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
    """The step within a round at which each fragment has its turn, evenly spread: the first at 0."""
    return [p * every // num_fragments for p in range(num_fragments)]
