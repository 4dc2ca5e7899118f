"""Damaged files of every format that is read, and odd values of every option, through the command line.

Whatever it is given, a command ends with exit status 0 or 2 and one line, within ten seconds and some memory, leaves what it read
as it was, and writes no half of a result. A few examples of each kind run with the tests; for many:

    python tests/test_fuzz.py --examples 500 [--seed 1] [--only gguf]
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

SECONDS, BYTES = 10, 3 * 2**30  # of one command: time, and memory beyond what the process had before
EXAMPLES, DEAR = 2, {"journal": 1}  # of each kind, with the other tests; of those whose examples run whole jobs

Draw = Callable[[Any], Any]


# ---- one command, watched


class Hang(BaseException):
    """Raised in a command that takes too long."""


def _hang(*_: object) -> None:
    raise Hang


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Time and memory for one command; where Python itself gets no turn any more, all ends with a trace of where."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    held = re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text()) if sys.platform == "linux" else None
    handler = signal.signal(signal.SIGALRM, _hang)
    faulthandler.dump_traceback_later(6 * SECONDS, exit=True, file=sys.__stderr__)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    if held is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (1024 * int(held[1]) + BYTES, before[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_DATA, before)


def run(*arguments: object) -> Ended:
    """`tersor ARGUMENTS` in this process. Raises AssertionError where it ends in a way that no user should see."""
    from tersor.cli.main import main

    out, err, words = io.StringIO(), io.StringIO(), [str(each) for each in arguments]
    status, trace = 0, ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with limits():
                main(words)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(bool(end.code))
        except Hang:
            status, trace = -1, f"still running after {SECONDS} s\n{traceback.format_exc()}"
        except Exception:
            status, trace = 1, traceback.format_exc()
    command = "tersor " + " ".join(words)
    assert status in (0, 2), f"{command}\nexit status {status}\n{trace or err.getvalue()}"
    assert "Traceback" not in err.getvalue(), f"{command}\n{err.getvalue()}"
    return Ended(status, out.getvalue(), err.getvalue())


# ---- odd values, and damages


ODD_NUMBERS: list[Any] = [0, -1, 1, 3, 7, 2**31, 2**63, 2**64 + 1, -(2**63), 10**7, 10**30, 0.5, -0.0, 1e308, 1e-320]
ODD_WORDS = [
    "",
    " ",
    "x",
    "0",
    "-1",
    "nan",
    "inf",
    "auto",
    "meta",
    "/dev/zero",
    "../..",
    "\u0000",
    "é\u0301",
    "🜚" * 9,
    "a" * 5000,
]
ODD: list[Any] = [
    *(*ODD_NUMBERS, *ODD_WORDS, None, True, False, float("nan"), float("inf"), [], {}, [None], [[[]]], {"": {}}),
    *(["x"] * 3, {"type": "x"}, [1e30] * 4),
]
ODD_TEXTS = [
    *(b"", b"\x00" * 64, b"\xff\xfe", b"null", b"[]", b"{}", b"0", b'"', b"[" * 100_000, b"{" * 10, b"9" * 5000),
    *(b'{"a": ' * 20_000, b"\xef\xbb\xbf{}", b"NaN", b"version https://git-lfs.github.com/spec/v1\n"),
]
ODD_YAML = [
    *("&a [*a]", "&a {method: *a}", "method: [rtn, [gptq]]", "rules: {a: b}", "rules: [[]]", "- 1", "bits: [4, [8]]"),
    *(
        "method: !!python/object/apply:os.system [true]",
        "? [a]\n: b",
        "rules: [{match: 3}]",
        "{" * 5000,
        "a: &a [1]\nb: [*a]",
    ),
]


def damage(draw: Draw, data: bytes, *, where: int | None = None) -> bytes:
    """Bytes with something wrong, most of all in the first `where` of them."""
    size = min(len(data), where or len(data))
    at = draw(st.integers(0, max(size - 1, 0)))
    kind = draw(st.sampled_from(["flip", "flip", "number", "number", "cut", "gap", "insert", "other"]))
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :] if data else data
    if kind == "number":
        number = draw(st.sampled_from([0, 1, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]))
        return data[:at] + struct.pack("<Q", number) + data[at + 8 :]
    if kind == "cut":
        return data[:at]
    if kind == "gap":
        return data[:at] + data[at + draw(st.integers(1, 64)) :]
    if kind == "insert":
        return data[:at] + draw(st.binary(min_size=1, max_size=16)) + data[at:]
    return bytes(draw(st.sampled_from(ODD_TEXTS)))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value within a JSON value, short ones first; of long lists only some."""
    found: list[tuple[Any, ...]] = [path] if path else []
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in list(items)[:40]:
            found += places(inner, (*path, key))
    return sorted(found, key=len)[:400]


