"""Files that others made, broken in every way: one line on standard error, no hang, and nothing allocated for what they claim."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran, change_json, change_tensors
from safetensors.torch import load_file, save_file

from tersor.checkpoint.source import open_checkpoint
from tersor.data.seeding import mixed_seed
from tersor.data.text import read_text
from tersor.errors import TersorError
from tersor.models.loading import read_state
from tersor.runtime.sampling import Sampling, choose, probabilities
from tersor.train.checkpoint import load_run
from tersor.untrusted import check_config, matches, read_json, read_yaml

Command = Callable[..., Ran]


def one_line(ran: Ran, *expected: str) -> None:
    assert ran.status == 2, ran
    assert len(ran.err.strip().splitlines()) == 1, ran.err
    assert ran.err.startswith("tersor: ")
    for words in expected:
        assert words in ran.err


# ---- configs


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 10_000_000},
        {"num_hidden_layers": 10**400},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": "two"},
        {"num_hidden_layers": True},
        {"hidden_size": -64},
        {"hidden_size": 2**40},
        {"vocab_size": 10**15},
        {"num_labels": 10**9},
        {"num_local_experts": 10**9},
        {"intermediate_size": float("inf")},
        {"text_config": {"num_hidden_layers": 10**7}},
        {"depths": [2, 10**7]},
    ],
)
def test_a_config_that_names_more_than_the_file_holds(small_source: Path, values: dict[str, Any]) -> None:
    config = json.loads((small_source / "config.json").read_text()) | values
    with pytest.raises(TersorError, match=r"config\.json: "):
        check_config("config.json", config, tensors=22, size=5_000_000)


def test_configs_of_real_shape_pass() -> None:
    check_config(
        "config.json",
        {
            "num_hidden_layers": 61,
            "n_routed_experts": 256,
            "hidden_size": 7168,
            "sliding_window": None,
            "depths": [2, 2],
        }
        | {
            "mlp_only_layers": [],
            "vision_feature_layer": -2,
            "layer_types": ["full"] * 61,
            "num_nextn_predict_layers": 0,
        },
        tensors=90_000,
        size=700 << 30,
    )


def test_ten_million_layers_are_refused_by_every_verb(tersor_command: Command, small: Path, tmp_path: Path) -> None:
    change_json(small / "config.json", num_hidden_layers=10_000_000)
    for verb in (("inspect", small), ("eval", small), ("generate", small, "--prompt", "a"), ("bench", small)):
        one_line(tersor_command(*verb), "num_hidden_layers is 10000000")
    one_line(tersor_command("quantize", small, "--out", tmp_path / "out"), "num_hidden_layers is 10000000")


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a":' * 90 + b"1" + b"}" * 90, b"\xff\xfe", b'{"a": ' + b"9" * 9000 + b"}", b""]
)
def test_json_that_is_none_or_too_deep(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(TersorError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


# ---- paths


@pytest.mark.parametrize("name", ["/etc/passwd", "../other/model.safetensors", "a/../../b", "", 3, None, "a\0b", ["a"]])
def test_an_index_may_only_name_files_of_its_directory(tersor_command: Command, small: Path, name: Any) -> None:
    (small / "model.safetensors").unlink()  # which would be read first
    (small / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    one_line(tersor_command("inspect", small), "is not a safetensors index")


@pytest.mark.parametrize("name", ["/etc/passwd", "../other/model.safetensors"])
def test_a_config_may_only_name_weights_of_its_directory(tersor_command: Command, small: Path, name: str) -> None:
    change_json(small / "config.json", transformers_weights=name)
    one_line(tersor_command("inspect", small), f"names the file '{name}', which lies outside of it")


@pytest.mark.parametrize("start", ["{", "[", "- ", "? "])
def test_yaml_that_is_nested_without_end_is_given_up_at_once(tmp_path: Path, start: str) -> None:
    (tmp_path / "a.yaml").write_text(start * 100_000)
    with pytest.raises(TersorError, match=r"a\.yaml (is nested more than 64 deep|is not valid YAML)"):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model-00002.safetensors", "generation_config.json"])
def test_a_fifo_does_not_hang(tersor_command: Command, small: Path, name: str) -> None:
    (small / name).unlink(missing_ok=True)
    os.mkfifo(small / name)
    one_line(tersor_command("eval", small), "is no regular file")


def test_a_fifo_in_the_place_of_an_option(tersor_command: Command, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for options in (("eval", "demo", "--text"), ("generate", "demo", "--prompt-file"), ("train", "vit", "--config")):
        more = ("--data", tmp_path, "--out", tmp_path / "out") if options[0] == "train" else ()
        one_line(tersor_command(*options, tmp_path / "pipe", *more))


@pytest.mark.parametrize("name", ["x" * 5000, "/".join(["x" * 200] * 50)])
def test_a_path_that_is_too_long(tersor_command: Command, tmp_path: Path, name: str) -> None:
    for verb in (
        ("inspect", name),
        ("eval", "demo", "--text", name),
        ("eval", "demo-vit", "--images", name),
        ("generate", "demo", "--prompt-file", name),
        ("quantize", "demo", "--out", tmp_path / "out", "--recipe", name),
        ("sweep", name, "--out", tmp_path / "out"),
    ):
        one_line(tersor_command(*verb))


# ---- texts, recipes, patterns


def test_corrupt_gzip_and_gzip_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = bytearray(gzip.compress(b"some text " * 400, mtime=0))
    for place in range(0, len(packed), 7):
        damaged = bytes(packed[:place]) + bytes([packed[place] ^ 0x55]) + bytes(packed[place + 1 :])
        (tmp_path / "a.gz").write_bytes(damaged)
        try:
            read_text(tmp_path / "a.gz")
        except TersorError:
            continue
    monkeypatch.setattr("tersor.untrusted.read_bytes.__kwdefaults__", {"most": 5000})
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(b" " * 1_000_000))
    with pytest.raises(TersorError, match="unpacks to more than 5,000 bytes"):
        read_text(tmp_path / "bomb.gz")


@pytest.mark.parametrize(
    "content",
    [
        "method: [gptq, rtn]",
        "method: {a: 1}",
        "bits: [3, 4]",
        "bits: true",
        "desc_act: 3",
        "desc_act: [true]",
        "damp: lots",
        "rules: 5",
        "rules: [5]",
        "rules: [{match: [a], bits: 4}]",
        "rules: [{match: a, method: [rtn]}]",
        "rules: [{match: a, skip: maybe}]",
        "rules: &a [*a]",
        "&a [*a]",
        "a: &a {b: *a}",
        "1: gptq",
        "? [a]\n: b",
        "bits: 2026-13-45",
        "bits: !!int x",
        "a: &a [x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\n"
        "c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b]\nd: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c]\n"
        "e: &e [*d, *d, *d, *d, *d, *d, *d, *d, *d]\nf: [*e, *e, *e, *e, *e, *e, *e, *e, *e]",
        "[" * 5000,
    ],
)
def test_a_recipe_with_the_wrong_kind_of_value(tersor_command: Command, tmp_path: Path, content: str) -> None:
    (tmp_path / "r.yaml").write_text(content)
    one_line(tersor_command("quantize", "demo", "--out", tmp_path / "out", "--recipe", tmp_path / "r.yaml"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content",
    [
        "model: {a: 1}",
        "model: [[demo]]",
        "model: 3",
        "model: demo\nmethod: [[gptq]]",
        "model: demo\ncalibration: 5",
        "model: demo\ninclude: [3]",
        "model: demo\nsamples: true",
        "model: demo\neval: {seq_len: wide}",
        "model: demo\neval: {text: [a]}",
        "model: demo\nbits: &a [*a]",
        "model: demo\n"
        + "".join(f"{key}: [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" for key in ("bits", "samples", "seed", "seq_len"))
        + "group_size: [1, 2, 3, 4, 5, 6, 7, 8, 9]",
    ],
)
def test_a_sweep_with_the_wrong_kind_of_value(tersor_command: Command, tmp_path: Path, content: str) -> None:
    (tmp_path / "s.yaml").write_text(content)
    one_line(tersor_command("sweep", tmp_path / "s.yaml", "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "127.0.0.1:99999", "nonsense", "http://a/b"])
def test_a_ray_address_that_does_not_answer(tersor_command: Command, tmp_path: Path, address: str) -> None:
    (tmp_path / "s.yaml").write_text("model: demo")
    one_line(tersor_command("sweep", tmp_path / "s.yaml", "--out", tmp_path / "out", "--ray", address), address)


def test_yaml_with_plain_aliases_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &a {bits: 4}\nb: *a\n")
    assert read_yaml(tmp_path / "a.yaml") == {"a": {"bits": 4}, "b": {"bits": 4}}


@pytest.mark.parametrize("pattern", [r"(m|a+)+\.$", r"(.*a){25}x", r"(.+)+\d+!", "(", "(" * 3000, "a" * 9000, None])
def test_a_pattern_that_runs_for_ever_or_is_none(
    pattern: str | None, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tersor.untrusted.SECONDS_A_PATTERN", 0.05)
    name = "m" + "a" * 40
    if pattern is None or len(pattern) > 20 or pattern == "(":
        with pytest.raises(TersorError, match="pattern"):
            matches(pattern, name)
    else:
        try:
            assert not matches(pattern, name)
        except TersorError as error:
            assert "could run for ever" in str(error)  # noqa: PT017


# ---- weights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named_by_every_verb(
    tersor_command: Command, small: Path, tmp_path: Path, value: float
) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value

    change_tensors(small, damage)
    for verb in (
        ("eval", small, "--seq-len", 32, "--max-windows", 1),
        ("generate", small, "--prompt", "a"),
        ("compress", small, "--method", "greenformers", "--out", tmp_path / "a"),
        ("quantize", small, "--method", "rtn", "--group-size", 32, "--out", tmp_path / "b"),
    ):
        one_line(tersor_command(*verb), "model.layers.1.mlp.up_proj.weight is not finite")


@pytest.fixture(scope="module")
def packed_source(small_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tersor

    out = tmp_path_factory.mktemp("packed") / "out"
    tersor.compress(str(small_source), tersor.RTN(bits=4, group_size=32), out=out)
    return out


def altered(source: Path, folder: Path, suffix: str | None, change: Callable[[Any], Any], **config: Any) -> Path:
    """The packed model with one tensor of one layer changed, or its quantization config."""
    folder.mkdir()
    for each in filter(Path.is_file, source.iterdir()):
        (folder / each.name).write_bytes(each.read_bytes())
    if config:
        said = json.loads((folder / "config.json").read_text())
        change_json(folder / "config.json", quantization_config=said["quantization_config"] | config)
    if suffix is not None:
        path = next(folder.glob("*.safetensors"))
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        name = f"model.layers.0.mlp.up_proj.{suffix}"
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, path, {"format": "pt"})
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    return folder


PACKED: dict[str, tuple[str | None, Callable[[Any], Any], dict[str, Any]]] = {
    "bits 0": (None, lambda t: t, {"bits": 0}),
    "bits 8": (None, lambda t: t, {"bits": 8}),
    "bits 64": (None, lambda t: t, {"bits": 64}),
    "bits text": (None, lambda t: t, {"bits": "four"}),
    "bits list": (None, lambda t: t, {"bits": [4]}),
    "group size 0": (None, lambda t: t, {"group_size": 0}),
    "group size 64": (None, lambda t: t, {"group_size": 64}),
    "group size -7": (None, lambda t: t, {"group_size": -7}),
    "dynamic list": (None, lambda t: t, {"dynamic": [1]}),
    "dynamic bits": (None, lambda t: t, {"dynamic": {"+:.*": {"bits": 0}}}),
    "float g_idx": ("g_idx", lambda t: t.float(), {}),
    "long qweight": ("qweight", lambda t: t.long(), {}),
    "float qweight": ("qweight", lambda t: t.float(), {}),
    "integer scales": ("scales", lambda t: t.int(), {}),
    "narrow scales": ("scales", lambda t: t[:, :-1], {}),
    "short qzeros": ("qzeros", lambda t: t[:-1], {}),
    "flat qweight": ("qweight", lambda t: t.flatten(), {}),
}


@pytest.mark.parametrize("what", PACKED)
def test_packed_tensors_that_are_not_what_the_config_says(
    tersor_command: Command, packed_source: Path, tmp_path: Path, what: str
) -> None:
    suffix, change, config = PACKED[what]
    model = altered(packed_source, tmp_path / "m", suffix, change, **config)
    one_line(tersor_command("inspect", model))
    one_line(tersor_command("eval", model, "--seq-len", 16, "--max-windows", 1))


def test_infinite_scales_and_scales_of_zero(tersor_command: Command, packed_source: Path, tmp_path: Path) -> None:
    for n, value in enumerate((float("nan"), float("inf"), 0.0)):
        model = altered(
            packed_source, tmp_path / str(n), "scales", lambda t, v=value: t.index_fill(1, torch.tensor([3]), v)
        )
        one_line(tersor_command("eval", model, "--seq-len", 16, "--max-windows", 1), "scales")


# ---- pickles and runs


class _Expanded:
    """A tensor that claims a petabyte and stores eight bytes."""

    @staticmethod
    def make() -> torch.Tensor:
        return torch.zeros(1, dtype=torch.float64).expand(1 << 25, 1 << 22)


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x02", b"PK\x03\x04 cut off", bytes(range(256))])
def test_bytes_that_are_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    for name in ("pytorch_model.bin", "a.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TersorError):
            read_state(tmp_path / name)
    (tmp_path / "a.safetensors").unlink()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TersorError):
        open_checkpoint(tmp_path, allow_pickle=True)
    (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(TersorError, match=r"last\.pt"):
        load_run(tmp_path, {}, {}, torch.device("cpu"))


def test_a_pickled_tensor_that_claims_more_than_it_stores(tmp_path: Path) -> None:
    torch.save({"w": _Expanded.make()}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TersorError, match="fewer values"):
        open_checkpoint(tmp_path, allow_pickle=True)
    with pytest.raises(TersorError, match="fewer values"):
        read_state(tmp_path / "pytorch_model.bin")


RUN = {"step": 1, "best": 0.5, "best_step": 1, "since_best": 0, "validation": {}}


@pytest.mark.parametrize(
    "state",
    [
        [1],
        {"model": {}},
        {"settings": {}, "run": {}, "model": {}},
        {"settings": {}, "run": {**RUN, "step": "one"}, "model": {}},
        {"settings": {}, "run": {**RUN, "step": -1}, "model": {}},
        {"settings": {}, "run": {**RUN, "validation": {"loss": "low"}}, "model": {}},
        {"settings": {}, "run": RUN, "model": {"weight": torch.zeros(3)}},
        {"settings": {}, "run": RUN, "model": {"weight": torch.full((1, 1), float("nan")), "bias": torch.zeros(1)}},
    ],
)
def test_a_foreign_run_is_not_gone_on_with(tmp_path: Path, state: Any) -> None:
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(TersorError, match="choose another folder"):
        load_run(tmp_path, {"model": torch.nn.Linear(1, 1)}, {}, torch.device("cpu"))


# ---- options


@pytest.mark.parametrize(
    "options",
    [
        ("eval", "demo", "--device", "mps"),
        ("eval", "demo", "--device", "xla"),
        ("generate", "demo", "--prompt", "a", "--device", "meta"),
        ("bench", "demo", "--device", "cuda:77"),
        ("bench", "demo", "--threads", 10**9),
        ("bench", "demo", "--prompt-tokens", 10**9),
        ("generate", "demo", "--prompt", "a", "--temperature", 1e-40),
        ("generate", "demo", "--prompt", "a", "--temperature", 1, "--seed", 2**64),
        ("generate", "demo", "--prompt", "a", "--max-new-tokens", 10**12),
        ("quantize", "demo", "--out", "{out}", "--samples", 100_000_000),
        ("quantize", "demo", "--out", "{out}", "--seed", 2**64),
        ("quantize", "demo", "--out", "{out}", "--seed", -(2**63) - 1),
        ("train", "vit", "--data", "{out}", "--out", "{out}", "--workers", 10**6),
        ("train", "vit", "--data", "{out}", "--out", "{out}", "--seed", 2**80),
        ("train", "vit", "--data", "{out}", "--out", "{out}", "--device", "meta"),
    ],
)
def test_options_beyond_reason(tersor_command: Command, tmp_path: Path, options: tuple[object, ...]) -> None:
    one_line(tersor_command(*(str(each).replace("{out}", str(tmp_path / "out")) for each in options)))
    assert not (tmp_path / "out").exists()


def test_sampling_is_finite_for_every_temperature_that_is_taken() -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0], [1.0, 1.0001, -5.0]])
    for temperature in (1e-4, 1.0, 1e30):
        assert torch.isfinite(probabilities(logits, Sampling(temperature=temperature))).all()
    with pytest.raises(TersorError, match="not finite"):
        choose(torch.tensor([[float("nan"), 1.0]]), Sampling(), torch.Generator())
    with pytest.raises(TersorError, match="64 bits"):
        mixed_seed(2**64)
