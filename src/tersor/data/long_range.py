"""The Long Range Arena (Tay et al., ICLR 2021): six classifications of sequences of 1,000 to 16,000 steps, and their data.

    sets = load_long_range("listops", None, LongRangeConfig(train=1000, validation=100, test=100))
    data = LongRange(sets.train, BENCHMARKS["listops"], form="tokens", name="input_ids")
    data[0]          # {"input_ids": (2000,) int64, "lengths": (), "target": ()}

| task | sequences | classes | train, validation, test | from |
| --- | --- | --- | --- | --- |
| listops | 500 to 1,999 tokens of nested expressions | 10 | 96,000, 2,000, 2,000 | drawn, or `basic_train.tsv`, ... |
| text | bytes of film reviews, 4,096 at most | 2 | 25,000; the test set is the validation set | `aclImdb` |
| retrieval | bytes of two papers, 4,000 each: is one cited by the other? | 2 | 147,086, 18,090, 17,437 | `*.train.tsv`, ... |
| image | 1,024 grey values of CIFAR-10 | 10 | 45,000, 5,000, 10,000 | folder of classes or `.npz` |
| pathfinder | 1,024 grey values: are two dots connected? | 2 | 160,000, 20,000, 20,000 | drawn, or `pathfinder32` |
| pathx | 16,384 grey values of the same | 2 | 160,000, 20,000, 20,000 | drawn, or `pathfinder128` |

pathx256 is pathx of 65,536. Folders are the user's; nothing is downloaded. Images of one folder or file are split 80, 10
and 10 in a fixed random order; a folder with `train` and `test` (folders or .npz) keeps its test set, and a tenth of the
other validates. Official Pathfinder pictures are split 80, 10 and 10 in their own order, as published.

Tokens: 0 <mask> (for self-pretraining), 1 <pad>, 2 <eos>, then the task's own. A sequence is cut, ends with <eos> and is
padded on the right; published bytes have 0 as padding and begin at 1, without <eos>. Grey values are tokens for models of
tokens, and numbers x / 255 * 2 - 1 for the others.

Sources: google-research/long-range-arena at cd31e5c (Apache-2.0). Proven: the expressions and values of the golden cases;
the published statistics of drawn expressions. Not proven: accuracies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from tersor.data.images import ImageConfig, load_images, open_image
from tersor.data.listops import VOCABULARY, evaluate, expressions, parse
from tersor.data.pathfinder import draw_pathfinder, pathfinder_config
from tersor.data.seeding import mixed_seed
from tersor.errors import TersorError
from tersor.untrusted import check_seed, inside, read_bytes, readable

MASK, PADDING, EOS, FIRST = 0, 1, 2, 3  # FIRST: the task's first token
SET_BYTES = 1 << 33  # of one file of texts: the published ones have 1.3 gigabytes
Sample = tuple[tuple[np.ndarray, ...], int]  # one sequence, or a pair of them, and the class


@dataclass(frozen=True)
class Benchmark:
    """What the sequences of a task are."""

    alphabet: int  # different tokens, without the special ones
    classes: int
    length: int  # of grey values, or of tokens with <eos>
    sizes: tuple[int, int, int]  # published numbers of samples
    pixels: bool = False
    pairs: bool = False
    hidden: float = 0.5  # published share of positions that self-pretraining hides
    grey_classes: bool = False  # whether it then asks for one of 256 grey values, or for the value

    @property
    def vocabulary(self) -> int:
        return FIRST + self.alphabet


BENCHMARKS = {
    "listops": Benchmark(len(VOCABULARY), 10, 2000, (96_000, 2_000, 2_000), hidden=0.1),
    "text": Benchmark(256, 2, 4096, (25_000, 25_000, 25_000), hidden=0.15),
    "retrieval": Benchmark(256, 2, 4000, (147_086, 18_090, 17_437), pairs=True, hidden=0.15),
    "image": Benchmark(256, 10, 1024, (45_000, 5_000, 10_000), pixels=True),
    "pathfinder": Benchmark(256, 2, 32**2, (160_000, 20_000, 20_000), pixels=True, grey_classes=True),
    "pathx": Benchmark(256, 2, 128**2, (160_000, 20_000, 20_000), pixels=True, grey_classes=True),
    "pathx256": Benchmark(256, 2, 256**2, (160_000, 20_000, 20_000), pixels=True, grey_classes=True),
}


@dataclass(frozen=True, kw_only=True)
class LongRangeConfig:
    length: int = 0  # of tokens with <eos>; 0: the task's. Drawn expressions have at least a quarter of it
    train: int = 0  # samples that are drawn, or used at most; 0: as many as published, or as there are
    validation: int = 0
    test: int = 0
    seed: int = 0  # of what is drawn or split

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name in ("length", "train", "validation", "test"):
            if getattr(self, name) < 0:
                raise TersorError(f"data.{name} is {getattr(self, name)}; 0 or more is expected")


class Raw:
    """Sequences as the task gives them: `read(i)` is one (pairs: two) uint8 array, or tokens' numbers, and its class."""

    def __init__(self, size: int, read: Callable[[int], Sample], *, keep: bool = False):
        self.size, self._read = size, read
        self._kept: dict[int, Sample] | None = {} if keep else None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(index)
        if self._kept is None:
            return self._read(index)
        if index not in self._kept:
            self._kept[index] = self._read(index)
        return self._kept[index]


