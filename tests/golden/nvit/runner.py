import itertools
import math
from typing import Any

import torch
from golden.harness import Case, capture, check_parameters
from torch import Tensor
from torch.nn import functional as F

import tersor.models
from tersor.methods.structure import nvit_saliency as pruning
from tersor.methods.structure.nvit_latency import LatencyTable

GRID = ((0, 256, 512, 768), (1, 3, 6, 9, 12), (1, 16, 32, 48, 64), (1, 16, 32, 48, 64), tuple(range(0, 3073, 128)))


def stand_in_table() -> LatencyTable:
    """The formula in the cases."""

    def seconds(E: int, h: int, q: int, v: int, m: int) -> float:
        m = m or 1
        products = 198 * E * (2 * h * q + 2 * h * v + 2 * m) + 198**2 * h * (q + v)
        return 5e-11 * products + 1e-4 * math.sqrt(m) + 5e-5 * math.sqrt(h * q) if E else 0.0

    values = [seconds(*point) for point in itertools.product(*GRID)]
    return LatencyTable(GRID, torch.tensor(values, dtype=torch.float64).view([len(points) for points in GRID]))


def run(case: Case) -> dict[str, Tensor]:
    if "points" in case.config:
        return latency_and_groups(case)
    if "EMB" in case.config:
        return dense(case)
    return saliency(case)


def dense(case: Case) -> dict[str, Tensor]:
    config = case.config
    model: Any = tersor.models.load(
        "nvit",
        case.state_dict(),
        embed_dim=config["EMB"],
        heads=config["head"],
        qk=config["QK"],
        v=config["V"],
        mlp=config["MLP"],
        num_classes=config["num_classes"],
        patch_size=config["patch_size"],
    )
    check_parameters(case, model)
    paths = {"logits": "head", "logits_dist": "head_dist"}
    paths |= {name: f"blocks.{name.removeprefix('block')}" for name in case.outputs if name.startswith("block")}
    found = capture(model, list(paths.values()), {"image": case.inputs()["x"]})
    return {name: found[path] for name, path in paths.items()}


def latency_and_groups(case: Case) -> dict[str, Tensor]:
    table = stand_in_table()
    found = {"latency_ms": torch.tensor([1000 * table.at(point) for point in case.config["points"]])}
    found["table_sum_ms"] = (1000 * table.seconds.sum()).view(1)
    for name, criteria in case.inputs().items():
        index = int(name.removeprefix("criteria"))
        found[f"group_sums{index}"], members = pruning.groups_of(criteria, pruning.kind_of(index))
        found[f"order{index}"] = torch.cat(members)
    return found


def saliency(case: Case) -> dict[str, Tensor]:
    config, table = case.config, stand_in_table()
    depth, width = config["depth"], config["embed_dim"]
    model: Any = tersor.models.load(
        "nvit",
        case.state_dict(),
        embed_dim=width,
        heads=(12,) * depth,
        qk=(config["qk_per_head"],) * depth,
        v=(config["v_per_head"],) * depth,
        mlp=(width * config["mlp_ratio"],) * depth,
        num_classes=config["num_classes"],
        img_size=config["img_size"],
        patch_size=config["patch_size"],
    ).double()
    only = "" if "only" not in config["prunable"] else config["prunable"]
    fixed = [kind for kind in pruning.KINDS if only and not only.startswith(kind)]
    inputs = case.inputs()
    first = capture(model, ["head", "head_dist"], {"image": inputs["x0"].double()})
    found: dict[str, Tensor] = {"logits": first["head"], "logits_dist": first["head_dist"]}

    gates, criteria = pruning.open_gates(model), None
    for iteration in range(2):
        totals = None
        for n in (2 * iteration, 2 * iteration + 1):
            model.zero_grad()
            loss = F.cross_entropy(model(inputs[f"x{n}"].double()), inputs[f"y{n}"])
            loss.backward()
            found.setdefault("loss", loss.detach().view(1))
            new = pruning.criteria_of(model, fixed)
            totals = new if totals is None else [a + b for a, b in zip(totals, new, strict=True)]
        criteria = pruning.with_momentum(criteria, [each / 2 for each in totals], config["pruning_momentum"])
        emb_before = int(gates[0].sum())
        gates, threshold = pruning.prune_step(
            criteria,
            gates,
            table,
            steps_done=config["first_pruning_iterations_done"] + iteration,
            per_step=config["prune_per_iteration"],
            most=config["prune_neurons_max"],
            weight=config["latency_regularization"],
            fixed=fixed,
        )
        pruning.zero_pruned(model, gates)
        found[f"threshold{iteration}"] = torch.tensor([threshold], dtype=torch.float64)
        found[f"latency{iteration}"] = torch.tensor([pruning.latency(gates, table, emb=emb_before)])
        for what, lists in (("criteria", criteria), ("gates", [gate.double() for gate in gates])):
            found[f"{what}{iteration}/emb"] = lists[0]
            for offset, kind in enumerate(pruning.KINDS[1:]):
                found[f"{what}{iteration}/{kind}"] = torch.stack(lists[1 + offset :: 4])
    # The cases hold the embedding's gates by reference: both copies show the end. That it had more channels after the first
    # step is seen in latency1, which is estimated with them.
    found["gates0/emb"] = found["gates1/emb"]
    found["logits_after"] = capture(model, ["head"], {"image": inputs["x0"].double()})["head"]
    return found
