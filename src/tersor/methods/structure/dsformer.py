"""DSFormer: weights as a sparse matrix times a small dense one, trained together with the choice of what is sparse (arXiv
2312.13211).

What it is for: a transformer with a half to a quarter of the numbers, where low rank loses too much. Each output combines a few
of the layer's k basis vectors, each output different ones; with low rank all outputs share one small space.

    tersor compress dsformer demo --ratio 2 --samples 64 --seq-len 128 --out smaller

    result = tersor.compress("demo", DSFormer(ratio=2.8, epochs=5), samples=64, seq_len=128)

Each linear map of the model's blocks is cut into parts W [p, q]; by default there is one, the whole weight (`rows`, `columns`):

    W ≈ S D        D [k, q] of unit rows, S [p, k] with s numbers in every row           layers/dense_sparse.py
    size           k q + s p (1 + ⌈log2 k⌉ / 32) instead of p q; k is the largest for which that is p q / ratio at most

    start          coding by orthogonal matching pursuit and the basis by least squares, by turns (sparse_coding.py);
                   `weighted` fits the layer's outputs on the samples instead of its weights
    training       a dense Z [p, k] stands behind S: in each row the s entries of the largest |z| ‖d‖ count, and all get the
                   gradient of S, so that others can enter (straight through). D, Z, biases and all else learn together by
                   AdamW, with warm-up and linear decay; what is chosen stays in the last fifth of the steps

Loss `distill`: the KL divergence from the original's predictions for a model with `logits`, else the mean squared error of its
first output relative to the output. Loss `task`: cross entropy with `target` where this is whole numbers, else mean absolute
error; for a language model the cross entropy of the next tokens. Padding does not count.

Embeddings, norms, output heads, convolutions and layers whose weight is shared stay as they are.

Origin: no code was published, and only the abstract could be read. Our own: the form of blocks, the matching pursuit, unit
basis vectors, latent coefficients without weight decay, freezing, the rates. Of equal entries the first is kept.

It is not faster where few tokens run at once. On a CPU at 2.8x, a layer of any shape is slower than the dense one for a single
token. Layers with wide inputs gain from 16 or 64 tokens on, square layers at 256, and layers with more outputs than inputs not
even there (benchmarks/results/dense_sparse.md).

Proven: the property checks (exact where it can be, nested, better than low rank of equal size on a union of subspaces, gradients,
supports that are learned beat supports that are fixed, size by the formula) and results saved and loaded equal. Measured: on
`demo`, after equal training, it loses less than low rank by three kinds of SVD at 2, 2.8 and 3.57 times smaller with `weighted`,
and without that only at 2; on a sentence encoder it loses less at 2 times too (benchmarks/results/dsformer_svd.md). Not proven:
the published scores.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.calibrate.batches import Batch, call, first_tensor
from tersor.calibrate.blocks import find_blocks
from tersor.errors import TersorError
from tersor.layers.dense_sparse import DenseSparse, index_bits, joined_blocks, split_blocks
from tersor.layers.linear_map import is_conv1d, linear_maps, matrix_shape, weight_matrix
from tersor.layers.straight_through import straight_through
from tersor.methods.method import ModelMethod, Report, Work, option, register
from tersor.methods.structure.block_stack import batches_of
from tersor.methods.structure.factorize import shared_layers
from tersor.methods.structure.greenformers import input_hessians
from tersor.methods.structure.sparse_coding import learn, project, support

DAMP = 0.01  # of the mean diagonal of Σ x xᵀ
FROZEN = 0.2  # of the steps: the last ones, in which the choice stays
WARM_UP = 0.1  # of the steps
LOSSES = ("distill", "task")


@dataclass(frozen=True)
class Sparsified(Report):
    """One layer."""

    outputs: int
    inputs: int
    basis: int  # k
    nonzeros: int  # s
    ratio: float  # its weight's size before, divided by the size now
    lost: float  # the share of the squares of its weight (weighted: of its outputs) that the start lost


@register
@dataclass(frozen=True)
class DSFormer(ModelMethod):
    """Write weights as a sparse times a small dense matrix, and train through the choice of what is sparse."""

    name: ClassVar[str] = "dsformer"
    survey_nodes: ClassVar[tuple[str, ...]] = (
        "inference/lightweight-factorised",
        "inference/pruning-unstructured",
        "inference/distillation-logits",
        "practical/low-rank",
        "practical/pruning",
    )

    ratio: float = option(2.0, "how many times smaller each weight becomes", above=1, most=1000)
    nonzeros: float = option(
        0.25,
        "numbers in a row of the sparse matrix; below 1 their share of the basis",
        check=lambda v: 0 < v < 1 or (v >= 1 and v == int(v)),
        allowed="a share between 0 and 1, or a whole number",
    )
    rows: int = option(0, "outputs in a block; 0: all", least=0)
    columns: int = option(0, "inputs in a block; 0: all", least=0)
    rounds: int = option(10, "rounds of coding at the start", least=0)
    weighted: bool = option(False, "start from what fits the outputs for the samples instead of the weights")
    loss: str = option("distill", "distill or task", choices=LOSSES)
    epochs: int = option(3, "rounds of training over the samples; 0: none", least=0)
    batch_size: int = option(8, "samples a step", least=1)
    lr: float = option(5e-5, "learning rate of AdamW", least=0)
    latent_lr: float = option(1e-3, "learning rate of the latent coefficients", least=0)

    @property
    def trains(self) -> bool:
        return self.epochs > 0

    @property
    def needs_samples(self) -> bool:
        return self.weighted or self.epochs > 0

    def compress_model(self, model: nn.Module, work: Work) -> nn.Module:
        layers = sparsifiable(model, work)
        sizes = {name: self.sizes(name, *matrix_shape(layer)) for name, layer in layers.items()}
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        dtype = next(model.parameters()).dtype
        if dtype.itemsize < torch.float32.itemsize:
            model.float()  # in 16 bits, small steps of training are lost
        teacher = copy.deepcopy(model).eval().requires_grad_(False) if self.epochs else None
        hessians: Mapping[str, Tensor] = {}
        with torch.no_grad():
            if self.weighted:
                hessians = input_hessians(model, layers, work)
            chance = torch.Generator().manual_seed(0)
            for n, (name, layer) in enumerate(layers.items()):
                latent, lost = self._start(layer, *sizes[name], hessians.get(name), chance)
                model.set_submodule(name, latent)
                work.report(Sparsified(name, *matrix_shape(layer), *sizes[name][2:], size_ratio(*sizes[name]), lost))
                work.progress("coding", n + 1, len(layers))
        if teacher is not None:
            train(model, teacher, self, work)
        for name, layer in layers.items():
            trained = model.get_submodule(name)
            assert isinstance(trained, StraightThroughFactors)
            model.set_submodule(name, trained.exported(layer))
        for name, parameter in model.named_parameters():  # not buffers, which may have more precision than the weights
            parameter.data = parameter.data.to(dtypes.get(name, dtype))
        return model

    def sizes(self, name: str, outputs: int, inputs: int) -> tuple[int, int, int, int]:
        """p, q, k and s of a layer. Raises TersorError where blocks or the ratio do not fit."""
        p, q = self.rows or outputs, self.columns or inputs
        if outputs % p or inputs % q:
            raise TersorError(f"{name} of {outputs} x {inputs} cannot be cut into blocks of {p} x {q}")
        for k in range(p, 0, -1):
            s = max(1, round(self.nonzeros * k)) if self.nonzeros < 1 else int(self.nonzeros)
            if s <= k and size_ratio(p, q, k, s) >= self.ratio:
                return p, q, k, s
        raise TersorError(
            f"{name}: no basis makes blocks of {p} x {q} {self.ratio:g} times smaller with nonzeros={self.nonzeros:g}"
        )

    def _start(
        self, layer: nn.Module, p: int, q: int, k: int, s: int, H: Tensor | None, chance: torch.Generator
    ) -> tuple[StraightThroughFactors, float]:
        """The factors to train, and what they lose. H: Σ x xᵀ of the layer's inputs, where outputs are fitted."""
        W = split_blocks(weight_matrix(layer).double(), p, q)
        weighted, back = W, None
        if H is not None:
            root, back = roots(H, q)
            parts = torch.arange(len(W)) % len(root)  # the number of each block within its row of blocks
            weighted, back = W @ root[parts], back[parts]
        S, D = learn(weighted, k, s, self.rounds, chance)
        lost = float((weighted - S @ D).square().sum() / weighted.square().sum().clamp(min=1e-300))
        if back is not None:
            D = D @ back
            lengths = D.norm(dim=-1, keepdim=True).clamp(min=1e-30)
            S, D = S * lengths.mT, D / lengths
        return StraightThroughFactors(layer, S, D, s), lost


