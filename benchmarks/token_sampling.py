"""Adaptive token sampling on demo-vit, nothing trained: accuracy against operations, beside two simple ways to drop tokens.

    TERSOR_DATA=../shared/data OMP_NUM_THREADS=1 python benchmarks/token_sampling.py

Accuracy: top-1 on 1,000 CIFAR-10 test images (one point of it is 10 images; the 95 % interval is about +-2 points).
Operations: floating-point operations of the matrix products of an image alone, averaged over the images, as
`ATS.operations` counts them (a test holds it against torch's counter). Speed: times faster than the original in the same
run, CPU time, one image a call and 100 images a call (where every image is padded to the one that keeps most).

Yardsticks drop all tokens but a fixed number at once, in block 3, after its attention: "top attention" keeps those that
the class token attends to most (mean over the heads), "random" keeps any (drawn anew for every image).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import DATA, machine, speed_ratios, write_table
from torch import Tensor

import tersor
from tersor.evaluate.accuracy import read_images
from tersor.methods.tokens.ats import AdaptiveTokenSampling

BLOCK = 3  # where the yardsticks drop
SAMPLED = [("5-", 1.0), ("3-", 1.0), ("3-", 0.5), ("3-", 0.3), ("1-", 1.0)]
KEPT = (40, 32, 20, 12)


@dataclass
class Row:
    name: str
    run: Any  # images -> logits
    tokens: list[int] | None = None  # left after each block, where that is the same for all images


def at_once(model: Any, image: Tensor, keep: int, scores_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits with `keep` patch tokens from block 3 on: those of the highest scores."""
    x = model.embed(image)
    for n, block in enumerate(model.blocks):
        if n != BLOCK:
            x = block(x)
            continue
        attention = block.attn
        qkv = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1))  # [B, n, 3, h, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * attention.scale).softmax(-1)
        chosen = scores_of(weights[:, :, 0, 1:].mean(1)).topk(keep).indices + 1
        rows = torch.cat([torch.zeros_like(chosen[:, :1]), chosen], 1)
        weights = weights.gather(2, rows[:, None, :, None].expand(-1, weights.shape[1], -1, weights.shape[3]))
        x = x.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))
        x = x + attention.proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    logits: Tensor = model.head(model.norm(x)[:, 0])
    return logits


def rows_of(model: Any) -> list[Row]:
    depth, whole = model.config.depth, model.pos_embed.shape[1]

    def fixed(keep: int) -> list[int]:
        return [whole] * BLOCK + [keep + 1] * (depth - BLOCK)

    rows = [Row("original", model, fixed(whole - 1))]
    for blocks, share in SAMPLED:
        method = AdaptiveTokenSampling(ats_blocks=blocks, num_tokens=share)
        sampling: Any = tersor.compress(model, method, format=None).model
        rows.append(Row(f"ATS, blocks {blocks}, num_tokens {share}", sampling))
    ways: dict[str, Callable[[Tensor], Tensor]] = {"top attention": lambda scores: scores, "random": torch.rand_like}
    for name, scores_of in ways.items():
        for keep in KEPT:
            run = partial(at_once, model, keep=keep, scores_of=scores_of)
            rows.append(Row(f"{name}, {keep} of {whole - 1}", run, fixed(keep)))
    return rows


def one_by_one(row: Row, images: Tensor) -> None:
    for image in images:
        row.run(image[None])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.manual_seed(0)
    model: Any = tersor.load("demo-vit")
    pixels, labels = read_images("demo-vit", DATA / "images" / "cifar10_test_1000.npz")
    counting: Any = tersor.compress(model, AdaptiveTokenSampling(), format=None).model  # for its `operations`
    rows = rows_of(model)
    one = speed_ratios({row.name: partial(one_by_one, row, pixels[:10]) for row in rows}, turns=5)
    many = speed_ratios({row.name: partial(row.run, pixels[:100]) for row in rows}, turns=3)
    lines = ["| | accuracy % | operations, millions | share | last tokens, least-mean-most | speed, 1 | speed, 100 |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    whole = 0.0
    for row in rows:
        counts: list[Tensor] = []
        right = 0
        for images, wanted in zip(pixels.split(100), labels.split(100), strict=True):
            right += int((row.run(images).argmax(-1) == wanted).sum())
            if row.tokens is None:
                counts.append(row.run.tokens(images))
        tokens = torch.cat(counts) if counts else torch.tensor([row.tokens])
        operations = float(counting.operations(tokens).double().mean())
        whole = whole or operations
        last = tokens[:, -1]
        spread = f"{int(last.min())}-{float(last.double().mean()):.1f}-{int(last.max())}"
        lines.append(
            f"| {row.name} | {100 * right / len(labels):.1f} | {operations / 1e6:.0f} | {operations / whole:.2f} | {spread} "
            f"| {one[row.name]:.2f} | {many[row.name]:.2f} |"
        )
        print(lines[-1], flush=True)
    described = (__doc__ or "").strip()
    title = "# Adaptive token sampling on demo-vit"
    text = [title, "", described[described.index("Accuracy:") :], "", *lines, "", machine()]
    write_table("token_sampling", "\n".join([*text, "`OMP_NUM_THREADS=1 python benchmarks/token_sampling.py`", ""]))


if __name__ == "__main__":
    main()
