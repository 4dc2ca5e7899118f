"""Sampling, streaming, and the verbs `generate` and `bench`."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ran
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tersor
from tersor.checkpoint.load import load_tokenizer
from tersor.checkpoint.source import resolve
from tersor.compress import RTN, compress
from tersor.errors import TersorError
from tersor.layers.quantized_linear import QuantizedLinear
from tersor.runtime import bench, generate
from tersor.runtime.bench import Turn
from tersor.runtime.generate import load_module, stream, stream_tokens
from tersor.runtime.llama_cpu import LlamaCPU
from tersor.runtime.sampling import Sampling, choose, penalize, probabilities


class Recited:
    """An engine whose likeliest tokens are a given list."""

    device = torch.device("cpu")

    def __init__(self, tokens: list[int], vocabulary: int) -> None:
        self.tokens, self.vocabulary = iter(tokens), vocabulary

    def forward(self, ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor([next(self.tokens)]), self.vocabulary).float()


TEXTS = ["Grüße aus Köln", "日本語のテキスト", "emoji 👩‍👩‍👧 and 🎉", "a  b\n\n  c", "plain words, here.", "ﷺ", "x"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_hold_whole_characters(text: str) -> None:
    tokenizer = load_tokenizer(resolve("demo"))
    prompt = tokenizer("It is", return_tensors="pt")["input_ids"]
    new = tokenizer(text)["input_ids"]
    engine = Recited(new, len(tokenizer))
    pieces = list(stream_tokens(engine, tokenizer, prompt, max_new_tokens=len(new), sampling=Sampling()))
    whole = tokenizer.decode(prompt[0].tolist() + new, skip_special_tokens=True)
    assert "It is" + "".join(pieces) == whole
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(3, 8191), min_size=1, max_size=30))
def test_pieces_of_any_tokens_join_to_the_text(new: list[int]) -> None:
    tokenizer = load_tokenizer(resolve("demo"))
    prompt = tokenizer("It is", return_tensors="pt")["input_ids"]
    pieces = stream_tokens(Recited(new, 8192), tokenizer, prompt, max_new_tokens=len(new), sampling=Sampling())
    assert "It is" + "".join(pieces) == tokenizer.decode(prompt[0].tolist() + new, skip_special_tokens=True)


def test_generation_ends_at_the_end_token() -> None:
    found = generate.tokens(
        Recited([5, 6, 2, 7], 10), torch.tensor([[1]]), max_new_tokens=4, sampling=Sampling(), end=frozenset([2])
    )
    assert list(found) == [5, 6]


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    assert probabilities(logits, Sampling(temperature=1, top_k=2)).tolist() == [
        [pytest.approx(2 / 3), pytest.approx(1 / 3), 0, 0]
    ]
    kept = probabilities(logits, Sampling(temperature=1, top_p=0.8))[0]
    torch.testing.assert_close(kept, torch.tensor([0.5, 0.25, 0.15, 0.0]) / 0.9)
    assert probabilities(logits, Sampling(temperature=1, top_p=0.01))[0].tolist() == [1, 0, 0, 0]
    sharper = probabilities(logits, Sampling(temperature=0.5))[0]
    torch.testing.assert_close(sharper, torch.tensor([0.25, 0.0625, 0.0225, 0.01]) / 0.345)


def test_draws_follow_the_probabilities_and_the_seed() -> None:
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log().expand(4000, 3)
    sampling = Sampling(temperature=1.0, top_p=0.85)
    draws = [choose(logits, sampling, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    shares = draws[0].flatten().bincount(minlength=3) / 4000
    torch.testing.assert_close(shares, torch.tensor([2 / 3, 1 / 3, 0.0]), rtol=0, atol=0.05)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_wrong_sampling_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(TersorError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def packed(small_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "model"
    compress(str(small_source), RTN(bits=4, group_size=32), out=out)
    return out


def test_a_quantized_checkpoint_generates_from_its_packed_weights(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `generate` and the demo run: no packed layer is dequantized, and the tokens are those of transformers' loop."""
    monkeypatch.setattr("tersor.formats.quantized_weight.QuantizedWeight.dequantize", _refuse)
    module = load_module(packed)
    assert sum(isinstance(each, QuantizedLinear) for each in module.modules()) == 14
    text = "".join(stream(packed, "Once upon a time", max_new_tokens=12))
    monkeypatch.undo()
    tokenizer = load_tokenizer(packed)
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    plain = tersor.load(packed)
    made = plain.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert "Once upon a time" + text == tokenizer.decode(made[0], skip_special_tokens=True)


