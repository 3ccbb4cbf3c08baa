"""Questions with known answers: the demo's tasks, and those of a file."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import permutations, product
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...samplers.errors import InputError, first_problem
from ..assets import DEMO_TOKENS
from ..record import digest


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and one of its right answers."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Task:
    """A rule from prompts to right answers, each equally likely.

    Attributes:
        name: first word of its prompts.
        make: an example with some number of items.
        right: whether an answer (n characters, without what follows the end) is right.
        fewest: items of an example.
        most: items of an example.
    """

    name: str
    make: Callable[[random.Random, int], Example]
    right: Callable[[str, str], bool]
    fewest: int = 3
    most: int = 10

    def example(self, draw: random.Random, room: int = 256) -> Example:
        """An example of any size that fits into ``room`` tokens, with the one that ends its answer."""
        while True:
            example = self.make(draw, draw.randint(self.fewest, self.most))
            if len(example.prompt) + len(example.answer) < room:
                return example


def _items(draw: random.Random, count: int) -> str:
    """Letters that all differ."""
    return "".join(draw.sample(string.ascii_lowercase, count))


def _certain(name: str, rule: Callable[[str], str]) -> Task:
    """A task with one right answer to a list of items."""

    def make(draw: random.Random, count: int) -> Example:
        items = _items(draw, count)
        return Example(f"{name} {items}\n", rule(items))

    return Task(name, make, lambda prompt, answer: answer == rule(prompt.split()[1]), most=24)


def _replace_index() -> Task:
    def rule(items: str, where: int, word: str) -> str:
        return items[:where] + word + items[where + 1 :]

    def make(draw: random.Random, count: int) -> Example:
        items, where, word = _items(draw, count), draw.randrange(count), draw.choice(string.ascii_uppercase)
        return Example(f"replace-index {items} {where}{word}\n", rule(items, where, word))

    def right(prompt: str, answer: str) -> bool:
        _, items, asked = prompt.split()
        return answer == rule(items, int(asked[0]), asked[1])

    return Task("replace-index", make, right)


def _replace_random() -> Task:
    def make(draw: random.Random, count: int) -> Example:
        items, where, word = _items(draw, count), draw.randrange(count), draw.choice(string.ascii_uppercase)
        return Example(f"replace-random {items} {word}\n", items[:where] + word + items[where + 1 :])

    def right(prompt: str, answer: str) -> bool:
        _, items, word = prompt.split()
        return answer in {items[:where] + word + items[where + 1 :] for where in range(len(items))}

    return Task("replace-random", make, right)


def _shuffle() -> Task:
    def make(draw: random.Random, count: int) -> Example:
        items = _items(draw, count)
        return Example(f"shuffle {items}\n", "".join(draw.sample(items, count)))

    return Task("shuffle", make, lambda prompt, answer: sorted(answer) == sorted(prompt.split()[1]))


@cache
def latin_squares(order: int) -> tuple[str, ...]:
    """All Latin squares over the first letters, row by row: 12 of order 3, 576 of order 4."""
    rows = ["".join(row) for row in permutations("abcd"[:order])]
    squares = ("".join(square) for square in product(rows, repeat=order))
    return tuple(s for s in squares if all(len(set(s[column::order])) == order for column in range(order)))


def _latin(order: int) -> Task:
    letters = "abcd"[:order]

    def make(draw: random.Random, _: int) -> Example:
        items = _items(draw, order)
        square = draw.choice(latin_squares(order))
        return Example(f"latin-{order} {items}\n", square.translate(str.maketrans(letters, items)))

    def right(prompt: str, answer: str) -> bool:
        items = prompt.split()[1]
        known = set(answer) <= set(items)
        return known and answer.translate(str.maketrans(items, letters)) in latin_squares(order)

    return Task(f"latin-{order}", make, right, order**2, order**2)


TASKS = {
    task.name: task
    for task in (
        _certain("copy", lambda items: items),
        _certain("reverse", lambda items: items[::-1]),
        _certain("sort", lambda items: "".join(sorted(items))),
        _replace_index(),
        _replace_random(),
        _shuffle(),
        _latin(3),
        _latin(4),
    )
}
"""By name. Items are letters that all differ; the word that replaces one is a capital; squares are in rows."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a bench.

    Attributes:
        task: what it belongs to.
        prompt: the text that is asked.
        seed: of the decoding of its answer.
        accepts: whether an answer, without what follows its end, is right.
    """

    task: str
    prompt: str
    seed: int
    accepts: Callable[[str], bool]


def task_questions(seeds: Sequence[int], tasks: Sequence[str] = tuple(TASKS)) -> list[Question]:
    """One question of the demo's tasks for each seed; the seed decides the task, in turn, and the items.

    Raises:
        KeyError: for a task that there is not.
    """

    def question(seed: int) -> Question:
        task = TASKS[tasks[seed % len(tasks)]]
        prompt = task.example(random.Random(f"{task.name} {seed}")).prompt
        return Question(task.name, prompt, seed, lambda answer: task.right(prompt, answer))

    return [question(seed) for seed in seeds]


class Line(BaseModel):
    """A line of a file of questions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str = Field(min_length=1, description="What it belongs to.")
    prompt: str = Field(min_length=1, description="The text that is asked.")
    answers: tuple[str, ...] = Field(min_length=1, description="Right answers, compared without blanks at both ends.")


