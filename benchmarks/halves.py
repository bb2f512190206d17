"""A text in two halves, document by document in turn: one to choose by, one to report.

    python -m benchmarks.halves english_val.txt.xz english_choose.txt.xz english_report.txt.xz

Then: `benchmarks.convergence --choose_on english_choose.txt.xz --validation english_report.txt.xz`.
"""

from __future__ import annotations

import argparse
import lzma
from pathlib import Path


def halves(path: Path, separator: str, first: Path, second: Path) -> None:
    """Write the documents of even and of odd place in a .txt.xz.

    Raises:
        ValueError: when there is but one document.
    """
    with lzma.open(path, "rt", encoding="utf-8", newline="") as file:
        documents = [document for document in file.read().split(separator) if document]
    if len(documents) < 2:
        raise ValueError(f"{path} has {len(documents)} documents between {separator!r}; halves need at least 2")
    for out, part in ((first, documents[::2]), (second, documents[1::2])):
        with lzma.open(out, "wt", encoding="utf-8", newline="") as file:
            file.write(separator.join(part))


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("text", "first", "second"):
        flags.add_argument(name, type=Path)
    flags.add_argument("--separator", default="\0")
    given = flags.parse_args()
    halves(given.text, given.separator, given.first, given.second)
