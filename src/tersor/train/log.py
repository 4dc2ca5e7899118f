"""What a training run writes down: one CSV row a step or validation, the same to TensorBoard where it is asked for."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from tersor.errors import TersorError
from tersor.files import replacing

LOG_FILE = "log.csv"
COLUMNS = ("step", "epoch", "lr", "loss", "grad_norm", "validation", "seconds")


class RunLog:
    """`log.csv` in a run's folder, and with `tensorboard` the same in `tensorboard/`. Broken rows are removed, and those of a
    killed run after `step`."""

    def __init__(self, folder: Path, *, step: int, tensorboard: bool = False) -> None:
        self._board = writer_class()(str(folder / "tensorboard"), purge_step=step + 1) if tensorboard else None
        path = folder / LOG_FILE
        kept: list[dict[str, Any]] = []
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            before = [
                dict(zip(COLUMNS, line.split(","), strict=False))
                for line in lines
                if line.count(",") + 1 == len(COLUMNS)
            ]
            kept = [row for row in before if row["step"].isdecimal() and int(row["step"]) <= step]
        with replacing(path) as partial, partial.open("w", newline="") as file:
            rows = csv.DictWriter(file, COLUMNS)
            rows.writeheader()
            rows.writerows(kept)
            file.flush()
        self._file = path.open("a", newline="")
        self._rows = csv.DictWriter(self._file, COLUMNS, restval="")

    def write(self, step: int, **values: float) -> None:
        self._rows.writerow({"step": step, **{name: f"{value:.7g}" for name, value in values.items()}})
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def writer_class() -> Any:
    """torch's SummaryWriter. Raises TersorError where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TersorError(
            f"tensorboard needs a package that is not installed ({error}): pip install 'tersor[tensorboard]'"
        ) from None
    return SummaryWriter