def read_questions(path: Path) -> list[Line]:
    """The questions of a file, one JSON object a line, such as
    ``{"task": "sum", "prompt": "1+1=", "answers": ["2"]}``.

    Raises:
        InputError: when there is no such file, or a line is no question.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    found = []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            found.append(Line.model_validate(json.loads(text)))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number} is not JSON: {error.msg}") from error
        except ValidationError as error:
            raise InputError(f"{path}, line {number}: {first_problem(error)}") from None
    if not found:
        raise InputError(
            f'{path} holds no question; write lines such as {{"task": ..., "prompt": ..., "answers": [...]}}'
        )
    return found


def file_questions(lines: Sequence[Line], seeds: Sequence[int]) -> list[Question]:
    """One question of a file for each seed, in turn."""

    def question(seed: int) -> Question:
        line = lines[seed % len(lines)]
        right = {answer.strip() for answer in line.answers}
        return Question(line.task, line.prompt, seed, lambda answer: answer.strip() in right)

    return [question(seed) for seed in seeds]


@dataclass(frozen=True)
class QuestionSource:
    """What a bench or a search asks. Made by `question_source`.

    Attributes:
        path: of the file of questions; None for the demo's tasks, of which there is no end.
        lines: of the file, in the order of the seeds.
    """

    path: Path | None = None
    lines: tuple[Line, ...] = ()

    def __call__(self, seeds: Sequence[int]) -> list[Question]:
        """One question for each seed."""
        return task_questions(seeds) if self.path is None else file_questions(self.lines, seeds)

    @cached_property
    def about(self) -> dict[str, Any]:
        """What tells these questions from others, JSON data."""
        if self.path is not None:
            shown = [line.model_dump(mode="json") for line in self.lines]
            return {"lines": len(shown), "digest": digest(shown)}
        some = [(question.task, question.prompt) for question in task_questions(range(2 * len(TASKS)))]
        return {"tasks": list(TASKS), "digest": digest(some)}

    def check_supply(self, n: int, parts: int = 1, least: int = 1) -> None:
        """Refuses to ask a question of a file twice: the errors of what is measured would come out too small.

        Args:
            n: what the user gave as ``--n``.
            parts: how many times as many questions are asked.
            least: that ``--n`` may be.

        Raises:
            InputError: when the file has fewer questions.
        """
        held, most = len(self.lines), len(self.lines) // parts
        if self.path is not None and parts * n > held:
            mend = f"give --n {most}, or more questions" if most >= least else "give more questions"
            raise InputError(f"--n {n} asks {parts * n} different questions, and {self.path} holds {held}; {mend}")


def question_source(pipe: str, path: Path | None, shuffle_seed: int | None = None) -> QuestionSource:
    """The questions of a file, or the demo's tasks.

    Args:
        pipe: the token models, as the user named them.
        path: of the file of questions; None for those of the demo.
        shuffle_seed: of the order of a file's questions; None for that of its lines.

    Raises:
        InputError: when there is no file of questions, or one that cannot be read.
    """
    if path is None:
        if pipe != DEMO_TOKENS:
            raise InputError(f"--pipe {pipe} has no questions of its own; give --questions FILE")
        return QuestionSource()
    lines = read_questions(path)
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(lines)
    return QuestionSource(path, tuple(lines))
