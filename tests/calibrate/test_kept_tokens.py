"""The tokens of long texts are kept between the steps of a job, by tokenizer and text."""

from __future__ import annotations

from tersor.checkpoint.load import load_tokenizer
from tersor.checkpoint.source import resolve
from tersor.data.text import WORTH_KEEPING, builtin_text, tokenized


def test_kept_tokens_are_those_of_this_tokenizer_and_this_text() -> None:
    text = builtin_text("evaluation")
    assert len(text) > WORTH_KEEPING + 1
    tokenizer = load_tokenizer(resolve("demo"))
    expected = tokenizer(text)["input_ids"]
    for _ in range(2):
        assert tokenized(tokenizer, text).tolist() == expected
    assert tokenized(tokenizer, text[1:]).tolist() == tokenizer(text[1:])["input_ids"]
    tokenizer.add_tokens("th")
    changed = tokenizer(text)["input_ids"]
    assert changed != expected
    assert tokenized(tokenizer, text).tolist() == changed
