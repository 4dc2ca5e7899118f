"""A tokenizer as the metadata of a GGUF file, and back.

llama.cpp has its own tokenizers; a file only gives their parameters. Byte-level BPE (`gpt2`) has a vocabulary, merges, and the
name of a way to cut text into words (`PRE_TOKENIZERS`). The right name is found by cutting texts both ways. SentencePiece BPE
(`llama`) has a vocabulary with scores, and merges the best score first. tokenizer.json has a list of merges instead; both agree
where all merges into one piece follow each other, and this is checked. The file also carries tokenizer.json whole, under the
key of the GGUF specification, and tersor reads that back.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tersor.errors import TersorError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types
CARRIED = "tokenizer.huggingface.json"
SPACE = "▁"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CL100K = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class PreTokenizer:
    """How a text is cut before its pieces become tokens."""

    patterns: tuple[str, ...]  # each in turn cuts the text; what lies between matches is kept
    whole_words: bool = False  # whether a word that is a token stays whole


PRE_TOKENIZERS = {  # how llama.cpp cuts text, by its names
    "llama-bpe": PreTokenizer((_CL100K % "1,3",), whole_words=True),
    "dbrx": PreTokenizer((_CL100K % "1,3",)),
    "qwen2": PreTokenizer((_CL100K % "1",)),
    "smollm": PreTokenizer((r"\p{N}", _GPT2)),
    "gpt-2": PreTokenizer((_GPT2,)),
}


def tokenizer_metadata(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """The `tokenizer.*` fields for a tokenizer of transformers and an embedding of `vocab_size` rows.

    Raises TersorError where llama.cpp would cut text into other tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TersorError(f"{type(tokenizer).__name__} has no tokenizer.json form, from which GGUF metadata is made")
    text = backend.to_str()
    parts = json.loads(text)
    kind = parts["model"]["type"]
    if kind != "BPE":
        raise TersorError(f"a tokenizer of type {kind} cannot be written as GGUF; only BPE can")
    tokens, types = _vocabulary(parts, vocab_size)
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")[
        "input_ids"
    ]  # shows the tokens that are put around a text: tokenizers differ in where they say so
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    front, back = ids[: _find(ids, bare)], ids[_find(ids, bare) + len(bare) :]
    if front not in ([], [bos]) or back not in ([], [eos]):
        raise TersorError(
            f"the tokenizer puts {front} before and {back} after a text; llama.cpp only the bos and eos tokens"
        )
    fields: dict[str, Any] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_bos_token": bool(front),
        "tokenizer.ggml.add_eos_token": bool(back),
        CARRIED: text,
    }
    for key, value in {
        "bos": bos,
        "eos": eos,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }.items():
        if value is not None:
            fields[f"tokenizer.ggml.{key}_token_id"] = value
    fields |= _chat_templates(getattr(tokenizer, "chat_template", None))
    if parts["model"].get("byte_fallback"):
        return fields | _sentencepiece(parts, tokens, types)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in parts["model"]["merges"]]
    return fields | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer(backend, parts),
        "tokenizer.ggml.merges": merges,
    }


def _find(ids: list[int], part: list[int]) -> int:
    return next((n for n in range(len(ids)) if ids[n : n + len(part)] == part), 0)