@dataclass(frozen=True)
class RawSets:
    train: Raw
    validation: Raw
    test: Raw


class LongRange(Dataset[dict[str, Tensor]]):
    """Items {name: sequence, "lengths": (), "target": ()}; of pairs, sequence (2, L) and lengths (2,).

    form: "tokens" (L,) int64; "numbers" (L, 1) in [-1, 1], of grey values; "one-hot" (L, vocabulary) float32.
    """

    def __init__(self, raw: Raw, benchmark: Benchmark, *, form: str, name: str, length: int = 0) -> None:
        self.raw, self.benchmark, self.form, self.name = raw, benchmark, form, name
        self.length = sequence_length(benchmark, form, length)

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sequences, target = self.raw[index]
        if self.form == "numbers":
            made = [(torch.from_numpy(each.astype(np.float32)) / 255 * 2 - 1)[:, None] for each in sequences]
            lengths = [self.length] * len(made)
        else:
            cut = [torch.from_numpy(each[: self.length - 1].astype(np.int64)) + FIRST for each in sequences]
            lengths = [len(each) + 1 for each in cut]
            made = [
                F.pad(F.pad(each, (0, 1), value=EOS), (0, self.length - len(each) - 1), value=PADDING) for each in cut
            ]
            if self.form == "one-hot":
                made = [F.one_hot(each, self.benchmark.vocabulary).float() for each in made]
        if self.benchmark.pairs:
            return {self.name: torch.stack(made), "lengths": torch.tensor(lengths), "target": torch.tensor(target)}
        return {self.name: made[0], "lengths": torch.tensor(lengths[0]), "target": torch.tensor(target)}


