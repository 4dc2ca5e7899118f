"""Calibration samples: dictionaries of the model's own inputs, one per sample."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.data.long_text import LONG, pieces, text_length
from tersor.data.text import builtin_text, hub_text, read_text, tokenized
from tersor.errors import TersorError
from tersor.models.registry import find

Batch = dict[str, Any]
SAMPLES_OF_A_SHORT_TEXT = 4096  # so many may be drawn from any text, although some are then alike
BYTES_A_TOKEN = 8  # read of a long text for each token; twice as many where they are too few
MARGIN = 16  # tokens at both ends of a piece that are not used: words cut in two, and what a tokenizer adds
TOKENS_AT_ONCE = 8192  # run through a block together, on a GPU
WITH_LOGITS = ("classify", "language-model", "masked-language-model", "node-classify")  # tasks of models of the tree
Calibration = str | Path | Sequence[str] | Iterable[Any] | None


def is_text(calibration: Calibration) -> bool:
    """Whether it names a text or a file, or is a list of texts; else it is the model's own inputs."""
    if calibration is None or isinstance(calibration, str | Path):
        return True
    return all(isinstance(each, str) for each in calibration)


def make_batches(
    calibration: Calibration, tokenizer: Any, *, samples: int, seq_len: int, seed: int, max_positions: int | None = None
) -> list[Batch]:
    """Samples from whatever the user gave.

    A text ("builtin", None, "hf:NAME" or a file's path) is tokenized as one string and cut into `samples` equal parts; from
    each a window of `seq_len` tokens is drawn at a random place (of a long file only these places are read). In a list of
    strings each is one sample, cut at `seq_len` tokens. Anything else is taken as the model's own inputs: dictionaries (of
    tensors, arrays or lists of numbers; tokens without a batch axis get one), tensors (the first argument) or tuples (the
    arguments). At most `samples` are used.
    """
    length = min(seq_len, max_positions or seq_len)
    if calibration is None or isinstance(calibration, str | Path):
        if tokenizer is None:  # said before the file is read as text, which it may not be
            raise _no_tokenizer(calibration)
        if (path := _long_file(calibration)) is not None:
            return _windows_of_file(tokenizer, path, samples=samples, length=length, seed=seed)
        text, origin = _text_of(calibration)
        return _windows(_tokenize(tokenizer, text), origin, samples=samples, length=length, seed=seed)
    given = list(calibration)[:samples]
    if not given:
        raise TersorError("the calibration is empty: it has no samples")
    if all(isinstance(each, str) for each in given):
        tokens = [_tokenize(tokenizer, each)[:length] for each in given]
        short = next((n for n, each in enumerate(tokens) if len(each) == 0), None)
        if short is not None:
            raise TersorError(f"calibration text {short} is empty")
        return [{"input_ids": each[None]} for each in tokens]
    return [_as_batch(each, n) for n, each in enumerate(given)]


def bundles(batches: Sequence[Batch]) -> list[list[int]]:
    """The samples that run through the model together, as lists of their indices: on a GPU neighbouring texts of one length.

    Where samples are short, starting kernels takes most of a block's time, and a bundle starts them once for all of its samples.
    """
    found: list[list[int]] = []
    for n, batch in enumerate(batches):
        ids = batch.get("input_ids")
        alike = (
            found
            and len(batch) == 1
            and isinstance(ids, Tensor)
            and ids.is_cuda
            and ids.dim() == 2
            and batches[found[-1][0]].keys() == batch.keys()
            and batches[found[-1][0]]["input_ids"].shape == ids.shape
            and (len(found[-1]) + 1) * ids.numel() <= TOKENS_AT_ONCE
        )
        if alike:
            found[-1].append(n)
        else:
            found.append([n])
    return found


