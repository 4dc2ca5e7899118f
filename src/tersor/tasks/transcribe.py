"""Speech to text: recordings with their transcripts to learn from, and the user's own recordings as text, with times.

What a run learned of its data is saved with the weights: sampling rate, filterbank, mean and scale of the features, what a token
is (a word or a letter). Published Paraformer folders say the same in `am.mvn` and `tokens.json`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.data.seeding import mixed_seed
from tersor.data.speech import SUFFIXES, Piece, blocks_of, pieces, read_audio, read_transcripts
from tersor.data.speech_features import Normalization, filterbank, low_frame_rate
from tersor.errors import TersorError
from tersor.layers.integrate_and_fire import integrate_and_fire
from tersor.models.config import checked_config
from tersor.progress import Progress, silent
from tersor.tasks.task import Sets, Task, numbers_of
from tersor.train.mwer import edit_distance
from tersor.train.objectives import Batch
from tersor.untrusted import read_json

SPECIAL = ("<blank>", "<s>", "</s>")
UNKNOWN = "<unk>"
UNITS = ("word", "letter")
SHIFT_MS = 10  # between two frames of the filterbank
SHORTEST = 0.2  # seconds, to which shorter pieces are filled up with silence
MOST_FOR_MEAN = 2000  # recordings that mean and scale of the features are taken from
# Of the tokens' times, in frames of the encoder: FunASR's
LATE, LONGEST_TOKEN = 1.5, 12


@dataclass(frozen=True, kw_only=True)
class SpeechConfig:
    """The table `data` of `tersor train`."""

    rate: int = 16_000  # samples a second
    unit: str = "word"  # what a token is: word or letter
    dither: float = 1.0  # noise in 16-bit steps, in training
    silence: float = 0.3  # seconds put before and behind at most, in training; those between pauses have some
    augment: bool = False  # bands and stretches of the features hidden at random
    seed: int = 0

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise TersorError(f"data.unit is {self.unit!r}; it is one of {', '.join(UNITS)}")
        if not 4000 <= self.rate <= 192_000:
            raise TersorError(f"data.rate is {self.rate}; from 4000 to 192000 samples a second")
        for name in ("dither", "silence"):
            if getattr(self, name) < 0:
                raise TersorError(f"data.{name} is {getattr(self, name)}, it must not be negative")


@dataclass(frozen=True)
class FrontEnd:
    """Turns sound into a model's features."""

    rate: int  # samples a second
    bins: int
    m: int  # frames that are put side by side
    n: int  # frames to move on by; m = n = 1 leaves the frames as they are
    normalize: Normalization | None = None

    def __call__(self, sound: Tensor, *, dither: float = 0.0) -> Tensor:
        """(samples,) at `rate` -> (T, m bins)."""
        least = int(SHORTEST * self.rate)
        if len(sound) < least:
            sound = nn.functional.pad(sound, (0, least - len(sound)))
        frames = filterbank(sound, sampling_rate=self.rate, bins=self.bins, dither=dither)
        found = low_frame_rate(frames, m=self.m, n=self.n) if self.m > 1 else frames
        return found if self.normalize is None else self.normalize(found)


@dataclass(frozen=True)
class Token:
    text: str
    start: float  # seconds from the start of the recording
    end: float


@dataclass(frozen=True)
class Segment:
    """What is said between two pauses."""

    start: float  # seconds
    end: float  # seconds
    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Transcript:
    path: Path
    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        return " ".join(segment.text for segment in self.segments if segment.text)

    def line(self) -> str:
        return f"{self.path}: {self.text}"

    def as_dict(self) -> dict[str, Any]:
        segments = [
            {
                "start": round(each.start, 3),
                "end": round(each.end, 3),
                "text": each.text,
                "tokens": [
                    {"text": token.text, "start": round(token.start, 3), "end": round(token.end, 3)}
                    for token in each.tokens
                ],
            }
            for each in self.segments
        ]
        return {"path": str(self.path), "text": self.text, "segments": segments}


