"""Two tasks that ask a sequence model to keep tokens in order: copying, and copying what matters (Mamba, arXiv 2312.00752).

    ids, answers = make_copying(10_000, length=24, symbols=8, seed=0)                    # (10000, 32), (10000, 8)
    ids, answers = make_copying(10_000, length=24, symbols=8, selective=True, seed=0)

copying              3 7 1 _ _ _ _ _  ? ? ? -> 3 7 1     the symbols come first, then nothing
selective copying    _ 3 _ _ 7 _ 1 _  ? ? ? -> 3 7 1     they are anywhere, so that the distance to the answer says nothing

Symbols are tokens 0 to kinds - 1, `_` is the token `kinds` and `?` the one after it. The answers are asked for at the `?`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.errors import TersorError


def make_copying(
    count: int, *, length: int = 24, symbols: int = 8, kinds: int = 8, selective: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """ids (count, length + symbols), answers (count, symbols), int64: `symbols` of the first `length` tokens are to be copied."""
    if not 1 <= symbols <= length or kinds < 1 or count < 1:
        raise TersorError(
            f"copying needs count, kinds and symbols of at least 1, and a length of at least the symbols, not {count}, {kinds}, "
            f"{symbols} and {length}"
        )
    chance = torch.Generator().manual_seed(seed)
    answers = torch.randint(kinds, (count, symbols), generator=chance)
    places = torch.arange(symbols).expand(count, symbols)
    if selective:
        places = torch.rand(count, length, generator=chance).argsort(1)[:, :symbols].sort(1).values
    ids = torch.full((count, length + symbols), kinds)
    ids.scatter_(1, places, answers)
    ids[:, length:] = kinds + 1
    return ids, answers