def joined(batches: Sequence[Batch]) -> Batch:
    """The samples of a bundle as one batch."""
    if len(batches) == 1:
        return batches[0]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def fingerprint(batches: Sequence[Batch]) -> str:
    """A hash of every number of the samples."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items(), key=lambda item: str(item[0])):
            digest.update(str(name).encode())
            for part in value if isinstance(value, list | tuple) else (value,):
                _add(digest, part)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, Tensor):
        digest.update(str((tuple(value.shape), value.dtype)).encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    else:
        digest.update(repr(value).encode())


def without_target(batch: Batch) -> Batch:
    """A sample as the model takes it: without the label that data sets give."""
    return {name: value for name, value in batch.items() if name != "target"}


def probe_of(batch: Batch, tokens: int = 64) -> Batch:
    """A short sample to compare outputs on: the first tokens of a text sample, others as they are."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or any(not _follows(ids, v) for v in batch.values()):
        return batch
    return {name: value[:, :tokens] if isinstance(value, Tensor) else value for name, value in batch.items()}


def held_out(tokenizer: Any, *, rows: int, length: int) -> Batch:
    """Text that calibrates nothing: windows from all over the built-in evaluation text, input_ids [rows, length]."""
    tokens = _tokenize(tokenizer, builtin_text("evaluation"))
    windows = _windows(tokens, "the built-in evaluation text", samples=rows, length=length, seed=0)
    return {"input_ids": torch.cat([each["input_ids"] for each in windows])}


