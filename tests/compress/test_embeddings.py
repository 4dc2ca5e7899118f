"""The token embedding, packed on request: in memory, on disk, in transformers, and row by row where it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran, Stopped, change_json, change_tensors, files_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zoo.tiny_models import MODELS, build, samples

import tersor
from tersor import GPTQ, RTN, TersorError
from tersor.calibrate.batches import first_tensor
from tersor.formats.layouts import layout_named, write
from tersor.formats.quantized_weight import QuantizedWeight
from tersor.layers.quantized_embedding import QuantizedEmbedding
from tersor.layers.quantized_linear import QuantizedLinear
from tersor.methods.activations.repquant import RepQuant
from tersor.runtime import llama_cpu

BASE = GPTQ(bits=4, group_size=32)
ON = {"embeddings": True, "format": "compressed-tensors"}
EMBEDDING = "model.embed_tokens"


def untied(name: str = "llama", **changes: Any) -> Any:
    """A tiny model whose head is not its embedding; the row of token 0 is zero, as rows of padding are."""
    import transformers

    tiny = MODELS[name]
    kind = getattr(transformers, tiny.architecture)
    torch.manual_seed(0)
    model = kind(kind.config_class(**{**tiny.config, "tie_word_embeddings": False, **changes}, **tiny.nested)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 0
    return model


@torch.no_grad()
def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    found = first_tensor(model(**batch))
    assert found is not None
    return found


def packed(model: Any) -> QuantizedEmbedding:
    found = model.get_input_embeddings()
    assert isinstance(found, QuantizedEmbedding)
    return found


# ---- the module


@st.composite
def tables(draw: st.DrawFn) -> QuantizedWeight:
    bits, rows = draw(st.sampled_from((2, 3, 4, 8))), draw(st.integers(1, 70))
    group_size, groups = draw(st.sampled_from(((-1, 1), (16, 3), (32, 2), (24, 2))))
    columns = 40 if group_size == -1 else group_size * groups
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    integers = [torch.randint(0, 2**bits, (n, rows), generator=generator) for n in (columns, groups)]
    scales = (torch.rand(groups, rows, generator=generator) + 0.1).to(
        draw(st.sampled_from((torch.float32, torch.half)))
    )
    g_idx = torch.randperm(columns, generator=generator) % groups if draw(st.booleans()) else None
    return QuantizedWeight.from_codes(
        integers[0].t(), scales, integers[1], bits=bits, group_size=group_size, g_idx=g_idx
    )


@given(tables(), st.data(), st.sampled_from((torch.float32, torch.bfloat16)))
def test_rows_are_those_of_the_whole_table(weight: QuantizedWeight, data: st.DataObject, dtype: torch.dtype) -> None:
    embedding = QuantizedEmbedding(weight, dtype=dtype)
    shape = data.draw(st.sampled_from(((), (1,), (5,), (2, 3), (0,), (2, 0))))
    count = int(torch.Size(shape).numel())
    numbers = data.draw(st.lists(st.integers(0, weight.out_features - 1), min_size=count, max_size=count))
    ids = torch.tensor(numbers, dtype=torch.int64).view(shape)
    rows = embedding(ids)
    assert rows.dtype == dtype
    assert torch.equal(rows, weight.dequantize(dtype)[ids])
    assert torch.equal(embedding.weight, weight.dequantize(dtype))
    again = QuantizedEmbedding(weight, dtype=dtype)
    again.load_state_dict(embedding.state_dict())
    assert set(embedding.state_dict()) == {"qweight", "scales", "zeros"} | (
        {"g_idx"} if weight.g_idx is not None else set()
    )
    assert torch.equal(again(ids), rows)


def table(rows: int = 500, columns: int = 64) -> QuantizedWeight:
    torch.manual_seed(0)
    codes, zeros = torch.randint(0, 16, (rows, columns)), torch.full((2, rows), 8)
    return QuantizedWeight.from_codes(codes, torch.rand(2, rows) + 0.1, zeros, bits=4, group_size=32)


class Allocations(TorchDispatchMode):
    """The largest number of elements that a tensor made meanwhile has, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {each.untyped_storage().data_ptr() for each in tree_leaves(args) if isinstance(each, Tensor)}
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in before:
                self.largest = max(self.largest, each.numel())
        return result


