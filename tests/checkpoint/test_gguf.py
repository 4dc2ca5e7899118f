"""GGUF files: written exactly, read back as they were, and refused where they would not be what they seem."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint.gguf_models import random_model
from conftest import Ran, change_json, change_tensors
from torch import Tensor, nn

import tersor
from tersor import GPTQ, RTN, TersorError
from tersor.checkpoint.gguf_architecture import ARCHITECTURES, config_of, frequency_divisors, metadata_of, rows_in_file
from tersor.checkpoint.gguf_read import open_gguf
from tersor.checkpoint.gguf_tokenizer import (
    CARRIED,
    PRE_TOKENIZERS,
    byte_level,
    probes,
    tokenizer_from,
    tokenizer_metadata,
)
from tersor.checkpoint.load import load_tokenizer
from tersor.checkpoint.source import resolve
from tersor.layers.quantized_linear import QuantizedLinear

gguf = pytest.importorskip("gguf", reason="needs the extra `gguf`")

Command = Callable[..., Ran]
IDS = torch.arange(50, 114).view(2, 32)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "linear positions": ("Llama", {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}}),
    "llama3 positions": (
        "Llama",
        {
            "rope_parameters": {
                "rope_theta": 5e5,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            }
        },
    ),
    "yarn positions": (
        "Llama",
        {
            "rope_parameters": {
                "rope_theta": 1e4,
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_read_back_with_the_same_logits(name: str, tmp_path: Path) -> None:
    family, changes = FAMILIES[name]
    model = random_model(family, tmp_path / "model", **changes)
    tersor.export(model, tmp_path / "model.gguf")
    again = tersor.load(tmp_path / "model.gguf")
    assert torch.equal(logits(again), logits(tersor.load(model)))


@pytest.mark.parametrize(
    ("bits", "group_size", "sym", "kind"),
    [
        (4, 32, True, "Q4_0"),
        (4, 64, True, "Q4_0"),
        (4, -1, True, "Q4_0"),
        (4, 32, False, "Q5_0"),
        (3, 32, False, "Q4_0"),
        (2, 64, True, "Q4_0"),
        (8, 32, True, "Q8_0"),
    ],
)
def test_quantized_layers_keep_their_values(small: Path, bits: int, group_size: int, sym: bool, kind: str) -> None:
    quantized, file = small.parent / "quantized", small.parent / "quantized.gguf"
    tersor.compress(str(small), RTN(bits=bits, group_size=group_size, sym=sym), out=quantized, format="gptq_v2")
    exported = tersor.export(quantized, file)
    assert exported.types[kind] == 14
    assert exported.left_out == ["mtp.weight"]
    ours, again = tersor.load(quantized), tersor.load(file)
    assert type(again).__name__ == "LlamaForCausalLM"
    layers = {n: m for n, m in ours.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        other = again.get_submodule(name)
        assert isinstance(other, QuantizedLinear), name
        assert torch.equal(other.packed.dequantize(torch.float32), layer.packed.dequantize(torch.float32)), name
    assert torch.allclose(logits(again), logits(ours), rtol=1e-4, atol=1e-4)
    filled = tersor.load(file, into=type(ours)(ours.config))
    assert torch.allclose(logits(filled), logits(ours), rtol=1e-4, atol=1e-4)


def test_a_quantized_head_is_kept(small: Path) -> None:
    quantized, file = small.parent / "quantized", small.parent / "quantized.gguf"
    tersor.compress(str(small), RTN(bits=4, group_size=32), out=quantized, head=True)
    assert tersor.export(quantized, file).types["Q4_0"] == 15
    again = tersor.load(file)
    assert isinstance(again.get_submodule("lm_head"), QuantizedLinear)
    assert torch.equal(logits(again), logits(tersor.load(quantized)))


@pytest.mark.slow
def test_a_gptq_result_of_the_demo_is_read_back_with_the_same_logits(tmp_path: Path) -> None:
    tersor.compress("demo", GPTQ(bits=4, group_size=32), samples=4, seq_len=64, out=tmp_path / "demo")
    tersor.export(tmp_path / "demo", tmp_path / "demo.gguf")
    assert torch.equal(logits(tersor.load(tmp_path / "demo.gguf")), logits(tersor.load(tmp_path / "demo")))


def test_rows_of_a_head_alternate_between_its_halves() -> None:
    assert rows_in_file(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_file_says_what_the_config_says(tmp_path: Path) -> None:
    tersor.export("demo", tmp_path / "demo.gguf")
    reader = gguf.GGUFReader(tmp_path / "demo.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_BF16),
        "llama.context_length": 1024,
        "llama.embedding_length": 384,
        "llama.block_count": 6,
        "llama.feed_forward_length": 1024,
        "llama.vocab_size": 8192,
        "llama.attention.head_count": 6,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 64,
        "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {name: said.get(name) for name in expected} == expected
    assert said["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert len(said["tokenizer.ggml.tokens"]) == 8192
    names = {str(tensor.name): tensor for tensor in reader.tensors}
    assert len(names) == 1 + 1 + 6 * 9  # tied: no output.weight
    assert names["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert names["token_embd.weight"].tensor_type.name == "BF16"
    stored = tersor.load("demo").get_parameter("model.layers.0.self_attn.k_proj.weight")
    theirs = torch.from_numpy(np.array(names["blk.0.attn_k.weight"].data)).view(torch.bfloat16).float()
    assert torch.equal(theirs[1], stored[32])
    assert torch.equal(theirs[66], stored[65])


@pytest.mark.parametrize("head_dim", [8, 16, 64, 128])
@pytest.mark.parametrize("original", [3, 20, 64, 100, 256, 300, 511, 4096, 12000, 10**6])
def test_llama3_positions_of_any_original_length_are_read(original: int, head_dim: int) -> None:
    rope = {
        "rope_theta": 5e5,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
    from transformers import LlamaConfig

    config = LlamaConfig(rope_parameters=rope, head_dim=head_dim)
    divisors = frequency_divisors(config)
    assert divisors is not None
    fields = {**metadata_of(config, ARCHITECTURES["LlamaForCausalLM"]), "general.architecture": "llama"}
    found = LlamaConfig(rope_parameters=config_of(fields, [], divisors)["rope_parameters"], head_dim=head_dim)
    torch.testing.assert_close(frequency_divisors(found), divisors, rtol=1e-5, atol=0)


@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_llama3_positions_are_recognized_from_their_divisors(theta: float) -> None:
    from transformers import LlamaConfig

    rope = {
        "rope_theta": theta,
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(rope_parameters=rope)
    divisors = frequency_divisors(config)
    fields = {**metadata_of(config, ARCHITECTURES["LlamaForCausalLM"]), "general.architecture": "llama"}
    assert config_of(fields, [], divisors)["rope_parameters"] == rope
    with pytest.raises(TersorError, match=r"rope_freqs\.weight"):
        config_of(fields, [], divisors * torch.linspace(1, 2, len(divisors)))  # type: ignore[operator, arg-type]


# ---- files of others


@pytest.mark.slow
def test_a_file_of_mixed_types_without_a_tokenizer_json(tmp_path: Path) -> None:
    """As llama.cpp's own quantizer makes them: several types, a quantized embedding, no tokenizer.json."""
    model = random_model("Llama", tmp_path / "model")
    tersor.export(model, tmp_path / "own.gguf")
    kinds = {
        "token_embd.weight": "Q8_0",
        "output.weight": "Q5_1",
        "blk.0.attn_q.weight": "Q4_1",
        "blk.0.attn_k.weight": "Q4_0",
        "blk.1.ffn_up.weight": "Q5_0",
        "blk.1.attn_v.weight": "F16",
        "blk.1.ffn_gate.weight": "BF16",
    }
    dense = write_again(tmp_path / "own.gguf", tmp_path / "other.gguf", kinds, without=(CARRIED,))
    again = tersor.load(tmp_path / "other.gguf")
    expected = tersor.load(model)
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
        "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
        "blk.0.attn_k.weight": "model.layers.0.self_attn.k_proj.weight",
        "blk.1.ffn_up.weight": "model.layers.1.mlp.up_proj.weight",
        "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
        "blk.1.ffn_gate.weight": "model.layers.1.mlp.gate_proj.weight",
    }
    for short, name in names.items():
        values = dense[short]
        heads = {"attn_q": 4, "attn_k": 2}.get(short.split(".")[-2])
        if heads:
            values = values.view(heads, 16, 2, -1).transpose(1, 2).reshape(values.shape)
        expected.get_parameter(name).data.copy_(values)
    assert isinstance(again.get_submodule("model.layers.0.self_attn.k_proj"), QuantizedLinear)
    assert isinstance(again.get_submodule("model.layers.1.mlp.up_proj"), QuantizedLinear)
    assert torch.allclose(logits(again), logits(expected), rtol=1e-4, atol=1e-4)
    theirs, ours = load_tokenizer(tmp_path / "other.gguf"), load_tokenizer(model)
    for text in probes():
        assert theirs(text)["input_ids"] == ours(text)["input_ids"], text
        assert theirs.decode(theirs(text)["input_ids"]) == ours.decode(ours(text)["input_ids"])


