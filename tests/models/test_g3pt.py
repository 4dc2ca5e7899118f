"""G3PT by the properties of its scheme: order-free sets, residuals, look-up-free codes, the block-causal mask, S passes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import tersor.models
from tersor.errors import TersorError
from tersor.layers.lookup_free import LFQ, to_codes, to_indices
from tersor.models.points.g3pt import G3PT, draw
from tersor.models.points.g3pt_tokenizer import G3PTTokenizer

SCALES = (1, 3, 6)
TOKENIZER = {
    "num_latents": 6,
    "width": 16,
    "num_heads": 2,
    "num_layers_encoder": 1,
    "num_layers_decoder": 1,
    "scales": SCALES,
    "bits": 4,
}
GENERATOR = {
    "width": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 3,
    "scales": SCALES,
    "bits": 4,
    "num_latents": 6,
    "latent_width": 16,
    "latent_heads": 2,
}


def make_tokenizer(**overrides: object) -> G3PTTokenizer:
    torch.manual_seed(0)
    model = tersor.models.create("g3pt_tokenizer", **{**TOKENIZER, **overrides}).double().eval()
    assert isinstance(model, G3PTTokenizer)
    return model


def generator(**overrides: object) -> G3PT:
    torch.manual_seed(0)
    model = tersor.models.create("g3pt", **{**GENERATOR, **overrides}).eval()
    assert isinstance(model, G3PT)
    return model


def sphere(points: int, batch: int = 2) -> Tensor:
    normals = nn.functional.normalize(torch.randn(batch, points, 3, dtype=torch.float64), dim=-1)
    return torch.cat((0.7 * normals, normals), -1)


# ---- the tokenizer


def test_the_order_of_points_and_latents_does_not_count() -> None:
    model, points = make_tokenizer(), sphere(30)
    order = torch.randperm(30)
    with torch.no_grad():
        z, again = model.latent_set(points), model.latent_set(points[:, order])
        torch.testing.assert_close(again, z, rtol=0, atol=1e-5)
        assert torch.equal(model.encode(points[:, order]), model.encode(points))
        shuffled = z[:, torch.randperm(z.shape[1])]
        made, other = model.quantizer(z), model.quantizer(shuffled)
        # the first scale sees the set alone; the others see it less what the first gave to each place
        assert torch.equal(made.tokens[:, :1], other.tokens[:, :1])
        for down in model.quantizer.down:
            torch.testing.assert_close(down(shuffled), down(z), rtol=0, atol=1e-5)


def test_what_is_left_and_what_was_summed_make_up_the_latents() -> None:
    model = make_tokenizer()
    with torch.no_grad():
        z = model.latent_set(sphere(30))
        made = model.quantizer(z)
        torch.testing.assert_close(z - made.residuals[-1], made.total, rtol=0, atol=1e-12)
        torch.testing.assert_close(model.features(made.tokens), made.total, rtol=0, atol=1e-12)
        for count in range(1, len(SCALES) + 1):
            partial = model.quantizer(z, count)
            assert torch.equal(partial.tokens, made.tokens)
            torch.testing.assert_close(z - made.residuals[count - 1], partial.total, rtol=0, atol=1e-12)
            known = made.tokens[:, : sum(SCALES[:count])]
            torch.testing.assert_close(model.features(known), partial.total, rtol=0, atol=1e-12)
            torch.testing.assert_close(model.features(made.tokens, scales=count), partial.total, rtol=0, atol=1e-12)


def test_training_lowers_the_loss_and_what_is_left() -> None:
    model = make_tokenizer().train()
    points, q = sphere(30), 2 * torch.rand(2, 60, 3, dtype=torch.float64) - 1
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    found = []
    for _ in range(25):
        torch.manual_seed(1)
        terms = model.losses(points, q, q.norm(dim=-1) - 0.7)
        terms["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append({name: value.item() for name, value in terms.items()})
    assert found[-1]["occupancy"] < 0.8 * found[0]["occupancy"]
    assert found[-1]["residual"] < 0.5 * found[0]["residual"]


def test_gradients_reach_the_encoder_through_the_codes() -> None:
    model = make_tokenizer(scale_drop=0.0).train()
    logits = model(sphere(30), torch.rand(2, 9, 3, dtype=torch.float64))
    logits.sum().backward()
    assert model.point_in.weight.grad is not None
    assert model.point_in.weight.grad.abs().max() > 0


def test_scale_drop_decodes_from_some_of_the_scales() -> None:
    model = make_tokenizer(scale_drop=1.0).train()
    points, q = sphere(30), torch.rand(2, 20, 3, dtype=torch.float64)
    found = set()
    for seed in range(12):
        torch.manual_seed(seed)
        found.add(round(model.losses(points, q, q.norm(dim=-1) - 0.7)["occupancy"].item(), 9))
    assert len(found) == len(SCALES)


# ---- look-up-free quantization


def test_every_index_is_a_code_and_back() -> None:
    indices = torch.arange(2**9)
    codes = to_codes(indices, 9)
    assert set(codes.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(to_indices(codes), indices)
    assert to_codes(torch.tensor(1), 3).tolist() == [-1.0, -1.0, 1.0]  # the first dimension is the highest bit


def test_the_gradient_goes_straight_through() -> None:
    lfq, z = LFQ(5, 5), torch.randn(2, 7, 5, requires_grad=True)
    values, indices = lfq(z)
    values.sum().backward()
    assert torch.equal(values, to_codes(indices, 5))
    assert torch.equal(z.grad, torch.ones_like(z))


def test_entropy_is_least_for_sure_and_balanced_codes() -> None:
    balanced = to_codes(torch.arange(2**6), 6)[None]

    def entropy(x: Tensor) -> float:
        return LFQ(6, 6, inv_temperature=1.0).losses(x).total(entropy=1.0, commitment=0.0).item()

    assert math.isclose(entropy(100 * balanced), -6 * math.log(2), abs_tol=1e-4)
    assert entropy(100 * balanced) < entropy(0.3 * balanced) - 0.1  # unsure
    assert entropy(100 * balanced) < entropy(100 * balanced[:, :8]) - 0.1  # 8 codes of 64
    assert LFQ(6, 6).losses(balanced).commitment == 0


def test_values_of_indices_are_those_of_the_forward() -> None:
    lfq, x = LFQ(7, 4), torch.randn(3, 5, 7)
    values, indices = lfq(x)
    torch.testing.assert_close(lfq.values(indices), values)
    with pytest.raises(TersorError, match="1 to 24 bits, not 0"):
        LFQ(4, 0)


# ---- the generator


def test_logits_of_a_scale_depend_on_the_scales_before_it_alone() -> None:
    model = generator()
    tokens, label = model.example_inputs(1).values()
    begin = 0
    with torch.no_grad():
        logits = model(tokens, label)
        for s, count in enumerate(SCALES):
            changed = tokens.clone()
            changed[:, begin : begin + count] = (changed[:, begin : begin + count] + 5) % 16
            difference = (model(changed, label) - logits).abs().amax((0, 2))
            assert difference[: begin + count].max() < 1e-6
            assert s + 1 == len(SCALES) or difference[begin + count :].min() > 1e-6
            begin += count


def test_tokens_of_one_scale_see_each_other_and_what_stands_in_front() -> None:
    mask = generator().mask(2, torch.device("cpu"))
    assert mask[2, :3].all()  # the first scale: the front and itself
    assert not mask[2, 3:].any()
    assert mask[3:6, :6].all()
    assert not mask[3:6, 6:].any()
    assert not mask[:2, 2:].any()


def test_one_scale_is_a_plain_parallel_predictor() -> None:
    model = generator(scales=(6,))
    tokens, label = model.example_inputs(2).values()
    with torch.no_grad():
        assert torch.equal(model(tokens, label), model((tokens + 1) % 16, label))


@pytest.mark.parametrize("context_dim", [None, 5])
def test_scale_by_scale_equals_the_whole_and_takes_one_pass_a_scale(context_dim: int | None) -> None:
    model = generator(context_dim=context_dim).double()
    label = torch.tensor([2, 0])
    context = None if context_dim is None else torch.randn(2, 4, context_dim, dtype=torch.float64)
    passes, seen = [], []
    model.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    head = model.head.register_forward_hook(lambda _head, _given, result: seen.append(result))
    tokens = model.generate(label, context, temperature=0)
    head.remove()
    assert tokens.shape == (2, sum(SCALES))
    assert len(passes) == len(SCALES)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(seen, 1), model(tokens, label, context), rtol=0, atol=1e-5)


def test_the_same_seed_draws_the_same_tokens_and_guidance_leads_to_the_label() -> None:
    model, label = generator(), torch.tensor([1])

    def drawn(seed: int, **how: float) -> Tensor:
        return model.generate(label, generator=torch.Generator().manual_seed(seed), **how)

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
    seen: list[Tensor] = []
    model.head.register_forward_hook(lambda _head, _given, result: seen.append(result))
    drawn(0, guidance=3.0)
    assert all(len(logits) == 2 for logits in seen)  # without the label, and with it


def test_draw_keeps_the_likeliest() -> None:
    logits = torch.tensor([[[0.0, 3.0, 2.0, 1.0]]]).expand(1, 500, 4)
    g = torch.Generator().manual_seed(0)
    assert set(draw(logits, temperature=1.0, generator=g).unique().tolist()) == {0, 1, 2, 3}
    assert set(draw(logits, temperature=1.0, top_k=2, generator=g).unique().tolist()) == {1, 2}
    assert set(draw(logits, temperature=1.0, top_p=0.6, generator=g).unique().tolist()) == {1}
    assert set(draw(logits, temperature=0).unique().tolist()) == {1}


def test_training_leaves_conditions_out_and_learns() -> None:
    model = generator(context_dim=5).train()
    inputs = model.example_inputs(4)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
    frozen = model.up[0].queries.clone()
    found = []
    for _ in range(10):
        torch.manual_seed(0)
        loss = model.loss(**inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert found[-1] < 0.8 * found[0]
    assert torch.equal(model.up[0].queries, frozen)
    always = generator(condition_dropout=1.0).train()
    tokens = always.example_inputs(2)["tokens"]
    assert torch.equal(always(tokens, torch.tensor([0, 1])), always(tokens))


def test_the_tokenizers_part_is_taken_over() -> None:
    model, source = generator().double(), make_tokenizer()
    assert not model.taken
    model.take_quantizer(source)
    assert model.taken
    tokens = torch.randint(16, (1, 3))
    assert torch.equal(model.contribution(1, tokens), source.quantizer.contribution(1, tokens))
    with pytest.raises(TersorError, match="g3pt's bits 4 is not the tokenizer's bits 5"):
        model.take_quantizer(make_tokenizer(bits=5))


def test_what_does_not_fit_is_named() -> None:
    model = generator()
    with pytest.raises(TersorError, match="takes 10 tokens of all its scales, not 4"):
        model(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(TersorError, match=r"labels are 0 to 2, not \[3\]"):
        model.generate(torch.tensor([3]))
    with pytest.raises(TersorError, match="takes no context"):
        model.generate(torch.tensor([0]), torch.randn(1, 2, 5))
    with pytest.raises(TersorError, match=r"needs a context \(batch, length, 5\)"):
        generator(context_dim=5).generate()
    with pytest.raises(TersorError, match="num_classes 0 and takes no label"):
        generator(num_classes=0).generate(torch.tensor([0]))
    with pytest.raises(
        TersorError, match=r"scales are ascending numbers of tokens, such as \(1, 4, 16\), not \(4, 1\)"
    ):
        generator(scales=(4, 1))
    tokenizer = make_tokenizer()
    with pytest.raises(TersorError, match="whole scales come as 1, 4, 10, not as 5"):
        tokenizer.features(torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(TersorError, match="have 1 to 2 scales, not 3"):
        tokenizer.features(torch.zeros(1, 4, dtype=torch.long), scales=3)
    with pytest.raises(TersorError, match=r"points with normals \(batch, number, 6\), not \[1, 5, 3\]"):
        tokenizer.encode(torch.rand(1, 5, 3))
