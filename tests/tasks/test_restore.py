"""Super-resolution: tiles without seams, and from pictures in a folder to an enlarged one that was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tersor.models
from tersor.data.pictures import PictureConfig, load_pictures
from tersor.errors import TersorError
from tersor.evaluate.fidelity import fidelity
from tersor.tasks.tiles import OVERLAP, TILE, in_tiles, spans

pillow = pytest.importorskip("PIL.Image", reason="reading images needs Pillow")
SMALL = {
    "dim": 12,
    "groups": 1,
    "blocks": 1,
    "window_size": 3,
    "idynamic_num_heads": 4,
    "restormer_num_heads": 2,
    "tlc_kernel": 8,
    "buildblock_type": "sparseedge",
    "upsampler": "pixelshuffledirect",
    "upscale": 2,
}


def photo(height: int, width: int, seed: int = 0) -> Any:
    """Smooth shapes and a little noise (H, W, 3)."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width][..., None] / 9
    waves = np.sin(x * random.uniform(0.5, 1.5, 3) + y * random.uniform(0.5, 1.5, 3))
    return (128 + 90 * waves + random.normal(0, 8, waves.shape)).clip(0, 255).astype(np.uint8)


def whole(network: Callable[[Tensor], Tensor], picture: Any) -> Any:
    made = network(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255)[0]
    return (made.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def difference(a: Any, b: Any) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize("length", [1, 40, TILE, TILE + 1, 449, 1000])
def test_the_tiles_of_a_side_add_up_to_one_everywhere(length: int) -> None:
    total = torch.zeros(length)
    for span in spans(length):
        assert span.end - span.begin <= TILE
        total[span.begin : span.end] += span.weights
    torch.testing.assert_close(total, torch.ones(length))


@torch.no_grad()
def test_a_convolutional_network_gives_the_same_in_tiles() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 5, padding=2), nn.GELU(), nn.Conv2d(8, 12, 7, padding=3), nn.PixelShuffle(2)]
    network = nn.Sequential(*layers)
    for size, tiles in (((300, 470), 6), ((TILE + 1, 20), 2)):
        told: list[tuple[int, int]] = []
        made = in_tiles(network, photo(*size), progress=lambda *how_far, told=told: told.append(how_far))
        assert difference(made, whole(network, photo(*size))) <= 1
        assert told == [(done, tiles) for done in range(1, tiles + 1)]


@torch.no_grad()
def test_a_network_that_sees_the_whole_tile_leaves_no_seams() -> None:
    """A tile's own brightness moves the result slowly from one tile to the next, never from one pixel to the next."""
    flat = np.zeros((TILE + 100, 24, 3), np.uint8)
    flat[TILE:] = 255

    def network(pixels: Tensor) -> Tensor:
        return torch.ones_like(pixels) * pixels.mean()

    made = in_tiles(network, flat).astype(int)[:, 0, 0]
    assert made[0] == 0
    assert made[-1] > 100
    assert np.diff(made).max() <= made[-1] // (OVERLAP // 3)


@torch.no_grad()
def test_rgt_gives_the_same_in_tiles_within_a_grey_level() -> None:
    torch.manual_seed(0)
    from tersor.models import find

    network = tersor.models.create("rgt", **find("rgt").small).eval()
    picture = photo(48, 272)
    assert difference(in_tiles(network, picture), whole(network, picture)) <= 1


def test_a_result_larger_than_can_be_written_is_refused() -> None:
    def network(pixels: Tensor) -> Tensor:
        return pixels.expand(1, 3, *pixels.shape[2:]).repeat_interleave(16, 2).repeat_interleave(16, 3)

    with pytest.raises(TersorError, match="16 times 1100 x 1000 pixels are more than"):
        in_tiles(network, np.zeros((1000, 1100, 3), np.uint8))


