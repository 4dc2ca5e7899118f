"""A model as an ONNX file, checked in onnxruntime before it gets its name.

torch.export traces the model on random inputs of its own kind; its batch may have any size afterwards, and its text any length
up to the model's positions, where the model allows that. Then onnxruntime and torch run the same inputs, of other sizes too, and
both are timed.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tersor.calibrate.batches import without_cache
from tersor.checkpoint.load import load
from tersor.checkpoint.positions import positions_of
from tersor.checkpoint.preprocessing import class_names, image_settings
from tersor.checkpoint.source import Checkpoint, open_checkpoint
from tersor.errors import TersorError
from tersor.files import replacing
from tersor.models.registry import find
from tersor.progress import Progress, silent
from tersor.runtime.onnx_weights import exportable, pack_four_bits, translations
from tersor.untrusted import first_words

OPSET = 21  # the first with 4 bits and blocks
OPSETS = (18, 23)  # from and to
MOST_DIFFERENCE = 1e-3  # of the largest output
LARGEST_FILE = 2**31 - 1  # bytes of a protobuf message, and so of a file of one piece
TOKENS = 16  # of the text that is traced
_TURNS, _SECONDS = 15, 2.0
# onnxruntime's option of a session: 1 multiplies by packed weights in float32; its default rounds what they multiply to 8 bits.
_EXACT = "session.qdq_matmulnbits_accuracy_level"
Inputs = dict[str, Any]


@dataclass(frozen=True)
class OnnxExported:
    """A model as an ONNX file, and how it compares with torch."""

    path: Path
    size: int  # bytes of the file
    opset: int
    dynamic: list[str]  # axes of any size, such as image[0] (input_ids[1]: up to the model's positions)
    fixed: str | None  # why the batch has a fixed size; None where it has not
    difference: float  # the largest from torch in float32, as a share of the largest output
    rounded_difference: float | None  # with onnxruntime's defaults, which round inputs of packed layers to 8 bits
    same_top1: bool | None  # whether every choice is MODEL's in tersor; None where outputs are no scores
    rounded_same_top1: bool | None  # likewise, with onnxruntime's defaults
    batch: int  # of the timed calls
    onnx_ms: float  # one call, the median of several in turn
    torch_ms: float  # likewise
    integers: dict[int, int]  # layers that stay packed, by bits
    metadata: list[str]


def export_onnx(
    model: str | Path,
    path: Path,
    *,
    image_size: int | None = None,
    opset: int = OPSET,
    dequantize: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> OnnxExported:
    """Write the model at `model` to an ONNX file.

    image_size: pixels of a side, by default those that the model was made for. dequantize: layers that ONNX has no integers for
    are written as dense float32 weights. Raises TersorError where the model cannot be exported, or where what onnxruntime
    computes differs by more than 1e-3 of the largest output; there is no file then.
    """
    path = path.expanduser()
    _check(path, overwrite, opset)
    checkpoint = open_checkpoint(model)
    _packages()
    report = progress or silent
    report("loading", 0, 3)
    module = load(checkpoint, dtype="float32", device="cpu").eval()
    report("exporting", 1, 3)
    return export_module(
        module,
        path,
        image_size=image_size or _image_size(checkpoint),
        opset=opset,
        dequantize=dequantize,
        metadata=_metadata(checkpoint),
        overwrite=overwrite,
        checking=lambda: report("checking", 2, 3),
    )


def export_module(
    module: nn.Module,
    path: Path,
    *,
    image_size: int | None = None,
    opset: int = OPSET,
    dequantize: bool = False,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    checking: Callable[[], None] = lambda: None,
) -> OnnxExported:
    """As `export_onnx`, for a module of tersor.models or of transformers in float32 on the CPU. metadata: text by name, for the
    file's metadata_props. checking: called when the file is made and its check begins."""
    _check(path, overwrite, opset)
    onnx, runtime = _packages()
    if reason := _untraceable(module):
        raise TersorError(f"{_name(module)} cannot be exported: {reason}")
    module.eval()
    plain, integers = exportable(module, dequantize_others=dequantize, opset=opset)
    with without_cache(plain), without_cache(module), torch.no_grad():
        inputs = example_inputs(module, 2, image_size=image_size)
        proto, dynamic, fixed = _traced(plain, inputs, opset, image_size)
        pack_four_bits(proto)
        for name, value in (metadata or {}).items():
            proto.metadata_props.add(key=name, value=value)
        size = proto.ByteSize()
        if size > LARGEST_FILE:
            raise TersorError(f"the file would have {size / 1e9:.1f} GB; ONNX files of one piece have 2 GB at most")
        with replacing(path) as partial:
            onnx.save_model(proto, str(partial))
            del proto
            checking()
            session = _session(runtime, partial, exact=True)
            difference, same = 0.0, None
            sizes = [inputs]
            if fixed is None:
                sizes += [example_inputs(module, rows, image_size=image_size) for rows in (1, 3)]
            if "input_ids[1]" in dynamic:
                sizes.append(_of_another_length(inputs, positions_of(module)))
            for each in sizes:
                found, expected = _run(session, each), _tensors(plain(**each))
                difference = max(difference, _difference(found, expected))
                if not difference <= MOST_DIFFERENCE:
                    raise TersorError(
                        f"onnxruntime's outputs differ by {difference:.2g} of the largest, more than {MOST_DIFFERENCE}; no file "
                        "is left"
                    )
                same = _all(same, _same_top1(found, _tensors(module(**each)) if integers else expected))
            session = _session(runtime, partial, exact=False)  # as users make it
            rounded = rounded_same = None
            if integers:
                found = _run(session, inputs)
                rounded = _difference(found, _tensors(plain(**inputs)))
                rounded_same = _same_top1(found, _tensors(module(**inputs)))
            onnx_ms, torch_ms = _times(functools.partial(_run, session, inputs), functools.partial(module, **inputs))
            del session
    return OnnxExported(
        path=path,
        size=path.stat().st_size,
        opset=opset,
        dynamic=dynamic,
        fixed=fixed,
        difference=difference,
        rounded_difference=rounded,
        same_top1=same,
        rounded_same_top1=rounded_same,
        batch=2,
        onnx_ms=onnx_ms,
        torch_ms=torch_ms,
        integers=integers,
        metadata=sorted(metadata or {}),
    )