def changed(draw: Draw, value: Any) -> Any:
    """A JSON value with one to three of its values changed, left out, or given another name."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        ways = places(value)
        if not ways:
            return draw(st.sampled_from(ODD))
        *above, key = draw(st.sampled_from(ways))
        holder = value
        for each in above:
            holder = holder[each]
        kind = draw(st.sampled_from(["odd", "odd", "odd", "number", "drop", "double"]))
        if kind == "drop":
            del holder[key]
        elif kind == "double" and isinstance(holder, list):
            holder.append(holder[key])
        elif kind == "number" and isinstance(holder[key], int):
            holder[key] = holder[key] * draw(st.sampled_from([-1, 0, 2, 3, 10**6])) + draw(st.sampled_from([-1, 0, 1]))
        else:
            holder[key] = draw(st.sampled_from(ODD))
    return value


def changed_json(draw: Draw, data: bytes) -> bytes:
    if draw(st.integers(0, 5)) == 0:
        return damage(draw, data)
    return json.dumps(changed(draw, json.loads(data))).encode()


def changed_safetensors(draw: Draw, data: bytes) -> bytes:
    """The header, or the numbers, which become NaN or something else that they were not."""
    (length,) = struct.unpack("<Q", data[:8])
    kind = draw(st.sampled_from(["header", "header", "numbers", "bytes"]))
    if kind == "bytes":
        return damage(draw, data, where=8 + length)
    if kind == "header":
        header = json.dumps(changed(draw, json.loads(data[8 : 8 + length]))).encode()
        return struct.pack("<Q", len(header)) + header + data[8 + length :]
    at = 8 + length + 4 * draw(st.integers(0, (len(data) - length - 12) // 4))
    odd = draw(st.sampled_from([b"\xff\xff\xff\xff", b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f"]))
    odd *= draw(st.sampled_from([1, 16]))
    return (data[:at] + odd + data[at + len(odd) :])[: len(data)]


def changed_npz(draw: Draw, data: bytes) -> bytes:
    """The zip file's bytes, or the header of an array in it, which then claims what it does not hold."""
    if draw(st.booleans()):
        return damage(draw, data)
    target, odd = io.BytesIO(), draw(st.sampled_from(["(999999999999,)", "(-1,)", "(3, 3, 3)", "()", "(2**60,)"]))
    victim = draw(st.sampled_from(["bytes.npy", "offsets.npy", "labels.npy"]))
    kind = draw(st.sampled_from(["shape", "dtype", "gone", "bytes"]))
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == victim:
                if kind == "gone":
                    continue
                if kind == "shape":
                    content = re.sub(rb"\(\d+,\)", lambda m: odd.encode().ljust(len(m[0])), content, count=1)
                elif kind == "dtype":
                    content = re.sub(
                        rb"'[<|][ui]\d'", draw(st.sampled_from([b"'|O'  ", b"'<f8'", b"'<U9'"])), content, count=1
                    )
                else:
                    content = damage(draw, content, where=128)
            new.writestr(name, content)
    return target.getvalue()


# ---- sound files of every kind, small


