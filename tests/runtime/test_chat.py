"""Conversations: the same answers as from scratch, without reading again what was read, and the verb `chat`."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ran
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from zoo.tiny_models import GPT, LLAMA

from tersor import models
from tersor.byte_tokenizer import ByteTokenizer
from tersor.cli.chat import _lines, _obey, stopped_by_ctrl_c
from tersor.errors import TersorError
from tersor.models.registry import find
from tersor.runtime import chat_template
from tersor.runtime.chat import Chat
from tersor.runtime.chat_template import Template, until
from tersor.runtime.generate import Writer, make_engine, tokens
from tersor.runtime.sampling import Sampling

JINJA = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


def build(name: str) -> nn.Module:
    """A tiny model of bytes with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if name == "llama":
        config = {**LLAMA, "vocab_size": 256, "max_position_embeddings": 512, "initializer_range": 0.1}
        return LlamaForCausalLM(LlamaConfig(**config)).eval()
    if name == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(**{**GPT, "vocab_size": 256, "n_positions": 512}, initializer_range=0.1)
        ).eval()
    return models.create(name, **{**find(name).small, "vocab_size": 256}).eval()


def start(
    module: nn.Module, *, capacity: int = 400, new: int = 6, system: str | None = None, lines: list[str] | None = None
) -> Chat:
    notice = (lambda line: None) if lines is None else lines.append
    writer = Writer(module, ByteTokenizer(), Sampling(), frozenset(), notice)
    engine = make_engine(module, capacity=capacity)
    return Chat(writer, engine, Template(ByteTokenizer(), None), max_new_tokens=new, system=system)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba", "flashrnn"])
def test_turns_are_answered_as_from_scratch_and_read_once(name: str) -> None:
    module = build(name)
    talk = start(module, system="Be brief.")
    held: list[int] = []
    messages = [{"role": "system", "content": "Be brief."}]
    read = 0
    for text in ("Who are you?", "And then?", "Why?"):
        messages.append({"role": "user", "content": text})
        ids = Template(ByteTokenizer(), None).ids(messages)
        made = list(tokens(make_engine(module, capacity=400), ids, max_new_tokens=6, sampling=Sampling()))
        answer = "".join(until([ByteTokenizer().decode(made)], Template(ByteTokenizer(), None).stops))
        assert "".join(talk.answer(text)) == answer
        assert talk.ended == "length"
        messages.append({"role": "assistant", "content": answer.strip()})
        whole = ids[0].tolist()
        same = next((n for n, pair in enumerate(zip(held, whole, strict=False)) if pair[0] != pair[1]), len(held))
        least = len(whole) - same + len(made) - 1
        if name in ("llama", "gpt2"):
            read += least
            assert talk.tokens_read == read
        else:  # a state is kept at the end of each prompt
            assert talk.tokens_read - read <= least + 6
            read = talk.tokens_read
        held = (whole + made)[:-1]
    assert read < sum(len(Template(ByteTokenizer(), None).ids(messages[: 2 * n])[0]) for n in (1, 2, 3))
    assert talk.transcript()["messages"] == messages


def test_a_turn_reads_only_what_is_new() -> None:
    """Where the answer's tokens are those of its text: each turn costs its message, what stands around it, and its answer."""
    talk, form = start(build("mamba")), Template(ByteTokenizer(), None)
    for text in ("Who?", "Why?", "When?"):
        before = talk.tokens_read
        list(talk.answer(text, stopped=lambda: True))  # one token
        assert talk.ended == "interrupted"
        talk.messages[-1]["content"] = talk.messages[-1]["content"] or "x"
        new = len(form.text([{"role": "user", "content": text}])) + len("\n") + len(" ?")
        if before:
            assert talk.tokens_read - before <= new + 6
        else:
            assert talk.tokens_read == len(form.text(talk.messages[:1]))


def test_the_oldest_turns_are_dropped_and_said() -> None:
    lines: list[str] = []
    module = build("llama")
    talk = start(module, capacity=100, new=8, system="Be brief.", lines=lines)
    for n in range(4):
        found = "".join(talk.answer(f"This is message number {n}."))
    assert lines[0] == "the context is full: the oldest turn is dropped"
    messages = talk.transcript()["messages"]
    assert len(messages) == 1 + 8  # the transcript keeps all
    last = [messages[0], *messages[-4:-1]]
    again = start(module, capacity=100, new=8, system="Be brief.")
    again.messages = last[1:3]
    assert "".join(again.answer("This is message number 3.")) == found
    before = list(talk.messages)
    with pytest.raises(TersorError, match="does not fit in the context of 100"):
        list(talk.answer("long " * 30))
    assert talk.messages == before
    assert "".join(talk.answer("Short."))


def test_a_stopped_answer_stays_in_the_conversation() -> None:
    module = build("flashrnn")
    talk = start(module, new=20)
    seen = 0

    def stopped() -> bool:
        nonlocal seen
        seen += 1
        return seen == 3

    part = "".join(talk.answer("Hello", stopped))
    assert (talk.ended, seen) == ("interrupted", 3)
    assert talk.messages[-1] == {"role": "assistant", "content": part.strip()}
    fresh = start(module, new=20)
    fresh.messages = [dict(each) for each in talk.messages]
    assert list(talk.answer("Go on")) == list(fresh.answer("Go on"))
    answer = talk.answer("Leave it")
    next(answer)
    answer.close()
    assert talk.messages[-1]["role"] == "assistant"


def test_a_reset_forgets_the_turns_and_keeps_the_system_message() -> None:
    talk = start(build("gpt2"), system="Be brief.")
    first = list(talk.answer("Hello"))
    list(talk.answer("Again"))
    talk.reset()
    assert list(talk.answer("Hello")) == first


