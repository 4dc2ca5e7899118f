"""Any2Point beyond its golden cases: what learns, the frozen part, batches, cells, both layouts, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from golden.harness import Case
from safetensors.torch import load_file
from torch import Tensor, nn

import tersor.models
from tersor.errors import TersorError
from tersor.models.points.any2point import PLANES, Any2PointConfig, Attention
from tersor.models.points.any2point_parts import (
    Cells,
    Guide,
    ViewAttention,
    on_lines,
    on_planes,
    rows_on_lines,
    rows_on_planes,
    sine_code,
    view_rotations,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "any2point"
SMALL: dict[str, Any] = {
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 3,
    "adapter_dim": 4,
    "input_points": 64,
    "point_channels": 6,
    "patchknn": 8,
    "lastdim": 8,
    "coef_3dgird": 0.5,
}
SOURCES = ("language", "vision", "audio")


def build(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    return tersor.models.create("any2point", **{**SMALL, **config}).double().eval()


def clouds(count: int = 3) -> Tensor:
    return 2 * torch.rand(count, 64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 1


@pytest.mark.parametrize(
    ("variant", "published"), [("any2point_language", 0.9), ("any2point_vision", 0.8), ("any2point_audio", 0.9)]
)
def test_about_one_weight_in_a_hundred_learns_as_published(variant: str, published: float) -> None:
    """In millions without the head; the paper rounds audio's 0.87 down to 0.8."""
    with torch.device("meta"):
        model = tersor.models.create(variant)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    learned -= sum(p.numel() for p in model.head.parameters())
    assert round(learned / 1e6, 1) == published
    assert 0.009 < learned / sum(p.numel() for p in model.parameters()) < 0.012


@pytest.mark.parametrize("source", SOURCES)
def test_only_adapters_learn_inside_the_blocks(source: str) -> None:
    model = build(source=source).train()
    model(clouds()).square().sum().backward()
    frozen = {name for name, p in model.named_parameters() if p.grad is None}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith("blocks.") and ".adapter." not in n}


def source_model(source: str) -> tuple[nn.Module, Any]:
    """A random model of transformers and how its blocks and last norm are run."""
    from transformers import CLIPTextConfig, CLIPTextModel, Dinov2Config, Dinov2Model

    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(3)
    if source == "language":
        tokens = {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1}
        model = CLIPTextModel(CLIPTextConfig(**size, **tokens, intermediate_size=96, attn_implementation="eager"))
    else:
        model = Dinov2Model(Dinov2Config(**size, image_size=518, patch_size=14, layerscale_value=0.7))
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)  # its own start leaves positions and biases at zero

    def run(x: Tensor) -> Tensor:
        body = getattr(model, "text_model", model)
        for layer in body.encoder.layers if source == "language" else body.encoder.layer:
            y = layer(x, attention_mask=None) if source == "language" else layer(x)
            x = y if isinstance(y, Tensor) else y[0]
        return body.final_layer_norm(x) if source == "language" else body.layernorm(x)

    return model.double().eval(), run


@torch.no_grad()
@pytest.mark.parametrize("source", ["language", "vision"])
def test_without_adapters_and_views_it_is_the_source_model(source: str, tmp_path: Path) -> None:
    original, run = source_model(source)
    original.save_pretrained(tmp_path)
    eps = 1e-5 if source == "language" else 1e-6
    model = build(source=source, coef_pro=0.0, scale_factor=0.0, norm_eps=eps)
    model.load_source(tmp_path)
    c, t = torch.randn(2, 8, 3).double(), torch.randn(2, 8, 24).double()
    model.position_table.zero_()
    model.cls_pos.zero_()
    x = torch.cat((model.cls_token.expand(2, -1, -1), t), 1)
    torch.testing.assert_close(model.encode(c, t), run(x))


