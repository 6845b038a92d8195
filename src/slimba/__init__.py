"""Slimba: small state-space language models. `load` runs one, `compress` makes one, `evaluate` measures one.

    import slimba
    model = slimba.load("demo-teacher")
    print(model.generate("Once upon a time", max_new_tokens=50).text)

Names are imported on first use, so `import slimba` is instant and needs no torch; only `compress` does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimba.errors import UserError as UserError
    from slimba.evaluation.perplexity import evaluate as evaluate
    from slimba.methods.run import compress as compress
    from slimba.models.spec import ModelSpec as ModelSpec
    from slimba.runtime.load import load as load

__version__ = "0.1.0"

__all__ = ["ModelSpec", "UserError", "__version__", "compress", "evaluate", "load"]

_HOME = {
    "ModelSpec": "slimba.models.spec",
    "UserError": "slimba.errors",
    "compress": "slimba.methods.run",
    "evaluate": "slimba.evaluation.perplexity",
    "load": "slimba.runtime.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'slimba' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
