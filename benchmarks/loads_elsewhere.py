"""Does GPTQModel load what tersor writes, and compute the same?

    uv venv other && uv pip install --python other/bin/python gptqmodel
    python benchmarks/loads_elsewhere.py --python other/bin/python --write

GPTQModel is too heavy for CI (it wants a torch of its own and compiles extensions), so this is run by hand. It quantizes the
built-in model to 4 bits, symmetric, groups of 128, format gptq; computes logits with tersor in float32; lets GPTQModel's plain
torch layers compute them in the other environment; and prints how far they are apart.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import machine, write_table

import tersor
from tersor import GPTQ

THERE = """
import sys, torch, gptqmodel, transformers
from gptqmodel import BACKEND, GPTQModel
model = GPTQModel.load(sys.argv[1], device="cpu", backend=BACKEND.TORCH)
with torch.no_grad():
    logits = model.model(input_ids=torch.load(sys.argv[2])).logits.float()
torch.save(logits, sys.argv[3])
versions = f"gptqmodel {gptqmodel.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
print("RESULT", f"{type(model.model.model.layers[0].mlp.up_proj).__name__} in {model.model.dtype}; {versions}")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="interpreter of the environment that has gptqmodel")
    parser.add_argument("--write", action="store_true", help="keep the table in loads_elsewhere.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, ids, logits = (str(Path(folder) / name) for name in ("model", "ids.pt", "logits.pt"))
        tersor.compress("demo", GPTQ(bits=4, group_size=128, sym=True), samples=16, seq_len=256, out=model)
        tokens = torch.arange(50, 250).view(2, 100)
        torch.save(tokens, ids)
        with torch.no_grad():
            ours = tersor.load(model)(input_ids=tokens).logits
        command = [options.python, "-c", THERE, model, ids, logits]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        theirs = torch.load(logits)
    there = next(line for line in output.splitlines() if "RESULT" in line).partition("RESULT ")[2]
    distance = float((ours - theirs).norm() / ours.norm())
    agreement = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    table = (
        "# A 4-bit symmetric `gptq` checkpoint of the built-in model, loaded by GPTQModel\n\n"
        "| loaded as | relative distance of the logits | same first choice |\n| --- | --- | --- |\n"
        f"| {there} | {distance:.4f} | {agreement:.1%} |\n\n"
        "tersor computes in float32, GPTQModel in the checkpoint's bfloat16, whose rounding is what is left.\n\n"
        f"Machine: {machine()}.\n"
        "Command: `python benchmarks/loads_elsewhere.py --python OTHER/bin/python --write`\n"
    )
    print(table)
    if options.write:
        write_table("loads_elsewhere", table)


if __name__ == "__main__":
    sys.exit(main())
