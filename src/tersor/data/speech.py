"""Recordings: files and streams of sound as one channel at one rate, pieces between pauses, and transcripts to learn from.

Sound is read by soundfile (WAV, FLAC, OGG, MP3, AIFF; any width and number of channels) and brought to the model's rate by
soxr: the extra `audio`. A long file is read in blocks, and cut into pieces where it is quiet:

    for piece in pieces(blocks_of("talk.flac", rate=16_000), rate=16_000):   # Piece(start, sound): seconds, (samples,)

A folder to learn from holds `transcripts.csv` with the columns `file` and `text`.
"""

from __future__ import annotations

import csv
import wave
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.untrusted import first_words, inside, readable

SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf"})
TRANSCRIPTS = "transcripts.csv"
RATES = range(1000, 768_001)  # samples a second that are believed
BLOCK = 10.0  # seconds that are read at a time
LONGEST, PAUSE = 20.0, 0.6  # seconds of a piece; of quiet that ends one
FRAME = 0.02  # seconds of which the loudness is measured
QUIET, FLOOR = (
    0.05,
    1e-4,
)  # a frame is quiet below this share of the piece's loudest one; nothing below the floor is speech


@dataclass(frozen=True)
class Piece:
    """A part of a recording."""

    start: float  # seconds from the beginning of the recording
    sound: Tensor  # (samples,), float32 in [-1, 1]


def read_audio(path: Path, rate: int) -> Tensor:
    """(samples,) float32 in [-1, 1]: the mean of the channels at `rate` samples a second. Raises TersorError where the file
    is no sound, broken or empty."""
    found = list(blocks_of(path, rate))
    sound = torch.cat(found) if found else torch.zeros(0)
    if not len(sound):
        raise TersorError(f"{path} holds no sound")
    return sound


def blocks_of(path: Path, rate: int) -> Iterator[Tensor]:
    """The recording, some seconds at a time: (samples,) float32 each."""
    soundfile = _soundfile()
    with readable(path):
        if not path.is_file():
            raise TersorError(f"there is no recording {path}")
        if not path.stat().st_size:
            raise TersorError(f"{path} is empty")
    try:
        with soundfile.SoundFile(path) as file:
            own = _checked_rate(file.samplerate, str(path))
            blocks = file.blocks(blocksize=int(BLOCK * own), dtype="float32", always_2d=True)
            yield from _at_rate((block.mean(1) for block in blocks), own, rate, str(path))
    except (soundfile.LibsndfileError, RuntimeError, OSError, ValueError) as error:
        raise TersorError(f"{path} cannot be read as sound: {first_words(error)}") from None


def blocks_of_stream(stream: BinaryIO, rate: int, *, raw: int | None = None) -> Iterator[Tensor]:
    """As `blocks_of`, for bytes as they come: a WAV file of whole numbers, or with `raw` that many 16-bit samples a second of
    one channel (little endian)."""
    if raw is not None:
        yield from _at_rate(_raw_blocks(stream, _checked_rate(raw, "--raw")), raw, rate, "standard input")
        return
    try:
        with wave.open(stream) as file:
            own = _checked_rate(file.getframerate(), "standard input")
            yield from _at_rate(_wave_blocks(file), own, rate, "standard input")
    except (wave.Error, EOFError, OSError) as error:
        raise TersorError(
            f"standard input is no WAV file of whole numbers ({first_words(error) or 'it ends too early'}); other formats are "
            "read from files, and --raw RATE takes 16-bit samples"
        ) from None


def pieces(blocks: Iterable[Tensor], rate: int) -> Iterator[Piece]:
    """Cut where it is quiet for PAUSE seconds, or in the quietest place of the second half after LONGEST; silence is left out."""
    frame = max(1, int(FRAME * rate))
    held, start = torch.zeros(0), 0  # what is not given out yet, and the number of its first sample
    for block in blocks:
        held = torch.cat((held, block))
        while (cut := _cut(held, frame, rate)) is not None:
            yield from _spoken(held[:cut], start, frame, rate)
            held, start = held[cut:], start + cut
    if len(held):
        yield from _spoken(held, start, frame, rate)


def loudness(sound: Tensor, frame: int) -> Tensor:
    """(frames,): the root of the mean square of each `frame` samples; a rest that fills none is left out."""
    whole = len(sound) // frame * frame
    return sound[:whole].reshape(-1, frame).square().mean(1).sqrt()


