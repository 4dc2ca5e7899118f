"""`torchrun --nproc-per-node N -m tersor VERB ...`: one command in several processes; one of them prints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from tersor.errors import TersorError

# The longest that one process may wait for another. A process that ends is noticed at once, by its connection.
PATIENCE = timedelta(hours=2)


@contextmanager
def together(device: str) -> Iterator[str]:
    """A process group while the command runs, if torchrun started it; gives the device of this process.

    Where it fails on several processes, the first to fail says why and the others end without a word.
    """
    if not dist.is_torchelastic_launched():
        yield device
        return
    device = _own_device(device)
    store, rank, processes = next(rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=PATIENCE)
    try:
        yield device
    except BaseException:
        if _is_told(store):
            raise SystemExit(2) from None
        raise
    dist.destroy_process_group()


def _own_device(device: str) -> str:
    """cuda:LOCAL_RANK where GPUs are meant."""
    if device.startswith("cuda:"):
        raise TersorError(f"--device {device} names one GPU for all processes; give cuda, and each takes its own")
    if device == "cpu" or not torch.cuda.is_available():
        return device
    own, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if own >= found:
        raise TersorError(f"there are {found} GPUs here: use torchrun --nproc-per-node {found}, or --device cpu")
    torch.cuda.set_device(own)
    return f"cuda:{own}"


def _is_told(store: Any) -> bool:
    """Whether another process has told the user of the end already."""
    try:
        return bool(store.add("tersor/told", 1) > 1)
    except RuntimeError:  # the store is gone, and with it whoever kept it
        return False
