"""How much calibration pays: number of samples and their length, against rounding, over draws, models, texts and bits.

    TERSOR_DATA=../shared/data python benchmarks/calibration_size.py --device cuda --processes 14 --write
                                prints the tables and keeps them in benchmarks/results/calibration_size.md and .json
    ... --models opt gpt-neox   these alone. With --write, what is kept is not measured again, and stays
    ... --again                 measures nothing: writes the tables anew from the kept numbers
    ... --minutes 4             begins no job after so many minutes: what is missing has no cell (draws go one after another)
    ... --quick                 a job of each kind in the smallest size: whether it runs, not what it is worth

Language models: `demo`, and two of other architectures that this script makes itself (an OPT: LayerNorm, biases, ReLU, learned
positions; a GPT-NeoX: parallel attention and MLP, GELU). They learn `demo`'s predictions on text that `demo` writes. Image
classifier: `demo-vit`.

Each text is cut in two: one part calibrates, the other is what the result is measured on. So it can be told apart whether a
calibration saw too little (bad on both its own kind of text and others), or the wrong kind (good on its own kind alone).

Everything runs in memory in float32; the layers keep exact scales. KL is that of the next token's distribution from the
original's, in nats, the mean over the windows; ± is the standard deviation over the draws.
"""

from __future__ import annotations

import argparse
import gzip
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from common import DATA, command, gpu, kept_numbers, machine, refuse_to_keep_quick, write_numbers, write_table
from torch import Tensor, nn
from torch.nn import functional

import tersor
from tersor import GPTQ, RTN
from tersor.calibrate.batches import make_batches
from tersor.calibrate.images import image_batches
from tersor.checkpoint.load import load_tokenizer
from tersor.checkpoint.preprocessing import image_settings
from tersor.checkpoint.source import open_checkpoint, resolve
from tersor.compress import Method
from tersor.data.images import ImageConfig, load_images
from tersor.data.text import builtin_text

SIZES = ((8, 256), (8, 1024), (32, 256), (32, 512), (128, 512), (128, 1024))
IMAGES = (8, 32, 128, 512)
BITS, DRAWS = (4, 3), 3
LENGTH, WINDOWS, AT_ONCE = 1024, 24, 4  # what is measured on: tokens of a window, windows of a text, windows at once
STUDENTS = ("opt", "gpt-neox")
MODELS = ("demo", "demo-vit", *STUDENTS)
WRITTEN, BATCH, STEPS = 2048, 32, 600  # texts that `demo` writes; of these in a step of learning; steps
TEXTS = ("python docs", "books", "wikitext")  # python docs: the built-in text


@dataclass(frozen=True)
class Task:
    """One result that is measured. samples == 0: rounding, which sees none."""

    model: str
    text: str  # that calibrates
    recipe: str
    bits: int
    samples: int
    seq_len: int  # 0 for images
    draw: int


@dataclass(frozen=True)
class Row:
    """What came of it: for each text that it is measured on, KL and loss (of images: KL, and the share of wrong answers)."""

    task: Task
    kl: dict[str, float]
    loss: dict[str, float]
    seconds: float


def method_of(recipe: str, bits: int, group_size: int) -> Method:
    grid: dict[str, Any] = {"bits": bits, "group_size": group_size}
    ordered = {"desc_act": True, "static_groups": True, "weighted": True}
    return {
        "rounding": lambda: RTN(**grid),
        "rounding, mse": lambda: RTN(**grid, mse=True),
        "GPTQ": lambda: GPTQ(**grid),
        "GPTQ, damp 0.1": lambda: GPTQ(**grid, damp=0.1),
        "GPTQ, advised": lambda: GPTQ(**grid, **ordered),
    }[recipe]()


def tasks_of(model: str, *, quick: bool) -> Iterator[Task]:
    """In the order of draws, so that a run that is stopped has all cells of the first."""
    images = model == "demo-vit"
    sources = ("cifar-10",) if images else TEXTS if model == "demo" else ("books",)
    sizes = [(samples, 0) for samples in IMAGES] if images else list(SIZES)
    bits_of, draws = (BITS[-1:], 1) if quick else (BITS, DRAWS)
    for bits in bits_of:
        for recipe in ("rounding", "rounding, mse"):
            yield Task(model, "", recipe, bits, 0, 0, 0)
    for draw in range(draws):
        for source in sources[:1] if quick else sources:
            damped = ("GPTQ, damp 0.1",) if (model, source) == ("demo", "books") and not quick else ()
            for samples, seq_len in sizes[:1] if quick else sizes:
                for bits in bits_of:
                    for recipe in ("GPTQ", "GPTQ, advised", *damped):
                        yield Task(model, source, recipe, bits, samples, seq_len, draw)


