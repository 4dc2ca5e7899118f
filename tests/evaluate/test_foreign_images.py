"""Images come to the model as its own preprocessor makes them, with the model's own class numbers; files that lie are refused."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tersor.checkpoint.source import resolve
from tersor.data.images import ImageConfig, load_images
from tersor.errors import TersorError
from tersor.evaluate.accuracy import read_images
from tersor.models.registry import create, find, list_models

pillow = pytest.importorskip("PIL.Image", reason="reading images needs Pillow")
PLAIN = ImageConfig(size=8, mean=(0, 0, 0), std=(1, 1, 1))


def folder(base: Path, *classes: str) -> Path:
    random = np.random.default_rng(0)
    for name in classes:
        (base / name).mkdir(parents=True)
        pixels = np.kron(random.integers(0, 256, (6, 12, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
        pillow.fromarray(pixels).save(base / name / "0.png")
    return base


# ---- labels


@pytest.mark.parametrize("beside", [".ipynb_checkpoints", "__MACOSX", ".git"])
def test_hidden_folders_are_no_classes(tmp_path: Path, beside: str) -> None:
    images = folder(tmp_path, "airplane", "automobile", "bird")
    (images / beside / "airplane").mkdir(parents=True)
    (images / "bird" / "._0.png").write_bytes(b"resource fork")
    assert read_images("demo-vit", images)[1].tolist() == [0, 1, 2]
    assert load_images(images).classes == ("airplane", "automobile", "bird")


def test_folders_with_names_of_the_model_have_its_numbers(tmp_path: Path) -> None:
    assert read_images("demo-vit", folder(tmp_path / "a", "truck", "Bird"))[1].tolist() == [2, 9]
    assert read_images("demo-vit", folder(tmp_path / "b", "3", "7"))[1].tolist() == [3, 7]
    with pytest.raises(TersorError, match="has a folder lorry, which is none of the model's 10 classes"):
        read_images("demo-vit", folder(tmp_path / "c", "bird", "lorry"))
    with pytest.raises(TersorError, match="none of the model's 10 classes"):
        read_images("demo-vit", folder(tmp_path / "d", "camion", "oiseau"))


def test_any_synonym_names_a_class(tmp_path: Path) -> None:
    images = folder(tmp_path, "Tinca_tinca", "goldfish")
    data = load_images(images, PLAIN, classes=["goldfish, Carassius auratus", "tench, Tinca tinca"])
    assert data.labels == [1, 0]


# ---- preprocessing


def processors() -> dict[str, Any]:
    import transformers

    common = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    square = {"height": 32, "width": 32}
    return {
        "squeezed": transformers.ViTImageProcessor(size=square, **common),
        "not normalised": transformers.ViTImageProcessor(size=square, do_normalize=False, **common),
        "not rescaled": transformers.ViTImageProcessor(size=square, do_rescale=False, **common),
        "nearest": transformers.ViTImageProcessor(size=square, resample=0, **common),
        "cropped": transformers.CLIPImageProcessor(size={"shortest_edge": 36}, crop_size=square, **common),
        "crop_pct": transformers.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.8, **common),
    }


def test_pixels_are_those_of_transformers_own_preprocessor(tmp_path: Path) -> None:
    import transformers

    images = folder(tmp_path / "images", "a")
    picture = pillow.open(images / "a" / "0.png")
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    for name, processor in processors().items():
        processor.save_pretrained(tmp_path / "vit")
        expected = processor(picture, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(read_images(tmp_path / "vit", images)[0], expected, msg=name)


def timm_model(base: Path, **changes: Any) -> Path:
    model = Path(shutil.copytree(resolve("demo-vit"), base / "model"))
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(config))
    return model


def test_timm_says_crop_and_filter(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", "bird")
    model = timm_model(
        tmp_path, pretrained_cfg={"crop_pct": 0.8, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}
    )
    picture = pillow.open(images / "bird" / "0.png").resize((80, 40), pillow.Resampling.BILINEAR).crop((24, 4, 56, 36))
    expected = torch.tensor(np.array(picture) / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)
    torch.testing.assert_close(read_images(model, images)[0][0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"crop_pct": 0},
        {"crop_pct": "wide"},
        {"img_size": 10**9},
        {"input_size": [3, 32, -32]},
        {"mean": [0.5]},
        {"std": [0, 0, 0]},
        {"mean": ["a", "b", "c"]},
        {"interpolation": "magic"},
        {"crop_mode": "sideways"},
        {"pretrained_cfg": [1]},
    ],
)
def test_a_config_of_images_that_makes_no_sense(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(TersorError):
        read_images(timm_model(tmp_path, **changes), folder(tmp_path / "images", "bird"))


# ---- single images


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    pillow.fromarray(ramp).save(tmp_path / "a" / "0.png")
    expected = torch.from_numpy(ramp.astype(np.float32) / 65535).expand(3, 8, 8)
    torch.testing.assert_close(load_images(tmp_path, PLAIN)[0]["image"], expected, atol=0.5 / 255 + 1e-6, rtol=0)


def header_of(width: int, height: int) -> bytes:
    def piece(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    size = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + piece(b"IHDR", size) + piece(b"IEND", b"")


@pytest.mark.parametrize(
    "content",
    [
        header_of(30000, 30000),
        header_of(10000, 10000),
        header_of(1, 60000),
        header_of(0, 8),
        header_of(8, 8),
        b"",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
        b"\xff\xd8\xff\xe0",
        b"BM" + bytes(60),
    ],
)
def test_an_image_that_is_none_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "bad.png").write_bytes(content)
    with pytest.raises(TersorError, match=r"bad\.png"):
        load_images(tmp_path, PLAIN)[0]


# ---- packed files


def npy(shape: str, dtype: str, content: bytes = b"") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def archive(path: Path, method: int = zipfile.ZIP_DEFLATED, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in entries.items():
            file.writestr(f"{name}.npy", content)
    return path


GOOD = {"offsets": npy("(2,)", "<i8", struct.pack("<2q", 0, 3)), "labels": npy("(1,)", "<i8", struct.pack("<q", 0))}
LIES = {
    "claims 9 TiB": {**GOOD, "bytes": npy("(9895604649984,)", "|u1", b"abc")},
    "pickled": {**GOOD, "bytes": npy("(3,)", "|O", b"abc")},
    "no header": {**GOOD, "bytes": b"\x93NUMPY\x01\x00\x04\x00{{{{"},
    "empty": {**GOOD, "bytes": b""},
    "negative": {**GOOD, "bytes": npy("(-3,)", "|u1", b"abc")},
    "two dimensions": {**GOOD, "bytes": npy("(3, 1)", "|u1", b"abc")},
    "floats": {**GOOD, "bytes": npy("(3,)", "|u1", b"abc"), "labels": npy("(1,)", "<f8", bytes(8))},
    "huge label": {
        **GOOD,
        "bytes": npy("(3,)", "|u1", b"abc"),
        "labels": npy("(1,)", "<i8", struct.pack("<q", 2**60)),
    },
    "falling offsets": {
        **GOOD,
        "bytes": npy("(3,)", "|u1", b"abc"),
        "offsets": npy("(3,)", "<i8", struct.pack("<3q", 0, 9, 3)),
        "labels": npy("(2,)", "<i8", bytes(16)),
    },
    "unpacks to far more": {**GOOD, "bytes": npy(f"({80 << 20},)", "|u1", bytes(80 << 20))},
    "missing": {"labels": GOOD["labels"], "bytes": npy("(3,)", "|u1", b"abc")},
}


@pytest.mark.parametrize("what", LIES)
def test_a_packed_file_that_lies(tmp_path: Path, what: str) -> None:
    with pytest.raises(TersorError, match=r"lie\.npz"):
        load_images(archive(tmp_path / "lie.npz", **LIES[what]))


def test_a_packed_file_that_is_cut_off(tmp_path: Path) -> None:
    whole = archive(tmp_path / "whole.npz", **GOOD, bytes=npy("(3,)", "|u1", b"abc")).read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.npz").write_bytes(whole[:cut])
        with pytest.raises(TersorError, match=r"cut\.npz"):
            load_images(tmp_path / "cut.npz")


# ---- sizes


@pytest.mark.parametrize("name", sorted({info.system for info in list_models() if info.input == "image"}))
def test_an_image_of_another_size_is_taken_or_refused_in_words(name: str) -> None:
    info = find(name)
    model = create(name, **info.small).eval()
    channels, side = model.example_inputs(1)["image"].shape[1:3]  # type: ignore[operator]
    for size in (2 * side, side + 32, side // 2):
        with torch.no_grad(), contextlib.suppress(TersorError):
            model(torch.zeros(1, channels, size, size))


def test_the_refused_size_is_named() -> None:
    for name in ("efficientformer", "efficientformerv2", "vit"):
        model = create(name, **find(name).small).eval()
        with pytest.raises(TersorError, match="not 96 x 96"):
            model(torch.zeros(1, 3, 96, 96))