def write_again(source: Path, target: Path, kinds: dict[str, str], *, without: tuple[str, ...]) -> dict[str, Tensor]:
    """The same file with tensors in other types, by the gguf package alone; returns what it reads in those."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in (*without, "general.architecture"):
            value, kind = field.contents(), field.types[0]
            writer.add_key_value(name, value, kind, field.types[-1] if isinstance(value, list) else None)
    dense = {}
    for tensor in reader.tensors:
        data, kind = np.array(tensor.data), tensor.tensor_type
        if tensor.name in kinds:
            kind = gguf.GGMLQuantizationType[kinds[tensor.name]]
            data = gguf.quants.quantize(data, kind)
            dense[str(tensor.name)] = torch.from_numpy(np.array(gguf.quants.dequantize(data, kind)))
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dense


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("general.architecture", "mamba", "architecture 'mamba'; tersor reads llama, qwen2, qwen3"),
        ("llama.expert_count", 8, "with experts"),
        ("llama.rope.scaling.type", "longrope", "'longrope'"),
        ("llama.attention.head_count_kv", [2, 1], "per layer"),
        ("llama.attention.value_length", 16, "heads of several widths"),
        ("llama.embedding_length", None, "lacks llama.embedding_length"),
    ],
)
def test_metadata_of_another_kind_is_refused(field: str, value: object, expected: str) -> None:
    from transformers import LlamaConfig

    fields = {**metadata_of(LlamaConfig(), ARCHITECTURES["LlamaForCausalLM"]), "general.architecture": "llama"}
    assert config_of(fields, ["output.weight"], None)["hidden_size"] == LlamaConfig().hidden_size
    fields[field] = value
    with pytest.raises(TersorError, match=expected):
        config_of(fields, ["output.weight"], None)


def test_what_is_no_whole_gguf_file_is_refused_in_one_line(tersor_command: Command, tmp_path: Path) -> None:
    tersor.export("demo", tmp_path / "demo.gguf")
    content = (tmp_path / "demo.gguf").read_bytes()
    broken = {"text": b"not a model\n", "empty": b"", "cut": content[: len(content) // 2], "head": content[:200]}
    for name, damaged in broken.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(damaged)
        for verb in ("inspect", "eval"):
            ran = tersor_command(verb, path)
            assert (ran.status, ran.out) == (2, ""), name
            assert len(ran.err.strip().splitlines()) == 1, ran.err
            assert "cannot be read as a GGUF file" in ran.err


# ---- tokenizers


def byte_level_tokenizer(pre: Any, **model: Any) -> Any:
    """The demo's vocabulary under another way to cut text."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    parts = json.loads((resolve("demo") / "tokenizer.json").read_text())
    parts["model"] |= model
    backend = Tokenizer.from_str(json.dumps(parts))
    backend.pre_tokenizer = pre
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_the_way_to_cut_text_is_found_and_rebuilt(name: str) -> None:
    known = PRE_TOKENIZERS[name]
    tokenizer = byte_level_tokenizer(byte_level(known), ignore_merges=known.whole_words)
    fields = tokenizer_metadata(tokenizer, 8200)
    assert fields["tokenizer.ggml.pre"] == name
    assert fields["tokenizer.ggml.tokens"][8192:] == [f"[PAD{n}]" for n in range(8192, 8200)]
    del fields[CARRIED]
    again = tokenizer_from(fields, "a.gguf")
    for text in probes():
        assert again(text)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"] or name == "llama-bpe"
        assert again.decode(again(text)["input_ids"], skip_special_tokens=True) == text


