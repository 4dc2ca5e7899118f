"""Segmentation: from pictures and masks in a folder to the classes of a new picture's pixels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import tersor.models
from tersor.data.masks import MaskConfig, load_masks, scaled
from tersor.errors import TersorError
from tersor.tasks.predict import open_predictor
from tersor.tasks.segment import colour, winners

pillow = pytest.importorskip("PIL.Image", reason="reading images needs Pillow")


def write_pair(folder: Path, name: str, *, left: int, height: int = 32, width: int = 48) -> None:
    """A blue picture whose `left` first columns are red, and its mask: 0 blue, 1 red, and no class between."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 2], picture[:, :left] = 220, (220, 0, 0)
    mask = np.zeros((height, width), np.uint8)
    mask[:, :left], mask[:, left : left + 1] = 1, 255
    pillow.fromarray(picture).save(folder / "images" / f"{name}.png")
    pillow.fromarray(mask).save(folder / "masks" / f"{name}.png")


def test_a_square_and_its_mask_are_cut_and_mirrored_together(tmp_path: Path) -> None:
    write_pair(tmp_path, "a", left=20)
    config = MaskConfig(size=32, mean=(0, 0, 0), std=(1, 1, 1))
    data = load_masks(tmp_path, config, classes=2)
    seen = set()
    for epoch in range(8):
        data.set_epoch(epoch)
        image, target = data[0]["image"], data[0]["target"]
        assert torch.equal(data[0]["target"], target)
        assert torch.equal(image[0][target != 255] > 0.5, target[target != 255] == 1)
        seen.add(tuple(target[0].tolist()))
    assert len(seen) > 4
    middle = load_masks(tmp_path, config, classes=2, chance=False)[0]["target"]
    assert (middle[0] == 1).sum() == 12  # columns 8 to 40 of 48