def test_psnr_and_ssim_are_those_of_their_formulas() -> None:
    """Against the formula spelled out at one window; a constant difference d of grey has a PSNR in closed form."""
    grey = np.full((300, 40, 3), 100, np.uint8)
    found = fidelity(grey + np.uint8(10), grey, border=2)
    d = 10 * 219 / 255
    assert found.psnr == pytest.approx(10 * np.log10(255**2 / d**2))
    m = 16 + 100 * 219 / 255
    c1 = (0.01 * 255) ** 2
    assert found.ssim == pytest.approx((2 * m * (m + d) + c1) / (m**2 + (m + d) ** 2 + c1))

    a, b = photo(11, 11, 1), photo(11, 11, 2)
    y, y0 = (16 + each.astype(float) @ np.array([65.481, 128.553, 24.966]) / 255 for each in (a, b))
    w = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    w = np.outer(w, w) / np.outer(w, w).sum()
    m, m0 = (w * y).sum(), (w * y0).sum()
    v, v0, c = (w * (y - m) ** 2).sum(), (w * (y0 - m0) ** 2).sum(), (w * (y - m) * (y0 - m0)).sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = (2 * m * m0 + c1) * (2 * c + c2) / ((m**2 + m0**2 + c1) * (v + v0 + c2))
    assert fidelity(a, b).ssim == pytest.approx(expected)


def test_bands_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = photo(70, 30, 1), photo(70, 30, 2)
    at_once = fidelity(a, b, border=1)
    monkeypatch.setattr("tersor.evaluate.fidelity.BAND", 7)
    in_bands = fidelity(a, b, border=1)
    assert (in_bands.psnr, in_bands.ssim) == pytest.approx((at_once.psnr, at_once.ssim), rel=1e-12)