class StraightThroughFactors(nn.Module):
    """The layer while it learns: W = S D. S holds the entries of the latent Z that count; all of Z gets the gradient of S.

    latent: Z [blocks, p, k]. basis: D [blocks, k, q]. support: the entries that count, [blocks, p, k]; None while they may
    change.
    """

    def __init__(self, layer: nn.Module, S: Tensor, D: Tensor, nonzeros: int) -> None:
        super().__init__()
        outputs, inputs = matrix_shape(layer)
        weight = weight_matrix(layer)
        self.nonzeros, self.grid = nonzeros, (outputs // S.shape[1], inputs // D.shape[2])
        self.latent, self.basis = nn.Parameter(S.to(weight.dtype)), nn.Parameter(D.to(weight.dtype))
        self.bias: nn.Parameter | None = getattr(layer, "bias", None)
        self.support: Tensor | None = None

    def sparse(self) -> Tensor:
        """S [blocks, p, k]. Its gradients go to all of Z, or, where the support is set, to the entries of that."""
        if self.support is not None:
            return self.latent * self.support
        return straight_through(project(self.latent, self.basis, self.nonzeros), self.latent)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, joined_blocks(self.sparse() @ self.basis, self.grid), self.bias)

    @torch.no_grad()
    def exported(self, layer: nn.Module) -> DenseSparse:
        """The layer to save in place of the original."""
        S = self.sparse()
        described = {"rows": S.shape[1], "columns": self.basis.shape[2], "basis": S.shape[2], "nonzeros": self.nonzeros}
        made = DenseSparse.in_place_of(layer, **described)
        made.set_factors(S, self.basis)
        made.bias = self.bias
        return made.train(layer.training)


