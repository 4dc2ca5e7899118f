"""Modern Hopfield layers: association, pooling and lookup (Ramsauer et al., ICLR 2021, arXiv 2008.02217).

What they are for: attention as an associative memory. `Hopfield` associates two sets, `HopfieldPooling` sums up a set
of any size with trainable queries (multiple-instance learning, repertoires, point sets), `HopfieldLayer` looks a state
up in trainable patterns (small tabular data). `HopfieldBags` is pooling and a classifier.

    model = tersor.models.create("hopfield_bags", input_size=32, num_heads=4)
    logits = model(bag)                                    # bag (B, S, input_size) -> (B, num_classes)
    y = Hopfield(HopfieldConfig(input_size=32))(state, stored)     # (B, T, 32), (B, S, 32) -> (B, T, 32)

State patterns R (B, T, ·) retrieve from stored patterns Y (B, S, ·), whose projections V are given out:

    q = Wq LN(R),  k = Wk LN(Y),  v = Wv LN(V)             heads of width hidden_size, v of width pattern_size
    xi = softmax(beta q k^T)                               association, (B, heads, T, S)
    q <- xi k, xi = softmax(beta q k^T), ...               update_steps_max times more, or until xi stands still
    y = Wo xi v

The update lowers E(q) = -lse(beta, k q)/beta + |q|^2/2 (`energy`). With no further step and beta = 1/sqrt(hidden_size)
it is scaled dot-product attention. Each head stops by itself once max over the batch of |xi_old - xi| (Frobenius norm
over T, S) is at most update_steps_eps.

Origin: ml-jku/hopfield-layers at f56f929 (hflayers), BSD-3. Differences: the published input tuple (stored, state,
projection) is three arguments here, of which the later ones default to the first; q, k and v are three Linear layers
here, and published checkpoints, packed (in_proj_weight) or not, are split. Quirks: `scaling` with one value a head is
tiled over the channels, channel c of all heads' takes scaling[c mod num_heads], so it is not one beta per head.
An "_as_static" pattern is not projected, so its width must be hidden_size, and is repeated for the heads: the whole batch
head by head, which is then read sample by sample, so that head h of sample b gets the pattern of sample (b H + h) mod B. A
static projection is cut into the heads instead where the stored patterns are static and the widths differ, or where it is
connected. With `pattern_projection_as_connected` the projection goes through the stored patterns' Wk before Wv. The
parameters of `concat_bias_pattern` are there, and no result depends on them.

Proven: the golden cases of the published code (self- and cross-association to convergence, padding, pooling, lookup,
static patterns in a normalised space); fixed points, retrieval, falling energy, attention as a special case; the
bit-pattern task is learnt (tests). Not proven: the published AUCs on Tiger, Fox, Elephant and UCSB.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.checks import at_least
from tersor.models.registry import register


@dataclass(frozen=True, kw_only=True)
class HopfieldConfig:
    input_size: int = 32  # of state patterns, and of what has no size of its own
    hidden_size: int | None = None  # of one head; None: input_size // num_heads
    output_size: int | None = None  # None: input_size
    pattern_size: int | None = None  # of one head's projections; None: hidden_size
    num_heads: int = 1
    scaling: float | tuple[float, ...] | None = None  # beta; None: 1 / sqrt(hidden_size), or 1 if all is static
    update_steps_max: int | tuple[int, ...] | None = 0  # None: until convergence; one value a head, of which -1 is None
    update_steps_eps: float | tuple[float, ...] = 1e-4
    normalize_stored_pattern: bool = True
    normalize_stored_pattern_affine: bool = True
    normalize_stored_pattern_eps: float = 1e-5
    normalize_state_pattern: bool = True
    normalize_state_pattern_affine: bool = True
    normalize_state_pattern_eps: float = 1e-5
    normalize_pattern_projection: bool = True
    normalize_pattern_projection_affine: bool = True
    normalize_pattern_projection_eps: float = 1e-5
    normalize_hopfield_space: bool = False  # q and k of every head
    normalize_hopfield_space_affine: bool = False
    normalize_hopfield_space_eps: float = 1e-5
    stored_pattern_as_static: bool = False
    state_pattern_as_static: bool = False
    pattern_projection_as_static: bool = False
    pattern_projection_as_connected: bool = False
    stored_pattern_size: int | None = None  # None: input_size
    pattern_projection_size: int | None = None  # None: input_size
    batch_first: bool = True
    association_activation: str | None = None  # a function of torch, on the result
    dropout: float = 0.0  # of the association
    input_bias: bool = True
    concat_bias_pattern: bool = False  # parameters of one more stored pattern, which the published code never uses
    add_zero_association: bool = False  # one more stored pattern, zero
    disable_out_projection: bool = False

    def __post_init__(self) -> None:
        if self.hidden_size is None and self.input_size % self.num_heads:
            raise TersorError(
                f"hopfield's {self.num_heads} heads do not divide input_size {self.input_size}; give hidden_size"
            )
        if isinstance(self.scaling, tuple) and len(self.scaling) != self.num_heads:
            raise TersorError(f"hopfield has {self.num_heads} heads, but scaling is {self.scaling}")
        for name in ("update_steps_max", "update_steps_eps"):
            found = getattr(self, name)
            if isinstance(found, tuple) and len(found) != self.num_heads:
                raise TersorError(f"hopfield has {self.num_heads} heads, but {name} is {found}")
        if isinstance(self.update_steps_max, int) and self.update_steps_max < 0:
            raise TersorError(f"hopfield's update_steps_max is {self.update_steps_max}; None is until convergence")
        if self.association_activation is not None and not hasattr(torch, self.association_activation):
            raise TersorError(f"hopfield's association_activation: torch has no {self.association_activation!r}")

    @property
    def head_size(self) -> int:
        return self.hidden_size or self.input_size // self.num_heads

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Widths of the stored patterns, the states and the projections."""
        given = (self.stored_pattern_size, self.input_size, self.pattern_projection_size)
        static = (self.stored_pattern_as_static, self.state_pattern_as_static, self.pattern_projection_as_static)
        stored, state, projection = (
            self.head_size if fixed else size or self.input_size for size, fixed in zip(given, static, strict=True)
        )
        return stored, state, projection

    @property
    def splits_static_projection(self) -> bool:
        """Whether a static projection is cut into the heads rather than repeated for them."""
        stored, projection = (s or self.input_size for s in (self.stored_pattern_size, self.pattern_projection_size))
        packed = stored == projection == self.input_size and self.pattern_size is None
        connected = self.pattern_projection_as_connected
        return connected or (self.stored_pattern_as_static and not packed)

    @property
    def limits(self) -> list[float]:
        """The most update steps of each head."""
        given = self.update_steps_max
        each = given if isinstance(given, tuple) else (given,) * self.num_heads
        return [math.inf if steps is None or steps < 0 else steps for steps in each]

    @property
    def result_size(self) -> int:
        if self.disable_out_projection:
            return self.num_heads * (self.pattern_size or self.head_size)
        return self.output_size or self.input_size


