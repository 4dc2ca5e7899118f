"""How far inputs deviate from the original's, summed over processes, also where one of them saw nothing of a layer."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tersor.calibrate.hessian import Hessian
from tersor.calibrate.parallel import combine

EXACT, X = torch.arange(12.0).view(3, 4), torch.arange(12.0).view(3, 4).flip(0)


def gathered(samples: int) -> Hessian:
    found = Hessian(4)
    for _ in range(samples):
        found.add(X, 1)
        found.compare(EXACT, X)
    return found


def in_process(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    own = {"both": gathered(1 + rank), "first only": gathered(1 - rank), "plain": Hessian(4)}
    own["plain"].add(X, 1)
    found = combine(own, torch.device("cpu"))
    torch.save({name: each.mean_deviation for name, each in found.items()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_the_deviation_of_two_processes_is_that_of_one(tmp_path: Path) -> None:
    mp.spawn(in_process, (tmp_path,), nprocs=2)  # type: ignore[no-untyped-call]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(found["both"], gathered(3).mean_deviation)
        assert torch.equal(found["first only"], gathered(1).mean_deviation)
        assert found["plain"] is None
