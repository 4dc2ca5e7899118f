"""Two models beside each other: one in memory at a time gives the numbers of both at once, for every kind of model."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ran
from torch import Tensor, nn

import tersor
from tersor.checkpoint.source import resolve
from tersor.errors import TersorError
from tersor.evaluate import agreement as classifiers
from tersor.evaluate import similarities as encoders
from tersor.evaluate.attribution import Attribution
from tersor.evaluate.interval import t_quantile
from tersor.evaluate.logit_cache import Kept, LogitCache, bytes_in
from tersor.evaluate.similarities import ranks, spearman

Command = Callable[..., Ran]
TOKENS = torch.randint(3, 8000, (256,), generator=torch.Generator().manual_seed(0))
CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def rounded(small_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rounded") / "model"
    tersor.compress(small_source, tersor.RTN(bits=3, group_size=32), out=out, device="cpu")
    return out


# ---- language models


def test_one_model_at_a_time_gives_the_same_numbers(small_source: Path, rounded: Path, tmp_path: Path) -> None:
    how = {"seq_len": 16, "max_windows": 3}
    modules = [tersor.load(each, device="cpu") for each in (rounded, small_source)]
    at_once = tersor.divergence(*modules, TOKENS, **how)
    assert at_once.kl.mean > 0
    names = {"device": "cpu", **how}
    kept = tmp_path / "cache"
    for more in ({}, {"cache": kept}, {"cache": kept}, {"cache_size": 1}, {"cache": kept, "cache_size": 1}):
        found = tersor.divergence(rounded, small_source, TOKENS, **names, **more)
        for name, value in at_once.as_dict().items():
            if name != "passages":  # whose text is known of a model with a tokenizer
                assert found.as_dict()[name] == value, (name, more)
        if "cache_size" not in more and "cache" in more:
            assert len(list(kept.iterdir())) == 3
    assert len(list(kept.iterdir())) <= 1


def test_a_block_at_a_time_gives_the_same_numbers(
    small_source: Path, rounded: Path, tmp_path: Path, tersor_command: Command
) -> None:
    how: dict[str, Any] = {"seq_len": 16, "max_windows": 6, "device": "cpu", "cache": tmp_path}
    whole = tersor.divergence(rounded, small_source, TOKENS, stream=False, **{**how, "cache": None})
    for size in (10**9, 10**9, 1):
        found = tersor.divergence(rounded, small_source, TOKENS, stream=True, cache_size=size, **how)
        for name in ("kl", "reverse_kl", "ratio", "same_top1"):
            assert getattr(found, name).mean == pytest.approx(getattr(whole, name).mean, rel=1e-4), name
        assert found.noise_floor == pytest.approx(whole.noise_floor, rel=0.2)
        assert found.kl_quantiles == pytest.approx(whole.kl_quantiles, rel=1e-3, abs=1e-6)
    quick = ("--seq-len", 16, "--max-windows", 2, *CPU)
    ran = tersor_command("eval", rounded, "--against", small_source, "--stream", *quick)
    assert ran.status == 0, ran.err
    assert "stronger its colour" in ran.out
    assert "?[" not in ran.out  # colours are not shown as text
    ran = tersor_command("eval", rounded, "--stream", *quick)
    assert (ran.status, "--stream is for a comparison" in ran.err) == (2, True)


def test_the_parts_of_a_passage_join_to_its_text(small_source: Path, rounded: Path, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("naïve façade — 東京 " * 20)
    found = tersor.divergence(rounded, small_source, book, seq_len=16, max_windows=2, device="cpu")
    for passage in found.passages:
        assert "".join(text for text, _ in passage.parts) == passage.text
        assert sum(kl for _, kl in passage.parts) / len(passage.parts) == pytest.approx(passage.kl)
    levels = [(kl, level) for passage in found.passages for _, kl, level in passage.levels()]
    assert {level for _, level in levels} > {0}
    assert all((kl >= 0.1) == (level >= 1) and (kl >= 1.5) == (level == 3) for kl, level in levels)


def test_what_is_kept_is_used_and_what_is_broken_is_made_again(
    small_source: Path, rounded: Path, tmp_path: Path
) -> None:
    def run() -> float:
        how = {"seq_len": 16, "max_windows": 2, "cache": tmp_path, "device": "cpu"}
        return tersor.divergence(rounded, small_source, TOKENS, **how).kl.mean

    first = run()
    files = sorted(tmp_path.iterdir())
    files[0].write_bytes(b"no logits")
    assert run() == first
    shutil.copyfile(files[1], files[0])  # another window's
    assert run() != first


def test_logits_are_kept_exactly_and_the_oldest_go(tmp_path: Path) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        cache = LogitCache(tmp_path, 10**9, str(dtype))
        logits = torch.randn(7, 33).to(dtype)
        cache.put(TOKENS[:8], Kept(logits, torch.rand(7).double()))
        found = cache.get(TOKENS[:8], noise=True)
        assert found is not None
        assert found.noise is not None
        assert torch.equal(found.logits, logits)
        assert found.logits.dtype == dtype
    assert cache.get(TOKENS[:9], noise=False) is None
    assert LogitCache(tmp_path, 10**9, "another model").get(TOKENS[:8], noise=False) is None
    cache.put(TOKENS[:8], Kept(logits, None))
    assert cache.get(TOKENS[:8], noise=True) is None
    newest = cache.path_of(TOKENS[:8])
    LogitCache(tmp_path, newest.stat().st_size, "").trim()
    assert list(tmp_path.iterdir()) == [newest]
    assert (bytes_in("2GB"), bytes_in("500 MB"), bytes_in("1e3")) == (2 * 10**9, 5 * 10**8, 1000)


def test_anchors_stand_beside_each_figure(small_source: Path, rounded: Path, tersor_command: Command) -> None:
    how = ("--seq-len", 32, "--max-windows", 2, "--anchors", *CPU)
    ran = tersor_command("eval", rounded, "--against", small_source, *how)
    assert ran.status == 0, ran.err
    assert ran.out.count("[8 bits: ") == 7
    told = json.loads(tersor_command("eval", rounded, "--against", small_source, *how, "--json").out)
    assert 0 < told["anchor"]["kl"]["mean"] < 0.1 * told["kl"]["mean"]


def test_the_cache_on_the_command_line(
    small_source: Path, rounded: Path, tmp_path: Path, tersor_command: Command
) -> None:
    cache = tmp_path / "logits"
    how = ("eval", rounded, "--against", small_source, "--seq-len", 8, "--max-windows", 2, "--json", *CPU)
    plain = tersor_command(*how).out
    assert tersor_command(*how, "--cache", cache).out == plain
    written = {path: path.read_bytes() for path in cache.iterdir()}
    assert len(written) == 2
    assert tersor_command(*how, "--cache", cache).out == plain
    assert {path: path.read_bytes() for path in cache.iterdir()} == written
    one, other = written
    one.write_bytes(written[other])  # the logits of another window, which are found and believed
    assert tersor_command(*how, "--cache", cache).out != plain
    one.unlink()
    assert tersor_command(*how, "--cache", cache, "--cache-size", "1kb").out == plain
    assert len(list(cache.iterdir())) == 1


# ---- classifiers


def test_classes_that_are_known_give_known_shares() -> None:
    labels = torch.tensor([0, 1, 2, 0, 1])
    p, q = (torch.log_softmax(4 * nn.functional.one_hot(torch.tensor(each), 3).double(), -1) for each in (
        [0, 1, 2, 1, 0], [0, 2, 2, 0, 0],
    ))  # fmt: skip
    found = classifiers.compared(p, q, labels)
    assert found.base_accuracy.mean == found.accuracy.mean == pytest.approx(3 / 5)
    assert found.agreement.mean == pytest.approx(3 / 5)
    assert found.harmful_flips == found.helpful_flips == pytest.approx(1 / 5)
    assert found.change.mean == 0
    assert found.change.half_width == pytest.approx(2.7764 * math.sqrt(2 / 4) / math.sqrt(5))
    other = (p.exp() * (p - q)).sum(-1)
    assert found.kl.mean == pytest.approx(float(other.mean()))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    pillow = pytest.importorskip("PIL.Image", reason="reading images needs Pillow")
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for n in range(3):
            pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            pillow.fromarray(pixels).save(tmp_path / "pictures" / name / f"{n}.png")
    return tmp_path / "pictures"


def test_classifiers_on_the_command_line(pictures: Path, tmp_path: Path, tersor_command: Command) -> None:
    ran = tersor_command("eval", "demo-vit", "--against", "demo-vit", "--images", pictures, "--json", *CPU)
    told = json.loads(ran.out)
    assert (told["images"], told["agreement"]["mean"], told["kl"]["mean"]) == (6, 1, 0)
    tersor.compress("demo-vit", tersor.RTN(bits=2, group_size=32), out=tmp_path / "small", device="cpu")
    ran = tersor_command("eval", tmp_path / "small", "--against", "demo-vit", "--images", pictures, *CPU)
    assert ran.status == 0, ran.err
    assert "same class" in ran.out
    assert "6 images" in ran.out


# ---- encoders


def test_rank_correlation_is_of_the_order_alone() -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    assert spearman(x, x.exp()) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0, 2.5, 1]
    a, b = torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([2.0, 1, 4, 3, 5])
    assert spearman(a, b) == pytest.approx(1 - 6 * 4 / (5 * 24))  # 1 - 6 Σ d² / (n (n² - 1))


def test_the_jackknife_leaves_out_one_line_at_a_time() -> None:
    draw = torch.Generator().manual_seed(0)
    p = nn.functional.normalize(torch.randn(6, 4, generator=draw).double(), dim=-1)
    q = nn.functional.normalize(p + 0.3 * torch.randn(6, 4, generator=draw).double(), dim=-1)

    def of(rows: list[int]) -> float:
        pairs = [(i, j) for n, i in enumerate(rows) for j in rows[n + 1 :]]
        values = [torch.stack([each[i] @ each[j] for i, j in pairs]) for each in (p, q)]
        return spearman(*values)

    found = encoders.compared(p, q)
    left_out = torch.tensor([of([i for i in range(6) if i != n]) for n in range(6)]).double()
    error = math.sqrt(5 / 6 * float((left_out - left_out.mean()).square().sum()))
    assert found.rank_correlation.mean == pytest.approx(of(list(range(6))))
    assert found.rank_correlation.half_width == pytest.approx(t_quantile(5) * error)


def test_encoders_on_the_command_line(tmp_path: Path, tersor_command: Command) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=8192, max_position_embeddings=64, **sizes)).save_pretrained(tmp_path / "bert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(resolve("demo") / name, tmp_path / "bert" / name)
    text = tmp_path / "lines.txt"
    words = re.findall(r"\w+", "the cat sat on a mat while one dog ran over many long green hills to sea")
    text.write_text("\n".join(" ".join(words[n : n + 4 + n % 5]) for n in range(12)))
    bert, small = tmp_path / "bert", tmp_path / "small"
    same = json.loads(tersor_command("eval", bert, "--against", bert, "--text", text, "--json", *CPU).out)
    assert (same["lines"], same["moved"]) == (12, 0)
    assert same["rank_correlation"]["mean"] == pytest.approx(1)
    tersor.compress(bert, tersor.RTN(bits=4, group_size=32), out=small, device="cpu")
    ran = tersor_command("eval", small, "--against", bert, "--text", text, "--anchors", *CPU)
    assert ran.status == 0, ran.err
    assert "order of the similarities" in ran.out
    text.write_text("one line of words")
    ran = tersor_command("eval", small, "--against", bert, "--text", text, *CPU)
    assert (ran.status, "1 lines with words" in ran.err) == (2, True)


# ---- forecasters


def test_forecasters_are_compared_and_attributed(tmp_path: Path, tersor_command: Command) -> None:
    table, run, small = tmp_path / "x.csv", tmp_path / "run", tmp_path / "small"
    hours = np.arange(300)
    rows = [f"{np.datetime64('2024-01-01T00', 'h') + h},{np.sin(h / 4):.5f},{np.cos(h / 5):.5f}" for h in hours]
    table.write_text("\n".join(["date,a,b", *rows]) + "\n")
    sizes = {"seq_len": 24, "pred_len": 12, "d_model": 32, "d_ff": 32, "n_heads": 2, "e_layers": 2}
    words = [word for name, value in sizes.items() for word in ("--set", f"model.{name}={value}")]
    ran = tersor_command("train", "itransformer", "--data", table, "--out", run, *words, "--max-steps", 2, *CPU)
    assert ran.status == 0, ran.err
    tersor.compress(run, tersor.RTN(bits=2, group_size=32), out=small, device="cpu")
    how = ("--against", run, "--data", table, *CPU)
    same = json.loads(tersor_command("eval", run, *how, "--json").out)
    assert same["apart"]["mean"] == same["mse_change"]["mean"] == 0
    told = json.loads(tersor_command("eval", small, *how, "--max-windows", 4, "--json").out)
    assert told["windows"] == 4
    assert told["apart"]["mean"] > 0
    assert told["mse_change"]["mean"] == pytest.approx(told["mse"]["mean"] - told["base_mse"]["mean"])
    beside = tersor_command("eval", small, *how, "--anchors")
    assert ("MAE" in beside.out, beside.out.count("[8 bits: ")) == (True, 5), beside.err
    ran = tersor_command("attribute", small, *how, "--no-suggest", "--json", "--max-eval-samples", 4)
    assert ran.status == 0, ran.err
    found = Attribution.from_json(json.loads(ran.out))
    assert (found.measure, found.samples) == ("MSE", 4)
    assert found.total_kl == pytest.approx(told["apart"]["mean"])
    assert any(row.kl > 0 for row in found.rows)
    assert all(row.bits == 2 for row in found.rows if row.kl > 0)


# ---- what cannot be compared


def test_bad_input_is_one_line(small: Path, tmp_path: Path, tersor_command: Command) -> None:
    file = tmp_path / "file"
    file.write_text("")
    both = (small, "--against", small)
    for arguments, said in (
        ((*both, "--images", tmp_path), "--images does nothing"),
        ((*both, "--data", file), "--data does nothing"),
        ((*both, "--max-images", 3), "--max-images does nothing"),
        ((*both, "--cache-size", "much"), "--cache-size much"),
        ((*both, "--cache", file), "is a file; a folder is expected"),
        ((small, "--against", "demo-vit"), "compared on"),
        (("demo-vit", "--against", "demo-vit"), "give --images DIR"),
        (
            ("demo-vit", "--against", "demo-vit", "--images", tmp_path, "--cache-size", "1GB"),
            "--cache-size does nothing for models that are compared on images",
        ),
        (("demo-vit", "--against", "demo-vit", "--images", tmp_path, "--seq-len", 8), "--seq-len does nothing"),
        (("demo-vit", "--images", tmp_path, "--seq-len", 8), "--seq-len does nothing for accuracy"),
        (("demo-vit", "--images", tmp_path, "--text", file), "--text does nothing for accuracy"),
        (("demo-vit", "--images", tmp_path, "--max-windows", 2), "--max-windows does nothing for accuracy"),
        ((small, "--max-images", 2), "--max-images does nothing for perplexity"),
        ((small, "--against", tmp_path / "nowhere"), "no model at"),
        ((tmp_path / "nowhere", "--against", small), "no model at"),
        ((small, "--anchors"), "--anchors is for a comparison"),
        ((small, "--cache", tmp_path), "--cache is for a comparison"),
        ((small, "--data", file), "--data is for a comparison"),
    ):
        ran = tersor_command("eval", *arguments)
        assert ran.status == 2, (arguments, ran.out)
        assert said in ran.err, ran.err
        assert len(ran.err.strip().splitlines()) == 1
    module = tersor.load(small)
    with pytest.raises(TersorError, match="leave cache out"):
        tersor.divergence(module, module, TOKENS, seq_len=16, cache=tmp_path)


def test_unlike_numbers_of_classes_are_refused() -> None:
    class Constant(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(classes))

        def forward(self, image: Tensor) -> Tensor:
            return self.bias.expand(len(image), -1)

    images = (torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))
    with pytest.raises(TersorError, match="4 and 3 classes apart"):
        classifiers.agreement(Constant(4), Constant(3), images)
    with pytest.raises(TersorError, match="a label is 1"):
        classifiers.agreement(Constant(1), Constant(1), images)