@dataclass(frozen=True, kw_only=True)
class HopfieldPoolingConfig(HopfieldConfig):
    quantity: int = 1  # of trainable state patterns
    trainable: bool = True


@dataclass(frozen=True, kw_only=True)
class HopfieldLayerConfig(HopfieldConfig):
    quantity: int = 1  # of trainable stored patterns
    trainable: bool = True
    lookup_weights_as_separated: bool = False  # what is given out differs from what is compared with
    lookup_targets_as_trainable: bool = True


@dataclass(frozen=True, kw_only=True)
class HopfieldBagsConfig(HopfieldPoolingConfig):
    num_classes: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("hopfield_bags", 1, num_classes=self.num_classes)


def update(state: Tensor, stored: Tensor, beta: float) -> Tensor:
    """One step of the continuous Hopfield network: state (..., T, d), stored (..., S, d) -> (..., T, d)."""
    return (beta * state @ stored.mT).softmax(-1) @ stored


def energy(state: Tensor, stored: Tensor, beta: float) -> Tensor:
    """Of each state (..., T), up to a constant of the stored patterns."""
    return state.square().sum(-1) / 2 - (beta * state @ stored.mT).logsumexp(-1) / beta


class HopfieldCore(nn.Module):
    """Stored patterns (B, S, ·), states (B, T, ·), projections (B, S, ·) -> (B, T, result_size) and the association."""

    def __init__(self, config: HopfieldConfig) -> None:
        super().__init__()
        self.config = config
        heads, head_size = config.num_heads, config.head_size
        stored, state, projection = config.sizes
        hidden, pattern = heads * head_size, heads * (config.pattern_size or head_size)
        if config.pattern_projection_as_connected and not config.stored_pattern_as_static:
            projection = hidden

        def linear(static: bool, d_in: int, d_out: int) -> nn.Linear | None:
            return None if static else _linear(d_in, d_out, config.input_bias)

        self.q_proj = linear(config.state_pattern_as_static, state, hidden)
        self.k_proj = linear(config.stored_pattern_as_static, stored, hidden)
        self.v_proj = linear(config.pattern_projection_as_static, projection, pattern)
        out = None if config.disable_out_projection else _linear(pattern, config.result_size, config.input_bias)
        self.out_proj = out
        if config.normalize_hopfield_space_affine:
            self.p_norm_weight = nn.Parameter(torch.ones(head_size))
            self.p_norm_bias = nn.Parameter(torch.zeros(head_size))
        if config.concat_bias_pattern:
            self.bias_k = nn.Parameter(torch.randn(1, 1, hidden) * 0.02) if self.k_proj else None
            self.bias_v = nn.Parameter(torch.randn(1, 1, hidden) * 0.02) if self.v_proj else None
        self.register_buffer("beta", self._beta(), persistent=False)

    beta: Tensor  # [1 or heads, 1, 1 or head_size]

    def forward(
        self,
        stored: Tensor,
        state: Tensor,
        projection: Tensor,
        padding_mask: Tensor | None,
        association_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        q, k = self._heads(self.q_proj, state), self._heads(self.k_proj, stored)  # (b, h, t, d), (b, h, s, d)
        if self.config.pattern_projection_as_connected and self.k_proj is not None:
            projection = self.k_proj(projection)
        if self.v_proj is None and self.config.splits_static_projection:
            v = self._split(projection)
        else:
            v = self._heads(self.v_proj, projection)
        if self.config.normalize_hopfield_space:
            q, k = self._normalize(q), self._normalize(k)
        if self.config.add_zero_association:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        mask = self._mask(padding_mask, association_mask, added=k.shape[2] - stored.shape[1], like=q)
        xi = self._associate(q, k, mask)
        y = F.dropout(xi, self.config.dropout, self.training) @ v
        y = rearrange(y, "b h t p -> b t (h p)")
        return y if self.out_proj is None else self.out_proj(y), xi

    def _associate(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """xi (b, h, t, s): one softmax and the further steps of the heads that are not done."""

        def associate(q: Tensor) -> Tensor:
            logits = self.beta * q @ k.mT
            return (logits if mask is None else logits + mask).softmax(-1)

        xi = associate(q)
        active = torch.ones(xi.shape[1], dtype=torch.bool, device=xi.device)
        limits = self.config.limits
        limit, eps = max(limits), self.config.update_steps_eps
        least = torch.tensor(eps, device=xi.device)
        for step in itertools.count() if limit == math.inf else range(int(limit)):
            active = active & torch.tensor([step < most for most in limits], device=xi.device)
            if limit == math.inf and not active.any():  # with a limit, the loop has no data-dependent end: it exports
                break
            new = associate(xi @ k)
            change = (new - xi).flatten(2).norm(dim=-1).amax(0)  # (h,): the largest over the batch
            xi = torch.where(active[:, None, None], new, xi)
            active = active & (change > least)
            if step > _MOST_STEPS:
                raise TersorError(f"hopfield did not converge in {_MOST_STEPS} steps; set update_steps_max")
        return xi

    def _heads(self, linear: nn.Linear | None, x: Tensor) -> Tensor:
        if linear is None:  # (h b) in the one order, (b h) in the other
            return rearrange(x.repeat(self.config.num_heads, 1, 1), "(b h) s d -> b h s d", h=self.config.num_heads)
        return self._split(linear(x))

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b s (h d) -> b h s d", h=self.config.num_heads)

    def _normalize(self, x: Tensor) -> Tensor:
        weight, bias = getattr(self, "p_norm_weight", None), getattr(self, "p_norm_bias", None)
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.config.normalize_hopfield_space_eps)

    def _mask(self, padding: Tensor | None, association: Tensor | None, *, added: int, like: Tensor) -> Tensor | None:
        """What is added to the logits, (b or 1, h or 1, t or 1, s). Patterns that were added are never masked."""
        mask: Tensor | None = None
        if association is not None:  # (t, s), or (b heads, t, s)
            mask = _additive(association, like)
            mask = mask if mask.dim() == 2 else rearrange(mask, "(b h) t s -> b h t s", h=self.config.num_heads)
        if padding is not None:  # (b, s)
            padded = _additive(padding.bool(), like)[:, None, None]
            mask = padded if mask is None else mask + padded
        return None if mask is None else F.pad(mask, (0, added))

    def _beta(self) -> Tensor:
        config = self.config
        if isinstance(config.scaling, tuple):  # channel c: scaling[c mod heads]
            tiled = torch.tensor(config.scaling, device="cpu").repeat(config.head_size)
            return tiled.view(config.num_heads, 1, config.head_size)
        static = self.q_proj is None and self.k_proj is None and self.v_proj is None and self.out_proj is None
        default = 1.0 if static and not config.normalize_hopfield_space else config.head_size**-0.5
        return torch.tensor(default if config.scaling is None else config.scaling, device="cpu").view(1, 1, 1)

    def split_packed(self, state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Published in_proj_weight, or q_proj_weight and so on, and in_proj_bias, as our Linear layers' tensors."""
        linears = {name: getattr(self, name) for name in ("q_proj", "k_proj", "v_proj")}
        rows = {name: linear.out_features for name, linear in linears.items() if linear is not None}
        converted: dict[str, Tensor] = {}
        for key, value in state.items():
            name = key.removeprefix(prefix)
            if (
                name == "in_proj_bias" and self.v_proj is None
            ):  # which ends in the bias of a projection that is not there
                value = value[: sum(rows.values())]
            if name in ("in_proj_weight", "in_proj_bias") and len(value) == sum(rows.values()):
                last = name.removeprefix("in_proj_")
                parts = zip(rows, torch.split(value, list(rows.values())), strict=True)
                converted |= {f"{prefix}{each}.{last}": part for each, part in parts}
            elif name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                converted[f"{prefix}{name.removesuffix('_weight')}.weight"] = value
            else:
                converted[key] = value
        return converted


@register(
    "hopfield",
    task="encode",
    input="sets",
    paper="arXiv 2008.02217",
    variants={"hopfield": (4416, {})},
    small={"input_size": 12, "num_heads": 3, "update_steps_max": 2},
)
class Hopfield(nn.Module):
    """state (B, T, ·) [, stored (B, S, ·) [, projection (B, S, ·)]] -> (B, T, result_size).

    Without batch_first, the first two axes of all are exchanged. padding_mask (B, S): true where nothing is stored.
    association_mask (T, S) or (B·heads, T, S): boolean (true: no association) or added to the logits.
    """

    def __init__(self, config: HopfieldConfig) -> None:
        super().__init__()
        self.config = config
        self.association_core = HopfieldCore(config)
        stored, state, projection = config.sizes
        self.norm_stored_pattern = _norm(config, "stored_pattern", stored)
        self.norm_state_pattern = _norm(config, "state_pattern", state)
        self.norm_pattern_projection = _norm(config, "pattern_projection", projection)

    def forward(
        self,
        state: Tensor,
        stored: Tensor | None = None,
        projection: Tensor | None = None,
        *,
        padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
    ) -> Tensor:
        y, _ = self._run(state, stored, projection, padding_mask, association_mask)
        if self.config.association_activation is not None:
            y = getattr(torch, self.config.association_activation)(y)
        return y if self.config.batch_first else y.transpose(0, 1)

    def association(
        self,
        state: Tensor,
        stored: Tensor | None = None,
        *,
        padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
        projection: Tensor | None = None,
    ) -> Tensor:
        """xi (B, heads, T, S)."""
        return self._run(state, stored, projection, padding_mask, association_mask)[1]

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        stored, state, projection = self.config.sizes
        batch_first = {
            "state": torch.randn(batch_size, 5, state),
            "stored": torch.randn(batch_size, 7, stored),
            "projection": torch.randn(batch_size, 7, projection),
        }
        return {name: x if self.config.batch_first else x.transpose(0, 1) for name, x in batch_first.items()}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.association_core.split_packed(state, "association_core.")

    def _run(
        self,
        state: Tensor,
        stored: Tensor | None,
        projection: Tensor | None,
        padding_mask: Tensor | None,
        association_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        stored = state if stored is None else stored
        projection = stored if projection is None else projection
        if not self.config.batch_first:
            stored, state, projection = (x.transpose(0, 1) for x in (stored, state, projection))
        return self.association_core(
            self.norm_stored_pattern(stored),
            self.norm_state_pattern(state),
            self.norm_pattern_projection(projection),
            padding_mask,
            association_mask,
        )


@register(
    "hopfield_pooling",
    task="encode",
    input="sets",
    paper="arXiv 2008.02217",
    variants={"hopfield_pooling": (4448, {})},
    small={"input_size": 12, "num_heads": 3, "quantity": 2},
)
class HopfieldPooling(nn.Module):
    """stored (B, S, ·) [, projection (B, S, ·)] -> (B, quantity · result_size)."""

    def __init__(self, config: HopfieldPoolingConfig) -> None:
        super().__init__()
        self.config = config
        self.hopfield = Hopfield(config)
        weights = torch.randn(1, config.quantity, config.sizes[1]) * 0.02
        self.pooling_weights = nn.Parameter(weights, requires_grad=config.trainable)

    def forward(
        self,
        stored: Tensor,
        projection: Tensor | None = None,
        *,
        padding_mask: Tensor | None = None,
        association_mask: Tensor | None = None,
    ) -> Tensor:
        state = _expand(self.pooling_weights, stored, self.config)
        y = self.hopfield(state, stored, projection, padding_mask=padding_mask, association_mask=association_mask)
        return (y if self.config.batch_first else y.transpose(0, 1)).flatten(1)

    def association(self, stored: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        """xi (B, heads, quantity, S)."""
        return self.hopfield.association(
            _expand(self.pooling_weights, stored, self.config), stored, padding_mask=padding_mask
        )

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        inputs = self.hopfield.example_inputs(batch_size)
        return {name: inputs[name] for name in ("stored", "projection")}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.hopfield.association_core.split_packed(state, "hopfield.association_core.")


@register(
    "hopfield_layer",
    task="encode",
    input="sets",
    paper="arXiv 2008.02217",
    variants={"hopfield_layer": (4448, {})},
    small={"input_size": 12, "num_heads": 3, "quantity": 5},
)
class HopfieldLayer(nn.Module):
    """state (B, T, input_size) -> (B, T, result_size), from `quantity` trainable stored patterns."""

    def __init__(self, config: HopfieldLayerConfig) -> None:
        super().__init__()
        self.config = config
        self.hopfield = Hopfield(config)
        stored, _, projection = config.sizes
        weights = torch.randn(1, config.quantity, stored) * 0.02
        self.lookup_weights = nn.Parameter(weights, requires_grad=config.trainable)
        if config.lookup_weights_as_separated:
            targets = torch.randn(1, config.quantity, projection) * 0.02
            self.target_weights = nn.Parameter(targets, requires_grad=config.lookup_targets_as_trainable)

    def forward(self, state: Tensor, *, association_mask: Tensor | None = None) -> Tensor:
        stored = _expand(self.lookup_weights, state, self.config)
        targets = self.target_weights if self.config.lookup_weights_as_separated else self.lookup_weights
        projection = _expand(targets, state, self.config)
        return self.hopfield(state, stored, projection, association_mask=association_mask)

    def association(self, state: Tensor) -> Tensor:
        """xi (B, heads, T, quantity)."""
        targets = self.target_weights if self.config.lookup_weights_as_separated else self.lookup_weights
        stored, projection = (_expand(x, state, self.config) for x in (self.lookup_weights, targets))
        return self.hopfield.association(state, stored, projection=projection)

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"state": self.hopfield.example_inputs(batch_size)["state"]}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.hopfield.association_core.split_packed(state, "hopfield.association_core.")


@register(
    "hopfield_bags",
    task="classify",
    input="sets",
    paper="arXiv 2008.02217",
    variants={"hopfield_bags": (4514, {})},
    small={"input_size": 12, "num_heads": 3, "quantity": 2},
)
class HopfieldBags(nn.Module):
    """Multiple-instance learning: a bag (B, S, input_size) -> logits (B, num_classes)."""

    def __init__(self, config: HopfieldBagsConfig) -> None:
        super().__init__()
        self.config = config
        self.pooling = HopfieldPooling(config)
        self.head = nn.Linear(config.quantity * config.result_size, config.num_classes)

    def forward(self, bag: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        return self.head(self.pooling(bag, padding_mask=padding_mask))

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"bag": self.pooling.example_inputs(batch_size)["stored"]}


class HopfieldEncoderLayer(nn.Module):
    """A post-norm Transformer encoder layer around an association whose output is as wide as its input."""

    def __init__(self, association: Hopfield, dim_feedforward: int = 2048, dropout: float = 0.1) -> None:
        super().__init__()
        d = association.config.input_size
        self.hopfield_association = association
        self.linear1, self.linear2 = nn.Linear(d, dim_feedforward), nn.Linear(dim_feedforward, d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        x = self.norm1(x + self.dropout(self.hopfield_association(x, padding_mask=padding_mask)))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(self.linear1(x).relu()))))


class HopfieldDecoderLayer(nn.Module):
    """The same with a second association, with what the encoder stored."""

    def __init__(
        self,
        association_self: Hopfield,
        association_cross: Hopfield,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        d = association_self.config.input_size
        self.hopfield_association_self, self.hopfield_association_cross = association_self, association_cross
        self.linear1, self.linear2 = nn.Linear(d, dim_feedforward), nn.Linear(dim_feedforward, d)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, *, association_mask: Tensor | None = None) -> Tensor:
        own = self.hopfield_association_self(x, association_mask=association_mask)
        x = self.norm1(x + self.dropout(own))
        x = self.norm2(x + self.dropout(self.hopfield_association_cross(x, memory)))
        return self.norm3(x + self.dropout(self.linear2(self.dropout(self.linear1(x).relu()))))


_MOST_STEPS = 100_000


def _linear(d_in: int, d_out: int, bias: bool) -> nn.Linear:
    linear = nn.Linear(d_in, d_out, bias)
    nn.init.normal_(linear.weight, std=0.02)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def _norm(config: HopfieldConfig, pattern: str, size: int) -> nn.Module:
    if not getattr(config, f"normalize_{pattern}"):
        return nn.Identity()
    affine, eps = (getattr(config, f"normalize_{pattern}_{each}") for each in ("affine", "eps"))
    return nn.LayerNorm(size, eps=eps, elementwise_affine=affine)


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask


def _expand(weights: Tensor, batch: Tensor, config: HopfieldConfig) -> Tensor:
    """(1, quantity, ·) for every sample of the batch."""
    if config.batch_first:
        return weights.expand(batch.shape[0], -1, -1)
    return weights.transpose(0, 1).expand(-1, batch.shape[1], -1)
