"""Perplexity of a causal language model on a text: exp of the mean negative log-likelihood of its tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.calibrate.batches import BYTES_A_TOKEN, MARGIN
from tersor.checkpoint.load import check_tokens, load, load_tokenizer
from tersor.checkpoint.positions import positions_of
from tersor.checkpoint.source import Openable, open_checkpoint
from tersor.data.text import beginning, builtin_text, read_text, tokenized
from tersor.devices import DType
from tersor.errors import TersorError
from tersor.evaluate.interval import estimate
from tersor.progress import Progress

Texts = str | Path | Tensor | Sequence[str | Path] | None  # None: the built-in text

_PROBE = 32  # tokens that are run twice, with other tokens in the second half, to see whether the model is causal
# Share of the logits' spread that other tokens in the same call may change by rounding (in experts, say).
_TOLERANCE, _TOLERANCE_HALF = 1e-3, 5e-2


@dataclass(frozen=True)
class Perplexity:
    """Perplexity over windows of a text."""

    perplexity: float
    tokens: int  # that were predicted
    windows: int
    seq_len: int  # tokens a window
    half_width: float | None = None  # of the 95 % interval over windows, to first order; None of one window

    def __float__(self) -> float:
        return self.perplexity


def perplexity(
    model: Openable | nn.Module,
    text: str | Path | Tensor | None = None,
    *,
    tokenizer: Any = None,
    seq_len: int = 1024,
    max_windows: int | None = None,
    dtype: DType = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> Perplexity:
    """The whole text is tokenized as one string and cut into windows of `seq_len` tokens without overlap (what is left over is
    dropped); in each window tokens 2 .. n are predicted. This is the GPTQ paper's protocol, there with 2048 tokens.

    model: a name or directory, or a module that returns `.logits`. text: a path to a text file (.gz too), "builtin" (also None),
    or token ids [tokens]. A module needs `tokenizer` unless ids are given. Raises TersorError where the text is too short,
    or the model is not causal: it is tried whether earlier predictions change with later tokens.
    """
    if isinstance(model, nn.Module):
        module = model
    else:
        checkpoint = open_checkpoint(model)
        if not isinstance(text, Tensor) and tokenizer is None:
            tokenizer = load_tokenizer(checkpoint.directory)
        module = load(checkpoint, dtype=dtype, device=device)
    windows = causal_windows(module, text, seq_len=seq_len, max_windows=max_windows, tokenizer=tokenizer)
    where = next(module.parameters(), torch.empty(0)).device
    count, losses = len(windows), list[float]()
    with torch.no_grad():
        for n, window in enumerate(windows):
            inputs = window[None].to(where)
            logits = logits_of(module, inputs)
            losses.append(float(nn.functional.cross_entropy(logits[0, :-1].float(), inputs[0, 1:])))
            if progress is not None:
                progress("evaluating", n + 1, count)
    found = estimate(torch.tensor(losses, dtype=torch.float64))
    value = math.exp(found.mean) if found.mean < 700 else math.inf
    half = None if found.half_width is None else value * found.half_width  # the slope of exp
    return Perplexity(value, count * (seq_len - 1), count, seq_len, half)


def causal_windows(
    module: nn.Module, text: Texts, *, seq_len: int, max_windows: int | None = None, tokenizer: Any = None
) -> Tensor:
    """As `windows_of`. The module is put in eval mode. Raises TersorError also where a window does not fit the model, tokens
    have no row in the embedding, or the model is not causal."""
    windows = windows_of(text, tokenizer, seq_len=seq_len, max_windows=max_windows)
    check_windows(module, windows, tokenizer)
    return windows


def windows_of(text: Texts, tokenizer: Any, *, seq_len: int, max_windows: int | None = None) -> Tensor:
    """The tokens of a text, of several texts one behind the other, or given ones, in windows without overlap,
    [windows, seq_len]; what is left over is dropped. Raises TersorError where that leaves nothing to predict."""
    if not isinstance(text, Tensor):
        most = None if max_windows is None else max_windows * seq_len
        texts = [text] if text is None or isinstance(text, str | Path) else text
        text = torch.cat([tokens_of(each, tokenizer, at_least=most) for each in texts])
    return cut_windows(text, seq_len=seq_len, max_windows=max_windows)


def check_length(module: nn.Module, seq_len: int) -> None:
    """Raise TersorError where the module is no causal language model by its class, or a window does not fit it."""
    if reason := why_not_causal(module):
        raise TersorError(f"perplexity needs a causal language model: {reason}")
    positions = positions_of(module)
    if positions is not None and seq_len > positions:
        raise TersorError(f"seq_len {seq_len} is more than the {positions} positions that the model has")


def cut_windows(ids: Tensor, *, seq_len: int, max_windows: int | None = None) -> Tensor:
    """The tokens in windows without overlap, [windows, seq_len]. Raises TersorError where that leaves nothing to predict."""
    if seq_len < 2:
        raise TersorError(f"seq_len {seq_len} leaves nothing to predict; use at least 2")
    if max_windows is not None and max_windows < 1:
        raise TersorError(f"max_windows {max_windows} leaves nothing to evaluate; use at least 1")
    count = len(ids) // seq_len
    if count == 0:
        raise TersorError(f"the text has {len(ids)} tokens, less than one window of {seq_len}; use a shorter seq_len")
    count = min(count, max_windows or count)
    return ids[: count * seq_len].view(count, seq_len)


@torch.no_grad()
def check_windows(module: nn.Module, windows: Tensor, tokenizer: Any = None) -> None:
    """Put the module in eval mode and run it. Raises TersorError where it is no causal language model of these tokens."""
    check_length(module, windows.shape[1])
    check_tokens(module, windows, tokenizer)
    where = next(module.parameters(), torch.empty(0)).device
    check_causal(module.eval(), windows[0][:_PROBE].to(where), int(windows.max()))


def why_not_causal(module: nn.Module) -> str | None:
    """Why a model of transformers, by its class and config, does not predict the next token from text alone; None where it
    does."""
    if not hasattr(module, "can_generate"):
        return None  # another library's, or one of ours: it is tried
    config: Any = getattr(module, "config", None)
    kind = type(module).__name__
    if getattr(config, "is_encoder_decoder", False):
        return f"{kind} is an encoder and a decoder, which predicts one sequence from another"
    if not module.can_generate():  # type: ignore[operator]
        return f"{kind} has no output head that predicts the next token"
    if getattr(module, "main_input_name", "input_ids") != "input_ids":
        return f"{kind} takes {module.main_input_name}, not text alone"
    return None


def logits_of(module: nn.Module, inputs: Tensor) -> Tensor:
    """[1, tokens, vocabulary]. Raises TersorError where the model gives something else."""
    try:
        output = module(input_ids=inputs)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TersorError(
            f"perplexity needs a causal language model: {type(module).__name__} does not run on tokens alone ({reason})"
        ) from None
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != inputs.shape:
        raise TersorError("perplexity needs a causal language model that returns logits for every token")
    return logits


def check_causal(module: nn.Module, window: Tensor, largest: int) -> None:
    """Raise TersorError where logits depend on later tokens, or are no prediction of tokens. window: tokens [n]."""
    half = (len(window) + 1) // 2
    other = window[window != window[0]]
    swapped = other[0] if len(other) else (window[0] - 1).abs()
    changed = window.clone()
    changed[half:] = torch.where(window[half:] == window[0], swapped, window[0])
    first, second = (logits_of(module, ids[None]).float() for ids in (window, changed))
    if first.shape[-1] <= largest:
        raise TersorError(
            f"perplexity needs a causal language model: {type(module).__name__} tells {first.shape[-1]} classes apart, and the "
            f"text has a token {largest}"
        )
    parameter = next(module.parameters(), torch.empty(0))
    tolerance = _TOLERANCE if parameter.dtype in (torch.float32, torch.float64) else _TOLERANCE_HALF
    spread = (first - first.mean(-1, keepdim=True)).abs().max().clamp(min=1e-12)
    if float((first - second)[:, :half].abs().max() / spread) > tolerance:
        raise TersorError(
            f"perplexity needs a causal language model: what {type(module).__name__} predicts for a token depends on the tokens "
            "after it"
        )


def tokens_of(text: str | Path | None, tokenizer: Any, *, at_least: int | None = None) -> Tensor:
    """The tokens of a text. at_least: of a long file only so much is read that there are so many, where it has them."""
    if tokenizer is None:
        raise TersorError(
            "the model has no tokenizer: give token ids as a tensor, or images to a classifier (--images)"
        )
    if text is None or text == "builtin":
        return tokenized(tokenizer, builtin_text("evaluation"))
    if at_least is None:
        return tokenized(tokenizer, read_text(text))
    size, whole = BYTES_A_TOKEN * (max(at_least, 1) + MARGIN), False
    while not whole:
        content, whole = beginning(text, size)
        ids = tokenized(tokenizer, content)
        if len(ids) >= at_least + MARGIN:  # the last ones are of a word that is cut off
            break
        size *= 2
    return ids
