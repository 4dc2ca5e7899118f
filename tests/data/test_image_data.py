from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tersor.data.images import ImageConfig, load_images
from tersor.errors import TersorError

pillow = pytest.importorskip("PIL.Image", reason="reading images needs Pillow")
PLAIN = ImageConfig(size=8, mean=(0, 0, 0), std=(1, 1, 1))


def png(pixels: Any) -> bytes:
    file = io.BytesIO()
    pillow.fromarray(np.asarray(pixels, np.uint8)).save(file, "PNG")
    return file.getvalue()


def pack(path: Path, images: list[bytes], labels: list[int]) -> Path:
    offsets = np.cumsum([0, *map(len, images)])
    np.savez(path, bytes=np.frombuffer(b"".join(images), np.uint8), offsets=offsets, labels=np.array(labels))
    return path


def test_a_folder_has_one_class_a_subfolder(tmp_path: Path) -> None:
    for name, value in (("dog", 10), ("cat", 200)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(png(np.full((8, 8, 3), value)))
    data = load_images(tmp_path, PLAIN)
    assert data.classes == ("cat", "dog")
    assert [int(data[n]["target"]) for n in range(2)] == [0, 1]
    torch.testing.assert_close(data[0]["image"], torch.full((3, 8, 8), 200 / 255))


def test_a_packed_file_holds_the_same(tmp_path: Path) -> None:
    images = [png(np.full((8, 8, 3), value)) for value in (0, 51, 255)]
    data = load_images(pack(tmp_path / "x.npz", images, [2, 0, 1]), PLAIN)
    assert [int(data[n]["target"]) for n in range(3)] == [2, 0, 1]
    assert data[1]["image"].unique().tolist() == pytest.approx([0.2])


def test_the_shorter_side_is_scaled_and_the_centre_cut(tmp_path: Path) -> None:
    pixels = np.zeros((16, 48, 3))
    pixels[:, 16:32] = 255  # the middle third
    data = load_images(pack(tmp_path / "x.npz", [png(pixels)], [0]), PLAIN)
    image = data[0]["image"]
    assert image.shape == (3, 8, 8)
    assert image[:, :, 1:-1].min() > 0.9


def test_grey_images_become_rgb_and_are_normalised(tmp_path: Path) -> None:
    config = ImageConfig(size=8, mean=(0.5, 0, 0), std=(0.25, 1, 1))
    image = load_images(pack(tmp_path / "x.npz", [png(np.full((8, 8), 255))], [0]), config)[0]["image"]
    assert image[:, 0, 0].tolist() == [2, 1, 1]


def test_augmentation_depends_on_seed_epoch_and_image_alone(tmp_path: Path) -> None:
    noise = png(np.random.default_rng(0).integers(0, 255, (32, 32, 3)))
    path = pack(tmp_path / "x.npz", [noise], [0])
    config = ImageConfig(size=32, augment=True)
    first, second = load_images(path, config), load_images(path, config)
    seen = []
    for epoch in range(4):
        first.set_epoch(epoch)
        second.set_epoch(epoch)
        seen.append(first[0]["image"])
        torch.testing.assert_close(seen[-1], second[0]["image"], rtol=0, atol=0)
    assert any(not torch.equal(seen[0], other) for other in seen[1:])


def test_says_what_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match="no images at"):
        load_images(tmp_path / "missing")
    with pytest.raises(TersorError, match="holds no images"):
        load_images(tmp_path)
    np.savez(tmp_path / "x.npz", labels=np.zeros(1))
    with pytest.raises(TersorError, match="not a packed image file"):
        load_images(tmp_path / "x.npz")
    broken = load_images(pack(tmp_path / "y.npz", [b"not an image"], [0]), PLAIN)
    with pytest.raises(TersorError, match="cannot be decoded"):
        broken[0]


def test_opens_the_packed_cifar_images(data: Path) -> None:
    images = load_images(data / "images" / "cifar10_train_512.npz", ImageConfig(size=32))
    assert len(images) == 512
    assert images[511]["image"].shape == (3, 32, 32)
    assert {int(label) for label in images.labels} == set(range(10))
