"""SD3 and TED-VITON beyond the golden case: start, adapter, garment, losses, what learns, and a toy wardrobe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tersor.models
from tersor.errors import TersorError
from tersor.models.vision.ted_viton import TEDVITON
from tersor.train.try_on import noise_share, noised, sample, text_preservation_loss, try_on_loss

BASE = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "joint_attention_dim": 12,
    "caption_projection_dim": 24,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 6,
}
SMALL: dict[str, Any] = {
    "base": BASE,
    "image_dim": 10,
    "adapter_tokens": 3,
    "adapter_dim": 16,
    "adapter_depth": 1,
    "adapter_heads": 2,
}


def dressed(*, awake: bool = False, **config: Any) -> tuple[TEDVITON, nn.Module]:
    """The model with a random base, and that base. awake: W_v of the adapter is not zero."""
    torch.manual_seed(0)
    base = tersor.models.create("sd3", **BASE).double().eval()
    model = tersor.models.create("ted_viton", **{**SMALL, **config}).double().eval()
    model.load_base(base.state_dict())
    if awake:
        for part in model.adapter:
            nn.init.normal_(part.to_v_ip.weight)
    return model, base


def person(**sizes: int) -> dict[str, Tensor]:
    """Latents with their conditions, text and timestep."""
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 10, 8, 6).double(),
        "encoder_hidden_states": torch.randn(2, 5, 12).double(),
        "pooled_projections": torch.randn(2, 10).double(),
        "timestep": torch.tensor([20.0, 900.0]).double(),
    }


def wardrobe() -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {"garment": torch.randn(2, 3, 4, 6).double(), "garment_hidden_states": torch.randn(2, 4, 12).double()}


def features() -> Tensor:
    torch.manual_seed(3)
    return torch.randn(2, 9, 10).double()


@torch.no_grad()
def test_at_the_start_it_is_the_base() -> None:
    model, base = dressed()
    inputs = person()
    expected = base(**{**inputs, "hidden_states": inputs["hidden_states"][:, :3]})
    torch.testing.assert_close(model(**inputs), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(**inputs, semantics=features()), expected, rtol=0, atol=1e-12)  # W_v is zero
    silent, _ = dressed(awake=True, ip_scale=0.0)
    torch.testing.assert_close(silent(**inputs, semantics=features()), expected, rtol=0, atol=1e-12)


def test_the_base_is_read_from_a_folder_of_diffusers(tmp_path: Path) -> None:
    _, base = dressed()
    state = {name: value.half() for name, value in base.state_dict().items()}
    save_file(
        {**state, "pos_embed.pos_embed": torch.zeros(1, 36, 24)}, tmp_path / "diffusion_pytorch_model.safetensors"
    )
    fresh = tersor.models.create("ted_viton", **SMALL)
    fresh.load_base(tmp_path)
    for name, value in fresh.garment.state_dict().items():
        assert torch.equal(value, state[name].float()), name
    patches = fresh.tryon.pos_embed.proj.weight
    assert torch.equal(patches[:, :3], state["pos_embed.proj.weight"].float())
    assert not patches[:, 3:].any()
    assert torch.equal(fresh.tryon.proj_out.weight, state["proj_out.weight"].float())


@torch.no_grad()
def test_a_block_is_affine_in_the_scale_with_the_adapters_attention_for_slope() -> None:
    model, base = dressed(awake=True)
    block = base.transformer_blocks[0]
    x, y, K = torch.randn(2, 12, 24).double(), torch.randn(2, 5, 24).double(), model.adapter[0]
    k, v = K(model.image_proj(features()))
    plain, context = block.attn(x, y, None, None, None)
    once, same = block.attn(x, y, None, None, (k, v))
    thrice, _ = block.attn(x, y, None, None, (k, 3 * v))
    torch.testing.assert_close(thrice - plain, 3 * (once - plain))
    torch.testing.assert_close(same, context)
    q, keys, values = (block.attn.split(each) for each in (block.attn.to_q(x), k, v))
    alone = (q @ keys.transpose(-1, -2) * 8**-0.5).softmax(-1) @ values
    slope = alone.transpose(1, 2).flatten(2) @ block.attn.to_out[0].weight.T
    torch.testing.assert_close(once - plain, slope)


@torch.no_grad()
def test_one_semantic_token_adds_the_same_to_every_query() -> None:
    model, base = dressed(awake=True, adapter_tokens=1)
    attention = base.transformer_blocks[1].attn
    x, y = torch.randn(2, 12, 24).double(), torch.randn(2, 5, 24).double()
    pair = model.adapter[1](model.image_proj(features()))
    added = attention(x, y, None, None, pair)[0] - attention(x, y, None, None, None)[0]
    torch.testing.assert_close(added, added[:, :1].expand_as(added))
    assert added.abs().max() > 1e-3


@torch.no_grad()
def test_a_masked_garment_is_none_and_a_seen_one_is_not() -> None:
    model, _ = dressed()
    inputs, garment = person(), wardrobe()
    none, seen = model(**inputs), model(**inputs, **garment)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    torch.testing.assert_close(model(**inputs, **garment, garment_mask=mask), none)
    mask[1] = True  # one sample with, one without
    mixed = model(**inputs, **garment, garment_mask=mask)
    torch.testing.assert_close(mixed, torch.cat((none[:1], seen[1:])))
    assert (seen - none).abs().max() > 1e-4


@torch.no_grad()
def test_the_order_of_garment_tokens_does_not_matter() -> None:
    model, _ = dressed()
    inputs, garment = person(), wardrobe()
    entered = model.garment(garment["garment"], garment["garment_hidden_states"], inputs["pooled_projections"])
    assert [tokens.shape for tokens in entered] == [(2, 6, 24)] * 2
    order = torch.randperm(6)
    out = model.tryon(**inputs, beside=entered)
    torch.testing.assert_close(out, model(**inputs, **garment))
    torch.testing.assert_close(model.tryon(**inputs, beside=[tokens[:, order] for tokens in entered]), out)
    assert out.shape == (2, 3, 8, 6)


@torch.no_grad()
def test_garment_net_is_the_base_up_to_each_block() -> None:
    model, base = dressed()
    inputs, seen = person(), []
    for block in base.transformer_blocks:
        block.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    clean = inputs["hidden_states"][:, :3]
    base(**{**inputs, "hidden_states": clean, "timestep": torch.zeros(2).double()})
    entered = model.garment(clean, inputs["encoder_hidden_states"], inputs["pooled_projections"])
    for mine, expected in zip(entered, seen, strict=True):
        torch.testing.assert_close(mine, expected)


def test_text_loss_starts_at_zero_and_leaves_the_prior_alone() -> None:
    model, base = dressed()
    prior, inputs = model.prior(), person()
    torch.testing.assert_close(prior.state_dict(), base.state_dict())
    latents = inputs["hidden_states"][:, :3]
    text = (inputs["encoder_hidden_states"], inputs["pooled_projections"])
    loss = text_preservation_loss(model, prior, latents, *text)
    assert loss.max() < 1e-20
    loss.sum().backward()
    assert max(p.grad.abs().max() for p in model.tryon.parameters() if p.grad is not None) < 1e-9
    model.tryon.proj_out.bias.data += 0.5
    loss = text_preservation_loss(model, prior, latents, *text)
    torch.testing.assert_close(loss, torch.full((2,), 0.25).double())
    loss.sum().backward()
    assert model.tryon.proj_out.bias.grad.abs().max() > 0.1
    assert all(p.grad is None and not p.requires_grad for p in prior.parameters())


def test_a_step_moves_the_tryon_net_and_the_adapter_alone() -> None:
    model, _ = dressed(awake=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    inputs = person()
    texts = {name: inputs[name] for name in ("encoder_hidden_states", "pooled_projections")}
    x = inputs["hidden_states"]
    try_on_loss(model, x[:, :3], x[:, 3:], **texts, **wardrobe(), semantics=features()).mean().backward()
    optimizer.step()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"tryon", "image_proj", "adapter"}


def test_the_loss_knows_the_velocity_and_the_sampler_follows_it() -> None:
    x0, noise, s = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), noise_share(4)
    condition = torch.randn(4, 7, 2, 2)

    class Ideal(nn.Module):
        def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
            share = (timestep / 1000).reshape(-1, 1, 1, 1)
            return (hidden_states[:, :3] - x0) / share  # of x = (1 - s) x0 + s e

    assert try_on_loss(Ideal(), x0, condition, noise=noise, s=s).max() < 1e-8
    torch.testing.assert_close(noised(x0, noise, torch.zeros(4)), x0)
    for shift in (1.0, 3.0):
        torch.testing.assert_close(sample(Ideal(), noise, condition, steps=7, shift=shift), x0, rtol=1e-4, atol=1e-4)
    with pytest.raises(TersorError, match="steps of at least 1 and a shift above 0, not 0 and 3"):
        sample(Ideal(), noise, condition, steps=0)


def toy(count: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Rectangles as persons, whose colour is that of a garment of two colours; and which colour."""
    colour = torch.randint(2, (count,), generator=generator).float() * 2 - 1
    mask = torch.zeros(count, 1, 8, 8)
    for row, (top, left) in enumerate(torch.randint(3, (count, 2), generator=generator).tolist()):
        mask[row, :, 2 * top : 2 * top + 4, 2 * left : 2 * left + 4] = 1
    scene = torch.randn(count, 3, 1, 1, generator=generator).expand(-1, -1, 8, 8) * 0.5
    paint = colour.reshape(-1, 1, 1, 1) * torch.tensor([1.0, -1.0, 0.5]).reshape(1, 3, 1, 1)
    latents = scene * (1 - mask) + paint * mask
    condition = torch.cat((mask, scene * (1 - mask), torch.zeros(count, 3, 8, 8)), 1)
    texts = {"encoder_hidden_states": torch.zeros(count, 2, 12), "pooled_projections": torch.zeros(count, 10)}
    batch = {"latents": latents, "condition": condition, "garment": paint.expand(-1, -1, 4, 4), **texts}
    return batch, mask