def test_names_in_memory_and_on_disk_give_the_same_frozen_part(tmp_path: Path) -> None:
    for source in ("language", "vision"):
        original, _ = source_model(source)
        original.save_pretrained(tmp_path / source)
        a, b = build(source=source), build(source=source)
        a.load_source(original.state_dict())
        b.load_source(load_file(tmp_path / source / "model.safetensors"))
        for (name, mine), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            assert torch.equal(mine, other), name


def test_official_names_of_clip_and_imagebind() -> None:
    for source, block, norm, table, front in (
        ("language", "transformer.resblocks.{}.", "ln_final.", "positional_embedding", ""),
        (
            "audio",
            "modality_trunks.audio.blocks.{}.",
            "modality_heads.audio.0.",
            "modality_preprocessors.audio.pos_embedding_helper.pos_embed",
            "modality_preprocessors.audio.",
        ),
    ):
        model, fresh = build(source=source), build(source=source)
        for p in model.parameters():
            nn.init.normal_(p)
        state = {f"{norm}weight": model.norm.weight, f"{norm}bias": model.norm.bias, "logit_scale": torch.ones(1)}
        rows = model.position_table
        state[table] = rows if source == "language" else torch.cat((rows[:1], rows))[None]
        if front:
            state[f"{front}cls_token"] = model.cls_token
        mlp = ("mlp.c_fc", "mlp.c_proj") if source == "language" else ("mlp.fc1", "mlp.fc2")
        norms = ("ln_1", "ln_2") if source == "language" else ("norm_1", "norm_2")
        for i, each in enumerate(model.blocks):
            at = block.format(i)
            state[f"{at}attn.in_proj_weight"], state[f"{at}attn.in_proj_bias"] = each.attn.qkv.parameters()
            pairs = zip(
                ("attn.out_proj", *norms, *mlp),
                (each.attn.proj, each.norm1, each.norm2, each.mlp.fc1, each.mlp.fc2),
                strict=True,
            )
            for name, module in pairs:
                state[f"{at}{name}.weight"], state[f"{at}{name}.bias"] = module.parameters()
        fresh.load_source({name: value.detach() for name, value in state.items()})
        for name, p in model.state_dict().items():
            if name.startswith(("blocks.", "norm.")) and ".adapter." not in name:
                assert torch.equal(fresh.state_dict()[name], p), name
        assert torch.equal(fresh.position_table, model.position_table)


@torch.no_grad()
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", ["scan", "mn40"])
def test_a_cloud_does_not_depend_on_its_batch(source: str, kind: str) -> None:
    model = build(source=source, type=kind)
    torch.testing.assert_close(model(clouds())[:1], model(clouds()[:1]))


@torch.no_grad()
@pytest.mark.parametrize(("source", "kind"), [("language", "scan"), ("language", "mn40"), ("vision", "mn40")])
def test_across_batch_it_does(source: str, kind: str) -> None:
    model = build(source=source, type=kind, across_batch=True)
    assert (model(clouds())[:1] - model(clouds()[:1])).abs().max() > 1e-6


@torch.no_grad()
def test_attention_over_a_batch_of_one_is_the_value_projection() -> None:
    attention = Attention(Any2PointConfig(**SMALL, across_batch=True))
    x = torch.randn(1, 9, 24)
    values = attention.qkv(x)[..., 48:]
    torch.testing.assert_close(attention(x), attention.proj(values))


@torch.no_grad()
def test_the_order_of_the_points_matters_only_by_which_comes_first() -> None:
    model, points = build(), clouds(1)
    order = torch.cat((torch.zeros(1, dtype=torch.long), 1 + torch.randperm(63)))
    torch.testing.assert_close(model(points[:, order]), model(points))
    assert not torch.allclose(model(points.flip(1)), model(points))


@torch.no_grad()
def test_a_token_alone_in_its_cell_gets_its_own_value_projection() -> None:
    view, t = ViewAttention(24, 12, qkv_bias=True), torch.randn(2, 5, 24)
    alone = torch.eye(5, dtype=torch.bool)[None, None]
    torch.testing.assert_close(view(t, alone), t + view.proj(view.qkv(view.norm(t))[..., 24:]))


