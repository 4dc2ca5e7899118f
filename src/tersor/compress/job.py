"""`tersor.compress`: apply a method, or a recipe of several, to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tersor.calibrate.activations import PLACES
from tersor.calibrate.batches import Calibration
from tersor.calibrate.routing import parse_routing
from tersor.checkpoint.load import pick_device
from tersor.compress.in_memory import compress_module
from tersor.compress.layout_choice import AUTO, with_fitting_layout
from tersor.compress.recipe import Recipe, Rule, make_rules
from tersor.compress.result import Compressed
from tersor.compress.settings import Settings
from tersor.compress.stream import compress_checkpoint
from tersor.compress.whole_model import compress_whole_checkpoint, compress_whole_module
from tersor.errors import TersorError
from tersor.formats.layouts import layout_named
from tersor.methods.method import Method, ModelMethod, Progress
from tersor.untrusted import check_seed

SAMPLES, TOKENS = 1 << 20, 1 << 30  # at most


def compress(
    model: str | Path | nn.Module,
    method: Method,
    *,
    rules: Sequence[Rule | Mapping[str, Any]] = (),
    calibration: Calibration = None,
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    format: str | None = AUTO,
    out: str | Path | None = None,
    overwrite: bool = False,
    redo: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    head: bool = False,
    embeddings: bool = False,
    target_tp: int = 1,
    experts: str = "as-is",
    activations: str = "device",
    allow_pickle: bool = False,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> Compressed:
    """Compress a model with one method, or with several by rules.

    model: a directory, a hub name or a built-in name, which is read block by block and written to `out` (a temporary directory
        where none is given) as blocks are finished; or a module in memory, of which a compressed copy is made.
    calibration: a text file, "builtin" (also None), "hf:NAME", a list of strings, or an iterable of the model's own inputs.
    format: how the result is stored, which also bounds its precision: "gptq", "gptq_v2" or "compressed-tensors"; "auto" is
        "gptq" where it holds every layer, else "compressed-tensors"; None keeps exact numbers, for a module in memory only.
    rules: what is different for some layers (see `recipe.py`), such as {"match": "*.down_proj", "bits": 8}; the last that
        matches wins.
    include, exclude: patterns of linear layers, such as "*.mlp.*". head: compress the output head too. embeddings: the token
        embedding too, rounded to nearest with the method's options, as it has no inputs; in format compressed-tensors.
    redo: patterns of layers whose blocks are solved again although an earlier run of the same job finished them.
    target_tp: check that every layer can be split over so many devices for tensor-parallel serving.
    experts: which experts of a mixture the samples visit while statistics are gathered: "as-is" (those that the router
        chooses), "top-k:N" (the N best), or "all" (every token counts for every expert, by the router's weight).
    activations: where samples wait between blocks: "device", "cpu" or "disk".
    allow_pickle: read pickled weights (.bin), which are opened without running any code in them, but by Python's unpickler.
    progress: called as progress(what, done, total).

    Raises TersorError on bad input, before anything is written. An interrupted job goes on when called again with the same
    arguments and `out`.
    """
    if samples < 1 or seq_len < 1:
        raise TersorError(f"samples={samples} and seq_len={seq_len} must be positive")
    if samples > SAMPLES or seq_len > TOKENS:
        raise TersorError(
            f"samples={samples} and seq_len={seq_len} are more than any calibration has: {SAMPLES}, {TOKENS}"
        )
    check_seed(seed)
    if activations not in PLACES:
        raise TersorError(f"activations={activations!r} is not one of {', '.join(PLACES)}")
    if target_tp < 1:
        raise TersorError(f"target_tp={target_tp} must be positive")
    job = Settings(
        recipe=Recipe(method, make_rules(rules)),
        layout=None if format is None else layout_named("gptq" if format == AUTO else format),
        may_pad=format == AUTO,
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        device=pick_device(device),
        dtype=dtype,
        out=None if out is None else Path(out).expanduser().absolute(),  # `demo` is the user's directory here
        overwrite=overwrite,
        redo=tuple(redo),
        include=tuple(include),
        exclude=tuple(exclude),
        head=head,
        embeddings=embeddings,
        target_tp=target_tp,
        experts=parse_routing(experts),
        activations=activations,
        allow_pickle=allow_pickle,
        tokenizer=tokenizer,
        progress=progress or (lambda what, done, total: None),
    )
    if isinstance(model, nn.Module) and out is not None:
        raise TersorError("a module in memory is compressed in memory: call save(directory) on the result, not out=")
    if isinstance(method, ModelMethod):
        if embeddings:
            raise TersorError(f"method {method.name} does not compress embeddings; leave --embeddings out")
        if head:
            raise TersorError(
                f"method {method.name} works on the whole model and leaves the head to itself; leave head out"
            )
        if isinstance(model, nn.Module):
            return compress_whole_module(model, job)
        return compress_whole_checkpoint(str(model), job)
    if not isinstance(model, nn.Module):
        return compress_checkpoint(str(model), job)
    return compress_module(model, with_fitting_layout(model, job))
