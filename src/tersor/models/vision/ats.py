"""ATS: a ViT that drops tokens on its way, for every image another number (Fayyaz et al., ECCV 2022, arXiv 2111.15667).

What it is for: fewer operations in a trained vision transformer, without new parameters and without training. Images
with one clear subject get cheap, crowded ones keep more tokens.

    model = tersor.models.load("ats_deit_small_patch16_224", "deit_small_patch16_224.pth")   # timm's or DeiT's file
    logits = model(image)                                                    # image (B, 3, H, W), normalised
    model.tokens(image)                                                      # (B, depth): tokens left after each block

`tersor compress ats VIT` makes one of any ViT that tersor loads.

x [B, n, D] are tokens, the class token first; policy [B, n] is 1 for a token that is there and 0 for a place that is
empty. Every block attends to what is there:

    A_ij = (exp(l_ij - max_j l_ij) M_ij + e/n) / (sum_j exp(l_ij - max_j l_ij) M_ij + e)        l = q k^T / sqrt(d)

with M_ij = policy_j, but 1 where i = j, and e = 1e-6. An ATS block (those of `ats_blocks`) then chooses rows of A:

 1. Score of patch token j: S_j = (sum over heads of A_0j) |v_j|, divided by the sum over all patch tokens.
 2. c = cumulative sum of the scores in rising order, stretched to [0, 1]; y0 = its smallest value above 0.
 3. Of each of P points y0 ... 1, evenly spaced, the nearest c names a token. What is named at least once stays: where
    scores are high, c rises fast, and each token is named by a point of its own; the many low ones share a few.
 4. x <- x_kept + Wo A_kept v. The rows are not scaled anew, and v still has all old tokens: what is dropped was heard.

The kept tokens stand behind the class token in order of rising score. P is `num_tokens` - 1, by default as many as an
image has patches, in every block. Published code draws that many whatever `num_tokens` says, and fails where
`num_tokens` is below the present number of tokens; here a smaller one means fewer points, so at most num_tokens - 1
patch tokens stay.

`drop_tokens`: the tokens of a batch are cut to the largest number that an image of it keeps. Without it the places stay,
empty: nothing is saved, and shapes are fixed. Both agree (to 1e-6: n in A is another) up to the second ATS block. From there
on the lowest token of an image without empty places has c = 0 and is never named, while behind empty places, whose
scores are 0, it has its share of c: as published, with `drop_tokens` an image may keep a token more beside others that
keep many than it does alone.

Origin: adaptivetokensampling/ATS @ 9271257 (Apache-2.0). Quirks of it that are kept: the softmax is none exactly; a token is
compared with its right neighbour to find repetitions, the last with the number 1, so that position 1 is dropped where
it is the last that was named. Its checkpoints hold a parameter of zeros per ATS block (`attn.out_zero_mask`), which is
left out here. Where an image has fewer than two patch tokens left, published code divides 0 by 0; here they stay.

Proven: the golden cases (mask and drop mode, DeiT-S at full size); accuracy against operations and speed on demo-vit, beside
simpler ways to drop tokens (benchmarks/results/token_sampling.md). Not proven: ImageNet accuracies, fine-tuning. Not here:
the CvT, PS-ViT and video models, whose code was not published; dropout and drop path.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.errors import TersorError
from tersor.models.registry import register
from tersor.models.vision.vit import Attention, Mlp, PatchEmbed, ViTConfig, classifier

EPSILON = 1e-6
FEWEST_TOKENS = 8  # of a budget, as published


@dataclass(frozen=True, kw_only=True)
class ATSConfig(ViTConfig):
    embed_dim: int = 384  # D
    num_heads: int = 6
    ats_blocks: tuple[int, ...] = (3, 4, 5, 6, 7, 8, 9, 10, 11)
    num_tokens: tuple[float, ...] = ()  # of each block: most tokens left, or a share (<= 1) of an image's; (): all
    drop_tokens: bool = True
    representation_size: int = 0  # of the layer before the head; 0: none

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distilled:
            raise TersorError(
                "distilled=True: token sampling scores by one class token; use a model without the second"
            )
        unknown = [n for n in self.ats_blocks if not 0 <= n < self.depth]
        if unknown:
            raise TersorError(f"ats_blocks names block {unknown[0]}; the model has blocks 0 to {self.depth - 1}")
        if self.num_tokens and len(self.num_tokens) != self.depth:
            raise TersorError(
                f"num_tokens has {len(self.num_tokens)} entries; one for each of {self.depth} blocks is needed"
            )
        wrong = [budget for budget in self.num_tokens if budget <= 0 or (budget > 1 and budget != int(budget))]
        if wrong:
            raise TersorError(
                f"num_tokens holds {wrong[0]}; each is a share between 0 and 1, or a whole number above 1"
            )

    @property
    def tokens(self) -> int:
        """Tokens of an image before the first block, with the class token."""
        return (self.img_size // self.patch_size) ** 2 + 1

    def budget(self, block: int) -> int:
        """The most tokens that a block leaves, with the class token; 0 for a block that drops none."""
        if block not in self.ats_blocks:
            return 0
        asked = self.num_tokens[block] if self.num_tokens else 1.0
        return min(max(int(asked * self.tokens if asked <= 1 else asked), FEWEST_TOKENS), self.tokens)


def masked_softmax(logits: Tensor, policy: Tensor | None, rows: Tensor | None = None) -> Tensor:
    """logits [B, h, m, n], policy [B, n] or None (all tokens are there) -> attention [B, h, m, n], at least in float32. rows
    [B, m]: which tokens look; None: all, m = n."""
    n = logits.shape[-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    a = (logits - logits.amax(-1, keepdim=True)).exp()
    if policy is not None:
        places = torch.arange(n, device=logits.device)
        itself = (places if rows is None else rows[:, None])[..., None] == places  # [n, n], or [B, 1, m, n]
        a = a * policy[:, None, None, :].to(logits.dtype).masked_fill(itself, 1)  # [B, 1, n, n]
    return (a + EPSILON / n) / (a.sum(-1, keepdim=True) + EPSILON)


def token_scores(attention: Tensor, v: Tensor) -> Tensor:
    """attention [B, h, n or 1, n], the class token's row first, v [B, h, n, d] -> scores of the patch tokens [B, n - 1], which
    add up to 1 (0 where all are 0)."""
    norm = v.to(attention.dtype).square().sum((1, 3)).sqrt()  # of all heads' channels together
    scores = (attention[:, :, 0].sum(1) * norm)[:, 1:]
    total = scores.sum(-1, keepdim=True)
    return scores / torch.where(total > 0, total, 1)


def sample_tokens(scores: Tensor, points: int) -> Tensor:
    """scores [B, N], N > 1 -> numbers of the sampled tokens [B, min(points, N)] in order of rising score, then N in the rest."""
    N = scores.shape[1]
    ordered, tokens = scores.sort(-1)
    c = ordered.cumsum(-1)
    c = c - c[:, :1]
    c = c / torch.where(c[:, -1:] > 0, c[:, -1:], 1)
    y0 = torch.where(c > 0, c, 1).amin(-1, keepdim=True)
    i = torch.arange(points, device=c.device, dtype=c.dtype)
    y = y0 + (i - y0 * i) / (points - 1)  # [B, P], from y0 to 1
    position = (y[:, :, None] - c[:, None]).abs().argmin(-1)  # the first of equals; tokens with c = 0 are never nearest
    position = position.sort(-1).values
    right = torch.cat([position[:, 1:], torch.ones_like(position[:, :1])], 1)
    position = position.masked_fill(position == right, N).sort(-1).values[:, :N]
    return torch.cat([tokens, tokens.new_full((tokens.shape[0], 1), N)], 1).gather(1, position)


def sample_alone(logits: Tensor, v: Tensor, points: int) -> Tensor:
    """The softmax, `token_scores` and `sample_tokens` for one image on a CPU in float32: logits [h, n] of the class token, v
    [h, n, d] -> places in x of what stays, the class token's first [m]. On so few numbers an operation of torch costs several
    times what one of NumPy does."""
    seen, n = logits.detach().numpy(), logits.shape[1]
    a = np.exp(seen - seen.max(1, keepdims=True))
    a = (a + EPSILON / n) / (a.sum(1, keepdims=True) + EPSILON)
    values = v.detach().numpy()
    scores = (a.sum(0) * np.sqrt(np.einsum("hnd,hnd->n", values, values)))[1:]
    total = scores.sum()
    scores = scores / (total if total > 0 else 1)
    ordered, order = (each.numpy() for each in torch.from_numpy(scores).sort(-1))  # equal scores in torch's order
    c = ordered.cumsum(dtype=np.float64).astype(scores.dtype)  # torch adds up in float64, too
    c -= c[0]
    if c[-1] > 0:
        c /= c[-1]
    y0 = np.where(c > 0, c, 1).min()
    i = np.arange(points, dtype=c.dtype)
    y = y0 + (i - y0 * i) / c.dtype.type(points - 1)
    position = np.sort(np.abs(y[:, None] - c).argmin(-1))
    position = position[position != np.append(position[1:], 1)]
    return torch.from_numpy(np.append(0, order[position] + 1))


class AtsAttention(Attention):
    """x [B, n, D], policy [B, n] -> rows [B, m], out [B, m, D], policy [B, m]; rows are the places in x of what is kept, and None
    where all is. A policy of None says that every token is there: an image alone, or a batch whose images keep equally many.

    points: how many samples are drawn; 0: every token stays.
    """

    def __init__(self, config: ATSConfig, points: int) -> None:
        super().__init__(config)
        self.points, self.drop_tokens = points, config.drop_tokens

    def forward(  # type: ignore[override]
        self, x: Tensor, policy: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        B, n = x.shape[:2]
        q, k, v = (
            self.qkv(x).view(B, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).contiguous().unbind()
        )  # [B, h, n, d]
        if self.points and policy is not None:
            there = policy[:, None, :, None]
            q, k, v = q * there, k * there, v * there
        rows, looking = None, policy
        if self.points and n > 2:
            # Whom the class token looks at says what stays; then only what stays looks at the others.
            glance = self.qk(q[:, :, :1], k.transpose(-2, -1)) * self.scale  # [B, h, 1, n]
            if B == 1 and policy is None and glance.device.type == "cpu" and glance.dtype == torch.float32:
                rows = sample_alone(glance[0, :, 0], v[0], self.points)[None]
            else:
                first = None if policy is None else torch.zeros_like(policy[:, :1], dtype=torch.long)
                rows, policy = self._choose(token_scores(masked_softmax(glance, policy, first), v), policy)
            q = _rows(q, rows[:, None].expand(-1, self.num_heads, -1))
        attention = masked_softmax(self.qk(q, k.transpose(-2, -1)) * self.scale, looking, rows)
        out = self.proj(self.av(attention.to(v.dtype), v).transpose(1, 2).flatten(2))
        return rows, out if policy is None else out * policy[..., None], policy

    def _choose(self, scores: Tensor, policy: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Places of the kept tokens [B, m], the class token's first, and their policy; empty places show the class token."""
        n = scores.shape[1] + 1
        rows = F.pad(sample_tokens(scores, self.points) + 1, (1, 0))  # n where nothing is
        empty = rows == n
        rows = rows.masked_fill(empty, 0)
        kept = (~empty).to(scores.dtype) if policy is None else policy.gather(1, rows).masked_fill(empty, 0)
        if self.drop_tokens:
            m = int((kept > 0).sum(1).max())
            return rows[:, :m], None if bool(kept[:, :m].all()) else kept[:, :m]
        more = (0, n - rows.shape[1])
        return F.pad(rows, more), F.pad(kept, more)


