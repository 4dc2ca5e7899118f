"""`tersor sample`: from a model's folder to a file that opens, the same bytes for the same seed, refusals in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tersor
import tersor.models
from tersor.data import shapes, surfaces
from tersor.train.checkpoint import save_model

pytest.importorskip("trimesh", reason="mesh files need the extra meshes")
pytest.importorskip("skimage", reason="marching cubes needs the extra meshes")
pillow = pytest.importorskip("PIL.Image", reason="pictures need Pillow")

Command = Callable[..., Any]
VDT = {"input_size": 8, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 1, "num_frames": 4}
FLOW = {"width": 16, "num_layers": 3, "num_attention_heads": 2, "in_channels": 4, "cross_attention_dim": 6}
VAE = {
    "latent_channels": 4,
    "num_attention_heads": 2,
    "width_encoder": 16,
    "width_decoder": 16,
    "num_layers_encoder": 1,
    "num_layers_decoder": 1,
    "num_tokens": 8,
    "embed_frequency": 1,  # smooth surfaces
}
G3PT = {
    "width": 16,
    "depth": 1,
    "num_heads": 2,
    "num_classes": 3,
    "scales": (1, 4),
    "bits": 4,
    "num_latents": 4,
    "latent_width": 16,
    "latent_heads": 2,
}
TOKENIZER = {
    "num_latents": 4,
    "width": 16,
    "num_heads": 2,
    "num_layers_encoder": 1,
    "num_layers_decoder": 1,
    "scales": (1, 4),
    "bits": 4,
}


def save(name: str, folder: Path, /, **config: object) -> nn.Module:
    torch.manual_seed(0)
    model = tersor.models.create(name, **config)
    folder.mkdir(parents=True)
    save_model(model, folder, {}, ())
    return model


def centred(decoder: Any, folder: Path) -> None:
    """Untrained weights, with a surface in sight: what the decoder says has mean 0 over the box."""
    torch.manual_seed(1)
    p = 2 * torch.rand(1, 500, 3) - 1
    with torch.no_grad():
        latents = torch.randn(1, decoder.config.num_tokens, decoder.config.latent_channels)
        decoder.decoder.proj_out.bias += decoder.distances(decoder.tokens(latents), p).mean()
    save_model(decoder, folder, {}, ())


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triposg")
    save("triposg", folder / "transformer", **FLOW)
    centred(save("triposg_vae", folder / "vae", **VAE), folder / "vae")
    np.save(folder / "context.npy", np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32))
    return folder


@pytest.fixture(scope="module")
def scales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("g3pt")
    generator: Any = save("g3pt", folder / "transformer", **G3PT)
    tokenizer: Any = save("g3pt_tokenizer", folder / "vae", **TOKENIZER)
    generator.take_quantizer(tokenizer)
    save_model(generator, folder / "transformer", {}, ())
    with torch.no_grad():
        p = 2 * torch.rand(1, 500, 3) - 1
        features = tokenizer.features(torch.zeros(1, 5, dtype=torch.long))
        tokenizer.out.bias -= tokenizer.decode(features, p).mean()
    save_model(tokenizer, folder / "vae", {}, ())
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vdt") / "run"
    save("vdt", folder, **VDT, in_channels=3, zero_init=False)
    return folder


FEW = ("--steps", "3", "--device", "cpu")
COARSE = ("--resolution", "16", "--device", "cpu")


def refused(ran: Any, *said: str) -> None:
    assert ran.status == 2, ran
    assert len(ran.err.splitlines()) == 1
    for each in said:
        assert each in ran.err


# ---- shapes


@pytest.mark.parametrize("kind", [".glb", ".obj"])
def test_a_flow_makes_a_closed_mesh_and_the_same_bytes_again(
    tersor_command: Command, flow: Path, tmp_path: Path, kind: str
) -> None:
    files = [tmp_path / f"{name}{kind}" for name in ("a", "b", "c")]
    for file, seed in zip(files, (1, 1, 2), strict=True):
        ran = tersor_command("sample", flow, "--out", file, "--seed", seed, *FEW, *COARSE[:2])
        assert ran.status == 0, ran.err
        assert ran.out.startswith(f"{file}: ")
    a, b, c = (file.read_bytes() for file in files)
    assert a == b
    assert a != c
    mesh = shapes.read_mesh(files[0])
    assert shapes.open_edges(mesh) == 0
    assert mesh.volume() > 0


def test_a_condition_and_its_guidance_change_the_shape(tersor_command: Command, flow: Path, tmp_path: Path) -> None:
    found = []
    for number, more in enumerate(
        ((), ("--condition", flow / "context.npy"), ("--condition", flow / "context.npy", "--guidance", "1"))
    ):
        out = tmp_path / f"{number}.obj"
        ran = tersor_command("sample", flow, "--out", out, *more, *FEW, *COARSE[:2], "--json")
        assert ran.status == 0, ran.err
        assert json.loads(ran.out)["faces"] == len(shapes.read_mesh(out).faces)
        found.append(out.read_bytes())
    assert len(set(found)) == 3


@pytest.mark.slow
def test_the_published_layout_loads_and_sees_pictures(tersor_command: Command, flow: Path, tmp_path: Path) -> None:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    folder = tmp_path / "published"
    for name, kind in (("transformer", "TripoSGDiTModel"), ("vae", "TripoSGVAEModel")):
        (folder / name).mkdir(parents=True)
        config = json.loads((flow / name / "config.json").read_text())
        del config["tersor_model"]
        (folder / name / "config.json").write_text(
            json.dumps({"_class_name": kind, "_diffusers_version": "0.31", **config})
        )
        weights = (flow / name / "model.safetensors").read_bytes()
        (folder / name / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    torch.manual_seed(0)
    sizes = {"hidden_size": 6, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder / "image_encoder_dinov2")
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(
        folder / "feature_extractor_dinov2"
    )
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 4), np.uint8)
    pixels[:, :30, 3] = 0  # the left half is transparent
    pillow.fromarray(pixels).save(tmp_path / "cut.png")
    pixels[:, :30, :3] = 7  # which is not seen
    pillow.fromarray(pixels).save(tmp_path / "same.png")
    found = []
    for name in ("cut", "same"):
        out = tmp_path / f"{name}.obj"
        ran = tersor_command("sample", folder, "--condition", tmp_path / f"{name}.png", "--out", out, *FEW, *COARSE[:2])
        assert ran.status == 0, ran.err
        found.append(out.read_bytes())
    assert found[0] == found[1]
    plain = tersor_command("sample", flow, "--out", tmp_path / "plain.obj", *FEW, *COARSE[:2])
    assert plain.status == 0, plain.err
    assert (tmp_path / "plain.obj").read_bytes() != found[0]


def test_scales_make_a_mesh_of_a_class(tersor_command: Command, scales: Path, tmp_path: Path) -> None:
    found = set()
    for label in (0, 1, 1):
        out = tmp_path / f"{label}.glb"
        ran = tersor_command(
            "sample", scales, "--prompt", label, "--guidance", "3", "--out", out, "--overwrite", *COARSE
        )
        assert ran.status == 0, ran.err
        found.add(out.read_bytes())
        assert shapes.open_edges(shapes.read_mesh(out)) == 0
    assert len(found) == 2


def test_shape_options_that_do_not_fit_are_one_line(
    tersor_command: Command, flow: Path, scales: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.glb"

    def run(model: Path, *more: object) -> Any:
        return tersor_command("sample", model, "--out", out, *more, *COARSE)

    refused(run(flow, "--prompt", "a chair"), "takes no --prompt")
    refused(run(flow, "--guidance", "3"), "--guidance leads towards a --condition")
    refused(run(flow, "--guidance", "nan"), "--guidance nan must be a number of at least 0")
    np.save(tmp_path / "words.npy", np.array([["a"] * 6]))
    refused(run(flow, "--condition", tmp_path / "words.npy"), "holds <U1 [1, 6], a context is")
    refused(run(flow, "--steps", "0"), "--steps 0 must be positive")
    refused(run(flow, "--condition", tmp_path / "gone.npy"), "there is no file", "gone.npy")
    (tmp_path / "photo.png").write_bytes(b"no picture")
    refused(run(flow, "--condition", tmp_path / "photo.png"), "no image_encoder_dinov2", "give an .npy")
    np.save(tmp_path / "wrong.npy", np.zeros((5, 7), np.float32))
    refused(run(flow, "--condition", tmp_path / "wrong.npy"), "holds float32 [5, 7], a context is (length, 6)")
    refused(run(scales, "--steps", "3"), "as many steps as it has scales, 2")
    refused(run(scales, "--prompt", "3"), "--prompt '3': this model takes the number of a class, 0 to 2")
    refused(run(scales, "--condition", flow / "context.npy"), "takes no --condition")
    refused(run(flow / "transformer"), "nothing turns them into a shape")
    refused(run(flow / "vae"), "is triposg_vae, which makes nothing of noise", "g3pt, triposg, vdt")
    refused(tersor_command("sample", flow, "--out", tmp_path / "a.gif"), "files that end in .glb, .obj, .ply, .stl")
    refused(tersor_command("sample", flow, "--out", tmp_path / "no" / "a.glb"), "there is no folder")
    refused(tersor_command("sample", tmp_path, "--out", out), "it has no config.json")
    ran = tersor_command("sample", flow, "--out", out, "--resolution", "0", "--device", "cpu")
    refused(ran, "1 to 1024 cells a side, not 0")
    assert not out.exists()
    out.write_bytes(b"an earlier shape")
    refused(run(flow), f"--out {out} exists; give another name, or --overwrite to replace it")
    assert out.read_bytes() == b"an earlier shape"


def test_a_quantized_flow_and_decoder_make_a_shape(tersor_command: Command, flow: Path, tmp_path: Path) -> None:
    for name in ("transformer", "vae"):
        model = tersor.load(flow / name).eval()
        method = tersor.GPTQ(bits=8, group_size=-1)
        batches = [model.example_inputs(2)]  # type: ignore[operator]
        result = tersor.compress(model, method, calibration=batches, format="compressed-tensors")
        result.save(tmp_path / "quantized" / name)
    for folder in (flow, tmp_path / "quantized"):
        ran = tersor_command("sample", folder, "--out", tmp_path / f"{folder.name}.obj", *FEW, *COARSE[:2], "--json")
        assert ran.status == 0, ran.err
    plain, packed = (shapes.read_mesh(tmp_path / f"{name}.obj").volume() for name in (flow.name, "quantized"))
    assert packed != plain
    assert packed == pytest.approx(plain, rel=0.1)


# ---- videos


def frames_of(path: Path) -> int:
    with pillow.open(path) as opened:
        return int(getattr(opened, "n_frames", 1))


def test_a_video_moves_and_its_frames_lie_side_by_side(tersor_command: Command, video: Path, tmp_path: Path) -> None:
    found = {}
    for name in ("a.gif", "b.gif", "a.png", "a.npy"):
        ran = tersor_command("sample", video, "--out", tmp_path / name, "--seed", "3", *FEW)
        assert ran.status == 0, ran.err
        assert ran.out == f"{tmp_path / name}: 4 frames of 8 x 8\n"
        found[name] = (tmp_path / name).read_bytes()
    assert found["a.gif"] == found["b.gif"]
    assert frames_of(tmp_path / "a.gif") == 4
    clip = np.load(tmp_path / "a.npy")
    assert clip.shape == (4, 3, 8, 8)
    with pillow.open(tmp_path / "a.png") as opened:
        assert opened.size == (32, 8)
        levels = np.asarray(opened).reshape(8, 4, 8, 3).transpose(1, 3, 0, 2)
    assert np.abs(levels / 127.5 - 1 - clip.clip(-1, 1)).max() < 0.005
    tersor_command("sample", video, "--out", tmp_path / "c.gif", "--seed", "4", *FEW)
    assert (tmp_path / "c.gif").read_bytes() != found["a.gif"]


def test_given_frames_come_first(tersor_command: Command, video: Path, tmp_path: Path) -> None:
    given = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    pillow.fromarray(given).save(tmp_path / "first.png")
    out = tmp_path / "film.png"
    ran = tersor_command("sample", video, "--condition", tmp_path / "first.png", "--out", out, *FEW, "--json")
    assert ran.status == 0, ran.err
    assert json.loads(ran.out) == {"path": str(out), "shape": [4, 3, 8, 8], "given": 1}
    with pillow.open(out) as opened:
        assert np.array_equal(np.asarray(opened)[:, :8], given)
    clip = np.zeros((2, 3, 8, 8), np.float32)
    np.save(tmp_path / "two.npy", clip)
    ran = tersor_command("sample", video, "--condition", tmp_path / "two.npy", "--out", tmp_path / "film.npy", *FEW)
    assert ran.out.endswith("4 frames of 8 x 8, the first 2 given\n")
    assert not np.load(tmp_path / "film.npy")[:2].any()


def test_video_options_that_do_not_fit_are_one_line(tersor_command: Command, video: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.gif"

    def run(model: Path, *more: object) -> Any:
        return tersor_command("sample", model, "--out", out, "--device", "cpu", *more)

    refused(run(video, "--prompt", "a cat"), "takes no --prompt")
    refused(run(video, "--resolution", "64"), "takes no --resolution")
    refused(run(video, "--steps", "1001"), "1001")
    pictures = [pillow.fromarray(np.full((8, 8, 3), 60 * n, np.uint8)) for n in range(4)]
    pictures[0].save(tmp_path / "all.gif", save_all=True, append_images=pictures[1:])
    refused(
        run(video, "--condition", tmp_path / "all.gif"),
        "has at least 4 frames; the model makes 4, so 1 to 3 can be given",
    )
    (tmp_path / "text.gif").write_text("no picture")
    refused(run(video, "--condition", tmp_path / "text.gif"), "text.gif cannot be decoded")
    (tmp_path / "a.gif").write_text("mine")
    refused(run(video, "--condition", out), "is the file that is read")
    out.unlink()
    latent = tmp_path / "latent"
    save("vdt", latent, **VDT)
    refused(run(latent), "makes latents of 4 channels", "--out NAME.npy keeps them")
    ran = tersor_command("sample", latent, "--out", tmp_path / "latents.npy", *FEW)
    assert ran.status == 0, ran.err
    assert np.load(tmp_path / "latents.npy").shape == (4, 4, 8, 8)
    assert not out.exists()


# ---- training by the same tasks


def settings(config: dict[str, object]) -> list[str]:
    return [text for name, value in config.items() for text in ("--set", f"model.{name}={json.dumps(value)}")]


def test_from_meshes_to_a_mesh(tersor_command: Command, tmp_path: Path) -> None:
    """The whole way with the command line: train the autoencoder, then the flow on its latents, then sample."""
    ball = surfaces.surface_of(surfaces.distance_grid(lambda p: p.norm(dim=-1) - 0.6, cells=8))
    (tmp_path / "meshes").mkdir()
    surfaces.write_mesh(ball, tmp_path / "meshes" / "ball.obj")
    pipeline = tmp_path / "pipeline"
    sizes = ["--set", "data.points=32", "--set", "data.queries=64", "--set", "data.pool=300", "--set", "data.items=8"]
    few = ["--device", "cpu", "--batch-size", "4", "--lr", "0.003"]
    ran = tersor_command(
        *("train", "triposg_vae", "--data", tmp_path / "meshes", "--out", pipeline / "vae", "--epochs", "20"),
        *settings(VAE),
        *sizes,
        *few,
    )
    assert ran.status == 0, ran.err
    vae: Any = tersor.load(pipeline / "vae")
    points = torch.stack([shapes.surface_points(shapes.normalised(ball), 32) for _ in range(8)]).float()
    with torch.no_grad():
        latents = vae.encode(points).mean.numpy()
    np.savez(tmp_path / "latents.npz", latents=latents, context=np.zeros((8, 2, 6), np.float32))
    ran = tersor_command(
        *("train", "triposg", "--data", tmp_path / "latents.npz", "--out", pipeline / "transformer", "--epochs", "5"),
        *settings(FLOW),
        *few,
    )
    assert ran.status == 0, ran.err
    ran = tersor_command("sample", pipeline, "--out", tmp_path / "made.obj", *FEW, *COARSE[:2])
    assert ran.status == 0, ran.err
    assert shapes.open_edges(shapes.read_mesh(tmp_path / "made.obj")) == 0


def test_from_tokens_to_a_mesh_of_a_class(tersor_command: Command, tmp_path: Path) -> None:
    pipeline, generator = tmp_path / "pipeline", {**G3PT, "scales": [1, 4]}
    tokenizer: Any = save("g3pt_tokenizer", pipeline / "vae", **TOKENIZER)
    with torch.no_grad():
        features = tokenizer.features(torch.zeros(1, 5, dtype=torch.long))
        tokenizer.out.bias -= tokenizer.decode(features, 2 * torch.rand(1, 500, 3) - 1).mean()
    save_model(tokenizer, pipeline / "vae", {}, ())
    tokens, label = np.random.default_rng(0).integers(0, 16, (12, 5)), np.arange(12) % 3
    np.savez(tmp_path / "tokens.npz", tokens=tokens, label=label)
    train = ("train", "g3pt", "--data", tmp_path / "tokens.npz", "--out", pipeline / "transformer", "--epochs", "2")
    few = ("--device", "cpu", "--batch-size", "4", *settings(generator))
    refused(tersor_command(*train, *few), "has nothing of the tokenizer", "take_quantizer")
    model: Any = tersor.models.create("g3pt", **G3PT)
    model.take_quantizer(tokenizer)
    torch.save(model.state_dict(), tmp_path / "start.pth")
    ran = tersor_command(*train, *few, "--checkpoint", tmp_path / "start.pth")
    assert ran.status == 0, ran.err
    ran = tersor_command("sample", pipeline, "--prompt", "2", "--out", tmp_path / "made.glb", *COARSE)
    assert ran.status == 0, ran.err
    assert shapes.open_edges(shapes.read_mesh(tmp_path / "made.glb")) == 0


def test_training_data_that_do_not_fit_are_one_line(tersor_command: Command, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", latents=np.zeros((4, 8, 5), np.float32), context=np.zeros((4, 2, 6), np.float32))
    few = ("--out", tmp_path / "run", "--device", "cpu")
    ran = tersor_command("train", "triposg", "--data", tmp_path / "a.npz", *few, *settings(FLOW))
    refused(ran, "latents of one shape is [8, 5], the model takes [12, 4]")
    refused(tersor_command("train", "vdt", "--data", tmp_path / "a.npz", *few, *settings(VDT)), "it has no", "frames")
    np.savez(tmp_path / "b.npz", latents=np.zeros((4, 8, 4), np.float32), context=np.zeros((3, 2, 6), np.float32))
    ran = tersor_command("train", "triposg", "--data", tmp_path / "b.npz", *few, *settings(FLOW))
    refused(ran, "unlike numbers of rows")


def test_a_video_model_trains_on_clips(tersor_command: Command, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (8, 4, 1, 8, 8), np.uint8)
    np.savez(tmp_path / "clips.npz", frames=frames)
    ran = tersor_command(
        *("train", "vdt", "--data", tmp_path / "clips.npz", "--out", tmp_path / "run", "--epochs", "2"),
        *settings({**VDT, "in_channels": 1}),
        *("--device", "cpu", "--batch-size", "4"),
    )
    assert ran.status == 0, ran.err
    ran = tersor_command("sample", tmp_path / "run", "--out", tmp_path / "film.gif", *FEW)
    assert ran.status == 0, ran.err
    with pillow.open(tmp_path / "film.gif") as opened:
        assert opened.size == (8, 8)
