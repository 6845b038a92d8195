"""Triton kernels of the training path; each computes what a plain PyTorch function in `models/` computes.

Nothing here is needed to train: without Triton or a GPU the plain functions run. `mixer.usable` says when these do.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

__all__ = ["optional"]


@functools.cache
def optional(name: str) -> Any:
    """The module `name` of this folder, or None where Triton is missing."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ImportError:
        return None
