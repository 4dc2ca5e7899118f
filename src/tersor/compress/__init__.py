"""Compression methods, and `compress`, which applies one to a model.

This module can be called: `tersor.compress(model, GPTQ(bits=4))` is `tersor.compress.compress(...)`. The folder and the verb
have one name, and Python lets a package attribute be only one of the two.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from tersor.compress.job import compress
from tersor.compress.recipe import Recipe
from tersor.compress.result import Compressed
from tersor.methods.method import Method, from_options, methods
from tersor.methods.weights.gptq import GPTQ
from tersor.methods.weights.rtn import RTN

__all__ = ["GPTQ", "RTN", "Compressed", "Method", "Recipe", "compress", "from_options", "methods"]


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Compressed:
        return compress(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