def test_what_is_wrong_with_masks_is_said(tmp_path: Path) -> None:
    write_pair(tmp_path, "a", left=20)
    with pytest.raises(
        TersorError, match=r"holds the class 1, the model has num_classes 1; --set model\.num_classes=2"
    ):
        load_masks(tmp_path, MaskConfig(size=32), classes=1)[0]
    with pytest.raises(TersorError, match="255 classes at most; the model has 300"):
        load_masks(tmp_path, MaskConfig(size=32), classes=300)
    pillow.new("RGB", (48, 32)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(TersorError, match="a mask has one channel"):
        load_masks(tmp_path, MaskConfig(size=32), classes=2)[0]
    pillow.new("L", (40, 32)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(TersorError, match="has 40 x 32 pixels, its picture 48 x 32"):
        load_masks(tmp_path, MaskConfig(size=32), classes=2)[0]
    (tmp_path / "masks" / "a.png").unlink()
    with pytest.raises(TersorError, match="has no mask: there is no"):
        load_masks(tmp_path, MaskConfig(size=32), classes=2)
    with pytest.raises(TersorError, match="is no folder with pictures"):
        load_masks(tmp_path / "images", MaskConfig(size=32), classes=2)


def test_the_numbers_of_a_palette_are_the_classes(tmp_path: Path) -> None:
    write_pair(tmp_path, "a", left=20)
    numbers = np.asarray(pillow.open(tmp_path / "masks" / "a.png"))
    coloured = pillow.fromarray(numbers).convert("P")
    coloured.putdata(numbers.flatten().tolist())
    coloured.putpalette([7, 7, 7, 200, 10, 10] + [90] * 762)
    expected = load_masks(tmp_path, MaskConfig(size=32), classes=2)[0]["target"]
    coloured.save(tmp_path / "masks" / "a.png")
    assert pillow.open(tmp_path / "masks" / "a.png").mode == "P"
    assert torch.equal(load_masks(tmp_path, MaskConfig(size=32), classes=2)[0]["target"], expected)


def test_enlarging_winners_alone_gives_what_enlarging_all_gives() -> None:
    torch.manual_seed(0)
    logits = F.interpolate(torch.randn(1, 5, 4, 6), (16, 24), mode="bicubic")
    at_once = F.interpolate(logits, (50, 70), mode="bilinear").argmax(1)[0]
    assert np.array_equal(winners(logits, (50, 70)), at_once.numpy())
    classes = torch.tensor([[[0, 300]]], dtype=torch.int32)
    assert winners(classes, (2, 4)).tolist() == [[0, 0, 300, 300]] * 2
    assert winners(classes, (2, 4)).dtype == np.uint16
    with pytest.raises(TersorError, match="neither logits"):
        winners(torch.zeros(1, 5), (2, 4))


def test_the_network_sees_the_shorter_side_at_its_size_unless_the_other_were_too_long() -> None:
    assert scaled(4000, 3000, 512) == (683, 512)
    assert scaled(100, 9000, 512) == (23, 2048)
    assert len({colour(number) for number in range(200)}) == 200


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tersor.cli.main import main
    from tersor.models import find

    folder = tmp_path_factory.mktemp("segment")
    for number in range(120):
        write_pair(folder / "data", str(number), left=4 + number % 40)
    small = find("pp_mobileseg").small | {"num_classes": 2}
    sizes = [text for name, value in small.items() for text in ("--set", f"model.{name}={json.dumps(value)}")]
    data = str(folder / "data")
    with pytest.raises(SystemExit) as ended:
        main(
            [
                *("train", "pp_mobileseg", "--data", data, "--out", str(folder / "run")),
                *("--device", "cpu", "--epochs", "4", "--batch-size", "8", "--lr", "0.01", *sizes),
                *("--set", "data.size=32"),
            ]
        )
    assert ended.value.code == 0
    return folder


def test_the_training_leaves_a_sheet_of_the_classes(trained: Path) -> None:
    sheet = np.asarray(pillow.open(trained / "run" / "samples.png"))
    assert sheet.shape == (8 * 200 + 24, 3 * 200 + 8, 3)
    tiles = [slice(24 + 200 * row, 216 + 200 * row) for row in range(8)]
    truth, found = (
        np.concatenate([sheet[rows, left : left + 192] for rows in tiles]).reshape(-1, 3) for left in (208, 408)
    )
    assert {tuple(each) for each in truth.tolist()} == {colour(0), colour(1), (255, 255, 255)}
    assert (truth == found).all(1).mean() > 0.8


def test_a_trained_model_finds_the_red_half(trained: Path, tmp_path: Path, tersor_command: Callable[..., Any]) -> None:
    write_pair(tmp_path, "new", left=60, height=64, width=120)
    photo, out = tmp_path / "images" / "new.png", tmp_path / "out"
    ran = tersor_command("predict", trained / "run", photo, "--out", out, "--json")
    assert ran.status == 0, ran.err
    (found,) = json.loads(ran.out)
    assert sorted(found["numbers"]) == [0, 1]
    assert sum(found["shares"]) == pytest.approx(1)
    assert found["shares"] == sorted(found["shares"], reverse=True)
    mask = np.asarray(pillow.open(found["mask"]))
    assert mask.shape == (64, 120)
    assert mask.dtype == np.uint8
    assert mask[:, :40].mean() > 0.9
    assert mask[:, 80:].mean() < 0.1
    overlay = np.asarray(pillow.open(found["overlay"]))
    colours = np.array([colour(0), colour(1)])[mask]
    assert np.array_equal(overlay, np.asarray(pillow.open(photo)) // 2 + colours // 2)
    ran = tersor_command("predict", trained / "run", photo, "--out", out)
    assert ran.status == 2
    assert "new_mask.png exists; give another --out, or --overwrite to replace it" in ran.err
    line = tersor_command("predict", trained / "run", photo, "--out", out, "--overwrite").out
    assert line.startswith(f"{photo}: class ")
    assert line.endswith(f"%; {out / 'new_mask.png'}, {out / 'new_overlay.png'}\n")


def test_what_cannot_be_done_is_said_in_a_line(
    trained: Path, tmp_path: Path, tersor_command: Callable[..., Any]
) -> None:
    images = trained / "data" / "images"
    for arguments, said in (
        ((trained / "run", images), "--out DIR says where"),
        ((trained / "run", images, "--out", tmp_path, "--reference", images), "compares nothing with a reference"),
    ):
        ran = tersor_command("predict", *arguments)
        assert ran.status == 2
        assert said in ran.err
        assert ran.err.count("\n") == 1


def test_an_official_checkpoint_gets_its_settings_from_the_task(tmp_path: Path) -> None:
    torch.save(tersor.models.create("pp_mobileseg_tiny").state_dict(), tmp_path / "tiny.pth")
    predictor = open_predictor("pp_mobileseg_tiny", checkpoint=tmp_path / "tiny.pth", device="cpu", out=tmp_path)
    assert predictor.settings["size"] == 512
    assert predictor.settings["mean"] == (0.485, 0.456, 0.406)
