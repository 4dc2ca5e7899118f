"""Speech on disk becomes text: reading, cutting at pauses, training on one's own recordings, transcripts with times."""

from __future__ import annotations

import io
import json
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor.models
from tersor.cli.main import main
from tersor.data.speech import LONGEST, blocks_of, blocks_of_stream, pieces, read_audio
from tersor.errors import TersorError
from tersor.tasks.subtitles import clock
from tersor.tasks.transcribe import joined, recognizer, token_times

soundfile = pytest.importorskip("soundfile", reason="needs the extra audio")
pytest.importorskip("soxr", reason="needs the extra audio")

RATE = 8000
TONES = {"low": 400, "middle": 1100, "high": 2500}


def tone(hertz: float, seconds: float = 0.24, rate: int = RATE) -> Any:
    at = np.arange(int(seconds * rate)) / rate
    return (0.4 * np.sin(2 * np.pi * hertz * at) * np.hanning(len(at)) ** 0.3).astype(np.float32)


def silence(seconds: float, rate: int = RATE) -> Any:
    return np.zeros(int(seconds * rate), dtype=np.float32)


def said(words: list[str]) -> Any:
    return np.concatenate([part for word in words for part in (tone(TONES[word]), silence(0.06))])


def run(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(each) for each in arguments])
    told = capsys.readouterr()
    assert stopped.value.code == status, told.err
    if status == 2:
        assert told.err.count("\n") == 1
    return told.err if status else told.out


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of recordings, and a small model that learned them."""
    folder = tmp_path_factory.mktemp("speech")
    random = np.random.default_rng(0)
    for name, count in (("train", 48), ("held_out", 8)):
        (folder / name).mkdir()
        rows = ["file,text"]
        for n in range(count):
            words = [str(word) for word in random.choice(list(TONES), size=random.integers(1, 4))]
            soundfile.write(folder / name / f"{n}.wav", said(words), RATE)
            rows.append(f"{n}.wav,{' '.join(words)}")
        (folder / name / "transcripts.csv").write_text("\n".join(rows) + "\n")
    small = {**tersor.models.find("paraformer").small, "vocab_size": 7, "input_size": 112, "sampling_ratio": 0.2}
    options = [f"--set=model.{name}={value}" for name, value in small.items()]
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                *("train", "paraformer", "--data", str(folder / "train"), "--validation", str(folder / "held_out")),
                *("--out", str(folder / "run"), f"--set=data.rate={RATE}", *options, "--device", "cpu"),
                *("--epochs", "30", "--batch-size", "8", "--lr", "3e-3", "--max-grad-norm", "5"),
            ]
        )
    assert stopped.value.code == 0
    return folder


def test_it_learns_words_and_counts_them(learnt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = (learnt / "held_out" / "transcripts.csv").read_text().split("\n")[1:-1]
    wanted = {row.split(",")[0]: row.split(",")[1] for row in rows}
    found = json.loads(run(capsys, "transcribe", learnt / "run", learnt / "held_out", "--format", "json"))
    right = sum(each["text"] == wanted[Path(each["path"]).name] for each in found)
    assert right >= 7  # of 8
    kept = json.loads((learnt / "run" / "preprocessor_config.json").read_text())
    assert kept["sampling_rate"] == RATE


def test_a_long_recording_is_cut_at_pauses_and_keeps_its_times(
    learnt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phrases = [["low", "high"], ["middle"], ["high", "low", "middle"]]
    sound, starts = [], []
    for words in phrases:
        sound.append(silence(1.0))
        starts.append(sum(map(len, sound)) / RATE)
        sound.append(said(words))
    stereo = np.repeat(np.concatenate([*sound, silence(0.5)])[:, None], 2, 1)
    soundfile.write(tmp_path / "talk.flac", stereo, RATE, subtype="PCM_24")
    (found,) = json.loads(run(capsys, "transcribe", learnt / "run", tmp_path / "talk.flac", "--format", "json"))
    assert [each["text"] for each in found["segments"]] == [" ".join(words) for words in phrases]
    for segment, start in zip(found["segments"], starts, strict=True):
        assert segment["start"] == pytest.approx(start, abs=0.25)
        times = [time for token in segment["tokens"] for time in (token["start"], token["end"])]
        assert times == sorted(times)
        assert segment["start"] <= times[0]
        assert times[-1] <= segment["end"]
    as_srt = ("transcribe", learnt / "run", tmp_path / "talk.flac", "--format", "srt", "--out", tmp_path / "out")
    run(capsys, *as_srt)
    (tmp_path / "out" / "talk.srt").write_text("corrected by hand")
    assert "talk.srt exists; give another --out" in run(capsys, *as_srt, status=2)
    assert (tmp_path / "out" / "talk.srt").read_text() == "corrected by hand"
    run(capsys, *as_srt, "--overwrite")
    blocks = (tmp_path / "out" / "talk.srt").read_text().strip().split("\n\n")
    assert len(blocks) == 3
    assert blocks[1].split("\n")[2] == "middle"
    assert " --> " in blocks[1]
    assert run(capsys, "transcribe", learnt / "run", tmp_path / "talk.flac", "--format", "vtt").startswith(
        "WEBVTT\n\n00:"
    )


@pytest.mark.parametrize("raw", [True, False])
def test_standard_input_is_transcribed_as_it_comes(
    learnt: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, raw: bool
) -> None:
    sound = np.concatenate([said(["low", "middle"]), silence(1.0), said(["high"])])
    samples = (sound * 32767).astype("<i2").tobytes()
    held = io.BytesIO()
    with wave.open(held, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(samples if raw else held.getvalue())))
    more = ["--raw", RATE] if raw else []
    assert run(capsys, "transcribe", learnt / "run", "-", *more).split("\n") == ["low middle", "high", ""]


def test_quantized_it_says_the_same(learnt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(
        capsys,
        *("quantize", learnt / "run", "--method", "rtn", "--bits", 8, "--group-size", -1, "--out", tmp_path / "packed"),
    )
    before = run(capsys, "transcribe", learnt / "run", learnt / "held_out")
    assert run(capsys, "transcribe", tmp_path / "packed", learnt / "held_out") == before


def test_what_is_no_speech_is_one_line(learnt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = learnt / "run"
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "broken.wav").write_bytes(b"RIFF0000WAVEfmt nonsense")
    soundfile.write(tmp_path / "nothing.wav", silence(0), RATE)
    soundfile.write(tmp_path / "quiet.wav", silence(2), RATE)
    soundfile.write(tmp_path / "short.wav", tone(500, 0.01), RATE)
    told = run(capsys, "transcribe", model, tmp_path, status=1)
    for line in ("empty.wav is empty", "broken.wav cannot be read as sound", "nothing.wav holds no sound"):
        assert line in told
    assert "3 of 5 files skipped" in told
    assert run(capsys, "transcribe", model, tmp_path / "quiet.wav") == "\n"
    assert "--format 'doc'" in run(capsys, "transcribe", model, tmp_path / "quiet.wav", "--format", "doc", status=2)
    assert "leave the other inputs" in run(capsys, "transcribe", model, "-", tmp_path / "quiet.wav", status=2)
    assert "give - as the input" in run(capsys, "transcribe", model, tmp_path / "quiet.wav", "--raw", 8000, status=2)
    data = ["--data", tmp_path, "--out", tmp_path / "run"]
    assert "holds no transcripts.csv" in run(capsys, "train", "paraformer", *data, status=2)
    for rows, line in (
        ("file,words\nquiet.wav,a", "no column 'text'"),
        ("file,text\nquiet.wav,", "line 2: no text"),
        ("file,text\nother.wav,a", "line 2: there is no recording 'other.wav'"),
        ("file,text\n../x.wav,a", "lies outside"),
        ("file,text", "has no rows"),
    ):
        (tmp_path / "transcripts.csv").write_text(rows)
        assert line in run(capsys, "train", "paraformer", *data, "--set=model.num_blocks=1", status=2)
    (tmp_path / "transcripts.csv").write_text("file,text\nquiet.wav,one two\n")
    small = [f"--set=model.{name}={value}" for name, value in tersor.models.find("paraformer").small.items()]
    assert "give --set model.vocab_size=6" in run(capsys, "train", "paraformer", *data, *small, status=2)
    assert "data.unit is 'syllable'" in run(
        capsys, "train", "paraformer", *data, *small, "--set=data.unit=syllable", status=2
    )


def test_a_published_folder_needs_its_tokens_and_statistics(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {**tersor.models.find("paraformer").small, "vocab_size": 6}
    module: Any = tersor.models.create("paraformer", **small).eval()
    with pytest.raises(TersorError, match=r"holds no am\.mvn"):
        recognizer(module, tmp_path, {}, {})
    numbers = " ".join(["0.5"] * 56)
    (tmp_path / "am.mvn").write_text(
        f"<Nnet>\n<AddShift> 56 56\n<X> 0 [ {numbers} ]\n<Rescale> 56 56\n<X> 0 [ {numbers} ]\n"
    )
    (tmp_path / "tokens.json").write_text('["<blank>", "<s>", "</s>", "好"]')
    with pytest.raises(TersorError, match="no list of 6 tokens"):
        recognizer(module, tmp_path, {}, {})
    (tmp_path / "tokens.json").write_text('["<blank>", "<s>", "</s>", "好", "he@@", "llo"]')
    ready = recognizer(module, tmp_path, {}, {})
    assert ready.front.rate == 16_000
    assert ready.unit == "published"


def test_pieces_of_words_are_joined_as_they_are_written() -> None:
    assert joined(["he@@", "llo", "world"], "published") == "hello world"
    assert joined(["你", "好", "he@@", "llo", "吗"], "published") == "你好 hello 吗"
    assert joined(list("a b"), "letter") == "a b"
    assert joined(["a", "b"], "word") == "a b"


@given(st.integers(1, 12), st.integers(1, 60), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_times_are_ordered_and_inside(count: int, frames: int, seed: int) -> None:
    alphas = torch.rand(frames, generator=torch.Generator().manual_seed(seed)) + 1e-3
    spans = token_times(alphas, count, frame=0.06, seconds=frames * 0.06)
    assert len(spans) == count
    for (start, end), following in zip(spans, [*spans[1:], (frames * 0.06, 0.0)], strict=True):
        assert 0 <= start <= end <= max(following[0], start) + 1e-9 <= frames * 0.06 + 1e-6


def test_clock() -> None:
    assert clock(3723.0456, ",") == "01:02:03,046"
    assert clock(0.9996, ".") == "00:00:01.000"


@given(st.integers(0, 2**31), st.sampled_from([4000, 11_025, 48_000]))
@settings(max_examples=15, deadline=None)
def test_pieces_hold_all_that_is_loud_and_none_is_too_long(seed: int, rate: int) -> None:
    random = np.random.default_rng(seed)
    parts = []
    for _ in range(int(random.integers(1, 6))):
        parts.append(silence(float(random.uniform(0, 2)), rate))
        parts.append(tone(300, float(random.uniform(0.1, 26)), rate))
    sound = torch.from_numpy(np.concatenate(parts))
    found = list(pieces(sound.split(int(random.integers(1000, 200_000))), rate))
    covered = torch.zeros(len(sound), dtype=torch.bool)
    for piece in found:
        first = round(piece.start * rate)
        assert torch.equal(piece.sound, sound[first : first + len(piece.sound)])
        assert not bool(covered[first : first + len(piece.sound)].any())
        covered[first : first + len(piece.sound)] = True
        assert len(piece.sound) <= (LONGEST + 0.1) * rate
    assert float(sound[~covered].abs().max() if bool((~covered).any()) else 0.0) < 0.1


def test_every_rate_and_width_is_read_alike(tmp_path: Path) -> None:
    at_16k = {}
    for name, rate, kind in (
        ("a", 16_000, "PCM_16"),
        ("b", 44_100, "PCM_24"),
        ("c", 8000, "FLOAT"),
        ("d", 48_000, "PCM_32"),
    ):
        soundfile.write(tmp_path / f"{name}.wav", np.stack([tone(500, 1.0, rate)] * 2, 1), rate, subtype=kind)
        at_16k[name] = read_audio(tmp_path / f"{name}.wav", 16_000)
    for sound in at_16k.values():
        assert len(sound) == 16_000
        torch.testing.assert_close(sound[800:-800], at_16k["a"][800:-800], atol=4e-3, rtol=0)
    with (tmp_path / "b.wav").open("rb") as stream:
        streamed = torch.cat(list(blocks_of_stream(stream, 16_000)))
    torch.testing.assert_close(streamed, torch.cat(list(blocks_of(tmp_path / "b.wav", 16_000))), atol=1e-6, rtol=0)
    cut = (tmp_path / "b.wav").read_bytes()[:-100_004]  # inside a sample of 2 x 3 bytes
    heard = torch.cat(list(blocks_of_stream(io.BytesIO(cut), 44_100)))
    whole = torch.cat(list(blocks_of(tmp_path / "b.wav", 44_100)))
    torch.testing.assert_close(heard, whole[: 44_100 - 16_668], atol=1e-6, rtol=0)
    with pytest.raises(TersorError, match="no WAV file"):
        list(blocks_of_stream(io.BytesIO(b"ID3 something else"), 16_000))
    with pytest.raises(TersorError, match="--raw: 7 samples"):
        list(blocks_of_stream(io.BytesIO(b""), 16_000, raw=7))
