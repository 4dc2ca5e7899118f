"""Tokens into pieces of text as they come: joined, the pieces are the text that decoding all tokens at once would give.

A piece ends where no later token can change what it says: not inside a character whose bytes are several tokens, not inside a
run of byte tokens (`<0xE6>`), which decoders read as a whole, nor before blanks that the tokenizer may take away again. Only the
last few tokens are decoded again with each new one. They begin at a boundary where the text before and the text after, decoded
apart, are the text of both.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_CONTEXT = 8  # tokens at least that are decoded again with a new one
_LONGEST = 64  # tokens of a prompt that are looked at
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BLANK_THAT_MAY_GO = re.compile(r" (?:n'?|'[vr]?)?$")  # of " ." and " n't", which a clean-up makes "." and "n't"
_BROKEN = "\ufffd"  # what decoders write for bytes that are no character (yet)


class TextStream:
    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._cleans_up = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._tokens = list(prompt[-_LONGEST:])
        self._in_bytes = bool(prompt) and self._is_byte(prompt[-1])
        self._shown = self._decode(self._tokens)
        self._drop_old_tokens(self._shown)
        if len(self._tokens) == _LONGEST:  # no boundary among them
            self._tokens = list(prompt)
            self._shown = self._decode(self._tokens)

    def push(self, token: int) -> str:
        """The text that is certain with this token and was not before."""
        self._tokens.append(token)
        if self._is_byte(token):
            self._in_bytes = True
        elif self._in_bytes and self._decode([token]):  # not one that is skipped
            self._in_bytes = False
        if self._in_bytes:
            return ""
        text = self._decode(self._tokens)
        certain = text.rstrip(_BROKEN)
        if self._cleans_up:
            certain = _BLANK_THAT_MAY_GO.sub("", certain)
        piece = self._show(certain)
        if piece:
            self._drop_old_tokens(text)
        return piece

    def finish(self) -> str:
        """The rest of the text, when no token follows."""
        return self._show(self._decode(self._tokens))

    def _show(self, text: str) -> str:
        known = next((n for n, (a, b) in enumerate(zip(self._shown, text, strict=False)) if a != b), len(self._shown))
        if known >= len(text):
            return ""
        self._shown = text
        return text[known:]

    def _drop_old_tokens(self, text: str) -> None:
        """text: of all tokens held."""
        hidden = len(text) - len(self._shown)
        for start in range(len(self._tokens) - _CONTEXT, 0, -1):
            if self._is_byte(self._tokens[start]):
                continue
            before, after = self._decode(self._tokens[:start]), self._decode(self._tokens[start:])
            apart = before.endswith(_BROKEN) or after.startswith(_BROKEN) or len(after) <= hidden or not before
            if not apart and text in (before + after, f"{before} {after}"):
                self._tokens = self._tokens[start:]
                self._shown = after[: len(after) - hidden]
                return
            if start < len(self._tokens) - 2 * _CONTEXT - 1:
                return  # it is tried again with the next piece

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def _is_byte(self, token: int) -> bool:
        name = self._tokenizer.convert_ids_to_tokens(int(token))
        return isinstance(name, str) and _BYTE.fullmatch(name) is not None