def split_texts(folder: Path) -> None:
    """Both parts of each text. Passages of the books go to one part or the other; the articles of WikiText are in order."""
    books = gzip.decompress((DATA / "text" / "calibration.txt.gz").read_bytes()).decode()
    passages = [books[at : at + 12_000] for at in range(0, len(books), 12_000)]
    wiki = gzip.decompress((DATA / "text" / "wikitext2_test.txt.gz").read_bytes()).decode()
    middle = wiki.index("\n", 2 * len(wiki) // 3)
    parts = {
        "python docs": (builtin_text("calibration"), builtin_text("evaluation")),
        "books": tuple("\n".join(p for n, p in enumerate(passages) if (n % 4 == 3) == held) for held in (False, True)),
        "wikitext": (wiki[:middle], wiki[middle:]),
    }
    for name, (seen, unseen) in parts.items():
        (folder / f"{name}.txt").write_text(seen, encoding="utf-8")
        (folder / f"{name} unseen.txt").write_text(unseen, encoding="utf-8")


class Tokenizer:
    """The model's, which tokenizes each text once."""

    def __init__(self) -> None:
        self.own, self.found = load_tokenizer(resolve("demo")), dict[str, Any]()

    def __call__(self, text: str, **options: Any) -> Any:
        if text not in self.found:
            self.found[text] = self.own(text, **options)
        return self.found[text]


tokenizer = cache(Tokenizer)


@cache
def original(model: str, folder: Path, device: str) -> nn.Module:
    if model not in STUDENTS:
        return tersor.load(model, dtype="float32", device=device).eval()
    module = student(model)
    module.load_state_dict(torch.load(folder / f"{model}.pt", weights_only=True))
    return module.to(device).eval()


@cache
def evaluation(text: str, folder: Path, windows: int) -> Tensor:
    """Windows from all over a text, [windows, tokens]."""
    found = make_batches(folder / f"{text} unseen.txt", tokenizer(), samples=windows, seq_len=LENGTH, seed=0)
    return torch.cat([batch["input_ids"] for batch in found])


@cache
def pictures() -> tuple[Tensor, Tensor]:
    """The test images [n, 3, H, W], and their classes."""
    data = load_images(
        DATA / "images" / "cifar10_test_1000.npz", ImageConfig(**image_settings(open_checkpoint("demo-vit")))
    )
    return torch.stack([each["image"] for each in data]), torch.tensor([int(each["target"]) for each in data])


def calibration(task: Task, folder: Path) -> list[dict[str, Any]]:
    if task.model == "demo-vit":
        settings, file = image_settings(open_checkpoint("demo-vit")), DATA / "images" / "cifar10_train_512.npz"
        return image_batches(file, settings, samples=task.samples, seed=task.draw)
    return make_batches(
        folder / f"{task.text}.txt", tokenizer(), samples=task.samples, seq_len=task.seq_len, seed=task.draw
    )


@torch.no_grad()
def compared(base: nn.Module, other: nn.Module, inputs: Tensor, wanted: Tensor, device: str) -> tuple[float, float]:
    """KL(base || other), and what `other` loses on what was wanted: nats of a token, or the share of images that are wrong."""
    kl, loss, count = 0.0, 0.0, 0
    text = not inputs.is_floating_point()
    for some, right in zip(inputs.split(AT_ONCE if text else 100), wanted.split(AT_ONCE if text else 100), strict=True):
        p, q = (_log_probabilities(each, some.to(device), text=text) for each in (base, other))
        right = right.to(device).reshape(-1)
        kl += float((p.exp() * (p - q)).sum())
        loss += float(-q.gather(1, right[:, None]).sum() if text else (q.argmax(1) != right).sum())
        count += len(right)
    return kl / count, loss / count


def _log_probabilities(module: nn.Module, inputs: Tensor, *, text: bool) -> Tensor:
    """[tokens or images, vocabulary or classes], float64."""
    found = module(inputs)
    logits = found.logits[:, :-1] if text else found
    return functional.log_softmax(logits.reshape(-1, logits.shape[-1]).double(), -1)


def measure(task: Task, folder: Path, device: str, windows: int) -> Row:
    torch.set_num_threads(1)
    base = original(task.model, folder, device)
    method = method_of(task.recipe, task.bits, 64 if task.model == "demo-vit" else 128)
    started = time.perf_counter()
    if task.samples:
        batches = calibration(task, folder)
        result = tersor.compress(base, method, calibration=batches, samples=len(batches), format=None)
    else:
        result = tersor.compress(base, method, format=None)
    other, seconds = result.model, time.perf_counter() - started
    if task.model == "demo-vit":
        images, classes = pictures()
        found = {"cifar-10": compared(base, other, images, classes, device)}
    else:
        texts = {text: evaluation(text, folder, windows) for text in TEXTS}
        found = {text: compared(base, other, each, each[:, 1:], device) for text, each in texts.items()}
    return Row(task, {k: v[0] for k, v in found.items()}, {k: v[1] for k, v in found.items()}, seconds)


def student(name: str) -> Any:
    """An untrained model with `demo`'s vocabulary and positions."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    shared = {"vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, "max_position_embeddings": LENGTH}
    if name == "opt":
        return OPTForCausalLM(OPTConfig(**shared, **ids, word_embed_proj_dim=256, ffn_dim=1024, dropout=0.0))
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shared, **ids, intermediate_size=1024))


@torch.no_grad()
def written(teacher: Any, texts: int, length: int, device: str) -> Tensor:
    """What `demo` writes of its own accord at temperature 1, [texts, length]."""
    torch.manual_seed(1)
    ids, past = torch.zeros(texts, 1, dtype=torch.long, device=device), dict[str, Any]()
    found = [ids]
    for _ in range(length - 1):
        output = teacher(found[-1], **past, use_cache=True)
        known = next(name for name in ("cache", "past_key_values") if name in output)  # by transformers' version
        past = {known: output[known]}
        found.append(torch.multinomial(output.logits[:, -1].float().softmax(-1), 1))
    return torch.cat(found, 1)


def teach(name: str, folder: Path, device: str, *, quick: bool) -> str:
    """Make a student that predicts as `demo` does."""
    texts, length, batch, steps = (8, 64, 4, 3) if quick else (WRITTEN, LENGTH, BATCH, STEPS)
    kind = torch.bfloat16 if device.startswith("cuda") else torch.float32
    teacher = tersor.load("demo", dtype=str(kind).removeprefix("torch."), device=device).eval()
    data = written(teacher, texts, length, device)
    module = student(name).to(device).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps + 1, pct_start=0.1)
    for step in range(steps):
        ids = data[torch.randint(texts, (batch,), device=device)]
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            with torch.no_grad():
                wanted = teacher(ids, use_cache=False).logits.flatten(0, 1)
            logits = module(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        loss = functional.kl_div(
            functional.log_softmax(logits.float(), -1),
            functional.log_softmax(wanted.float(), -1),
            log_target=True,
            reduction="batchmean",
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"{name}: step {step}, KL from demo {loss.item():.3f}", file=sys.stderr, flush=True)
    torch.save(module.state_dict(), folder / f"{name}.pt")
    return name


def measure_all(
    folder: Path, arguments: argparse.Namespace, kept: Sequence[Row], keep: Callable[[list[Row]], None]
) -> list[Row]:
    """The kept rows and those that they lack. `demo` and `demo-vit` at once, a student's jobs as soon as it has learned."""
    rows, known = list(kept), {row.task for row in kept}
    started, limit = time.perf_counter(), 60 * arguments.minutes
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        waiting: set[Future[Any]] = set()
        for name in [name for name in STUDENTS if name in arguments.models]:
            waiting.add(pool.submit(teach, name, folder, arguments.device, quick=arguments.quick))

        def submit(model: str) -> None:
            for task in tasks_of(model, quick=arguments.quick):
                if task not in known:
                    waiting.add(pool.submit(measure, task, folder, arguments.device, windows_of(arguments)))

        for model in [model for model in ("demo", "demo-vit") if model in arguments.models]:
            submit(model)
        late = False
        while waiting:
            left = None if late else max(0.0, limit - (time.perf_counter() - started))
            done, waiting = wait(waiting, timeout=left, return_when=FIRST_COMPLETED)
            if not done:  # those that run are waited for, the others given up
                late, waiting = True, {each for each in waiting if not each.cancel()}
            for each in done:
                if each.cancelled():
                    continue
                if (error := each.exception()) is not None:
                    print(f"failed: {error!r}", file=sys.stderr, flush=True)
                    continue
                result = each.result()
                if isinstance(result, str):
                    if not late:
                        submit(result)
                    continue
                rows.append(result)
                if len(rows) % 50 == 0:
                    print(f"{len(rows)} after {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
                    keep(rows)
    return rows


def summary(values: Sequence[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(rows: Sequence[Row], model: str, bits: int, field: str, measured: str) -> str:
    """Sizes beside each other; a line for each text that calibrates and each recipe."""
    picked = [r for r in rows if r.task.model == model and r.task.bits == bits]
    sizes = list(dict.fromkeys((r.task.samples, r.task.seq_len) for r in sorted(picked, key=lambda r: size_of(r.task))))
    sizes = [each for each in sizes if each[0]]
    heads = [str(n) if not length else f"{n} x {length}" for n, length in sizes]
    lines = [
        f"| | calibrated on | {' | '.join(heads)} |",
        f"| --- | --- |{' ---: |' * len(heads)}",
    ]
    cells: dict[tuple[str, str], dict[tuple[int, int], list[float]]] = {}
    for row in sorted(picked, key=lambda r: (r.task.text, r.task.recipe)):
        task = row.task
        value = (row.kl if field == "kl" else row.loss)[measured]
        value = value if field == "kl" else 100 * value if model == "demo-vit" else math.exp(value)
        cells.setdefault((task.recipe, task.text), {}).setdefault((task.samples, task.seq_len), []).append(value)
    digits = 4 if field == "kl" else 2
    for (recipe, text), found in cells.items():
        if not text:
            lines.append(f"| {recipe} | | {summary(found[0, 0], digits)} |{' |' * (len(heads) - 1)}")
            continue
        shown = [summary(found[size], digits) if size in found else "" for size in sizes]
        lines.append(f"| {recipe} | {text} | {' | '.join(shown)} |")
    return "\n".join(lines)


def size_of(task: Task) -> tuple[int, int]:
    return task.samples * max(1, task.seq_len), task.samples


def in_short(rows: Sequence[Row], model: str) -> str:
    """How each recipe and size does beside rounding: in how many cells KL is less, and KL as a share of rounding's."""
    picked = [r for r in rows if r.task.model == model]
    found: dict[tuple[str, int, str, tuple[int, int], str], list[float]] = {}
    for row in picked:
        task = row.task
        for measured, value in row.kl.items():
            key = (task.recipe, task.bits, task.text, (task.samples, task.seq_len), measured)
            found.setdefault(key, []).append(value)
    sizes = [(n, 0) for n in IMAGES] if model == "demo-vit" else list(SIZES)
    heads = [f"{n} images" if not length else f"{n} x {length} = {n * length:,} tokens" for n, length in sizes]
    lines = [
        f"| | measured on | beside | {' | '.join(heads)} |",
        f"| --- | --- | --- |{' ---: |' * len(heads)}",
    ]
    for recipe in dict.fromkeys(key[0] for key in sorted(found) if key[2]):
        for base in ("rounding", "rounding, mse"):
            for own in (True, False):
                cells = []
                for size in sizes:
                    shares = [
                        statistics.mean(values) / statistics.mean(found[base, key[1], "", (0, 0), key[4]])
                        for key, values in found.items()
                        if (key[0], key[3]) == (recipe, size)
                        and (key[2] == key[4] or key[4] == "cifar-10") == own
                        and (base, key[1], "", (0, 0), key[4]) in found
                    ]
                    less = sum(share < 1 for share in shares)
                    cells.append(f"{less} of {len(shares)}, {statistics.mean(shares):.2f}" if shares else "")
                if any(cells):
                    kind = "its own kind of text" if own else "other kinds of text"
                    kind = "its own images" if model == "demo-vit" else kind
                    lines.append(f"| {recipe} | {kind} | {base} | {' | '.join(cells)} |")
    return "\n".join(lines)


def missing(rows: Sequence[Row]) -> list[str]:
    """Planned jobs that the run did not come to, a line a model."""
    done = {row.task for row in rows}
    found = []
    for model in ("demo", "demo-vit", *STUDENTS):
        planned = list(tasks_of(model, quick=False))
        left = [task for task in planned if task not in done]
        if not left:
            continue
        draws = [f"{sum(task.draw == n for task in left)} of draw {n + 1}" for n in range(DRAWS)]
        counts = "all" if len(left) == len(planned) else ", ".join(each for each in draws if not each.startswith("0 "))
        found.append(f"- {model}: {len(left)} of {len(planned)} jobs are missing ({counts})")
    return found


def report(rows: Sequence[Row], runs: Sequence[str], originals: Mapping[str, str]) -> str:
    parts = [f"# {(__doc__ or '').split(chr(10))[0]}"]
    about = "\n\n".join((__doc__ or "").split("\n\n")[2:]).strip()
    parts.append("## In short")
    parts.append(
        "For each size: in how many cells (a text that calibrates, one that is measured on, a number of bits) the KL is less\n"
        "than rounding's, and its share of rounding's in the mean. Less than 1 is better. `advised` is\n"
        "`--desc-act --static-groups --weighted`. Perplexities below go up and down where KL falls steadily: on a text that\n"
        "the original predicts badly, a change of its weights lowers perplexity as often as not. So sizes are compared by\n"
        "KL."
    )
    for model in dict.fromkeys(r.task.model for r in rows):
        parts += [f"{model}:", in_short(rows, model)]
    if cut := missing(rows):
        parts += ["What was planned and is not measured, because the run was cut:", "\n".join(cut)]
    parts += [
        "## How it was measured",
        about,
        "Perplexity or wrong answers of the originals: " + "; ".join(originals.values()) + ".",
    ]
    for model in dict.fromkeys(r.task.model for r in rows):
        for bits in BITS:
            for measured in ("cifar-10",) if model == "demo-vit" else TEXTS:
                if not any(r.task.model == model and r.task.bits == bits for r in rows):
                    continue
                group = 64 if model == "demo-vit" else 128
                parts.append(f"## {model}, {bits} bits in groups of {group}, measured on {measured}")
                named = "wrong answers, %" if model == "demo-vit" else "perplexity"
                parts += ["KL:", table(rows, model, bits, "kl", measured)]
                parts += [f"{named}:".capitalize(), table(rows, model, bits, "loss", measured)]
    parts.append("\n".join(f"- {run}" for run in runs))
    return "\n\n".join(parts)


def originals_of(folder: Path, device: str, models: Sequence[str], windows: int) -> dict[str, str]:
    """What the originals are worth, in words."""
    found = {}
    for model in models:
        base = original(model, folder, device)
        if model == "demo-vit":
            images, classes = pictures()
            found[model] = f"{model} {100 * compared(base, base, images, classes, device)[1]:.2f} %"
            continue
        texts = {text: evaluation(text, folder, windows) for text in TEXTS}
        worth = {text: math.exp(compared(base, base, w, w[:, 1:], device)[1]) for text, w in texts.items()}
        found[model] = f"{model} " + ", ".join(f"{value:.2f} ({text})" for text, value in worth.items())
    return found


def windows_of(arguments: argparse.Namespace) -> int:
    return 1 if arguments.quick else WINDOWS


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=1, help="jobs beside one another")
    parser.add_argument("--minutes", type=float, default=600, help="begins no job after so many")
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--again", action="store_true", help="write the tables anew from the kept numbers")
    parser.add_argument("--quick", action="store_true", help="whether it runs")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    arguments = parser.parse_args()
    kept = kept_numbers("calibration_size") if arguments.again or arguments.write else {}
    found = [Row(Task(**each.pop("task")), **each) for each in kept.get("rows", [])]
    runs, originals = kept.get("runs", []), kept.get("originals", {})
    if arguments.again:
        write_table("calibration_size", report(found, runs, originals))
        return
    refuse_to_keep_quick(arguments)
    where = gpu("transformers") if arguments.device.startswith("cuda") else machine()
    runs = list(dict.fromkeys([*runs, f"`{command()}`; {where}"]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        split_texts(folder)

        def numbers(rows: list[Row]) -> None:
            if arguments.write:
                write_numbers(
                    "calibration_size", {"runs": runs, "originals": originals, "rows": [asdict(row) for row in rows]}
                )

        rows = measure_all(folder, arguments, found, numbers)
        rows.sort(key=lambda row: (row.task.model, row.task.text, row.task.recipe, size_of(row.task), row.task.draw))
        models = [name for name in MODELS if name not in originals and any(row.task.model == name for row in rows)]
        originals |= originals_of(folder, arguments.device, models, windows_of(arguments))
        numbers(rows)
        text = report(rows, runs, originals)
        if arguments.write:
            write_table("calibration_size", text)
        print(text)


if __name__ == "__main__":
    main()
