"""The tokenizer of models that read bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class ByteTokenizer:
    """One token a byte of UTF-8, with the methods of transformers' tokenizers that tersor calls. No token ends a text."""

    eos_token_id: int | None = None

    def __call__(self, text: str, **_: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([list(text.encode())], dtype=torch.int64)}

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        """Tokens that are no bytes are left out."""
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"byte {token}"

    def __len__(self) -> int:
        return 256