class AtsBlock(nn.Module):
    """x [B, n, D], policy [B, n] or None -> x [B, m, D], policy [B, m] or None."""

    def __init__(self, config: ATSConfig, points: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.attn = AtsAttention(config, points)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.mlp = Mlp(config.embed_dim, int(config.embed_dim * config.mlp_ratio))

    def forward(self, x: Tensor, policy: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rows, out, policy = self.attn(self.norm1(x), policy)
        x = (x if rows is None else _rows(x, rows)) + out
        if policy is None:
            return x + self.mlp(self.norm2(x)), None
        x = x * policy[..., None]
        x = x + self.mlp(self.norm2(x))
        return x * policy[..., None], policy


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """x [..., n, D], rows [..., m] -> [..., m, D]. Of one image whole rows are copied, which is much faster than a gather."""
    if len(x) == 1:
        return x.index_select(-2, rows.flatten()[: rows.shape[-1]])  # the same ones in all heads
    return x.gather(-2, rows[..., None].expand(*rows.shape, x.shape[-1]))


@register(
    "ats",
    task="classify",
    input="image",
    paper="arXiv 2111.15667",
    variants={"ats_deit_small_patch16_224": (22_050_664, {})},
    small={
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 3,
        "num_heads": 3,
        "num_classes": 10,
        "ats_blocks": (1, 2),
    },
    untraceable="how many tokens are kept depends on the images (drop_tokens=False keeps shapes fixed, and can be exported)",
)
class ATS(nn.Module):
    """image [B, C, H, W] -> logits [B, num_classes]."""

    def __init__(self, config: ATSConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embed_dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, config.tokens, width) * 0.02)
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(AtsBlock(config, max(0, config.budget(n) - 1)) for n in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.pre_logits = nn.Sequential()
        if config.representation_size:
            self.pre_logits.add_module("fc", nn.Linear(width, config.representation_size))
            self.pre_logits.add_module("act", nn.Tanh())
        self.head = classifier(config.representation_size or width, config.num_classes)

    def forward(self, image: Tensor) -> Tensor:
        return self._run(image)[0]

    def tokens(self, image: Tensor) -> Tensor:
        """Tokens that each image has left after each block, with the class token, [B, depth] (int64)."""
        return self._run(image)[1]

    def _run(self, image: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.patch_embed(image)
        x = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], 1) + self.pos_embed
        policy = None if self.config.drop_tokens else torch.ones_like(x[..., 0])
        counts = []
        for block in self.blocks:
            x, policy = block(x, policy)
            if policy is None:
                counts.append(torch.full((x.shape[0],), x.shape[1], dtype=torch.long, device=x.device))
            else:
                counts.append((policy != 0).sum(1))  # in integers, which no dtype of the activations rounds
        return self.head(self.pre_logits(self.norm(x)[:, 0])), torch.stack(counts, 1)

    def operations(self, tokens: Tensor) -> Tensor:
        """Floating-point operations of the matrix products (two for each multiplication) for images that have `tokens`
        [B, depth] left after each block, each image alone in its batch: [B] (int64)."""
        config = self.config
        D, hidden, n = config.embed_dim, int(config.embed_dim * config.mlp_ratio), config.tokens
        before = F.pad(tokens[:, :-1], (1, 0), value=n)
        sampled = torch.tensor([n in config.ats_blocks for n in range(config.depth)], device=tokens.device)
        glances = torch.where(sampled & (before > 2), before, 0) * D  # of the class token alone
        blocks = before * 3 * D * D + glances + 2 * tokens * before * D + tokens * (D * D + 2 * D * hidden)
        size = config.representation_size
        head = size * (D + config.num_classes) if size else D * config.num_classes
        return 2 * (blocks.sum(1) + (n - 1) * config.in_chans * config.patch_size**2 * D + head)

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        return {"image": torch.randn(batch_size, self.config.in_chans, self.config.img_size, self.config.img_size)}

    def convert_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without the parameters of zeros; positions of another image size resized."""
        state = {key: value for key, value in state.items() if not key.endswith("attn.out_zero_mask")}
        positions = state.get("pos_embed")
        if positions is not None and positions.dim() == 3 and positions.shape[1] != self.config.tokens:
            state["pos_embed"] = resize_positions(positions, self.config.tokens)
        return state


def resize_positions(positions: Tensor, tokens: int) -> Tensor:
    """Position embeddings [1, 1 + s s, D] of a class token and a square of patches, bilinearly to [1, tokens, D]."""
    old, new = (round((count - 1) ** 0.5) for count in (positions.shape[1], tokens))
    if old * old + 1 != positions.shape[1]:
        return positions  # no square: whoever loads it says that the shape is wrong
    grid = rearrange(positions[:, 1:], "b (h w) d -> b d h w", h=old)
    grid = F.interpolate(grid, (new, new), mode="bilinear", align_corners=False)
    return torch.cat([positions[:, :1], rearrange(grid, "b d h w -> b (h w) d")], 1)