def _vocabulary(parts: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and type for every row of the embedding. A row without a token gets a made-up text."""
    model = parts["model"]
    named = {number: (text, NORMAL) for text, number in model["vocab"].items()}
    if model.get("byte_fallback"):
        named |= {
            n: (t, BYTE) for n, (t, _) in named.items() if len(t) == 6 and t.startswith("<0x") and t.endswith(">")
        }
    for token in parts["added_tokens"]:
        named[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    if model.get("unk_token") in model["vocab"]:
        named[model["vocab"][model["unk_token"]]] = model["unk_token"], UNKNOWN
    if max(named) >= vocab_size:
        raise TersorError(f"the tokenizer has a token {max(named)}; the model's embedding has {vocab_size} rows")
    rows = [named.get(n, (f"[PAD{n}]", UNUSED)) for n in range(vocab_size)]
    return [text for text, _ in rows], [kind for _, kind in rows]


# ---- byte-level BPE


def _pre_tokenizer(backend: Any, parts: Mapping[str, Any]) -> str:
    """The name under which llama.cpp cuts text as this tokenizer does."""
    normalizer = (parts.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):  # llama.cpp does not compose characters
        raise TersorError(f"the tokenizer's normalizer {normalizer} has no counterpart in llama.cpp")
    whole_words = bool(parts["model"].get("ignore_merges"))
    texts = probes()
    if backend.pre_tokenizer is None:
        raise TersorError("the tokenizer does not cut text into words before merging; llama.cpp always does")
    expected = [_words(backend.pre_tokenizer, text) for text in texts]
    best, wrong = "", len(texts) + 1
    for name, known in PRE_TOKENIZERS.items():
        if known.whole_words == whole_words:
            cut = byte_level(known)
            count = sum(_words(cut, text) != words for text, words in zip(texts, expected, strict=True))
            best, wrong = (name, count) if count < wrong else (best, wrong)
    if wrong:
        raise TersorError(
            f"the tokenizer cuts text into words as none of llama.cpp's {', '.join(PRE_TOKENIZERS)} does; the closest, {best}, "
            f"differs on {wrong} of {len(texts)} texts"
        )
    return best


def byte_level(known: PreTokenizer) -> Any:
    """A pre-tokenizer of the `tokenizers` library that cuts text as llama.cpp does."""
    from tokenizers import Regex, pre_tokenizers

    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in known.patterns]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _words(pre_tokenizer: Any, text: str) -> list[str]:
    return [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]


def probes() -> list[str]:
    """Texts that tell ways to cut apart: some written by hand, and random strings of all kinds of characters (the same every
    time)."""
    written = [
        "Hello, world! It's 3:45pm; we'VE  seen 12345 of them, haven't WE?\n\n\tEnd.  ",
        "x = [1, 22, 333, 4444]\nif x:\r\n    return -1  # done\n\n\n",
        "Äpfel, naïve café, straße, ΑΒΓ αβγ, Привет мир, 你好，世界！ こんにちは 안녕 ١٢٣ ½ Ⅷ 👍🏽 é",
        "http://a.b/c?d=e&f=%20 user@host ~/.cache $100 #tag __init__ a_b-c 1.5e-3 don't I'LL 'sup 's",
    ]
    kinds = [
        "abcXYZ",
        "0123456789",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        ".,;:!?",
        "'",
        "'s",
        "'RE",
        "_-/\\",
        "éßñΩ",
        "你好",
        "٣½",
        "🙂",
    ]
    dice = random.Random(0)
    mixed = ["".join(dice.choice(dice.choice(kinds)) for _ in range(dice.randint(2, 24))) for _ in range(300)]
    return written + mixed


# ---- SentencePiece BPE


def _sentencepiece(parts: Mapping[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    model = parts["model"]
    prefix = _adds_a_space(parts)
    merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    rank: dict[str, int] = {}
    for left, right in merges:
        piece = left + right
        if piece in rank and next(reversed(rank)) != piece:
            raise TersorError(
                f"the tokenizer's merges into {piece!r} lie apart, so that no score of it is the same to llama.cpp"
            )
        rank.setdefault(piece, len(rank))
    known = set(merges)
    # A half that is neither a character nor the result of a merge never occurs. Any two pieces whose union is a token are merged.
    parts_of = {text for text in model["vocab"] if len(text) == 1} | set(rank)
    for piece in (text for text, kind in zip(tokens, types, strict=True) if kind == NORMAL):
        for pair in ((piece[:cut], piece[cut:]) for cut in range(1, len(piece))):
            if parts_of.issuperset(pair) and pair not in known:
                raise TersorError(
                    f"the tokenizer does not merge {pair[0]!r} and {pair[1]!r} into its {piece!r}; llama.cpp would"
                )
    scores = [
        -float(rank[text]) if kind == NORMAL and text in rank else (0.0 if kind != NORMAL else -float(len(rank)))
        for text, kind in zip(tokens, types, strict=True)
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _adds_a_space(parts: Mapping[str, Any]) -> bool:
    """Whether a text gets a space in front. Raises TersorError where more is changed than spaces to `▁`."""
    steps = [*_flat(parts.get("normalizer"), "normalizers"), *_flat(parts.get("pre_tokenizer"), "pretokenizers")]
    prefix = False
    for step in steps:
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            prefix = True
        elif step["type"] == "Metaspace" and step["replacement"] == SPACE and not step.get("split", True):
            prefix |= step.get("prepend_scheme") in ("always", "first")
        elif not (step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE):
            raise TersorError(
                f"the tokenizer's step {step['type']} has no counterpart in llama.cpp's `llama` tokenizer"
            )
    if not steps:
        raise TersorError("the tokenizer leaves spaces as they are; llama.cpp's `llama` tokenizer makes them `▁`")
    return prefix


def _flat(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return list(step[key]) if step["type"] == "Sequence" else [step]


# ---- reading


def tokenizer_from(fields: Mapping[str, Any], path: str) -> Any:
    """The tokenizer of a GGUF file, or None where it has none. Raises TersorError where tersor cannot make it."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if "tokenizer.ggml.tokens" not in fields:
        return None
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    if CARRIED in fields:
        backend = Tokenizer.from_str(fields[CARRIED])
    else:
        backend = _byte_level_backend(fields, tokens, path)
    special = {
        f"{name}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in fields
    }
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, **special)  # type: ignore[no-untyped-call]
    tokenizer.chat_template = _read_chat_templates(fields)
    return tokenizer


