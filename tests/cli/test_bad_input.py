"""Bad input is one clear line on standard error and a non-zero exit, and nothing half-written."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran, change_json, change_tensors, files_of

from tersor.methods.method import methods

Command = Callable[..., Ran]
FEW = ("--samples", 2, "--seq-len", 32, "--group-size", 32)


def refused(ran: Ran, *expected: str) -> None:
    """Exit status 2, nothing on standard output, and one line that holds all of `expected`."""
    assert ran.status == 2, ran
    assert ran.out == ""
    assert len(ran.err.strip().splitlines()) == 1, ran.err
    assert ran.err.startswith("tersor: ")
    for words in expected:
        assert words in ran.err


# ---- what is no model


def test_a_path_that_does_not_exist(tersor_command: Command, tmp_path: Path) -> None:
    refused(
        tersor_command("quantize", tmp_path / "nowhere", "--out", tmp_path / "out"),
        "no model at",
        "give a directory, a hub name such as org/name",
    )


@pytest.mark.parametrize("verb", ["quantize", "eval", "generate", "inspect"])
def test_a_directory_that_is_no_model(tersor_command: Command, tmp_path: Path, verb: str) -> None:
    (tmp_path / "letters").mkdir()
    more = {"quantize": ("--out", tmp_path / "out"), "generate": ("--prompt", "a")}.get(verb, ())
    refused(tersor_command(verb, tmp_path / "letters", *more), "is not a model: it has no config.json")
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_a_directory(tersor_command: Command, small: Path) -> None:
    refused(tersor_command("inspect", small / "config.json"), "is a file; give the directory")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{not json", "is not valid JSON"),
        ("[1, 2]", "holds no object"),
        ("\udcff", "is not valid JSON"),
        ("{}", "architecture"),
        ('{"architectures": ["GrandUnifiedTransformer"]}', "GrandUnifiedTransformer"),
        ('{"architectures": "LlamaForCausalLM"}', "architectures"),
        ('{"architectures": [], "model_type": "llama"}', "architecture"),
    ],
)
def test_a_config_that_describes_no_model(tersor_command: Command, small: Path, content: str, expected: str) -> None:
    (small / "config.json").write_text(content, errors="surrogateescape")
    refused(tersor_command("inspect", small), expected)
    refused(tersor_command("quantize", small, "--out", small.parent / "out", *FEW), expected)
    assert not (small.parent / "out").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": 65},
        {"hidden_size": "wide"},
        {"num_hidden_layers": 3},
        {"vocab_size": 100},
        {"hidden_act": "loud"},
        {"dtype": "float7"},
    ],
)
def test_a_config_that_does_not_go_with_the_tensors(
    tersor_command: Command, small: Path, values: dict[str, Any]
) -> None:
    change_json(small / "config.json", **values)
    refused(tersor_command("quantize", small, "--out", small.parent / "out", *FEW))
    assert not (small.parent / "out").exists()


def test_a_truncated_safetensors_file(tersor_command: Command, small: Path) -> None:
    path = small / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(tersor_command("quantize", small, "--out", small.parent / "out", *FEW), "model.safetensors cannot be read")


def test_a_file_that_is_no_safetensors(tersor_command: Command, small: Path) -> None:
    (small / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(tersor_command("inspect", small), "model.safetensors cannot be read")


def test_a_missing_tensor(tersor_command: Command, small: Path) -> None:
    change_tensors(small, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refused(tersor_command("inspect", small), "lacks the tensor model.layers.1.mlp.up_proj.weight")


def test_an_index_that_names_a_missing_shard(tersor_command: Command, small: Path) -> None:
    (small / "model.safetensors").unlink()  # which would come first
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (small / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tersor_command("inspect", small), "lacks model-00002-of-00002.safetensors, which its index names")


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(tersor_command: Command, small: Path, content: str) -> None:
    (small / "model.safetensors").unlink()
    (small / "model.safetensors.index.json").write_text(content)
    refused(tersor_command("inspect", small), "is not a safetensors index")


def test_a_model_that_is_quantized_already(tersor_command: Command, small: Path) -> None:
    change_json(small / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    refused(tersor_command("quantize", small, "--out", small.parent / "out"), "is quantized already")


# ---- options


@pytest.mark.parametrize("bits", ["5", "0", "-4", "abc", "4.5", ""])
def test_an_unsupported_number_of_bits(tersor_command: Command, small: Path, bits: str) -> None:
    refused(
        tersor_command("quantize", small, "--out", small.parent / "out", f"--bits={bits}"),
        "is not allowed: 2, 3, 4, 8 or 'ternary'",
    )


def test_a_group_size_that_does_not_divide_names_the_layer_and_sizes_that_would(
    tersor_command: Command, small: Path
) -> None:
    refused(
        tersor_command("quantize", small, "--out", small.parent / "out", "--group-size", 48),
        "group size 48 does not divide the 64 inputs of model.layers.0.self_attn.q_proj; these would: 16, 32, 64, -1",
    )
    assert not (small.parent / "out").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--group-size", 0], "group_size=0 is not allowed"),
        (["--group-size", -2], "group_size=-2 is not allowed"),
        (["--damp", 0], "damp=0.0 is not allowed"),
        (["--damp", 1.5], "damp=1.5 is not allowed"),
        (["--damp", "nan"], "damp=nan is not allowed"),
        (
            ["--method", "magic"],
            f"unknown method 'magic'; known: {', '.join(methods())}",
        ),
        (["--method", "rtn", "--damp", 0.1], "method rtn has no option 'damp'"),
        (["--method", "rtn", "--desc-act"], "method rtn has no option 'desc_act'"),
        (["--samples", 0], "must be positive"),
        (["--samples", -3], "must be positive"),
        (["--seq-len", 0], "must be positive"),
        (["--format", "gguf"], "unknown format 'gguf'; known: gptq, gptq_v2, compressed-tensors"),
        (["--dtype", "int8"], "dtype 'int8' is not one of"),
        (["--device", "warp"], "'warp' is no device"),
        (["--include", "*.attention.*"], "the pattern '*.attention.*' matches none of the"),
        (["--exclude", "*"], "no linear layer to compress"),
        (["--bits", "ternary", "--asym"], "fit no file format"),
        (["--method", "greenformers"], "greenformers works on the whole model: tersor compress greenformers MODEL"),
    ],
)
def test_options_out_of_range(tersor_command: Command, small: Path, options: list[object], expected: str) -> None:
    refused(tersor_command("quantize", small, "--out", small.parent / "out", *FEW, *options), expected)
    assert not (small.parent / "out").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--samples", "many"], "--samples many: it should be a valid integer; `tersor quantize -h` shows how"),
        (["--bist=4"], "there is no option --bist; did you mean --bits?"),
        (["--bits"], "option '--bits' requires an argument; `tersor quantize -h` shows how"),
        (["extra"], "unexpected extra argument"),
    ],
)
def test_options_that_cannot_be_parsed(
    tersor_command: Command, small: Path, options: list[object], expected: str
) -> None:
    refused(tersor_command("quantize", small, "--out", small.parent / "out", *options), expected)


def test_a_missing_output_directory_option(tersor_command: Command, small: Path) -> None:
    refused(tersor_command("quantize", small), "quantize needs --out")


def test_of_an_option_given_twice_the_last_counts(tersor_command: Command, small: Path, tmp_path: Path) -> None:
    ran = tersor_command(
        "quantize",
        small,
        "--out",
        tmp_path / "out",
        "--group-size",
        32,
        "--bits",
        8,
        "--bits",
        4,
        "--json",
        "--method",
        "rtn",
    )
    assert ran.status == 0, ran.err
    assert json.loads(ran.out)["method"]["bits"] == 4


def test_widths_that_fill_no_words_name_the_layer_and_the_way_out(tersor_command: Command, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, head_dim=12
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "odd")
    refused(
        tersor_command(
            "quantize",
            tmp_path / "odd",
            "--out",
            tmp_path / "out",
            "--group-size",
            -1,
            "--method",
            "rtn",
            "--format",
            "gptq",
        ),
        "model.layers.0.self_attn.q_proj has 48 inputs",
        "use --format compressed-tensors",
    )


# ---- the output directory


def test_an_output_directory_that_is_not_ours(tersor_command: Command, small: Path, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to-a-friend.txt").write_text("Dear friend,")
    before = files_of(tmp_path / "letters")
    refused(tersor_command("quantize", small, "--out", tmp_path / "letters", *FEW), "exists and is not empty")
    refused(
        tersor_command("quantize", small, "--out", tmp_path / "letters", *FEW, "--overwrite"),
        "is no model directory, so --overwrite does not empty it",
    )
    assert files_of(tmp_path / "letters") == before


def test_an_output_directory_that_is_a_file(tersor_command: Command, small: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        refused(tersor_command("quantize", small, "--out", out, *FEW))
    assert (tmp_path / "file").read_text() == "text"


def test_an_output_directory_that_is_the_model(tersor_command: Command, small: Path) -> None:
    before = files_of(small)
    refused(tersor_command("quantize", small, "--out", small, *FEW, "--overwrite"), "is the model itself")
    assert files_of(small) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_directory_that_cannot_be_written(tersor_command: Command, small: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(tersor_command("quantize", small, "--out", tmp_path / "locked" / "out", *FEW), "cannot write to")


def test_an_output_directory_on_a_file_system_that_takes_no_files(tersor_command: Command, small: Path) -> None:
    refused(tersor_command("quantize", small, "--out", "/proc/tersor-out", *FEW), "cannot write to /proc/tersor-out")


def test_an_unfinished_job_of_another_kind_is_left_alone(tersor_command: Command, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".tersor-job").mkdir(parents=True)
    (out / ".tersor-job" / "journal.json").write_text(json.dumps({"fingerprint": {"model": "other"}, "done": {}}))
    before = files_of(out)
    refused(tersor_command("quantize", small, "--out", out, *FEW), "holds an unfinished job with another")
    refused(tersor_command("inspect", out), "holds an unfinished job; run its command again")
    assert files_of(out) == before


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"fingerprint": {}}'])
def test_a_damaged_journal(tersor_command: Command, small: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "out" / ".tersor-job").mkdir(parents=True)
    (tmp_path / "out" / ".tersor-job" / "journal.json").write_text(content)
    refused(tersor_command("quantize", small, "--out", tmp_path / "out", *FEW), "journal.json is damaged")


# ---- calibration


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.txt", b"", "empty.txt is empty"),
        ("blank.txt", b" \n\n", "blank.txt is empty"),
        ("binary.txt", bytes(range(256)), "is not UTF-8 text: byte 128 is 0x80"),
        ("nul.txt", b"text\0text", "is a binary file"),
        ("short.txt", b"Too short.", "less than one sample of 32; use a longer text or --seq-len"),
        ("broken.txt.gz", b"no gzip", "cannot be read"),
        ("cut.txt.gz", gzip.compress(b"cut " * 1000, mtime=0)[:-10], "cannot be read"),
    ],
)
def test_a_calibration_text_that_does_not_do(
    tersor_command: Command, small: Path, tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    (tmp_path / name).write_bytes(content)
    ran = tersor_command("quantize", small, "--out", tmp_path / "out", *FEW, "--calibration", tmp_path / name)
    refused(ran, expected)
    assert not (tmp_path / "out").exists()


def test_a_calibration_text_that_is_not_there(tersor_command: Command, small: Path, tmp_path: Path) -> None:
    ran = tersor_command("quantize", small, "--out", tmp_path / "out", *FEW, "--calibration", tmp_path / "no.txt")
    refused(ran, "there is no file or folder", "no.txt for --calibration")


def test_a_model_without_a_tokenizer(tersor_command: Command, small: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (small / name).unlink()
    refused(tersor_command("quantize", small, "--out", tmp_path / "out", *FEW), "the model has no tokenizer")
    refused(tersor_command("generate", small, "--prompt", "a"), "no tokenizer")
    refused(tersor_command("eval", small), "the model has no tokenizer")


def test_samples_longer_than_the_model_are_cut_to_its_positions(
    tersor_command: Command, small: Path, tmp_path: Path
) -> None:
    ran = tersor_command(
        "quantize", small, "--out", tmp_path / "out", "--samples", 1, "--seq-len", 5000, "--group-size", 32, "--json"
    )
    assert ran.status == 0, ran.err
    assert {layer["tokens"] for layer in json.loads(ran.out)["layers"]} == {256}


# ---- numbers that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_weights_that_are_not_finite(
    tersor_command: Command, small: Path, tmp_path: Path, value: float, method: str
) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value

    change_tensors(small, damage)
    few = FEW if method == "gptq" else ("--group-size", 32)
    ran = tersor_command("quantize", small, "--out", tmp_path / "out", *few, "--method", method)
    refused(ran, "model.layers.1.mlp.up_proj.weight is not finite (NaN or Inf)")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_module_and_the_sample(
    small: Path, tmp_path: Path, value: float
) -> None:
    import tersor

    samples = [{"inputs_embeds": torch.randn(1, 8, 64)} for _ in range(4)]
    samples[2]["inputs_embeds"][0, 3] = value
    expected = r"the input of model\.layers\.0\.self_attn\.q_proj is not finite \(NaN or Inf\) in calibration sample 2"
    with pytest.raises(tersor.TersorError, match=expected):
        tersor.compress(small, tersor.GPTQ(group_size=32), calibration=samples, out=tmp_path / "out")


# ---- quantized checkpoints that are damaged


@pytest.fixture(scope="module")
def quantized(small_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tersor

    out = tmp_path_factory.mktemp("quantized") / "out"
    samples = [{"input_ids": torch.arange(3, 40)[None]}]
    tersor.compress(small_source, tersor.GPTQ(group_size=32, desc_act=True), calibration=samples, out=out)
    return out


@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        ("qweight", lambda t: t[:-1]),
        ("qzeros", None),
        ("qweight", None),
        ("scales", lambda t: t * 0),
        ("g_idx", lambda t: t + 1),
        ("g_idx", lambda t: t[:5]),
    ],
)
def test_a_damaged_quantized_checkpoint_names_the_tensor(
    tersor_command: Command, quantized: Path, tmp_path: Path, suffix: str, change: Any
) -> None:
    import shutil

    model, name = tmp_path / "model", f"model.layers.1.self_attn.k_proj.{suffix}"
    shutil.copytree(quantized, model)

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors.pop(name)
        if change is not None:
            tensors[name] = change(tensor).contiguous()

    change_tensors(model, damage)
    refused(tersor_command("eval", model, "--seq-len", 16, "--max-windows", 1), name)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quant_method": "gptq"},
        {"quant_method": "gptq", "bits": "four"},
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        {"quant_method": "bitsandbytes"},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {}}},
    ],
    ids=str,
)
def test_a_quantization_config_that_tersor_cannot_read(
    tersor_command: Command, quantized: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    import shutil

    model = Path(shutil.copytree(quantized, tmp_path / "model"))
    (model / "quantize_config.json").unlink()
    change_json(model / "config.json", quantization_config=config)
    refused(tersor_command("inspect", model))


# ---- the other verbs


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["eval", "--seq-len", 1], "leaves nothing to predict"),
        (["eval", "--seq-len", 0], "seq_len 0"),
        (["eval", "--seq-len", 5000], "more than the 256 positions"),
        (["eval", "--seq-len", 64, "--max-windows", 0], "max_windows"),
        (["eval", "--seq-len", 64, "--max-windows", -1], "max_windows"),
        (["eval", "--text", "nowhere.txt"], "there is no file or folder nowhere.txt for --text"),
        (["generate", "--prompt", ""], "the prompt is empty"),
        (["generate", "--prompt", "a", "--max-new-tokens", 0], "must be positive"),
        (["generate", "--prompt", "a", "--max-new-tokens", 5000], "more than the model's 256 positions"),
    ],
)
def test_what_eval_and_generate_cannot_do(
    tersor_command: Command, small: Path, arguments: list[object], expected: str
) -> None:
    refused(tersor_command(arguments[0], small, *arguments[1:]), expected)


def test_images_go_with_classifiers_and_text_with_language_models(
    tersor_command: Command, small: Path, tmp_path: Path
) -> None:
    refused(tersor_command("eval", small, "--images", tmp_path), "is a language model", "--images does nothing")
    refused(tersor_command("eval", "demo-vit"), "demo-vit classifies images", "--images DIR")
