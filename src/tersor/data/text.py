"""Text for calibration and evaluation: files, hub data sets, and two built-in texts that every Python carries."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from tersor.byte_tokenizer import ByteTokenizer
from tersor.data.long_text import LONG, pieces, text_length
from tersor.errors import TersorError
from tersor.untrusted import pretrained, read_bytes, readable

WORTH_KEEPING = 100_000  # characters of a text whose tokens are kept
_tokenized: dict[str, Tensor] = {}  # by a hash of tokenizer and text; four at most


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    tokenizer: str = "bytes"  # a directory or hub name with a tokenizer, or "bytes": one token a byte of UTF-8
    seq_len: int = 256


class TokenWindows(Dataset[dict[str, Tensor]]):
    """Tokens (n,) in windows of seq_len without overlap; the rest is dropped. The tokens to predict are in the window too."""

    def __init__(self, tokens: Tensor, *, seq_len: int) -> None:
        self.tokens, self.seq_len = tokens, seq_len
        if seq_len < 2:
            raise TersorError(f"windows of {seq_len} tokens leave nothing to predict; seq_len must be at least 2")
        if len(tokens) < seq_len:
            raise TersorError(f"the text has {len(tokens)} tokens, fewer than one window of {seq_len}")

    def __len__(self) -> int:
        return len(self.tokens) // self.seq_len

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {"input_ids": self.tokens[index * self.seq_len : (index + 1) * self.seq_len]}


def load_tokens(path: str | Path, config: TextConfig) -> TokenWindows:
    """A text file as windows of tokens, tokenized in one piece without special tokens."""
    text = read_text(path)
    if config.tokenizer == "bytes":
        return TokenWindows(ByteTokenizer()(text)["input_ids"][0], seq_len=config.seq_len)
    from transformers import AutoTokenizer

    try:
        tokenizer = pretrained(AutoTokenizer, config.tokenizer, "tokenizer")
    except TersorError as error:
        raise TersorError(f"no tokenizer at {config.tokenizer!r}: {error}") from error
    tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    return TokenWindows(tokens, seq_len=config.seq_len)


def tokenized(tokenizer: Any, text: str) -> Tensor:
    """The ids (n,) of a text, not to be changed: those of long texts are kept, as the steps of a job read the same ones again.

    tokenizer: one of transformers, or what is called in the same way.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or len(text) < WORTH_KEEPING:
        return _ids(tokenizer, text)
    key = hashlib.sha256(f"{backend.to_str()}\0{text}".encode(errors="surrogatepass")).hexdigest()
    if key not in _tokenized:
        if len(_tokenized) == 4:
            _tokenized.pop(next(iter(_tokenized)))
        _tokenized[key] = _ids(tokenizer, text)
    return _tokenized[key]


def _ids(tokenizer: Any, text: str) -> Tensor:
    ids: Tensor = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    return ids


def builtin_text(part: str) -> str:
    """Python's own reference documentation (`pydoc_data.topics`), split by topic: every third is "evaluation", the rest
    "calibration"."""
    from pydoc_data.topics import topics

    if part not in ("calibration", "evaluation"):
        raise ValueError(f"part {part!r} is neither 'calibration' nor 'evaluation'")
    names = sorted(topics)
    return "\n\n".join(topics[name].strip() for n, name in enumerate(names) if (n % 3 == 2) == (part == "evaluation"))


def beginning(path: str | Path, size: int) -> tuple[str, bool]:
    """The first `size` bytes of a text file, and whether that is all of it: a text that is not long is given whole."""
    path = Path(path).expanduser()
    if not path.is_file() or (length := text_length(path)) <= max(size, LONG):
        return read_text(path), True
    (text,) = pieces(path, [0], min(size, length))
    return text, False


def read_text(path: str | Path) -> str:
    """A UTF-8 text file, gzipped where its name ends in .gz. Raises TersorError where it is missing, binary or empty."""
    path = Path(path).expanduser()
    with readable(path):
        if not path.is_file():
            raise TersorError(f"no text file at {path}")
    data = read_bytes(path)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TersorError(f"{path} is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}") from None
    if "\0" in text:
        raise TersorError(f"{path} is a binary file, not text")
    if not text.strip():
        raise TersorError(f"{path} is empty")
    return text


def hub_text(name: str, *, documents: int = 2000) -> str:
    """The first training documents of a hub data set's `text` column, joined by blank lines (needs the `datasets` package)."""
    try:
        import datasets  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise TersorError(f"hf:{name} needs the datasets package: pip install 'tersor[hub-data]'") from None
    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
        texts = [row["text"] for row, _ in zip(rows, range(documents), strict=False)]
    except KeyError:
        raise TersorError(f"data set {name} has no column 'text'") from None
    except Exception as error:  # the package raises its own, the hub client's and fsspec's errors
        raise TersorError(f"data set {name} could not be read: {str(error).splitlines()[0]}") from error
    return "\n\n".join(texts)
