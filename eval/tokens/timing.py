"""How long a row answers, and how many keys and values it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import TypeAdapter
from torch import nn

from ..shares import network_shares
from ..timing import Timing, measure_calls, module_bytes
from .answers import Answer
from .tasks import Question

PATIENCE_S = 2.0
"""Where a whole batch takes longer, it is timed once and without a warm-up: it is made of dozens of forward passes."""

MOST_TASKS = 8
"Tasks that each get a latency call, however few repeats were asked for."


@dataclass(frozen=True)
class AnswerTiming:
    """Speed and memory of a row.

    Attributes:
        timing: one answer per call, call i to question i; and a whole batch, of the first questions.
        batch_tokens: new tokens of that batch.
        kv_bytes: most bytes of keys and values that one answer kept.
    """

    timing: Timing
    batch_tokens: int
    kv_bytes: int

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second of the batch."""
        throughput = self.timing.throughput
        return throughput.images_per_s * self.batch_tokens / throughput.batch


ANSWER_TIMING = TypeAdapter(AnswerTiming)


def latency_calls(questions: Sequence[Question], repeats: int) -> int:
    """Calls behind the latency: the repeats, and one of each task at least."""
    return max(repeats, min(MOST_TASKS, len({question.task for question in questions})))


def measure_answers(
    ask: Callable[[Sequence[Question]], list[Answer]],
    questions: Sequence[Question],
    *,
    batch_size: int,
    calls: int,
    networks: Sequence[nn.Module],
    device: torch.device,
) -> AnswerTiming:
    """Times a row.

    Args:
        ask: gives the answers to some questions, in one batch.
        questions: as many as ``batch_size`` and as ``calls``, at least.
        batch_size: of the throughput.
        calls: behind the latency.
        networks: that answer.
        device: that they are on.
    """
    kept: list[int] = []
    batches: list[list[Answer]] = []

    def single(question: Question) -> Callable[[], None]:
        return lambda: kept.append(ask([question])[0].kv_bytes)

    timing = measure_calls(
        [single(question) for question in questions[:calls]],
        lambda: batches.append(ask(questions[:batch_size])),
        batch_size=batch_size,
        device=device,
        shares_of=lambda call, expected_s: network_shares(networks, device, call, expected_s),
        weights_bytes=module_bytes(networks),
        patience_s=PATIENCE_S,
    )
    return AnswerTiming(timing, sum(answer.new_tokens for answer in batches[0]), max(kept))