class Members(Dataset[dict[str, Tensor]]):
    """Pairs one sequence after the other: items {name: (L,)}."""

    def __init__(self, pairs: LongRange) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return 2 * len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {self.pairs.name: self.pairs[index // 2][self.pairs.name][index % 2]}


def sequence_length(benchmark: Benchmark, form: str, length: int = 0) -> int:
    """Of the sequences that a model sees; `length` as in LongRangeConfig. Grey values as tokens have <eos> behind them."""
    if benchmark.pixels:
        if length:
            raise TersorError(
                f"pictures of {benchmark.length} pixels are not cut to data.length {length}; leave it out"
            )
        return benchmark.length + (form != "numbers")
    return length or benchmark.length


def find_benchmark(task: str) -> Benchmark:
    if task not in BENCHMARKS:
        raise TersorError(f"the Long Range Arena has the tasks {', '.join(BENCHMARKS)}, not {task!r}")
    return BENCHMARKS[task]


def load_long_range(task: str, path: Path | None, config: LongRangeConfig | None = None) -> RawSets:
    """The task's three sets, from the user's folder or file, or drawn where `path` is None and the task can be.

    Raises TersorError where the task's data cannot be drawn, or are not at `path`.
    """
    find_benchmark(task)
    config = config or LongRangeConfig()
    if path is None:
        if task not in _DRAWN:
            needs = "listops, pathfinder and pathx are drawn"
            raise TersorError(f"lra/{task} needs --data, {_FROM[task]}; only {needs}")
        return _DRAWN[task](config)
    with readable(path):
        if not path.exists():
            raise TersorError(f"there are no data at {path}; lra/{task} reads {_FROM[task]}")
    found = _READ[task](path, config)
    wanted = (config.train, config.validation, config.test)
    parts = zip((found.train, found.validation, found.test), wanted, strict=True)
    return RawSets(*(_first(part, count) if count else part for part, count in parts))


# -- drawn -------------------------------------------------------------------------------------------------------------


def _draw_listops(config: LongRangeConfig) -> RawSets:
    """One run of the generator: no expression is in two sets."""
    counts = _counts("listops", config)
    length = config.length or BENCHMARKS["listops"].length
    drawn = expressions(sum(counts), min_length=length // 4, max_length=length, seed=config.seed)
    return _cut([_expression(tokens) for tokens in drawn], counts)


def _expression(tokens: Sequence[str]) -> Sample:
    return (np.array([VOCABULARY[token] - 1 for token in tokens], np.uint8),), evaluate(tokens)


def _draw_pathfinder(task: str, config: LongRangeConfig) -> RawSets:
    train, validation, test = _counts(task, config)
    begins = (0, train, train + validation)
    counts = (train, validation, test)
    return RawSets(*(_drawn(task, config.seed, *each) for each in zip(begins, counts, strict=True)))


def _drawn(task: str, seed: int, begin: int, count: int) -> Raw:
    """Pictures that are drawn when they are asked for, and kept in memory."""
    settings = pathfinder_config(round(BENCHMARKS[task].length ** 0.5))

    def read(index: int) -> Sample:
        picture, connected = draw_pathfinder(settings, seed=mixed_seed(seed, begin + index))
        return (picture.reshape(-1),), int(connected)

    return Raw(count, read, keep=True)


def _counts(task: str, config: LongRangeConfig) -> tuple[int, int, int]:
    published = BENCHMARKS[task].sizes
    return config.train or published[0], config.validation or published[1], config.test or published[2]


# -- the user's files --------------------------------------------------------------------------------------------------


def _read_listops(path: Path, config: LongRangeConfig) -> RawSets:
    def rows(part: str) -> Raw:
        file = path / f"basic_{part}.tsv"
        lines = _lines(file)
        samples: list[Sample] = []
        for number, line in enumerate(lines[1:], 2):  # the first has the columns' names
            source, tab, target = line.partition("\t")
            try:
                tokens = np.array([VOCABULARY[token] - 1 for token in parse(source)], np.uint8)
                samples.append(((tokens,), int(target)))
            except (KeyError, ValueError):
                raise TersorError(f"{file}, line {number}: an expression, a tab and its value are expected") from None
            if not tab or not 0 <= samples[-1][1] < 10:
                raise TersorError(f"{file}, line {number}: the value is {target!r}, a digit is expected")
        return _whole(samples, file)

    return RawSets(rows("train"), rows("val"), rows("test"))


def _read_text(path: Path, config: LongRangeConfig) -> RawSets:
    """The test set validates too, as published."""
    train, test = (_review_folder(path / part, config.seed) for part in ("train", "test"))
    return RawSets(train, test, test)


def _review_folder(folder: Path, seed: int) -> Raw:
    """CLASS/*.txt, neg as class 0 and pos as 1, in a fixed random order, so that a part of it has both classes."""
    with readable(folder):
        files = [(file, n) for n, name in enumerate(("neg", "pos")) for file in sorted((folder / name).glob("*.txt"))]
    if len({label for _, label in files}) < 2:
        raise TersorError(f"{folder} holds no two classes of texts: neg/*.txt and pos/*.txt are expected")
    order = np.random.default_rng(seed).permutation(len(files))

    def read(index: int) -> Sample:
        file, label = files[order[index]]
        return (np.frombuffer(read_bytes(file), np.uint8),), label

    return Raw(len(files), read)


def _read_retrieval(path: Path, config: LongRangeConfig) -> RawSets:
    return RawSets(*(_pairs(path, part) for part in ("train", "eval", "test")))


def _pairs(folder: Path, part: str) -> Raw:
    """Lines `label, id, id, text, text` with tabs between, no header and no quoting."""
    with readable(folder):
        files = sorted(folder.glob(f"*.{part}.tsv"))
    if len(files) != 1:
        raise TersorError(f"{folder} holds {len(files)} files *.{part}.tsv; one is expected")
    samples: list[Sample] = []
    for number, line in enumerate(_lines(files[0]), 1):
        row = line.split("\t")
        if len(row) != 5 or row[0] not in ("0", "1", "0.0", "1.0"):
            raise TersorError(f"{files[0]}, line {number}: label (0 or 1), two names and two texts are expected")
        texts = tuple(np.frombuffer(text.encode(), np.uint8) for text in row[3:])
        samples.append((texts, int(float(row[0]))))
    return _whole(samples, files[0])


def _read_image(path: Path, config: LongRangeConfig) -> RawSets:
    train_file, test_file = (_either(path / part, path / f"{part}.npz") for part in ("train", "test"))
    if train_file and test_file:
        train, validation = _shares(_shuffled(_pictures(train_file), config.seed), (9, 1))
        test = _pictures(test_file)
        return RawSets(train, validation, test)
    return RawSets(*_shares(_shuffled(_pictures(path), config.seed), (8, 1, 1)))


def _either(*paths: Path) -> Path | None:
    return next((path for path in paths if path.exists()), None)


def _pictures(path: Path) -> Raw:
    images = load_images(path, ImageConfig(size=32))
    if len(images.classes) > BENCHMARKS["image"].classes:
        raise TersorError(f"{path} has {len(images.classes)} classes; lra/image has {BENCHMARKS['image'].classes}")

    def read(index: int) -> Sample:
        grey = np.array(open_image(images.encoded[index]).convert("L"), np.uint8)
        if grey.shape != (32, 32):
            raise TersorError(f"lra/image has pictures of 32 x 32 pixels; {path} holds one of {grey.shape[::-1]}")
        return (grey.reshape(-1),), images.labels[index]

    return Raw(len(images), read)


def _read_pathfinder(task: str, path: Path, config: LongRangeConfig) -> RawSets:
    """The hard set of an official folder, in its metadata's order."""
    hard = next((each for each in (path / "curv_contour_length_14", path) if (each / "metadata").is_dir()), None)
    if hard is None:
        raise TersorError(f"{path} holds no curv_contour_length_14/metadata")
    tables = sorted((hard / "metadata").glob("*.npy"), key=lambda each: (len(each.stem), each.stem))
    rows = [line.split() for table in tables for line in _lines(table)]
    side = round(BENCHMARKS[task].length ** 0.5)
    files = [(inside(hard, f"{row[0]}/{row[1]}"), row[3]) for row in rows if len(row) > 3]
    if not files or len(files) != len(rows) or any(label not in ("0", "1") for _, label in files):
        raise TersorError(f"{hard / 'metadata'}: lines with folder, file, a number and the label 0 or 1 are expected")

    def read(index: int) -> Sample:
        file, label = files[index]
        grey = np.array(open_image(file).convert("L"), np.uint8)
        if grey.shape != (side, side):
            raise TersorError(f"lra/{task} has pictures of {side} x {side} pixels; {file} has {grey.shape[::-1]}")
        return (grey.reshape(-1),), int(label)

    kept = [index for index, (file, _) in enumerate(files) if file.is_file() and file.stat().st_size]  # one is empty
    return RawSets(*_shares(Raw(len(kept), lambda index: read(kept[index])), (8, 1, 1)))


def _lines(file: Path) -> list[str]:
    with readable(file):
        if not file.is_file():
            raise TersorError(f"there is no file {file}")
    return read_bytes(file, most=SET_BYTES).decode("utf-8", errors="replace").rstrip("\n").split("\n")


# -- parts of sets -----------------------------------------------------------------------------------------------------


def _whole(samples: Sequence[Sample], file: Path) -> Raw:
    if not samples:
        raise TersorError(f"{file} holds no samples")
    return Raw(len(samples), samples.__getitem__)


def _cut(samples: list[Sample], counts: tuple[int, int, int]) -> RawSets:
    ends = np.cumsum(counts).tolist()
    parts = (samples[end - count : end] for end, count in zip(ends, counts, strict=True))
    return RawSets(*(Raw(len(part), part.__getitem__) for part in parts))


def _first(raw: Raw, count: int) -> Raw:
    return Raw(min(count, len(raw)), raw.__getitem__)


def _shuffled(raw: Raw, seed: int) -> Raw:
    order = np.random.default_rng(seed).permutation(len(raw)).tolist()
    return Raw(len(raw), lambda index: raw[order[index]])


def _shares(raw: Raw, shares: tuple[int, ...]) -> list[Raw]:
    """Consecutive parts. Raises TersorError where one would be empty."""
    ends = [len(raw) * each // sum(shares) for each in np.cumsum(shares).tolist()]
    begins = [0, *ends[:-1]]
    if any(begin == end for begin, end in zip(begins, ends, strict=True)):
        raise TersorError(f"{len(raw)} samples are too few for {len(shares)} sets")
    return [_part(raw, begin, end) for begin, end in zip(begins, ends, strict=True)]


def _part(raw: Raw, begin: int, end: int) -> Raw:
    return Raw(end - begin, lambda index: raw[begin + index])


_PATHFINDERS = ("pathfinder", "pathx", "pathx256")


_DRAWN: dict[str, Callable[[LongRangeConfig], RawSets]] = {
    "listops": _draw_listops,
    **{task: partial(_draw_pathfinder, task) for task in _PATHFINDERS},
}
_READ: dict[str, Callable[[Path, LongRangeConfig], RawSets]] = {
    "listops": _read_listops,
    "text": _read_text,
    "retrieval": _read_retrieval,
    "image": _read_image,
    **{task: partial(_read_pathfinder, task) for task in _PATHFINDERS},
}
_FROM = {
    "listops": "a folder with basic_train.tsv, basic_val.tsv and basic_test.tsv",
    "text": "the folder aclImdb, with train/neg, train/pos, test/neg and test/pos",
    "retrieval": "a folder with *.train.tsv, *.eval.tsv and *.test.tsv",
    "image": "a folder with one subfolder a class, or a packed .npz",
    **dict.fromkeys(_PATHFINDERS, "an official pathfinder folder"),
}
