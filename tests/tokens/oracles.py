"""Denoisers that know the truth: exact posterior marginals of small tasks, by enumeration.

Every answer that a prompt allows is equally likely, so that the marginal of a position given the visible tokens is a
count over the answers that agree with them. What a decoding then gets wrong is the sampler's doing alone: it commits
tokens together that depend on each other. The probability of that has a closed form, found here without the
enumeration.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import torch
from torch import Tensor

from fewstep.samplers.tokens import CallableDenoiser, DenoiserSpec, Proposal, decode

EOS, WORD, INDEX, MASK = 0, 20, 21, 31
"""Ids: 1 to 19 are items; WORD is what is put in their place, INDEX + i says where; MASK is the last of 32."""
SPEC = DenoiserSpec(mask_id=MASK, vocab_size=MASK, eos_ids=(EOS,))


@dataclass(frozen=True)
class Task:
    """A rule from prompts to the answers that are right, each equally likely.

    Attributes:
        name: of the rule.
        prompt_length: of a prompt over n items.
        support: from prompts (R, P) to answers (R or 1, S, n).
        items: of the answer.
    """

    name: str
    items: int
    prompt_length: int
    support: Callable[[Tensor], Tensor]

    def prompts(self, rows: int) -> Tensor:
        """(rows, P), all the same."""
        items = torch.arange(1, self.items + 1)[torch.randperm(self.items, generator=torch.manual_seed(5))]
        extra = {"replace-index": [INDEX + 1, WORD], "replace-random": [WORD]}.get(self.name, [])
        prompt = torch.cat([items, torch.tensor(extra, dtype=torch.long)])[: self.prompt_length]
        return prompt.expand(rows, -1)

    def right(self, prompts: Tensor, answers: Tensor) -> Tensor:
        """(R,) bool, whether answers (R, n or more) are among the right ones, with nothing but EOS behind."""
        tail = (answers[:, self.items :] == EOS).all(1)
        return (self.support(prompts) == answers[:, None, : self.items]).all(2).any(1) & tail

    def marginals(self, ids: Tensor) -> Tensor:
        """(R, P + n + pads, 32) log-probabilities; an answer that contradicts itself leaves every item as it was."""
        support = self.support(ids[:, : self.prompt_length])
        given = ids[:, self.prompt_length :]
        pads = support.new_full((*support.shape[:2], given.shape[1] - self.items), EOS)
        support = torch.cat([support, pads], dim=2)
        agrees = ((support == given[:, None]) | (given == MASK)[:, None]).all(2).double()
        agrees = torch.where(agrees.sum(1, keepdim=True) == 0, 1.0, agrees)
        counts = torch.zeros(*given.shape, MASK + 1, dtype=torch.float64)
        counts.scatter_add_(2, support.transpose(1, 2).expand(len(ids), -1, -1), agrees[:, None].expand_as(
            support.transpose(1, 2).expand(len(ids), -1, -1)
        ))  # fmt: skip
        before = torch.full((len(ids), self.prompt_length, MASK + 1), 1.0, dtype=torch.float64)
        probs = torch.cat([before, counts / agrees.sum(1)[:, None, None]], dim=1)
        return probs[..., :MASK].log()

    def denoiser(self) -> CallableDenoiser:
        """The oracle."""
        return CallableDenoiser(self.marginals, SPEC)


def copy(items: int = 6) -> Task:
    return Task("copy", items, items, lambda prompt: prompt[:, None])


def reverse(items: int = 6) -> Task:
    return Task("reverse", items, items, lambda prompt: prompt.flip(1)[:, None])


def sort(items: int = 6) -> Task:
    return Task("sort", items, items, lambda prompt: prompt.sort(dim=1).values[:, None])


def replace_index(items: int = 6) -> Task:
    """The prompt ends with where, and with what."""

    def support(prompt: Tensor) -> Tensor:
        where = torch.arange(items) == prompt[:, items, None] - INDEX
        return torch.where(where, prompt[:, items + 1, None], prompt[:, :items])[:, None]

    return Task("replace-index", items, items + 2, support)


def replace_random(items: int = 6) -> Task:
    """One item, any, gives way to the word at the end of the prompt."""

    def support(prompt: Tensor) -> Tensor:
        return torch.where(torch.eye(items, dtype=torch.bool), prompt[:, items, None, None], prompt[:, None, :items])

    return Task("replace-random", items, items + 1, support)


def shuffle(items: int = 6) -> Task:
    orders = torch.tensor(list(permutations(range(items))))
    return Task("shuffle", items, items, lambda prompt: prompt[:, orders])


def latin(order: int = 4) -> Task:
    """A Latin square, row by row, without a prompt: 576 of order 4."""
    return Task("latin", order * order, 0, lambda prompt: latin_squares(order)[None])


@cache
def latin_squares(order: int) -> Tensor:
    """(S, order^2), items 1 to order."""
    rows = torch.tensor(list(permutations(range(1, order + 1))))
    squares = rows[:, None]
    for _ in range(order - 1):
        clash = (squares[:, None] == rows[None, :, None]).any(3).any(2)
        old, new = (~clash).nonzero(as_tuple=True)
        squares = torch.cat([squares[old], rows[new][:, None]], dim=1)
    return squares.flatten(1)


SAMPLED = Proposal(temperature=1.0)


def success(task, recipe, rows, seeds=0):
    """Share of the rows whose answer is right, and the decoding."""
    prompts = task.prompts(rows)
    decoded = decode(task.denoiser(), prompts, task.items, recipe, seeds=seeds)
    assert torch.equal(decoded.tokens[:, : task.prompt_length], prompts)
    return task.right(prompts, decoded.answers).double().mean().item(), decoded


CERTAIN = (copy, reverse, sort, replace_index)
"""Tasks in which every answer is certain from the start."""


def shuffle_success(items: int, per_step: int) -> float:
    """Tokens of a step are drawn with replacement from the m items that are left: prod (m - i) / m over the step."""
    chance, left = 1.0, items
    while left:
        now = min(per_step, left)
        chance *= math.prod((left - i) / left for i in range(now))
        left -= now
    return chance


def replace_random_success(items: int, per_step: int) -> float:
    """f(m) = k/m (1 - 1/m)^(k-1) + (1 - 1/m)^k f(m - k): one of the k draws the word, or none and it goes on."""
    if items == 0:
        return 0.0
    now = min(per_step, items)
    none = (1 - 1 / items) ** now
    one = now / items * (1 - 1 / items) ** (now - 1)
    return one + none * replace_random_success(items - now, per_step)


def shuffle_success_of(counts: list[int]) -> float:
    """The same for steps that commit different numbers of tokens."""
    chance, left = 1.0, sum(counts)
    for now in counts:
        chance *= math.prod((left - i) / left for i in range(now))
        left -= now
    return chance
