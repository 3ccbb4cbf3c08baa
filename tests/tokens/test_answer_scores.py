"""Errors of shares: against their formulas worked out by other means, and by how often two of them cover the truth."""

import itertools
import math
import random
from dataclasses import dataclass

import numpy as np
import pytest
from scipy.stats import binom, multinomial

from fewstep.eval.tokens.accuracy import share_error
from fewstep.eval.tokens.scores import Marks, paired_error


@dataclass(frozen=True)
class Judged:
    task: str
    right: bool


def marks(**tasks):
    return Marks.of([Judged(name.replace("_", "-"), mark == "1") for name, row in tasks.items() for mark in row])


@pytest.mark.parametrize("n", [8, 16, 100])
def test_share_error_is_that_of_four_more_answers(n):
    for right in range(n + 1):
        added = np.repeat([1.0, 0.0], [right + 2, n - right + 2])
        assert share_error(right, n) == pytest.approx(added.std() / math.sqrt(n + 4))
        assert share_error(right, n) > 0


@pytest.mark.parametrize(("n", "mean", "least"), [(8, 0.91, 0.83), (16, 0.93, 0.86), (100, 0.945, 0.93)])
def test_two_errors_of_a_share_cover_the_truth(n, mean, least):
    """Worked out over all samples; without the four answers more, the least coverage is below 0.65 even at 100."""
    rights = np.arange(n + 1)
    reach = np.array([2 * share_error(int(right), n) for right in rights])
    covered = [
        binom.pmf(rights, n, share)[np.abs(rights / n - share) <= reach].sum() for share in np.linspace(0.01, 0.99, 99)
    ]
    assert np.mean(covered) > mean
    assert min(covered) > least


def test_paired_error_is_that_of_half_an_answer_more_in_each_cell():
    for gained, lost, same in itertools.product(range(5), range(5), (4, 20)):
        n = gained + lost + same
        values, counts = np.array([1.0, -1.0, 0.0]), np.array([gained + 0.5, lost + 0.5, same + 1.0])
        variance = np.average(values**2, weights=counts) - np.average(values, weights=counts) ** 2
        assert paired_error(gained, lost, n) == pytest.approx(math.sqrt(variance / (n + 2)))


@pytest.mark.parametrize("cells", [(0.05, 0.05), (0.3, 0.1), (0.01, 0.02), (0.2, 0.2), (0.45, 0.45)])
def test_two_paired_errors_cover_the_truth(cells):
    n, (more, less) = 16, cells
    law = multinomial(n, [more, less, 1 - more - less])
    covered = sum(
        law.pmf([gained, lost, n - gained - lost])
        for gained in range(n + 1)
        for lost in range(n + 1 - gained)
        if abs((gained - lost) / n - (more - less)) <= 2 * paired_error(gained, lost, n)
    )
    assert covered > 0.89


def test_metrics_are_shares_their_mean_and_the_lowest():
    found = marks(copy="1111", sort="110000", latin_3="10")
    values = {name: metric.value for name, metric in found.metrics.items()}
    assert list(values) == ["worst_accuracy", "mean_accuracy", "accuracy_copy", "accuracy_latin-3", "accuracy_sort"]
    assert values["accuracy_sort"] == values["worst_accuracy"] == pytest.approx(1 / 3)
    assert values["mean_accuracy"] == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)
    metric = found.metrics
    assert (metric["worst_accuracy"].n, metric["mean_accuracy"].n) == (6, 12)
    assert metric["worst_accuracy"].se == share_error(2, 6)
    errors = [share_error(4, 4), share_error(1, 2), share_error(2, 6)]
    assert metric["mean_accuracy"].se == pytest.approx(math.sqrt(sum(e * e for e in errors)) / 3)
    assert all(score.higher_is_better for score in metric.values())


def test_differences_are_paired_and_the_lowest_only_when_of_one_task():
    one, other = marks(copy="1110", sort="1100"), marks(copy="1111", sort="0100")
    gaps = one.minus(other)
    for name, gap in gaps.items():
        assert gap.difference == pytest.approx(one.metrics[name].value - other.metrics[name].value)
    assert gaps["accuracy_copy"].se == paired_error(0, 1, 4)
    assert gaps["worst_accuracy"].se == gaps["accuracy_sort"].se == paired_error(1, 0, 4)
    apart = one.minus(marks(copy="0000", sort="1111"))
    assert apart["worst_accuracy"].difference == pytest.approx(0.5)
    assert apart["worst_accuracy"].se == pytest.approx(math.hypot(share_error(2, 4), share_error(0, 4)))
    same = one.minus(one)
    assert all(gap.difference == 0 < gap.se for gap in same.values())


def test_error_of_the_mean_is_that_of_repeated_benches():
    """Tasks of unequal difficulty, many benches: the reported error is at least the spread, and not far above it."""
    draw = random.Random(0)
    shares = {"a": 0.9, "b": 0.5, "c": 0.7}
    means, errors = [], []
    for _ in range(400):
        rows = {
            task: "".join("1" if draw.random() < share else "0" for _ in range(40)) for task, share in shares.items()
        }
        metric = marks(**rows).metrics["mean_accuracy"]
        means.append(metric.value)
        errors.append(metric.se)
    assert 0.9 < np.mean(errors) / np.std(means) < 1.2
