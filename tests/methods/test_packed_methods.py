"""Methods that tune a packed model: what they may change, that they never end worse, and that the file holds what was tuned."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran
from safetensors.torch import load_file
from torch import nn
from zoo.tiny_models import build, samples

import tersor
from tersor import GPTQ, RTN, TersorError
from tersor.calibrate.batches import without_cache
from tersor.compress import from_options
from tersor.compress.recipe import Recipe, Rule
from tersor.layers.quantized_linear import QuantizedLinear, packed_layers
from tersor.methods.method import Method, PackedMethod, Work
from tersor.methods.training import held_out
from tersor.methods.training.held_out import drawn, judged, split, travelled
from tersor.methods.training.rounding import Rounding
from tersor.methods.training.scales import Scales
from tersor.methods.training.tuned_weight import TunedWeight, learning, requiring
from tersor.methods.weights.sparsegpt import SparseGPT

PACKED = GPTQ(bits=2, group_size=16)


def teacher() -> nn.Module:
    return build("llama").float()


def texts(count: int = 48) -> list[dict[str, Any]]:
    drawn_ = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 96, (1, 24), generator=drawn_)} for _ in range(count)]


def packed(model: nn.Module, method: Method = PACKED) -> nn.Module:
    return tersor.compress(model, method, calibration=texts(16)).model


def tuned(
    method: PackedMethod, *, base: Method = PACKED, count: int = 48
) -> tuple[nn.Module, nn.Module, nn.Module, Work]:
    """The original, the packed model before, and after."""
    model = teacher()
    before = packed(model, base)
    after, work = copy.deepcopy(before), Work(texts(count), lambda name: True, lambda what, done, total: None)
    for each in (model, after):
        each.requires_grad_(False)
    with torch.no_grad(), without_cache(model), without_cache(after):
        method.tune(after, model, work)
    return model, before, after, work


@pytest.mark.parametrize(
    "base", [PACKED, GPTQ(bits=3, group_size=32, sym=False), GPTQ(bits=4, group_size=16, desc_act=True)]
)
def test_a_weight_that_has_not_learned_is_the_packed_one(base: GPTQ) -> None:
    for layer in packed_layers(packed(teacher(), base)).values():
        weight = TunedWeight(layer, moves=True)
        torch.testing.assert_close(weight.matrix(), layer.packed.dequantize(torch.float32), rtol=1e-6, atol=1e-7)
        again = weight.weight()
        assert torch.equal(again.qweight, layer.packed.qweight)
        assert torch.equal(again.scales, layer.packed.scales)
        x = torch.randn(3, layer.in_features)
        torch.testing.assert_close(weight.forward(x), layer(x), rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_step_is_that_of_the_formula() -> None:
    layer = next(iter(packed_layers(packed(teacher())).values()))
    weight = TunedWeight(layer)
    x = torch.randn(5, layer.in_features)
    with requiring([weight.log_step]), torch.enable_grad():
        torch.autograd.backward(weight.forward(x).square().sum())
    found, h = weight.log_step.grad, 1e-2
    assert found is not None
    weight.stored = type(weight.stored)(torch.float32)  # finite differences do not see through the rounding to float16
    exact = []
    for sign in (1, -1):
        weight.log_step = torch.zeros_like(weight.log_step)
        weight.log_step[3, 1] = sign * h
        exact.append(float(weight.forward(x).square().sum()))
    assert float(found[3, 1]) == pytest.approx((exact[0] - exact[1]) / (2 * h), rel=2e-2)


def test_scales_change_no_integer_and_do_not_end_worse_on_samples_kept_apart() -> None:
    model, before, after, work = tuned(Scales(epochs=3, lr=2e-2))
    _, apart = split(texts(), "scales")
    first, last = judged(before, model, apart), judged(after, model, apart)
    assert last < first
    row = work.reports[-1].row()
    assert row["before"] == pytest.approx(first)
    assert row["after"] == pytest.approx(last, rel=1e-5)
    old, new = packed_layers(before), packed_layers(after)
    assert all(torch.equal(old[name].qweight, new[name].qweight) for name in old)
    assert any(not torch.equal(old[name].scales, new[name].scales) for name in old)
    assert {each.scales.dtype for each in new.values()} == {torch.float16}


def test_integers_move_by_one_at_most_within_the_levels_in_use() -> None:
    _, before, after, _ = tuned(Scales(epochs=2, integers=True, travel=3.0), base=GPTQ(bits="ternary", group_size=16))
    old, new = packed_layers(before), packed_layers(after)
    moves = [new[name].packed.codes().int() - old[name].packed.codes().int() for name in old]
    assert max(int(each.abs().max()) for each in moves) == 1
    assert {int(code) for each in new.values() for code in each.packed.codes().unique()} <= {1, 2, 3}


def test_rounding_moves_integers_by_one_and_brings_blocks_closer() -> None:
    _, before, after, work = tuned(Rounding(epochs=4, travel=1.0), base=GPTQ(bits=3, group_size=16), count=96)
    rows = [report.row() for report in work.reports]
    assert [row["name"] for row in rows] == ["model.layers.0", "model.layers.1", "(all)"]
    assert all(row["after"] <= row["before"] for row in rows)
    assert rows[0]["after"] < rows[0]["before"]
    assert rows[-1]["after"] < rows[-1]["before"]
    old, new = packed_layers(before), packed_layers(after)
    moves = [new[name].packed.codes().int() - old[name].packed.codes().int() for name in old]
    assert max(int(each.abs().max()) for each in moves) == 1
    share = sum(int((each != 0).sum()) for each in moves) / sum(each.numel() for each in moves)
    assert share == pytest.approx(rows[-1]["moved"])


@pytest.mark.parametrize("method", [Scales(epochs=1, lr=0.9), Rounding(epochs=1, travel=50.0, step_lr=0.9)])
def test_what_would_end_worse_is_left_as_it_was(method: PackedMethod) -> None:
    model, before, after, work = tuned(method)
    _, apart = split(texts(), "x")
    assert judged(after, model, apart) <= judged(before, model, apart)
    if "left as it was" in str(work.reports[-1].row()["note"]):
        old, new = packed_layers(before), packed_layers(after)
        assert all(torch.equal(old[name].qweight, new[name].qweight) for name in old)
        assert all(torch.equal(old[name].scales, new[name].scales) for name in old)


def test_layers_that_are_not_wanted_stay() -> None:
    model = teacher()
    plain = tersor.compress(model, PACKED, calibration=texts())
    found = tersor.compress(plain.model, Scales(epochs=1), calibration=texts(), original=model, include=["*.mlp.*"])
    for name, layer in packed_layers(found.model).items():
        assert torch.equal(layer.scales, packed_layers(plain.model)[name].scales) == (".mlp." not in name)


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_steps_on_disk_write_the_same_format_with_what_was_tuned(tmp_path: Path, format: str) -> None:
    teacher().save_pretrained(tmp_path / "model")
    job: dict[str, Any] = {"calibration": texts(9), "format": format}
    steps: list[Method] = [PACKED, Rounding(epochs=1), Scales(epochs=2, lr=3e-3)]
    plain = tersor.compress(tmp_path / "model", PACKED, out=tmp_path / "plain", **job).summary
    done = tersor.compress(tmp_path / "model", steps, out=tmp_path / "out", **job)
    assert done.summary.quantization == plain.quantization
    assert done.summary.bits_per_weight == plain.bits_per_weight
    assert done.summary.size_after == plain.size_after
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [step["name"] for step in said["tersor_steps"]] == ["gptq", "rounding", "scales"]
    made = json.loads((tmp_path / "out" / "tersor.json").read_text())
    assert made["format"] == format
    assert made["settings"] == {"calibration": "given in Python"}
    assert made["rules"] == []
    assert made["version"] == tersor.__version__
    assert made["fingerprint"]["method"] == "scales"
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "out"))
    assert first.keys() == second.keys()
    changed = {key.rpartition(".")[2] for key in first if not torch.equal(first[key], second[key])}
    scale = "weight_scale" if format == "compressed-tensors" else "scales"
    assert changed <= {scale, "qweight", "weight_packed"}
    assert scale in changed
    assert all(first[key].dtype == second[key].dtype and first[key].shape == second[key].shape for key in first)
    said_after = done.summary.divergence
    with torch.no_grad():
        read = tersor.load(tmp_path / "out")(**texts(1)[0]).logits
        original = tersor.load(tmp_path / "model")(**texts(1)[0]).logits.log_softmax(-1)
    assert said_after == pytest.approx(
        float((original.exp() * (original - read.log_softmax(-1))).sum(-1).mean()), rel=1e-3
    )


def test_a_packed_directory_is_tuned_by_itself(tersor_command: Callable[..., Ran], tmp_path: Path) -> None:
    common = ("--samples", 4, "--seq-len", 32)
    assert tersor_command("quantize", "demo", "--method", "rtn", "--bits", 3, "--out", tmp_path / "packed").status == 0
    alone = tersor_command("compress", "scales", tmp_path / "packed", "--out", tmp_path / "no", *common)
    assert alone.status == 2
    assert "give it as --original" in alone.err
    wrong = tersor_command("compress", "scales", "demo", "--original", "demo", "--out", tmp_path / "no", *common)
    assert "demo is not packed" in wrong.err
    packed_too = tersor_command(
        "compress", "scales", tmp_path / "packed", "--original", tmp_path / "packed", "--out", tmp_path / "no", *common
    )
    assert "is quantized itself" in packed_too.err
    verb = tersor_command("quantize", "demo", "--method", "scales", "--out", tmp_path / "no")
    assert "tersor compress scales PACKED --original MODEL" in " ".join(verb.err.split())
    ran = tersor_command(
        "compress", "scales", tmp_path / "packed", "--original", "demo", "--epochs", 1,
        "--out", tmp_path / "out", "--json", *common,
    )  # fmt: skip
    assert ran.status == 0, ran.err
    assert json.loads(ran.out)["layers"][-1]["after"] < json.loads(ran.out)["layers"][-1]["before"]
    assert not (tmp_path / "no").exists()


def test_steps_that_do_not_follow_are_refused() -> None:
    for steps, said in (
        ([from_options("awq-scale", {}), Scales()], "step 2, scales, tunes packed weights: put gptq or rtn in front"),
        ([RTN(), Scales(), GPTQ()], "step 2, scales, packs the weights, which no later step can change"),
    ):
        with pytest.raises(TersorError, match=said):
            tersor.compress(teacher(), steps, calibration=texts())
    with pytest.raises(TersorError, match="the steps know the original"):
        tersor.compress(teacher(), [RTN(), Scales()], calibration=texts(), original=teacher())
    with pytest.raises(TersorError, match=r"original=.* does nothing with gptq: it counts for methods that tune"):
        tersor.compress(teacher(), GPTQ(group_size=16), calibration=texts(), original="demo")
    with pytest.raises(TersorError, match="give it as original="):
        tersor.compress(teacher(), Scales(), calibration=texts())
    with pytest.raises(TersorError, match="has no packed layer"):
        tersor.compress(teacher(), Scales(), calibration=texts(), original=teacher())


def test_integers_do_not_move_away_from_zeros_of_a_step_before(tmp_path: Path) -> None:
    sparse = SparseGPT(sparsity=0.5, bits=4, group_size=16)
    for steps, said in (
        ([sparse, Rounding()], "rounding moves integers, so the zeros of sparsity 0.5 would be lost: use scales"),
        ([sparse, Scales(), Scales(integers=True)], "scales moves integers, .* leave --integers out"),
        ([Recipe(GPTQ(), (Rule("*.q_proj", {}, "sparsegpt"),)), Rounding()], "sparsity 0.5 would be lost"),
    ):
        with pytest.raises(TersorError, match=said):
            tersor.compress(teacher(), steps, calibration=texts())
    teacher().save_pretrained(tmp_path / "model")
    tersor.compress(tmp_path / "model", sparse, calibration=texts(4), out=tmp_path / "packed")
    with pytest.raises(TersorError, match="would be lost"):
        tersor.compress(tmp_path / "packed", Rounding(), calibration=texts(4), original=tmp_path / "model")
    found = tersor.compress(teacher(), [sparse, Scales(epochs=1)], calibration=texts(4))
    for layer in packed_layers(found.model).values():
        assert float((layer.weight == 0).float().mean()) >= 0.5


def test_an_encoder_decoder_that_is_given_one_text_is_tuned() -> None:
    model, steps = build("t5").float(), [PACKED, Rounding(epochs=1), Scales(epochs=1)]
    found = tersor.compress(model, steps, calibration=texts(9)).summary.layers
    assert sum(each.name == "(all)" for each in found) == 2


def test_a_model_in_float16_is_tuned_in_float32_and_given_back_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ran = teacher().half(), []
    plain = tersor.compress(teacher(), PACKED, calibration=texts(4)).model.half()
    tune = Scales.tune

    def watched(method: Scales, model: nn.Module, original: nn.Module, work: Work) -> None:
        ran.append({each.dtype for part in (model, original) for each in part.parameters()})
        tune(method, model, original, work)

    monkeypatch.setattr(Scales, "tune", watched)
    found = tersor.compress(plain, Scales(epochs=1), calibration=texts(4), original=model).model
    assert ran == [{torch.float32}]
    assert {name: each.dtype for name, each in found.state_dict().items()} == {
        name: each.dtype for name, each in plain.state_dict().items()
    }
    assert all(layer.weight.dtype == torch.float16 for layer in packed_layers(found).values())


def test_too_few_samples_are_one_line() -> None:
    with pytest.raises(TersorError, match="scales keeps samples apart to judge by: give at least 2, not 1"):
        tersor.compress(teacher(), [PACKED, Scales()], calibration=texts(1))


def test_an_encoder_of_several_lengths_is_tuned_on_what_it_returns() -> None:
    model = build("bert").float()
    steps = [GPTQ(bits=2, group_size=16), Rounding(epochs=2), Scales(epochs=2, batch_size=2)]
    lengths = [
        {"input_ids": torch.randint(1, 96, (1, 8 + n), generator=torch.Generator().manual_seed(n))} for n in range(9)
    ]
    found = tersor.compress(model, steps, calibration=lengths).summary.layers
    ends = [each.row() for each in found if each.name == "(all)"]
    assert len(ends) == 2
    assert all(each["after"] <= each["before"] for each in ends)


def test_orders_visit_every_sample_once_an_epoch_and_rates_add_up() -> None:
    order = drawn(7, 3, 2, 0)
    assert [len(each) for each in order] == [3, 3, 1, 3, 3, 1]
    assert sorted(order[0] + order[1] + order[2]) == list(range(7))
    assert order[:3] != order[3:]
    assert travelled(100) == pytest.approx(50, rel=0.1)
    learned, apart = split(samples("llama", 16), "x")
    assert (len(learned), len(apart)) == (14, 2)


@pytest.mark.parametrize("at_once", [1, 50, 1 << 20])
def test_the_divergence_of_logits_and_its_gradient_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(held_out, "NUMBERS", at_once)
    chance = torch.Generator().manual_seed(0)
    wanted, share = torch.randn(13, 17, generator=chance), torch.rand(13, generator=chance)
    output = torch.randn(13, 17, generator=chance, requires_grad=True)
    found = held_out.Divergence.apply(output, wanted, share)
    q, p = output.log_softmax(-1), wanted.log_softmax(-1)
    expected = (nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1) * share).sum()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(3 * each, output)[0] for each in (found, expected)))


def test_layers_compute_as_before_when_learning_fails() -> None:
    layers = packed_layers(packed(teacher()))
    layer: QuantizedLinear = next(iter(layers.values()))
    x = torch.randn(2, layer.in_features)
    expected = layer(x)
    with pytest.raises(RuntimeError), learning([TunedWeight(layer)]):
        raise RuntimeError
    assert torch.equal(layer(x), expected)
