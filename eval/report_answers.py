"""What a report shows of the answers: those to the first questions, method by method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from .report_runs import Bench
from .tokens.kept import KeptAnswer, read_answers

LEVELS = 5
LONGEST = 40  # characters of an answer; what follows is cut


@dataclass(frozen=True)
class Piece:
    """Characters that were committed in one step.

    Attributes:
        text: with marks for characters that cannot be seen.
        step: counted from 1; None where it is not known.
        level: of the tint, from 0 for the first step of the answer to ``LEVELS - 1`` for the last.
    """

    text: str
    step: int | None
    level: int


@dataclass(frozen=True)
class Shown:
    """One cell: an answer in pieces, and what is to be said about it."""

    pieces: tuple[Piece, ...]
    right: bool
    failed: bool
    cut: bool
    steps: int


def answer_samples(out: Path, bench: Bench, seeds: Sequence[int]) -> dict[str, Any]:
    """What report_answers.html prints.

    Args:
        out: folder of the bench.
        bench: its runs.
        seeds: of the questions.

    Raises:
        InputError: when a file of answers is damaged or belongs to another run.
    """
    asked: dict[int, KeptAnswer] = {}
    shown: dict[str, dict[int, Shown]] = {}
    for run in bench.runs:
        found = read_answers(out, run.config_hash)
        mine = {answer.seed: answer for answer in found.answers if answer.seed in seeds} if found else {}
        asked |= mine
        shown[run.name] = {seed: _shown(answer) for seed, answer in mine.items()}
    return {
        "questions": {seed: visible(asked[seed].prompt) for seed in seeds if seed in asked},
        "shown": shown,
        "levels": range(LEVELS),
    }


def _shown(answer: KeptAnswer) -> Shown:
    return Shown(
        pieces=tuple(_pieces(answer)),
        right=answer.right,
        failed=answer.failed,
        cut=len(answer.text) > LONGEST,
        steps=answer.nfe,
    )


def _pieces(answer: KeptAnswer) -> Iterator[Piece]:
    text, steps = answer.text[:LONGEST], answer.steps[:LONGEST]
    if not steps:
        if text:
            yield Piece(visible(text), None, 0)
        return
    first, last = min(answer.steps), max(answer.steps)
    for step, group in groupby(zip(text, steps, strict=True), key=lambda pair: pair[1]):
        level = (LEVELS - 1) * (step - first) // max(1, last - first)
        yield Piece(visible("".join(character for character, _ in group)), step + 1, level)


def visible(text: str) -> str:
    """Text on one line: what separates lines and cells is shown by marks."""
    return text.rstrip("\n").replace("\n", "↵").replace("\t", "⇥")
