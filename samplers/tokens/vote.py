"""The answer that most of several decodings agree on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .denoiser import Denoiser
from .loop import decode
from .recipe import Recipe
from .result import Decoded

Parse = Callable[[Tensor], Hashable | None]
"""From the ids (n,) of an answer, without what follows its end, to what is voted on; None when it cannot be read."""


@dataclass(frozen=True, slots=True)
class Voted:
    """The outcome of a vote. B rows, K decodings of each.

    Attributes:
        answers: what was voted for, by row; None where no decoding could be read.
        share: (B,) float64, share of the K decodings that gave it.
        winner: (B,) int64, the first decoding that gave it; 0 where none could be read.
        ballots: by decoding and row, what it gave.
        decoded: the K decodings, those of a recipe one after the other.
        nfe: (B,) int64, forward passes of all K together: what the vote cost.
        token_forwards: (B,) int64, positions evaluated in them.
    """

    answers: tuple[Hashable | None, ...]
    share: Tensor
    winner: Tensor
    ballots: tuple[tuple[Hashable | None, ...], ...]
    decoded: tuple[Decoded, ...]
    nfe: Tensor
    token_forwards: Tensor

    @property
    def tokens(self) -> Tensor:
        """(B, L) int64, of the winners."""
        return torch.stack([self.decoded[winner].tokens[row] for row, winner in enumerate(self.winner.tolist())])


def vote(
    denoiser: Denoiser,
    prompt: Tensor | Sequence[Any],
    gen_length: int,
    recipes: Sequence[Recipe | str],
    parse: Parse,
    *,
    repeats: int = 1,
    seeds: int | Sequence[int] = 0,
    **options: Any,
) -> Voted:
    """Decodes by several recipes and seeds, and takes the answer that comes most often (HEX, arXiv:2510.05040).

    HEX varies the length of blocks: ``[recipe.replace(blocks=Fixed(length=n)) for n in (8, 16, 32)]``. It spends
    K = recipes x repeats times the cost of one decoding and makes nothing faster; compare it with anything at the cost
    that the result states. Of answers that come equally often, the one that came first wins.

    Args:
        denoiser: the network.
        prompt: one per row, as for `decode`.
        gen_length: masks to append.
        recipes: how.
        parse: reads an answer.
        repeats: decodings by each recipe, with seeds of their own.
        seeds: of the rows, as for `decode`.
        options: further arguments of `decode`.

    Returns:
        Answers, votes, the decodings and their cost.

    Raises:
        InputError: when there is nothing to vote on.
    """
    if not recipes or repeats < 1:
        raise InputError(f"a vote needs decodings; got {len(recipes)} recipes and {repeats} repeats")
    rows, runs = len(prompt), len(recipes) * repeats
    own = [seeds + row for row in range(rows)] if isinstance(seeds, int) else list(seeds)
    decoded = tuple(
        decode(
            denoiser, prompt, gen_length, recipes[run // repeats], seeds=[seed * runs + run for seed in own], **options
        )
        for run in range(runs)
    )
    eos = torch.tensor(denoiser.spec.eos_ids, dtype=torch.long)
    ballots = tuple(_ballots(result, eos, parse) for result in decoded)
    answers, shares, winners = zip(*(_count(given) for given in zip(*ballots, strict=True)), strict=True)
    return Voted(
        answers=answers,
        share=torch.tensor(shares, dtype=torch.float64),
        winner=torch.tensor(winners),
        ballots=ballots,
        decoded=decoded,
        nfe=_sum([result.nfe for result in decoded]),
        token_forwards=_sum([result.token_forwards for result in decoded]),
    )


def _ballots(result: Decoded, eos: Tensor, parse: Parse) -> tuple[Hashable | None, ...]:
    ballots = []
    for answer, failed in zip(result.answers.cpu(), result.failed.tolist(), strict=True):
        ends = torch.isin(answer, eos).nonzero()
        ballots.append(None if failed else parse(answer[: int(ends[0])] if len(ends) else answer))
    return tuple(ballots)


def _count(given: Sequence[Hashable | None]) -> tuple[Hashable | None, float, int]:
    """The winner, its share, and the first decoding that gave it."""
    read = [answer for answer in given if answer is not None]
    if not read:
        return None, 0.0, 0
    answer, votes = Counter(read).most_common(1)[0]
    return answer, votes / len(given), given.index(answer)


def _sum(costs: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(costs)).sum(0)
