"""SVT, the scattering vision transformer ("Scattering Vision Transformer: Spectral Mixing Matters", Patro and Agneeswaran,
NeurIPS 2023, arXiv 2311.01310).

What it is for: image classification with token labels, and a four-stage backbone. The first stage, where tokens are many,
has no attention: a wavelet transform that can be undone splits the map into a low-frequency part, weighed element by
element, and high frequencies in six directions, mixed over channels by small complex nets. Later stages attend.

    model = tersor.models.load("svt_s", "svt_h_s.pth")        # official file
    logits = model(image)                                     # image (B, 3, 224, 224), ImageNet-normalised
    maps = model.features(image)                              # four maps at strides 4, 8, 16, 32

A block is x = x + Mixer(LN(x)), x = x + W2 GELU(DW3x3(W1 LN(x))) on tokens [B, H W, C]. The first stage's mixer, with
`mixing="channel"`, as published models have it:

    low, high = DTCWT(x)                     one level (tersor.layers.dtcwt): [B, C, H, W] and [B, C, 6, H/2, W/2] complex
    low  = low * complex_weight_ll           [C, S, S], S the map's side at `img_size`
    high = W2 relu(W1 high + b1) + b2        complex matrices on 4 blocks of C/4 channels; relu on each part by itself
    output = inverse DTCWT(low, high)

`mixing="channel_token"`, in the published source but not in its models: half of the channels pass a depthwise
convolution, the other half the above with a second complex net of the same form along each row of the map (one matrix a
row); the halves are interleaved.

Behind the last stage, a class token (the mean) attends once to all tokens. With `token_label` (published) there is a head
for the tokens too: logits = head(class) + 0.5 max over tokens of aux_head(token). For training with soft labels of tokens,

    loss = token_label_loss(model.token_outputs(image), target)

mixes the images with those of the flipped batch in a random box. The published model does that by itself in training
mode; here forward is the same in both modes, so that class labels alone train it too.

Published weights are tied to 224 x 224. Here other sizes work too, multiples of 8 from 32: complex_weight_ll is resized
(bicubic) to the map, with "channel" mixing only.

Origin: badripatro/svt at fcbc9b3 (svt.py), which has no licence: written from its description. Its key names are ours;
the wavelet filters in its checkpoints are left out (dtcwt.py has them). Its argument sr_ratios has no effect, and its
widths other than 64, 96, 128 and 192 do not work there; here they do.

Proven: the golden cases (transform and inverse, channel-token mixing, a tiny model, SVT-H-S, the loss) to 5e-6. Not
proven: ImageNet accuracy (S 84.2, B 85.2, L 85.7 published), training with token labels, sizes other than 224.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers import checks, dtcwt
from tersor.layers.drop_path import DropPath, linear_rates
from tersor.layers.patch_embed import check_image
from tersor.models import key_maps
from tersor.models.registry import register

BLOCKS = 4  # of channels, in the complex nets
Box = tuple[int, int, int, int]  # rows x1:x2, columns y1:y2 of the last stage's grid: x1, y1, x2, y2


@dataclass(frozen=True, kw_only=True)
class SVTConfig:
    img_size: int = 224  # complex_weight_ll is learned for it
    in_chans: int = 3
    num_classes: int = 1000  # 0: no heads, forward returns the class token
    stem_hidden_dim: int = 32
    embed_dims: tuple[int, ...] = (64, 128, 320, 448)  # C of each stage
    num_heads: tuple[int, ...] = (2, 4, 10, 14)
    mlp_ratios: tuple[float, ...] = (8.0, 8.0, 4.0, 4.0)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    mixing: str = "channel"  # or "channel_token"
    token_label: bool = True
    norm_eps: float = 1e-6  # of blocks and stages; the published class's own default is 1e-5
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        checks.at_least("svt", 0, num_classes=self.num_classes)
        checks.at_least("svt", 1, in_chans=self.in_chans, stem_hidden_dim=self.stem_hidden_dim)
        checks.at_least("svt", 32, img_size=self.img_size)
        checks.divides("svt", "8", 8, "img_size", self.img_size)
        checks.one_of("svt", "mixing", self.mixing, ("channel", "channel_token"))
        checks.same_length(
            "svt",
            embed_dims=self.embed_dims,
            num_heads=self.num_heads,
            mlp_ratios=self.mlp_ratios,
            depths=self.depths,
        )
        parts = BLOCKS if self.mixing == "channel" else 2 * BLOCKS
        checks.divides("svt", "its channel blocks", parts, "first width", self.embed_dims[0])
        for C, heads in zip(self.embed_dims, self.num_heads, strict=True):
            checks.divides("svt", "num_heads", heads, "embed_dims", C)


def token_label_loss(
    outputs: tuple[Tensor, Tensor, Box], target: Tensor, *, cls_weight: float = 1.0, dense_weight: float = 0.5
) -> Tensor:
    """outputs: (class logits (B, K), token logits (B, N, K), box), from `token_outputs`.

    target: soft labels (B, K), for the image and each of its tokens, or (B, K, 2 + N): the true class, the image's
    label, and the tokens' labels. Where the box covers a share s of the tokens, the image's label becomes (1 - s) times
    itself plus s times that of the flipped batch. Token labels stay, because the model has put the tokens back.
    """
    cls, aux, (x1, y1, x2, y2) = outputs
    N = aux.shape[1]
    labels = target if target.dim() == 2 else target[:, :, 1]
    tokens = target[:, :, None].expand(-1, -1, N) if target.dim() == 2 else target[:, :, 2:]
    share = (x2 - x1) * (y2 - y1) / N
    labels = (1 - share) * labels + share * labels.flip(0)
    of_images = -(labels * cls.log_softmax(-1)).sum(-1).mean()
    of_tokens = -(tokens.transpose(1, 2) * aux.log_softmax(-1)).sum(-1).mean()
    return cls_weight * of_images + dense_weight * of_tokens


def random_box(H: int, W: int) -> Box:
    """A box of about the share 1 - lam of the grid, lam uniform, around a random place; cut at the edges."""
    lam, row, column = torch.rand(3, device="cpu").tolist()
    x, y = int(row * H), int(column * W)
    half_height, half_width = (int(side * math.sqrt(1 - lam)) // 2 for side in (H, W))
    return max(x - half_height, 0), max(y - half_width, 0), min(x + half_height, H), min(y + half_width, W)


def exchange(x: Tensor, box: Box) -> Tensor:
    """x (B, H, W, C) with the box taken from the flipped batch; its own inverse."""
    x1, y1, x2, y2 = box
    mixed = x.clone()
    mixed[:, x1:x2, y1:y2] = x.flip(0)[:, x1:x2, y1:y2]
    return mixed


def complex_mlp(x: Tensor, equation: str, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """x (..., 2) -> W2 relu(W1 x + b1) + b2; (W, b) hold real and imaginary part on axis 0, `equation` is x's with W."""

    def linear(real: Tensor, imag: Tensor, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        def times(part: Tensor, matrix: Tensor) -> Tensor:
            return torch.einsum(equation, part, matrix)

        return times(real, W[0]) - times(imag, W[1]) + b[0], times(real, W[1]) + times(imag, W[0]) + b[1]

    real, imag = x.unbind(-1)
    real, imag = linear(real, imag, *first)
    return torch.stack(linear(real.relu(), imag.relu(), *second), -1)


class Scattering(nn.Module):
    """tokens (B, H W, C) -> the same shape, channel mixing."""

    def __init__(self, C: int, side: int) -> None:
        super().__init__()
        c = C // BLOCKS
        self.complex_weight_ll = _small(C, side, side)
        self.complex_weight_lh_1, self.complex_weight_lh_2 = _small(2, BLOCKS, c, c), _small(2, BLOCKS, c, c)
        self.complex_weight_lh_b1, self.complex_weight_lh_b2 = _small(2, BLOCKS, c), _small(2, BLOCKS, c)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        return to_tokens(self.scatter(to_map(x, H, W)))

    def scatter(self, x: Tensor) -> Tensor:
        """x (B, C, H, W)."""
        low, high = dtcwt.forward(x)
        low = low * self.low_weight(low.shape[2], low.shape[3])
        return dtcwt.inverse(low, self.mix(high))

    def low_weight(self, H: int, W: int) -> Tensor:
        ll = self.complex_weight_ll
        if ll.shape[1:] == (H, W):
            return ll
        return F.interpolate(ll[None], size=(H, W), mode="bicubic", align_corners=False)[0]

    def mix(self, high: Tensor) -> Tensor:
        """high (B, C, 6, h, w, 2); here C is split as (block, channel)."""
        x = high.movedim(1, -2).reshape(high.shape[0], *high.shape[2:5], BLOCKS, -1, 2)
        first = (self.complex_weight_lh_1, self.complex_weight_lh_b1)
        second = (self.complex_weight_lh_2, self.complex_weight_lh_b2)
        x = complex_mlp(x, "...bd,bdk->...bk", first, second)
        return x.flatten(-3, -2).movedim(-2, 1)


class TokenScattering(Scattering):
    """Channel and token mixing: half of the channels through a convolution, half through the transform."""

    def __init__(self, C: int, side: int) -> None:
        super().__init__(C // 2, side)
        T = side // 2
        self.conv = nn.Conv2d(C // 2, C // 2, 3, padding=1, groups=C // 2)
        self.complex_weight_lh_1_t, self.complex_weight_lh_2_t = _small(2, T, T, T), _small(2, T, T, T)
        self.complex_weight_lh_b1_t, self.complex_weight_lh_b2_t = _small(2, T, T), _small(2, T, T)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        local, spectral = to_map(x, H, W).chunk(2, 1)
        mixed = torch.stack((self.conv(local), self.scatter(spectral)), 2)  # channel j of both, then j + 1
        return to_tokens(mixed.flatten(1, 2))

    def mix(self, high: Tensor) -> Tensor:
        T = self.complex_weight_lh_b1_t.shape[1]
        if high.shape[3:5] != (T, T):
            raise TersorError(
                f"svt with channel_token mixing takes its own img_size alone, a first map of {2 * T} x {2 * T}, not "
                f"{2 * high.shape[3]} x {2 * high.shape[4]}; mixing='channel' takes others"
            )
        first = (self.complex_weight_lh_1_t, self.complex_weight_lh_b1_t)
        second = (self.complex_weight_lh_2_t, self.complex_weight_lh_b2_t)
        return complex_mlp(super().mix(high), "...hw,hwk->...hk", first, second)


class Attention(nn.Module):
    """tokens (B, N, C) -> the same shape; with `queries`, of these tokens alone."""

    def __init__(self, C: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(C, C)
        self.kv = nn.Linear(C, 2 * C)
        self.proj = nn.Linear(C, C)

    def forward(self, x: Tensor, H: int = 0, W: int = 0, *, queries: Tensor | None = None) -> Tensor:
        parts = (self.q(x if queries is None else queries), *self.kv(x).chunk(2, -1))
        q, k, v = (part.reshape(*part.shape[:2], self.heads, -1).transpose(1, 2) for part in parts)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class DepthwiseConv(nn.Module):
    def __init__(self, C: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(C, C, 3, padding=1, groups=C)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        return to_tokens(self.dwconv(to_map(x, H, W)))


class Mlp(nn.Module):
    def __init__(self, C: int, ratio: float) -> None:
        super().__init__()
        hidden = int(C * ratio)
        self.fc1 = nn.Linear(C, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = nn.Linear(hidden, C)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), H, W)))


class Block(nn.Module):
    def __init__(self, config: SVTConfig, stage: int, drop_path: float) -> None:
        super().__init__()
        C = config.embed_dims[stage]
        self.norm1 = nn.LayerNorm(C, eps=config.norm_eps)
        if stage:
            self.attn: nn.Module = Attention(C, config.num_heads[stage])
        else:
            self.attn = (Scattering if config.mixing == "channel" else TokenScattering)(C, config.img_size // 4)
        self.norm2 = nn.LayerNorm(C, eps=config.norm_eps)
        self.mlp = Mlp(C, config.mlp_ratios[stage])
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), H, W))
        return x + self.drop_path(self.mlp(self.norm2(x), H, W))