@dataclass(frozen=True)
class Sound:
    """Where they lie: a language model, the same quantized and as GGUF, images, a series, a training's run, a stopped job."""

    root: Path
    model: Path
    quantized: Path
    gguf: Path
    images: Path
    npz: Path
    series: Path
    run: Path
    recipe: Path
    stopped: Path


SETTINGS = ("d_model=8", "d_ff=8", "n_heads=2", "seq_len=8", "pred_len=4")
TRAIN = [word for each in SETTINGS for word in ("--set", f"model.{each}")] + ["--max-steps", "2", "--batch-size", "4"]
FEW = ("--samples", 1, "--seq-len", 16)


def make_sound_files(root: Path) -> Sound:
    import numpy as np
    import torch
    from PIL import Image
    from transformers import LlamaConfig, LlamaForCausalLM

    from tersor.checkpoint.source import resolve

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(root / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(resolve("demo") / name, root / "model" / name)
    keys = ["model.embed_tokens.weight", "model.norm.weight"]
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(keys, "model-00001-of-00001.safetensors")}
    (root / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    run("quantize", root / "model", "--out", root / "quantized", "--method", "rtn", "--group-size", 16)
    run("export", root / "model", "--out", root / "model.gguf")
    encoded, offsets = b"", [0]
    for n in range(4):
        folder = root / "images" / "ab"[n % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 60 * n, np.uint8)).save(folder / f"{n}.png")
        encoded += (folder / f"{n}.png").read_bytes()
        offsets.append(len(encoded))
    np.savez(
        root / "images.npz",
        bytes=np.frombuffer(encoded, np.uint8),
        offsets=np.array(offsets),
        labels=np.array([0, 1] * 2),
    )
    (root / "series.csv").write_text("a,b\n" + "\n".join(f"{n},{n % 7}.5" for n in range(60)) + "\n")
    run("train", "itransformer", "--data", root / "series.csv", "--out", root / "run", *TRAIN)
    recipe = {"method": "rtn", "bits": 4, "group_size": 16, "rules": [{"match": "*.down_proj", "bits": 8}]}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    make_stopped_job(root / "model", root / "stopped")
    names = ("model", "quantized", "model.gguf", "images", "images.npz", "series.csv", "run", "recipe.yaml", "stopped")
    return Sound(root, *(root / name for name in names))


def make_stopped_job(model: Path, out: Path) -> None:
    import tersor

    def stop(what: str, done: int, total: int) -> None:
        if what == "writing":
            raise Hang

    with contextlib.suppress(Hang):
        tersor.compress(model, tersor.RTN(group_size=16), out=out, progress=stop)
    assert (out / ".tersor-job" / "model.layers.0.safetensors").exists()


# ---- kinds of bad input: each makes a damaged copy in a new folder, and gives the commands to try


Commands = list[tuple[object, ...]]


def _on_a_model(draw: Draw, model: Path, folder: Path) -> Commands:
    verb = draw(st.sampled_from(["inspect", "eval", "generate", "quantize", "export", "compress"]))
    more: dict[str, tuple[object, ...]] = {
        "eval": ("--seq-len", 16, "--max-windows", 1),
        "generate": ("--prompt", "a", "--max-new-tokens", 2),
        "quantize": ("--out", folder / "out", "--method", "rtn", "--group-size", 16),
        "export": ("--out", folder / "out.gguf"),
        "compress": ("--out", folder / "out", "--method", "greenformers", "--rank", 0.5),
    }
    return [(verb, model, *more.get(verb, ()))]