def to_device(batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    """Tensors on the device, floating ones in the model's dtype."""
    return each_tensor(batch, lambda value: value.to(device, dtype if value.is_floating_point() else None))


def each_tensor(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """A sample with all its tensors changed, those in tuples and lists too."""

    def changed(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(changed(each) for each in value)
        return change(value) if isinstance(value, Tensor) else value

    return {name: changed(value) for name, value in batch.items()}


def _follows(ids: Tensor, value: Any) -> bool:
    return not isinstance(value, Tensor) or value.shape == ids.shape


def _text_of(calibration: str | Path | None) -> tuple[str, str]:
    if calibration is None or calibration == "builtin":
        return builtin_text("calibration"), "the built-in text"
    if isinstance(calibration, str) and calibration.startswith("hf:"):
        return hub_text(calibration.removeprefix("hf:")), calibration
    return read_text(calibration), str(calibration)


def _long_file(calibration: str | Path | None) -> Path | None:
    """The file, where it is one that is not read whole."""
    if calibration is None or calibration == "builtin" or str(calibration).startswith("hf:"):
        return None
    path = Path(calibration).expanduser()
    return path if path.is_file() and text_length(path) > LONG else None


def _windows_of_file(tokenizer: Any, path: Path, *, samples: int, length: int, seed: int) -> list[Batch]:
    """As `_windows` of the whole text, but for the places, which are drawn in bytes."""
    chance = torch.rand(samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wanted, total = length + 2 * MARGIN, text_length(path)
    size = BYTES_A_TOKEN * wanted
    while size < total:
        places = ((torch.arange(samples) + chance) / samples * (total - size)).long()
        found: list[Batch] = []
        for text in pieces(path, places.tolist(), size):
            tokens = _tokenize(tokenizer, text)
            if len(tokens) < wanted:
                break
            found.append({"input_ids": tokens[MARGIN : MARGIN + length][None].clone()})
        if len(found) == samples:
            return found
        size *= 2
    return _windows(_tokenize(tokenizer, read_text(path)), str(path), samples=samples, length=length, seed=seed)


def _tokenize(tokenizer: Any, text: str) -> Tensor:
    if tokenizer is None:
        raise _no_tokenizer(None)
    return tokenized(tokenizer, text)


def _no_tokenizer(calibration: str | Path | None) -> TersorError:
    given = "" if calibration is None else f" ({calibration})"
    return TersorError(
        f"the model has no tokenizer, so text cannot calibrate it{given}: give --calibration a folder of images or an .npz, "
        "or in Python its own inputs as an iterable of dictionaries"
    )


def _windows(tokens: Tensor, origin: str, *, samples: int, length: int, seed: int) -> list[Batch]:
    if len(tokens) < length:
        raise TersorError(
            f"{origin} has {len(tokens)} tokens, less than one sample of {length}; use a longer text or --seq-len {len(tokens)}"
        )
    different = len(tokens) - length + 1
    if samples > max(different, SAMPLES_OF_A_SHORT_TEXT):
        raise TersorError(f"samples={samples} are more than the {different} of {length} tokens that {origin} has")
    generator = torch.Generator().manual_seed(seed)
    # One window at a random place in each of `samples` equal parts, so that every document of a collection has its chance. No two
    # windows overlap where the text is long enough.
    chance = torch.rand(samples, generator=generator, dtype=torch.float64)
    part = len(tokens) / samples
    if part >= length:
        starts = (torch.arange(samples) * part + chance * (part - length)).long()
    else:
        starts = ((torch.arange(samples) + chance) / samples * (len(tokens) - length + 1)).long()
    return [{"input_ids": tokens[start : start + length][None].clone()} for start in starts.tolist()]


def _as_batch(value: Any, n: int) -> Batch:
    if isinstance(value, Mapping):
        found = {name: _as_tensor(each, str(name), n) for name, each in value.items()}
        ids = found.get("input_ids")
        length = len(ids) if isinstance(ids, Tensor) and ids.dim() == 1 else None
        return {name: _with_batch(each, str(name), length) for name, each in found.items()}
    if isinstance(value, Tensor):
        return {"args": (value[None] if value.dim() == 1 and not value.is_floating_point() else value,)}
    if isinstance(value, tuple | list) and all(isinstance(each, Tensor) for each in value):
        return {"args": tuple(value)}
    raise TersorError(
        f"calibration sample {n} is a {type(value).__name__}; give dictionaries, tensors or tuples of tensors"
    )


def _as_tensor(value: Any, name: str, n: int) -> Any:
    """Arrays and lists of numbers as tensors; anything else as it is."""
    if isinstance(value, np.ndarray) or (isinstance(value, list | tuple) and value and _holds_numbers(value)):
        try:
            found = torch.from_numpy(np.array(value))
        except (ValueError, TypeError) as error:
            raise TersorError(
                f"calibration sample {n}: the rows of {name} are of several lengths, or hold no numbers ({error})"
            ) from None
        return found.float() if found.dtype == torch.float64 and not isinstance(value, np.ndarray) else found
    return value


def _holds_numbers(value: Any) -> bool:
    first = value
    while isinstance(first, list | tuple) and first:
        first = first[0]
    return isinstance(first, bool | int | float | np.ndarray | np.generic)


def _with_batch(value: Any, name: str, length: int | None) -> Any:
    """The tokens of one text, and other inputs with an entry per token, as a batch of one."""
    if not isinstance(value, Tensor) or value.dim() != 1:
        return value
    of_tokens = name.endswith(("input_ids", "attention_mask", "token_type_ids", "position_ids"))
    return value[None] if of_tokens or (length is not None and len(value) == length) else value


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Calls made here keep no key-value cache, which would grow with every repeated call of a block."""
    configs: dict[int, Any] = {
        id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "use_cache")
    }
    before = {key: config.use_cache for key, config in configs.items()}
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for key, config in configs.items():
            config.use_cache = before[key]


def call(model: Any, batch: Batch) -> Any:
    """model(*args, **rest): `args` holds positional inputs."""
    rest = {name: value for name, value in batch.items() if name != "args"}
    return model(*batch.get("args", ()), **rest)


def predicts(model: Any, output: Any) -> bool:
    """Whether the first tensor of a model's output holds the logits of a distribution."""
    system = getattr(type(model), "system", None)
    return isinstance(getattr(output, "logits", None), Tensor) or (
        isinstance(system, str) and find(system).task in WITH_LOGITS
    )


def first_tensor(output: Any) -> Tensor | None:
    """The logits of a model output, else its first floating tensor."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    values = output.values() if hasattr(output, "values") else output if isinstance(output, tuple | list) else ()
    return next((found for value in values if (found := first_tensor(value)) is not None), None)
