"""What of a model directory is read: every tensor that the checkpoint holds, from the files that transformers would take."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import change_json, change_tensors
from safetensors.torch import load_file, save_file
from torch import nn
from zoo.tiny_models import LLAMA, logits_of, random_ids

import tersor
from tersor.checkpoint.lazy_model import LazyModel
from tersor.checkpoint.source import open_checkpoint
from tersor.compress import RTN, compress
from tersor.errors import TersorError

SPEECH: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
CODEC: dict[str, Any] = {
    "num_filters": 2,
    "hidden_size": 16,
    "codebook_size": 8,
    "codebook_dim": 16,
    "num_lstm_layers": 1,
    "target_bandwidths": [1.5],
}
# Types whose constructors make some tensors elsewhere than on the meta device: parameters, persistent buffers and others.
ELSEWHERE: dict[str, tuple[str, dict[str, Any]]] = {
    "diffllama": ("DiffLlamaForCausalLM", LLAMA),
    "imagegpt": ("ImageGPTModel", {"vocab_size": 33, "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 2}),
    "wav2vec2": ("Wav2Vec2ForCTC", SPEECH),
    "xlnet": ("XLNetLMHeadModel", {"vocab_size": 96, "d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 64}),
    "encodec": ("EncodecModel", CODEC),
    "levit": (
        "LevitModel",
        {"image_size": 64, "hidden_sizes": [16, 32, 48], "num_attention_heads": [1, 2, 3], "depths": [1, 1, 1]},
    ),
}


def saved(folder: Path, architecture: str, config: dict[str, Any]) -> nn.Module:
    """A model with random values in every tensor, written to `folder`, as transformers reads it from there."""
    import transformers

    kind = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = kind(kind.config_class(**config))
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.normal_(0, 0.3)
    model.save_pretrained(folder)
    found: nn.Module = kind.from_pretrained(folder).eval()
    return found


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_tensors_are_read_wherever_the_constructor_made_them(tmp_path: Path, kind: str) -> None:
    right = saved(tmp_path / "model", *ELSEWHERE[kind])
    found = tersor.load(tmp_path / "model")
    stored = found.state_dict()
    assert stored.keys() == right.state_dict().keys()
    for name, tensor in right.state_dict().items():
        assert torch.equal(stored[name], tensor), name
    computed = dict(found.named_buffers())
    for name, tensor in right.named_buffers():  # those that no file holds, too
        assert torch.equal(computed[name], tensor), name


def test_a_parameter_made_elsewhere_that_the_file_lacks_is_named(tmp_path: Path) -> None:
    saved(tmp_path / "model", *ELSEWHERE["diffllama"])
    change_tensors(tmp_path / "model", lambda tensors: tensors.pop("model.layers.1.self_attn.lambda_k2"))
    with pytest.raises(TersorError, match=r"lacks the tensor model\.layers\.1\.self_attn\.lambda_k2"):
        tersor.load(tmp_path / "model")


def test_a_buffer_made_elsewhere_that_the_file_lacks_is_as_the_constructor_made_it(tmp_path: Path) -> None:
    saved(tmp_path / "model", *ELSEWHERE["encodec"])
    change_tensors(tmp_path / "model", lambda t: [t.pop(name) for name in [*t] if name.endswith("inited")])
    found = tersor.load(tmp_path / "model").state_dict()
    assert {float(found[name]) for name in found if name.endswith("inited")} == {1.0}


def test_a_block_is_loaded_again_after_it_was_let_go(tmp_path: Path) -> None:
    saved(tmp_path / "model", *ELSEWHERE["diffllama"])
    lazy = LazyModel(open_checkpoint(tmp_path / "model"), dtype=torch.float32)
    block: Any = lazy.module.get_submodule("model.layers.0")
    for _ in range(2):
        lazy.load(block)
        stored = load_file(tmp_path / "model" / "model.safetensors")["model.layers.0.self_attn.lambda_q1"]
        assert torch.equal(block.self_attn.lambda_q1, stored)
        lazy.release(block)
        assert block.self_attn.lambda_q1.is_meta


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A model whose config says that its head is the embedding."""
    saved(tmp_path / "model", "LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True})
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    return tmp_path / "model"


def transformers_logits(model: Path) -> torch.Tensor:
    from transformers import LlamaForCausalLM

    return logits_of(LlamaForCausalLM.from_pretrained(model).eval(), random_ids(1, 24))


def test_a_head_in_the_file_wins_over_a_config_that_says_tied(tied: Path, tmp_path: Path) -> None:
    head = torch.randn(96, 64) * 0.2
    change_tensors(tied, lambda tensors: tensors.update({"lm_head.weight": head}))
    found: Any = tersor.load(tied)
    assert torch.equal(found.lm_head.weight, head)
    assert not torch.equal(found.model.embed_tokens.weight, head)
    assert torch.equal(logits_of(found, random_ids(1, 24)), transformers_logits(tied))
    # and what is made of it holds both, also for readers that believe the config
    compress(tied, RTN(bits=8, group_size=32), out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(made["lm_head.weight"], head)
    result = compress(found, RTN(bits=8, group_size=32))
    result.save(tmp_path / "memory")
    ids = random_ids(1, 24)
    assert torch.equal(logits_of(tersor.load(tmp_path / "memory"), ids), logits_of(tersor.load(tmp_path / "out"), ids))


def test_a_head_that_repeats_the_embedding_stays_tied(tied: Path, tmp_path: Path) -> None:
    change_tensors(tied, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    found: Any = tersor.load(tied)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert torch.equal(logits_of(found, random_ids(1, 24)), transformers_logits(tied))


def test_a_head_alone_in_the_file_is_the_embedding_too(tied: Path) -> None:
    change_tensors(tied, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    assert torch.equal(logits_of(tersor.load(tied), random_ids(1, 24)), transformers_logits(tied))


# ---- which files


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    saved(tmp_path / "model", "LlamaForCausalLM", LLAMA)
    return tmp_path / "model"


def others(model: Path) -> dict[str, torch.Tensor]:
    """Tensors of the same names that are not the model's."""
    return {name: torch.randn_like(tensor) for name, tensor in load_file(model / "model.safetensors").items()}


def assert_reads_as_transformers(model: Path) -> None:
    assert torch.equal(logits_of(tersor.load(model), random_ids(1, 24)), transformers_logits(model))


@pytest.mark.parametrize(
    "name",
    [
        "optimizer_ema.safetensors",
        "model_old.safetensors",
        "model.fp16.safetensors",
        "adapter_model.safetensors",
        "consolidated.safetensors",
        "model-00001-of-00001.safetensors",
        "zzz.safetensors",
    ],
)
def test_model_safetensors_is_the_model_whatever_lies_beside_it(llama: Path, name: str) -> None:
    save_file(others(llama), llama / name, {"format": "pt"})
    assert_reads_as_transformers(llama)


def test_model_safetensors_comes_before_an_index_of_other_shards(llama: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(llama).save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    for path in (tmp_path / "shards").glob("*safetensors*"):
        shutil.copy(path, llama)
    save_file(others(llama), llama / "model.safetensors", {"format": "pt"})
    assert_reads_as_transformers(llama)
    (llama / "model-00001-of-00009.safetensors").unlink(missing_ok=True)
    assert_reads_as_transformers(llama)  # what the index lacks is nobody's business
    # of shards with their index, a file beside them is not one
    save_file(others(llama), tmp_path / "shards" / "model-00099-of-00099.safetensors", {"format": "pt"})
    assert_reads_as_transformers(tmp_path / "shards")


def as_pickle(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def pickled_logits(model: Path) -> torch.Tensor:
    lazy = LazyModel(open_checkpoint(model, allow_pickle=True), dtype=torch.float32)
    return logits_of(lazy.load_all(), random_ids(1, 24))


def test_a_trainers_state_is_no_weight(llama: Path) -> None:
    right = transformers_logits(llama)
    stray = others(llama)
    as_pickle(llama)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "model_old.pt"):
        torch.save({"state": {}, "param_groups": []}, llama / name)
    save_file(stray, llama / "ema.safetensors")
    with pytest.raises(TersorError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        tersor.load(llama)
    assert torch.equal(pickled_logits(llama), right)


def test_pickled_shards_are_those_of_their_index(llama: Path) -> None:
    right, tensors = transformers_logits(llama), load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"pytorch_model-00001-of-00002.bin": names[:5], "pytorch_model-00002-of-00002.bin": names[5:]}
    for file, mine in parts.items():
        torch.save({name: tensors[name] for name in mine}, llama / file)
    torch.save({name: torch.zeros(1) for name in names}, llama / "consolidated.pth")
    weight_map = {name: file for file, mine in parts.items() for name in mine}
    (llama / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(pickled_logits(llama), right)
    (llama / "pytorch_model.bin.index.json").write_text("[]")
    with pytest.raises(TersorError, match="is not a bin index"):
        open_checkpoint(llama, allow_pickle=True)


def test_a_file_of_another_name_is_the_model_where_it_is_alone(llama: Path) -> None:
    right, stray = transformers_logits(llama), others(llama)
    (llama / "model.safetensors").rename(llama / "weights.safetensors")
    save_file(stray, llama / "optimizer.safetensors")
    assert torch.equal(logits_of(tersor.load(llama), random_ids(1, 24)), right)
    save_file(stray, llama / "weights_ema.safetensors")
    with pytest.raises(TersorError, match=r"weights\.safetensors and weights_ema\.safetensors both hold"):
        tersor.load(llama)


def test_shards_without_an_index_are_complete_or_refused(llama: Path) -> None:
    right, tensors = transformers_logits(llama), load_file(llama / "model.safetensors")
    save_file(others(llama), llama / "backup.safetensors")
    (llama / "model.safetensors").unlink()
    names = sorted(tensors)
    for n, mine in enumerate((names[:5], names[5:]), 1):
        save_file({name: tensors[name] for name in mine}, llama / f"model-0000{n}-of-00002.safetensors")
    assert torch.equal(logits_of(tersor.load(llama), random_ids(1, 24)), right)
    (llama / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(TersorError, match="lacks the shard 1 of model"):
        tersor.load(llama)


def test_a_config_that_names_its_weights_is_believed(llama: Path) -> None:
    right = transformers_logits(llama)
    (llama / "model.safetensors").rename(llama / "mine.safetensors")
    save_file({"a": torch.zeros(1)}, llama / "model.safetensors")
    change_json(llama / "config.json", transformers_weights="mine.safetensors")
    assert torch.equal(logits_of(tersor.load(llama), random_ids(1, 24)), right)
    change_json(llama / "config.json", transformers_weights="gone.safetensors")
    with pytest.raises(TersorError, match=r"lacks gone\.safetensors, which its config\.json names"):
        tersor.load(llama)


def test_an_own_model_folder_is_read_by_the_same_rule(tmp_path: Path) -> None:
    model = tersor.models.create("vit", **SMALL_VIT)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in model.state_dict().items()}, tmp_path / "old.safetensors")
    found = tersor.models.load("vit", tmp_path, **SMALL_VIT)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), model.parameters(), strict=True))


SMALL_VIT = tersor.models.registry.find("vit").small