def test_published_forms_of_pre_tokenizers_are_recognized() -> None:
    from tokenizers import Regex, pre_tokenizers

    qwen2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    forms = {
        "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        "qwen2": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(qwen2), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    }
    for name, form in forms.items():
        assert tokenizer_metadata(byte_level_tokenizer(form), 8192)["tokenizer.ggml.pre"] == name


def test_a_way_to_cut_text_that_llamacpp_does_not_have_is_refused() -> None:
    from tokenizers import pre_tokenizers

    for form in (
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    ):
        with pytest.raises(TersorError, match=r"as none of llama\.cpp's .* differs on \d+ of"):
            tokenizer_metadata(byte_level_tokenizer(form), 8192)


def sentencepiece_tokenizer(*, drop: int | None = None) -> Any:
    """A small BPE with byte fallback, its merges as the conversion from SentencePiece makes them: all ways into every piece."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["he", "ll", "llo", "hello", "▁hello", "wo", "▁w", "▁wo", "rl", "rld", "▁world", "▁▁", "▁▁▁▁"]
    characters = [*"▁helowrd.", *(chr(n) for n in range(ord("f"), ord("k")))]
    vocabulary = dict.fromkeys(["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *pieces, *characters])
    vocabulary = {text: n for n, text in enumerate(vocabulary)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    if drop is not None:
        del merges[drop]
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_merges_of_sentencepiece_become_scores_that_merge_alike() -> None:
    tokenizer = sentencepiece_tokenizer()
    fields = tokenizer_metadata(tokenizer, 300)
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.add_space_prefix"]) == ("llama", True)
    types, tokens = fields["tokenizer.ggml.token_type"], fields["tokenizer.ggml.tokens"]
    assert (types[0], types[1], types[3], types[259]) == (2, 3, 6, 1)
    ids = {text: n for n, text in enumerate(tokens)}
    for text in ("hello world", "hello  world.", "    hello", "worldhello hellohello", "é hello"):
        assert best_first(text, ids, fields["tokenizer.ggml.scores"]) == tokenizer(text)["input_ids"], text


def best_first(text: str, ids: dict[str, int], scores: list[float]) -> list[int]:
    """SentencePiece's BPE: of all neighbours whose union is a piece, the best score is merged, the leftmost of equals."""
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        unions = [(scores[ids[a + b]], -n) for n, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not unions:
            break
        n = -max(unions)[1]
        parts[n : n + 2] = [parts[n] + parts[n + 1]]
    found: list[int] = []
    for part in parts:
        found += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return found


def test_merges_that_no_score_expresses_are_refused() -> None:
    with pytest.raises(TersorError, match=r"does not merge .*; llama\.cpp would"):
        tokenizer_metadata(sentencepiece_tokenizer(drop=-1 - 1), 300)


def test_a_tokenizer_larger_than_the_embedding_is_refused() -> None:
    with pytest.raises(TersorError, match="has a token 8191; the model's embedding has 8000 rows"):
        tokenizer_metadata(load_tokenizer(resolve("demo")), 8000)


# ---- the command line, and what it refuses


@pytest.mark.slow
def test_export_inspect_and_eval(tersor_command: Command, small: Path) -> None:
    quantized, file = small.parent / "quantized", small.parent / "made" / "small.gguf"
    tersor.compress(str(small), RTN(bits=4, group_size=64), out=quantized)
    ran = tersor_command("export", quantized, "--out", file, "--dtype", "float16")
    assert ran.status == 0, ran.err
    assert "14 Q4_0" in ran.out
    assert "2 F16" in ran.out
    assert "4.500 here" in ran.out
    assert "mtp.weight" in ran.out
    assert [path.name for path in file.parent.iterdir()] == ["small.gguf"]
    found = json.loads(tersor_command("inspect", file, "--json").out)
    assert (found["architecture"], found["format"]) == ("LlamaForCausalLM", "gguf, 4 bits")
    assert found["blocks"][0]["bits"] == [4.5] * 7
    assert found["size"] == file.stat().st_size
    options = ("--seq-len", 64, "--max-windows", 2, "--json")
    ours, theirs = (json.loads(tersor_command("eval", each, *options).out) for each in (quantized, file))
    assert theirs["perplexity"] == pytest.approx(ours["perplexity"], rel=1e-3)  # embeddings in float16
    assert tersor_command("generate", file, "--prompt", "The", "--max-new-tokens", 3).status == 0


def refused(tersor_command: Command, small: Path, *expected: str, options: tuple[object, ...] = ()) -> None:
    file = small.parent / "out.gguf"
    ran = tersor_command("export", small, "--out", file, *options)
    assert (ran.status, ran.out) == (2, ""), ran
    assert len(ran.err.strip().splitlines()) == 1, ran.err
    for words in expected:
        assert words in ran.err
    assert not list(file.parent.glob("*.gguf*")) + list(file.parent.glob(".*.partial"))


def test_scattered_groups_are_refused(tersor_command: Command, small: Path) -> None:
    quantized = small.parent / "quantized"
    method = GPTQ(bits=4, group_size=32, desc_act=True)
    tersor.compress(str(small), method, samples=2, seq_len=32, out=quantized)
    refused(tersor_command, quantized, "model.layers.0.", "scattered", "--static-groups")


def test_act_order_with_static_groups_is_exported(small: Path) -> None:
    quantized = small.parent / "quantized"
    method = GPTQ(bits=4, group_size=32, desc_act=True, static_groups=True)
    tersor.compress(str(small), method, samples=2, seq_len=32, out=quantized)
    assert tersor.export(quantized, small.parent / "out.gguf").types["Q4_0"] == 14


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_act": "gelu"}, "the activation 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
    ],
)
def test_configs_that_llamacpp_would_compute_otherwise(
    tersor_command: Command, small: Path, changes: dict[str, Any], expected: str
) -> None:
    change_json(small / "config.json", **changes)
    refused(tersor_command, small, expected)


