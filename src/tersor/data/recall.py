"""Two tasks that ask a sequence model to remember and compare tokens (H3, Fu et al., ICLR 2023, arXiv 2212.14052).

    ids, answers = make_recall(10_000, length=20, keys=10, seed=0)           # (10000, 21), (10000,)
    ids, answers = make_induction(10_000, length=30, vocabulary=20, seed=0)  # (10000, 30), (10000,)

associative recall   k3 v7 k1 v2 k3 v7 ... k1 -> v2     a key has one value in a sequence, another one in the next sequence
induction head       4 9 * 7 2 ... 5 * -> 7             the special token comes once, and again at the end

The answer is asked for at the last place. Keys are tokens 0 to keys - 1, values the `keys` tokens after them; the special
token of induction is the last of the vocabulary. Sizes by default are those of the paper; the published generator
draws other samples from a seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.errors import TersorError


def make_recall(count: int, *, length: int = 20, keys: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """ids (count, length + 1): length / 2 pairs and the key that is asked for; answers (count,). All int64."""
    if length < 2 or length % 2 or keys < 1 or count < 1:
        raise TersorError(
            f"recall needs count and keys of at least 1 and an even length, not {count}, {keys} and {length}"
        )
    chance = torch.Generator().manual_seed(seed)
    pairs = length // 2
    values = torch.randint(keys, 2 * keys, (count, keys), generator=chance)  # of each key, in each sequence
    drawn = torch.randint(keys, (count, pairs), generator=chance)
    asked = drawn.gather(1, torch.randint(pairs, (count, 1), generator=chance))  # (count, 1): one that was there
    ids = torch.stack((drawn, values.gather(1, drawn)), -1).flatten(1)
    return torch.cat((ids, asked), 1), values.gather(1, asked)[:, 0]


def make_induction(count: int, *, length: int = 30, vocabulary: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """ids (count, length), answers (count,), int64: the token that stood behind the special one."""
    if length < 3 or vocabulary < 2 or count < 1:
        raise TersorError(
            f"induction needs a count of 1, a length of 3 and a vocabulary of 2 at least, not {count}, {length}, {vocabulary}"
        )
    chance = torch.Generator().manual_seed(seed)
    special = vocabulary - 1
    ids = torch.randint(special, (count, length), generator=chance)
    place = torch.randint(length - 2, (count, 1), generator=chance)  # a token follows before the last place
    ids.scatter_(1, place, special)
    ids[:, -1] = special
    return ids, ids.gather(1, place + 1)[:, 0]
