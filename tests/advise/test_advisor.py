"""The advisor on a tiny model: sizes are exact, evidence decides, limits hold, nothing is measured twice."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import tersor
from tersor import models
from tersor.advise import Budget, advise
from tersor.advise.candidates import Candidate, candidates_for
from tersor.advise.evidence import Evidence, data_mark, keep_evidence, machine_mark, model_mark, read_evidence
from tersor.advise.plans import FIGURES, Figure, Plan, Recipe, command, name_of, reason, recipe_content
from tersor.advise.predict import bits_of, distance, predicted_loss
from tersor.advise.size import least_in_memory, least_on_disk, packed_maps, size_on_disk, skeleton
from tersor.advise.workloads import Workload, kind_of, loss_between, run
from tersor.checkpoint.source import open_checkpoint
from tersor.compress.recipe import read_steps
from tersor.errors import TersorError
from tersor.methods.method import Method, methods
from tersor.methods.weights.gptq import GPTQ
from tersor.methods.weights.rtn import RTN
from tersor.train.checkpoint import save_model

UNITS, LENGTH = 3, 256
SETTINGS = {"samples": 2, "seq_len": 64}
Command = Callable[..., Any]


@cache
def fitting(model: Path) -> dict[str, tuple[Candidate, int]]:
    """Recipes that fit the small model and whose size has a formula."""
    checkpoint = open_checkpoint(model)
    lazy = skeleton(checkpoint)
    found = {}
    for each in candidates_for("text", calibration=True, training=False):
        try:
            size = size_on_disk(checkpoint, lazy, each.steps)
        except TersorError:
            continue
        if size is not None:
            found[each.name] = (each, size)
    return found


def row(model: Path, recipe: Recipe, size: int, loss: float, *, latency: float, **changes: Any) -> Evidence:
    """A measured run as the advisor keeps it, with figures that we choose."""
    checkpoint = open_checkpoint(model)
    values: dict[str, Any] = {
        "model": str(model),
        "model_mark": model_mark(checkpoint),
        "kind": "text",
        "data_mark": data_mark(["text", UNITS, LENGTH], []),
        "recipe": [dict(step) for step in recipe],
        "machine": machine_mark(torch.device("cpu")),
        "version": tersor.__version__,
        "settings": {**SETTINGS, "device": "cpu"},
        "disk": size,
        "memory": 10**8 + size,
        "latency": latency,
        "latency_p95": latency,
        "latency_quarters": (latency, latency),
        "scores": [3 + float(np.log1p(loss))] * UNITS,
        "answers": [],
        "seconds": 1.0,
        "loss": loss,
    }
    return Evidence(**{**values, **changes})


@pytest.fixture
def seen(small_source: Path, tmp_path: Path) -> Path:
    """Evidence of the original and of every recipe: fewer bits are smaller, faster and worse."""
    file = tmp_path / "evidence.jsonl"
    keep_evidence(file, row(small_source, (), open_checkpoint(small_source).size(), 0.0, latency=1e-3))
    for candidate, size in fitting(small_source).values():
        bits = bits_of(candidate.recipe)
        keep_evidence(file, row(small_source, candidate.recipe, size, 4.0 ** (3 - bits), latency=1e-4 * bits))
    return file


def ask(model: Path, budget: Budget, evidence: Path, **changes: Any) -> Any:
    only = changes.pop("only", list(fitting(model))[::2])
    return advise(
        model, budget, max_eval_samples=UNITS, device="cpu", evidence=evidence, only=only, **{**SETTINGS, **changes}
    )


def little(evidence: Path) -> tuple[object, ...]:
    """Words of a command that measures no recipe."""
    data = ("--max-eval-samples", UNITS, "--samples", 2, "--seq-len", 64)
    return (*data, "--device", "cpu", "--evidence", evidence, "--max-recipes", 0)


def test_sizes_are_those_on_disk(small: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small)
    lazy = skeleton(checkpoint)
    recipes: list[Method] = [
        RTN(bits=4, group_size=32),
        RTN(bits=8, group_size=-1, sym=False),
        GPTQ(bits=3, group_size=32, desc_act=True, static_groups=True),
    ]
    for n, method in enumerate(recipes):
        formula = size_on_disk(checkpoint, lazy, [method])
        out = tmp_path / str(n)
        tersor.compress(small, method, out=out, device="cpu", **(SETTINGS if method.needs_samples else {}))
        found = open_checkpoint(out).size()
        assert formula == pytest.approx(found, rel=0.01)
        saved = checkpoint.size() - found
        assert checkpoint.size() - formula == pytest.approx(saved, rel=0.01)  # of what is saved, too


def test_a_layer_that_does_not_fit_is_told_before_anything_is_made(small: Path) -> None:
    checkpoint = open_checkpoint(small)
    with pytest.raises(TersorError, match="group size 128 does not divide"):
        size_on_disk(checkpoint, skeleton(checkpoint), [RTN(group_size=128)])


@pytest.mark.parametrize(("budget", "named"), [(Budget(disk=1000.0), "--disk"), (Budget(memory=1e5), "--memory")])
@pytest.mark.parametrize("all_of_them", [False, True])
def test_an_impossible_budget_is_told_by_formulae_alone(
    small_source: Path, tmp_path: Path, budget: Budget, named: str, all_of_them: bool
) -> None:
    file = tmp_path / "none.jsonl"
    only = [each.name for each in candidates_for("text", calibration=True, training=False)] if all_of_them else None
    found = ask(small_source, budget, file, **({"only": only} if only else {}))
    assert found.plans == ()
    assert f"{named} 0." in found.binding
    assert "binds: the least is" in found.binding
    assert not file.exists(), "nothing had to be measured"


def test_what_a_process_holds_is_no_less_than_the_formula(small_source: Path) -> None:
    checkpoint = open_checkpoint(small_source)
    lazy = skeleton(checkpoint)
    assert least_in_memory(lazy, {}) <= run(small_source, Workload("text", (), 2, 64, 2, "cpu")).memory
    assert least_in_memory(lazy, packed_maps(lazy, [RTN(bits=4, group_size=32)])) < least_in_memory(lazy, {})
    outside = checkpoint.bytes_of_tensors()
    assert least_on_disk(checkpoint, lazy) == sum(
        size
        for name, size in outside.items()
        if name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    )


def test_the_command_ends_with_status_1_where_nothing_fits(
    small_source: Path, seen: Path, tersor_command: Command
) -> None:
    ran = tersor_command("advise", small_source, "--max-latency", "1us", *little(seen))
    assert ran.status == 1
    assert "--max-latency" in ran.err.splitlines()[-1]
    assert "Traceback" not in ran.err


def test_the_command_of_a_recipe_has_the_settings_that_were_measured(
    small_source: Path, seen: Path, tersor_command: Command
) -> None:
    out = seen.with_name("my recipe.yaml")
    asked = ("advise", small_source, "--max-loss", "90%", *little(seen), "--out", out)
    ran = tersor_command(*asked)
    assert ran.status == 0, ran.err
    told = shlex.split(ran.out.strip().splitlines()[-1].partition(": ")[2])
    settings = ["--samples", "2", "--seq-len", "64", "--device", "cpu"]
    assert told == ["tersor", "compress", "recipe", str(out), str(small_source), *settings, "--out", "DIR"]
    before = out.read_bytes()
    again = tersor_command(*asked)
    assert (again.status, out.read_bytes()) == (2, before)
    assert "exists; give another name, or --overwrite" in again.err
    assert tersor_command(*asked, "--overwrite").status == 0


def test_words_with_blanks_are_quoted() -> None:
    settings = {"samples": 4, "calibration": "my book.txt"}
    for recipe in ((RTN().options(),), (RTN().options(), RTN().options())):
        told = command(Plan("any", recipe), "my model", settings, recipe_file="r e.yaml", out="DIR")
        words = shlex.split(told)
        assert {"my model", "my book.txt"} <= set(words)
        assert len(recipe) == 1 or "r e.yaml" in words


def test_a_plan_of_several_steps_that_no_file_holds_writes_its_own(tmp_path: Path) -> None:
    recipe: Recipe = (GPTQ(bits=4).options(), {**RTN().options(), "bits": 8})
    told = command(Plan("any", recipe), "M", {}, recipe_file=None, out="DIR")
    first, second = told.split(" && ")
    assert second == "tersor compress recipe plan.yaml M --out DIR"
    subprocess.run(first, shell=True, cwd=tmp_path, check=True)
    assert [step.method.options() for step in read_steps(tmp_path / "plan.yaml")] == list(recipe)


def test_rows_of_one_speed_are_not_all_the_fastest() -> None:
    def plan(name: str, disk: float, latency: float, loss: float) -> Plan:
        figures = [Figure(value, value, value, True) for value in (disk, 1.0 + disk, latency, loss)]
        return Plan(name, ({"name": name},), *figures)

    plans = [plan("a", 1, 9, 0.1), plan("b", 3, 2, 0.3), plan("c", 4, 2, 0.2), plan("d", 5, 5, 0.01)]
    said = [reason(each, plans, bounded_loss=True) for each in plans[1:]]
    assert said == ["as fast as any", "as fast as any", "least loss"]
    assert reason(plans[1], plans[:2], bounded_loss=True) == "fastest"


def test_known_runs_are_not_measured_again_and_plans_keep_every_limit(small_source: Path, seen: Path) -> None:
    lines = seen.read_text()
    budgets = [Budget(), Budget(loss=0.5), Budget(loss=0.5, latency=9e-4), Budget(latency=5e-4)]
    names = []
    for budget in budgets:
        found = ask(small_source, budget, seen)
        names.append({plan.name for plan in found.plans})
        for plan in found.plans:
            for name, limit in budget.limits().items():
                assert plan.figure(name).value <= limit * 1.05
    assert seen.read_text() == lines
    assert names[2] <= names[1] <= names[0]
    assert names[3] <= names[0]


def test_the_frontier_is_not_dominated(small_source: Path, seen: Path) -> None:
    found = ask(small_source, Budget(), seen)
    values = {plan.name: [plan.figure(name).value for name in FIGURES] for plan in found.plans}
    for name in found.front:
        assert not any(
            other != values[name] and all(a <= b for a, b in zip(other, values[name], strict=True))
            for other in values.values()
        )


def test_contradicting_evidence_changes_the_choice_the_same_way_each_time(small_source: Path, seen: Path) -> None:
    before = ask(small_source, Budget(loss=0.5), seen).chosen
    again = ask(small_source, Budget(loss=0.5), seen).chosen
    assert before == again
    keep_evidence(seen, row(small_source, before.recipe, int(before.disk.value), 0.9, latency=1e-3))
    after = ask(small_source, Budget(loss=0.5), seen)
    assert after.chosen.name != before.name
    assert before.name not in {plan.name for plan in after.plans}
    assert ask(small_source, Budget(loss=0.5), seen).plans == after.plans


def test_speed_is_not_taken_from_another_machine(small_source: Path, tmp_path: Path) -> None:
    file = tmp_path / "elsewhere.jsonl"
    keep_evidence(file, row(small_source, (), open_checkpoint(small_source).size(), 0.0, latency=1e-3))
    (candidate, size), *_ = fitting(small_source).values()
    foreign = row(small_source, candidate.recipe, size, 0.02, latency=1e-9, machine="another, 64 threads, 0")
    keep_evidence(file, foreign)
    found = ask(small_source, Budget(), file, only=[candidate.name], most=0)
    plan = next(plan for plan in found.plans if plan.name == candidate.name)
    assert not plan.latency.measured
    assert plan.latency.value > 1e-5
    assert plan.loss.evidence == foreign.id  # what is lost does not depend on the machine
    assert plan.loss.value == pytest.approx(0.02)


def test_what_is_lost_is_predicted_from_the_nearest_run(small_source: Path) -> None:
    four, eight = (
        row(small_source, (RTN(bits=bits).options(),), 1, loss, latency=1) for bits, loss in ((4, 0.1), (8, 1e-3))
    )
    mark = four.model_mark
    three: Recipe = (RTN(bits=3).options(),)
    found = predicted_loss(three, [four, eight], model=mark, data=four.data_mark, machine=four.machine)
    assert found is not None
    assert found.evidence == four.id
    assert found.value == pytest.approx(0.1 * 10**0.6)  # a bit less: about four times the loss
    assert found.low < found.value < found.high
    foreign = replace(four, model_mark="another", id="")
    wider = predicted_loss(three, [foreign], model=mark, data=four.data_mark, machine=four.machine)
    assert wider is not None
    assert wider.high / wider.low > found.high / found.low
    dropped: Recipe = ({"name": "drop-blocks", "blocks": 1},)
    assert predicted_loss(dropped, [four], model=mark, data="", machine="") is None  # rounding says nothing of it
    assert predicted_loss(three, [], model=mark, data="", machine="") is None
    assert (
        distance(three, three)
        == 0
        < distance(three, four.steps)
        < distance(three, ({"name": "drop-blocks", "blocks": 1},))
    )


def test_a_loss_within_its_interval_says_only_how_large_it_may_be(small_source: Path) -> None:
    scores = [[3.0, 3.2, 2.9], [3.01, 3.19, 2.9], [3.11, 3.3, 3.0]]  # 8 bits: no change; 4 bits: 0.1 each
    base = row(small_source, (), 1, 0.0, latency=1, scores=scores[0])
    eight, four = (
        row(small_source, (RTN(bits=bits).options(),), 1, loss, latency=1, scores=mine)
        for bits, loss, mine in ((8, 1e-9, scores[1]), (4, 0.1, scores[2]))
    )

    def predicted(bits: Any, *rows: Evidence) -> Any:
        marks = {"model": base.model_mark, "data": base.data_mark, "machine": base.machine}
        return predicted_loss((RTN(bits=bits).options(),), [base, *rows], **marks)

    noise = loss_between("text", base.scores, eight.scores)[1]
    assert noise > 1e-3
    alone = predicted(4, eight)
    assert alone.value == pytest.approx((1e-9 + noise) * 10 ** (0.6 * 4))  # not from 1e-9, nor from the least
    assert alone.low == 0
    assert "within its interval" in alone.source
    assert predicted(3, eight, four).evidence == four.id
    assert predicted(4, replace(eight, loss=-0.01, id="")).value == pytest.approx(noise * 10 ** (0.6 * 4))


def test_losses_are_paired() -> None:
    assert loss_between("text", [1.0, 2.0], [1.1, 2.1])[0] == pytest.approx(np.expm1(0.1))
    assert loss_between("text", [1.0, 2.0], [1.1, 2.1])[1] == pytest.approx(0, abs=1e-9)  # the same change in both
    assert loss_between("image", [0, 0, 1, 0], [0, 1, 1, 0])[0] == pytest.approx(0.25)
    assert loss_between("series", [1.0, 3.0], [2.0, 4.0])[0] == pytest.approx(0.5)
    with pytest.raises(TersorError, match="2 and 3 scores"):
        loss_between("text", [1.0, 2.0], [1.0, 2.0, 3.0])


def test_every_recipe_is_written_as_a_command_and_a_file_that_give_it_back(tmp_path: Path) -> None:
    for kind in ("text", "image", "series"):
        for each in candidates_for(kind, calibration=True, training=True):
            path = tmp_path / "recipe.yaml"
            path.write_text(yaml.safe_dump(recipe_content(each.recipe)))
            assert [step.method for step in read_steps(path)] == list(each.steps)
            told = command(Plan(each.name, each.recipe), "M", {"samples": 4}, recipe_file="r.yaml", out="DIR")
            assert told.startswith("tersor compress ")
            assert told.endswith("M --samples 4 --out DIR") or " M --" in told


def test_rows_of_methods_that_are_gone_are_skipped_with_a_note(small_source: Path, seen: Path) -> None:
    plans = ask(small_source, Budget(), seen).plans
    for step in ({"name": "no-such-method"}, {**RTN().options(), "no_such_option": 1}):
        keep_evidence(seen, row(small_source, (step,), 1, 0.01, latency=1e-3))
    found = ask(small_source, Budget(), seen)
    assert found.plans == plans
    assert [str(seen) in note and "2 runs are skipped" in note for note in found.notes].count(True) == 1


def test_time_that_is_over_is_told(small_source: Path, tmp_path: Path) -> None:
    file = tmp_path / "original.jsonl"
    keep_evidence(file, row(small_source, (), open_checkpoint(small_source).size(), 0.0, latency=1e-3))
    (candidate, _), *_ = fitting(small_source).values()
    found = ask(small_source, Budget(), file, only=[candidate.name], seconds=0.01)
    assert any(f"time was over while {candidate.name} was measured" in note for note in found.notes)
    with pytest.raises(TersorError, match="--training of 3600 s is longer than the whole --time-limit of 600 s"):
        ask(small_source, Budget(), file, training=3600.0)


def test_what_was_measured_with_other_contents_is_not_believed(small_source: Path, tmp_path: Path) -> None:
    file, book = tmp_path / "evidence.jsonl", tmp_path / "book.txt"
    book.write_text("One text.")
    (candidate, size), *_ = fitting(small_source).values()
    keep_evidence(file, row(small_source, (), open_checkpoint(small_source).size(), 0.0, latency=1e-3))
    settings = {**SETTINGS, "device": "cpu", "calibration": data_mark([], [book])}
    keep_evidence(file, row(small_source, candidate.recipe, size, 0.02, latency=1e-9, settings=settings))

    def measured() -> bool:
        found = ask(small_source, Budget(), file, only=[candidate.name], most=0, calibrate_on=str(book))
        return next(plan for plan in found.plans if plan.name == candidate.name).measured

    assert measured()
    book.write_text("Two text.")
    assert not measured()
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(b"one")
    before = data_mark([], [tmp_path / "cat"])
    (tmp_path / "cat" / "1.png").write_bytes(b"two")
    assert data_mark([], [tmp_path / "cat"]) != before


def test_methods_offer_recipes_of_their_own() -> None:
    for name, method in methods().items():
        for kind in ("text", "image", "series"):
            for steps in method.recipes(kind):
                assert any(type(step) is method for step in steps), name


def test_forecasters_get_no_recipe_that_needs_samples() -> None:
    assert candidates_for("series", calibration=True, training=False)
    assert all(each.needs == "none" for each in candidates_for("series", calibration=True, training=False))
    assert all(each.needs == "none" for each in candidates_for("text", calibration=False, training=False))


def test_evidence_survives_a_torn_last_line_and_names_a_bad_one(tmp_path: Path, small_source: Path) -> None:
    file = tmp_path / "evidence.jsonl"
    first = row(small_source, (), 1, 0.0, latency=1.0)
    keep_evidence(file, first)
    with file.open("a") as opened:
        opened.write('{"model": "tor')
    assert read_evidence(file) == [first]
    keep_evidence(file, first)
    with pytest.raises(TersorError, match="line 2"):
        read_evidence(file)
    file.write_text('{"model": 1}\n')
    with pytest.raises(TersorError, match="line 1"):
        read_evidence(file)


def test_a_language_model_is_run_and_evaluated(small_source: Path) -> None:
    found = run(small_source, Workload("text", (), 2, 64, 3, "cpu"))
    assert len(found.scores) == 2
    assert all(0 < each < 20 for each in found.scores)
    assert len(found.seconds) == 3
    assert found.memory > open_checkpoint(small_source).size()


def test_a_language_model_of_tersors_own_is_run(small_source: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.create("mamba", d_model=32, n_layer=1, vocab_size=8192)
    save_model(model, tmp_path, {}, ())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(small_source / name, tmp_path / name)
    assert kind_of(open_checkpoint(tmp_path), "run") == "text"
    found = run(tmp_path, Workload("text", (), 2, 64, 2, "cpu"))
    assert len(found.scores) == len(found.seconds) == 2


def test_a_classifier_is_run_on_pictures(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    draw = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for n in range(2):
            pixels = draw.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            pillow.fromarray(pixels).save(tmp_path / "pictures" / name / f"{n}.png")
    assert kind_of(open_checkpoint("demo-vit"), "demo-vit") == "image"
    found = run("demo-vit", Workload("image", (str(tmp_path / "pictures"),), 4, 0, 2, "cpu"))
    assert len(found.scores) == len(found.answers) == 4
    assert set(found.scores) <= {0.0, 1.0}


def test_a_forecaster_is_run_on_a_table(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.create("itransformer", seq_len=24, pred_len=12, d_model=16, d_ff=16, n_heads=2, e_layers=1)
    (tmp_path / "run").mkdir()
    save_model(model, tmp_path / "run", {}, ())
    days = np.datetime64("2024-01-01") + np.arange(80)
    rows = [f"{day},{np.sin(n):.5f},{np.cos(n):.5f}" for n, day in enumerate(days)]
    (tmp_path / "table.csv").write_text("\n".join(["day,a,b", *rows]) + "\n")
    assert kind_of(open_checkpoint(tmp_path / "run"), "run") == "series"
    found = run(tmp_path / "run", Workload("series", (str(tmp_path / "table.csv"),), 4, 0, 2, "cpu"))
    assert len(found.scores) == 4
    assert all(each > 0 for each in found.scores)


@pytest.mark.slow
def test_measures_writes_a_recipe_and_goes_on_from_what_it_measured(
    small_source: Path, tmp_path: Path, tersor_command: Command
) -> None:
    file, out = tmp_path / "evidence.jsonl", tmp_path / "recipe.yaml"
    how = (
        "--max-eval-samples",
        UNITS,
        "--device",
        "cpu",
        "--samples",
        2,
        "--seq-len",
        64,
        "--max-recipes",
        1,
        "--training",
        "none",
    )
    asked = ("advise", small_source, "--disk", f"{open_checkpoint(small_source).size() - 1}B", *how, "--evidence", file)
    ran = tersor_command(*asked, "--out", out, "--json")
    assert ran.status == 0, ran.err
    rows = read_evidence(file)
    assert [bool(each.recipe) for each in rows] == [False, True]
    said = json.loads(ran.out)
    first = said["plans"][0]
    assert first["measured"]
    assert first["disk"]["value"] == rows[1].disk
    words = shlex.split(first["command"])[1:-1]
    assert words[words.index("--device") :] == ["--device", "cpu", "--out"]
    assert tersor_command(*words, tmp_path / "made").status == 0
    assert open_checkpoint(tmp_path / "made").size() == rows[1].disk
    again = tersor_command(*asked[:-2], "--max-recipes", 0, "--evidence", file, "--json")
    assert json.loads(again.out)["plans"][0]["name"] == first["name"]
    assert len(read_evidence(file)) == 2
    assert name_of(rows[1].steps) == first["name"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--memory", "6XB"], "'6XB'"),
        (["--min-speed", "20tok/s", "--max-latency", "5ms"], "--min-speed"),
        (["--images", "nowhere"], "--images"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--training", "maybe"], "'maybe'"),
        (["--training", "1h"], "--time-limit"),
        (["--out", "nowhere/recipe.yaml"], "nowhere"),
        (["--overwrite"], "--out"),
        (["--time-limit", "soon"], "'soon'"),
    ],
)
def test_bad_input_is_one_line(
    small_source: Path, tersor_command: Command, arguments: list[str], named: str, tmp_path: Path
) -> None:
    ran = tersor_command("advise", small_source, "--evidence", tmp_path / "e.jsonl", *arguments)
    assert ran.status == 2
    assert named in ran.err
    assert len(ran.err.strip().splitlines()) == 1
