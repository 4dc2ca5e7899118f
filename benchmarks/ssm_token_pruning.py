"""Token pruning of state-space vision models: how much faster, and what it costs a Vim trained here.

    OMP_NUM_THREADS=1 python benchmarks/ssm_token_pruning.py speed
    TERSOR_DATA=../shared/data python benchmarks/ssm_token_pruning.py accuracy --device cuda

`speed`: random weights at 224 x 224 pixels, CPU time in the same run as the unpruned model, one image and eight a call. Share:
of the unpruned model's tokens, mean over the layers.

`accuracy`: a Vim (width 192, 12 layers, 4 x 4 patches: 65 tokens) is trained on CIFAR-10 pictures for --seconds; then its
tokens are dropped, and each pruned model is trained on for --tune seconds; so is the unpruned one. Top-1 on 1,000 test pictures
(the 95 % interval is about +-3 points). Beside the method: "not aligned" scans the kept tokens as if they were
neighbours, "random" keeps any.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import DATA, RESULTS, machine, speed_ratios
from torch import Tensor
from torch.nn import functional as F

import tersor
import tersor.models
import tersor.models.vision.vim as vim_file
from tersor.data.images import ImageConfig, load_images
from tersor.methods.tokens.ssm_token_pruning import SsmTokenPruning

MEAN, STD = 0.473, 0.251  # of all pixels, one number for the three channels
SPEEDS = {"vim_t": ("10,20", (0.8, 0.6)), "vim_s": ("5,10,15", (0.8, 0.7)), "plainmamba_l1": ("6,12,18", (0.8, 0.6))}
SMALL = {"img_size": 32, "patch_size": 4, "num_classes": 10, "embed_dim": 192, "depth": 12, "drop_path_rate": 0.0}
PRUNED_AFTER, KEEPS = "3,6,9", (0.8, 0.6)


def pruned(model: Any, layers: str, keep: float) -> tuple[Any, float]:
    result = tersor.compress(model, SsmTokenPruning(prune_after=layers, keep=keep), format=None)
    rows: list[Any] = [each.row() for each in result.summary.layers]
    return result.model, rows[-1]["share"]


def speed(turns: int) -> list[str]:
    lines = ["| model | after layers | keep | share of tokens | speed, 1 image | speed, 8 images |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: |"]
    for name, (layers, keeps) in SPEEDS.items():
        torch.manual_seed(0)
        dense = tersor.models.create(name).eval()
        made = {str(keep): pruned(dense, layers, keep) for keep in keeps}
        models = {"dense": dense} | {keep: model for keep, (model, _) in made.items()}
        ratios = []
        for count in (1, 8):
            images = torch.randn(count, 3, 224, 224)
            ratios.append(speed_ratios({key: partial(model, images) for key, model in models.items()}, turns=turns))
        for keep, (_, share) in made.items():
            told = " | ".join(f"{each[keep]:.2f}" for each in ratios)
            lines.append(f"| {name} | {layers} | {keep} | {share:.2f} | {told} |")
            print(lines[-1], flush=True)
    return lines


def pictures(name: str, device: str) -> tuple[Tensor, Tensor]:
    found = load_images(DATA / "images" / name, ImageConfig(size=32, mean=(MEAN,) * 3, std=(STD,) * 3))
    items = [found[n] for n in range(len(found))]
    images = torch.stack([each["image"] for each in items])
    return images.to(device), torch.tensor([int(each["target"]) for each in items], device=device)


def shifted(images: Tensor) -> Tensor:
    """Mirrored and moved by up to 4 pixels at random, all of a batch alike."""
    images = torch.where(torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5, images.flip(-1), images)
    dy, dx = torch.randint(0, 9, (2,)).tolist()
    return F.pad(images, (4, 4, 4, 4))[..., dy : dy + 32, dx : dx + 32]


def fit(model: Any, images: Tensor, labels: Tensor, *, seconds: float, lr: float) -> int:
    """AdamW for `seconds`, the rate falling to 0 by a cosine of the time. Steps done."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    started, steps = time.perf_counter(), 0
    while (done := (time.perf_counter() - started) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = lr * min((steps + 1) / 50, (1 + math.cos(math.pi * done)) / 2)
        chosen = torch.randint(len(images), (256,), device=images.device)
        loss = F.cross_entropy(model(shifted(images[chosen])), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        if steps % 20 == 0:
            loss.item()  # wait for the device, so that time is time
    model.eval()
    return steps


@torch.no_grad()
def accuracy(model: Any, images: Tensor, labels: Tensor) -> float:
    right = [
        (model(part).argmax(-1) == of).float() for part, of in zip(images.split(250), labels.split(250), strict=True)
    ]
    return 100 * float(torch.cat(right).mean())


@contextmanager
def instead(name: str, other: Callable[..., Tensor]) -> Iterator[None]:
    """Vim with one of its parts replaced."""
    own = getattr(vim_file, name)
    setattr(vim_file, name, other)
    try:
        yield
    finally:
        setattr(vim_file, name, own)


def learnt(device: str, seconds: float, tune: float) -> list[str]:
    torch.manual_seed(0)
    train, test = pictures("cifar10_train_20000.npz", device), pictures("cifar10_test_1000.npz", device)
    dense: Any = tersor.models.create("vim", **SMALL).to(device)
    steps = fit(dense, *train, seconds=seconds, lr=1e-3)
    lines = ["| | keep | share of tokens | accuracy %, as pruned | trained on |", "| --- | ---: | ---: | ---: | ---: |"]

    def row(name: str, keep: float, share: float, model: Any) -> None:
        before = accuracy(model, *test)
        tuned = copy.deepcopy(model).requires_grad_(True)
        fit(tuned, *train, seconds=tune, lr=2e-4)
        lines.append(f"| {name} | {keep} | {share:.2f} | {before:.1f} | {accuracy(tuned, *test):.1f} |")
        print(lines[-1], flush=True)

    row("unpruned", 1, 1.0, dense)
    for keep in KEEPS:
        model, share = pruned(dense, PRUNED_AFTER, keep)
        row("ssm-token-pruning", keep, share, model)
        with instead("gaps", lambda places: torch.ones_like(places)):
            row("not aligned", keep, share, model)
        with instead("importance", lambda y: torch.rand(y.shape[:2], device=y.device)):
            row("random", keep, share, model)
    lines += [
        "",
        f"The unpruned Vim learned from {len(train[0])} pictures in {steps} steps of 256; "
        f"{tune:.0f} seconds of training on for each row.",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("speed", "accuracy"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tune", type=float, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    if asked.part == "speed":
        lines, command = speed(asked.turns), "OMP_NUM_THREADS=1 python benchmarks/ssm_token_pruning.py speed"
    else:
        lines = learnt(asked.device, asked.seconds, asked.tune)
        command = (
            f"python benchmarks/ssm_token_pruning.py accuracy --device {asked.device} "
            f"--seconds {asked.seconds:g} --tune {asked.tune:g}"
        )
    where = machine()
    if asked.device.startswith("cuda"):
        where = f"{torch.cuda.get_device_name()}; {where}"
    kept = asked.out / "ssm_token_pruning.json"
    parts = json.loads(kept.read_text()) if kept.exists() else {}
    parts[asked.part] = {"lines": lines, "machine": where, "command": command}
    kept.write_text(json.dumps(parts, indent=1) + "\n")
    described = (__doc__ or "").strip()
    text = ["# Token pruning of state-space vision models", "", described[described.index("`speed`:") :], ""]
    for name, part in sorted(parts.items(), reverse=True):
        text += [f"## {name.capitalize()}", "", *part["lines"], "", part["machine"], "", f"`{part['command']}`", ""]
    (asked.out / "ssm_token_pruning.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
