"""Constraints that hold for whole answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .automaton import Automaton, TokenAutomaton
from .blocks import masked_span
from .eos_exit import EosExit
from .recipe import Recipe
from .slots import Choice, Constraint, Exit
from .state import DecodeState

RESOURCE = "vocabulary"
"""Name under which `decode` is handed what tokens spell: ``resources={"vocabulary": vocabulary_of(tokenizer)}``."""


def check_final(recipe: Recipe, constraint: str) -> None:
    """What a constraint that promises something of the answer needs of the rest of a recipe.

    Raises:
        InputError: when something else can change the answer afterwards.
    """
    if recipe.remask.rewrites:
        raise InputError(
            f"the {constraint} constraint holds for what is committed, and {recipe.remask.type} changes it afterwards; "
            "use remask none"
        )
    if recipe.scorer.type != "none":
        raise InputError(
            f"the {recipe.scorer.type} scorer has the last word and does not know of the {constraint} constraint; use "
            "one of the two"
        )
    if type(recipe.exit).ends is not Exit.ends and not isinstance(recipe.exit, EosExit):
        raise InputError(
            f"the {recipe.exit.type} exit ends answers where the {constraint} constraint may not allow an end; use "
            "exit eos or none"
        )


class Language(Constraint):
    """Every answer is a string of a regular language, spelt in exactly as many tokens as there is room for.

    An answer reaches from a row's first mask to its end. With end-of-sequence tokens it may be shorter, and nothing but
    these follows; without, it fills the room. Before a step's tokens are proposed, each position keeps the tokens with
    which the answer can still be completed, over the exact number of positions that are open: reachability forward from
    the first and backward from the last position (as DINGO, arXiv:2505.23061, for known gaps). So tokens are drawn, and
    judged, among what is possible. Of several tokens in one step the surest is committed first, and each further one
    only if it is possible with those before it; the others stay open. There is therefore always a way to go on, and
    what is decoded is valid.
    """

    @abstractmethod
    def automaton(self) -> Automaton:
        """The language, over characters."""

    def check(self, recipe: Recipe) -> None:
        """Nothing may change an answer afterwards."""
        check_final(recipe, self.type)

    def begin(self, state: DecodeState) -> None:
        """Makes the automaton over tokens, and sees whether there is room.

        Raises:
            InputError: when a row has no valid answer.
        """
        strings = _vocabulary(state, self.type)
        lifted = _lifted(self, strings, state.spec.eos_ids, state.x.device)
        state.memory[self] = lifted
        forward, _ = lifted.messages(*_answers(state, state.x))
        possible = (forward[:, -1] & lifted.accepts).any(1)
        if bool(possible.all()):
            return
        row = int((~possible).nonzero()[0])
        start, end = (int(span[row]) for span in masked_span(state.masked))
        room, shortest = state.x.shape[1] - start, lifted.shortest()
        if shortest is None:
            reason = "the tokens of this vocabulary spell no answer at all"
        elif shortest > room:
            reason = f"the shortest answer takes {shortest} tokens and there is room for {room}; raise gen_length"
        elif end - start < room:
            reason = "no answer has the tokens that are given there"
        else:
            reason = f"no answer has exactly {room} tokens; take another gen_length, or a denoiser with eos_ids"
        raise InputError(f"the {self.type} constraint cannot be met in row {row}: {reason}")

    def restrict(self, state: DecodeState, logits: Tensor) -> Tensor:
        """Minus infinity at tokens with which no answer can be completed."""
        lifted: TokenAutomaton = state.memory[self]
        rows, columns = state.at
        masked = state.masked[rows, columns].nonzero()[:, 0]
        if not len(masked):
            return logits
        forward, backward = lifted.messages(*_answers(state, state.x))
        at = columns[masked] - _start(state)
        allowed = lifted.allowed(forward[rows[masked], at], backward[rows[masked], at + 1])
        return logits.index_put((masked,), logits[masked].masked_fill(~allowed, -torch.inf))

    def filter(self, state: DecodeState, choice: Choice) -> Choice:
        """Keeps what is possible together, the surest first."""
        lifted: TokenAutomaton = state.memory[self]
        sure = state.confidence("prob").masked_fill(~choice.select, -torch.inf)
        order = sure.argsort(dim=1, descending=True, stable=True)
        counts = choice.select.sum(1)
        written, kept = state.x.clone(), torch.zeros_like(choice.select)
        for number in range(int(counts.max())):
            rows = (counts > number).nonzero()[:, 0]
            columns = order[rows, number]
            tokens = choice.tokens[rows, columns]
            if number:
                forward, backward = lifted.messages(*(part[rows] for part in _answers(state, written)))
                at, index = columns - _start(state), torch.arange(len(rows), device=rows.device)
                after = lifted.after(tokens)
                possible = (forward[index, at] & backward[index, at + 1].gather(1, after)).any(1)
                rows, columns, tokens = rows[possible], columns[possible], tokens[possible]
            written[rows, columns] = tokens
            kept[rows, columns] = True
        return Choice(kept, choice.tokens, choice.failed)


@lru_cache(maxsize=4)
def _lifted(
    language: Language, strings: tuple[str | None, ...], eos_ids: tuple[int, ...], device: torch.device
) -> TokenAutomaton:
    return TokenAutomaton(language.automaton(), strings, eos_ids, device)


def _start(state: DecodeState) -> int:
    """The first column of the longest answer."""
    return int(masked_span(state.editable)[0].min())


def _answers(state: DecodeState, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, n) tokens of the answers, which of them are open, and which positions lie before a row's answer."""
    first, _ = masked_span(state.editable)
    start = int(first.min())
    if state.spec.eos_ids:
        tokens = torch.where(state.columns >= state.end[:, None], state.spec.eos_ids[0], tokens)
    open_ = tokens == state.spec.mask_id
    skipped = state.columns < first[:, None]
    return tokens[:, start:], (open_ & ~skipped)[:, start:], skipped[:, start:]


def _vocabulary(state: DecodeState, constraint: str) -> tuple[str | None, ...]:
    strings: Sequence[str | None] = state.resource(f"{constraint} constraint", RESOURCE)
    size = state.spec.vocab_size
    if len(strings) != size:
        raise InputError(f"resource {RESOURCE!r} says what {len(strings)} tokens spell; the denoiser predicts {size}")
    silent = state.spec.mask_id
    return tuple(None if number == silent else string for number, string in enumerate(strings))


def vocabulary_of(tokenizer: Any, size: int | None = None) -> list[str | None]:
    """What each token of a transformers tokenizer spells within a text; None for special and incomplete ones.

    Args:
        tokenizer: of the denoiser.
        size: number of tokens that the denoiser predicts, where it has spare ones.

    Raises:
        InputError: when the tokenizer has no token to put before the others.
    """
    special, count = set(tokenizer.all_special_ids), len(tokenizer)
    anchor = next((number for number in range(count) if number not in special and tokenizer.decode([number])), None)
    if anchor is None:
        raise InputError("the tokenizer has special tokens alone; give a list of strings as the vocabulary")
    before = tokenizer.decode([anchor], clean_up_tokenization_spaces=False)
    strings: list[str | None] = [None] * (count if size is None else size)
    for number in range(min(len(strings), count)):
        text = tokenizer.decode([anchor, number], clean_up_tokenization_spaces=False)
        if number not in special and text.startswith(before) and "\ufffd" not in text:
            strings[number] = text[len(before) :] or None
    return strings
