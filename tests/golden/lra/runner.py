from typing import Any

import numpy as np
from golden.harness import Case

from tersor.data.listops import evaluate, expressions, parse


def run(case: Case) -> dict[str, Any]:
    parsed = [parse(text) for text in case.config["expressions"]]
    values, counts = [evaluate(tokens) for tokens in parsed], [len(tokens) for tokens in parsed]
    if "tokens" in case.config:
        assert [" ".join(tokens) for tokens in parsed] == case.config["tokens"]
    if case.name == "listops_seeded":
        drawn = expressions(len(parsed), min_length=50, max_length=200, seed=0)
        assert [list(tokens) for tokens in drawn] == parsed
    assert values == case.config.get("values", values)
    assert counts == case.config.get("token_counts", counts)
    return {"values": np.array(values), "token_counts": np.array(counts)}
