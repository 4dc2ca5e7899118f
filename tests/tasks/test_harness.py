"""EleutherAI's harness on tersor's models, with tasks that are defined on local files."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Ran

import tersor
from tersor.errors import TersorError

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

from tersor.tasks.harness import harness
from tersor.tasks.harness_model import TersorLM

Command = Callable[..., Ran]

CHOICE = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
WRITE = """
task: writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{written}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
READ = """
task: reading
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}]
"""
TEXT = (
    "The import system of a language finds a module by its name and runs it once. What it defines is bound to a name."
)
QUESTIONS = ("The sky is", "Python is a", "A list is a mutable")


@pytest.fixture(scope="module")
def model() -> TersorLM:
    return TersorLM("demo", progress=lambda what, done, total: None)


@pytest.fixture
def tasks_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: TersorLM) -> Path:
    """Three tasks on files; the choices hold what the model itself scores best, so that the right accuracy is known."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    written = model.generate_until(
        [request(question, {"until": ["\n\n"], "max_gen_toks": 6}) for question in QUESTIONS], disable_tqdm=True
    )
    rows = []
    for n, question in enumerate(QUESTIONS):
        choices = ["module", "zebra crossing"]
        scores = model.loglikelihood([request(question, f" {each}") for each in choices], disable_tqdm=True)
        best = max(range(2), key=lambda at: scores[at][0])
        answer = best if n < 2 else 1 - best  # the last is wrong
        rows.append({"question": question, "choices": choices, "answer": answer, "written": written[n], "text": TEXT})
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in {"colours": CHOICE, "writing": WRITE, "reading": READ}.items():
        (folder / f"{name}.yaml").write_text(task.format(data=data))
    return folder


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def values(found: Any) -> dict[tuple[str, str], float]:
    return {(each.task, each.metric): each.value for each in found.metrics}


def test_three_kinds_of_tasks_on_local_files(tasks_dir: Path) -> None:
    found = harness("demo", ["colours", "writing", "reading"], tasks_dir=tasks_dir)
    scores = values(found)
    assert scores["colours", "acc"] == pytest.approx(2 / 3)
    assert scores["writing", "exact_match"] == 1
    assert found.documents == {"colours": 3, "writing": 3, "reading": 3}
    words = len(TEXT.split())
    ids = token_ids(TEXT)
    ours = tersor.perplexity("demo", ids, seq_len=len(ids))
    assert scores["reading", "word_perplexity"] == pytest.approx(ours.perplexity ** (ours.tokens / words), rel=1e-3)


def token_ids(text: str) -> torch.Tensor:
    """With the first token in front, which the harness puts there too."""
    from tersor.checkpoint.load import load_tokenizer
    from tersor.checkpoint.source import resolve

    tokenizer = load_tokenizer(resolve("demo"))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([tokenizer.bos_token_id, *ids])


def test_scores_do_not_depend_on_the_batch(model: TersorLM) -> None:
    pairs = [request(TEXT[:length], TEXT[length : length + 9]) for length in (4, 30, 31, 60)]
    together = model.loglikelihood(pairs, disable_tqdm=True)
    for pair, (score, greedy) in zip(pairs, together, strict=True):
        alone, alone_greedy = model.loglikelihood([pair], disable_tqdm=True)[0]
        assert score == pytest.approx(alone, abs=1e-3)
        assert greedy == alone_greedy


def test_a_long_text_is_read_in_windows_that_predict_each_token_once() -> None:
    model = TersorLM("demo", max_length=8)
    ids = token_ids(TEXT).tolist()
    module = tersor.load("demo")
    expected, at = 0.0, 1
    while at < len(ids):
        end = min(at + 8, len(ids))
        window = torch.tensor(ids[max(end - 9, 0) : end])[None]
        with torch.no_grad():
            log_p = module(input_ids=window[:, :-1]).logits[0].log_softmax(-1)
        new = end - at
        expected += float(log_p.gather(1, window[0, 1:, None])[-new:].sum())
        at = end
    assert model.loglikelihood_rolling([request(TEXT)], disable_tqdm=True)[0] == pytest.approx(expected, abs=1e-3)


def test_generated_text_is_what_the_command_generates_and_stops(model: TersorLM) -> None:
    from tersor.runtime.generate import stream

    whole = "".join(stream("demo", QUESTIONS[0], max_new_tokens=12, temperature=0))
    stop = whole.strip()[3:6]
    asked = [{"until": [], "max_gen_toks": 12}, {"until": [stop], "max_gen_toks": 12}]
    plain, stopped = model.generate_until([request(QUESTIONS[0], each) for each in asked], disable_tqdm=True)
    assert plain == whole
    assert stopped == whole[: whole.index(stop)]


def test_packed_layers_stay_packed(small_source: Path, tmp_path: Path) -> None:
    from tersor.layers.quantized_linear import QuantizedLinear

    out = tmp_path / "packed"
    tersor.compress(str(small_source), tersor.RTN(bits=8, group_size=32), out=out)
    model = TersorLM(str(out), batch_size=2)
    assert any(isinstance(each, QuantizedLinear) for each in model.module.modules())
    scores = model.loglikelihood([request("a", " b"), request("", "c d")], disable_tqdm=True)
    assert all(math.isfinite(score) and score < 0 for score, _ in scores)


def test_answers_go_to_the_harness_cache(model: TersorLM) -> None:
    kept: list[tuple[str, Any, Any]] = []
    before = model.cache_hook
    model.set_cache_hook(SimpleNamespace(add_partial=lambda *each: kept.append(each)))
    try:
        pair, text = request("The sky", " is"), request("The sky is", {"until": ["."], "max_gen_toks": 2})
        score = model.loglikelihood([pair], disable_tqdm=True)[0]
        rolling = model.loglikelihood_rolling([request("The sky")], disable_tqdm=True)[0]
        written = model.generate_until([text], disable_tqdm=True)[0]
    finally:
        model.set_cache_hook(before)
    assert kept == [
        ("loglikelihood", pair.args, score),
        ("loglikelihood_rolling", ("The sky",), rolling),
        ("generate_until", text.args, written),
    ]


def test_first_token_comes_once(model: TersorLM) -> None:
    assert model.tokenizer.bos_token_id not in model.tok_encode("hello")
    bos = TersorLM("demo", add_bos_token=True)
    with_first = bos.tok_encode("hello")
    assert with_first == [bos.tokenizer.bos_token_id, *model.tok_encode("hello")]
    assert bos.tok_encode("hello", add_special_tokens=False) == model.tok_encode("hello")
    assert bos.tok_encode(f"{bos.tokenizer.bos_token}hello").count(bos.tokenizer.bos_token_id) == 1


def test_chat_template(model: TersorLM, monkeypatch: pytest.MonkeyPatch) -> None:
    history = [{"role": "user", "content": "Hello"}]
    with pytest.raises(TersorError, match="no chat template"):
        model.apply_chat_template(history)
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    assert model.apply_chat_template(history) == "<user>Hello<a>"
    assert model.apply_chat_template(history, add_generation_prompt=False) == "<user>Hello"


def test_settings_of_generation_that_nothing_does_are_refused(model: TersorLM) -> None:
    with pytest.raises(TersorError, match="num_beams"):
        model.generate_until([request("The", {"until": [], "num_beams": 4})], disable_tqdm=True)


def test_command_prints_json(tersor_command: Command, tasks_dir: Path) -> None:
    ran = tersor_command("eval", "demo", "--tasks", "colours", "--tasks-dir", tasks_dir, "--limit", 2, "--json")
    assert ran.status == 0, ran.err
    said = json.loads(ran.out)
    assert said["documents"] == {"colours": 2}
    assert said["metrics"][0] | {"stderr": 0} == {
        "task": "colours", "metric": "acc", "filter": "none", "value": 1.0, "stderr": 0, "better": "more",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(  # reads the index of all of the harness's tasks
            ("--tasks", "colors", "--tasks-dir", "DIR"), "task 'colors'; did you mean", marks=pytest.mark.slow
        ),
        (("--tasks", "colours", "--tasks-dir", "nowhere"), "there is no file or folder nowhere for --tasks-dir"),
        (("--tasks", "colours", "--limit", 0), "limit 0"),
        (("--tasks", "colours", "--max-images", 2), "--max-images does nothing for --tasks"),
        (("--limit", 2), "--limit does nothing for perplexity"),
        (("--tasks", "colours", "--tasks-dir", "DIR", "--batch-size", "some"), "batch_size 'some'"),
    ],
)
def test_bad_input_is_one_line(
    tersor_command: Command, tasks_dir: Path, arguments: tuple[object, ...], said: str
) -> None:
    ran = tersor_command("eval", "demo", *(tasks_dir if each == "DIR" else each for each in arguments))
    assert ran.status == 2
    assert len(ran.err.strip().splitlines()) == 1, ran.err
    assert said in ran.err


def test_a_task_that_runs_code_is_one_line(tersor_command: Command, tasks_dir: Path) -> None:
    file = tasks_dir / "colours.yaml"
    file.write_text(file.read_text() + "unsafe_code: true\n")
    ran = tersor_command("eval", "demo", "--tasks", "colours", "--tasks-dir", tasks_dir)
    assert ran.status == 2
    assert len(ran.err.strip().splitlines()) == 1, ran.err
    assert "task colours runs the code that the model writes" in ran.err


def test_examples_that_a_task_does_not_take_are_said(tersor_command: Command, tasks_dir: Path) -> None:
    file = tasks_dir / "colours.yaml"
    file.write_text(file.read_text() + "num_fewshot: 0\n")
    ran = tersor_command("eval", "demo", "--tasks", "colours", "--tasks-dir", tasks_dir, "--num-fewshot", 2, "--json")
    assert ran.status == 0, ran.err
    assert "task colours has 0 examples before each question, not 2" in ran.err
    assert json.loads(ran.out)["shots"] == {"colours": 0}


def test_a_task_without_its_data_is_one_line(tersor_command: Command, tasks_dir: Path) -> None:
    (tasks_dir / "data.jsonl").unlink()
    ran = tersor_command("eval", "demo", "--tasks", "reading", "--tasks-dir", tasks_dir)
    assert ran.status == 2
    assert len(ran.err.strip().splitlines()) == 1, ran.err
    assert "task reading cannot be read" in ran.err


def test_without_the_extra_it_says_how_to_get_it(tersor_command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    ran = tersor_command("eval", "demo", "--tasks", "colours")
    assert ran.status == 2
    assert "pip install 'tersor[lm-eval]'" in ran.err


@pytest.mark.slow
def test_the_harness_own_command_line_knows_tersor(tasks_dir: Path) -> None:
    """In a process of its own: it reads the index of all of the harness's tasks."""
    command = [
        sys.executable,
        "-m",
        "tersor.tasks.harness",
        "run",
        "--model",
        "tersor",
        "--model_args",
        "pretrained=demo",
    ]
    command += ["--tasks", "colours", "--include_path", str(tasks_dir), "--batch_size", "auto"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "colours" in ran.stdout
    assert "0.6667" in ran.stdout