def _cut(sound: Tensor, frame: int, rate: int) -> int | None:
    """The sample at which the piece ends; None while it may go on."""
    loud = loudness(sound, frame)
    if not len(loud):
        return None
    pause = round(PAUSE / FRAME)
    heard = loud > max(FLOOR, QUIET * float(loud.max()))
    first = int(heard.int().argmax()) if bool(heard.any()) else None
    if first is None:
        return len(loud) * frame if len(sound) > LONGEST * rate else None
    places = torch.arange(len(loud))
    since = places - torch.where(heard, places, 0).cummax(0).values  # frames since the last one that was heard
    ends = ((since >= pause) & (places > first)).nonzero()
    if len(ends) and int(ends[0]) * frame < LONGEST * rate:
        return (int(ends[0]) + 1) * frame
    if len(sound) < LONGEST * rate:
        return None
    most = int(LONGEST / FRAME)
    window = 5  # frames, over which quiet is measured
    smooth = loud[:most].unfold(0, window, 1).mean(1)
    return (most // 2 + int(smooth[most // 2 :].argmin()) + window // 2) * frame


def _spoken(sound: Tensor, start: int, frame: int, rate: int) -> Iterator[Piece]:
    """The piece without the silence at its ends, but for 0.1 seconds; nothing where all is silence."""
    loud = loudness(sound, frame)
    heard = (loud > max(FLOOR, QUIET * float(loud.max()))).nonzero() if len(loud) else torch.zeros(0, 1)
    if not len(loud):  # shorter than a frame
        if float(sound.abs().max()) > FLOOR:
            yield Piece(start / rate, sound)
        return
    if not len(heard):
        return
    margin = int(0.1 * rate)
    first = max(0, int(heard[0]) * frame - margin)
    end = min(len(sound), (int(heard[-1]) + 1) * frame + margin)
    yield Piece((start + first) / rate, sound[first:end])


def _at_rate(blocks: Iterable[Any], own: int, rate: int, name: str) -> Iterator[Tensor]:
    stream = None
    if own != rate:
        soxr = _soxr()
        stream = soxr.ResampleStream(own, rate, 1, dtype="float32")
    for block in blocks:
        if not np.isfinite(block).all():
            raise TersorError(f"{name} holds samples that are not finite numbers")
        found = block if stream is None else stream.resample_chunk(np.ascontiguousarray(block, dtype=np.float32))
        if len(found):
            yield torch.from_numpy(np.array(found, dtype=np.float32))
    if stream is not None:
        rest = stream.resample_chunk(np.zeros(0, dtype=np.float32), last=True)
        if len(rest):
            yield torch.from_numpy(np.array(rest, dtype=np.float32))


def _wave_blocks(file: wave.Wave_read) -> Iterator[Any]:
    width, channels = file.getsampwidth(), file.getnchannels()
    count = max(1, int(0.2 * file.getframerate()))  # a stream is answered as it comes
    while data := file.readframes(count):
        data = data[: len(data) // (width * channels) * (width * channels)]  # a stream may be cut inside a sample
        yield _whole_numbers(data, width).reshape(-1, channels).mean(1, dtype=np.float32)


def _raw_blocks(stream: BinaryIO, rate: int) -> Iterator[Any]:
    rest = b""
    while data := stream.read(2 * max(1, int(0.2 * rate))):
        data, rest = rest + data, b""
        if len(data) % 2:
            data, rest = data[:-1], data[-1:]
        yield _whole_numbers(data, 2)


def _whole_numbers(data: bytes, width: int) -> Any:
    """Samples of WAV files as float32 in [-1, 1]; those of one byte are unsigned."""
    if width == 1:
        return (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
    if width == 3:
        bytes3 = np.frombuffer(data, np.uint8).reshape(-1, 3)
        wide = np.zeros((len(bytes3), 4), np.uint8)
        wide[:, 1:] = bytes3
        return (wide.view("<i4")[:, 0] / 2**31).astype(np.float32)
    return (np.frombuffer(data, f"<i{width}") / 2 ** (8 * width - 1)).astype(np.float32)


def _checked_rate(rate: int, name: str) -> int:
    if rate not in RATES:
        raise TersorError(f"{name}: {rate} samples a second; from {RATES.start} to {RATES.stop - 1} are read")
    return rate


@dataclass(frozen=True)
class Transcripts:
    """Recordings and what is said in them, in the order of the file."""

    files: tuple[Path, ...]
    texts: tuple[str, ...]


def read_transcripts(folder: Path) -> Transcripts:
    """`transcripts.csv` of a folder. Raises TersorError naming the row that is wrong."""
    table = folder / TRANSCRIPTS
    with readable(table):
        if not table.is_file():
            raise TersorError(f"{folder} holds no {TRANSCRIPTS} (columns `file` and `text`)")
        try:
            with table.open(newline="", encoding="utf-8-sig") as text:
                rows = list(csv.DictReader(text))
        except (UnicodeDecodeError, csv.Error) as error:
            raise TersorError(f"{table} cannot be read as CSV: {first_words(error)}") from None
    if not rows:
        raise TersorError(f"{table} has no rows")
    for name in ("file", "text"):
        if name not in rows[0]:
            raise TersorError(f"{table} has no column {name!r}; it has {', '.join(map(str, rows[0]))}")
    files, texts = [], []
    for number, row in enumerate(rows, 2):
        name, said = row.get("file") or "", " ".join((row.get("text") or "").split())
        if not said:
            raise TersorError(f"{table}, line {number}: no text is given for {name or 'a recording'}")
        path = inside(folder, name)
        if not path.is_file():
            raise TersorError(f"{table}, line {number}: there is no recording {name!r} in {folder}")
        files.append(path)
        texts.append(said)
    return Transcripts(tuple(files), tuple(texts))


def _soundfile() -> Any:
    try:
        import soundfile  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise TersorError("recordings are read by soundfile: pip install 'tersor[audio]'") from None
    return soundfile


def _soxr() -> Any:
    try:
        import soxr  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise TersorError("recordings are brought to another rate by soxr: pip install 'tersor[audio]'") from None
    return soxr