def example_inputs(module: nn.Module, batch: int, *, image_size: int | None = None) -> Inputs:
    """Random inputs of the model's own kind. Images [batch, channels, H, W] get sides of image_size."""
    if hasattr(module, "example_inputs"):
        inputs: Inputs = dict(module.example_inputs(batch))  # type: ignore[operator]
    else:
        inputs = _inputs_of_transformers(module, batch, image_size)
    images = [name for name in ("image", "pixel_values") if isinstance(inputs.get(name), Tensor)]
    images = [name for name in images if inputs[name].dim() == 4]
    if image_size is not None:
        if not images:
            raise TersorError(f"{_name(module)} takes no images, so an image size does nothing")
        for name in images:
            inputs[name] = torch.randn(*inputs[name].shape[:2], image_size, image_size)
    return inputs


def _inputs_of_transformers(module: nn.Module, batch: int, image_size: int | None) -> Inputs:
    config: Any = getattr(module, "config", None)
    main = getattr(module, "main_input_name", None)
    if config is None or main is None or getattr(config, "is_encoder_decoder", False):
        raise TersorError(f"{_name(module)} cannot be exported: tersor does not know what its inputs look like")
    if main == "pixel_values":
        side = image_size or getattr(config, "image_size", None)
        if not isinstance(side, int):
            raise TersorError(f"{_name(module)} does not say the size of its images; give it with --image-size")
        return {main: torch.randn(batch, getattr(config, "num_channels", 3), side, side)}
    if main != "input_ids":
        raise TersorError(f"{_name(module)} cannot be exported: it takes {main}, neither text nor images alone")
    text = config.get_text_config()
    tokens = min(TOKENS, positions_of(module) or TOKENS)
    ids = torch.randint(min(5, text.vocab_size - 1), text.vocab_size, (batch, tokens))
    if module.can_generate():  # type: ignore[operator]
        return {"input_ids": ids}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _of_another_length(inputs: Inputs, positions: int | None) -> Inputs:
    """Text [batch, tokens] that is longer than what was traced, or shorter where the model has no positions for more."""
    traced = inputs["input_ids"].shape[1]
    length = min(2 * traced - 3, positions or 2 * traced)
    if length <= traced:
        length = traced // 2 + 1
    return {name: value.repeat(1, 2)[:, :length] for name, value in inputs.items()}


