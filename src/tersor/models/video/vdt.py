"""VDT, the video diffusion transformer with mask modelling (Lu et al., ICLR 2024, arXiv 2305.13311).

What it is for: one model that generates videos, continues them forward or backward, fills in frames between given ones,
animates one image and completes cut-out regions. It works on the latents of a frozen image autoencoder, frame by frame.
A binary mask says which latents are given; given latents go in clean, the others noised, and no channel tells which.

    model = tersor.models.create("vdt_s2")
    diffusion = GaussianDiffusion(DiffusionConfig(timestep_respacing="50"))              # tersor.train.diffusion
    latents = diffusion.sample(model, torch.randn(1, 16, 4, 32, 32), given=given, mask=mask)  # 1 = generate, 0 = given

x (B, T, C, H, W) latents (Stable Diffusion's: C 4, pixels / 8, times 0.18215), t (B,) diffusion steps of 1000. Frames are
square and T is `num_frames`. With N = (H/p)^2 tokens a frame, z (B*T, N, D):

    z = patches(x) + pos + time        fixed sines and cosines: pos over the grid, time over the frames
    c = MLP(sinusoids(t)) + class 0    (B, D), the same for all frames of a sample
    z = z + Wt A_time(LN(z))           over the T frames of each position; neither modulated nor gated; LN eps 1e-5
    z = z + a1 * A(LN(z) * (1 + g1) + s1)                                over the N positions of each frame
    z = z + a2 * MLP(LN(z) * (1 + g2) + s2)                              s, g, a = W SiLU(c) of the block
    out = unpatch(W (LN(z) * (1 + g) + s))                               (B, T, 2C, H, W): noise, and its variance

A `mode` other than "video" drops the time parts: a DiT for single frames (T = 1). In training the class is replaced by
the extra last row of its table with `class_dropout_prob`; there is no label argument, as published. With `zero_init`
(published) an untrained model returns zeros; the temporal layers start from Xavier all the same.

Masks of the training kinds are in tersor.data.video_masks, loss and samplers in tersor.train.diffusion.

Origin: RERV/VDT at cdbad2b, CC BY-NC 4.0: written anew from the paper and the mathematics. Its key names are ours; the two
tables of its checkpoints are dropped, they follow from the config.

Proven: the golden cases of the published code (video and image mode, S/2 and L/2 sizes, masked training loss with gradients,
respaced sampling with a mask, masks); parameter counts of its code, without the two fixed tables that it counts as frozen
parameters (the paper's 28.5M and 595.9M seem to leave out the modulation). Not proven: FVD on any published data set; loading
of the official Sky Time-Lapse file itself; that one sample of its forecast of moving shapes beats a copy (the mean of 8 samples
does, benchmarks/results/video.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.layers.checks import at_least, divides
from tersor.models.registry import register

FREQUENCIES = 128  # of the diffusion step's sinusoids


@dataclass(frozen=True, kw_only=True)
class VDTConfig:
    input_size: int = 32  # H = W of the latents
    patch_size: int = 2  # p
    in_channels: int = 4  # C
    hidden_size: int = 1152  # D
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1  # 0: the table has no extra row
    num_classes: int = 1000
    learn_sigma: bool = True  # 2C channels out
    mode: str = "video"  # anything else: single frames
    num_frames: int = 16  # T
    zero_init: bool = True  # modulation and last layer start at zero

    def __post_init__(self) -> None:
        at_least("vdt", 1, in_channels=self.in_channels, num_classes=self.num_classes, num_frames=self.num_frames)
        divides("vdt", "patch_size", self.patch_size, "input_size", self.input_size)
        divides("vdt", "num_heads", self.num_heads, "hidden_size", self.hidden_size)
        divides("vdt", "four, for its position table,", 4, "hidden_size", self.hidden_size)
        if self.mode != "video" and self.num_frames != 1:
            raise TersorError(f"vdt in mode {self.mode!r} has num_frames 1, not {self.num_frames}; or set mode='video'")

    @property
    def video(self) -> bool:
        return self.mode == "video"

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)


class PatchEmbed(nn.Module):
    def __init__(self, config: VDTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, frames: Tensor) -> Tensor:
        return self.proj(frames).flatten(2).transpose(1, 2)  # (B*T, N, D)


class StepEmbedding(nn.Module):
    """Diffusion step (B,) -> (B, D)."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, d), nn.SiLU(), nn.Linear(d, d))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        k = torch.arange(FREQUENCIES, dtype=torch.float32, device=t.device)
        angles = t[:, None].float() * torch.exp(-math.log(10_000) * k / FREQUENCIES)
        return self.mlp(torch.cat((angles.cos(), angles.sin()), -1).to(dtype))


class ClassEmbedding(nn.Module):
    """Row 0 for every sample; in training sometimes the extra last row, which stands for no class."""

    def __init__(self, classes: int, d: int, dropout: float) -> None:
        super().__init__()
        self.classes, self.dropout = classes, dropout
        self.embedding_table = nn.Embedding(classes + (dropout > 0), d)

    def forward(self, t: Tensor) -> Tensor:
        label = torch.zeros_like(t, dtype=torch.long)
        if self.training and self.dropout > 0:
            label = torch.where(torch.rand(t.shape, device=t.device) < self.dropout, self.classes, label)
        return self.embedding_table(label)