def test_a_call_unpacks_the_rows_that_it_asks_for_and_no_others() -> None:
    embedding = QuantizedEmbedding(table())
    with Allocations() as seen:
        embedding(torch.tensor([[3, 499, 3]]))
    assert seen.largest == 3 * 64
    with Allocations() as seen:
        assert embedding.weight.shape == (500, 64)
    assert seen.largest == 500 * 64


def test_a_token_that_is_not_in_the_table_is_an_error_as_in_torch() -> None:
    for token in (500, -1):
        for embedding in (QuantizedEmbedding(table()), nn.Embedding(500, 64)):
            with pytest.raises(IndexError):
                embedding(torch.tensor([token]))


def test_casts_and_copies_keep_the_rows() -> None:
    embedding, ids = QuantizedEmbedding(table(), embed_scale=torch.tensor(8.0)), torch.arange(20)
    half = QuantizedEmbedding(table(), embed_scale=torch.tensor(8.0)).bfloat16()
    assert half(ids).dtype == torch.bfloat16
    torch.testing.assert_close(half(ids).float(), embedding(ids), rtol=2e-2, atol=1e-3)
    assert torch.equal(embedding(ids), 8 * embedding.weight[ids])


# ---- jobs


@pytest.mark.parametrize(
    ("name", "method", "changes"),
    [
        ("llama", BASE, {}),
        ("llama", GPTQ(bits=3, group_size=-1, sym=False, mse=True), {"vocab_size": 97}),
        ("llama", GPTQ(bits=8, group_size=16, desc_act=True, static_groups=True), {}),
        ("qwen3", RTN(bits=4, group_size=32, sym=False), {"vocab_size": 101}),
        ("opt", BASE, {}),
        ("gemma3", RTN(bits=4, group_size=32), {}),
        ("mixtral", BASE, {}),
        ("bert", BASE, {}),
    ],
    ids=lambda each: each if isinstance(each, str) else None,
)
def test_memory_disk_and_transformers_agree(name: str, method: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    model, batches = untied(name, **changes), samples(name, 3)
    model.save_pretrained(tmp_path / "model")
    result = tersor.compress(tmp_path / "model", method, calibration=batches, out=tmp_path / "out", **ON)
    first, *others = result.summary.layers
    embedding = next(n for n, each in model.named_modules() if each is model.get_input_embeddings())
    assert (first.name, first.bits, first.group_size, first.tokens) == (embedding, method.bits, method.group_size, 0)
    assert len(others) == len(tersor.compress(model, method, calibration=batches, format=None).summary.layers)
    read = tersor.load(tmp_path / "out")
    original = model.get_input_embeddings().weight.detach()
    assert not packed(read).weight[0].any()
    assert 0 < float((packed(read).weight - original).norm() / original.norm()) < 0.3
    expected = output(read, batches[0])
    close = {"rtol": 1e-4, "atol": 1e-5}

    in_memory = tersor.compress(model, method, calibration=batches, **ON)
    assert torch.equal(packed(in_memory.model).weight, packed(read).weight)
    own = output(in_memory.model, batches[0])
    if name != "mixtral":  # whose experts stay dense in memory, where they have no names of their own
        torch.testing.assert_close(own, expected, **close)
        own = expected
    in_memory.save(tmp_path / "saved")
    torch.testing.assert_close(output(tersor.load(tmp_path / "saved"), batches[0]), own, **close)
    fresh = type(model)(model.config).eval()
    if name == "mixtral":
        fresh.set_experts_implementation("eager")
    filled = tersor.load(tmp_path / "saved", into=fresh)
    torch.testing.assert_close(output(filled, batches[0]), own, **close)
    packed(filled)

    for folder, wanted in (("out", expected), ("saved", own)):
        theirs, info = type(model).from_pretrained(tmp_path / folder, dtype=torch.float32, output_loading_info=True)
        assert not any(info.values()), info
        torch.testing.assert_close(output(theirs, batches[0]), wanted, rtol=1e-3, atol=1e-4)


def test_the_head_and_other_tables_go_their_own_way(tmp_path: Path) -> None:
    model, batches = untied("gpt_neo"), samples("gpt_neo", 2)
    model.save_pretrained(tmp_path / "model")
    result = tersor.compress(tmp_path / "model", BASE, calibration=batches, head=True, out=tmp_path / "out", **ON)
    names = [layer.name for layer in result.summary.layers]
    assert (names[0], names[-1]) == ("transformer.wte", "lm_head")
    read = tersor.load(tmp_path / "out")
    packed(read)
    assert isinstance(read.get_submodule("lm_head"), QuantizedLinear)
    assert type(read.get_submodule("transformer.wpe")) is nn.Embedding
    theirs = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(output(theirs, batches[0]), output(read, batches[0]), rtol=1e-3, atol=1e-4)


def test_samples_run_through_the_packed_embedding() -> None:
    model, batches = untied(), samples("llama", 3)
    result = tersor.compress(model, BASE, calibration=batches, **ON)
    model.get_input_embeddings().weight.data.copy_(packed(result.model).weight)
    again = tersor.compress(model, BASE, calibration=batches, format="compressed-tensors")
    name = "model.layers.0.self_attn.q_proj"
    mine, other = (each.model.get_submodule(name).packed for each in (result, again))
    assert torch.equal(mine.qweight, other.qweight)
    assert torch.equal(mine.scales, other.scales)
    rounded = tersor.compress(untied(), BASE, calibration=batches, format="compressed-tensors")
    assert not torch.equal(mine.qweight, rounded.model.get_submodule(name).packed.qweight)


def test_without_samples_it_is_rounded_all_the_same() -> None:
    model = untied()
    result = tersor.compress(model, RTN(bits=4, group_size=32), **ON)
    with_samples = tersor.compress(model, BASE, calibration=samples("llama", 2), **ON)
    assert result.summary.divergence is None
    assert torch.equal(packed(result.model).weight, packed(with_samples.model).weight)


def test_clipping_is_the_methods() -> None:
    plain, clipped = (
        tersor.compress(untied(), GPTQ(bits=2, group_size=32, mse=mse), calibration=samples("llama", 2), **ON)
        for mse in (False, True)
    )
    assert clipped.summary.layers[0].error < 0.9 * plain.summary.layers[0].error


def test_rules_and_patterns_apply_to_its_name(tmp_path: Path) -> None:
    def job(rules: tuple[dict[str, Any], ...] = (), **options: Any) -> Any:
        return tersor.compress(untied(), BASE, rules=rules, calibration=samples("llama", 2), embeddings=True, **options)

    wide = job(({"match": EMBEDDING, "bits": 8, "group_size": 64},), format=None)
    first, second, *_ = wide.summary.layers
    assert (first.name, first.bits, first.group_size, second.bits) == (EMBEDDING, 8, 64, 4)
    assert packed(wide.model).bits == 8

    for options in ({"rules": ({"match": EMBEDDING, "skip": True},)}, {"exclude": [EMBEDDING]}):
        skipped = job(**options, format="compressed-tensors")
        assert type(skipped.model.get_input_embeddings()) is nn.Embedding
        assert EMBEDDING in skipped.summary.left
        assert "dequantize" not in skipped.summary.quantization
    alone = job(include=[EMBEDDING], format="compressed-tensors")
    assert [layer.name for layer in alone.summary.layers] == [EMBEDDING]
    alone.save(tmp_path / "alone")
    theirs = type(alone.model).from_pretrained(tmp_path / "alone", dtype=torch.float32)
    batch = samples("llama", 1)[0]
    torch.testing.assert_close(output(theirs, batch), output(alone.model, batch), rtol=1e-3, atol=1e-4)

    with pytest.raises(TersorError, match=r"all layers of a checkpoint need the same grids.*bits 4.*; bits 8"):
        job(({"match": EMBEDDING, "bits": 8},), format="compressed-tensors")
    with pytest.raises(TersorError, match="need the same grids"):
        job(({"match": "*.down_proj", "group_size": 64},), format="compressed-tensors")
    with pytest.raises(TersorError, match="matches none of the 15 linear layers"):
        tersor.compress(untied(), BASE, rules=[{"match": EMBEDDING, "skip": True}], calibration=samples("llama", 2))


# ---- what is refused


class Shifted(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + 1)


class ScaledAndShifted(nn.Embedding):
    embed_scale = 2.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + 1) * self.embed_scale


