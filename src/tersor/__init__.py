"""Terse tensors: make any transformer-family model small and fast, see what was lost, run it.

The names below are the whole everyday surface; they load on first use, so `import tersor` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tersor import models as models
    from tersor.checkpoint.gguf_write import export as export
    from tersor.checkpoint.load import load as load
    from tersor.compress import GPTQ as GPTQ
    from tersor.compress import RTN as RTN
    from tersor.compress import compress as compress
    from tersor.errors import TersorError as TersorError
    from tersor.evaluate.accuracy import accuracy as accuracy
    from tersor.evaluate.divergence import divergence as divergence
    from tersor.evaluate.perplexity import perplexity as perplexity
    from tersor.tasks.forecast_table import forecast as forecast

from tersor.version import __version__

_HOME = {
    "GPTQ": "tersor.compress",
    "RTN": "tersor.compress",
    "TersorError": "tersor.errors",
    "accuracy": "tersor.evaluate.accuracy",
    "divergence": "tersor.evaluate.divergence",
    "export": "tersor.checkpoint.gguf_write",
    "forecast": "tersor.tasks.forecast_table",
    "load": "tersor.checkpoint.load",
    "perplexity": "tersor.evaluate.perplexity",
}
_MODULES = ("compress", "models")  # `tersor.compress` is a module that can be called: see tersor/compress/__init__.py

__all__ = [
    "GPTQ",
    "RTN",
    "TersorError",
    "__version__",
    "accuracy",
    "compress",
    "divergence",
    "export",
    "forecast",
    "load",
    "models",
    "perplexity",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"tersor.{name}")
    raise AttributeError(f"module 'tersor' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
