from golden.harness import Case, capture, check_parameters
from torch import Tensor

import tersor.models
from tersor.models.points.flatformer import group_rows, positions, sort_orders


def run(case: Case) -> dict[str, Tensor]:
    shapes = {name: tuple(value) for name, value in case.config.items() if name.endswith("_shape")}
    model = tersor.models.load("flatformer", case.state_dict(), **{**case.config, **shapes})
    check_parameters(case, model)
    inputs = case.inputs()
    coords = inputs["coords"]
    groups = group_rows(coords[:, 0], model.config.group_size)
    blocks = [f"block_list.{index}" for index in range(model.config.num_blocks)]
    captured = capture(model, ["", *blocks], inputs)
    results = {
        "bev": captured[""],
        "tokens": captured[blocks[-1]],
        "positional": positions(coords, model.config),
        "map_flat2win": groups.rows,
        "map_win2flat": groups.places,
    }
    results |= {f"map_{name}": order for name, order in sort_orders(coords, model.config).items()}
    results |= {f"block{index}": captured[path] for index, path in enumerate(blocks)}
    return {name: results[name] for name in case.outputs}
