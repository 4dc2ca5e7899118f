from __future__ import annotations

import numpy as np
import pytest
import torch

from tersor.data.chain_of_thought import (
    EOS,
    TASKS,
    chain_targets,
    direct,
    draw_chains,
    edit_table,
    lis_lengths,
    make_chains,
    solve_arithmetic,
    solve_equations,
)
from tersor.errors import TersorError

LENGTHS = {"arithmetic": 6, "equation": 3, "lis": 12, "edit_distance": 6}
each_task = pytest.mark.parametrize("task", TASKS)


def parts(words: list[str], separator: str) -> list[list[str]]:
    return [part.split() for part in " ".join(words).split(f" {separator} ")]


@pytest.mark.parametrize(
    "text",  # published samples
    [
        "9 * ( 4 + 3 ) / ( 3 - 9 ) = 9 * 7 / ( 3 - 9 ) = 8 / ( 3 - 9 ) = 8 / 5 = 6",
        "7 + 10 - 7 / ( 8 * 1 ) = 7 + 10 - 7 / 8 = 7 + 10 - 5 = 7 + 5 = 1",
        "10 + ( 3 - 2 - 5 ) * 8 = 10 + ( 1 - 5 ) * 8 = 10 + 7 * 8 = 10 + 1 = 0",
    ],
)
def test_published_chains_of_arithmetic_keep_their_value(text: str) -> None:
    assert len({solve_arithmetic(state) for state in parts(text.split(), "=")}) == 1


def test_arithmetic_loses_one_operator_a_step_and_keeps_its_value() -> None:
    for words in draw_chains("arithmetic", 100, length=6):
        states = parts(words, "=")
        assert [sum(word in "+-*/" for word in state) for state in states] == [6, 5, 4, 3, 2, 1, 0]
        assert {solve_arithmetic(state) for state in states} == {int(words[-1])}


def test_brackets_stand_only_where_precedence_needs_them() -> None:
    for words in draw_chains("arithmetic", 60, length=4):
        question = parts(words, "=")[0]
        for place in (i for i, word in enumerate(question) if word == "("):
            bare = without_brackets(question, place)
            always = question[place - 1 : place] == ["/"]
            assert always or parsed(bare) != parsed(question)


def without_brackets(words: list[str], place: int) -> list[str]:
    depth = 0
    for end in range(place, len(words)):
        depth += {"(": 1, ")": -1}.get(words[end], 0)
        if depth == 0:
            return words[:place] + words[place + 1 : end] + words[end + 1 :]
    raise AssertionError("unbalanced")


def parsed(words: list[str]) -> object:
    """The tree of an expression as Python reads it."""
    import ast

    return ast.dump(ast.parse(" ".join(words), mode="eval"))


def test_published_systems_of_equations_are_solved_in_the_published_steps() -> None:
    history = solve_equations(np.array([[5, 8, 9, 5], [0, 0, 1, 7], [6, 9, 2, 4]]))
    assert history is not None
    assert history[1].tolist() == [[1, 6, 4, 1], [0, 0, 1, 7], [0, 6, 0, 9]]
    assert history[-1][:, -1].tolist() == [8, 7, 7]
    assert solve_equations(np.array([[1, 2, 3], [2, 4, 6]])) is None


def test_equations_are_written_as_published() -> None:
    for words in draw_chains("equation", 50, length=3):
        states = parts(words, "<sep>")
        assert len(states) == 4
        first = [line.split() for line in " ".join(states[0]).split(" , ")]
        matrix = np.array([[int(line[i]) for i in (0, 3, 6, 9)] for line in first])
        history = solve_equations(matrix)
        assert history is not None
        last = [line.split() for line in " ".join(states[-1]).split(" , ")]
        assert last == [[letter, "=", str(value)] for letter, value in zip("abc", history[-1][:, -1], strict=True)]
        solution = history[-1][:, -1]
        assert np.array_equal(matrix[:, :3] @ solution % 11, matrix[:, 3])


