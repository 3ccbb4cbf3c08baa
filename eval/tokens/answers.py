"""Answers to questions, by a recipe or by the autoregressive twin, and what each cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...samplers.tokens import Decoded, Recipe, decode
from .models import TokenModels
from .tasks import Question


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer.

    Attributes:
        seed: of its question.
        task: of its question.
        text: without what follows its end.
        right: whether the question accepts it.
        nfe: forward passes, those of a scorer's model too.
        token_forwards: positions evaluated in them.
        new_tokens: decoded tokens, with the first end.
        exact: whether all answers of its batch have the tokens of the same recipe without a cache.
        failed: whether a constraint or a scorer gave it up.
        reveal: step at which each of its tokens was committed, the first end included.
        kv_bytes: most bytes of keys and values that its whole batch kept at once.
    """

    seed: int
    task: str
    text: str
    right: bool
    nfe: int
    token_forwards: int
    new_tokens: int
    exact: bool
    failed: bool
    reveal: tuple[int, ...]
    kv_bytes: int


def answers(
    models: TokenModels,
    questions: Sequence[Question],
    recipe: Recipe,
    gen_length: int,
    *,
    denoiser: str | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """What a recipe answers. An answer does not depend on those beside it in a batch.

    Args:
        models: that answer.
        questions: what is asked, each with the seed of its decoding.
        recipe: how.
        gen_length: masks after each prompt.
        denoiser: which of the models; by default the first that the recipe works with.
        batch_size: answers at a time.
        progress: called with the number of answers that came in.

    Raises:
        InputError: when the recipe works with none of the models.
    """
    network = models.denoisers[denoiser or models.denoiser_for(recipe)]
    found: list[Answer] = []
    for asked in _batches(questions, batch_size):
        decoded = decode(
            network,
            [models.ids(question.prompt) for question in asked],
            gen_length,
            recipe,
            seeds=[question.seed for question in asked],
            resources=models.resources,
        )
        found += [_answer(models, question, decoded, row) for row, question in enumerate(asked)]
        progress(len(asked))
    return found


def _answer(models: TokenModels, question: Question, decoded: Decoded, row: int) -> Answer:
    text = models.text(decoded.answers[row])
    extra_nfe, extra_forwards = (
        0 if counts is None else int(counts[row]) for counts in (decoded.scorer_nfe, decoded.scorer_token_forwards)
    )
    length = int(decoded.new_tokens[row])
    reveal = decoded.reveal_step[row, decoded.answer_start :][:length]
    return Answer(
        seed=question.seed,
        task=question.task,
        text=text,
        right=not bool(decoded.failed[row]) and question.accepts(text),
        nfe=int(decoded.nfe[row]) + extra_nfe,
        token_forwards=int(decoded.token_forwards[row]) + extra_forwards,
        new_tokens=length,
        exact=decoded.exact,
        failed=bool(decoded.failed[row]),
        reveal=tuple(reveal.tolist()),
        kv_bytes=decoded.kv_bytes,
    )


@torch.no_grad()
def causal_answers(
    models: TokenModels,
    questions: Sequence[Question],
    gen_length: int,
    *,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """What the autoregressive twin answers, the likeliest token each time, with transformers' key-value cache.

    An answer costs a pass over the prompt, and one position for each further token up to its end, whoever else is in
    the batch.

    Args:
        models: with a twin.
        questions: what is asked.
        gen_length: most tokens of an answer.
        batch_size: answers at a time.
        progress: called with the number of answers that came in.
    """
    causal = models.causal
    if causal is None:
        raise ValueError("there is no autoregressive model")
    ends = sorted({end for denoiser in models.denoisers.values() for end in denoiser.spec.eos_ids})
    pad = ends[0] if ends else 0
    begin = [] if causal.bos_id is None else [causal.bos_id]
    device = next(causal.model.parameters()).device
    found: list[Answer] = []
    for asked in _batches(questions, batch_size):
        prompts = [[*begin, *models.ids(question.prompt)] for question in asked]
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        real = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        made: Any = causal.model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=real,
            max_new_tokens=gen_length,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=pad,
            return_dict_in_generate=True,
        )
        kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in made.past_key_values.layers)
        for question, prompt, row in zip(asked, prompts, made.sequences[:, longest:], strict=True):
            found.append(_causal_answer(models, question, len(prompt), row, ends, kv_bytes))
        progress(len(asked))
    return found


def _causal_answer(
    models: TokenModels, question: Question, prompt: int, row: Tensor, ends: list[int], kv_bytes: int
) -> Answer:
    ended = torch.isin(row, torch.tensor(ends, dtype=row.dtype, device=row.device)).nonzero()
    length = int(ended[0]) + 1 if len(ended) else len(row)
    text = models.text(row)
    return Answer(
        seed=question.seed,
        task=question.task,
        text=text,
        right=question.accepts(text),
        nfe=length,
        token_forwards=prompt + length - 1,
        new_tokens=length,
        exact=True,
        failed=False,
        reveal=tuple(range(length)),
        kv_bytes=kv_bytes,
    )


def _batches(questions: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
    return (questions[first : first + size] for first in range(0, len(questions), size))