def test_crops_depend_on_epoch_and_index_alone_and_the_small_one_goes_with_the_large(tmp_path: Path) -> None:
    pillow.fromarray(photo(50, 60)).save(tmp_path / "a.png")
    data = load_pictures(tmp_path, PictureConfig(size=8, crops=5), scale=3)
    assert len(data) == 5
    first = [data[n]["target"] for n in range(5)]
    assert first[0].shape == (3, 24, 24)
    assert torch.equal(data[3]["target"], first[3])
    assert not torch.equal(first[0], first[1])
    torch.testing.assert_close(data[2]["image"].mean(), first[2].mean(), atol=0.02, rtol=0)
    data.set_epoch(1)
    assert not torch.equal(data[0]["target"], first[0])
    with pytest.raises(TersorError, match=r"--set data\.size=16"):
        load_pictures(tmp_path, PictureConfig(size=17), scale=3)[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `tersor train`, the pictures it saw, and small copies of two of them."""
    from tersor.cli.main import main

    folder = tmp_path_factory.mktemp("restore")
    for name in ("large", "small"):
        (folder / name).mkdir()
    for number in range(2):
        large = pillow.fromarray(photo(48, 41, number))
        large.save(folder / "large" / f"{number}.png")
        large.crop((0, 0, 40, 48)).resize((20, 24), 3).save(folder / "small" / f"{number}.png")
    sizes = [text for name, value in SMALL.items() for text in ("--set", f"model.{name}={value}")]
    data = str(folder / "large")
    with pytest.raises(SystemExit) as ended:
        main(
            [
                *("train", "dlgsanet", "--data", data, "--validation", data, "--out", str(folder / "run")),
                *("--device", "cpu", "--epochs", "1", "--batch-size", "2", "--lr", "0.003", *sizes),
                *("--set", "data.size=12", "--set", "data.crops=32"),
            ]
        )
    assert ended.value.code == 0
    return folder


def test_the_training_leaves_a_sheet_of_what_it_restores(trained: Path) -> None:
    sheet = np.asarray(pillow.open(trained / "run" / "samples.png")).astype(int)
    assert sheet.shape == (2 * 200 + 24, 3 * 200 + 8, 3)
    small, truth, made = (sheet[24:216, left : left + 192] for left in (8, 208, 408))
    large = np.asarray(pillow.open(trained / "large" / "0.png"))[12:36, 9:33]  # the middle, 24 pixels a side
    assert np.array_equal(truth[::8, ::8], large)
    assert np.array_equal(small[::16, ::16], np.asarray(pillow.fromarray(large).resize((12, 12), 3)))
    assert abs(made - truth).mean() < 40


def test_a_trained_model_enlarges_and_is_measured(
    trained: Path, tmp_path: Path, tersor_command: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    options = ("--out", out, "--reference", trained / "large")
    ran = tersor_command("predict", trained / "run", trained / "small", *options, "--json")
    assert ran.status == 0, ran.err
    first = json.loads(ran.out)[0]
    assert first["out"] == str(out / "0_x2.png")
    assert first["size"] == [40, 48]
    made = np.asarray(pillow.open(out / "0_x2.png"))
    original = np.asarray(pillow.open(trained / "large" / "0.png"))[:, :40]
    assert first["psnr"] == pytest.approx(fidelity(made, original, border=2).psnr)
    assert first["psnr"] > 15  # it has learned: a grey picture has about 12
    again = ("predict", trained / "run", trained / "small" / "1.png", "--out", out)
    assert tersor_command(*again).err.endswith(
        f"{out / '1_x2.png'} exists; give another --out, or --overwrite to replace it\n"
    )
    line = tersor_command(*again, "--overwrite").out
    assert line.endswith("40 x 48\n")


def test_an_official_checkpoint_enlarges_a_photo_held_upright(
    tmp_path: Path, tersor_command: Callable[..., Any]
) -> None:
    torch.manual_seed(0)
    torch.save(tersor.models.create("dlgsanet_tiny_x3").state_dict(), tmp_path / "tiny.pth")
    turned = pillow.Exif()
    turned[0x0112] = 6  # the camera was held on its side
    pillow.fromarray(photo(20, 30)).save(tmp_path / "a.jpg", exif=turned)
    command = ("predict", "dlgsanet_tiny_x3", tmp_path / "a.jpg", "--checkpoint", tmp_path / "tiny.pth")
    ran = tersor_command(*command, "--out", tmp_path / "new" / "folder")
    assert ran.status == 0, ran.err
    assert pillow.open(tmp_path / "new" / "folder" / "a_x3.png").size == (60, 90)


def test_what_cannot_be_done_is_said_in_a_line(
    trained: Path, tmp_path: Path, tersor_command: Callable[..., Any]
) -> None:
    run, small = trained / "run", trained / "small"
    (tmp_path / "a").mkdir()
    for path in (tmp_path / "a" / "0.jpg", tmp_path / "lonely.png"):
        pillow.new("RGB", (20, 24)).save(path)
    out = ("--out", tmp_path / "out")
    for arguments, status, said in (
        ((run, small), 2, "--out DIR says where"),
        ((run, small, *out, "--reference", tmp_path / "none"), 2, "there is no file or folder"),
        ((run, small, *out, "--reference", small / "0.png"), 2, "--reference takes a folder"),
        ((run, small, tmp_path / "a", *out), 2, "have one name, 0"),
        ((run, tmp_path / "lonely.png", *out, "--reference", trained / "large"), 1, "holds 0 files named lonely"),
        ((run, small / "0.png", *out, "--reference", small), 1, "it is no reference for it"),
    ):
        ran = tersor_command("predict", *arguments)
        assert ran.status == status
        assert said in ran.err
        assert ran.err.count("\n") == 3 - status  # what was skipped is counted in a second line
    assert not (tmp_path / "out" / "lonely_x2.png").exists()


def test_a_picture_that_says_it_is_huge_is_skipped(
    trained: Path, tmp_path: Path, tersor_command: Callable[..., Any]
) -> None:
    pillow.new("1", (16000, 8000)).save(tmp_path / "bomb.png")
    ran = tersor_command("predict", trained / "run", tmp_path / "bomb.png", "--out", tmp_path / "out")
    assert ran.status == 1
    assert "16000 x 8000 pixels, which is no photograph" in ran.err
