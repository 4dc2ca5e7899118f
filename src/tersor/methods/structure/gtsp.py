"""GTSP: prune the nodes, heads, layers and weights of a graph transformer.

Paper: Liu et al., "Exploring Sparsity in Graph Transformers", 2023.

What it is for: a trained GraphGPS that is to take fewer operations, or fewer weights. The model goes on training while it is
pruned, so the method needs graphs with their targets, as batches of the model's own inputs:

    batches = [{"x": x, "edge_index": edges, "edge_attr": kinds, "batch": graph_of_node, "target": y}, ...]
    result = tersor.compress(model, GTSP(tokens=0.5, heads=0.5, epochs=20), calibration=batches, format=None)
    result.save("smaller")                            # tersor.load gives it back

Four axes, each 1 (left as it is) unless asked:

    tokens    the share of a graph's nodes that attention runs over in each layer, chosen by a learned score
              (layers/pruned_graph_attention.py)
    heads     the share of heads that live. A random choice begins; at every update ⌈prune_rate · alive⌉ of least importance
              die and as many of the dead with the largest gradient come back. Dead heads are taken out in the end: what
              such a head still adds, its value's bias, becomes part of the output's
    attention_layers
              the share of layers, rounded, that keep their attention. The attention goes that the loss on the samples misses
              least, one layer after another, before the training; message passing and MLP stay. `drop_path` is the
              published study of this axis: each node skips attention with this probability while training, and nothing goes
    weights   the density of the layers' linear maps in the end, by `schedule` (gtsp_schedule.py): granet, gmp, dst, uniform.
              Zeros stay in their tensors: they save operations only on hardware, and space only in formats, that use them

Training: Adam over the samples in random order, `epochs` times; batch norm learns too. Loss: cross entropy for whole numbers
as `target` (-100 where a node has none), mean absolute error for others, and without targets the mean squared error to what
the model computed before. Updates come every `update_frequency` steps; weights fall between 10 and 80 percent of the
training, as published, and `prune_rate` of granet and dst falls from its value to a hundredth by a cosine.

Origin: LiuChuang0059/GTSP at 734fc4c (no licence stated; nothing was copied). What differs: nodes that are not chosen leave
attention, so that operations are saved; `published_tokens` masks them as published, where they are keys of zeros, padding
competes, and noise is drawn while predicting. Published are the axes one by one; here they can go together.

Proven: the golden cases (a layer with masked nodes, the worth of heads, masks of granet over three updates); ratio 1 is the
base layer; straight-through gradients; the cubic schedule; constant numbers of alive heads and weights; heads taken out
without a change of the outputs; the expectation of drop_path; results saved and loaded equal. Measured on Cora:
benchmarks/results/graph_pruning.md. Not proven: the published accuracies, and the paper's number of heads that die.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.calibrate.batches import Batch, call, without_target
from tersor.errors import TersorError
from tersor.layers.linear_map import linear_maps, matrix_shape, weight_matrix
from tersor.layers.pruned_graph_attention import PrunedGraphAttention, kept_nodes
from tersor.methods.method import ModelMethod, Report, Work, option, register
from tersor.methods.structure.gtsp_schedule import (
    WAYS,
    Curve,
    apply_masks,
    head_scores,
    prune_uniformly,
    update_heads,
    update_weights,
)

WINDOW = (0.1, 0.8)  # of the training, in which the density of the weights falls
LAST_RATE = 0.01  # of prune_rate, at the end of the training
SHARE: dict[str, Any] = {"above": 0, "most": 1}


@dataclass(frozen=True)
class PrunedLayer(Report):
    """One layer."""

    heads: int  # that are left
    tokens: float  # the share of the nodes that attention sees
    density: float  # the share of the weights that are not 0
    operations: float  # on the samples, as a share of the unpruned layer's


@register
@dataclass(frozen=True)
class GTSP(ModelMethod):
    """Prune nodes, heads, layers and weights of a graph transformer while it trains on."""

    name: ClassVar[str] = "gtsp"
    survey_nodes: ClassVar[tuple[str, ...]] = (
        "inference/pruning-joint",
        "inference/pruning-heads",
        "inference/pruning-layers",
        "inference/pruning-unstructured",
        "inference/pruning-tokens",
        "practical/pruning",
    )

    tokens: float = option(1.0, "share of a graph's nodes that attention runs over", **SHARE)
    heads: float = option(1.0, "share of each layer's heads that is left", **SHARE)
    attention_layers: float = option(1.0, "share of the layers that keep their attention", least=0, most=1)
    weights: float = option(1.0, "density of the layers' weights in the end", **SHARE)
    schedule: str = option("granet", "how weights go: granet, gmp, dst or uniform", choices=WAYS)
    drop_path: float = option(0.0, "probability that a node skips attention while training", least=0, below=1)
    published_tokens: bool = option(False, "mask nodes as published, which saves no operations")
    epochs: int = option(100, "rounds over the samples", least=0)
    update_frequency: int = option(200, "steps between updates of heads and weights", least=1)
    prune_rate: float = option(0.5, "share of those alive that dies at an update", least=0, below=1)
    lr: float = option(1e-3, "learning rate of Adam", least=0)
    weight_decay: float = option(1e-5, "weight decay of Adam", least=0)

    @property
    def trains(self) -> bool:
        return self.epochs > 0

    def compress_model(self, model: nn.Module, work: Work) -> nn.Module:
        names = attention_names(model, work)
        steps = self.epochs * len(work.samples)
        curve = Curve(1.0, self.weights, int(WINDOW[0] * steps), int(WINDOW[1] * steps), self.update_frequency)
        if self.weights < 1 and len(curve.updates()) < 2:
            raise TersorError(
                f"weights={self.weights:g} cannot be reached: {self.epochs} epochs of {len(work.samples)} batches have "
                f"{len(curve.updates())} updates of the weights; give more epochs or a lower update_frequency"
            )
        if self.heads < 1 and steps < self.update_frequency:
            raise TersorError(
                f"heads={self.heads:g} would stay a choice at random: {steps} steps have no update of the heads; "
                "give more epochs or a lower update_frequency"
            )
        before = layer_operations(model, work.samples)
        lesson = Lesson(model, work.samples)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for name in names:
                model.set_submodule(name, self._attention(model.get_submodule(name), 1.0))
        bare = self._without_attention(model, names, lesson, work)
        self._train(model, [name for name in names if name not in bare], lesson, curve, work)
        after = layer_operations(model, work.samples)
        for name in (name.rpartition(".")[0] for name in names):
            self._report(model, name, after[name] / before[name], work)
        return model

    def _report(self, model: nn.Module, name: str, operations: float, work: Work) -> None:
        layer = model.get_submodule(name)
        attention = layer.get_submodule("self_attn")
        assert isinstance(attention, PrunedGraphAttention)
        sizes = [(int((w != 0).sum()), w.numel()) for w in prunable(layer, "", work).values()]
        density = sum(alive for alive, _ in sizes) / max(1, sum(size for _, size in sizes))
        tokens = attention.token_ratio if attention.heads else 0.0
        work.report(PrunedLayer(name, attention.heads, tokens, density, operations))

    def _attention(self, original: nn.Module, density: float) -> PrunedGraphAttention:
        """The pruned attention, with the weights of the original, which may have been pruned before. density: of heads; 0 for
        none."""
        heads: int = original.heads  # type: ignore[assignment]
        width = matrix_shape(original.get_submodule("out_proj"))[1]
        made = PrunedGraphAttention.in_place_of(
            original,
            heads=heads if density else 0,
            head_dim=width // heads,
            token_ratio=self.tokens if self.tokens < 1 else getattr(original, "token_ratio", 1.0),
            masked=self.published_tokens or getattr(original, "masked", False),
            drop_path=self.drop_path,
        )
        if density:
            made.load_state_dict(original.state_dict(), strict=False)
        return made.train(original.training)

    def _without_attention(self, model: nn.Module, names: Sequence[str], lesson: Lesson, work: Work) -> set[str]:
        """Take the attention out of as many layers as asked; first from those where the loss rises least."""
        gone: set[str] = set()
        while len(gone) < len(names) - round(self.attention_layers * len(names)):
            losses = {}
            for name in (name for name in names if name not in gone):
                kept = model.get_submodule(name)
                model.set_submodule(name, self._attention(kept, 0.0))
                losses[name] = lesson.mean_loss()
                model.set_submodule(name, kept)
            least = min(losses, key=lambda name: losses[name])
            model.set_submodule(least, self._attention(model.get_submodule(least), 0.0))
            gone.add(least)
            work.progress("choosing layers", len(gone), len(names))
        return gone

    def _train(self, model: nn.Module, names: Sequence[str], lesson: Lesson, curve: Curve, work: Work) -> None:
        chance = torch.Generator().manual_seed(0)
        pruner = Pruner(self, model, names, curve, work, chance)
        optimizer = torch.optim.Adam(model.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        steps, learned = self.epochs * len(work.samples), [p.requires_grad for p in model.parameters()]
        model.requires_grad_(True).train()
        with torch.random.fork_rng(), pruner.watching():
            torch.manual_seed(0)
            for step in range(steps):
                if step % len(work.samples) == 0:
                    order = torch.randperm(len(work.samples), generator=chance).tolist()
                optimizer.zero_grad()
                loss = lesson.loss(order[step % len(work.samples)])
                torch.autograd.backward(loss)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise TersorError(f"the loss is {value} at step {step}: a lower lr may help")
                optimizer.step()
                rate = LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * step / steps)) / 2
                pruner.after_step(step + 1, self.prune_rate * rate, optimizer)
                work.progress(f"pruning, loss {value:.4g}", step + 1, steps)
        model.eval()
        for parameter, grad in zip(model.parameters(), learned, strict=True):
            parameter.requires_grad_(grad)
        pruner.take_heads_out()


class Pruner:
    """The masks of weights, and the heads that are alive, while a model trains."""

    def __init__(
        self,
        method: GTSP,
        model: nn.Module,
        names: Sequence[str],
        curve: Curve,
        work: Work,
        chance: torch.Generator,
    ) -> None:
        self.method, self.model, self.curve = method, model, curve
        self.weights = prunable(model, "layers.", work) if method.weights < 1 else {}
        self.masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in self.weights.items()}
        if method.schedule == "dst" and self.weights:  # dst moves what is alive and starts sparse
            random = {name: torch.rand(w.shape, generator=chance).to(w) for name, w in self.weights.items()}
            self.masks = prune_uniformly(random, method.weights)
        self.alive: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        for name in names if method.heads < 1 else ():
            heads: int = model.get_submodule(name).heads  # type: ignore[assignment]
            self.alive[name] = torch.zeros(heads, dtype=torch.bool)
            self.alive[name][torch.randperm(heads, generator=chance)[: max(1, int(heads * method.heads))]] = True
        self._apply()

    def watching(self) -> Any:
        """Meanwhile the outputs of attention and their gradients are recorded."""
        hooks = [
            self.model.get_submodule(name).register_forward_hook(
                lambda _m, _i, output, name=name: self._keep(name, output)
            )
            for name in self.alive
        ]
        return _Removing(hooks)

    def _keep(self, name: str, output: Tensor) -> None:
        if output.requires_grad:
            output.retain_grad()
            self.outputs[name] = output

    def after_step(self, step: int, rate: float, optimizer: torch.optim.Optimizer) -> None:
        if step % self.method.update_frequency == 0:
            if self.weights and step >= self.curve.start:
                gradients = {
                    name: w.grad if w.grad is not None else torch.zeros_like(w) for name, w in self.weights.items()
                }
                with torch.no_grad():
                    _, self.masks = update_weights(
                        self.weights,
                        gradients,
                        self.masks,
                        way=self.method.schedule,
                        density=self.curve.density(step),
                        rate=rate,
                    )
            for name, alive in self.alive.items():
                output = self.outputs[name]
                assert output.grad is not None
                importance, growth = (each.cpu() for each in head_scores(output, output.grad, len(alive)))
                self.alive[name] = update_heads(alive, importance, growth, self.method.prune_rate)
        self._apply(optimizer)

    @torch.no_grad()
    def _apply(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        apply_masks(self.weights, self.masks)
        for name, weight in self.weights.items():
            moments = {} if optimizer is None else optimizer.state.get(weight, {})
            for key in ("exp_avg", "exp_avg_sq"):
                if key in moments:
                    moments[key].mul_(self.masks[name])
        for name, alive in self.alive.items():
            projection = self.model.get_submodule(name).get_submodule("in_proj").weight
            assert isinstance(projection, Tensor)
            projection.view(3, len(alive), -1).mul_(alive[None, :, None].to(projection))

    def take_heads_out(self) -> None:
        """Replace each attention by one that has only the heads that are alive. It computes the same."""
        for name, alive in self.alive.items():
            attention = self.model.get_submodule(name)
            assert isinstance(attention, PrunedGraphAttention)
            self.model.set_submodule(name, with_heads(attention, alive))


class Lesson:
    """The samples and the loss on each."""

    def __init__(self, model: nn.Module, samples: Sequence[Batch]) -> None:
        self.model, self.inputs = model, [without_target(sample) for sample in samples]
        self.targets = [sample.get("target") for sample in samples]
        with torch.no_grad():
            self.before = [
                call(model, each) if t is None else t for each, t in zip(self.inputs, self.targets, strict=True)
            ]

    def loss(self, n: int) -> Tensor:
        output: Tensor = call(self.model, self.inputs[n])
        target = self.targets[n]
        if target is None:
            return F.mse_loss(output, self.before[n])
        if not target.is_floating_point():
            return F.cross_entropy(output, target.long())
        if target.numel() != output.numel():
            raise TersorError(f"the target of sample {n} is {list(target.shape)}, the model gives {list(output.shape)}")
        return F.l1_loss(output, target.view_as(output))

    @torch.no_grad()
    def mean_loss(self) -> float:
        return sum(float(self.loss(n)) for n in range(len(self.inputs))) / len(self.inputs)


class _Removing:
    """Removes hooks at the end of a context."""

    def __init__(self, hooks: Sequence[Any]) -> None:
        self.hooks = hooks

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


@torch.no_grad()
def with_heads(attention: PrunedGraphAttention, alive: Tensor) -> PrunedGraphAttention:
    """The attention with only the heads that are alive. The rows of the others in the projection must be 0, except their
    biases. Such a head always outputs the bias of its value, which becomes part of the last bias."""
    made = PrunedGraphAttention(
        attention.in_proj.weight.shape[1],
        int(alive.sum()),
        attention.head_dim,
        token_ratio=attention.token_ratio,
        masked=attention.masked,
        dropout=attention.dropout,
        drop_path=attention.drop_path.rate,
    ).to(attention.in_proj.weight)
    heads, width = len(alive), attention.head_dim
    alive = alive.to(attention.in_proj.weight.device)
    weight, bias = attention.in_proj.weight.view(3, heads, width, -1), attention.in_proj.bias.view(3, heads, width)
    mixing = attention.out_proj.weight.view(-1, heads, width)  # [c, heads, head_dim]
    made.in_proj.weight.copy_(weight[:, alive].flatten(0, 2))
    made.in_proj.bias.copy_(bias[:, alive].flatten())
    made.out_proj.weight.copy_(mixing[:, alive].flatten(1))
    made.out_proj.bias.copy_(attention.out_proj.bias + (mixing[:, ~alive] * bias[2, ~alive]).sum((1, 2)))
    if made.score is not None and attention.score is not None:
        made.score.load_state_dict(attention.score.state_dict())
    return made.train(attention.training)


def attention_names(model: nn.Module, work: Work) -> list[str]:
    """The attention of each layer. Raises TersorError where the model has none that can be pruned."""
    if getattr(type(model), "system", None) != "graphgps":
        raise TersorError(
            f"{type(model).__name__} is no graph transformer that gtsp takes: those are GraphGPS (graphgps_*)"
        )
    found = []
    for name, layer in model.get_submodule("layers").named_children():
        attention = getattr(layer, "self_attn", None)
        if isinstance(attention, PrunedGraphAttention) and attention.heads == 0:
            continue  # its attention was removed before
        if not isinstance(getattr(attention, "in_proj", None), nn.Linear):
            kind = type(attention).__name__
            raise TersorError(
                f"layers.{name} has no attention that gtsp prunes ({kind}): the model's layer_type is LOCAL+Transformer"
            )
        if all(work.wanted(f"layers.{name}.self_attn.{each}") for each in ("in_proj", "out_proj")):
            found.append(f"layers.{name}.self_attn")
    if not work.samples or not found:
        raise TersorError("gtsp trains on graphs: give batches of the model's inputs, and leave it attention to prune")
    return found


def prunable(module: nn.Module, inside: str, work: Work) -> dict[str, nn.Parameter]:
    """The weights of the linear maps whose names begin with `inside`, without the maps that score nodes."""
    return {
        name: each.weight  # type: ignore[misc]
        for name, each in linear_maps(module).items()
        if name.startswith(inside) and not name.endswith("self_attn.score") and (not inside or work.wanted(name))
    }


@torch.no_grad()
def layer_operations(model: nn.Module, samples: Sequence[Batch]) -> dict[str, float]:
    """Operations of each layer on all samples: two for each product with a weight that is not 0, and for each of attention."""
    totals: dict[str, float] = {}
    layers = dict(model.get_submodule("layers").named_children())
    hooks = []

    def count(name: str, weights: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], _output: Any) -> None:
            totals[name] += 2 * weights * inputs[0].numel() // inputs[0].shape[-1]

        return hook

    def attention(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], _output: Any) -> None:
            totals[name] += attention_operations(module, inputs[1].sum(-1))

        return hook

    for key, layer in layers.items():
        totals[f"layers.{key}"] = 0.0
        for name, each in linear_maps(layer).items():
            if isinstance(each, nn.Linear) and not name.startswith("self_attn."):
                hooks.append(each.register_forward_hook(count(f"layers.{key}", int((each.weight != 0).sum()))))
        hooks.append(layer.get_submodule("self_attn").register_forward_hook(attention(f"layers.{key}")))
    for sample in samples:
        call(model, without_target(sample))
    for hook in hooks:
        hook.remove()
    return totals


def attention_operations(attention: nn.Module, nodes: Tensor) -> int:
    """Operations of an attention, pruned or not, for graphs with these numbers of nodes [G]."""
    if getattr(attention, "heads", 0) == 0:
        return 0
    products, seen = 0, nodes
    if isinstance(attention, PrunedGraphAttention) and attention.score is not None:
        products += int((attention.score.weight != 0).sum()) * int(nodes.sum())
        seen = nodes if attention.masked else kept_nodes(nodes, attention.token_ratio)
    for name in ("in_proj", "out_proj"):
        products += int((weight_matrix(attention.get_submodule(name)) != 0).sum()) * int(seen.sum())
    width = matrix_shape(attention.get_submodule("out_proj"))[1]
    return 2 * (products + 2 * width * int(seen.square().sum()))
