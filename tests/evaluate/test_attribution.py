"""Attribution is validated by construction: the damaged layer is found, nothing is found where nothing was damaged."""

from __future__ import annotations

import copy
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ran, change_tensors
from torch import Tensor, nn

import tersor
from tersor.cli.attribute import lines_of
from tersor.compress.recipe import Recipe, read_recipe
from tersor.errors import TersorError
from tersor.evaluate.attribute import attribute, read_attribution, state_file
from tersor.evaluate.attribution import Attribution, Row, cumulative
from tersor.evaluate.correspondence import parts_of
from tersor.evaluate.interval import t_quantile
from tersor.evaluate.measures import Meter, image_measure, text_measure
from tersor.evaluate.suggestion import most_costly
from tersor.methods.activations.repquant import RepQuant
from tersor.methods.weights.smoothquant import SmoothQuant
from tersor.report.attribution_plot import heat_of, kinds_of

Command = Callable[..., Ran]
TOKENS = torch.randint(3, 96, (128,), generator=torch.Generator().manual_seed(0))
DAMAGED = "model.layers.1.mlp.up_proj"
QUICK = ("--seq-len", 32, "--max-eval-samples", 2, "--device", "cpu")


class Stopped(BaseException):
    pass


@pytest.fixture(scope="module")
def base() -> nn.Module:
    """A LLaMA of two narrow layers and few tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, num_key_value_heads=2, initializer_range=0.1, **sizes)).eval()


def damaged(base: nn.Module, name: str = DAMAGED) -> nn.Module:
    """Every layer is moved a little, one of them much."""
    model = copy.deepcopy(base)
    draw = torch.Generator().manual_seed(1)
    for each, module in model.named_modules():
        if isinstance(module, nn.Linear) and each.startswith("model.layers"):
            noise = torch.randn(module.weight.shape, generator=draw) * module.weight.std()
            module.weight.data += noise * (1.0 if each == name else 0.02)
    return model


def meter(base: nn.Module) -> Meter:
    return Meter(text_measure(base, TOKENS, seq_len=32, max_windows=None), base)


def test_the_damaged_layer_comes_first_and_both_models_stay_as_they_were(base: nn.Module) -> None:
    model, measure = damaged(base), meter(base)
    before = [{name: tensor.clone() for name, tensor in each.state_dict().items()} for each in (model, base)]
    found = attribute(model, base, measure)
    assert found.rows[0].name == DAMAGED
    assert (found.rows[0].kind, found.rows[0].depth) == ("mlp.up_proj", 1)
    assert found.rows[0].cost > 10 * found.rows[1].cost
    assert len(found.rows) == 2 * 7 + 1  # and the head, which is the same
    assert [row.kl for row in found.rows if row.name == "lm_head"] == [0]
    assert found.total_kl == pytest.approx(float(measure(model).mean()))
    assert found.left == ()
    whole = attribute(model, base, measure, by="block")
    assert [row.name for row in whole.rows[:2]] == ["model.layers.1", "model.layers.0"]
    for each, kept in zip((model, base), before, strict=True):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in each.state_dict().items())


def test_figures_are_those_of_models_made_by_hand(base: nn.Module) -> None:
    model, measure = damaged(base), meter(base)
    row = next(row for row in attribute(model, base, measure).rows if row.name == DAMAGED)
    alone, rest = copy.deepcopy(base), copy.deepcopy(model)
    alone.get_submodule(DAMAGED).weight.data = model.get_submodule(DAMAGED).weight.data
    rest.get_submodule(DAMAGED).weight.data = base.get_submodule(DAMAGED).weight.data
    gained = measure(model) - measure(rest)
    assert row.kl == pytest.approx(float(measure(alone).mean()))
    assert row.restored == pytest.approx(float(gained.mean()))
    assert row.restored_half_width == pytest.approx(
        t_quantile(len(gained) - 1) * float(gained.std()) / math.sqrt(len(gained))
    )


def test_equal_models_cost_exactly_nothing(base: nn.Module, small: Path, tersor_command: Command) -> None:
    found = attribute(copy.deepcopy(base), base, meter(base))
    assert found.total_kl == 0
    assert all(row.kl == row.restored == 0 for row in found.rows)
    assert len(found.rows) == 15
    ran = tersor_command("attribute", small, "--against", small, *QUICK)
    assert "nothing was lost" in ran.out


def test_a_call_that_was_stopped_goes_on(base: nn.Module, tmp_path: Path) -> None:
    model, measure, state = damaged(base), meter(base), tmp_path / "state"
    whole = attribute(model, base, measure)
    calls: list[int] = []

    def stop(_what: str, done: int, _total: int) -> None:
        calls.append(done)
        if len(calls) == 5:
            raise Stopped

    with pytest.raises(Stopped):
        attribute(model, base, measure, state=state, progress=stop)
    kept = json.loads(state.read_text())["measured"]
    assert len(kept) == 1 + 5  # and the total
    calls.clear()
    assert (
        attribute(model, base, measure, state=state, progress=lambda *_: calls.append(len(_measured(state)))) == whole
    )
    assert calls[:6] == [6] * 5 + [7]  # nothing that was known is measured again
    with pytest.raises(Stopped):
        attribute(model, base, measure, state=state, progress=lambda *_: (_ for _ in ()).throw(Stopped))
    with pytest.raises(TersorError, match="unfinished attribution of other models"):
        attribute(damaged(base), base, measure, state=state, fingerprint="another")


def _measured(state: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(state.read_text())["measured"]
    return found


def test_ctrl_c_while_the_suggestion_is_tried_loses_no_measurement(
    small: Path, tmp_path: Path, tersor_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, out = tmp_path / "made", tmp_path / "lost.json"
    tersor.compress(small, tersor.RTN(bits=2, group_size=32), out=made, device="cpu")
    command = ("attribute", made, "--against", small, *QUICK, "--out", out)
    state, wanted = state_file(out), 1 + 2 + 14  # the total, blocks, layers

    def interrupted(*_: object, **__: object) -> None:
        assert len(_measured(state)) == wanted
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tersor.tasks.attribution.suggest", interrupted)
        ran = tersor_command(*command)
    assert ran.status == 130
    assert "interrupted: give the same command again" in ran.err
    assert not out.exists()
    assert len(_measured(state)) == wanted
    ran = tersor_command(*command, "--no-suggest")
    assert ran.status == 0, ran.err
    assert not state.exists()
    whole = tersor_command(*command[:-2], "--no-suggest", "--json")
    assert json.loads(whole.out) == json.loads(out.read_text())


def test_in_a_short_time_halves_are_measured_and_the_costly_one_first(base: nn.Module, tmp_path: Path) -> None:
    model, measure, state = damaged(base), meter(base), tmp_path / "state"
    first = attribute(model, base, measure, seconds=1e-9, state=state)
    assert len(first.left) == 14
    assert lines_of(first)[-1] == "14 layers were not measured in the time given; give more --time-limit"
    calls = 1
    while (found := attribute(model, base, measure, seconds=1e-9, state=state)).left:
        depths = [row.depth for row in found.rows]
        assert 0 not in depths or depths.count(1) == 7  # the costly block goes first
        calls += 1
        assert calls < 30
    assert found.rows == attribute(model, base, measure).rows


def test_norms_that_took_scales_go_with_their_readers(base: nn.Module) -> None:
    samples = [{"input_ids": TOKENS[None, :64]}]
    steps = [Recipe(SmoothQuant(alpha=0.5)), Recipe(tersor.RTN(bits=8, group_size=-1))]
    smooth = tersor.compress(base, steps, calibration=samples).model.eval()
    measure = meter(base)
    found = attribute(smooth, base, measure)
    together = {row.kind for row in found.rows if row.depth == 0}
    assert any("q_proj + k_proj" in kind and "input_layernorm" in kind for kind in together)
    assert (
        "mlp.gate_proj + up_proj + down_proj + post_attention_layernorm" in together
    )  # up_proj took down_proj's scales
    assert all(row.kl < 3 * found.total_kl for row in found.rows)  # a norm alone would cost far more
    alone = copy.deepcopy(base)
    alone.set_submodule("model.layers.0.input_layernorm", smooth.get_submodule("model.layers.0.input_layernorm"))
    assert float(measure(alone).mean()) > 10 * found.total_kl


def test_classifiers_with_quantized_activations(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
    vit = tersor.models.create("vit", **sizes).eval()
    pixels = torch.randn(12, 3, 32, 32)
    small = tersor.compress(vit, RepQuant(w_bits=4, a_bits=4), calibration=[{"image": x[None]} for x in pixels[:8]])
    measure = Meter(image_measure(pixels, "noise"), vit)
    found = attribute(small.model.eval(), vit, measure)
    assert found.total_kl > 0
    assert found.samples == 12
    assert {row.depth for row in found.rows} >= {0, 1}
    assert {"attn.qkv + norm1", "mlp.fc1 + norm2"} <= {row.kind for row in found.rows}
    assert all(row.kl <= 5 * found.total_kl for row in found.rows)
    assert "noise" in found.text


def test_the_suggestion_is_what_its_recipe_gives(small: Path, tmp_path: Path, tersor_command: Command) -> None:
    change_tensors(small, lambda tensors: tensors.update(_outlier(tensors)))
    made, out = tmp_path / "made", tmp_path / "lost.json"
    tersor.compress(small, tersor.RTN(bits=2, group_size=32), exclude=["*.o_proj"], out=made, device="cpu")
    picture = tmp_path / "lost.svg"
    ran = tersor_command(
        *("attribute", made, "--against", small, *QUICK, "--num-layers", 2, "--out", out, "--plot", picture)
    )
    assert ran.status == 0, ran.err
    assert "Give 2 layers 8 bits" in ran.out
    found = read_attribution(out)
    assert Attribution.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert found.suggestion is not None
    assert found.suggestion.kl_after < found.suggestion.kl_before
    assert found.suggestion.size_after > found.suggestion.size_before
    assert found.suggestion.layers == tuple(row.name for row in found.rows[:2])
    assert "<svg" in picture.read_text()
    recipe = out.with_suffix(".yaml")
    told = recipe.read_text().splitlines()[0].removeprefix("# tersor ").replace("lost.yaml", str(recipe))
    command = shlex.split(told)
    ran = tersor_command(*command[:-1], tmp_path / "again", "--device", "cpu")
    assert ran.status == 0, ran.err
    assert read_recipe(recipe).method_for(found.rows[0].name) == tersor.RTN(bits=8, group_size=32)
    model, original = (tersor.load(each, device="cpu").eval() for each in (tmp_path / "again", small))
    assert len(parts_of(original, model)) == 15
    text = tersor_command("attribute", tmp_path / "again", "--against", small, *QUICK, "--no-suggest", "--json")
    assert json.loads(text.out)["total_kl"] == pytest.approx(found.suggestion.kl_after, rel=1e-6)


def test_of_blocks_whole_ones_are_given_more() -> None:
    rows = [
        Row(f"m.{n}", "block", n, 2.0, cost, None, cost, None, members=(f"m.{n}.a", f"m.{n}.b"))
        for n, cost in enumerate((0.1, 0.3, 0.0, 0.2))
    ]
    layers = frozenset(f"m.{n}.{name}" for n in range(4) for name in ("a", "b"))
    for most, wanted in ((1, [1]), (3, [1]), (4, [1, 3]), (99, [1, 3, 0])):
        assert most_costly(rows, layers, most=most, bits=8) == [f"m.{n}.{name}" for n in wanted for name in ("a", "b")]
    assert most_costly(rows, layers, most=4, bits=2) == []


def _outlier(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    weight = tensors["model.layers.0.mlp.gate_proj.weight"].clone()
    weight[::4, ::8] *= 8
    return {"model.layers.0.mlp.gate_proj.weight": weight}


def test_bad_input_is_one_line(small: Path, tmp_path: Path, base: nn.Module, tersor_command: Command) -> None:
    empty, stranger = tmp_path / "empty.txt", tmp_path / "stranger.json"
    empty.write_text("")
    stranger.write_text("{}")
    for arguments, said in (
        ((small, "--against", "demo"), "the layers of the two models do not correspond"),
        ((small, "--against", "demo-vit"), "compared on"),
        (("demo-vit", "--against", "demo-vit"), "give --images DIR"),
        ((small, "--against", small, "--text", empty), "empty.txt is empty"),
        ((small, "--against", small, "--text", tmp_path / "none.txt"), "none.txt"),
        ((small, "--against", small, "--images", tmp_path, "--max-eval-samples", 2), "--images does nothing"),
        ((small, "--against", small, "--images", tmp_path), "--seq-len does nothing for --images"),
        ((small, "--against", small, "--no-suggest", "--num-layers", 2), "--num-layers does nothing for --no-suggest"),
        ((small, "--against", small, "--no-suggest", "--bits", 8), "--bits does nothing for --no-suggest"),
        ((small, "--against", small, "--time-limit", "soon"), "--time-limit soon"),
        ((small, "--against", small, "--by", "row"), "--by row is not one of layer, block"),
        ((small, "--against", small, "--max-eval-samples", 0), "0 samples at most"),
        ((small, "--against", small, "--out", stranger), "is no attribution"),
        ((small, "--against", small, "--out", tmp_path / "x.txt"), "written as .json"),
        ((small, "--against", small, "--plot", tmp_path / "x.gif"), "pictures end in"),
        ((small, "--against", tmp_path / "nowhere"), "no model at"),
    ):
        ran = tersor_command("attribute", *arguments, *(() if "--max-eval-samples" in arguments else QUICK))
        assert ran.status == 2, (arguments, ran.out)
        assert said in ran.err, ran.err
        assert len(ran.err.strip().splitlines()) == 1
    state = state_file(tmp_path / "a.json")
    state.write_text("{}")
    ran = tersor_command("attribute", small, "--against", small, *QUICK, "--out", tmp_path / "a.json")
    assert "holds no unfinished attribution" in ran.err
    fewer = copy.deepcopy(base)
    del fewer.model.layers[1]
    with pytest.raises(TersorError, match=r"only one of the models has model\.layers\.1"):
        parts_of(base, fewer)
    narrow = copy.deepcopy(base)
    narrow.model.layers[0].mlp.up_proj = nn.Linear(64, 96)
    with pytest.raises(TersorError, match=r"up_proj has 96 out features in one, 128 in the other"):
        parts_of(base, narrow)


def test_a_job_that_cannot_be_done_again_is_told(base: nn.Module, small: Path, tersor_command: Command) -> None:
    change_tensors(small, lambda tensors: tensors.update(_outlier(tensors)))
    other = small.parent / "other"
    tersor.compress(tersor.load(small), tersor.RTN(bits=4, group_size=32)).save(other)
    ran = tersor_command("attribute", other, "--against", small, *QUICK, "--by", "block")
    assert ran.status == 0, ran.err
    assert "note: no suggestion: the record of" in ran.out


def test_the_picture_shows_each_layer_in_its_place(base: nn.Module) -> None:
    rows = attribute(damaged(base), base, meter(base)).rows
    shares = cumulative(rows)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    inside = [row for row in rows if row.depth is not None]
    heat = heat_of(inside, kinds := kinds_of(inside))
    assert heat.shape == (7, 2)
    assert all(heat[kinds.index(row.kind), row.depth] == row.cost for row in inside)
    assert math.isnan(heat_of(inside[:1], kinds)[0].min())


def test_other_files_are_no_attributions(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match="no attribution"):
        read_attribution(tmp_path / "none.json")
    with pytest.raises(TersorError, match="cannot be read"):
        Attribution.from_json({"kind": "attribution"})