def test_trained_on_squares_it_dresses_rectangles_in_the_garments_colour() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = tersor.models.create("ted_viton", **SMALL)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=220)
    for _ in range(220):
        batch, _ = toy(16, generator)
        try_on_loss(model, **batch).mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    batch, mask = toy(8, generator)
    del batch["latents"]
    noise = torch.randn(8, 3, 8, 8)
    worn = sample(model.eval(), noise, steps=10, shift=1.0, **batch)
    swapped = sample(model, noise, steps=10, shift=1.0, **{**batch, "garment": -batch["garment"]})
    inside = ((worn * mask).sum((2, 3)) / 16, (swapped * mask).sum((2, 3)) / 16)
    assert torch.equal(inside[0].sign(), batch["garment"][:, :, 0, 0].sign())
    assert torch.equal(inside[1].sign(), -batch["garment"][:, :, 0, 0].sign())
    change = (worn - swapped).square()
    assert (change * (1 - mask)).sum() < 0.01 * change.sum()


def test_refusals() -> None:
    with pytest.raises(TersorError, match="caption_projection_dim 32 must be 3 heads of 8, 24"):
        tersor.models.create("sd3", **{**BASE, "caption_projection_dim": 32})
    with pytest.raises(TersorError, match="qk_norm is one of None, 'rms_norm', not 'layer_norm'"):
        tersor.models.create("sd3", **BASE, qk_norm="layer_norm")
    with pytest.raises(TersorError, match="as many channels in as out, not 4 and 3"):
        tersor.models.create("ted_viton", **{**SMALL, "base": {**BASE, "in_channels": 4}})
    model, base = dressed()
    inputs = person()
    with pytest.raises(TersorError, match="positions for 6 x 6 patches, not 7 x 3"):
        model(**{**inputs, "hidden_states": torch.randn(2, 10, 14, 6).double()})
    with pytest.raises(TersorError, match="no garment that it could mask"):
        model(**inputs, garment_mask=torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(TersorError, match=r"for 3 channels; in this checkpoint it is absent"):
        model.load_base({})
    state = {name: value for name, value in base.state_dict().items() if "norm_out" not in name}
    with pytest.raises(TersorError, match=r"try-on net cannot take this base: 2 missing \(norm_out"):
        model.load_base(state)
