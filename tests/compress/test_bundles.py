"""On a GPU several samples run through a block together, which changes nothing but the speed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import tersor
from tersor.calibrate import batches
from tersor.calibrate.batches import bundles, joined
from tersor.compress import walk
from tersor.errors import TersorError

CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}


def models() -> list[torch.nn.Module]:
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**CONFIG, intermediate_size=96)).eval()
    # its feed-forward part sees all tokens as one list, without an axis for the samples
    opt = OPTForCausalLM(OPTConfig(**CONFIG, ffn_dim=96, word_embed_proj_dim=64)).eval()
    return [llama, opt]


def samples(lengths: list[int]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(96, (1, length), generator=generator)} for length in lengths]


def by_threes(found: list[Any]) -> list[list[int]]:
    return [list(range(first, min(first + 3, len(found)))) for first in range(0, len(found), 3)]


@pytest.mark.parametrize("model", models(), ids=lambda model: type(model).__name__)
def test_the_result_is_that_of_single_samples(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    given = samples([40] * 7)
    method = tersor.GPTQ(bits=4, group_size=32)
    alone = tersor.compress(model.double(), method, calibration=given, format=None)
    monkeypatch.setattr(walk, "bundles", by_threes)
    together = tersor.compress(model.double(), method, calibration=given, format=None)
    for one, other in zip(alone.summary.layers, together.summary.layers, strict=True):
        assert (one.name, one.tokens) == (other.name, other.tokens)
        assert other.error == pytest.approx(one.error, rel=1e-6)
    probe = given[0]["input_ids"]
    torch.testing.assert_close(together.model(probe).logits, alone.model(probe).logits)


@pytest.mark.parametrize(
    ("norm", "exclude", "message"),
    [
        ("input_layernorm", "*.mlp.*", "the input of model.layers.0.self_attn.q_proj is not finite"),
        ("post_attention_layernorm", "*.mlp.*", "the output of model.layers.0 is not finite"),
    ],
)
def test_the_sample_that_overflows_is_named(
    norm: str, exclude: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "bundles", by_threes)
    model = models()[0]
    model.get_input_embeddings().weight.data[95] = 1e5  # type: ignore[operator]
    given = [{"input_ids": each["input_ids"].clamp(max=94)} for each in samples([40] * 7)]
    given[4]["input_ids"][0, 5] = 95

    def overflow(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.masked_fill(args[0].abs().amax((1, 2), keepdim=True) > 1e4, float("inf"))

    model.get_submodule(f"model.layers.0.{norm}").register_forward_hook(overflow)
    with pytest.raises(TersorError, match=rf"{message} .* in calibration sample 4"):
        tersor.compress(model, tersor.GPTQ(group_size=32), calibration=given, format=None, exclude=[exclude])


def test_only_neighbours_of_one_length_on_a_gpu_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bundles(samples([8, 8, 8])) == [[0], [1], [2]]  # on a CPU, each alone

    class OnGPU(torch.Tensor):
        is_cuda = True

    def moved(batch: dict[str, Tensor]) -> dict[str, Any]:
        return {name: value.as_subclass(OnGPU) for name, value in batch.items()}

    monkeypatch.setattr(batches, "TOKENS_AT_ONCE", 24)
    given: list[dict[str, Any]] = [moved(each) for each in samples([8, 8, 8, 8, 6, 8, 8])]
    given.append({**given[-1], "attention_mask": torch.ones(1, 8)})
    given.append({"args": (given[0]["input_ids"],)})
    assert bundles(given) == [[0, 1, 2], [3], [4], [5, 6], [7], [8]]
    assert torch.equal(joined(given[5:7])["input_ids"], torch.cat([each["input_ids"] for each in given[5:7]]))
