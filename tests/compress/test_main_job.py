"""The main job: a checkpoint in, a smaller one out that computes the same from disk as in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXTRA_FILES, TOKENIZER, Ran, change_tensors, files_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tersor
from tersor import GPTQ, RTN
from tersor.checkpoint.source import open_checkpoint
from tersor.compress import Method
from tersor.formats.layouts import LAYOUTS
from tersor.layers.quantized_linear import QuantizedLinear

SAMPLES = {"samples": 2, "seq_len": 64}
PROMPT = torch.arange(100, 140)[None]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=PROMPT).logits
    return found


@pytest.fixture(scope="module")
def logits_of_source(small_source: Path) -> Tensor:
    return logits(tersor.load(small_source))


def far_apart(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def compress_to(out: Path, model: str | Path, method: Method, **options: Any) -> nn.Module:
    """Compress a directory to another; the result read back, after checks that hold for every job."""
    result = tersor.compress(model, method, out=out, **((SAMPLES if method.needs_samples else {}) | options))
    assert result.summary.size_after is not None
    assert result.summary.size_before is not None
    width = {"ternary": 2}.get(method.options()["bits"], method.options()["bits"])
    assert width < result.summary.bits_per_weight < width + 1.5  # scales, zero points and g_idx of small layers
    assert result.summary.peak_memory > 0
    assert set(result.summary.seconds_per_block) >= {"model.layers.0", "model.layers.1"}
    assert not list(out.glob(".*"))
    read = tersor.load(out)
    assert torch.equal(logits(read), logits(result.model))
    return read


QUICK: list[tuple[Method, str]] = [
    (GPTQ(bits=4, group_size=32), "gptq"),
    (GPTQ(bits=3, group_size=32, desc_act=True, sym=False), "gptq_v2"),
    (GPTQ(bits=8, group_size=-1, sym=False), "compressed-tensors"),
    (GPTQ(bits="ternary", group_size=32, desc_act=True, static_groups=True), "gptq"),
    (RTN(bits=2, group_size=32, mse=True), "compressed-tensors"),
]
GRIDS: list[Method] = [
    *(GPTQ(bits=bits, group_size=32, sym=sym) for bits in (2, 3, 4, 8) for sym in (True, False)),
    GPTQ(bits="ternary", group_size=32),
    GPTQ(bits=4, group_size=-1, sym=False),
]
METHODS: list[Method] = [
    *GRIDS,
    GPTQ(bits=4, group_size=32, desc_act=True),
    GPTQ(bits=4, group_size=32, desc_act=True, static_groups=True),
    GPTQ(bits=3, group_size=32, desc_act=True, sym=False, mse=True),
    GPTQ(bits=4, group_size=32, static_groups=True, true_sequential=False),
    RTN(bits=3, group_size=32, sym=False),
    RTN(bits="ternary", group_size=-1),
]
# Every grid in every format; what only changes how a grid is filled, in one format each.
SLOW = [
    (method, format)
    for n, method in enumerate(METHODS)
    for format in (LAYOUTS if method in GRIDS else [list(LAYOUTS)[n % len(LAYOUTS)]])
    if (method, format) not in QUICK
]


def short(method: Method) -> str:
    return " ".join(f"{key}={value}" for key, value in method.options().items() if key not in ("damp", "mse"))


@pytest.mark.parametrize(
    ("method", "format"),
    [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)],
    ids=lambda each: each if isinstance(each, str) else short(each),
)
def test_is_read_back_with_the_same_logits(
    small_source: Path, logits_of_source: Tensor, tmp_path: Path, method: Method, format: str
) -> None:
    read = compress_to(tmp_path / "out", small_source, method, format=format)
    packed = {name for name, module in read.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(packed) == 2 * 7
    lost = far_apart(logits(read), logits_of_source)
    assert lost < {8: 0.05, 4: 0.5, 3: 0.8}.get(method.options()["bits"], 1.5)


@pytest.mark.parametrize("format", LAYOUTS)
def test_a_module_in_memory_gives_the_same_as_a_directory(small_source: Path, tmp_path: Path, format: str) -> None:
    read = compress_to(tmp_path / "out", small_source, GPTQ(group_size=32), format=format)
    samples = _same_samples(small_source)
    result = tersor.compress(tersor.load(small_source), GPTQ(group_size=32), calibration=samples, format=format)
    assert far_apart(logits(result.model), logits(read)) < 1e-4


def _same_samples(model: Path) -> list[dict[str, Tensor]]:
    from tersor.calibrate.batches import make_batches
    from tersor.checkpoint.load import load_tokenizer

    return make_batches("builtin", load_tokenizer(model), seed=0, **SAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "format"),
    [
        (GPTQ(bits=4), "gptq"),
        (GPTQ(bits=3, sym=False, desc_act=True, static_groups=True), "gptq_v2"),
        (GPTQ(bits=2, desc_act=True, static_groups=True), "compressed-tensors"),
        (GPTQ(bits=8, group_size=-1, sym=False), "gptq"),
        (GPTQ(bits="ternary"), "compressed-tensors"),
    ],
    ids=lambda each: each if isinstance(each, str) else short(each),
)
def test_the_demo_model_is_read_back_with_the_same_logits(tmp_path: Path, method: Method, format: str) -> None:
    compress_to(tmp_path / "out", "demo", method, format=format)


# ---- what comes along


@pytest.fixture(scope="module")
def result(small_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results") / "out"
    tersor.compress(small_source, GPTQ(group_size=32), out=out, **SAMPLES)
    return out


def test_every_other_file_comes_along(small_source: Path, result: Path) -> None:
    for name in (*EXTRA_FILES, *TOKENIZER, "generation_config.json"):
        assert (result / name).read_bytes() == (small_source / name).read_bytes(), name


def test_tensors_that_the_model_does_not_know_are_carried_through(small_source: Path, result: Path) -> None:
    source, written = load_file(small_source / "model.safetensors"), load_file(result / "model.safetensors")
    assert torch.equal(written["mtp.weight"], source["mtp.weight"])
    untouched = [name for name in source if "_proj" not in name]
    assert len(untouched) == 2 + 1 + 4 + 1  # embedding and head, norm, norms of the layers, the unknown one
    for name in untouched:
        assert torch.equal(written[name], source[name]), name
        assert written[name].dtype == source[name].dtype
    assert not any(name.endswith("_proj.weight") for name in written)


def test_both_configs_describe_the_result(result: Path) -> None:
    inside = json.loads((result / "config.json").read_text())["quantization_config"]
    assert json.loads((result / "quantize_config.json").read_text()) == inside
    expected = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    assert inside | expected == inside
    assert inside["checkpoint_format"] == "gptq"


def test_gptq_tensors_have_the_published_shapes_and_words(result: Path) -> None:
    with safe_open(result / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        name = "model.layers.0.mlp.down_proj"
        found = {suffix: file.get_tensor(f"{name}.{suffix}") for suffix in ("qweight", "qzeros", "scales", "g_idx")}
    assert {suffix: (tuple(t.shape), t.dtype) for suffix, t in found.items()} == {
        "qweight": ((128 // 8, 64), torch.int32),
        "qzeros": ((4, 64 // 8), torch.int32),
        "scales": ((4, 64), torch.float16),
        "g_idx": ((128,), torch.int32),
    }
    assert torch.all(found["qzeros"] == 0x77777777)
    assert torch.equal(found["g_idx"], (torch.arange(128) // 32).int())


def test_the_same_job_gives_the_same_bytes(small_source: Path, result: Path, tmp_path: Path) -> None:
    tersor.compress(small_source, GPTQ(group_size=32), out=tmp_path / "again", **SAMPLES)
    assert files_of(tmp_path / "again") == files_of(result)


def test_a_result_can_be_saved_elsewhere(small_source: Path, result: Path, tmp_path: Path) -> None:
    compressed = tersor.compress(small_source, GPTQ(group_size=32), **SAMPLES)
    assert compressed.save(tmp_path / "saved") == tmp_path / "saved"
    assert files_of(tmp_path / "saved") == files_of(result)
    with pytest.raises(tersor.TersorError, match="exists and is not empty"):
        compressed.save(tmp_path / "saved")
    compressed.save(tmp_path / "saved", overwrite=True)


def test_an_earlier_result_is_replaced_when_asked(small_source: Path, result: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(result, tmp_path / "out"))
    with pytest.raises(tersor.TersorError, match="exists and is not empty"):
        tersor.compress(small_source, RTN(bits=8, group_size=32), out=out)
    assert files_of(out) == files_of(result)
    tersor.compress(small_source, RTN(bits=8, group_size=32), out=out, overwrite=True)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["bits"] == 8


# ---- kinds of sources


def test_a_sharded_source_gives_the_same_result(small: Path, result: Path, tmp_path: Path) -> None:
    tensors = load_file(small / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for n, part in enumerate((names[:7], names[7:12], names[12:])):
        shard = f"model-{n + 1:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in part}, small / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    (small / "model.safetensors").unlink()
    (small / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    tersor.compress(small, GPTQ(group_size=32), out=tmp_path / "out", **SAMPLES)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (result / "model.safetensors").read_bytes()
    assert not list((tmp_path / "out").glob("*index*"))


def test_a_large_result_is_sharded_with_an_index(
    small_source: Path, result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tersor.checkpoint.writer.SINGLE_FILE_LIMIT", 1000)
    tersor.compress(small_source, GPTQ(group_size=32), out=tmp_path / "out", **SAMPLES)
    written = open_checkpoint(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    whole = load_file(result / "model.safetensors")
    sharded = written.read(written.shard_of)
    assert set(sharded) == set(whole)
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in whole.values())
    assert torch.equal(logits(tersor.load(tmp_path / "out")), logits(tersor.load(result)))


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_source_in_half_precision_stays_so(small: Path, tmp_path: Path, dtype: torch.dtype, format: str) -> None:
    change_tensors(small, lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    compress_to(tmp_path / "out", small, GPTQ(group_size=32), format=format)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["lm_head.weight"].dtype == dtype
    steps = {t.dtype for name, t in written.items() if name.endswith(("scale", "scales"))}
    assert steps == {torch.float16 if format == "gptq" else dtype}


def test_tied_heads_stay_tied(tmp_path: Path) -> None:
    read = compress_to(tmp_path / "out", "demo", RTN())
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in set(file.keys())
    assert read.lm_head.weight is read.model.embed_tokens.weight  # type: ignore[union-attr]


def test_heads_of_their_own_stay_so(small_source: Path, result: Path) -> None:
    read, source = tersor.load(result), load_file(small_source / "model.safetensors")
    assert read.lm_head.weight is not read.model.embed_tokens.weight  # type: ignore[union-attr]
    assert torch.equal(read.lm_head.weight, source["lm_head.weight"])  # type: ignore[union-attr,arg-type]


# ---- other readers


@pytest.mark.parametrize(
    "method",
    [
        GPTQ(group_size=32),
        GPTQ(bits=8, group_size=-1),
        GPTQ(bits=3, group_size=32, desc_act=True, static_groups=True),
        GPTQ(bits="ternary", group_size=32),
    ],
    ids=short,
)
def test_transformers_loads_symmetric_compressed_tensors(small_source: Path, tmp_path: Path, method: Method) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    read = compress_to(tmp_path / "out", small_source, method, format="compressed-tensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert far_apart(logits(theirs), logits(read)) < 1e-5


def test_scattered_groups_are_refused_where_no_reader_has_a_place_for_them(small_source: Path, tmp_path: Path) -> None:
    method = GPTQ(group_size=32, desc_act=True)
    with pytest.raises(tersor.TersorError, match="add --static-groups, or use --format gptq"):
        tersor.compress(small_source, method, out=tmp_path / "out", format="compressed-tensors", **SAMPLES)


def test_ternary_levels_of_groups_without_a_negative_weight_are_kept(small: Path, tmp_path: Path) -> None:
    def without_sign(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name][:, :32] = tensors[name][:, :32].abs()

    change_tensors(small, without_sign)
    compress_to(tmp_path / "out", small, RTN(bits="ternary", group_size=32))


# ---- from the command line


def test_quantize_eval_inspect_generate(
    tersor_command: Callable[..., Ran], small_source: Path, result: Path, tmp_path: Path
) -> None:
    arguments = ("--samples", 2, "--seq-len", 64, "--group-size", 32)
    ran = tersor_command("quantize", small_source, "--out", tmp_path / "out", *arguments, "--json")
    assert ran.status == 0, ran.err
    assert ran.err == ""
    summary = json.loads(ran.out)
    assert summary["out"] == str(tmp_path / "out")
    assert len(summary["layers"]) == 2 * 7
    assert set(summary["layers"][0]) >= {"name", "bits", "group_size", "error", "damp", "tokens", "seconds", "note"}
    assert files_of(tmp_path / "out") == files_of(result)  # the same names and defaults as the library's

    ran = tersor_command("eval", result, "--seq-len", 64, "--max-windows", 2, "--json")
    assert ran.status == 0, ran.err
    found = json.loads(ran.out)
    assert (found["tokens"], found["windows"]) == (2 * 63, 2)
    expected = tersor.perplexity(result, "builtin", seq_len=64, max_windows=2)
    assert found["perplexity"] == pytest.approx(expected.perplexity)

    ran = tersor_command("inspect", result, "--json")
    assert ran.status == 0, ran.err
    found = json.loads(ran.out)
    assert found["architecture"] == "LlamaForCausalLM"
    assert found["format"] == "gptq, 4 bits"
    assert found["unknown"] == ["mtp.weight"]
    assert [block["count"] for block in found["blocks"]] == [2]

    ran = tersor_command("generate", result, "--prompt", "Once upon", "--max-new-tokens", 5)
    assert ran.status == 0, ran.err
    assert ran.out.startswith("Once upon")
    assert tersor_command("inspect", result).status == 0
    assert tersor_command("eval", result, "--seq-len", 64, "--max-windows", 1).out.startswith("perplexity ")


def test_rounding_from_the_command_line_needs_no_tokenizer(
    small: Path, tmp_path: Path, tersor_command: Callable[..., Ran]
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (small / name).unlink()
    arguments = ("quantize", small, "--group-size", 32)
    ran = tersor_command(*arguments, "--out", tmp_path / "rounded", "--method", "rtn")
    assert ran.status == 0, ran.err
    refused = tersor_command(*arguments, "--out", tmp_path / "solved")
    assert refused.status != 0
    assert "the model has no tokenizer" in refused.err
