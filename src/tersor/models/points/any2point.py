"""Any2Point, frozen transformers of text, images or sound for point clouds (Tang et al., ECCV 2024, arXiv 2404.07989).

What it is for: classification of point clouds with few labels and few trained weights. A transformer that was trained on another
modality stays as it is; about one weight in a hundred is learned: point tokens, small adapters, a head.

    model = tersor.models.create("any2point_language", num_classes=8)
    model.load_source("clip-vit-large-patch14/model.safetensors")            # the frozen part; or DINOv2's, ImageBind's
    logits = model(points)                                   # points (B, 1024, 3), centred, within the unit sphere

N = 128 tokens t with centres c come from three stages of furthest points, nearest neighbours and shared MLPs. Six views turn
the cloud and project the centres, without drawing anything: on a line of 77 places (`language`, CLIP's text), or in perspective
on a picture of 518 x 518 (`vision`, DINOv2) or 192 x 304 pixels (`audio`, ImageBind). Position pos is the mean over the views
of what the source model's own table has there. A block, on x = [class, t]:

    x = block(x + pos)                              frozen; f = its MLP's output, and 0.3 Adapter(f) is added to x
    y_v = t + A_v(LN_v(t))                          of each view v, among tokens in the same cell of the line or picture
    s_v = GELU(BN(mean of y_v over the cell)),      s = GELU(BN(max + mean of t over a cube of space))
    t = t + coef_pro * sum_v w_v s_v,               w_v = (1 + cos(s_v, s)) / 2 over its sum over the views

A_v and LN_v are shared by all blocks. Logits: an MLP on [max over t, class] (`global_feat`). Trained are all parameters with
requires_grad: everything but the blocks, and in the blocks the adapters.

`across_batch`: published, three things mix the clouds of a batch, so that a result depends on its neighbours: `language` attends
over the batch instead of the tokens, its places are scaled by the largest and smallest of the batch, and the ModelNet type
scales neighbourhoods by one deviation of the batch. False, the default and what to train with, is per cloud. Published
checkpoints of `language` were trained with True: the variant `any2point_language_published`.
`transpose_positions`: published, `vision` and `audio` lay the numbers read from the table out wrongly (channels of many tokens
make up one token's position); True gives each token its own, for training anew.

Published checkpoints leave the table out. Put it beside the weights under its name there: `positional_embedding` (CLIP),
`pos_embed` (DINOv2), `modality_preprocessors.audio.pos_embedding_helper.pos_embed` (ImageBind).

Origin: Ivan-Tang-3D/Any2Point at 4e03b69, no licence file: written from the facts. Quirks that are kept: points within 0.03 of
the origin are never sampled; a place that falls on a row of the line's table gives 0; `language` adds positions before every
block and once more before the first, `vision` before every block, `audio` once. Where a neighbourhood is flat, the published
code gives NaN, this one 0. The projection to another width than 768 is trained here (published sizes have none).

Proven: the golden cases of the published code (`language` and `vision`, tiny sizes and the ScanObjectNN size) to 3e-7; trained
weights without the head 0.95 (language), 0.80 (vision), 0.87 million (audio), 1.1, 0.9 and 1.0 % of all, published 0.9, 0.8 and
0.8 (the head has 0.46 million more); the frozen part equal to transformers' CLIP and DINOv2 from their weights; by default a
cloud's result does not depend on its batch; eight shapes are told apart (benchmarks/results/clouds.md). Not proven: accuracies
(91.9, 87.7 and 87.0 on ScanObjectNN published); `audio` and the ModelNet type beyond properties, as no case holds them; loading
of the official files themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.checks import at_least, divides, one_of
from tersor.models.key_maps import pack, rename, squeeze_to
from tersor.models.loading import read_state
from tersor.models.points.any2point_parts import (
    LENGTH,
    VIEW_HEADS,
    VIEWS,
    Cells,
    Guide,
    Plane,
    PointTokens,
    ViewAttention,
    cells_in_space,
    cells_on_lines,
    cells_on_planes,
    on_lines,
    on_planes,
    rows_on_lines,
    rows_on_planes,
    view_rotations,
)
from tersor.models.registry import register

PLANES = {"vision": Plane(518, 518, 14), "audio": Plane(192, 304, 16)}
GRIDS = {"language": 2, "vision": 26, "audio": 16}  # side of a view's cell: places of the line, pixels
DEPTHS = {"vision": -1.8, "audio": -1.4}
FEATURES = ("max", "cls", "avg", "mean")
HIDDEN = 256  # of the head
TABLES = ("positional_embedding", "pos_embed", "pos_embedding_helper.pos_embed")  # CLIP's, DINOv2's, ImageBind's


@dataclass(frozen=True, kw_only=True)
class Any2PointConfig:
    source: str = "language"  # what the frozen transformer was trained on; or "vision", "audio"
    embed_dim: int = 768  # D
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True  # of the views' attention, and but for language of the blocks'
    attn_drop_rate: float = 0.0  # in the blocks
    norm_eps: float = 1e-6  # of the last norm, and but for language of the blocks'
    adapter_dim: int = 16
    adapter_drop_path_rate: float = 0.1  # dropout inside the adapter
    attn_dim: int = 12  # width of the views' attention
    num_classes: int = 15  # 0: no head, forward returns features
    global_feat: tuple[str, ...] = ("max", "cls")  # what the head sees: over the tokens "max", "avg"; "cls"
    input_points: int = 1024  # tokens are an eighth of it
    point_channels: int = 96  # of the first layer on points; tokens have eight times as many before the projection to D
    patchknn: int = 81  # neighbours
    lastdim: int = 32  # bottleneck of the third stage
    type: str = "scan"  # neighbourhoods scaled by their reach on each axis; or "mn40": by one standard deviation
    pos_cor: tuple[float, ...] | None = None  # language: the line's direction; None: (-1, 0, 1)
    trans: float | None = None  # vision, audio: minus the distance of the picture's viewpoint; None: -1.8, -1.4
    coef_grid: int | None = None  # side of a view's cell; None: 2 places, 26 or 16 pixels
    coef_3dgird: float = 0.08  # side of a cube of space
    coef_pro: float = 0.3  # weight of the views
    scale_factor: float = 0.3  # weight of the adapters
    maxmean: bool = False  # a view's cell has its max + mean instead of its mean
    across_batch: bool = False  # as published: clouds of a batch are mixed
    transpose_positions: bool = (
        False  # vision, audio: each token reads its own row of the table, unlike the published code
    )

    def __post_init__(self) -> None:
        name = "any2point"
        one_of(name, "source", self.source, GRIDS)
        one_of(name, "type", self.type, ("scan", "mn40"))
        divides(name, "num_heads", self.num_heads, "embed_dim", self.embed_dim)
        divides(name, "six, for its heads,", VIEW_HEADS, "attn_dim", self.attn_dim)
        divides(name, "three, for its axes,", 3, "point_channels", self.point_channels)
        divides(name, "eight, for its stages,", 8, "input_points", self.input_points)
        at_least(name, 1, depth=self.depth, adapter_dim=self.adapter_dim, lastdim=self.lastdim, patchknn=self.patchknn)
        at_least(name, 0, num_classes=self.num_classes)
        if not self.global_feat:
            raise TersorError(f"any2point's global_feat names none of {', '.join(FEATURES)}")
        for each in self.global_feat:
            one_of(name, "global_feat", each, FEATURES)
        if self.patchknn > self.input_points // 4:
            raise TersorError(
                f"any2point's patchknn {self.patchknn} is above the {self.input_points // 4} points of stage 3"
            )
        if self.cell < 1 or self.coef_3dgird <= 0:
            raise TersorError(f"any2point's cells have sides above 0, not {self.cell} and {self.coef_3dgird}")
        self._check_source()

    def _check_source(self) -> None:
        language = self.source == "language"
        if language and (self.trans is not None or self.transpose_positions):
            raise TersorError("any2point of source 'language' has no pictures: leave trans and transpose_positions out")
        if not language and self.pos_cor is not None:
            raise TersorError(f"any2point of source {self.source!r} has no line: leave pos_cor {self.pos_cor} out")
        if len(self.direction) != 3 or not any(self.direction):
            raise TersorError(f"any2point's pos_cor is a direction in space, three numbers, not {self.pos_cor}")
        if self.across_batch and not language and self.type == "scan":
            raise TersorError(
                f"any2point of source {self.source!r} and type 'scan' mixes no clouds; leave across_batch out"
            )

    @property
    def direction(self) -> tuple[float, ...]:
        return (-1.0, 0.0, 1.0) if self.pos_cor is None else self.pos_cor

    @property
    def cell(self) -> int:
        return GRIDS[self.source] if self.coef_grid is None else self.coef_grid

    @property
    def plane(self) -> Plane | None:
        return PLANES.get(self.source)

    @property
    def table_rows(self) -> int:
        plane = self.plane
        return LENGTH if plane is None else (plane.width // plane.patch) * (plane.height // plane.patch)


def quick_gelu(x: Tensor) -> Tensor:
    return x * (1.702 * x).sigmoid()


class Attention(nn.Module):
    """over_batch: among the clouds of a batch, token by token, as the published language code runs it."""

    def __init__(self, config: Any2PointConfig) -> None:
        super().__init__()
        d, language = config.embed_dim, config.source == "language"
        self.heads, self.dropout = config.num_heads, config.attn_drop_rate
        self.over_batch = language and config.across_batch
        self.qkv = nn.Linear(d, 3 * d, bias=language or config.qkv_bias)
        self.proj = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        if self.over_batch:
            x = x.transpose(0, 1)
        q, k, v = rearrange(self.qkv(x), "b n (p h e) -> p b h n e", p=3, h=self.heads)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        y = self.proj(rearrange(mixed, "b h n e -> b n (h e)"))
        return y.transpose(0, 1) if self.over_batch else y


class MLP(nn.Module):
    def __init__(self, config: Any2PointConfig) -> None:
        super().__init__()
        d = config.embed_dim
        hidden = int(d * config.mlp_ratio)
        self.fc1, self.fc2 = nn.Linear(d, hidden), nn.Linear(hidden, d)
        self.activation = quick_gelu if config.source == "language" else F.gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Adapter(nn.Module):
    def __init__(self, config: Any2PointConfig) -> None:
        super().__init__()
        self.ln1 = nn.Linear(config.embed_dim, config.adapter_dim)
        self.ln2 = nn.Linear(config.adapter_dim, config.embed_dim)
        self.dropout = nn.Dropout(config.adapter_drop_path_rate)

    def forward(self, f: Tensor) -> Tensor:
        return self.ln2(self.dropout(quick_gelu(self.ln1(f))))


class Block(nn.Module):
    """The source model's block and, beside its MLP, an adapter."""

    def __init__(self, config: Any2PointConfig) -> None:
        super().__init__()
        d, eps = config.embed_dim, 1e-5 if config.source == "language" else config.norm_eps
        scaled = config.source == "vision"
        self.scale_factor = config.scale_factor
        self.norm1, self.norm2 = nn.LayerNorm(d, eps=eps), nn.LayerNorm(d, eps=eps)
        self.attn, self.mlp, self.adapter = Attention(config), MLP(config), Adapter(config)
        self.ls1, self.ls2 = (LayerScale(d) if scaled else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        f = self.ls2(self.mlp(self.norm2(x)))
        return x + f + self.scale_factor * self.adapter(f)


@register(
    "any2point",
    task="classify",
    input="points",
    paper="arXiv 2404.07989",
    variants={
        "any2point_language": (86_466_407, {}),
        "any2point_language_published": (86_466_407, {"across_batch": True}),
        "any2point_language_modelnet": (
            86_473_344,
            {
                "num_classes": 40,
                "type": "mn40",
                "pos_cor": (1.0, -1.0, 0.0),
                "patchknn": 64,
                "coef_pro": 0.5,
                "coef_3dgird": 0.16,
                "global_feat": ("cls", "max"),
                "norm_eps": 1e-5,
            },
        ),
        "any2point_vision": (
            86_337_287,
            {
                "source": "vision",
                "patchknn": 64,
                "adapter_dim": 8,
                "attn_drop_rate": 0.1,
                "coef_pro": 0.7,
                "coef_3dgird": 0.16,
            },
        ),
        "any2point_audio": (
            86_392_631,
            {
                "source": "audio",
                "patchknn": 64,
                "adapter_dim": 12,
                "attn_drop_rate": 0.1,
                "coef_pro": 0.5,
                "coef_3dgird": 0.16,
            },
        ),
    },
    small={
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 5,
        "adapter_dim": 4,
        "input_points": 64,
        "point_channels": 12,
        "patchknn": 8,
        "lastdim": 8,
        "coef_3dgird": 0.5,
    },
)
class Any2Point(nn.Module):
    """points (B, at least input_points, 3) -> logits (B, num_classes)."""

    rotations: Tensor
    position_table: Tensor

    def __init__(self, config: Any2PointConfig) -> None:
        super().__init__()
        self.config = config
        d, width = config.embed_dim, 8 * config.point_channels
        self.register_buffer("rotations", view_rotations(), persistent=False)
        self.register_buffer(
            "position_table", 0.01 * torch.randn(config.table_rows, d)
        )  # no parameter: it never learns
        self.cls_token, self.cls_pos = (nn.Parameter(0.02 * torch.randn(1, 1, d)) for _ in range(2))
        self.patch_embed = PointTokens(
            config.input_points,
            config.point_channels,
            config.patchknn,
            config.lastdim,
            config.type,
            config.across_batch,
        )
        self.proj = nn.Identity() if width == d else nn.Linear(width, d)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.views = nn.ModuleList(ViewAttention(d, config.attn_dim, config.qkv_bias) for _ in VIEWS)
        self.guides = nn.ModuleList(Guide(d, config.coef_pro, config.maxmean) for _ in range(config.depth))
        self.norm = nn.LayerNorm(d, eps=config.norm_eps)
        self.head = head(len(config.global_feat) * d, config) if config.num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, parameter in self.blocks.named_parameters():
            parameter.requires_grad_(".adapter." in name)

    def forward(self, points: Tensor) -> Tensor:
        return self.head(self.features(points))

    def features(self, points: Tensor) -> Tensor:
        """(B, D times the number of global_feat)."""
        least = self.config.input_points
        if points.dim() != 3 or points.shape[2] != 3 or points.shape[1] < least:
            raise TersorError(
                f"this any2point takes clouds (batch, {least} or more points, 3), not {list(points.shape)}"
            )
        c, t = self.patch_embed(points)
        x = self.encode(c, self.proj(t))
        cls, t = x[:, 0], x[:, 1:]
        found = {"cls": cls, "max": t.amax(1), "avg": t.mean(1), "mean": t.mean(1)}
        return torch.cat([found[name] for name in self.config.global_feat], 1)

    def encode(self, c: Tensor, t: Tensor) -> Tensor:
        """Centres (B, N, 3) and tokens (B, N, D) -> (B, 1 + N, D), the class first."""
        source = self.config.source
        places = self.places(c)
        cells, space = self.cells(places), cells_in_space(c, self.config.coef_3dgird)
        same = [each.same() for each in cells]
        pos = self._with_class(self.cls_pos, self.positions(places))
        x = self._with_class(self.cls_token, t)
        if source != "vision":
            x = x + pos
        for block, guide in zip(self.blocks, self.guides, strict=True):
            x = block(x if source == "audio" else x + pos)
            t = x[:, 1:]
            seen = [view(t, each) for view, each in zip(self.views, same, strict=True)]
            x = torch.cat((x[:, :1], guide(t, seen, cells, space)), 1)
        return self.norm(x)

    def places(self, c: Tensor) -> Tensor:
        """Centres (B, N, 3) -> where each view sees them: (B, V, N) on its line, or (B, V, N, 2) pixels."""
        rotations, plane = self.rotations.to(c.dtype), self.config.plane
        if plane is None:
            return on_lines(c, rotations, self.config.direction)
        trans = DEPTHS[self.config.source] if self.config.trans is None else self.config.trans
        return on_planes(c, rotations, trans, plane)

    def positions(self, places: Tensor) -> Tensor:
        """(B, N, D): the mean over the views of what the table has at the places."""
        plane, table = self.config.plane, self.position_table
        if plane is None:
            return rows_on_lines(places, table, self.config.across_batch).mean(1)
        return rows_on_planes(places, table, plane, self.config.transpose_positions).mean(1)

    def cells(self, places: Tensor) -> list[Cells]:
        plane = self.config.plane
        if plane is None:
            return cells_on_lines(places, self.config.cell)
        return cells_on_planes(places, self.config.cell, plane)

    def _with_class(self, first: Tensor, rest: Tensor) -> Tensor:
        return torch.cat((first.expand(len(rest), -1, -1), rest), 1)

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"points": 2 * torch.rand(batch_size, self.config.input_points, 3) - 1}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = with_table(state)
        if "position_table" not in state:
            raise TersorError(
                "the checkpoint holds no table of positions, as published ones of any2point; "
                f"add that of the frozen model under its own name there ({', '.join(TABLES)})"
            )
        return squeeze_to(state, self.state_dict())  # convolutions of kernel 1 are linear maps here

    @torch.no_grad()
    def load_source(self, checkpoint: str | Path | Mapping[str, Tensor]) -> None:
        """Copy the frozen part from the source model's own checkpoint: CLIP's text model, DINOv2 or ImageBind's audio, under
        the official names or those of transformers. What is learned stays as it is, but for the class token of DINOv2 and
        ImageBind and the last norm, which start from theirs. Raises TersorError where a weight is missing or does not fit."""
        state = read_state(checkpoint) if isinstance(checkpoint, (str, Path)) else dict(checkpoint)
        found = source_weights(state)
        own = self.state_dict()
        wanted = [name for name in own if name.startswith(("blocks.", "norm.")) and ".adapter." not in name]
        if self.config.source != "language":
            wanted.append("cls_token")
        for name in [*wanted, "position_table"]:
            if name not in found or found[name].shape != own[name].shape:
                told = f"holds {list(found[name].shape)}" if name in found else "has none"
                raise TersorError(f"any2point needs {name} {list(own[name].shape)}; the source checkpoint {told}")
        for name in [*wanted, "position_table"]:
            own[name].copy_(found[name])