def test_subsequences_against_all_of_them() -> None:
    for words in draw_chains("lis", 20, length=8):
        numbers, steps, answer = ([int(word) for word in part] for part in parts(words, "<sep>"))
        longest = max(
            bin(chosen).count("1")
            for chosen in range(256)
            if np.all(np.diff([n for i, n in enumerate(numbers) if chosen >> i & 1]) > 0)
        )
        assert lis_lengths(numbers) == steps
        assert answer == [longest]
        assert all(8 < number < 250 for number in numbers)


def test_edit_chains_are_the_rows_of_the_table() -> None:
    for words in draw_chains("edit_distance", 30, length=6):
        question, steps, answer = parts(words, "<sep>")
        bar = question.index("|")
        first, second = question[:bar], question[bar + 1 :]
        assert len(first) <= len(second)
        table = edit_table(first, second)
        assert [row.split() for row in " ".join(steps).replace(" ,", ",").split(",") if row] == [
            [str(value) for value in row[1:]] for row in table[1:]
        ]
        assert answer == [str(table[-1][-1])]


@each_task
def test_samples_differ_and_their_seed_says_which(task: str) -> None:
    length = LENGTHS[task]
    first, again = make_chains(task, 40, length=length), make_chains(task, 40, length=length)
    other = make_chains(task, 40, length=length, seed=1)
    assert torch.equal(first, again)
    assert len({tuple(row) for row in first.tolist()}) == 40
    assert not torch.equal(first[:, :10], other[:, :10])
    test_set = draw_chains(task, 40, length=length, without=draw_chains(task, 40, length=length))
    assert not {tuple(words) for words in test_set} & {tuple(words) for words in draw_chains(task, 40, length=length)}


@each_task
def test_loss_is_behind_the_first_separator_up_to_the_end(task: str) -> None:
    known, ids = TASKS[task], make_chains(task, 5, length=LENGTHS[task])
    for row, target in zip(ids.tolist(), chain_targets(task, ids).tolist(), strict=True):
        start = row.index(known.words.index(known.separator))
        assert target[:start] == [0] * start
        assert target[start : start + 1] == row[start + 1 : start + 2]
        assert target[row.index(EOS) - 1] == EOS
        assert not any(target[row.index(EOS) :])


def test_a_direct_answer_has_its_loss_on_one_token() -> None:
    ids = make_chains("arithmetic", 8, length=4, chain=False)
    targets = chain_targets("arithmetic", ids, chain=False)
    assert (targets.count_nonzero(1) == 1).all()
    assert direct("lis", ["3", "4", "<sep>", "1", "2", "<sep>", "2"]) == ["3", "4", "<sep>", "2"]


def test_lengths_as_published() -> None:
    assert make_chains("lis", 2, length=50).shape[1] == 104  # published buffers are one longer
    assert make_chains("lis", 2, length=50, chain=False).shape[1] == 53
    assert make_chains("equation", 40, length=3, chain=False).shape[1] == 45


def test_shorter_problems_are_mixed_in_by_their_length() -> None:
    drawn = draw_chains("arithmetic", 300, length=5, shorter=True)
    sizes = np.bincount([sum(word in "+-*/" for word in parts(words, "=")[0]) for words in drawn], minlength=6)
    assert sizes.sum() == 300
    assert sizes[5] > sizes[3] > 20


@pytest.mark.parametrize(("task", "length"), [("equation", 6), ("lis", 125), ("edit_distance", 3), ("arithmetic", 0)])
def test_refuses_lengths_that_do_not_work(task: str, length: int) -> None:
    with pytest.raises(TersorError, match=str(length)):
        draw_chains(task, 1, length=length)


def test_refuses_unknown_tasks_and_more_problems_than_there_are() -> None:
    with pytest.raises(TersorError, match="'sorting'"):
        make_chains("sorting", 1, length=3)
    with pytest.raises(TersorError, match="100000"):
        draw_chains("arithmetic", 100_000, length=1)
