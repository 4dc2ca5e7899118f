"""The most memory that quantizing a checkpoint of 2 GB takes, here and in other tools.

    python -m venv OTHER && OTHER/bin/pip install llmcompressor        # or gptqmodel; an environment each
    python benchmarks/peak_memory.py --llmcompressor OTHER/bin/python --gptqmodel ANOTHER/bin/python --write

A LLaMA of 34 blocks (width 1024, feed-forward 2816, vocabulary of 32,000) with random float32 weights is written in shards of
five blocks. Each tool quantizes it to 4 bits, symmetric, in groups of 128 by GPTQ, on the CPU, from the same 4 samples of 64
tokens, with its own defaults for everything else, in a process of its own. "Resident" is what the kernel counted for that
process at its peak, with the libraries and the pages of mapped files, which it can drop when they are wanted elsewhere; "of its
own" leaves mapped files out (RssAnon, looked at ten times a second). The row "only its imports" is a process that imports the
tool and ends. gptqmodel 7.7 does not start on a machine of two cores, and is told here that there are four.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from common import processor, write_table
from safetensors.torch import save_file
from torch import Tensor

WIDTH, INNER, HEADS, VOCABULARY, TOGETHER = 1024, 2816, 16, 32_000, 5
SAMPLES, TOKENS = 4, 64

IMPORTS = {
    "tersor": "import tersor, transformers.models.llama.modeling_llama",
    "llmcompressor": "import llmcompressor, llmcompressor.modifiers.quantization",
    "gptqmodel": "import gptqmodel",
}
JOBS = {
    "tersor": """
import json, sys, torch, tersor
model, out, samples = sys.argv[1:]
batches = [{"input_ids": torch.tensor([each])} for each in json.load(open(samples))]
tersor.compress(model, tersor.GPTQ(bits=4, group_size=128), calibration=batches, out=out, device="cpu")
""",
    "llmcompressor": """
import json, sys
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM
model, out, samples = sys.argv[1:]
rows = [{"input_ids": each, "attention_mask": [1] * len(each)} for each in json.load(open(samples))]
oneshot(
    model=AutoModelForCausalLM.from_pretrained(model, dtype="auto"),
    dataset=Dataset.from_list(rows),
    recipe=GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"]),
    max_seq_length=len(rows[0]["input_ids"]),
    num_calibration_samples=len(rows),
    output_dir=out,
)
""",
    "gptqmodel": """
import json, os, sys
os.cpu_count = lambda cores=os.cpu_count(): max(4, cores)
from gptqmodel import GPTQModel, QuantizeConfig
model, out, samples = sys.argv[1:]
found = GPTQModel.load(model, QuantizeConfig(bits=4, group_size=128, device="cpu"))
rows = [{"input_ids": each, "attention_mask": [1] * len(each)} for each in json.load(open(samples))]
found.quantize(rows, batch_size=1)
found.save(out)
""",
}


@dataclass(frozen=True)
class Peak:
    """Bytes and seconds of one process."""

    resident: int
    own: int
    seconds: float


def write_checkpoint(folder: Path, blocks: int) -> None:
    """A LLaMA with random weights, of which no more than one shard is ever in memory."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    def block(n: int) -> dict[str, Tensor]:
        shapes = {f"self_attn.{each}_proj": (WIDTH, WIDTH) for each in "qkvo"}
        shapes |= {"mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH), "mlp.down_proj": (WIDTH, INNER)}
        maps = {f"model.layers.{n}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        return maps | {f"model.layers.{n}.{name}.weight": torch.ones(WIDTH) for name in norms}

    weight_map: dict[str, str] = {}

    def save(tensors: dict[str, Tensor]) -> None:
        name = f"model-{len(set(weight_map.values())):05d}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    save({"model.embed_tokens.weight": matrix(VOCABULARY, WIDTH), "lm_head.weight": matrix(VOCABULARY, WIDTH)})
    save({"model.norm.weight": torch.ones(WIDTH)})
    for first in range(0, blocks, TOGETHER):
        save({name: t for n in range(first, min(first + TOGETHER, blocks)) for name, t in block(n).items()})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": blocks,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    _write_tokenizer(folder)


def _write_tokenizer(folder: Path) -> None:
    """A tokenizer of one word a token: the samples are tokens already, but some tools want one to be there."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    ).save_pretrained(folder)


def measure(command: list[str], log: Path) -> Peak:
    """Run to the end. Raises RuntimeError where the command fails."""
    started = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=log.parent)
        own = [0]
        watch = threading.Thread(target=_watch, args=(process.pid, own), daemon=True)
        watch.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    watch.join()
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:2])} failed: {log.read_text()[-3000:]}")
    return Peak(usage.ru_maxrss * 1024, own[0], time.perf_counter() - started)


def _watch(process: int, most: list[int]) -> None:
    while True:
        try:
            status = Path(f"/proc/{process}/status").read_text()
        except OSError:
            return
        found = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
        if not found:
            return  # ended
        most[0] = max(most[0], int(found[0]) * 1024)
        time.sleep(0.1)


def version_of(python: str, package: str) -> str:
    ask = f"from importlib.metadata import version as v; print(v('{package}'), 'torch', v('torch'))"
    found = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.split()
    return f"{package} {found[0]} ({found[1]} {found[2]})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for tool in list(JOBS)[1:]:
        parser.add_argument(f"--{tool}", help=f"interpreter of an environment that has {tool}")
    parser.add_argument("--blocks", type=int, default=34, help="for a try on something smaller")
    parser.add_argument("--folder", type=Path, help="where to put the checkpoint and the results; needs 5 GB")
    parser.add_argument("--write", action="store_true", help="keep the table in peak_memory.md")
    options = parser.parse_args()
    tools = {"tersor": sys.executable} | {t: p for t in list(JOBS)[1:] if (p := getattr(options, t)) is not None}
    lines = ["| | resident, GB | of its own, GB | minutes |", "| --- | ---: | ---: | ---: |"]

    def row(what: str, peak: Peak, minutes: str) -> None:
        lines.append(f"| {what} | {peak.resident / 1e9:.2f} | {peak.own / 1e9:.2f} | {minutes} |")
        print(lines[-1], flush=True)

    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write_checkpoint(folder / "model", options.blocks)
        size = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, VOCABULARY, (SAMPLES, TOKENS), generator=generator).tolist()
        (folder / "samples.json").write_text(json.dumps(ids))
        for tool, python in tools.items():
            label = version_of(python, tool)
            row(f"{label}, only its imports", measure([python, "-c", IMPORTS[tool]], folder / "log.txt"), "")
            paths = [str(folder / each) for each in ("model", f"out-{tool}", "samples.json")]
            peak = measure([python, "-c", JOBS[tool], *paths], folder / "log.txt")
            row(label, peak, f"{peak.seconds / 60:.1f}")
    machine = f"{processor()}, {os.cpu_count()} cores, shared with other work; {platform.system()}"
    threads = os.environ.get("OMP_NUM_THREADS", "as many as cores")
    text = (
        f"# Peak memory of quantizing a checkpoint of {size / 1e9:.2f} GB\n\n"
        + "\n".join(lines)
        + f"\n\n{(__doc__ or '').partition('--write')[2].strip()}\n\nMachine: {machine}; OMP_NUM_THREADS: {threads}.\n"
        "Command: as in `benchmarks/peak_memory.py`.\n"
    )
    print(text)
    if options.write:
        write_table("peak_memory", text)


if __name__ == "__main__":
    main()
