"""The text that is streamed is the text that decoding all tokens at once would give, for every kind of tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from tersor.runtime.text_stream import TextStream

CHARACTERS = "日本語 👩‍👩‍👧🎉e\u0301n\u0303 ก็ aé.,'"


def wrapped(made: Tokenizer, **options: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    made.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", **options)


def byte_level(**options: Any) -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(letters)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return wrapped(made, **options)


def byte_fallback() -> Any:
    pieces = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), "▁", "▁the", "the", "本", "a", "n", "e", ".", "▁▁", "é"]
    made = Tokenizer(
        models.BPE(vocab={p: n for n, p in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    return wrapped(made)


def word_piece() -> Any:
    pieces = ["[UNK]", "the", "##s", "n", "'", "t", ".", "##é", "日", "##本", "?", "do"]
    made = Tokenizer(models.WordPiece(vocab={p: n for n, p in enumerate(pieces)}, unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return wrapped(made, clean_up_tokenization_spaces=True)


KINDS: dict[str, Callable[[], Any]] = {
    "bytes": byte_level,
    "bytes, cleaned up": lambda: byte_level(
        clean_up_tokenization_spaces=True, clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True
    ),
    "byte fallback": byte_fallback,
    "word pieces": word_piece,
}
MADE = {kind: make() for kind, make in KINDS.items()}


def streamed(tokenizer: Any, prompt: list[int], new: list[int]) -> list[str]:
    stream = TextStream(tokenizer, prompt)
    return [*(stream.push(token) for token in new), stream.finish()]


def assert_same(tokenizer: Any, prompt: list[int], new: list[int]) -> None:
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode(prompt + new, skip_special_tokens=True)
    assert before + "".join(streamed(tokenizer, prompt, new)) == whole


@pytest.mark.parametrize("kind", MADE)
@given(data=st.data())
def test_any_tokens_join_to_their_text(kind: str, data: st.DataObject) -> None:
    tokenizer = MADE[kind]
    tokens = st.lists(st.integers(0, len(tokenizer) - 1), max_size=60)
    assert_same(tokenizer, tokenizer("the")["input_ids"], data.draw(tokens))


@pytest.mark.parametrize("kind", ["bytes", "bytes, cleaned up", "byte fallback"])
@given(text=st.text(st.sampled_from(CHARACTERS), max_size=40), prompt=st.text(st.sampled_from(CHARACTERS), max_size=40))
def test_no_character_is_broken(kind: str, text: str, prompt: str) -> None:
    tokenizer = MADE[kind]
    new = tokenizer(text, add_special_tokens=False)["input_ids"]
    known = tokenizer(prompt + "a", add_special_tokens=False)["input_ids"]
    assert_same(tokenizer, known, new)
    assert not any("\ufffd" in piece for piece in streamed(tokenizer, known, new))


def test_text_comes_as_it_is_made_and_old_tokens_are_not_decoded_again() -> None:
    tokenizer = MADE["bytes"]
    new = tokenizer("日本語 and more " * 30)["input_ids"]
    stream = TextStream(tokenizer, tokenizer("日本" * 200)["input_ids"])
    late = []
    for n, token in enumerate(new):
        stream.push(token)
        late.append(len(tokenizer.decode(new[: n + 1]).rstrip("\ufffd")))
        assert len(stream._tokens) < 24
    assert late[-1] == len("日本語 and more " * 30)


def test_a_special_token_between_bytes_does_not_end_their_character() -> None:
    tokenizer = MADE["byte fallback"]
    new = tokenizer.convert_tokens_to_ids(["<0xE6>", "<s>", "<0x97>", "<0xA5>", "a"])
    assert streamed(tokenizer, tokenizer("the")["input_ids"], new) == ["", "", "", "", "日a", ""]