@torch.no_grad()
def test_weights_of_the_views_sum_to_one() -> None:
    """Views that all say the same count as that once, however far space agrees."""
    torch.manual_seed(0)
    guide = Guide(24, coef_pro=0.7, maxmean=False).eval()
    t, y = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    cells = Cells(torch.tensor([[0, 1, 1, 3, 0], [2, 2, 2, 2, 2]]), 4)
    space = Cells(torch.tensor([[0, 0, 2, 2, 0], [0, 1, 2, 3, 4]]), 5)
    said = guide.pooled(y, cells, guide.views[0])
    torch.testing.assert_close(guide(t, [y] * 6, [cells] * 6, space), t + 0.7 * said)
    torch.testing.assert_close(said[1], said[1, :1].expand(5, -1))  # one cell, one value
    torch.testing.assert_close(said[0, 1], nn.functional.gelu(y[0, 1:3].mean(0) / (1 + 1e-5) ** 0.5))


def test_training_counts_each_cube_of_space_once() -> None:
    guide = Guide(4, coef_pro=1.0, maxmean=False).train()
    t = torch.randn(1, 5, 4)
    guide.pooled_in_space(t, Cells(torch.tensor([[0, 0, 2, 2, 0]]), 5))
    pooled = torch.stack([t[0, rows].amax(0) + t[0, rows].mean(0) for rows in ([0, 1, 4], [2, 3])])
    torch.testing.assert_close(guide.space.running_mean, 0.1 * pooled.mean(0))


def test_places_on_lines() -> None:
    c = torch.rand(4, 20, 3)
    s = on_lines(c, view_rotations(), (0.0, 0.0, 1.0))
    assert s.min() >= 0
    assert s.max() < 77
    along = c[:, None] @ view_rotations()[:, :, 2:]  # (4, 6, 20, 1)
    lowest, highest = along[..., 0].argmin(2, keepdim=True), along[..., 0].argmax(2, keepdim=True)
    torch.testing.assert_close(s.gather(2, lowest), torch.full((4, 6, 1), 76.5))  # wrapped around from -0.5
    torch.testing.assert_close(s.gather(2, highest), torch.full((4, 6, 1), 76.5))


def test_places_on_planes() -> None:
    plane = PLANES["audio"]
    centre = on_planes(torch.zeros(1, 1, 3), view_rotations(), -1.4, plane)
    torch.testing.assert_close(centre, torch.tensor([95.5, 151.5]).expand(1, 6, 1, 2))
    places = on_planes(torch.rand(2, 50, 3) - 0.5, view_rotations(), -1.4, plane)
    assert places.min() >= 0
    assert places[..., 0].max() < 192
    assert 192 < places[..., 1].max() < 304


def test_rows_between_places() -> None:
    table = torch.randn(77, 4)
    s = torch.tensor([[[0.0, 76.0, 1.5, 40.25]]])  # spans 76, so a place is a row
    rows = rows_on_lines(s, table, across_batch=False)[0, 0]
    assert not rows[:2].any()
    torch.testing.assert_close(rows[2], (table[1] + table[2]) / 2)
    torch.testing.assert_close(rows[3], 0.75 * table[40] + 0.25 * table[41])


def test_rows_of_a_picture_and_their_published_layout() -> None:
    plane = PLANES["vision"]
    table = torch.randn(37 * 37, 4)
    places = torch.tensor([[[[0.0, 0.0], [517.0, 517.0], [517.0, 0.0]]]])
    rows = rows_on_planes(places, table, plane, transpose=True)[0, 0]
    torch.testing.assert_close(rows, table[[0, 37 * 37 - 1, 36]], rtol=1e-4, atol=1e-4)
    published = rows_on_planes(places, table, plane, transpose=False)[0, 0]
    assert torch.equal(published.flatten(), rows.T.flatten())