def _damaged_model(name: str, change: Callable[[Draw, bytes], bytes], *, quantized: bool = False) -> Any:
    def kind(draw: Draw, sound: Sound, folder: Path) -> Commands:
        model = Path(shutil.copytree(sound.quantized if quantized else sound.model, folder / "model"))
        if name != "model.safetensors.index.json":
            (model / "model.safetensors.index.json").unlink(missing_ok=True)
        (model / name).write_bytes(change(draw, (model / name).read_bytes()))
        if name.endswith(".index.json"):  # which is read where no file has the published name
            (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
        return _on_a_model(draw, model, folder)

    return kind


def _gguf(draw: Draw, sound: Sound, folder: Path) -> Commands:
    path = folder / "model.gguf"
    path.write_bytes(damage(draw, sound.gguf.read_bytes(), where=draw(st.sampled_from([64, 2000, None]))))
    verb = draw(st.sampled_from(["inspect", "generate"]))
    return [(verb, path, *(("--prompt", "a", "--max-new-tokens", 2) if verb == "generate" else ()))]


def _recipe(draw: Draw, sound: Sound, folder: Path) -> Commands:
    path = folder / "recipe.yaml"
    if draw(st.booleans()):
        path.write_text(yaml.safe_dump(changed(draw, yaml.safe_load(sound.recipe.read_text()))))
    elif draw(st.booleans()):
        path.write_text(draw(st.sampled_from(ODD_YAML)))
    else:
        path.write_bytes(damage(draw, sound.recipe.read_bytes()))
    return [("quantize", sound.model, "--out", folder / "out", "--recipe", path, *FEW)]


def _images(draw: Draw, sound: Sound, folder: Path) -> Commands:
    images = Path(shutil.copytree(sound.images, folder / "images"))
    (images / "a" / "0.png").write_bytes(damage(draw, (images / "a" / "0.png").read_bytes()))
    return [("eval", "demo-vit", "--images", images, "--max-images", 2)]


def _npz(draw: Draw, sound: Sound, folder: Path) -> Commands:
    path = folder / "images.npz"
    path.write_bytes(changed_npz(draw, sound.npz.read_bytes()))
    return [("eval", "demo-vit", "--images", path, "--max-images", 2)]


def _series(draw: Draw, sound: Sound, folder: Path) -> Commands:
    path = folder / "series.csv"
    rows = [line.split(",") for line in sound.series.read_text().splitlines()]
    if draw(st.booleans()):
        row = draw(st.sampled_from(rows))
        row[draw(st.integers(0, 1))] = str(draw(st.sampled_from([*ODD_NUMBERS, *ODD_WORDS, "nan", '"', "1,2"])))
        path.write_text("\n".join(",".join(row) for row in rows), errors="replace")
    else:
        path.write_bytes(damage(draw, sound.series.read_bytes()))
    return [("train", "itransformer", "--data", path, "--out", folder / "out", *TRAIN)]


def _table(draw: Draw, sound: Sound, folder: Path) -> Commands:
    """A dated table, wide or long, with odd cells, odd stamps or damaged bytes."""
    wide = draw(st.booleans())
    head = ["date", "a", "b"] if wide else ["unique_id", "ds", "y"]
    hours = [f"2024-01-{1 + n // 24:02}T{n % 24:02}:00" for n in range(60)]
    rows = [[hour, str(n), str(n % 7)] if wide else ["ab"[n % 2], hour, str(n)] for n, hour in enumerate(hours)]
    if not wide:
        rows = [["ab"[half], hour, str(n % 5)] for half in (0, 1) for n, hour in enumerate(hours)]
    rows = [head, *rows]
    for _ in range(draw(st.integers(0, 3))):
        row = draw(st.sampled_from(rows))
        odd = [*ODD_NUMBERS, *ODD_WORDS, "nan", "1,2", "0001-01-01", "9999-12-31T23:59:59+01:00", "2024-01-01 00:00:01"]
        row[draw(st.integers(0, 2))] = str(draw(st.sampled_from(odd)))
    text = "\n".join(",".join(row) for row in rows).encode(errors="replace")
    path = folder / "table.csv"
    path.write_bytes(damage(draw, text) if draw(st.integers(0, 3)) == 0 else text)
    filled = draw(st.sampled_from([(), ("--fill", "linear"), ("--fill", "previous"), ("--fill", "zero")]))
    horizon = draw(st.sampled_from([1, 3, 7, 100]))
    return [
        (
            "forecast",
            draw(st.sampled_from(["ridge", "seasonal-naive", "repeat-last"])),
            "--data",
            path,
            "--horizon",
            horizon,
            *filled,
        ),
        ("backtest", "ridge", "--data", path, "--horizon", 2, "--windows", 3, *filled),
    ]


def _memory(draw: Draw, sound: Sound, folder: Path) -> Commands:
    """A forecaster whose preprocessor_config.json is damaged."""
    run = Path(shutil.copytree(sound.run, folder / "run"))
    file = run / "preprocessor_config.json"
    file.write_bytes(changed_json(draw, file.read_bytes()))
    return [
        ("forecast", run, "--data", sound.series, "--horizon", 6, "--interval", "80"),
        ("backtest", run, "--data", sound.series, "--horizon", 2, "--windows", 3),
    ]


def _training(draw: Draw, sound: Sound, folder: Path) -> Commands:
    import torch

    out = Path(shutil.copytree(sound.run, folder / "run"))
    name = draw(st.sampled_from(["last.pt", "last.pt", "log.csv", "model.safetensors"]))
    data = (out / name).read_bytes()
    if name == "last.pt" and draw(st.booleans()):
        state = torch.load(out / name, weights_only=True)
        key = draw(st.sampled_from(sorted(state)))
        if draw(st.booleans()):
            del state[key]
        else:
            state[key] = draw(st.sampled_from([None, 3, "x", {}, [], {"step": -1}, {"step": "x"}]))
        torch.save(state, out / name)
    else:
        (out / name).write_bytes(damage(draw, data, where=draw(st.sampled_from([400, None]))))
    return [("train", "itransformer", "--data", sound.series, "--out", out, *TRAIN)]


VALUES = st.one_of(st.sampled_from(ODD_NUMBERS), st.sampled_from(ODD_WORDS)).map(
    lambda each: str(each).replace("\0", "?")
)
OPTIONS = {
    "quantize": "samples seq-len seed device dtype format bits group-size damp method experts activations target-tp "
    "include exclude redo calibration recipe",
    "compress": "samples seq-len seed device dtype include exclude calibration method rank",
    "eval": "text seq-len max-windows dtype device images",
    "generate": "max-new-tokens temperature top-k top-p seed dtype device prompt prompt-file",
    "train": "epochs max-steps batch-size lr seed dtype accumulate warmup patience ema config checkpoint validation set",
    "export": "dtype",
    "forecast": "horizon interval season time target id fill device checkpoint",
    "backtest": "horizon windows interval season time target id fill device checkpoint",
}


def _options(draw: Draw, sound: Sound, folder: Path) -> Commands:
    verb = draw(st.sampled_from(sorted(OPTIONS)))
    if verb == "train":
        command: tuple[object, ...] = (verb, "itransformer", "--data", sound.series, "--out", folder / "out", *TRAIN)
    else:
        command = next(each for each in _usual(sound, folder) if each[0] == verb)
    for _ in range(draw(st.integers(1, 2))):
        command = (*command, f"--{draw(st.sampled_from(OPTIONS[verb].split()))}={draw(VALUES)}")
    return [command]


def _usual(sound: Sound, folder: Path) -> Commands:
    return [
        ("eval", sound.model, "--seq-len", 16, "--max-windows", 1),
        ("generate", sound.model, "--prompt", "a", "--max-new-tokens", 2),
        ("quantize", sound.model, "--out", folder / "out", "--method", "rtn", "--group-size", 16),
        ("export", sound.model, "--out", folder / "out.gguf"),
        ("forecast", sound.run, "--data", sound.series, "--horizon", 3),
        ("backtest", sound.run, "--data", sound.series, "--horizon", 2, "--windows", 2),
        ("compress", sound.model, "--out", folder / "out", "--method", "greenformers"),
    ]


def _journal(draw: Draw, sound: Sound, folder: Path) -> Commands:
    """A job that was stopped, with damage to what it left."""
    job = Path(shutil.copytree(sound.stopped, folder / "out")) / ".tersor-job"
    path = draw(st.sampled_from(sorted(job.iterdir())))
    path.write_bytes((changed_json if path.suffix == ".json" else damage)(draw, path.read_bytes()))
    command = ("quantize", sound.model, "--out", folder / "out", "--method", "rtn", "--group-size", 16)
    return [command, (*command, "--overwrite")]


KINDS: dict[str, Callable[[Draw, Sound, Path], Commands]] = {
    "config": _damaged_model("config.json", changed_json),
    "index": _damaged_model("model.safetensors.index.json", changed_json),
    "safetensors": _damaged_model("model.safetensors", changed_safetensors),
    "tokenizer": _damaged_model("tokenizer.json", changed_json),
    "tokenizer config": _damaged_model("tokenizer_config.json", changed_json),
    "generation config": _damaged_model("generation_config.json", changed_json),
    "quantization config": _damaged_model("config.json", changed_json, quantized=True),
    "quantize_config.json": _damaged_model("quantize_config.json", changed_json, quantized=True),
    "packed tensors": _damaged_model("model.safetensors", changed_safetensors, quantized=True),
    "gguf": _gguf,
    "recipe": _recipe,
    "images": _images,
    "packed images": _npz,
    "series": _series,
    "table": _table,
    "forecaster": _memory,
    "training": _training,
    "options": _options,
    "journal": _journal,
}


def files_under(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def try_one(kind: str, draw: Draw, sound: Sound) -> None:
    """One example of a kind: damage, run, look."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        commands = KINDS[kind](draw, sound, folder)
        before = files_under(folder)
        for command in commands:
            ended = run(*command)
            assert command[0] != "eval" or not re.search(r"\bnan\b", ended.out), f"{command}\n{ended.out}"
            said = [line for line in ended.err.splitlines() if line.startswith("tersor: ")]
            assert len(said) <= 1, ended.err
            out = folder / "out"
            if ended.status != 0 and command[0] in ("quantize", "compress", "export"):
                unfinished = (out / ".tersor-job" / "journal.json").exists()
                half = [path for path in (out / "config.json", folder / "out.gguf") if path.exists() and not unfinished]
                assert not half, f"half-written by {command}\n{ended.err}"
            if command[0] != "train" and kind != "journal":
                after = files_under(folder)
                assert {name: after.get(name) for name in before} == before, f"changed by {command}"
        if kind == "journal" and ended.status != 0:
            raise AssertionError(f"the way out does not work: {commands[-1]}\n{ended.err}")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    pytest.importorskip("gguf", reason="needs the package gguf")
    pytest.importorskip("PIL", reason="needs Pillow")
    return make_sound_files(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_one_line(sound: Sound, kind: str) -> None:
    _search(kind, sound, DEAR.get(kind, EXAMPLES), number=0)


def _search(
    kind: str, sound: Sound, examples: int, *, number: int, failed: Callable[[str], None] | None = None
) -> None:
    """Try so many examples. failed: takes what went wrong with one, where the search is to go on."""

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def search(data: Any) -> None:
        try:
            try_one(kind, data.draw, sound)
        except AssertionError as error:
            if failed is None:
                raise
            failed(f"{kind}: {error}")

    search()


def _note(failures: dict[str, str], text: str) -> None:
    """Print a failure, if none like it, from the same place, was there before."""
    lines = text.splitlines()
    where = next((line.strip() for line in reversed(lines) if "src/tersor" in line), "")
    key = f"{lines[0].partition(':')[0]}: {lines[-1][:200]} {where}"
    if failures.setdefault(key, text) is text:
        print(f"--- {key}\n    {lines[0][:300]}", flush=True)


def main() -> None:
    """The long form: goes on after a failure, and prints each once, by where it comes from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=200, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, action="append")
    chosen = parser.parse_args()
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        sound = make_sound_files(Path(folder))
        for kind in chosen.only or KINDS:
            _search(kind, sound, chosen.examples, number=chosen.seed, failed=lambda text: _note(failures, text))
    print(f"{len(failures)} kinds of failure")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
