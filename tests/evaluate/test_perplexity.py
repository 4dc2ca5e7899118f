"""Perplexity is of causal language models only, found by class, by config and by trying."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from zoo.tiny_models import VOCABULARY, build

import tersor
from tersor.errors import TersorError

TOKENS = torch.randint(4, VOCABULARY, (64,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["bert", "t5", "bart", "whisper", "vit", "siglip"])
def test_other_models_are_refused(name: str) -> None:
    with pytest.raises(TersorError, match="perplexity needs a causal language model"):
        tersor.perplexity(build(name), TOKENS, seq_len=32)


@pytest.mark.parametrize("name", ["llama", "mamba", "mixtral", "gemma3"])
def test_causal_models_are_not(name: str) -> None:
    assert tersor.perplexity(build(name), TOKENS, seq_len=32).perplexity > 1


def test_its_interval_is_over_windows() -> None:
    model = build("llama")
    parts = [tersor.perplexity(model, window, seq_len=16).perplexity for window in TOKENS.view(4, 16)]
    losses = torch.tensor(parts, dtype=torch.float64).log()
    found = tersor.perplexity(model, TOKENS, seq_len=16)
    assert found.perplexity == pytest.approx(float(losses.mean().exp()))
    assert found.half_width == pytest.approx(found.perplexity * 3.1824 * float(losses.std()) / 2, rel=1e-4)
    assert tersor.perplexity(model, TOKENS[:16], seq_len=16).half_width is None


def test_a_decoder_class_that_sees_all_tokens_is_found_by_trying() -> None:
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    with pytest.raises(TersorError, match="depends on the tokens after it"):
        tersor.perplexity(BertLMHeadModel(config).eval(), TOKENS, seq_len=32)


def test_a_linformer_is_found_by_trying() -> None:
    model = tersor.models.create("linformer_lm", dim=32, seq_len=32, depth=1, k=8, heads=2, num_tokens=VOCABULARY)
    with pytest.raises(TersorError, match="depends on the tokens after it"):
        tersor.perplexity(model, TOKENS, seq_len=32)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Embedding(VOCABULARY, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(input_ids)


def test_classes_are_no_tokens() -> None:
    with pytest.raises(TersorError, match="tells 5 classes apart"):
        tersor.perplexity(Tagger(), TOKENS, seq_len=32)


def test_a_token_without_a_row_is_named() -> None:
    with pytest.raises(
        TersorError, match=f"token {VOCABULARY} has no row in the model's embedding of {VOCABULARY} rows"
    ):
        tersor.perplexity(build("llama"), torch.full((64,), VOCABULARY), seq_len=32)


def test_the_interval_is_that_of_the_windows() -> None:
    model = build("llama")
    ids = torch.arange(4 * 32) % VOCABULARY
    found = tersor.perplexity(model, ids, seq_len=32)
    alone = [math.log(tersor.perplexity(model, ids[n : n + 32], seq_len=32).perplexity) for n in range(0, 128, 32)]
    assert found.perplexity == pytest.approx(math.exp(sum(alone) / 4), rel=1e-5)
    deviation = torch.tensor(alone).double().std()
    assert found.half_width == pytest.approx(float(3.1824 * deviation / 2 * found.perplexity), rel=1e-3)
    assert tersor.perplexity(model, ids[:32], seq_len=32).half_width is None