def objective(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The model's own losses; where it is validated, also the errors a token: insertions, deletions and replacements."""
    found = model(**batch)
    scores: dict[str, Tensor] = {"loss": found.loss, "count": found.length}
    if not model.training:
        own: Any = getattr(model, "module", model)
        said = own.transcribe(batch["speech"], batch["speech_lengths"])
        wanted = [
            row[:length] for row, length in zip(batch["text"].tolist(), batch["text_lengths"].tolist(), strict=True)
        ]
        wrong = sum(edit_distance(a, b) for a, b in zip(said, wanted, strict=True))
        scores["errors"] = torch.tensor(wrong / sum(map(len, wanted)), device=found.loss.device)
    return scores


def load_data(model: Any, data: Path, validation: Path | None, table: Mapping[str, Any]) -> Sets:
    config = checked_config(SpeechConfig, table, "data")
    found = read_transcripts(data)
    parts = [_units(text, config.unit) for text in found.texts]
    counts = Counter(part for text in parts for part in text)
    names = (*SPECIAL, *sorted(counts), UNKNOWN)
    if model.config.vocab_size != len(names):
        raise TersorError(
            f"{data} has {len(counts)} different {config.unit}s, with {', '.join(SPECIAL)} and {UNKNOWN} {len(names)} tokens; "
            f"the model has {model.config.vocab_size}; give --set model.vocab_size={len(names)}"
        )
    front = _front_end(model, config.rate)
    front = replace(front, normalize=_mean_and_scale(found.files, front))
    train = Recordings(found.files, parts, names, front, config)
    held_out = None
    if validation is not None:
        other = read_transcripts(validation)
        quiet = replace(config, dither=0.0, silence=0.0, augment=False)
        held_out = Recordings(other.files, [_units(text, config.unit) for text in other.texts], names, front, quiet)
    rare = sum(counts[part] == 1 for part in counts)
    notes = [f"{len(found.files)} recordings, {len(counts)} different {config.unit}s"]
    if rare > len(counts) // 2 and config.unit == "word":
        notes.append(f"{rare} of the words occur once; --set data.unit=letter learns words that it never heard")
    return Sets(train, held_out, preprocessing=_said(front, config.unit), labels=names, notes=tuple(notes))


class Recordings:
    """speech (T, D), text (L,) with their lengths."""

    def __init__(
        self,
        files: Sequence[Path],
        parts: Sequence[Sequence[str]],
        names: Sequence[str],
        front: FrontEnd,
        config: SpeechConfig,
    ) -> None:
        number = {name: index for index, name in enumerate(names)}
        self.files, self.front, self.config, self.epoch = files, front, config, 0
        self.texts = [torch.tensor([number.get(part, number[UNKNOWN]) for part in text]) for text in parts]

    def set_epoch(self, epoch: int) -> None:
        """Other noise; the trainer calls it at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        config = self.config
        sound = read_audio(self.files[index], self.front.rate)
        chance = torch.Generator().manual_seed(mixed_seed(config.seed, self.epoch, index))
        if config.silence:
            before, behind = (torch.rand(2, generator=chance) * config.silence * self.front.rate).int().tolist()
            sound = nn.functional.pad(sound, (before, behind))
        if config.dither:
            sound = sound + config.dither / 32768 * torch.randn(sound.shape, generator=chance)
        speech = self.front(sound)
        if config.augment:
            speech = hidden(speech, self.front, chance)
        text = self.texts[index]
        return {
            "speech": speech,
            "speech_lengths": torch.tensor(len(speech)),
            "text": text,
            "text_lengths": torch.tensor(len(text)),
        }

    @staticmethod
    def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Speech is filled up with zeros, text with -1."""
        padded = nn.utils.rnn.pad_sequence
        return {
            "speech": padded([each["speech"] for each in items], batch_first=True),
            "speech_lengths": torch.stack([each["speech_lengths"] for each in items]),
            "text": padded([each["text"] for each in items], batch_first=True, padding_value=-1),
            "text_lengths": torch.stack([each["text_lengths"] for each in items]),
        }


def hidden(speech: Tensor, front: FrontEnd, chance: torch.Generator) -> Tensor:
    """SpecAugment on normalized features: two bands of up to 30/80 of the bins and two stretches of up to 0.4 s, at most a
    quarter of the recording, are zero."""
    speech = speech.reshape(len(speech), front.m, front.bins).clone()

    def stretch(length: int, most: int) -> slice:
        width = int(torch.randint(0, max(1, most) + 1, (), generator=chance))
        start = int(torch.randint(0, max(1, length - width + 1), (), generator=chance))
        return slice(start, start + width)

    for _ in range(2):
        speech[:, :, stretch(front.bins, front.bins * 30 // 80)] = 0
        speech[stretch(len(speech), min(len(speech) // 4, 40 // front.n))] = 0
    return speech.flatten(1)


@dataclass(frozen=True)
class Recognizer:
    """A model that is ready for sound."""

    module: Any
    front: FrontEnd
    names: tuple[str, ...]  # of the tokens
    unit: str  # word, letter, or published: pieces of words as FunASR writes them

    def segments(self, blocks: Iterable[Tensor]) -> Iterator[Segment]:
        """Of sound at the model's rate, as it comes: a segment as soon as a pause ends it."""
        for piece in pieces(blocks, self.front.rate):
            if (found := self.segment(piece)).tokens:
                yield found

    @torch.no_grad()
    def segment(self, piece: Piece) -> Segment:
        first = numbers_of(self.module)
        speech = self.front(piece.sound)[None].to(first.device, first.dtype)
        log_probs, found = self.module.recognize(speech, torch.tensor([speech.shape[1]], device=first.device))
        count = int(found.token_num[0].round())
        numbers = log_probs[0, :count].argmax(-1).tolist()
        seconds = len(piece.sound) / self.front.rate
        frame = self.front.n * SHIFT_MS / 1000 * max(1, round(speech.shape[1] / found.alphas.shape[1]))
        spans = token_times(found.alphas[0].float().cpu(), count, frame=frame, seconds=seconds)
        tokens = tuple(
            Token(self.names[number], piece.start + start, piece.start + end)
            for number, (start, end) in zip(numbers, spans, strict=True)
            if number >= len(SPECIAL)
        )
        text = joined([token.text for token in tokens], self.unit)
        return Segment(piece.start, piece.start + seconds, text, tokens)


def recognizer(module: Any, folder: Path, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Recognizer:
    """From what is saved beside the weights. Raises TersorError where that is not enough."""
    size = module.config.vocab_size
    labels = config.get("id2label")
    if settings.get("features") == "filterbank":
        front, unit = _as_said(module, settings, folder), str(settings.get("unit"))
        names = tuple(str((labels or {}).get(str(number), UNKNOWN)) for number in range(size))
        return Recognizer(module, front, names, unit)
    statistics, table = folder / "am.mvn", folder / "tokens.json"
    for file in (statistics, table):
        if not file.is_file():
            raise TersorError(
                f"{folder} holds no {file.name}; a published Paraformer has am.mvn and tokens.json beside its weights"
            )
    front = replace(_front_end(module, 16_000), normalize=Normalization.read(statistics))
    tokens = read_json(table)
    if not isinstance(tokens, list) or len(tokens) != size or not all(isinstance(each, str) for each in tokens):
        raise TersorError(f"{table} is no list of {size} tokens, which the model has")
    assert front.normalize is not None
    if len(front.normalize.shift) != module.config.input_size:
        raise TersorError(
            f"{statistics} has {len(front.normalize.shift)} numbers, the model takes {module.config.input_size} features"
        )
    return Recognizer(module, front, tuple(tokens), "published")


def token_times(alphas: Tensor, count: int, *, frame: float, seconds: float) -> list[tuple[float, float]]:
    """When each of `count` tokens is spoken: alphas (T,) of the predictor, with its tail -> (start, end) in seconds.

    Token n (from 1) begins LATE frames before the summed weights reach n. It ends where the next one begins, but after
    LONGEST_TOKEN frames at most. Where the sum does not reach count + 1 wholes, the weights are scaled to it (as FunASR does).
    """
    if count == 0:
        return []
    frames = torch.zeros(1, len(alphas), 1)
    _, peaks = integrate_and_fire(frames, alphas[None])
    fired = (peaks[0] >= 1 - 1e-4).nonzero().flatten()
    if len(fired) != count + 1:
        sums = (alphas.double() * ((count + 1) / float(alphas.double().sum()))).cumsum(0)
        fired = torch.searchsorted(sums, torch.arange(1, count + 2).double() - 1e-4).clamp(max=len(alphas) - 1)
    starts = [max(0.0, (int(at) - LATE) * frame) for at in fired]
    found = []
    for start, following in pairwise(starts):
        end = min(max(following, start), start + LONGEST_TOKEN * frame, seconds)
        found.append((min(start, seconds), max(end, min(start, seconds))))
    return found


def joined(tokens: Sequence[str], unit: str) -> str:
    if unit == "letter":
        return "".join(tokens)
    if unit == "word":
        return " ".join(tokens)
    text, glued = "", True
    for token in tokens:  # "@@" at the end: the word goes on; Chinese characters stand side by side
        word = token.removesuffix("@@")
        apart = not glued and (word.isascii() or text[-1:].isascii())
        text += (" " if apart else "") + word
        glued = token.endswith("@@")
    return text


def predict(
    module: nn.Module,
    path: Path,
    *,
    settings: Mapping[str, Any],
    labels: Mapping[int, str],
    out: Path | None,
    reference: Path | None,
    progress: Progress = silent,
) -> Transcript:
    if settings.get("features") != "filterbank":
        raise TersorError("`tersor transcribe` reads a published folder with its am.mvn and tokens.json")
    config = {"id2label": {str(number): name for number, name in labels.items()}}
    return transcript(recognizer(module, path, config, settings), path)


def transcript(model: Recognizer, path: Path) -> Transcript:
    """One recording, a piece at a time. Raises TersorError where it is no sound, or empty."""
    heard = 0

    def counted() -> Iterator[Tensor]:
        nonlocal heard
        for block in blocks_of(path, model.front.rate):
            heard += len(block)
            yield block

    segments = tuple(model.segments(counted()))
    if not heard:
        raise TersorError(f"{path} holds no sound")
    return Transcript(path, segments)


def _units(text: str, unit: str) -> list[str]:
    return list(text) if unit == "letter" else text.split()


def _front_end(model: Any, rate: int) -> FrontEnd:
    """Published: 80 bins, seven frames side by side and on by six; models of up to 80 features take frames as they are, unless
    seven divide them (the small SANM models of tests and trials)."""
    config = model.config
    m, n = (7, 6) if config.encoder == "sanm" and config.input_size % 7 == 0 else (1, 1)
    return FrontEnd(rate, config.input_size // m, m, n)


def _mean_and_scale(files: Sequence[Path], front: FrontEnd) -> Normalization:
    chosen = files[:: math.ceil(len(files) / MOST_FOR_MEAN)]
    total, squares, count = torch.zeros(()), torch.zeros(()), 0
    for file in chosen:
        features = front(read_audio(file, front.rate)).double()
        total, squares = total + features.sum(0), squares + features.square().sum(0)
        count += len(features)
    mean = total / count
    scale = (squares / count - mean.square()).clamp(min=1e-4).rsqrt()
    return Normalization(-mean.float(), scale.float())


def _said(front: FrontEnd, unit: str) -> dict[str, Any]:
    assert front.normalize is not None
    return {
        "features": "filterbank",
        "sampling_rate": front.rate,
        "frames": [front.m, front.n],
        "unit": unit,
        "shift": front.normalize.shift.tolist(),
        "scale": front.normalize.scale.tolist(),
    }


def _as_said(module: Any, settings: Mapping[str, Any], folder: Path) -> FrontEnd:
    try:
        m, n = (int(each) for each in settings["frames"])
        normalize = Normalization(torch.tensor(settings["shift"]), torch.tensor(settings["scale"]))
        front = FrontEnd(int(settings["sampling_rate"]), module.config.input_size // m, m, n, normalize)
        fits = front.bins * m == module.config.input_size == len(normalize.shift) == len(normalize.scale) and n > 0
        if not fits or not 1000 <= front.rate <= 768_000 or settings["unit"] not in UNITS:
            raise ValueError("its numbers do not fit the model")
    except (KeyError, TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise TersorError(f"{folder}: preprocessor_config.json does not say how speech is prepared: {error}") from None
    return front


TASK = Task(objective, load_data, predict, SUFFIXES, normalises=False)