def _traced(module: nn.Module, inputs: Inputs, opset: int, image_size: int | None) -> tuple[Any, list[str], str | None]:
    """(the model as a protobuf message, axes of any size, why the batch is none of them)."""
    other = example_inputs(module, 3, image_size=image_size)
    batch = torch.export.Dim("batch", min=1)
    axes: dict[str, Any] = {}
    for name, value in inputs.items():
        shapes = zip(value.shape, other[name].shape, strict=True) if isinstance(value, Tensor) else ()
        axes[name] = {n: batch for n, (two, three) in enumerate(shapes) if (two, three) == (2, 3)}
    tries = []
    if any(axes.values()):
        # The second lets torch bound the batch where the first, any batch at all, is refused.
        loose = {name: dict.fromkeys(each, torch.export.Dim.DYNAMIC) for name, each in axes.items()}
        tries = [axes, loose]
    if set(inputs) <= {"input_ids", "attention_mask"} and hasattr(module, "can_generate"):
        length = torch.export.Dim("length", min=2, max=positions_of(module))
        tries.insert(0, {name: {**each, 1: length} for name, each in axes.items()})
    why = None if tries else "no axis of its inputs is that of the batch alone"
    for dynamic in tries:
        try:
            return _export(module, inputs, opset, dynamic), _axis_names(dynamic), None
        except Exception as error:  # torch.export has many ways to say that a size must be fixed
            why = _root(error)
    try:
        return _export(module, inputs, opset, None), [], why
    except Exception as error:  # and all that tracing may come upon
        raise TersorError(f"{_name(module)} cannot be exported: {_root(error)}") from error


def _axis_names(dynamic: Mapping[str, Mapping[int, Any]]) -> list[str]:
    return [f"{name}[{axis}]" for name, axes in dynamic.items() for axis in axes]


def _export(module: nn.Module, inputs: Inputs, opset: int, dynamic: Any) -> Any:
    # copies: a try that fails leaves its marks of sizes on the tensors, and the next one would obey them
    inputs = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, inputs)
    with _quiet():
        traced = torch.export.export(module, (), inputs, dynamic_shapes=dynamic)
        program = torch.onnx.export(traced, opset_version=opset, custom_translation_table=translations(), verbose=False)
    assert program is not None
    return program.model_proto


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of what its user can do nothing about."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch", "onnxscript", "onnx_ir")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


_FIXED = re.compile(
    r"marked L\['(\w+)'\]\.size\(\)\[(\d+)\] as dynamic but your code specialized it to be a constant \((\d+)\)"
)


def _root(error: BaseException) -> str:
    """Where the trouble began, in one line: the exporter wraps an error in others that tell of its steps."""
    around = error
    while error.__cause__ is not None:
        around, error = error, error.__cause__
    if (
        isinstance(error, AttributeError | TypeError | LookupError) and around is not error
    ):  # the exporter's own mistake
        return f"{first_words(around)} ({first_words(error)})"
    if missing := re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", str(error)):
        numbers = " of complex numbers" if "complex-valued input" in str(error) else ""
        return f"ONNX has no form of the operation {missing[1]}{numbers}"
    if fixed := _FIXED.search(str(error)):
        return f"tracing fixes {fixed[1]}[{fixed[2]}] at {fixed[3]}"
    return first_words(error, 300)


