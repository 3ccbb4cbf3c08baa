"""Answers as files: one for each configuration, which a bench that was stopped or has a larger n goes on with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ...samplers.errors import InputError
from ...samplers.files import read_json, write_json
from .answers import Answer
from .models import TokenModels
from .tasks import Question


class KeptAnswer(BaseModel):
    """An answer with its prompt.

    Attributes:
        steps: step at which each character of ``text`` was committed; empty where characters and tokens do not match.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int
    task: str
    prompt: str
    text: str
    right: bool
    nfe: int
    token_forwards: int
    new_tokens: int
    failed: bool
    steps: tuple[int, ...]


class AnswerFile(BaseModel):
    """The answers of a configuration, in the order of their seeds.

    Attributes:
        exact: whether all of them are those of the same recipe without a cache.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    config_hash: str
    exact: bool = True
    answers: tuple[KeptAnswer, ...] = ()

    def first(self, count: int) -> AnswerFile:
        """The file cut to its first ``count`` answers."""
        return self.model_copy(update={"answers": self.answers[:count]})


def answer_path(out: Path, config_hash: str) -> Path:
    """Where the answers of a configuration are."""
    return out / "answers" / f"{config_hash}.json"


def read_answers(out: Path, config_hash: str) -> AnswerFile | None:
    """The answers of a configuration, None when there are none.

    Raises:
        InputError: when the file is damaged or of another configuration.
    """
    path = answer_path(out, config_hash)
    if not path.is_file():
        return None
    try:
        found = AnswerFile.model_validate(read_json(path))
    except ValidationError:
        raise InputError(f"{path} holds no answers of this version of fewstep; delete it and run again") from None
    if found.config_hash != config_hash:
        raise InputError(f"{path} belongs to another configuration ({found.config_hash}); delete it and run again")
    return found


@dataclass(frozen=True)
class AnswerSet:
    """The answers of one configuration to some questions, made or not.

    Attributes:
        out: folder of the bench.
        config_hash: what its file must say.
        questions: in the order of their seeds.
    """

    out: Path
    config_hash: str
    questions: Sequence[Question]

    def read(self) -> AnswerFile:
        """The answers that are there, at most as many as questions.

        Raises:
            InputError: when the file is damaged, or of other questions.
        """
        found = (read_answers(self.out, self.config_hash) or AnswerFile(config_hash=self.config_hash)).first(
            len(self.questions)
        )
        pairs = zip(found.answers, self.questions, strict=False)
        if any((answer.seed, answer.prompt) != (asked.seed, asked.prompt) for answer, asked in pairs):
            path = answer_path(self.out, self.config_hash)
            raise InputError(f"{path} holds answers to other questions; delete it and run again")
        return found

    def missing(self) -> int:
        """Number of answers that are still to be made."""
        return len(self.questions) - len(self.read().answers)

    def complete(
        self,
        models: TokenModels,
        ask: Callable[[Sequence[Question]], list[Answer]],
        batch_size: int,
        progress: Callable[[int], None],
    ) -> AnswerFile:
        """Makes what is missing, and writes the file after each batch.

        Args:
            models: whose tokenizer the answers are of.
            ask: gives the answers to some questions.
            batch_size: questions at a time.
            progress: called with the number of answers that came in.
        """
        found = self.read()
        for first in range(len(found.answers), len(self.questions), batch_size):
            asked = self.questions[first : first + batch_size]
            answers = ask(asked)
            kept = [_kept(models, question, answer) for question, answer in zip(asked, answers, strict=True)]
            exact = found.exact and all(answer.exact for answer in answers)
            found = found.model_copy(update={"exact": exact, "answers": (*found.answers, *kept)})
            write_json(answer_path(self.out, self.config_hash), found.model_dump(mode="json"))
            progress(len(asked))
        return found


def _kept(models: TokenModels, question: Question, answer: Answer) -> KeptAnswer:
    return KeptAnswer(
        seed=answer.seed,
        task=answer.task,
        prompt=question.prompt,
        text=answer.text,
        right=answer.right,
        nfe=answer.nfe,
        token_forwards=answer.token_forwards,
        new_tokens=answer.new_tokens,
        failed=answer.failed,
        steps=character_steps(models, answer),
    )


def character_steps(models: TokenModels, answer: Answer) -> tuple[int, ...]:
    """The step of each character of an answer; empty where the text's tokens are not those that were decoded."""
    offsets = models.tokenizer(answer.text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    if answer.failed or len(answer.reveal) - len(offsets) not in (0, 1):
        return ()
    steps = [0] * len(answer.text)
    for (start, end), step in zip(offsets, answer.reveal, strict=False):
        steps[start:end] = [step] * (end - start)
    return tuple(steps)