def with_embedding(kind: type[nn.Embedding], **options: Any) -> Any:
    model = untied()
    model.set_input_embeddings(kind(128, 64, **options))
    return model


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: build("gpt2"), "the embedding transformer.wte is tied to another weight and stays as it is"),
        (lambda: build("t5"), "the embedding shared is tied"),
        (lambda: build("vit"), "the model has no token embedding that could be quantized"),
        (lambda: nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), "the model has no token embedding"),
        (lambda: with_embedding(Shifted), "model.embed_tokens is a Shifted, which does more than look up rows"),
        (lambda: with_embedding(ScaledAndShifted), "the embedding model.embed_tokens does more than look up rows"),
        (lambda: with_embedding(nn.Embedding, max_norm=1.0), "model.embed_tokens shortens its rows to max_norm=1"),
    ],
)
def test_what_cannot_be_packed_is_refused_by_name(make: Callable[[], nn.Module], why: str) -> None:
    with pytest.raises(TersorError, match=why):
        tersor.compress(make(), BASE, calibration=samples("llama", 2), **ON)


def test_samples_that_pass_it_by_are_refused() -> None:
    with pytest.raises(TersorError, match=r"model\.embed_tokens .*, or the samples do not reach it"):
        tersor.compress(untied(), BASE, calibration=[{"inputs_embeds": torch.randn(1, 8, 64)}], **ON)


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
def test_formats_whose_readers_know_no_packed_embedding_are_refused(format: str) -> None:
    with pytest.raises(TersorError, match=f"format {format} knows packed embeddings; use --format compressed-tensors"):
        tersor.compress(untied(), BASE, calibration=samples("llama", 2), embeddings=True, format=format)


