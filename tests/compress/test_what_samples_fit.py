"""Texts that are as long as the model has positions, and models that read a second text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from zoo.tiny_models import VOCABULARY, build, samples

import tersor
from tersor import GPTQ, RTN, TersorError
from tersor.checkpoint.positions import positions_of

METHOD = GPTQ(group_size=32)


def letters(text: str, **_: object) -> dict[str, torch.Tensor]:
    """A tokenizer of letters, without the special tokens."""
    return {"input_ids": torch.tensor([[4 + ord(letter) % (VOCABULARY - 4) for letter in text]])}


def tokens_of(name: str, **options: Any) -> set[int]:
    result = tersor.compress(build(name), METHOD, tokenizer=letters, samples=1, seq_len=500, **options)
    return {layer.tokens for layer in result.summary.layers}


def test_the_text_config_says_how_many_positions_there_are() -> None:
    assert positions_of(build("llava")) == 128
    assert tokens_of("llava") == {128}


def test_positions_that_a_roberta_keeps_back_are_not_counted() -> None:
    model = build("roberta")
    assert model.config.pad_token_id == 0  # positions are counted from 1 on, of 128
    assert positions_of(model) == 127
    model(input_ids=torch.full((1, 127), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 128), 5))
    assert tokens_of("roberta") == {127}
    assert positions_of(build("bert")) == 128


def test_a_t5_is_given_a_text_for_its_decoder() -> None:
    texts = [{"input_ids": batch["input_ids"]} for batch in samples("t5", 2)]
    start = torch.zeros(1, 1, dtype=torch.long)  # decoder_start_token_id
    both = [{**text, "decoder_input_ids": torch.cat([start, text["input_ids"][:, :-1]], 1)} for text in texts]
    found, expected = (tersor.compress(build("t5"), METHOD, calibration=each, format=None) for each in (texts, both))
    assert torch.equal(found.model(**both[0]).logits, expected.model(**both[0]).logits)


def test_a_t5_that_does_not_say_how_a_text_starts_is_refused_in_one_line() -> None:
    model = build("t5")
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        setattr(model.config, name, None)
    with pytest.raises(TersorError, match="reads a second text: the samples lack decoder_input_ids"):
        tersor.compress(model, METHOD, calibration=[{"input_ids": samples("t5", 1)[0]["input_ids"]}])
    rounded = tersor.compress(model, RTN(group_size=32), tokenizer=letters)
    assert len(rounded.summary.layers) == len(tersor.compress(build("t5"), RTN(group_size=32)).summary.layers)


@pytest.mark.parametrize("name", ["t5", "whisper", "vit"])
def test_a_method_that_needs_no_samples_needs_no_text(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "model")  # without a tokenizer
    result = tersor.compress(tmp_path / "model", RTN(group_size=32), out=tmp_path / "out")
    assert result.summary.layers
    with_text = tersor.compress(build(name), RTN(group_size=32), tokenizer=letters)
    assert len(with_text.summary.layers) == len(result.summary.layers)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (GPTQ(group_size=32), True),
        (GPTQ(group_size=32, bits=8), False),
        (GPTQ(group_size=32, desc_act=True, static_groups=True, weighted=True), False),
        (RTN(group_size=32), False),
    ],
)
def test_a_job_says_so_where_so_few_tokens_lost_to_rounding(method: tersor.Method, said: bool) -> None:
    lines: list[str] = []
    texts = [{"input_ids": torch.arange(4, 4 + 60)[None]} for _ in range(2)]
    tersor.compress(build("llama"), method, calibration=texts, progress=lambda what, *_: lines.append(what))
    assert any(each.startswith("120 calibration tokens are few: at 4 bits") for each in lines) == said


def test_enough_tokens_are_not_remarked_on() -> None:
    assert METHOD.remark_on(8191) is not None
    assert METHOD.remark_on(8192) is None