class ClassMlp(nn.Module):
    def __init__(self, C: int, ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(C, int(C * ratio))
        self.fc2 = nn.Linear(int(C * ratio), C)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ClassBlock(nn.Module):
    """tokens (B, 1 + N, C), the class token first: it attends to all of them, the others stay as they are."""

    def __init__(self, config: SVTConfig) -> None:
        super().__init__()
        C = config.embed_dims[-1]
        self.norm1 = nn.LayerNorm(C, eps=config.norm_eps)
        self.attn = Attention(C, config.num_heads[-1])
        self.norm2 = nn.LayerNorm(C, eps=config.norm_eps)
        self.mlp = ClassMlp(C, config.mlp_ratios[-1])

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm1(x)
        cls = x[:, :1] + self.attn(n, queries=n[:, :1])
        cls = cls + self.mlp(self.norm2(cls))
        return torch.cat((cls, x[:, 1:]), 1)


class Stem(nn.Module):
    """image (B, 3, H, W) -> normed map (B, C, H/4, W/4)."""

    def __init__(self, in_chans: int, hidden: int, C: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for d_in, kernel, stride in ((in_chans, 7, 2), (hidden, 3, 1), (hidden, 3, 1)):
            conv = nn.Conv2d(d_in, hidden, kernel, stride=stride, padding=kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(hidden), nn.ReLU()]
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(hidden, C, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(C)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.proj(self.conv(image)).movedim(1, -1)).movedim(-1, 1)


class Downsample(nn.Module):
    """Halves height and width."""

    def __init__(self, d_in: int, C: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(d_in, C, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).movedim(1, -1)).movedim(-1, 1)


@register(
    "svt",
    task="classify",
    input="image",
    paper="arXiv 2311.01310",
    variants={
        "svt_s": (22_052_592, {"drop_path_rate": 0.1}),
        "svt_b": (
            32_878_544,
            {
                "stem_hidden_dim": 64,
                "embed_dims": (64, 128, 320, 512),
                "num_heads": (2, 4, 10, 16),
                "depths": (3, 4, 12, 3),
                "drop_path_rate": 0.1,
            },
        ),
        "svt_l": (
            54_594_000,
            {
                "stem_hidden_dim": 64,
                "embed_dims": (96, 192, 384, 512),
                "num_heads": (3, 6, 12, 16),
                "depths": (3, 6, 18, 3),
                "drop_path_rate": 0.3,
            },
        ),
    },
    small={
        "img_size": 64,
        "num_classes": 10,
        "stem_hidden_dim": 8,
        "embed_dims": (16, 24, 32, 48),
        "num_heads": (1, 2, 2, 4),
        "mlp_ratios": (2.0, 2.0, 2.0, 2.0),
        "depths": (1, 1, 1, 1),
    },
)
class SVT(nn.Module):
    """image (B, C, H, W) -> logits (B, num_classes)."""

    def __init__(self, config: SVTConfig) -> None:
        super().__init__()
        self.config = config
        rates = linear_rates(config.drop_path_rate, config.depths)
        for stage, C in enumerate(config.embed_dims):
            d_in = config.embed_dims[stage - 1] if stage else config.stem_hidden_dim
            embed = Downsample(d_in, C) if stage else Stem(config.in_chans, d_in, C)
            self.add_module(f"patch_embed{stage + 1}", embed)
            self.add_module(f"block{stage + 1}", nn.ModuleList(Block(config, stage, rate) for rate in rates[stage]))
            self.add_module(f"norm{stage + 1}", nn.LayerNorm(C, eps=config.norm_eps))
        self.post_network = nn.ModuleList([ClassBlock(config)])
        C, classes = config.embed_dims[-1], config.num_classes
        self.head = nn.Linear(C, classes) if classes else nn.Identity()
        if config.token_label and classes:
            self.aux_head = nn.Linear(C, classes)
        self.apply(init_weights)

    def features(self, image: Tensor) -> list[Tensor]:
        """The stages' maps, strides 4, 8, 16, 32; normed, but for the last one."""
        return self._stages(image)[0]

    def _stages(self, image: Tensor, mixed: bool = False) -> tuple[list[Tensor], Box]:
        check_image("svt", image, channels=self.config.in_chans, multiple=8, at_least=32)
        x, maps, box, last = image, [], (0, 0, 0, 0), len(self.config.embed_dims)
        for stage in range(1, last + 1):
            x = self.get_submodule(f"patch_embed{stage}")(x)
            H, W = x.shape[-2:]
            if stage == 1 and mixed:
                scale = 2 ** (last - 1)  # from the last grid to the first
                box = random_box(H // scale, W // scale)
                first = (box[0] * scale, box[1] * scale, box[2] * scale, box[3] * scale)
                x = exchange(x.movedim(1, -1), first).movedim(-1, 1)
            tokens = to_tokens(x)
            for block in self.get_submodule(f"block{stage}").children():
                tokens = block(tokens, H, W)
            if stage < last:
                tokens = self.get_submodule(f"norm{stage}")(tokens)
            x = to_map(tokens, H, W)
            maps.append(x)
        return maps, box

    def forward(self, image: Tensor) -> Tensor:
        x = self._read_out(self._stages(image)[0][-1])
        logits = self.head(x[:, 0])
        return logits + 0.5 * self.aux_head(x[:, 1:]).amax(1) if self._has_token_head else logits

    def token_outputs(self, image: Tensor) -> tuple[Tensor, Tensor, Box]:
        """What `token_label_loss` takes: class logits, token logits (B, N, classes) and the box of the mixed images."""
        if not self._has_token_head:
            raise TersorError(
                "this svt has no head for tokens; create it with token_label=True and num_classes above 0"
            )
        maps, box = self._stages(image, mixed=True)
        H, W = maps[-1].shape[-2:]
        x = self._read_out(maps[-1])
        aux = self.aux_head(x[:, 1:])  # (B, N, classes)
        return self.head(x[:, 0]), exchange(aux.reshape(len(aux), H, W, -1), box).flatten(1, 2), box

    @property
    def _has_token_head(self) -> bool:
        return self.config.token_label and self.config.num_classes > 0

    def _read_out(self, x: Tensor) -> Tensor:
        """The last map -> normed tokens (B, 1 + N, C), the class token first."""
        tokens = to_tokens(x)
        tokens = self.post_network[0](torch.cat((tokens.mean(1, keepdim=True), tokens), 1))
        return self.get_submodule(f"norm{len(self.config.embed_dims)}")(tokens)

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        side = self.config.img_size
        return {"image": torch.randn(batch_size, self.config.in_chans, side, side)}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return key_maps.drop(state, r"\.[xi]fm\.[hg][01][oab]$")


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W, C)."""
    return x.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, H: int, W: int) -> Tensor:
    """(B, H W, C) -> (B, C, H, W)."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, H, W)


def init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _small(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.02 * torch.randn(shape))