def _refuse(*_: object) -> None:
    raise AssertionError("a packed weight was dequantized")


def test_a_bfloat16_model_stays_bfloat16_where_the_decoder_reads_it() -> None:
    module = load_module("demo")
    engine = generate.make_engine(module, capacity=8)
    expected = torch.bfloat16 if isinstance(engine, LlamaCPU) else torch.float32
    assert next(module.parameters()).dtype == expected


def test_prompts_come_from_the_line_a_file_or_standard_input(
    tersor_command: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("It is a truth", encoding="utf-8")
    expected = tersor_command("generate", "demo", "--prompt", "It is a truth", "--max-new-tokens", 4)
    assert expected.status == 0, expected.err
    assert expected.out.startswith("It is a truth")
    assert tersor_command("generate", "demo", "--prompt-file", file, "--max-new-tokens", 4).out == expected.out
    monkeypatch.setattr("sys.stdin", io.StringIO("It is a truth"))
    assert tersor_command("generate", "demo", "--prompt", "-", "--max-new-tokens", 4).out == expected.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "either --prompt or --prompt-file"),
        (("--prompt", "a", "--prompt-file", __file__), "either --prompt or --prompt-file"),
        (("--prompt-file", "nowhere.txt"), "there is no file or folder nowhere.txt"),
        (("--prompt", "a", "--top-p", 2), "top_p 2.0"),
    ],
)
def test_wrong_options_are_one_line(
    tersor_command: Callable[..., Ran], arguments: tuple[object, ...], message: str
) -> None:
    ran = tersor_command("generate", "demo", *arguments)
    assert ran.status == 2
    assert message in ran.err
    assert ran.err.count("\n") == 1


def test_ctrl_c_keeps_what_was_made(tersor_command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object):
        yield " one"
        yield " two"
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "stream", interrupted)
    ran = tersor_command("generate", "demo", "--prompt", "zero")
    assert (ran.status, ran.out) == (0, "zero one two\n")


def test_bench_as_json(tersor_command: Callable[..., Ran], packed: Path, small_source: Path) -> None:
    sizes = ("--prompt-tokens", 8, "--new-tokens", 3, "--repeats", 2, "--batch-size", 2)
    ran = tersor_command("bench", packed, "--against", small_source, *sizes, "--json")
    assert ran.status == 0, ran.err
    found = json.loads(ran.out)
    assert (found["prompt_tokens"], found["new_tokens"], found["batch_size"], found["repeats"]) == (8, 3, 2, 2)
    assert found["threads"] == torch.get_num_threads()
    assert found["peak_memory"] > 10**8
    assert set(found["models"]) == {str(packed), str(small_source)}
    for each in found["models"].values():
        assert set(each) == {"engine", "prefill", "decode", "first_token"}
        assert set(each["prefill"]) == {"median", "low", "high"}
        assert 0 < each["decode"]["low"] <= each["decode"]["median"] <= each["decode"]["high"]
    assert set(found["ratios"]) == {"prefill", "decode"}
    table = tersor_command("bench", packed, *sizes[:-2])
    assert table.status == 0, table.err
    assert "peak memory" in table.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--new-tokens", 1), "at least 2 are needed"),
        (("--batch-size", 0), "at least 1 is needed"),
        (("--prompt-tokens", 5000), "more than the model's 256 positions"),
        (("--threads", 0), "--threads 0 must be positive"),
    ],
)
def test_bench_refuses_in_one_line(
    tersor_command: Callable[..., Ran], small_source: Path, arguments: tuple[object, ...], message: str
) -> None:
    ran = tersor_command("bench", small_source, *arguments)
    assert ran.status == 2
    assert message in ran.err