def test_another_architecture_is_refused(tersor_command: Command, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)).save_pretrained(tmp_path / "gpt2")
    refused(tersor_command, tmp_path / "gpt2", "GPT2LMHeadModel cannot be written as GGUF", "LlamaForCausalLM")


def test_a_model_without_a_tokenizer_is_refused(tersor_command: Command, small: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (small / name).unlink()
    refused(tersor_command, small, "has no tokenizer")


@pytest.mark.parametrize("template", ["{{ messages }}", {"default": "{{ messages }}", "tool_use": "x"}])
def test_chat_templates_are_kept(small: Path, template: str | dict[str, str]) -> None:
    """The default one where every reader looks for it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(small)
    tersor.export(small, small / "m.gguf")
    fields = open_gguf(small / "m.gguf").fields
    assert fields["tokenizer.chat_template"] == "{{ messages }}"
    assert load_tokenizer(small / "m.gguf").chat_template == template


def test_values_that_float16_cannot_hold_are_refused(tersor_command: Command, small: Path) -> None:
    change_tensors(small, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].fill_(1e6))
    refused(tersor_command, small, "up_proj.weight has values", "float16", options=("--dtype", "float16"))


def test_files_are_not_replaced_unasked(tersor_command: Command, small: Path) -> None:
    file = small.parent / "taken.gguf"
    file.write_text("precious")
    assert "exists; give another file or --overwrite" in tersor_command("export", small, "--out", file).err
    assert file.read_text() == "precious"
    assert tersor_command("export", small, "--out", file, "--overwrite").status == 0
    assert "does not end in .gguf" in tersor_command("export", small, "--out", small.parent / "model.bin").err
    assert "is a GGUF file already" in tersor_command("export", file, "--out", small.parent / "b.gguf").err
    assert "cannot be compressed further" in tersor_command("quantize", file, "--out", small.parent / "b").err


def test_a_window_shorter_than_the_context_becomes_the_context(tmp_path: Path) -> None:
    model = random_model("Mistral", tmp_path / "model", sliding_window=128)
    tersor.export(model, tmp_path / "model.gguf")
    assert open_gguf(tmp_path / "model.gguf").fields["llama.context_length"] == 128


# ---- llama.cpp itself


@pytest.fixture
def in_llamacpp(tmp_path: Path) -> Callable[[Path], Any]:
    """Exports a model and loads it in llama.cpp."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")

    def run(model: Path) -> Any:
        tersor.export(model, tmp_path / "model.gguf")
        # keys and values in float32 (type 0), as ours are; half precision is the default there
        settings = {"n_ctx": 64, "logits_all": True, "type_k": 0, "type_v": 0, "flash_attn": False, "n_threads": 1}
        return llama_cpp.Llama(str(tmp_path / "model.gguf"), verbose=False, **settings)

    return run


