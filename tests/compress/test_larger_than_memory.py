"""A checkpoint many times larger than the memory that a job is allowed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

BLOCKS, WIDTH, INNER = 64, 512, 1376
MEGABYTE = 2**20

# The limit is on what a process may write to: its heap, stacks and private mappings (RLIMIT_DATA). It is set once everything is
# imported, as so much above what is taken then; files that are mapped to be read do not count, as they can be dropped.
JOB = """
import json, resource, sys
import torch, tersor, tersor.checkpoint.writer
import transformers.models.llama.modeling_llama, transformers.conversion_mapping, transformers.core_model_loading
from pathlib import Path
torch.set_num_threads(1)
tersor.checkpoint.writer.SINGLE_FILE_LIMIT = 10**8  # as a result of this many times the memory would be, it is kept in shards
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
    """0.8 GB of float32 in shards of two blocks."""
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
    allowed = 192 * MEGABYTE
    size = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    assert size > 4 * allowed
    command = [sys.executable, "-c", JOB, str(large), str(tmp_path / "out"), str(allowed)]
    # One arena, and large blocks given back at once: what counts is what the job holds, not how the heap is cut up by then.
    heap = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "262144"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **heap}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    news, layers, peak = json.loads(done.stdout)
    assert layers == 7 * BLOCKS
    (said,) = re.findall(r"^forecast: .*?([\d.]+) GB of memory, ([\d.]+) GB of disk$", "\n".join(news), re.M)
    assert peak / 2 < float(said[0]) * 1e9 < 2 * peak
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len([name for name in index["weight_map"] if name.endswith("qweight")]) == 7 * BLOCKS
