"""Small laws known exactly, and what a decoding of them has to look like."""

from collections import Counter
from itertools import product

import torch
from scipy.stats import chisquare

from fewstep.samplers.tokens import CallableDenoiser, DenoiserSpec

MASK = 9


def spec(size, **fields):
    return DenoiserSpec(mask_id=MASK, vocab_size=size, **fields)


def by_position(largest, size=4, **fields):
    """A denoiser that gives token 0 the probability ``largest[i]`` at position i, whatever is visible."""
    probs = torch.tensor([[p] + [(1 - p) / (size - 1)] * (size - 1) for p in largest], dtype=torch.float64)
    return CallableDenoiser(lambda ids: probs.log()[: ids.shape[1]].expand(len(ids), -1, -1), spec(size, **fields))


def joint(table):
    """A denoiser with the exact marginals of a joint law of n binary tokens, given as a tensor of shape (2,) * n."""
    support = torch.tensor(list(product((0, 1), repeat=table.ndim)))
    weights = table.flatten().double()

    def logits(ids):
        agrees = ((support == ids[:, None]) | (ids == MASK)[:, None]).all(2).double() * weights
        ones = (agrees[..., None] * support).sum(1) / agrees.sum(1, keepdim=True)
        return torch.stack([1 - ones, ones], dim=2).log()

    return CallableDenoiser(logits, spec(2))


def fits(seen, law, least=5.0):
    """p of a chi-square test of observed rows against a law by outcome; rare outcomes are taken together."""
    counts = Counter(tuple(row) for row in seen.tolist())
    assert set(counts) <= {outcome for outcome, chance in law.items() if chance > 0}
    assert abs(sum(law.values()) - 1) < 1e-9
    total = len(seen)
    common = [outcome for outcome, chance in law.items() if chance * total >= least]
    observed = [counts[outcome] for outcome in common]
    expected = [law[outcome] * total for outcome in common]
    if total - sum(expected) > 1e-6:
        observed.append(total - sum(observed))
        expected.append(total - sum(expected))
    return chisquare(observed, expected).pvalue


def committed_first(decoded):
    """Per row, the columns that were committed in the first step."""
    return [row.nonzero()[:, 0].tolist() for row in decoded.reveal_step == 0]


def counts_by_step(decoded, row=0):
    """How many positions each step committed."""
    steps = decoded.reveal_step[row]
    return torch.bincount(steps[steps >= 0]).tolist()
