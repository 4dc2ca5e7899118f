"""One seed from several numbers (seed, epoch, index, ...), so that chance is a function of them and of nothing before.

Arithmetic will not do: torch's CPU generator looks at the lower 32 bits of a seed alone.
"""

from __future__ import annotations

import numpy as np

from tersor.untrusted import check_seed


def mixed_seed(*numbers: int) -> int:
    for number in numbers:
        check_seed(number)
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