@given(st.lists(st.text("ab\n", max_size=4), max_size=8), st.lists(st.sampled_from(["\nab", "ba", "bb"]), max_size=2))
def test_stops_end_the_text_however_it_is_cut(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    places = [whole.find(stop) for stop in stops if stop in whole]
    assert "".join(until(pieces, stops)) == (whole[: min(places)] if places else whole)


def test_templates_that_refuse_are_one_line() -> None:
    from transformers import PreTrainedTokenizerFast

    from tersor.checkpoint.load import load_tokenizer
    from tersor.checkpoint.source import resolve

    tokenizer: PreTrainedTokenizerFast = load_tokenizer(resolve("demo"))
    messages = chat_template.opening("Hi", "Be brief.")
    assert chat_template.of(tokenizer).plain
    form = chat_template.of(tokenizer, JINJA)
    assert form.text(messages) == "<system>Be brief.\n<user>Hi\n<assistant>"
    assert form.ids(messages)[0].tolist() == tokenizer(form.text(messages), add_special_tokens=False)["input_ids"]
    for broken, said in (("{{ raise_exception('no system') }}", "no system"), ("{% for %}", "refuses")):
        with pytest.raises(TersorError, match=said):
            chat_template.of(tokenizer, broken).text(messages)
    with pytest.raises(TersorError, match="reads bytes"):
        chat_template.of(ByteTokenizer(), JINJA)


# ---- the verb


@pytest.fixture
def chat(tersor_command: Callable[..., Ran], small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`tersor chat` of a small model with lines as standard input."""
    (tmp_path / "form.jinja").write_text(JINJA)

    def run(lines: str, *options: object) -> Ran:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        given = ("--max-new-tokens", 4, "--chat-template", tmp_path / "form.jinja", *options)
        return tersor_command("chat", small, *given)

    return run


def test_lines_are_turns_and_answers_the_output(chat: Callable[..., Ran], tmp_path: Path) -> None:
    ran = chat("Hello\n\nAnd then?\n", "--json", "--system", "Be brief.")
    assert ran.status == 0, ran.err
    found = json.loads(ran.out)
    assert [each["role"] for each in found["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    answers = [each["content"] for each in found["messages"] if each["role"] == "assistant"]
    plain = chat("Hello\nAnd then?\n", "--system", "Be brief.")
    assert plain.status == 0, plain.err
    assert plain.out.split() == " ".join(answers).split()
    lines = "/system Be brief.\nHello\n/reset\nHello\n/quit\nnever read\n"
    commanded = chat(lines)
    assert commanded.status == 0, commanded.err
    assert commanded.out.split() == f"{answers[0]} {answers[0]}".split()
    longer = chat(f"Hello\n/nothing\n/save {tmp_path}/talk.json\nAnd then?\n", "--json", "--system", "Be brief.")
    assert longer.status == 2
    assert "there is no command /nothing" in longer.err
    assert "/save is for terminals" in longer.err
    assert not (tmp_path / "talk.json").exists()
    assert json.loads(longer.out)["messages"] == found["messages"]


def test_a_conversation_is_saved_once(tmp_path: Path) -> None:
    talk, file = start(build("llama")), tmp_path / "talk.json"
    list(talk.answer("Hello"))
    with pytest.raises(TersorError, match="/save is for terminals"):
        _obey(talk, f"/save {file}", at_terminal=False)
    with pytest.raises(TersorError, match="needs the name of a file"):
        _obey(talk, "/save", at_terminal=True)
    assert _obey(talk, f"/save {file}", at_terminal=True)
    assert json.loads(file.read_text())["messages"] == talk.messages
    with pytest.raises(TersorError, match="there already"):
        _obey(talk, f"/save {file}", at_terminal=True)


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ("/nothing\n", (), "there is no command /nothing"),
        ("/quit now\n", (), "/quit takes nothing"),
        ("Hello\n", ("--context", 1), "--context 1"),
        ("Hello\n", ("--context", 8), "does not fit in the context of 8"),
        ("Hello\n", ("--max-new-tokens", 0), "--max-new-tokens 0"),
        ("Hello\n", ("--top-p", 2), "top_p 2.0"),
        ("Hello\n", ("--chat-template", "nowhere.jinja"), "nowhere.jinja"),
    ],
)
def test_what_is_wrong_is_one_line(
    chat: Callable[..., Ran], lines: str, options: tuple[object, ...], message: str
) -> None:
    ran = chat(lines, *options)
    assert ran.status == 2
    assert message in ran.err.splitlines()[-1]
    assert "Traceback" not in ran.err


def test_ctrl_c_is_noticed_once_and_interrupts_the_second_time() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stopped_by_ctrl_c() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_at_a_terminal_ctrl_c_goes_on_and_ctrl_d_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed: list[str | BaseException] = ["first", KeyboardInterrupt(), "  ", "second", EOFError(), "never"]

    def read(prompt: str = "") -> str:
        found = typed.pop(0)
        if isinstance(found, BaseException):
            raise found
        return found

    monkeypatch.setattr("builtins.input", read)
    assert list(_lines(at_terminal=True)) == ["first", "second"]
    assert "Ctrl-D or /quit ends" in capsys.readouterr().err


def test_generate_puts_the_template_around_one_prompt(tersor_command: Callable[..., Ran], small: Path) -> None:
    (small / "chat_template.jinja").write_text(JINJA)
    given = ("--max-new-tokens", 4)
    whole = tersor_command("generate", small, "<system>Be brief.\n<user>Hi\n<assistant>", *given)
    ran = tersor_command("generate", small, "Hi", "--system", "Be brief.", *given)
    assert ran.status == 0, ran.err
    assert whole.out.endswith(ran.out)
    assert "Hi" not in ran.out
