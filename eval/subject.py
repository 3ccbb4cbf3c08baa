"""What a bench is about, images or answers: its words, and the costs that only one of them has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report_runs import Decoding, Run


@dataclass(frozen=True)
class Cost:
    """A cost beside network evaluations and seconds.

    Attributes:
        column: of results.csv.
        heading: of the tables.
        value: of a run, None where it was not measured.
        text: how a value is printed.
        wide: whether the table of the terminal has it too.
    """

    column: str
    heading: str
    value: Callable[[Run], Any]
    text: Callable[[Any], str]
    wide: bool = False

    def shown(self, run: Run) -> str:
        """The cost of a run as the tables print it, empty where it was not measured."""
        value = self.value(run)
        return "" if value is None else self.text(value)


@dataclass(frozen=True)
class Count:
    """What the second figure is against: a count that no clock can move."""

    label: str
    prefix: str
    value: Callable[[Run], float]


@dataclass(frozen=True)
class Subject:
    """What is sampled.

    Attributes:
        noun: one sample.
        rate: column of results.csv for samples per second.
        costs: columns beside the scores.
        speeds: columns beside the latency.
        count: of the second figure.
        stock: what a plan's control is.
        question: heading of the controls.
        controls_by_time: whether a control may spend as much time as its plan, and not as many evaluations.
        shares: of the metrics between 0 and 1, which are drawn on an even scale.
    """

    noun: str
    rate: str
    costs: tuple[Cost, ...]
    speeds: tuple[Cost, ...]
    count: Count
    stock: str
    question: str
    controls_by_time: bool
    shares: bool

    @property
    def extra(self) -> tuple[Cost, ...]:
        """All costs that only this subject has."""
        return (*self.costs, *self.speeds)


def _decoding(read: Callable[[Decoding], Any]) -> Callable[[Run], Any]:
    return lambda run: read(run.decoding) if run.decoding else None


def _size(count: float) -> str:
    if not count:
        return "none"
    return f"{count / 2**20:.3g} MiB" if count >= 2**20 else f"{count / 2**10:.3g} KiB"


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


IMAGES = Subject(
    noun="image",
    rate="images_per_s",
    costs=(),
    speeds=(),
    count=Count("network evaluations per image", "nfe", lambda run: run.nfe),
    stock="stock sampler",
    question="Would fewer steps of a stock sampler do?",
    controls_by_time=True,
    shares=False,
)

ANSWERS = Subject(
    noun="answer",
    rate="answers_per_s",
    costs=(
        Cost("exact", "exact", _decoding(lambda d: d.exact), lambda exact: "yes" if exact else "no", wide=True),
        Cost("token_forwards", "token-forwards", _decoding(lambda d: d.token_forwards), _plain, wide=True),
        Cost("tokens_per_forward", "tokens per forward", _decoding(lambda d: d.tokens_per_forward), _plain),
    ),
    speeds=(
        Cost("tokens_per_s", "tokens/s", _decoding(lambda d: d.tokens_per_s), _plain),
        Cost("kv_bytes", "keys and values", _decoding(lambda d: d.kv_bytes), _size),
    ),
    count=Count(
        "token-forwards per answer",
        "forwards",
        lambda run: run.decoding.token_forwards if run.decoding else run.nfe,
    ),
    stock="static quota",
    question="Would a fixed number of tokens a step do?",
    controls_by_time=False,
    shares=True,
)
