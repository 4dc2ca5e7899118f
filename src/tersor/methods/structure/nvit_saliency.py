"""The arithmetic of NViT's global structural pruning: which units of a vision transformer matter least (arXiv 2110.04869).

It works on the model `nvit` at full width, whose pruned units are zeroed. Units lie in lists. List 0 has the D channels of the
embedding; then come, for each block, its heads, its query/key channels (one index in all heads), its value channels, and its
MLP's hidden units. Each unit has a gate, which is True while the unit is there.

    g_u = sum of parameter * gradient over the unit's parameters / divisor        first-order change of the loss
    criterion = g_u^2                                                             the Gauss-Newton form of second order
    value of a group = sum over its members of (criterion - weight * seconds saved by one unit less)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tersor.methods.structure.nvit_latency import LatencyTable

KINDS = ("emb", "head", "qk", "v", "mlp")
GROUP = {"emb": 16, "head": 2, "qk": 8, "v": 8, "mlp": 16}
LEAST = {"emb": 0, "head": 2, "qk": 8, "v": 8, "mlp": 16}  # from this width on, pruning more saves no time
FIXED = 1e5  # criterion of a unit that must not be pruned
GROUP_OPTION = 16  # a constant of the published index arithmetic, whatever the size of groups
Model = Any  # tersor.models' nvit
Gates = list[Tensor]


def kind_of(index: int) -> str:
    return "emb" if index == 0 else KINDS[1 + (index - 1) % 4]


def open_gates(model: Model) -> Gates:
    """Gates for all units, open: one bool tensor per list, on the model's device."""
    config, device = model.config, model.pos_embed.device
    widths = [config.embed_dim]
    for each in zip(config.heads, config.qk, config.v, config.mlp, strict=True):
        widths += each
    return [torch.ones(width, dtype=torch.bool, device=device) for width in widths]


def unit_sums(model: Model, of: Callable[[nn.Parameter], Tensor]) -> list[Tensor]:
    """For every unit, the sum of of(parameter) over the parameters in its criterion, before dividing."""
    config = model.config
    emb = of(model.patch_embed.proj.weight).flatten(1).sum(1) + of(model.patch_embed.proj.bias)
    lists = []
    for n, block in enumerate(model.blocks):
        heads = config.heads[n]
        qkv, proj, fc1, fc2 = block.attn.qkv, block.attn.proj.proj, block.mlp.fc1, block.mlp.fc2
        weights = {name: of(getattr(qkv, name).weight) for name in "QKV"}
        rows = {name: weight.sum(1) for name, weight in weights.items()}
        for name in "QKV":
            bias = getattr(qkv, name).bias
            rows[name] = (rows[name] if bias is None else rows[name] + of(bias)).view(heads, -1)  # [h, q or v]
        emb = emb + of(proj.weight).sum(1) + of(proj.bias) + of(fc2.weight).sum(1) + of(fc2.bias)
        first = of(fc1.weight)
        emb = emb + first.sum(0) + sum(weight.sum(0) for weight in weights.values())
        head = rows["Q"].sum(1) + rows["K"].sum(1) + rows["V"].sum(1)
        lists += [head, rows["Q"].sum(0), rows["V"].sum(0), first.sum(1) + of(fc1.bias)]
    return [emb, *lists]


def criteria_of(model: Model, fixed: Sequence[str] = ()) -> list[Tensor]:
    """The criterion of every unit, from the gradients of the last batch."""
    divisor = {"emb": len(model.blocks), "head": 12, "qk": 2, "v": 2, "mlp": 1}
    found = []
    for index, total in enumerate(unit_sums(model, _change)):
        g = torch.nan_to_num(total / divisor[kind_of(index)], nan=0.0, posinf=0.0, neginf=0.0)
        found.append(torch.where(g != 0, FIXED, g) if kind_of(index) in fixed else g.square())
    return found


