"""Where the calibration windows of a text lie."""

from __future__ import annotations

import gzip
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersor.byte_tokenizer import ByteTokenizer
from tersor.calibrate.batches import make_batches
from tersor.data.long_text import LONG
from tersor.errors import TersorError
from tersor.evaluate.perplexity import cut_windows, tokens_of


class Numbers:
    """A tokenizer whose tokens are their own places."""

    def __init__(self, tokens: int) -> None:
        self.ids = torch.arange(tokens)[None]

    def __call__(self, text: str, **_: object) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids}


def starts(tokens: int, samples: int, length: int, seed: int) -> list[int]:
    batches = make_batches("builtin", Numbers(tokens), samples=samples, seq_len=length, seed=seed)
    for batch in batches:
        first = int(batch["input_ids"][0, 0])
        assert torch.equal(batch["input_ids"], torch.arange(first, first + length)[None])
    return [int(batch["input_ids"][0, 0]) for batch in batches]


@given(length=st.integers(1, 50), samples=st.integers(1, 40), spare=st.integers(0, 500), seed=st.integers(0, 2**31))
def test_each_lies_in_a_part_of_its_own(length: int, samples: int, spare: int, seed: int) -> None:
    tokens = length * samples + spare
    found = starts(tokens, samples, length, seed)
    for n, start in enumerate(found):
        assert n * tokens / samples - 1 < start
        assert start + length <= (n + 1) * tokens / samples + 1
    assert all(second - first >= length for first, second in itertools.pairwise(found))


@given(length=st.integers(1, 50), samples=st.integers(1, 40), spare=st.integers(0, 50), seed=st.integers(0, 2**31))
def test_a_short_text_is_used_all_over(length: int, samples: int, spare: int, seed: int) -> None:
    found = starts(length + spare, samples, length, seed)
    assert len(found) == samples
    assert found == sorted(found)
    assert 0 <= found[0] <= found[-1] <= spare


def test_the_seed_decides() -> None:
    assert starts(5000, 8, 100, seed=1) == starts(5000, 8, 100, seed=1) != starts(5000, 8, 100, seed=2)


@pytest.fixture(params=["text.txt", "text.txt.gz"])
def long_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Numbered lines of two-byte letters, four times as long as what is read whole."""
    text = "".join(f"{n:07} äöü\n" for n in range(4 * LONG // 15)).encode()
    path = tmp_path / str(request.param)
    path.write_bytes(gzip.compress(text, 1) if path.suffix == ".gz" else text)
    return path


def text_of(tokens: torch.Tensor) -> str:
    return bytes(tokens.flatten().tolist()).decode(errors="ignore")


def test_samples_of_a_long_file_come_from_all_over_it(long_file: Path) -> None:
    found = make_batches(long_file, ByteTokenizer(), samples=5, seq_len=60, seed=3)
    lines = [int(text_of(each["input_ids"]).split("\n")[1].split()[0]) for each in found]
    total = 4 * LONG // 15
    assert all(n * total / 5 - 50 <= line <= (n + 1) * total / 5 + 50 for n, line in enumerate(lines))
    assert all(each["input_ids"].shape == (1, 60) for each in found)
    again = make_batches(long_file, ByteTokenizer(), samples=5, seq_len=60, seed=3)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(found, again, strict=True))


def test_the_first_windows_are_those_of_the_whole_text(long_file: Path) -> None:
    few = cut_windows(tokens_of(long_file, ByteTokenizer(), at_least=3 * 100), seq_len=100, max_windows=3)
    whole = cut_windows(tokens_of(long_file, ByteTokenizer()), seq_len=100, max_windows=3)
    assert torch.equal(few, whole)
    more = tokens_of(long_file, ByteTokenizer(), at_least=2**62)  # than there are
    assert len(more) == 4 * LONG // 15 * 15


def test_a_long_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"\xff\xfe" * LONG)
    with pytest.raises(TersorError, match="is not UTF-8 text: byte"):
        make_batches(path, ByteTokenizer(), samples=2, seq_len=60, seed=0)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    text = b"All happy families are alike. " * (40 * 10**6 // 30)
    (tmp_path / "text.txt").write_bytes(text)
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress(text, 1))
    code = """
import sys
from tersor.byte_tokenizer import ByteTokenizer
from tersor.calibrate.batches import make_batches
from tersor.compress.result import peak_memory
from tersor.evaluate.perplexity import tokens_of
import torch
before = peak_memory(torch.device("cpu"))
for path in sys.argv[1:]:
    make_batches(path, ByteTokenizer(), samples=2, seq_len=256, seed=0)
    tokens_of(path, ByteTokenizer(), at_least=4096)
print(peak_memory(torch.device("cpu")) - before)
"""
    files = [str(tmp_path / name) for name in ("text.txt", "text.txt.gz")]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20e6
