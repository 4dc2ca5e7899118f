from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tersor.data.text import TextConfig, TokenWindows, load_tokens
from tersor.errors import TersorError


def test_windows_do_not_overlap_and_the_rest_is_dropped() -> None:
    windows = TokenWindows(torch.arange(11), seq_len=4)
    assert [windows[n]["input_ids"].tolist() for n in range(len(windows))] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(IndexError):
        windows[2]


def test_bytes_are_tokens(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("aé b")
    windows = load_tokens(tmp_path / "x.txt", TextConfig(seq_len=5))
    assert windows[0]["input_ids"].tolist() == [97, 195, 169, 32, 98]


def test_refuses_a_text_shorter_than_a_window() -> None:
    with pytest.raises(TersorError, match="3 tokens, fewer than one window of 4"):
        TokenWindows(torch.arange(3), seq_len=4)
    with pytest.raises(TersorError, match="nothing to predict"):
        TokenWindows(torch.arange(3), seq_len=1)


def test_says_where_there_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("some text")
    with pytest.raises(TersorError, match="no tokenizer at"):
        load_tokens(tmp_path / "x.txt", TextConfig(tokenizer=str(tmp_path)))