def train(model: nn.Module, teacher: nn.Module, method: DSFormer, work: Work) -> None:
    """Train the whole model to compute what the teacher does. Latent coefficients have a rate of their own."""
    batches = batches_of(work, method.batch_size, labelled=True)
    latents = {id(m.latent): m.latent for m in model.modules() if isinstance(m, StraightThroughFactors)}
    learned = {id(p): p.requires_grad for p in model.parameters()}
    model.requires_grad_(True)
    others = [p for p in model.parameters() if id(p) not in latents]
    groups: list[dict[str, Any]] = [
        {"params": list(latents.values()), "lr": method.latent_lr, "weight_decay": 0.0},
        {"params": [p for p in others if p.dim() > 1], "lr": method.lr},
        {"params": [p for p in others if p.dim() <= 1], "lr": method.lr, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.01)
    steps = method.epochs * len(batches)
    warm = max(1, int(WARM_UP * steps))
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    chance = torch.Generator().manual_seed(0)
    for step in range(steps):
        if step % len(batches) == 0:
            order = torch.randperm(len(batches), generator=chance).tolist()
        if step == int((1 - FROZEN) * steps):
            freeze(model)
        batch = batches[order[step % len(batches)]]
        optimizer.zero_grad()
        loss = loss_of(model, teacher, batch, method.loss)
        if not math.isfinite(float(loss.detach())):
            raise TersorError(f"the loss is not finite at step {step + 1}: a lower lr may help")
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        work.progress(f"training, loss {float(loss.detach()):.4g}", step + 1, steps)
    for parameter in model.parameters():
        parameter.requires_grad_(learned[id(parameter)])


@torch.no_grad()
def freeze(model: nn.Module) -> None:
    """Fix the entries that count."""
    for module in model.modules():
        if isinstance(module, StraightThroughFactors):
            module.support = support(module.latent, module.basis, module.nonzeros)


def loss_of(model: nn.Module, teacher: nn.Module, batch: Batch, kind: str) -> Tensor:
    """The loss on a batch, as the module's docstring says; `target` holds labels, where there are any. Raises TersorError where
    the task is not known."""
    inputs = {name: value for name, value in batch.items() if name != "target"}
    made = call(model, inputs)
    output, predicts = first_tensor(made), isinstance(getattr(made, "logits", None), Tensor)
    if output is None:
        raise TersorError(f"{type(model).__name__} gives no tensor to train on")
    ids, real = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(real, Tensor) or output.dim() != 3 or real.shape != output.shape[:2]:
        real = torch.ones(output.shape[:-1], device=output.device)
    if kind == "distill":
        with torch.no_grad():
            wanted = first_tensor(call(teacher, inputs))
        assert wanted is not None
        if predicts:
            losses = F.kl_div(output.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        else:
            losses = (output - wanted).square().sum(-1) / wanted.square().sum(-1).mean().clamp(min=1e-30)
        return (losses * real).sum() / real.sum()
    target = batch.get("target")
    if isinstance(target, Tensor):
        if target.is_floating_point():
            if target.numel() != output.numel():
                raise TersorError(f"the target is {tuple(target.shape)}, the model gives {tuple(output.shape)}")
            return F.l1_loss(output, target.view_as(output))
        return F.cross_entropy(output.flatten(0, -2), target.flatten().long())
    if not isinstance(ids, Tensor) or not predicts or output.dim() != 3 or output.shape[:2] != ids.shape:
        raise TersorError("loss='task' needs a language model, or samples with a target: use loss='distill'")
    following = ids[:, 1:].masked_fill(real[:, 1:] == 0, -100)
    return F.cross_entropy(output[:, :-1].flatten(0, 1), following.flatten())


def sparsifiable(model: nn.Module, work: Work) -> dict[str, nn.Module]:
    """The linear maps of the model's repeated blocks; of the whole model where nothing is repeated. Raises TersorError where
    there are none."""
    shared, found = shared_layers(model), {}
    for unit in find_blocks(model):
        for inside, layer in linear_maps(unit.module).items():
            name = ".".join(filter(None, (unit.name, inside)))
            if (type(layer) is nn.Linear or is_conv1d(layer)) and name not in shared and work.wanted(name):
                assert isinstance(layer, nn.Module)
                found[name] = layer
    if not found:
        raise TersorError(f"there is no linear map to factorize in this {type(model).__name__}")
    return found


def size_ratio(p: int, q: int, k: int, s: int) -> float:
    """The size of a dense block [p, q] divided by that of its factors. A place of ⌈log2 k⌉ bits counts as that share of 32."""
    return p * q / (k * q + s * p * (1 + index_bits(k) / 32))


def roots(H: Tensor, q: int) -> tuple[Tensor, Tensor]:
    """H^½ and H^-½ of each block [q, q] on the diagonal of H [in, in], damped: [in / q, q, q] each."""
    blocks = torch.stack([H[n : n + q, n : n + q].double() for n in range(0, len(H), q)])
    diagonal = blocks.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)
    values, vectors = torch.linalg.eigh(blocks + DAMP * diagonal[:, None, None] * torch.eye(q).to(blocks))
    scaled = values.clamp(min=1e-30).sqrt()[:, None]
    return (vectors * scaled) @ vectors.mT, (vectors / scaled) @ vectors.mT
