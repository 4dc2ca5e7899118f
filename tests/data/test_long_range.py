"""The Long Range Arena's data: drawn, or from the user's files, in the form that a model takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tersor.data.listops import VOCABULARY, evaluate
from tersor.data.long_range import BENCHMARKS, LongRange, LongRangeConfig, Members, Raw, load_long_range
from tersor.errors import TersorError

FEW = LongRangeConfig(train=6, validation=3, test=2)
WORDS = {number - 1: word for word, number in VOCABULARY.items()}


def test_listops_sets_are_drawn_without_repetition_and_with_their_values() -> None:
    sets = load_long_range("listops", None, LongRangeConfig(length=80, train=30, validation=10, test=5))
    assert [len(part) for part in (sets.train, sets.validation, sets.test)] == [30, 10, 5]
    seen = set()
    for part in (sets.train, sets.validation, sets.test):
        for (tokens,), value in (part[index] for index in range(len(part))):
            assert 20 < len(tokens) < 80
            assert evaluate([WORDS[token] for token in tokens.tolist()]) == value
            seen.add(tokens.tobytes())
    assert len(seen) == 45


def test_tokens_end_with_eos_and_are_padded() -> None:
    raw = Raw(1, [((np.array([0, 14, 3], np.uint8),), 7)].__getitem__)
    item = LongRange(raw, BENCHMARKS["listops"], form="tokens", name="input_ids", length=6)[0]
    assert item["input_ids"].tolist() == [3, 17, 6, 2, 1, 1]
    assert (item["lengths"], item["target"]) == (4, 7)
    cut = LongRange(raw, BENCHMARKS["listops"], form="one-hot", name="x", length=3)[0]
    assert cut["x"].shape == (3, 18)
    assert cut["x"].argmax(-1).tolist() == [3, 17, 2]


def test_grey_values_are_numbers_from_minus_one_to_one_or_tokens() -> None:
    grey = np.arange(1024).astype(np.uint8)
    raw = Raw(1, [((grey,), 1)].__getitem__)
    numbers = LongRange(raw, BENCHMARKS["image"], form="numbers", name="x")[0]
    assert numbers["x"].shape == (1024, 1)
    assert (numbers["x"].min(), numbers["x"].max(), numbers["lengths"]) == (-1, 1, 1024)
    tokens = LongRange(raw, BENCHMARKS["image"], form="tokens", name="input_ids")[0]
    assert tokens["input_ids"].shape == (1025,)
    assert tokens["input_ids"][[0, 255, 1024]].tolist() == [3, 258, 2]
    with pytest.raises(TersorError, match=r"1024 pixels are not cut to data\.length 9"):
        LongRange(raw, BENCHMARKS["image"], form="numbers", name="x", length=9)


def test_pairs_are_stacked_and_can_be_taken_apart() -> None:
    pair = (np.array([65], np.uint8), np.array([66, 67], np.uint8))
    data = LongRange(Raw(1, [(pair, 1)].__getitem__), BENCHMARKS["retrieval"], form="tokens", name="x", length=4)
    assert data[0]["x"].tolist() == [[68, 2, 1, 1], [69, 70, 2, 1]]
    assert data[0]["lengths"].tolist() == [2, 3]
    alone = Members(data)
    assert len(alone) == 2
    assert torch.equal(alone[1]["x"], data[0]["x"][1])


def test_pathfinder_pictures_are_drawn_once_and_differ_between_the_sets() -> None:
    sets = load_long_range("pathfinder", None, LongRangeConfig(train=1, validation=1, test=1))
    first = sets.train[0]
    assert first[0][0].shape == (1024,)
    assert sets.train[0] is first
    assert not np.array_equal(sets.validation[0][0][0], first[0][0])


def test_published_listops_files_are_read(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        (tmp_path / f"basic_{part}.tsv").write_text("Source\tTarget\n( ( ( [MAX 4 ) 7 ) ] )\t7\n")
    sets = load_long_range("listops", tmp_path)
    assert sets.test[0][0][0].tolist() == [VOCABULARY[word] - 1 for word in ("[MAX", "4", "7", "X")]
    assert sets.test[0][1] == 7
    (tmp_path / "basic_val.tsv").write_text("Source\tTarget\n[MOD 4 ]\t7\n")
    with pytest.raises(TersorError, match=r"basic_val\.tsv, line 2: an expression"):
        load_long_range("listops", tmp_path)


def test_film_reviews_are_read_and_the_test_set_validates(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("neg", "pos"):
            (tmp_path / part / name).mkdir(parents=True)
            for n in range(4):
                (tmp_path / part / name / f"{n}.txt").write_text(f"{part} {name} é")
    sets = load_long_range("text", tmp_path, FEW)
    assert (len(sets.train), len(sets.validation), len(sets.test)) == (6, 3, 2)
    for index in range(6):
        (content,), label = sets.train[index]
        assert bytes(content).decode() == f"train {('neg', 'pos')[label]} é"
    assert {sets.train[index][1] for index in range(6)} == {0, 1}
    assert bytes(sets.validation[0][0][0]).startswith(b"test")
    with pytest.raises(TersorError, match="no two classes of texts"):
        load_long_range("text", tmp_path / "train")


def test_pairs_of_papers_are_read(tmp_path: Path) -> None:
    for part in ("train", "eval", "test"):
        (tmp_path / f"new_aan_pairs.{part}.tsv").write_text('1.0\ta\tb\tone "text\tanother\n0.0\ta\tc\tone\tx\n')
    sets = load_long_range("retrieval", tmp_path)
    assert (len(sets.train), sets.train[1][1]) == (2, 0)
    assert [bytes(each) for each in sets.train[0][0]] == [b'one "text', b"another"]
    (tmp_path / "new_aan_pairs.eval.tsv").write_text("2\ta\tb\tc\td\n")
    with pytest.raises(TersorError, match=r"eval\.tsv, line 1: label"):
        load_long_range("retrieval", tmp_path)


def test_cifar10_is_split_and_made_grey(data: Path) -> None:
    sets = load_long_range("image", data / "images" / "cifar10_test_1000.npz")
    assert [len(part) for part in (sets.train, sets.validation, sets.test)] == [800, 100, 100]
    pixels, label = sets.train[0]
    assert pixels[0].shape == (1024,)
    assert pixels[0].dtype == np.uint8
    assert 0 <= label < 10
    assert {sets.validation[index][1] for index in range(100)} == set(range(10))


def test_a_folder_with_a_test_set_keeps_it(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image", reason="reading images needs Pillow")
    for part, count in (("train", 10), ("test", 3)):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for n in range(count):
                pillow.fromarray(np.full((32, 32, 3), n, np.uint8)).save(tmp_path / part / name / f"{n}.png")
    sets = load_long_range("image", tmp_path)
    assert [len(part) for part in (sets.train, sets.validation, sets.test)] == [18, 2, 6]
    pillow.fromarray(np.zeros((16, 32, 3), np.uint8)).save(tmp_path / "test" / "a" / "0.png")
    with pytest.raises(TersorError, match="pictures of 32 x 32 pixels"):
        load_long_range("image", tmp_path).test[0]


def test_official_pathfinder_folders_are_read_in_their_order(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image", reason="reading images needs Pillow")
    hard = tmp_path / "curv_contour_length_14"
    (hard / "metadata").mkdir(parents=True)
    for folder in (0, 2, 10):
        (hard / "imgs" / str(folder)).mkdir(parents=True)
        rows = []
        for n in range(4):
            pillow.fromarray(np.full((32, 32), 10 * folder + n, np.uint8)).save(hard / f"imgs/{folder}/sample_{n}.png")
            rows.append(f"imgs/{folder} sample_{n}.png {n} {n % 2} 0.5 1")
        (hard / "metadata" / f"{folder}.npy").write_text("\n".join(rows) + "\n")
    (hard / "imgs/0/sample_1.png").write_bytes(b"")  # one such file is in the published folder
    sets = load_long_range("pathfinder", tmp_path)
    parts = (sets.train, sets.validation, sets.test)
    assert [len(part) for part in parts] == [8, 1, 2]
    order = [int(part[index][0][0][0]) for part in parts for index in range(len(part))]
    assert order == [0, 2, 3, 20, 21, 22, 23, 100, 101, 102, 103]
    assert [sets.train[index][1] for index in range(3)] == [0, 0, 1]
    (hard / "metadata" / "0.npy").write_text("../../etc passwd 0 1\n")
    with pytest.raises(TersorError, match="lies outside"):
        load_long_range("pathfinder", tmp_path)


@pytest.mark.parametrize(
    ("task", "path", "said"),
    [
        ("text", None, "lra/text needs --data, the folder aclImdb"),
        ("sorting", None, "has the tasks listops, text, .*, not 'sorting'"),
        ("listops", "nowhere", "no data at nowhere; lra/listops reads a folder with basic_train"),
    ],
)
def test_missing_data_are_asked_for(task: str, path: str | None, said: str) -> None:
    with pytest.raises(TersorError, match=said):
        load_long_range(task, None if path is None else Path(path))


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(TersorError, match=r"data\.test is -1"):
        LongRangeConfig(test=-1)
