"""`tersor quantize` for torchrun on a tiny model, with samples of its own kind, and with an accident on one process.

usage: shared_quantize.py TYPE SAMPLES ACCIDENT ARGUMENTS...
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch
from zoo.tiny_models import samples

import tersor.compress.samples as drawing
import tersor.methods.block as block
from tersor.cli.main import main

SECOND_BLOCK = 2


def happen(accident: str) -> None:
    """Let the process of rank 1 end or stand still in the second block."""
    original, seen = block.call_order, []

    def call_order(linears: Any, calls: Any) -> Any:
        if all(name.startswith("model.") for name in linears):  # not those that a forecast solves for practice
            seen.append(1)
        if len(seen) == SECOND_BLOCK and os.environ.get("RANK") == "1":
            if accident == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            print("standing still", flush=True)
            time.sleep(600)
        return original(linears, calls)

    block.call_order = call_order


if __name__ == "__main__":
    kind, count, accident, *arguments = sys.argv[1:]
    batches = samples(kind, int(count))
    if accident == "nan":
        batches[1] = {name: torch.full_like(value, float("nan")) for name, value in batches[1].items()}
    elif accident != "none":
        happen(accident)
    drawing.make_batches = lambda *args, **kwargs: batches
    main(["quantize", *arguments])