def _change(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return (parameter * parameter.grad).detach()


def with_momentum(old: list[Tensor] | None, new: list[Tensor], momentum: float = 0.9) -> list[Tensor]:
    return new if old is None else [momentum * a + (1 - momentum) * b for a, b in zip(old, new, strict=True)]


def widths_of(gates: Gates) -> list[list[int]]:
    """emb, heads, qk, v, mlp of each block."""
    counts = [int(gate.sum()) for gate in gates]
    return [[counts[0], *counts[first : first + 4]] for first in range(1, len(counts), 4)]


def latency(gates: Gates, table: LatencyTable, *, emb: int | None = None) -> float:
    """Seconds of all blocks and of what lies outside. emb: the width of the embedding; by default that of the gates."""
    blocks = widths_of(gates)
    width = blocks[0][0] if emb is None else emb
    return sum(table.at([width, *widths[1:]]) for widths in blocks) + table.beside_blocks(width)


def seconds_saved(gates: Gates, table: LatencyTable) -> list[float]:
    """The seconds that one unit less of each list saves; for the embedding, in all blocks together."""
    saved = [0.0] * len(gates)
    for n, widths in enumerate(widths_of(gates)):
        whole = table.at(widths)
        for axis, kind in enumerate(KINDS):
            if widths[axis] <= LEAST[kind]:
                continue
            fewer = [*widths[:axis], widths[axis] - 1, *widths[axis + 1 :]]
            saved[0 if axis == 0 else 4 * n + axis] += whole - table.at(fewer)
    return saved


def groups_of(criteria: Tensor, kind: str) -> tuple[Tensor, list[Tensor]]:
    """Values of the groups (sums of their members), and the members, in rising order."""
    order = criteria.argsort(stable=True)
    members = list(torch.split(order, GROUP[kind]))
    return torch.stack([criteria[each].sum() for each in members]), members


def prune_step(
    criteria: Sequence[Tensor],
    gates: Gates,
    table: LatencyTable,
    *,
    steps_done: int,
    per_step: int,
    most: int,
    weight: float,
    fixed: Sequence[str] = (),
) -> tuple[Gates, float]:
    """The gates after one global step, and the threshold. steps_done: how many steps came before; together they aim at
    steps_done * per_step pruned units, at most `most`. One group of every list survives."""
    saved = seconds_saved(gates, table)
    grouped = []
    for index, (values, gate) in enumerate(zip(criteria, gates, strict=True)):
        masked = values * gate
        if kind_of(index) not in fixed:
            masked = masked - weight * saved[index]
        grouped.append(groups_of(masked, kind_of(index)))
    everything = torch.cat([values for values, _ in grouped]).sort().values
    n = min(max(steps_done * per_step // GROUP_OPTION - 1, 0), most // GROUP_OPTION - 1, len(everything) - 1)
    threshold = everything[max(n, 0)]
    after = [gate.clone() for gate in gates]
    for index, (gate, (values, members)) in enumerate(zip(after, grouped, strict=True)):
        if kind_of(index) in fixed:  # their groups only take places in the order
            continue
        for value, chosen in list(zip(values, members, strict=True))[:-1]:
            if value <= threshold:
                gate[chosen] = False
    return after, float(threshold)


@torch.no_grad()
def zero_pruned(model: Model, gates: Gates) -> None:
    """Set the parameters of the units whose gates are closed to zero."""
    config = model.config
    emb = ~gates[0]
    for token in (model.cls_token, model.dist_token, model.pos_embed):
        if token is not None:
            token[..., emb] = 0
    model.patch_embed.proj.weight[emb] = 0
    model.patch_embed.proj.bias[emb] = 0
    for norm in (model.norm, *(each for block in model.blocks for each in (block.norm1, block.norm2))):
        norm.weight[emb] = 0
        norm.bias[emb] = 0
    for head in (model.head, model.head_dist):
        if head is not None:
            head.weight[:, emb] = 0
    for n, block in enumerate(model.blocks):
        heads, qk, v, mlp = (~gate for gate in gates[1 + 4 * n : 5 + 4 * n])
        qkv, proj, fc1, fc2 = block.attn.qkv, block.attn.proj.proj, block.mlp.fc1, block.mlp.fc2
        count = config.heads[n]
        for name, channels in (("Q", qk), ("K", qk), ("V", v)):
            layer = getattr(qkv, name)
            rows = (heads[:, None] | channels[None]).flatten()
            layer.weight[rows] = 0
            layer.weight[:, emb] = 0
            if layer.bias is not None:
                layer.bias[rows] = 0
        proj.weight[:, (heads[:, None] | v[None]).view(count, -1).flatten()] = 0
        for layer in (proj, fc2):
            layer.weight[emb] = 0
            layer.bias[emb] = 0
        fc1.weight[:, emb] = 0
        fc1.weight[mlp] = 0
        fc1.bias[mlp] = 0
        fc2.weight[:, mlp] = 0


def dense_parts(model: Model, gates: Gates) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The model `nvit` without the pruned units: the entries of its config that change, and its tensors."""
    config = model.config
    emb, blocks = gates[0], widths_of(gates)
    changed: dict[str, Any] = {
        "embed_dim": int(emb.sum()),
        "norm_width": config.norm_width or config.embed_dim,
        **{name: tuple(each[axis] for each in blocks) for axis, name in enumerate(("heads", "qk", "v", "mlp"), 1)},
    }
    tensors = {}
    for name, value in model.state_dict().items():
        tensor = value
        part = name.rpartition(".")[2]
        if name.startswith("blocks."):
            n = int(name.split(".")[1])
            heads, qk, v, mlp = gates[1 + 4 * n : 5 + 4 * n]
            rows = cols = emb
            if ".attn.qkv." in name:
                rows = (heads[:, None] & (v if ".V." in name else qk)[None]).flatten()
            elif ".attn.proj." in name:
                cols = (heads[:, None] & v[None]).flatten()
            elif ".mlp.fc1." in name:
                rows = mlp
            elif ".mlp.fc2." in name:
                cols = mlp
            if part != "token_mask":
                tensor = tensor[rows]
                tensor = tensor[:, cols] if part == "weight" and tensor.dim() == 2 else tensor
        elif name.startswith("head"):
            tensor = tensor[:, emb] if part == "weight" else tensor
        elif name in ("cls_token", "dist_token", "pos_embed"):
            tensor = tensor[..., emb]
        else:  # patch_embed.proj, norm
            tensor = tensor[emb]
        tensors[name] = tensor.clone()
    return changed, tensors
