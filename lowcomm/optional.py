"""Optional libraries, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, install: str = "lowcomm[hf]") -> ModuleType:
    """The imported ``module``.

    Raises:
        ValueError: when it is not installed; names what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{module} is needed here and cannot be imported ({error}); install it with pip install '{install}'"
        ) from error
