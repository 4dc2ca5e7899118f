"""A checkpoint many times larger than the memory that a job is allowed, and what is said of memory before it starts."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ran, files_of
from safetensors import safe_open
from safetensors.torch import save_file
from zoo.tiny_models import build, samples

import tersor
from tersor import GPTQ, TersorError

BLOCKS, WIDTH, INNER = 96, 512, 1376
MEGABYTE = 2**20

# The limit is on what a process may write to: its heap, stacks and private mappings (RLIMIT_DATA). It is set once everything is
# imported, as so much above what is taken then; files that are mapped to be read do not count, as they can be dropped.
JOB = """
import json, resource, sys
import torch, tersor
import transformers.models.llama.modeling_llama, transformers.conversion_mapping, transformers.core_model_loading
from pathlib import Path
torch.set_num_threads(1)
model, out, allowed = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.linalg.cholesky_ex(torch.eye(64)), torch.randn(64, 64) @ torch.randn(64, 64)
before = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (before + allowed, before + allowed))
batches = [{"input_ids": torch.randint(3, 500, (1, 32), generator=torch.Generator().manual_seed(n))} for n in range(4)]
news = []
result = tersor.compress(
    model,
    tersor.GPTQ(bits=4, group_size=32),
    rules=[{"match": "model.layers.[1-9]*", "method": "rtn", "group_size": 32}],  # the first block shows the peak
    calibration=batches, out=out, progress=lambda what, done, total: news.append(what) if total == 0 else None,
)
print(json.dumps([news, len(result.summary.layers), result.summary.peak_memory]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.2 GB of float32 in shards of two blocks."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("models") / "large"
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=BLOCKS,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    config.save_pretrained(folder)
    shapes = {f"self_attn.{each}_proj": (WIDTH, WIDTH) for each in "qkvo"}
    shapes |= {"mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH), "mlp.down_proj": (WIDTH, INNER)}
    generator = torch.Generator().manual_seed(0)
    # One block's numbers under all names: what is in them does not matter here, and making them takes long.
    block = {f"{name}.weight": torch.randn(shape, generator=generator) * WIDTH**-0.5 for name, shape in shapes.items()}
    block |= {f"{name}.weight": torch.ones(WIDTH) for name in ("input_layernorm", "post_attention_layernorm")}
    outside = {"model.norm.weight": torch.ones(WIDTH)}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        outside[name] = torch.randn(512, WIDTH, generator=generator) * WIDTH**-0.5
    weight_map = dict.fromkeys(outside, "outside.safetensors")
    save_file(outside, folder / "outside.safetensors")
    for first in range(0, BLOCKS, 2):
        shard = {f"model.layers.{n}.{name}": t.clone() for n in (first, first + 1) for name, t in block.items()}
        save_file(shard, folder / f"blocks-{first}.safetensors")
        weight_map |= dict.fromkeys(shard, f"blocks-{first}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not hold a process to RLIMIT_DATA")
def test_a_checkpoint_many_times_larger_than_the_memory_allowed(large: Path, tmp_path: Path) -> None:
    allowed = 400 * MEGABYTE
    size = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    assert size > 2.5 * allowed
    command = [sys.executable, "-c", JOB, str(large), str(tmp_path / "out"), str(allowed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    news, layers, peak = json.loads(done.stdout)
    assert layers == 7 * BLOCKS
    (said,) = re.findall(r"^forecast: .*?([\d.]+) GB of memory, ([\d.]+) GB of disk$", "\n".join(news))
    assert peak / 2 < float(said[0]) * 1e9 < 2 * peak
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert len([name for name in file.keys() if name.endswith("qweight")]) == 7 * BLOCKS  # noqa: SIM118


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_where_activations_wait_changes_nothing_of_the_result(
    small_source: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tersor.calibrate.activations.SMALLEST", 1)
    for out, activations in (("device", "device"), (place, place)):
        tersor.compress(
            small_source, GPTQ(group_size=32), samples=3, seq_len=32, out=tmp_path / out, activations=activations
        )
    assert files_of(tmp_path / place) == files_of(tmp_path / "device")


def test_the_forecast_is_printed_before_anything_is_solved(
    tersor_command: Callable[..., Ran], small_source: Path, tmp_path: Path
) -> None:
    command = ("quantize", small_source, "--out", tmp_path / "out", "--group-size", 32, "--samples", 2, "--seq-len", 32)
    ran = tersor_command(*command)
    assert ran.status == 0
    (line,) = ran.err.splitlines()
    found = re.fullmatch(r"forecast: \d+ (s|min), ([\d.]+) GB of memory, ([\d.]+) GB of disk", line)
    assert found
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    assert held / 2 < float(found[2]) < 2 * held
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert float(found[3]) == pytest.approx(2 * written / 1e9, abs=0.006)  # blocks, and the file made of them


# ---- pickled checkpoints


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    folder = tmp_path / "pickled"
    model = build("llama")
    model.save_pretrained(folder)  # type: ignore[operator]
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def test_pickled_weights_are_refused_with_the_reason(pickled: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TersorError, match=r"only pickled weights \(pytorch_model\.bin\), which can run code.*--allow-pickle"
    ):
        tersor.compress(pickled, GPTQ(group_size=32), calibration=samples("llama", 2), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_read_like_safetensors_where_allowed(pickled: Path, tmp_path: Path, name: str) -> None:
    (pickled / "pytorch_model.bin").rename(pickled / name)
    build("llama").save_pretrained(tmp_path / "safe")  # type: ignore[operator]
    for model, out in ((pickled, "one"), (tmp_path / "safe", "other")):
        tersor.compress(
            model, GPTQ(group_size=32), calibration=samples("llama", 2), out=tmp_path / out, allow_pickle=True
        )
    one, other = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "other"))
    assert one == other
    assert not (tmp_path / "one" / name).exists()


class Payload:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def test_code_in_a_pickle_does_not_run(pickled: Path, tmp_path: Path) -> None:
    torch.save({"weight": Payload(f"touch {tmp_path}/ran")}, pickled / "pytorch_model.bin")
    with pytest.raises(TersorError, match=r"pytorch_model\.bin cannot be read as weights only"):
        tersor.compress(pickled, GPTQ(group_size=32), calibration=samples("llama", 2), allow_pickle=True)
    assert not (tmp_path / "ran").exists()


# ---- serving on several devices


@pytest.mark.parametrize(
    ("layers", "devices", "group_size", "said"),
    [
        ("q_proj", 3, 32, r"its 64 outputs do not split over 3 devices in whole words of 32; --target-tp 2 would work"),
        ("o_proj", 2, 64, r"its 64 inputs do not split over 2 devices in whole groups of 64; .* or --target-tp 1"),
        ("down_proj", 3, 64, r"its 128 inputs do not split over 3 devices in whole groups of 64; .* or --target-tp 2"),
        ("o_proj", 0, 32, "target_tp=0 must be positive"),
    ],
)
def test_a_layout_that_does_not_split_is_refused_with_what_would(
    layers: str, devices: int, group_size: int, said: str
) -> None:
    with pytest.raises(TersorError, match=said):
        tersor.compress(
            build("llama"),
            GPTQ(group_size=group_size),
            calibration=samples("llama", 1),
            target_tp=devices,
            include=[f"*.{layers}"],
        )


def test_a_layout_that_splits_is_taken() -> None:
    exclude = ["*.k_proj", "*.v_proj"]  # 32 outputs each
    tersor.compress(build("llama"), GPTQ(group_size=32), calibration=samples("llama", 1), target_tp=2, exclude=exclude)
