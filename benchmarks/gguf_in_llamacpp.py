"""Does llama.cpp load the GGUF files that tersor writes, compute the same and cut text into the same tokens?

    uv venv other && uv pip install --python other/bin/python llama-cpp-python
    python benchmarks/gguf_in_llamacpp.py --python other/bin/python --write

llama-cpp-python compiles llama.cpp when it is installed, so this is run by hand. The built-in model is exported as it is (as
float32 and bfloat16) and after GPTQ at several grids; small random models stand for the other architectures, for biases and for
rotary scalings. llama.cpp computes the logits of 100 tokens in the other environment; the table shows how far they are from
tersor's in float32, relative to their norm. llama.cpp rounds what a quantized layer multiplies to 8 bits in groups of 32, which
tersor does not do: what that rounding alone moves is shown beside it, by tersor's own layers with inputs rounded the same way.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, write_table
from torch import Tensor, nn

import tersor
from tersor import GPTQ
from tersor.checkpoint.load import load_tokenizer
from tersor.checkpoint.source import resolve
from tersor.layers.quantized_linear import QuantizedLinear

THERE = """
import json, sys
import llama_cpp, numpy
job = json.load(open(sys.argv[1]))
found = []
for case in job["cases"]:
    # one sequence in one batch, attention in float32 as far as llama.cpp keeps it so
    model = llama_cpp.Llama(case["path"], n_ctx=256, n_batch=256, n_ubatch=256, logits_all=True, verbose=False,
                            type_k=0, type_v=0, flash_attn=False, n_threads=1)
    model.eval(case["ids"])
    numpy.save(case["path"] + ".npy", model.scores[: len(case["ids"])].astype("float32"))
    found.append([model.tokenize(text.encode(), add_bos=True, special=True) for text in job["texts"]])
json.dump({"tokens": found, "version": llama_cpp.__version__}, open(sys.argv[1] + ".out", "w"))
"""
TEXTS = (
    "It is a truth universally acknowledged, that 1234 men\nin possession of $5.50  must be in want of a wife.",
    "def f(x):\n\treturn [x ** 2 for _ in range(10)]  # don't\r\n\r\n",
    "naïve café, Привет, 你好 🙂 — ½ ",
    "<|endoftext|>After the end.",
)
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", required=True, help="interpreter of the environment that has llama-cpp-python")
    parser.add_argument("--write", action="store_true", help="keep the table in gguf_in_llamacpp.md")
    options = parser.parse_args()
    ids = torch.arange(50, 150)
    with tempfile.TemporaryDirectory() as folder:
        rows, cases = [], []
        for name, model, dtype in models(Path(folder)):
            path = Path(folder) / f"{len(cases)}.gguf"
            exported = tersor.export(model, path, dtype=dtype)
            types = ", ".join(
                f"{n} {kind}" for kind, n in exported.types.items() if kind != "F32" or len(exported.types) == 1
            )
            rows.append((name, model, types))
            cases.append({"path": str(path), "ids": ids.tolist()})
        theirs = there(options.python, Path(folder), cases)
        lines = []
        for n, (name, model, types) in enumerate(rows):
            module, tokenizer = tersor.load(model), load_tokenizer(resolve(model))
            ours, rounded = logits(module, ids), logits(rounding_inputs(module), ids)
            got = torch.from_numpy(np.load(cases[n]["path"] + ".npy"))
            same = [tokenizer(text)["input_ids"] for text in TEXTS] == theirs["tokens"][n]
            lines.append(
                f"| {name} | {types} | {distance(ours, got):.1e} | {distance(ours, rounded):.1e} | {agreement(ours, got):.0%} | "
                f"{'yes' if same else 'NO'} |"
            )
    table = (
        "# GGUF files written by tersor, in llama.cpp\n\n"
        "| model | matrices | distance of the logits | by rounding inputs to 8 bits alone | same first choice | same tokens |\n"
        "| --- | --- | --- | --- | --- | --- |\n" + "\n".join(lines) + "\n\n"
        f"llama-cpp-python {theirs['version']}. Machine: {machine()}.\n"
        "Command: `python benchmarks/gguf_in_llamacpp.py --python OTHER/bin/python --write`\n"
    )
    print(table)
    if options.write:
        write_table("gguf_in_llamacpp", table)


def models(folder: Path) -> list[tuple[str, Path, str]]:
    """Name, directory and --dtype of every case; makes the models."""
    demo = resolve("demo")
    found = [("demo", demo, "float32"), ("demo", demo, "auto")]
    grids = [(4, 32, True), (4, 128, True), (4, -1, True), (4, 32, False), (3, 32, True), (2, 32, False), (8, 32, True)]
    for bits, group_size, sym in grids:
        target = folder / f"demo-{bits}-{group_size}-{sym}"
        method = GPTQ(bits=bits, group_size=group_size, sym=sym)
        tersor.compress("demo", method, samples=4, seq_len=128, out=target, format="gptq_v2")
        groups = "per channel" if group_size == -1 else f"groups of {group_size}"
        found.append((f"demo, {bits} bits, {'symmetric' if sym else 'asymmetric'}, {groups}", target, "float32"))
    small: list[tuple[str, str, dict[str, Any]]] = [
        ("Llama with biases", "Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Mistral", "Mistral", {"sliding_window": None}),
        ("Qwen2", "Qwen2", {}),
        ("Qwen3", "Qwen3", {}),
        *(
            (f"Llama, {kind} positions", "Llama", {"rope_parameters": {"rope_theta": 10000.0, **rope}})
            for kind, rope in ROPES.items()
        ),
    ]
    for name, family, changes in small:
        target = folder / name.replace(" ", "-")
        random_model(family, target, **changes)
        found.append((f"random {name}", target, "float32"))
    return found


def random_model(family: str, target: Path, **changes: Any) -> None:
    """A model of two narrow layers with the demo's tokenizer; every parameter is random, norms and biases too."""
    import transformers

    torch.manual_seed(0)
    numbers = {
        "vocab_size": 8192,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64 if family == "Qwen3" else 32,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    config = getattr(transformers, f"{family}Config")(**{**numbers, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(resolve("demo") / name, target / name)


def there(python: str, folder: Path, cases: list[dict[str, Any]]) -> dict[str, Any]:
    job = folder / "job.json"
    job.write_text(json.dumps({"cases": cases, "texts": TEXTS}))
    subprocess.run([python, "-c", THERE, str(job)], check=True)
    found: dict[str, Any] = json.loads((folder / "job.json.out").read_text())
    return found


@torch.no_grad()
def logits(module: nn.Module, ids: Tensor) -> Tensor:
    found: Tensor = module(input_ids=ids[None]).logits[0].float()
    return found


def rounding_inputs(module: nn.Module) -> nn.Module:
    """The same model, whose quantized layers see inputs rounded to 8 bits in groups of 32, as llama.cpp's do."""

    def round_(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0].unflatten(-1, (-1, 32))
        step = x.abs().amax(-1, keepdim=True) / 127
        return ((x / step.clamp(min=1e-30)).round().mul(step.half().float()).flatten(-2),)

    for layer in module.modules():
        if isinstance(layer, QuantizedLinear):
            layer.register_forward_pre_hook(round_)
    return module


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / ours.norm())


def agreement(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())


if __name__ == "__main__":
    sys.exit(main())