def test_methods_that_have_no_use_for_it_refuse_it() -> None:
    with pytest.raises(TersorError, match="embeddings=True does nothing with repquant"):
        tersor.compress(build("vit"), RepQuant(), calibration=samples("vit", 2), embeddings=True)


def test_a_packed_embedding_that_is_tied_is_not_read(tmp_path: Path) -> None:
    tersor.compress(untied(), RTN(bits=4, group_size=32), **ON).save(tmp_path / "out")
    change_json(tmp_path / "out" / "config.json", tie_word_embeddings=True)
    expected = tersor.load(tmp_path / "out")  # the file holds a head of its own, which wins over what the config says
    assert not torch.equal(expected.get_output_embeddings().weight, packed(expected).weight)
    change_tensors(tmp_path / "out", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(TersorError, match=r"model\.embed_tokens is packed although its weight is tied to another"):
        tersor.load(tmp_path / "out")


# ---- interrupted jobs


def test_a_stopped_job_goes_on_to_the_same_bytes(tmp_path: Path, files_left: list[int]) -> None:
    untied().save_pretrained(tmp_path / "model")

    def run(out: Path, **options: Any) -> Any:
        return tersor.compress(tmp_path / "model", BASE, calibration=samples("llama", 2), out=out, **(ON | options))

    run(tmp_path / "whole")
    whole = files_of(tmp_path / "whole")
    files = 10**9 - files_left[0]
    resumed = set()
    for stop in range(1, files, 3):
        out = tmp_path / f"out-{stop}"
        files_left[0] = stop
        with pytest.raises(Stopped):
            run(out)
        files_left[0] = 10**9
        resumed.add(run(out).summary.resumed_blocks)
        assert files_of(out) == whole, f"stopped before file {stop} of {files}"
    assert {0, 1, 3} <= resumed  # nothing, the embedding alone, everything

    files_left[0] = files - 2
    with pytest.raises(Stopped):
        run(tmp_path / "out")
    files_left[0] = 10**9
    with pytest.raises(TersorError, match="unfinished job with another embeddings"):
        run(tmp_path / "out", embeddings=False)

    again = run(tmp_path / "whole", redo=["*embed*"])
    assert again.summary.resumed_blocks == 2
    assert files_of(tmp_path / "whole") == whole


# ---- what runs and reads such a checkpoint


def test_the_command_line_packs_runs_and_exports_it(
    small: Path, tmp_path: Path, tersor_command: Callable[..., Ran]
) -> None:
    out, file = tmp_path / "out", tmp_path / "out.gguf"
    change_json(small / "config.json", dtype="float16")  # of the steps, which GGUF holds no others of
    ran = tersor_command(
        "quantize", small, "--out", out, "--method", "rtn", "--group-size", 32, "--embeddings",
        "--format", "compressed-tensors", "--json",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    found = json.loads(ran.out)
    assert found["layers"][0]["name"] == EMBEDDING
    assert found["size_after"] < 0.6 * found["size_before"]
    ran = tersor_command("inspect", out)
    assert ran.status == 0, ran.err
    assert f"{EMBEDDING} (4.500 bits)" in ran.out  # 4, and a step of 16 for every 32
    assert "lm_head (32.000" in ran.out
    assert "mtp.weight" in ran.out
    assert "embed_tokens.weight" not in ran.out  # none of its tensors is unknown
    prompt = torch.arange(100, 140)[None]
    expected = output(tersor.load(out), {"input_ids": prompt})
    assert tersor.export(out, file).types["Q4_0"] == 15
    assert torch.equal(output(tersor.load(file), {"input_ids": prompt}), expected)
    ran = tersor_command("generate", out, "--prompt", "import", "--max-new-tokens", 4)
    assert ran.status == 0, ran.err


@pytest.mark.skipif(llama_cpu.why_not(build("llama")) is not None, reason=str(llama_cpu.why_not(build("llama"))))
def test_the_cpu_engine_takes_its_rows(tmp_path: Path) -> None:
    untied().save_pretrained(tmp_path / "model")
    tersor.compress(tmp_path / "model", RTN(bits=4, group_size=32), out=tmp_path / "out", **ON)
    module = tersor.load(tmp_path / "out")
    assert llama_cpu.why_not(module) is None
    ids = samples("llama", 1)[0]["input_ids"]
    expected = output(module, {"input_ids": ids})
    engine = llama_cpu.LlamaCPU(module, capacity=64, exact=True)
    torch.testing.assert_close(engine.forward(ids[:, :10]), expected[:, 9], rtol=1e-4, atol=1e-4)
    for n in range(10, 14):
        torch.testing.assert_close(engine.forward(ids[:, n : n + 1]), expected[:, n], rtol=1e-4, atol=1e-4)


def test_what_is_written_has_the_shapes_of_the_format(tmp_path: Path) -> None:
    result = tersor.compress(untied(vocab_size=97), RTN(bits=4, group_size=32, sym=False), **ON)
    tensors = write(packed(result.model).packed, layout_named("compressed-tensors"), sym=False)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "weight_packed": (97, 8),
        "weight_scale": (97, 2),
        "weight_shape": (2,),
        "weight_zero_point": (13, 2),
    }