def test_models_take_turns_and_ratios_are_those_of_the_same_turn() -> None:
    order: list[str] = []
    seconds = {"a": iter([9.0, 1.0, 3.0]), "b": iter([9.0, 2.0, 12.0])}

    def runner(name: str) -> Callable[[], Turn]:
        def run() -> Turn:
            order.append(name)
            return Turn(prefill=next(seconds[name]), decode=1.0)

        return run

    turns = bench.measure({"a": runner("a"), "b": runner("b")}, repeats=2)
    assert order == ["a", "b"] * 3
    assert bench.ratios(turns["a"], turns["b"])["prefill"].median == pytest.approx((2 + 4) / 2)
    found = bench.speeds(turns["a"], prompt_tokens=6, new_tokens=4, batch=2)
    assert found["prefill"].median == pytest.approx((12 / 1 + 12 / 3) / 2)
    assert found["decode"].median == pytest.approx(2 * 3 / 1.0)
    assert found["first_token"].median == pytest.approx(2.0)


# ---- generation_config.json


def said(model: Path, **values: object) -> Path:
    (model / "generation_config.json").write_text(json.dumps(values))
    return model


def test_every_end_token_of_the_generation_config_ends_a_text(small: Path) -> None:
    module = load_module(said(small, eos_token_id=[2, 7]))
    assert generate.end_tokens(module, None) == {2, 7}
    assert generate.end_tokens(load_module(said(small, eos_token_id=5)), None) == {5}


def test_sampling_is_as_the_generation_config_says_where_the_user_says_nothing(small: Path) -> None:
    values = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    module = load_module(said(small, **values))
    found = generate.sampling_of(module, {})
    assert found == Sampling(temperature=0.6, top_k=50, top_p=0.9, repetition_penalty=1.1)
    given = {"temperature": 0.2, "top_k": 0, "repetition_penalty": 1.0}
    assert generate.sampling_of(module, given, seed=3) == Sampling(temperature=0.2, top_p=0.9, seed=3)
    greedy = load_module(said(small, do_sample=False, top_p=0.9))
    assert generate.sampling_of(greedy, {}).temperature == 0


def test_what_the_generation_config_asks_for_in_vain_is_said(tersor_command: Callable[..., Ran], small: Path) -> None:
    said(small, num_beams=4, no_repeat_ngram_size=0)
    ran = tersor_command("generate", small, "--prompt", "a", "--max-new-tokens", 2)
    assert ran.status == 0, ran.err
    assert ran.err == "generation_config.json asks for num_beams, which tersor does not do\n"


@pytest.mark.parametrize("content", ["{", '{"eos_token_id": "stop"}'])
def test_a_broken_generation_config_is_one_line(tersor_command: Callable[..., Ran], small: Path, content: str) -> None:
    (small / "generation_config.json").write_text(content)
    ran = tersor_command("generate", small, "--prompt", "a", "--max-new-tokens", 2)
    assert ran.status == 2
    assert "generation_config.json" in ran.err
    assert ran.err.count("\n") == 1


def test_repetition_is_penalized_as_in_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, ids = torch.randn(1, 20), torch.tensor([[3, 5, 3, 7]])
    right = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    torch.testing.assert_close(penalize(logits, ids, 1.3), right)


def test_min_p_keeps_what_is_near_the_likeliest() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    kept = probabilities(logits, Sampling(temperature=1, min_p=0.4))[0]
    torch.testing.assert_close(kept, torch.tensor([0.5, 0.25, 0.0, 0.0]) / 0.75)