def head(width: int, config: Any2PointConfig) -> nn.Sequential:
    """The published classifier; that of ScanObjectNN has no biases before its norms."""
    bias = config.type == "mn40"
    layers: list[nn.Module] = []
    for d in (width, HIDDEN):
        layers += [nn.Linear(d, HIDDEN, bias=bias), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(HIDDEN, config.num_classes))


PUBLISHED = (  # names of Any2Point's checkpoints -> ours
    (r"^(?:encoder|modality_preprocessors\.audio)\.", ""),
    (r"^prediction\.head\.0\.([01])\.", r"head.\1."),
    (r"^prediction\.head\.2\.([01])\.", lambda match: f"head.{4 + int(match[1])}."),
    (r"^prediction\.head\.4\.0\.", "head.8."),
    (r"^cls_head_finetune\.", "head."),
    (r"^patch_embed\.EncP\.raw_point_embed\.net\.", "patch_embed.raw."),
    (r"^patch_embed\.EncP\.LGA_list\.", "patch_embed.stages."),
    (r"^(?:res)?blocks\.(\d+)\.out_transform_3d\.0\.", r"guides.\1.space."),
    (r"^(?:res)?blocks\.(\d+)\.out_transform_[12]d\.(\d)\.0\.", r"guides.\1.views.\2."),
    (r"^attn1\.(\d)\.", r"views.\1."),
    (r"^norm3\.(\d)\.", r"views.\1.norm."),
    (r"^resblocks\.", "blocks."),
    (r"^(blocks\.\d+)\.ln_([12])\.", r"\1.norm\2."),
    (r"^(blocks\.\d+)\.mlp\.c_fc\.", r"\1.mlp.fc1."),
    (r"^(blocks\.\d+)\.mlp\.c_proj\.", r"\1.mlp.fc2."),
    (r"^(blocks\.\d+)\.attn\.in_proj_", r"\1.attn.qkv."),
    (r"^(blocks\.\d+)\.attn\.out_proj\.", r"\1.attn.proj."),
)
SOURCES = (  # names of CLIP, DINOv2 and ImageBind, and of transformers' copies -> those of Any2Point's checkpoints
    (r"^transformer\.resblocks\.", "resblocks."),
    (r"^ln_final\.", "norm."),
    (r"^modality_(?:preprocessors|trunks)\.audio\.", ""),
    (r"^modality_heads\.audio\.0\.", "norm."),
    (r"^(blocks\.\d+)\.norm_([12])\.", r"\1.norm\2."),
    (r"^(?:text_model\.)?embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^(?:text_model\.)?final_layer_norm\.", "norm."),
    (r"^(?:text_model\.)?encoder\.layers\.", "blocks."),
    (r"^(blocks\.\d+)\.self_attn\.out_proj\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+)\.layer_norm([12])\.", r"\1.norm\2."),
    (r"^(?:dinov2\.)?embeddings\.position_embeddings$", "pos_embed"),
    (r"^(?:dinov2\.)?embeddings\.cls_token$", "cls_token"),
    (r"^(?:dinov2\.)?layernorm\.", "norm."),
    (r"^(?:dinov2\.)?encoder\.layer\.", "blocks."),
    (r"^(blocks\.\d+)\.attention\.(?:output\.dense|o_proj)\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+)\.layer_scale([12])\.lambda1$", r"\1.ls\2.gamma"),
)
QUERY_KEY_VALUE = tuple(
    rf"(blocks\.\d+)\.(?:self_attn|attention)\.(?:{name[0]}_proj|attention\.{name})\.(weight|bias)"
    for name in ("query", "key", "value")
)


def with_table(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Any2Point's names; a source model's table of positions becomes ours, without the row of a class token."""
    result = {}
    for name, value in rename(state, *PUBLISHED).items():
        if name in TABLES:
            result["position_table"] = value[0, 1:] if value.dim() == 3 else value
        else:
            result[name] = value
    return result


def source_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a source model's checkpoint, by our names. What has no place here keeps some other name."""
    named = rename(state, *SOURCES)
    try:
        return with_table(pack(named, QUERY_KEY_VALUE, r"\1.attn.qkv.\2"))
    except KeyError as error:
        raise TersorError(f"the source checkpoint has queries without keys or values: {error.args[0]}") from None
