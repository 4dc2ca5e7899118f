"""One seed from several numbers (seed, epoch, index, ...), so that what is drawn depends on these alone.

A sum of them would not do: torch's CPU generator looks only at the lower 32 bits of a seed.
"""

from __future__ import annotations

import numpy as np

from tersor.untrusted import check_seed


def mixed_seed(*numbers: int) -> int:
    for number in numbers:
        check_seed(number)
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