def distance_to_llamacpp(model: Path, there: Any) -> float:
    there.eval(IDS[0].tolist())
    ours, theirs = logits(tersor.load(model))[0], torch.from_numpy(np.array(there.scores[: IDS.shape[1]]))
    return float((theirs - ours).norm() / ours.norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_llamacpp_computes_the_same(name: str, tmp_path: Path, in_llamacpp: Callable[[Path], Any]) -> None:
    family, changes = FAMILIES[name]
    model = random_model(family, tmp_path / "model", **changes)
    assert distance_to_llamacpp(model, in_llamacpp(model)) < 1e-4


@pytest.mark.parametrize(("bits", "sym"), [(4, True), (4, False), (3, True), (8, True)])
def test_llamacpp_computes_the_same_with_quantized_layers(
    bits: int, sym: bool, small: Path, in_llamacpp: Callable[[Path], Any]
) -> None:
    quantized = small.parent / "quantized"
    tersor.compress(str(small), RTN(bits=bits, group_size=32, sym=sym), out=quantized, format="gptq_v2")
    # llama.cpp rounds the layers' inputs to 8 bits; rounding the weights alone moves the logits of 3 bits by 0.3
    assert distance_to_llamacpp(quantized, in_llamacpp(quantized)) < 0.04


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_llamacpp_cuts_text_into_the_same_tokens(name: str, small: Path, in_llamacpp: Callable[[Path], Any]) -> None:
    known = PRE_TOKENIZERS[name]
    tokenizer = byte_level_tokenizer(byte_level(known), ignore_merges=known.whole_words)
    tokenizer.save_pretrained(small)
    there = in_llamacpp(small)
    for text in probes():
        assert there.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text)["input_ids"], text


def test_llamacpp_merges_sentencepieces_alike(small: Path, in_llamacpp: Callable[[Path], Any]) -> None:
    tokenizer = sentencepiece_tokenizer()
    tokenizer.save_pretrained(small)
    there = in_llamacpp(small)
    for text in ("hello world", "hello  world.", "    hello", "worldhello hellohello", "é hello\nworld"):
        assert there.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text)["input_ids"], text
