"""Options and methods by layer pattern."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo.tiny_models import build, samples

import tersor
from tersor import GPTQ, RTN, TersorError
from tersor.calibrate.batches import first_tensor
from tersor.compress.recipe import Recipe, make_rules, read_recipe
from tersor.compress.result import Compressed

BASE = GPTQ(bits=4, group_size=32)


def recipe(*rules: dict[str, Any]) -> Recipe:
    return Recipe(BASE, make_rules(rules))


def compressed(*rules: dict[str, Any], model: str = "llama", **options: Any) -> Compressed:
    return tersor.compress(build(model), BASE, rules=rules, calibration=samples(model, 3), **options)


def bits_of(result: Compressed) -> dict[str, float]:
    return {layer.name: layer.bits for layer in result.summary.layers}


def test_options_change_for_the_layers_that_match() -> None:
    chosen = recipe({"match": "*.down_proj", "bits": 8, "group_size": 64})
    assert chosen.method_for("model.layers.0.mlp.down_proj") == GPTQ(bits=8, group_size=64)
    assert chosen.method_for("model.layers.0.mlp.up_proj") == BASE


def test_the_last_rule_that_matches_wins_alone() -> None:
    chosen = recipe({"match": "*.mlp.*", "bits": 8, "sym": False}, {"match": "*.down_proj", "bits": 3})
    assert chosen.method_for("model.layers.0.mlp.down_proj") == GPTQ(bits=3, group_size=32)
    turned = recipe({"match": "*.down_proj", "bits": 3}, {"match": "*.mlp.*", "bits": 8})
    assert turned.method_for("model.layers.0.mlp.down_proj") == GPTQ(bits=8, group_size=32)


def test_another_method_has_options_of_its_own() -> None:
    assert recipe({"match": "*", "method": "rtn", "bits": 8}).method_for("x") == RTN(bits=8)
    assert recipe({"match": "*", "method": "gptq", "bits": 8}).method_for("x") == GPTQ(bits=8, group_size=32)


def test_what_is_skipped_stays_as_it_is_unless_a_later_rule_takes_it() -> None:
    result = compressed({"match": "*.0.*", "skip": True}, {"match": "*.0.*.q_proj", "bits": 8})
    first = {name: bits for name, bits in bits_of(result).items() if ".0." in name}
    assert first == {"model.layers.0.self_attn.q_proj": 8}
    assert "model.layers.0.mlp.up_proj" in result.summary.left


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"match": "*.nothing", "bits": 8}, r"'\*\.nothing' matches none of the 15 linear layers"),
        ({"match": "*.q_proj", "widths": 8}, "has no option 'widths'; it has .*bits"),
        ({"match": "*.q_proj", "method": "magic"}, "unknown method 'magic'; known: .*gptq"),
        ({"match": "*.q_proj", "bits": 5}, "bits=5 is not allowed"),
        ({"match": "*.q_proj", "group_size": 48}, "48"),
        ({"match": "*.q_proj"}, "rule 1, for .* changes nothing"),
        ({"bits": 8}, "rule 1 has no `match`"),
        ({"match": 7, "bits": 8}, "rule 1 has no `match`"),
    ],
)
def test_a_wrong_rule_is_refused_with_what_is_wrong(rule: dict[str, Any], said: str) -> None:
    with pytest.raises(TersorError, match=said):
        compressed(rule)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bits: [4", "not valid YAML"),
        ("- bits: 4", "holds no recipe; give"),
        ("", " is empty; give"),
        ("method: magic", "unknown method 'magic'"),
        ("widths: 4", "has no option 'widths'"),
        ("rules:\n  - bits: 8", "rule 1 has no `match`"),
        ("rules: 8", "rules"),
    ],
)
def test_a_wrong_recipe_file_is_refused_by_name(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(TersorError, match=f"recipe.yaml.*{said}"):
        read_recipe(tmp_path / "recipe.yaml")


def test_a_recipe_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match=r"no recipe file at .*absent\.yaml"):
        read_recipe(tmp_path / "absent.yaml")


def test_a_recipe_file_says_the_same_as_the_call(tmp_path: Path) -> None:
    text = "method: gptq\nbits: 4\ngroup_size: 32\nrules:\n  - match: '*.down_proj'\n    bits: 8\n"
    (tmp_path / "recipe.yaml").write_text(text)
    assert read_recipe(tmp_path / "recipe.yaml") == recipe({"match": "*.down_proj", "bits": 8})


MIXED: tuple[dict[str, Any], ...] = (
    {"match": "*.down_proj", "bits": 8},
    {"match": "*.0.*.o_proj", "group_size": 64},
    {"match": "*.1.*.v_proj", "skip": True},
    {"match": "*.1.*.k_proj", "method": "rtn", "bits": 8, "group_size": 32},
)


@pytest.mark.parametrize("format", ["gptq", "gptq_v2", "compressed-tensors"])
def test_mixed_widths_are_written_and_read_back(format: str, tmp_path: Path) -> None:
    batches = samples("llama", 3)
    build("llama").save_pretrained(tmp_path / "model")
    result = tersor.compress(
        tmp_path / "model", BASE, rules=MIXED, calibration=batches, format=format, out=tmp_path / "out"
    )
    bits = bits_of(result)
    assert len(bits) == 13
    assert {name.rpartition(".")[2] for name, width in bits.items() if width == 8} == {"down_proj", "k_proj"}
    in_memory = compressed(*MIXED, format=format)
    with torch.no_grad():
        expected = first_tensor(in_memory.model(**batches[0]))
        read = first_tensor(tersor.load(tmp_path / "out")(**batches[0]))
    torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-5)
    if format != "compressed-tensors":
        return
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(**batches[0]).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_the_head_is_compressed_on_request(format: str, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "model")
    batches = samples("llama", 3)
    result = tersor.compress(
        tmp_path / "model", BASE, calibration=batches, head=True, format=format, out=tmp_path / "out"
    )
    head = result.summary.layers[-1]
    assert (head.name, head.bits, head.tokens) == ("lm_head", 4, 3 * 24)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"].get("lm_head", True)
    assert "lm_head" not in bits_of(compressed())


def test_a_tied_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match="lm_head is tied to the embedding"):
        compressed(model="gpt2", head=True)


def test_include_and_exclude_choose_layers() -> None:
    only = bits_of(compressed(include=["*.mlp.*"], exclude=["*.0.mlp.up_proj"]))
    assert len(only) == 5
    assert all(".mlp." in name and name != "model.layers.0.mlp.up_proj" for name in only)
    for each in ("include", "exclude"):
        with pytest.raises(TersorError, match=r"pattern '\*\.nothing' matches none"):
            compressed(**{each: ["*.nothing"]})
    with pytest.raises(TersorError, match="no linear layer to compress"):
        compressed(exclude=["*"])


@pytest.mark.parametrize("rule", [{"match": "*experts.down_proj.2", "skip": True}])
def test_part_of_a_stack_of_experts_is_refused_in_a_rule_too(rule: dict[str, Any]) -> None:
    with pytest.raises(TersorError, match=r"include or exclude '.*experts\.down_proj\.\*' as a whole"):
        compressed(rule, model="mixtral")
