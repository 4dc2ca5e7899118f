"""Golden cases: numbers that a system's published implementation computed, and how to run ours against them.

A case is NAME.json (config, weights, inputs, outputs by name and shape) beside NAME.npz (the expected values). Weights
are not stored: each is filled from its key by a fixed rule, so a case of any size is a few kilobytes. Of an output with
more than 4096 elements every step-th is kept.

A folder tests/golden/SYSTEM/ may hold a runner.py that says how its cases are run:

    TOLERANCE = {"loss": 1e-6}                      # optional: output -> largest error; 5e-6 where not named
    def run(case: Case) -> dict[str, Tensor]: ...   # every output of the case, by name

Without one, `run_model(case, SYSTEM)` is it. An output that a runner compared with `case.check(name, ...)` need not be
returned; to have read it (`case.expected(name)`) is not enough. A JSON of another form than the above (cases about
files, say) is all `config`; its npz is in `case.arrays`, and its runner asserts everything itself.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tersor.models

TOLERANCE = 5e-6


class Case:
    """One reference case. `config` holds the published implementation's own constructor arguments."""

    def __init__(self, path: Path) -> None:
        described = json.loads(path.read_text())
        self.name: str = path.stem
        self.config: dict[str, Any] = described["config"] if "outputs" in described else described
        self.parameters: int = described.get("parameters", 0)
        self.notes: str = described.get("notes", "")
        self._outputs: dict[str, Any] = described.get("outputs", {})
        self._weights: list[dict[str, Any]] = described.get("weights", [])
        self._inputs: dict[str, Any] = described.get("input_specs", {})
        self.outputs: list[str] = list(self._outputs)
        self.compared: set[str] = set()
        with np.load(path.with_suffix(".npz")) as arrays:
            self.arrays: dict[str, np.ndarray] = dict(arrays)

    def state_dict(self) -> dict[str, Tensor]:
        """The checkpoint, in the published key names. Integer buffers are not part of it."""
        return {weight["key"]: self._weight(**weight) for weight in self._weights}

    def inputs(self) -> dict[str, Tensor]:
        return {name: torch.from_numpy(self._input(name, **spec)) for name, spec in self._inputs.items()}

    def expected(self, name: str) -> np.ndarray:
        """The values kept of an output."""
        return self.arrays[f"output/{name}"]

    def error(self, name: str, got: Tensor | np.ndarray, size: float | None = None) -> float:
        """Largest difference over `size` (None: the largest expected value); infinite where the shape differs or a NaN came."""
        array = got.detach().cpu().numpy() if isinstance(got, Tensor) else np.asarray(got)
        want = self.expected(name)
        if list(array.shape) != self._outputs[name]["shape"]:
            return math.inf
        kept = array.reshape(-1)[:: self._outputs[name]["step"]].astype(np.float64)
        error = float(np.abs(kept - want).max() / (size or max(np.abs(want).max(), 1e-12)))
        return math.inf if math.isnan(error) else error

    def check(
        self, name: str, got: Tensor | np.ndarray, tolerance: float = TOLERANCE, *, size: float | None = None
    ) -> None:
        self.compared.add(name)
        error = self.error(name, got, size)
        assert error <= tolerance, (
            f"{self.name}: {name} is off by {error:.2g} of {'its largest value' if size is None else size}, "
            f"allowed is {tolerance:.2g} "
            f"(shape {list(got.shape)}, expected {self._outputs[name]['shape']})"
        )

    def _weight(self, key: str, shape: list[int], rule: str | dict[str, Any] | None = None) -> Tensor:
        if rule == "stored":
            return torch.from_numpy(self.arrays[f"state/{key}"])
        filling = _filling(key, shape) if rule is None else rule
        assert isinstance(filling, dict)
        values = _random(key).standard_normal(tuple(shape))
        if filling.get("abs"):
            values = np.abs(values)
        values = filling.get("mean", 0.0) + filling.get("std", 0.0) * values
        if filling.get("exp"):
            values = np.exp(values)
        return torch.from_numpy(np.asarray(values, np.float32))

    def _input(self, name: str, shape: Sequence[int] = (), kind: str = "normal", **how: Any) -> np.ndarray:
        random = _random(f"input:{name}")
        if kind == "stored":
            return self.arrays[f"input/{name}"]
        if kind == "normal":
            values = random.standard_normal(tuple(shape))
            return np.asarray(how.get("mean", 0.0) + how.get("std", 1.0) * values, np.float32)
        if kind == "uniform":
            low, high = how.get("low", 0.0), how.get("high", 1.0)
            return np.asarray(low + (high - low) * random.random_sample(tuple(shape)), np.float32)
        if kind == "int":
            return random.randint(how.get("low", 0), how["high"], tuple(shape)).astype(np.int64)
        if kind == "value":
            return np.full(shape, how["value"], how.get("dtype", "float32"))
        if kind == "arange":
            return np.arange(math.prod(shape), dtype=how.get("dtype", "float32")).reshape(shape)
        raise ValueError(f"input {name!r} is of the unknown kind {kind!r}")


def run_model(
    case: Case,
    system: str,
    *,
    config: dict[str, Any] | None = None,
    inputs: dict[str, Tensor] | None = None,
    outputs: dict[str, str] | None = None,
) -> dict[str, Tensor]:
    """Load the case's weights through `tersor.models.load`, call the model once in eval mode, collect its outputs.

    config: the case's, in our field names, where they differ. inputs: forward's keyword arguments, if not the case's.
    outputs: output name -> path of the submodule whose result it is; "" is the model itself, and also the default.
    A tuple result counts by its first element.
    """
    model = tersor.models.load(system, case.state_dict(), **(case.config if config is None else config))
    check_parameters(case, model)
    where = {name: (outputs or {}).get(name, "") for name in case.outputs}
    results = capture(model, sorted(set(where.values())), case.inputs() if inputs is None else inputs)
    return {name: results[path] for name, path in where.items()}


@torch.no_grad()
def capture(model: nn.Module, paths: list[str], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the submodules at `paths` return while the model runs once. A submodule called twice: its last result."""
    results: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, result: Any) -> None:
            results[path] = (result[0] if isinstance(result, tuple) else result).clone()

        return hook

    hooks = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return results


def check_parameters(case: Case, model: nn.Module) -> None:
    count = sum(p.numel() for p in model.parameters())
    assert count == case.parameters, f"{case.name}: {count:,} parameters, the published model has {case.parameters:,}"


def _random(name: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(name.encode()))


def _filling(key: str, shape: list[int]) -> dict[str, Any]:
    """The rule for a weight of which the case says nothing else."""
    last = key.rpartition(".")[2]
    if last == "running_mean":
        return {"mean": 0.0, "std": 0.1}
    if last == "running_var":
        return {"mean": 1.0, "std": 0.1, "abs": True}
    if len(shape) >= 2:
        return {"std": math.prod(shape[1:]) ** -0.5}
    return {"std": 0.05} if "bias" in last else {"mean": 1.0, "std": 0.1}
