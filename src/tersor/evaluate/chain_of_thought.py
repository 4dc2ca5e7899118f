"""How often a language model's chain of thought ends in the right answer (tersor.data.chain_of_thought).

    accuracy(model, "arithmetic", make_chains("arithmetic", 1000, length=4, seed=7))

The model gets each question up to its separator and writes greedily until <eos>. An answer is right if what is
behind its last separator is true, whatever the steps are; of equations the whole last line counts.
What follows a direct answer, one without steps, does not count: training for it asks for no <eos>.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor.data.chain_of_thought import EOS, find_task


def accuracy(model: Any, task: str, ids: Tensor) -> float:
    """The share of right answers to the samples ids (n, L), which may be chains or direct."""
    known = find_task(task)
    separator = known.words.index(known.separator)
    question = (ids == separator).int().argmax(1) + 1  # tokens of it, with the separator
    right = 0
    for size in sorted(set(question.tolist())):  # of one length: no padding
        rows = ids[question == size]
        texts = write(model, rows[:, :size], ids.shape[1] - size)
        for text, row in zip(texts.tolist(), rows[:, size:].tolist(), strict=True):
            wanted = _answer(row, separator)
            found = _answer(text, separator) if separator in row else text[: row.index(EOS)]
            right += found == wanted
    return right / len(ids)


@torch.no_grad()
def write(model: Any, prompt: Tensor, most: int) -> Tensor:
    """prompt (B, L) -> what follows greedily (B, at most `most`), until each row has its <eos>."""
    logits, state = model.prefill(prompt)
    token = logits[:, -1].argmax(-1)
    written, done = [token], token == EOS
    while len(written) < most and not done.all():
        logits, state = model.step(token, state)
        token = logits.argmax(-1)
        written.append(token)
        done = done | (token == EOS)
    return torch.stack(written, 1)


def _answer(ids: list[int], separator: int) -> list[int] | None:
    """What stands between the last separator and <eos>; None without <eos>."""
    if EOS not in ids:
        return None
    ids = ids[: ids.index(EOS)]
    return ids[len(ids) - ids[::-1].index(separator) :] if separator in ids else ids