def _read_chat_templates(fields: Mapping[str, Any]) -> str | dict[str, str] | None:
    default, names = fields.get("tokenizer.chat_template"), fields.get("tokenizer.chat_templates")
    named = {name: fields.get(f"tokenizer.chat_template.{name}") for name in names or ()}
    found = {name: each for name, each in {"default": default, **named}.items() if isinstance(each, str)}
    return found if set(found) - {"default"} else found.get("default")


def _chat_templates(found: str | Mapping[str, str] | None) -> dict[str, Any]:
    """One template, or several by name: readers look for `default`; the others lie beside it, with a list of their names."""
    given = {"default": found} if isinstance(found, str) else dict(found or {})
    named = {re.sub("[^A-Za-z0-9]", "_", name): template for name, template in given.items()}
    fields: dict[str, Any] = {}
    if "default" in named:
        fields["tokenizer.chat_template"] = named.pop("default")
    if named:
        fields["tokenizer.chat_templates"] = sorted(named)
        fields |= {f"tokenizer.chat_template.{name}": named[name] for name in sorted(named)}
    return fields


def _byte_level_backend(fields: Mapping[str, Any], tokens: list[str], path: str) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise TersorError(
            f"{path}: its tokenizer ({kind}, {pre}) is not one that tersor makes from GGUF metadata (gpt2 with "
            f"{', '.join(PRE_TOKENIZERS)}), and the file carries no tokenizer.json"
        )
    known = PRE_TOKENIZERS[pre]
    merges = [tuple(pair.split(" ", 1)) for pair in fields["tokenizer.ggml.merges"]]
    types = fields.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    vocabulary = {token: n for n, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=known.whole_words))
    backend.pre_tokenizer = byte_level(known)
    backend.decoder = decoders.ByteLevel()
    added = [(t, k) for t, k in zip(tokens, types, strict=True) if k in (CONTROL, USER_DEFINED)]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in added if k == CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False) for t, k in added if k == USER_DEFINED])
    # llama.cpp puts the bos token in front with llama-bpe unless the file says otherwise
    ends = {"bos": fields.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe")}
    ends["eos"] = fields.get("tokenizer.ggml.add_eos_token", False)
    numbers = {end: int(fields[f"tokenizer.ggml.{end}_token_id"]) for end, wanted in ends.items() if wanted}
    if numbers:
        names = {end: tokens[number] for end, number in numbers.items()}
        backend.post_processor = processors.TemplateProcessing(
            single=[each for each in (names.get("bos"), "$A", names.get("eos")) if each is not None],
            special_tokens=[(names[end], number) for end, number in numbers.items()],
        )
    return backend
