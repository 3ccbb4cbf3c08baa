"""The tasks with known answers, and the questions of a bench."""

import json
import math
import random

import pytest

from fewstep.eval.tokens import TASKS, file_questions, read_questions, task_questions
from fewstep.eval.tokens.tasks import latin_squares, question_source
from fewstep.samplers import InputError


def examples(name, count, seed):
    draw = random.Random(seed)
    return [TASKS[name].example(draw) for _ in range(count)]


@pytest.mark.parametrize("name", TASKS)
def test_tasks_hold_their_own_answers_right_and_others_wrong(name):
    task = TASKS[name]
    drawn = examples(name, 200, seed=1)
    sizes = {len(example.answer) for example in drawn}
    assert (min(sizes), max(sizes)) == (task.fewest, task.most)
    for example in drawn:
        answer = example.answer
        assert example.prompt.startswith(f"{name}")
        assert task.right(example.prompt, answer)
        for wrong in (answer[:-1], answer + answer[0], answer[0] * 2 + answer[2:], ""):
            assert not task.right(example.prompt, wrong)
    assert all(len(TASKS[name].example(random.Random(seed), 40).prompt) < 40 for seed in range(20))


RULES = {
    "copy": lambda items, _: {items},
    "reverse": lambda items, _: {"".join(reversed(items))},
    "sort": lambda items, _: {"".join(sorted(items))},
    "replace-index": lambda items, word: {"".join(word[1] if i == int(word[0]) else c for i, c in enumerate(items))},
    "replace-random": lambda items, word: {items.replace(c, word) for c in items},
}


@pytest.mark.parametrize("name", RULES)
def test_answers_come_from_the_rule_and_cover_it(name):
    seen, possible = set(), set()
    for example in examples(name, 100, seed=3):
        items, word = [*example.prompt.split()[1:], None][:2]
        right = RULES[name](items, word)
        assert example.answer in right
        seen.add(example.answer)
        possible |= right
    assert name == "replace-random" or seen == possible


def test_open_tasks_draw_every_answer():
    assert (len(latin_squares(3)), len(latin_squares(4))) == (12, 576)
    drawn = examples("latin-3", 300, 0)
    squares = {tuple(e.prompt.split()[1].index(c) for c in e.answer) for e in drawn}
    assert len(squares) == 12
    assert not TASKS["latin-3"].right("latin-3 xyz\n", "xyzzxyxyz")
    three = [example for example in examples("shuffle", 400, 0) if len(example.answer) == 3]
    orders = {tuple(example.prompt.split()[1].index(c) for c in example.answer) for example in three}
    assert len(orders) == math.factorial(3)


def test_a_seed_is_a_question_whoever_else_is_asked():
    asked = task_questions(range(100, 132))
    assert [question.task for question in asked] == [tuple(TASKS)[seed % 8] for seed in range(100, 132)]
    assert [question.prompt for question in task_questions([117])] == [asked[17].prompt]
    assert len({question.prompt for question in asked}) == 32
    assert {question.task for question in task_questions(range(9), ["sort", "copy"])} == {"sort", "copy"}
    for question in asked:
        rule = TASKS[question.task]
        assert question.accepts("") is rule.right(question.prompt, "") is False


def test_questions_of_a_file_come_in_turn(tmp_path):
    lines = [
        {"task": "sum", "prompt": "1+1=", "answers": ["2", "two"]},
        {"task": "say", "prompt": "hi", "answers": ["ho"]},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    asked = file_questions(read_questions(path), range(4, 7))
    assert [(question.task, question.prompt, question.seed) for question in asked] == [
        ("sum", "1+1=", 4), ("say", "hi", 5), ("sum", "1+1=", 6),
    ]  # fmt: skip
    assert asked[0].accepts(" two\n")
    assert not asked[0].accepts("3")
    assert not asked[1].accepts("2")


def test_a_source_asks_each_question_of_its_file_once(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps({"task": "t", "prompt": f"{n}", "answers": ["a"]}) for n in range(15)))
    plain, mixed, other = (question_source("nowhere", path, seed) for seed in (None, 0, 1))
    orders = [[question.prompt for question in source(range(15))] for source in (plain, mixed, other)]
    assert orders[0] == [f"{n}" for n in range(15)]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert plain.about["lines"] == 15
    assert plain.about != mixed.about != other.about
    assert question_source("nowhere", path, 0) == mixed
    for n, parts in ((15, 1), (7, 2), (5, 3)):
        plain.check_supply(n, parts)
        with pytest.raises(InputError, match=rf"--n {n + 1} asks {(n + 1) * parts} .* give --n {n}, or more questions"):
            plain.check_supply(n + 1, parts)
    with pytest.raises(InputError, match=r"--n 9 asks 18 different questions, and .* holds 15; give more questions"):
        plain.check_supply(9, 2, least=8)
    demo = question_source("demo:tokens", None, 0)
    demo.check_supply(10**9, 3)
    assert [question.prompt for question in demo([117])] == [question.prompt for question in task_questions([117])]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no question; write lines such as"),
        ("{", "line 1 is not JSON"),
        ('{"task": "a", "prompt": "b"}', "line 1: answers: Field required"),
        ('{"task": "a", "prompt": "b", "answers": []}', "line 1: answers"),
        ('\n{"task": "a", "prompt": "", "answers": ["c"]}', "line 2: prompt"),
    ],
)
def test_bad_files_of_questions_are_refused(tmp_path, text, problem):
    path = tmp_path / "questions.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=problem):
        read_questions(path)
    with pytest.raises(InputError, match="cannot read"):
        read_questions(tmp_path / "absent.jsonl")