def _session(runtime: Any, path: Path, *, exact: bool) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    if exact:
        options.add_session_config_entry(_EXACT, "1")
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own kinds
        raise TersorError(f"onnxruntime does not take the file: {first_words(error)}") from error


def _run(session: Any, inputs: Inputs) -> list[Tensor]:
    names = [each.name for each in session.get_inputs()]
    flat = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    try:
        if not set(names) <= set(flat):  # nested inputs are numbered by the exporter, in their order
            flat = dict(zip(names, _tensors(inputs), strict=True))
        found = session.run(None, {name: flat[name].numpy() for name in names})
    except Exception as error:  # onnxruntime's own kinds
        raise TersorError(f"onnxruntime cannot run the file: {first_words(error)}") from error
    return [torch.from_numpy(each) for each in found]


def _tensors(output: Any) -> list[Tensor]:
    return [each for each in tree_leaves(output) if isinstance(each, Tensor)]


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest over all outputs, each as a share of its largest value; infinite where shapes or numbers of outputs differ."""
    if [each.shape for each in found] != [each.shape for each in expected]:
        return float("inf")
    differences = [0.0]
    for ours, theirs in zip(found, expected, strict=True):
        if not theirs.numel():
            continue
        apart = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-12)
        differences.append(float("inf") if not bool(torch.isfinite(apart)) else float(apart))
    return max(differences)


def _same_top1(found: list[Tensor], expected: list[Tensor]) -> bool | None:
    """Of the first output, where it is scores [batch, classes] or [batch, tokens, vocabulary]."""
    if not expected:
        return None
    first = expected[0]
    if first.dim() not in (2, 3) or first.shape[-1] < 2 or not first.is_floating_point():
        return None
    return bool((found[0].argmax(-1) == first.argmax(-1)).all())


def _all(before: bool | None, now: bool | None) -> bool | None:
    return now if before is None else before and bool(now)


def _times(onnx: Callable[[], object], plain: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds of each, the median of turns in which both run; the first turn warms up."""
    found: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
    for _ in range(_TURNS + 1):
        for times, call in zip(found, (onnx, plain), strict=True):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        if time.perf_counter() - began > _SECONDS and len(found[0]) > 1:
            break
    first, second = (statistics.median(times[1:]) for times in found)
    return first, second


def _check(path: Path, overwrite: bool, opset: int) -> None:
    if not OPSETS[0] <= opset <= OPSETS[1]:
        raise TersorError(f"opset {opset} is not written; {OPSETS[0]} to {OPSETS[1]} are")
    if path.suffix != ".onnx":
        raise TersorError(f"{path}: the name of an ONNX file ends in .onnx")
    if path.is_dir() or not path.parent.is_dir():
        raise TersorError(f"{path} cannot be written: it is a folder, or its folder does not exist")
    if path.exists() and not overwrite:
        raise TersorError(f"{path} exists; --overwrite replaces it")


def _packages() -> tuple[Any, Any]:
    try:
        importlib.import_module("onnxscript")
        return importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    except ImportError as error:
        raise TersorError(f"ONNX files need the extra onnx: pip install 'tersor[onnx]' ({error})") from None


def _untraceable(module: nn.Module) -> str:
    """Why a model of tersor.models says that it has no graph of fixed shapes; empty where it says nothing."""
    system = getattr(type(module), "system", None)
    return "" if system is None else find(system).untraceable


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _image_size(checkpoint: Checkpoint) -> int | None:
    """Of the images that the model was made for, where it says so."""
    try:
        return int(image_settings(checkpoint)["size"])
    except TersorError:
        return None


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """How inputs are prepared, and what classes are called, as JSON under tersor.preprocessing and tersor.classes."""
    found = {}
    with suppress(TersorError):
        found["tersor.preprocessing"] = json.dumps(image_settings(checkpoint))
    names = class_names(checkpoint)
    if names is not None:
        found["tersor.classes"] = json.dumps(names)
    return found