class Attention(nn.Module):
    """Softmax attention over the tokens of each row of z (B, N, D)."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)

    def forward(self, z: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(z), "b n (s h e) -> s b h n e", s=3, h=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n e -> b n (h e)"))


class MLP(nn.Module):
    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d, hidden)
        self.fc2 = nn.Linear(hidden, d)

    def forward(self, z: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(z), approximate="tanh"))


class Block(nn.Module):
    """z (B*T, N, D), c (B, D) -> z."""

    def __init__(self, config: VDTConfig) -> None:
        super().__init__()
        d, self.video = config.hidden_size, config.video
        self.norm1 = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(d, config.num_heads)
        self.norm2 = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(d, int(d * config.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        if self.video:
            self.temporal_norm1 = nn.LayerNorm(d)
            self.temporal_attn = Attention(d, config.num_heads)
            self.temporal_fc = nn.Linear(d, d)

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        B, T, N = c.shape[0], z.shape[0] // c.shape[0], z.shape[1]
        if self.video:
            rows = rearrange(z, "(b t) n d -> (b n) t d", b=B)
            rows = rows + self.temporal_fc(self.temporal_attn(self.temporal_norm1(rows)))
            z = rearrange(rows, "(b n) t d -> (b t) n d", n=N)
        modulation = self.adaLN_modulation(c).repeat_interleave(T, 0)[:, None]  # (B*T, 1, 6D)
        s1, g1, a1, s2, g2, a2 = modulation.chunk(6, -1)
        z = z + a1 * self.attn(self.norm1(z) * (1 + g1) + s1)
        return z + a2 * self.mlp(self.norm2(z) * (1 + g2) + s2)


class FinalLayer(nn.Module):
    def __init__(self, config: VDTConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.norm_final = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(d, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        s, g = self.adaLN_modulation(c).repeat_interleave(z.shape[0] // c.shape[0], 0)[:, None].chunk(2, -1)
        return self.linear(self.norm_final(z) * (1 + g) + s)


@register(
    "vdt",
    task="generate-video",
    input="video",
    paper="arXiv 2305.13311",
    variants={
        "vdt_s2": (41_361_056, {"depth": 12, "hidden_size": 384, "num_heads": 6, "num_classes": 1}),
        "vdt_l2": (859_704_224, {"num_classes": 1}),
    },
    small={
        "input_size": 8,
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 4,
        "num_classes": 1,
        "num_frames": 4,
        "zero_init": False,
    },
)
class VDT(nn.Module):
    """x (B, T, C, H, W), t (B,) -> noise and variance (B, T, 2C, H, W)."""

    pos_embed: Tensor
    time_embed: Tensor

    def __init__(self, config: VDTConfig) -> None:
        super().__init__()
        self.config = config
        d, side = config.hidden_size, config.input_size // config.patch_size
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = StepEmbedding(d)
        self.y_embedder = ClassEmbedding(config.num_classes, d, config.class_dropout_prob)
        row, column = (
            torch.arange(side, device="cpu").repeat_interleave(side),
            torch.arange(side, device="cpu").repeat(side),
        )
        grid = torch.cat((sine_table(column, d // 2), sine_table(row, d // 2)), 1)
        self.register_buffer("pos_embed", grid[None], persistent=False)
        if config.video:
            frames = sine_table(torch.arange(config.num_frames, device="cpu"), d)
            self.register_buffer("time_embed", frames[None], persistent=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.config.hidden_size, -1))
        nn.init.zeros_(self.get_parameter("x_embedder.proj.bias"))
        for name in ("y_embedder.embedding_table", "t_embedder.mlp.0", "t_embedder.mlp.2"):
            nn.init.normal_(self.get_parameter(f"{name}.weight"), std=0.02)
        if self.config.zero_init:
            modulations = [layer.adaLN_modulation[1] for layer in (*self.blocks, self.final_layer)]
            for linear in (*modulations, self.final_layer.linear):
                nn.init.zeros_(linear.weight)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        config, side = self.config, self.config.input_size
        wanted = (config.num_frames, config.in_channels, side, side)
        if x.dim() != 5 or x.shape[1:] != wanted:
            raise TersorError(f"this vdt takes latents (batch, {', '.join(map(str, wanted))}), not {list(x.shape)}")
        B, T = x.shape[:2]
        z = self.x_embedder(x.flatten(0, 1)) + self.pos_embed  # (B*T, N, D)
        if config.video:
            z = (z.unflatten(0, (B, T)) + self.time_embed[:, :, None]).flatten(0, 1)
        c = self.t_embedder(t, z.dtype) + self.y_embedder(t)  # (B, D)
        for block in self.blocks:
            z = block(z, c)
        pieces = self.final_layer(z, c)  # (B*T, N, p*p*C_out)
        p = config.patch_size
        return rearrange(
            pieces, "(b t) (h w) (p q c) -> b t c (h p) (w q)", b=B, h=side // p, p=p, q=p, c=config.out_channels
        )

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        config = self.config
        x = torch.randn(batch_size, config.num_frames, config.in_channels, config.input_size, config.input_size)
        return {"x": x, "t": torch.randint(1000, (batch_size,))}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for key, value in state.items() if key not in ("pos_embed", "time_embed")}


def sine_table(positions: Tensor, d: int) -> Tensor:
    """(length, d): sines, then cosines, of position / 10000^(2k/d); computed in float64 as published."""
    rates = 10_000.0 ** (-torch.arange(d // 2, dtype=torch.float64, device="cpu") / (d / 2))
    angles = positions.double()[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), 1).float()
