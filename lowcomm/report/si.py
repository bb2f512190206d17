"""Numbers with decimal prefixes."""

from __future__ import annotations


def si(value: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: 1234567 bytes are "1.23 MB"."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * factor:
            return f"{value / factor:#.3g}".rstrip(".") + f" {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()
