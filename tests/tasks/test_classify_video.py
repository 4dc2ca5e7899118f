"""Videos: frames and times of every kind of file, clips of them, and events from a model that `tersor train` made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tersor.data.videos import VideoConfig, frames_of, load_videos, videos_in, windows
from tersor.errors import TersorError
from tersor.models import find
from tersor.tasks.classify_video import merged

pillow = pytest.importorskip("PIL.Image", reason="reading pictures needs Pillow")
CONFIG = VideoConfig(frames=4, stride=1, size=16, rate=10.0)
RED, BLUE = (200, 20, 20), (20, 20, 200)


def pictures(colours: list[tuple[int, int, int]], *, seed: int = 0, size: tuple[int, int] = (16, 24)) -> list[Any]:
    random = np.random.default_rng(seed)
    return [
        pillow.fromarray((np.array(each) + random.integers(-20, 20, (*size, 3))).astype(np.uint8)) for each in colours
    ]


def write_gif(path: Path, colours: list[tuple[int, int, int]], *, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = pictures(colours, seed=seed)
    first.save(path, save_all=True, append_images=rest, duration=200, loop=0)
    return path


def write_folder(path: Path, colours: list[tuple[int, int, int]]) -> Path:
    path.mkdir(parents=True)
    for number, picture in enumerate(pictures(colours)):
        picture.save(path / f"{number:03d}.png")
    return path


def write_mp4(path: Path, colours: list[tuple[int, int, int]]) -> Path:
    av = pytest.importorskip("av", reason="MP4 needs PyAV")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for picture in pictures(colours, size=(32, 48)):
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return path


def test_every_kind_of_video_gives_its_frames_and_their_times(tmp_path: Path) -> None:
    colours = [RED] * 3 + [BLUE] * 4
    for path, step in (
        (write_gif(tmp_path / "a.gif", colours), 0.2),
        (write_folder(tmp_path / "b", colours), 0.1),
        (write_mp4(tmp_path / "c.mp4", colours), 0.1),
    ):
        times, frames = zip(*frames_of(path, CONFIG), strict=True)
        assert times == pytest.approx([n * step for n in range(7)])
        assert {tuple(each.shape) for each in frames} == {(16, 24, 3)}
        reds = [bool(each[..., 0].float().mean() > each[..., 2].float().mean()) for each in frames]
        assert reds == [True] * 3 + [False] * 4
        halved = [seconds for seconds, _ in frames_of(path, VideoConfig(frames=4, stride=2, size=16, rate=10.0))]
        assert halved == pytest.approx([n * step for n in (0, 2, 4, 6)])


@pytest.mark.parametrize(
    ("count", "starts"), [(1, [0]), (4, [0]), (5, [0, 1]), (6, [0, 2]), (7, [0, 2, 3]), (8, [0, 2, 4])]
)
def test_windows_overlap_by_half_and_reach_the_end(count: int, starts: list[int]) -> None:
    frames = [(float(n), torch.full((1, 1, 3), n, dtype=torch.uint8)) for n in range(count)]
    found = list(windows(iter(frames), 4))
    assert [times[0] for times, _ in found] == starts
    assert all(len(clip) == 4 for _, clip in found)
    assert found[-1][1][-1, 0, 0, 0] == count - 1


def test_neighbours_of_one_class_are_one_event() -> None:
    spans = [(0.0, 4.0), (2.0, 6.0), (4.0, 8.0), (6.0, 10.0)]
    a, b, again = merged(spans, ["x", "x", "y", "x"], [0.5, 1.0, 0.7, 0.9])
    assert (a.start, a.end, a.name, a.probability) == (0.0, 5.0, "x", 0.75)
    assert (b.start, b.end, b.name) == (5.0, 7.0, "y")
    assert (again.start, again.end) == (7.0, 10.0)


def test_a_clip_depends_on_the_epoch_only_where_chance_may(tmp_path: Path) -> None:
    for number in range(3):
        write_gif(tmp_path / "red" / f"{number}.gif", [RED, BLUE] * 6, seed=number)
    write_folder(tmp_path / "blue" / "frames", [BLUE] * 2)
    (tmp_path / "blue" / ".hidden").mkdir()
    data = load_videos(tmp_path, CONFIG)
    assert data.classes == ("blue", "red")
    assert [int(data[n]["target"]) for n in range(len(data))] == [0, 1, 1, 1]
    assert data[0]["clip"].shape == (3, 4, 16, 16)
    assert torch.equal(data[0]["clip"][:, 1], data[0]["clip"][:, 3])  # it stands still at its end
    before = [data[n]["clip"] for n in range(1, 4)]
    assert all(torch.equal(data[n + 1]["clip"], each) for n, each in enumerate(before))
    data.set_epoch(1)
    assert not all(torch.equal(data[n + 1]["clip"], each) for n, each in enumerate(before))
    assert videos_in(tmp_path / "blue") == [tmp_path / "blue" / "frames"]


def test_what_is_no_video_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with pytest.raises(TersorError, match="one subfolder a class"):
        load_videos(tmp_path / "empty", CONFIG)
    pytest.importorskip("av")
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(TersorError, match=r"broken\.mp4 cannot be decoded"):
        list(frames_of(tmp_path / "broken.mp4", CONFIG))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tersor.cli.main import main

    folder = tmp_path_factory.mktemp("videos")
    for number in range(4):
        write_gif(folder / "data" / "red" / f"{number}.gif", [RED] * 6, seed=number)
        write_gif(folder / "data" / "blue" / f"{number}.gif", [BLUE] * 6, seed=number)
    small = find("driver").small | {"num_classes": 2, "dropout_ratio": 0.0, "drop_path_rate": 0.0}
    sizes = [text for name, value in small.items() for text in ("--set", f"model.{name}={json.dumps(value)}")]
    table = [text for name in ("frames=4", "stride=1", "size=16") for text in ("--set", f"data.{name}")]
    data = str(folder / "data")
    with pytest.raises(SystemExit) as ended:
        main(
            [
                *("train", "driver", "--data", data, "--validation", data, "--out", str(folder / "run")),
                *("--device", "cpu", "--epochs", "4", "--batch-size", "4", "--lr", "0.01", *sizes, *table),
            ]
        )
    assert ended.value.code == 0
    return folder


def test_a_trained_model_tells_what_happens_when(
    trained: Path, tmp_path: Path, tersor_command: Callable[..., Any]
) -> None:
    video = write_gif(tmp_path / "new.gif", [RED] * 12 + [BLUE] * 12, seed=9)
    ran = tersor_command("predict", trained / "run", video, "--json")
    assert ran.status == 0, ran.err
    (found,) = json.loads(ran.out)
    assert found["classes"] == ["red", "blue"]
    assert found["starts"][0] == 0
    assert found["ends"][0] == found["starts"][1] == pytest.approx(2.4, abs=0.5)
    assert found["ends"][1] == pytest.approx(4.6)
    write_folder(tmp_path / "frames", [BLUE] * 4)
    lines = tersor_command("predict", trained / "run", tmp_path).out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"{video}: 0.00-")
    assert lines[1].startswith(f"{tmp_path / 'frames'}: 0.00-0.12 s blue ")


def test_further_training_takes_the_clips_as_the_saved_model_does(
    trained: Path, tmp_path: Path, tersor_command: Callable[..., Any]
) -> None:
    arguments = ("--data", trained / "data", "--epochs", 1, "--batch-size", 4, "--set", "data.stride=2")
    ran = tersor_command("train", trained / "run", *arguments, "--out", tmp_path / "more", "--device", "cpu")
    assert ran.status == 0, ran.err
    said = json.loads((tmp_path / "more" / "preprocessor_config.json").read_text())
    assert (said["frames"], said["size"], said["stride"]) == (4, 16, 2)


def test_the_training_leaves_a_sheet_of_clips(trained: Path) -> None:
    sheet = np.asarray(pillow.open(trained / "run" / "samples.png")).astype(int)
    assert sheet.shape == (8 * 200 + 24, 3 * 200 + 8, 3)
    first, last = sheet[24:216, 8:200].mean((0, 1)), sheet[1424:1616, 8:200].mean((0, 1))
    assert abs(first - BLUE).max() < 30
    assert abs(last - RED).max() < 30