def test_position_code_of_a_neighbour() -> None:
    code = sine_code(torch.tensor([0.0, 0.01, -1.0]), 12)  # of each axis two sines, two cosines
    slow = 1000**-0.5
    angles = torch.tensor([[0, 0], [1, slow], [-100, -100 * slow]])
    torch.testing.assert_close(code, torch.cat((angles.sin(), angles.cos()), 1).flatten())


@torch.no_grad()
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", ["scan", "mn40"])
def test_flat_clouds_and_single_points_give_numbers(source: str, kind: str) -> None:
    model, points = build(source=source, type=kind), clouds(2)
    points[0, :, 2] = 0
    points[1] = torch.tensor([0.3, 0.2, 0.1])
    assert torch.isfinite(model(points)).all()


@torch.no_grad()
@pytest.mark.parametrize("source", ["vision", "audio"])
def test_the_other_sources_survive_export(source: str) -> None:
    model = build(source=source).float()
    inputs = {"points": clouds(2).float()}
    exported = torch.export.export(model, (), inputs).module()
    torch.testing.assert_close(exported(**inputs), model(**inputs), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_published_classifiers_of_both_data_sets_load() -> None:
    case = Case(GOLDEN / "tiny-language.json")
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 4, "adapter_dim": 6, "coef_3dgird": 0.4, "across_batch": True}
    table = {"positional_embedding": case.inputs()["positional_embedding"]}
    torch.manual_seed(0)
    for kind, prefix, places in (
        ("scan", "encoder.", {0: "0.0", 1: "0.1", 4: "2.0", 5: "2.1", 8: "4.0"}),
        ("mn40", "", {n: str(n) for n in (0, 1, 4, 5, 8)}),
    ):
        front = "prediction.head." if kind == "scan" else "cls_head_finetune."
        head = tersor.models.create("any2point", **sizes, type=kind).head.eval()
        state = {f"{prefix}{name}": value for name, value in case.state_dict().items()}
        state |= {f"{front}{places[int(k.split('.')[0])]}.{k.split('.')[1]}": v for k, v in head.state_dict().items()}
        model = tersor.models.load("any2point", {**state, **table}, **sizes, type=kind)
        for name, value in head.state_dict().items():
            assert torch.equal(model.head.state_dict()[name], value)
        assert torch.equal(model.views[3].qkv.weight, case.state_dict()["attn1.3.qkv.weight"])
        with pytest.raises(TersorError, match=r"holds no table of positions.*positional_embedding"):
            tersor.models.load("any2point", state, **sizes, type=kind)


def test_refusals() -> None:
    for config, told in (
        ({"source": "touch"}, "source is one of 'language', 'vision', 'audio', not 'touch'"),
        ({"source": "vision", "pos_cor": (1, 0, 0)}, r"has no line: leave pos_cor \(1, 0, 0\) out"),
        ({"trans": -1.0}, "has no pictures"),
        ({"pos_cor": (0, 0, 0)}, r"three numbers, not \(0, 0, 0\)"),
        ({"source": "audio", "across_batch": True}, "mixes no clouds"),
        ({"attn_dim": 10}, "attn_dim 10 is not a multiple of six"),
        ({"patchknn": 17}, "patchknn 17 is above the 16 points"),
        ({"global_feat": ("max", "first")}, "global_feat is one of .* not 'first'"),
        ({"coef_3dgird": 0.0}, "sides above 0"),
    ):
        with pytest.raises(TersorError, match=told):
            build(**config)
    with pytest.raises(TersorError, match=r"64 or more points, 3\), not \[1, 60, 3\]"):
        build()(torch.rand(1, 60, 3))
    with pytest.raises(TersorError, match=r"needs blocks\.0\.norm1\.weight \[24\]; the source checkpoint has none"):
        build().load_source({"norm.weight": torch.ones(24)})
