"""What the runs say, in sentences that claim no more than their errors allow."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Literal

from markupsafe import Markup

from .report_runs import Bench, Difference, Metric, Run, metric_family

Judgement = Literal["better", "worse", "level", "unknown"]

EQUAL_LATENCY = 1.05  # a control may take 5 % longer than the plan: no two schedules cost the same
FEW_IMAGES = 5000  # below this the bias of a Fréchet distance deserves a sentence
MAX_GROUPS = 3  # budgets of network evaluations that the verdict speaks about


def judge(gap: Difference | None, higher_is_better: bool) -> Judgement:
    """Whether ``gap`` (this minus that) is beyond two standard errors, and in which direction."""
    if gap is None or gap.se is None:
        return "unknown"
    if abs(gap.difference) <= 2 * gap.se:
        return "level"
    return "better" if (gap.difference > 0) == higher_is_better else "worse"


def independent_gap(one: Metric, other: Metric) -> Difference:
    """``one`` minus ``other`` with the error of independent samples: on shared seeds it is a cautious one."""
    known = one.se is not None and other.se is not None
    se = math.hypot(one.se or 0.0, other.se or 0.0) if known else None
    return Difference(difference=one.value - other.value, se=se)


@dataclass(frozen=True)
class Control:
    """A plan beside the best stock sampler that costs no more."""

    plan: Run
    control: Run | None
    gap: Difference | None
    judgement: Judgement


def controls(bench: Bench) -> list[Control]:
    """For each plan the strongest control: the best of the other roles' rows that cost at most 5 % more.

    It is of the same network. The row that a run names as its control always takes part. The cost is the latency;
    without timing, and for answers, it is the counted network evaluations.
    """
    metric = bench.primary
    if metric is None:
        return []
    stock = [run for run in bench.runs if run.role != "plan" and metric in run.metrics]
    pairs = []
    for plan in (run for run in bench.runs if run.role == "plan" and metric in run.metrics):
        score = plan.metrics[metric]
        limit = EQUAL_LATENCY * control_cost(bench, plan)
        rivals = [run for run in stock if run.network == plan.network]
        allowed = [run for run in rivals if control_cost(bench, run) <= limit or run.name == plan.control]
        control = min(allowed, key=partial(_strength, bench, metric, plan), default=None)
        gap = independent_gap(score, control.metrics[metric]) if control else None
        pairs.append(Control(plan, control, gap, judge(gap, score.higher_is_better)))
    return pairs


def _strength(bench: Bench, metric: str, plan: Run, run: Run) -> tuple[float, bool, float]:
    """Orders controls, the strongest first: of equally good ones that of the plan's own, then the dearest."""
    return (badness(run, metric), run.name != plan.control, -control_cost(bench, run))


def cost(bench: Bench, run: Run) -> float:
    """Seconds per image or answer where every row was timed, else network evaluations."""
    return run.latency.median if bench.timed and run.latency else run.nfe


def controls_by_time(bench: Bench) -> bool:
    """Whether controls cost as many seconds as their plans, and not as many network evaluations."""
    return bench.timed and bench.subject.controls_by_time


def control_cost(bench: Bench, run: Run) -> float:
    """What a control may spend as much of as its plan."""
    return cost(bench, run) if controls_by_time(bench) else run.nfe


def badness(run: Run, metric: str) -> float:
    """The metric with the sign that makes less always better."""
    score = run.metrics[metric]
    return -score.value if score.higher_is_better else score.value


def number(value: float, se: float | None = None) -> str:
    """``value`` rounded to two digits of its standard error, or to four digits when it has none."""
    if not se:
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"
    return f"{value:,.{_decimals(se)}f}"


def with_error(value: float, se: float | None, signed: bool = False) -> str:
    """``3.42 ± 0.08``; a difference also carries its sign."""
    text = number(value, se)
    if signed:
        text = f"+{text}" if value > 0 else text.replace("-", "\N{MINUS SIGN}", 1)
    return text if se is None else f"{text} ± {number(se, se)}"


def seconds(value: float) -> str:
    """A duration with three digits, in seconds or milliseconds."""
    return f"{digits(value)} s" if value >= 1 else f"{digits(value * 1000)} ms"


def digits(value: float, count: int = 3) -> str:
    """``value`` with ``count`` significant digits, trailing zeros kept, and never in exponents."""
    if value == 0:
        return "0"
    return f"{value:,.{max(0, count - 1 - math.floor(math.log10(abs(value))))}f}"


def _decimals(se: float) -> int:
    return min(8, max(0, 1 - math.floor(math.log10(se))))


def verdict(bench: Bench) -> Markup:
    """One paragraph about the primary metric, safe to insert into HTML."""
    metric = bench.primary
    if metric is None:
        return Markup("These runs hold no quality metric, so only their speed can be compared.")
    scored = [run for run in bench.runs if metric in run.metrics]
    sentences = [
        _about_reference(bench, metric),
        _about_cheapest(bench, metric, scored),
        *_about_budgets(metric, scored),
        _about_controls(bench),
        _about_size(metric, scored),
    ]
    return Markup(" ").join(sentence for sentence in sentences if sentence)


def _about_reference(bench: Bench, metric: str) -> Markup:
    reference = bench.reference
    if reference is None or metric not in reference.metrics:
        return Markup("There is no scored reference, so nothing here says what the few steps cost.")
    score = reference.metrics[metric]
    took = f" in {seconds(reference.latency.median)}" if reference.latency else ""
    return Markup("The reference {} scores {} {}{} ({} network evaluations; {} is better).").format(
        _strong(reference.name),
        metric,
        with_error(score.value, score.se),
        took,
        number(reference.nfe),
        "higher" if score.higher_is_better else "lower",
    )


def _about_cheapest(bench: Bench, metric: str, scored: list[Run]) -> Markup:
    """The cheapest row that is not measurably worse than the reference, else the nearest one."""
    reference = bench.reference
    if reference is None:
        return Markup("")
    cheaper = [
        (run, gap)
        for run in scored
        if cost(bench, run) < cost(bench, reference) and (gap := bench.difference(run, metric))
    ]
    if not cheaper:
        return Markup("")
    higher = cheaper[0][0].metrics[metric].higher_is_better
    reached = [(run, gap) for run, gap in cheaper if judge(gap, higher) in ("level", "better")]
    run, gap = reached[0] if reached else min(cheaper, key=lambda pair: badness(pair[0], metric))
    faster = number_of_times(cost(bench, reference) / cost(bench, run))
    faster += " faster" if bench.timed else " fewer evaluations"
    difference = with_error(gap.difference, gap.se, signed=True)
    if not reached:
        known = judge(gap, higher) == "worse"
        amount = "worse by " + with_error(abs(gap.difference), gap.se) if known else "off by " + difference
        return Markup("No cheaper method reaches it: the nearest, {}, is {} and {}.").format(
            _strong(run.name), faster, amount
        )
    if judge(gap, higher) == "better":
        return Markup("The cheapest method that is not worse, {}, is even better: {} at {}.").format(
            _strong(run.name), difference, faster
        )
    return Markup(
        "The cheapest method that is not measurably worse is {}: {}, with a difference of {}"
        " (a difference below about {} could not be seen)."
    ).format(_strong(run.name), faster, difference, number(2 * (gap.se or 0.0), gap.se))


def _about_budgets(metric: str, scored: list[Run]) -> list[Markup]:
    """The best row at each budget of evaluations that at least two rows share."""
    groups: dict[int, list[Run]] = defaultdict(list)
    for run in scored:
        groups[round(run.nfe)].append(run)
    shared = sorted(
        (budget, sorted(rows, key=lambda run: badness(run, metric))) for budget, rows in groups.items() if len(rows) > 1
    )
    return [_about_budget(metric, budget, rows[0], rows[1]) for budget, rows in shared[:MAX_GROUPS]]


def _about_budget(metric: str, budget: int, first: Run, second: Run) -> Markup:
    one, two = first.metrics[metric], second.metrics[metric]
    gap = independent_gap(one, two)
    if judge(gap, one.higher_is_better) == "better":
        return Markup("At {} evaluations {} is best ({}), ahead of {} by {}.").format(
            budget,
            _strong(first.name),
            with_error(one.value, one.se),
            _strong(second.name),
            with_error(abs(gap.difference), gap.se),
        )
    return Markup("At {} evaluations {} ({}) and {} ({}) lead and cannot be told apart.").format(
        budget,
        _strong(first.name),
        with_error(one.value, one.se),
        _strong(second.name),
        with_error(two.value, two.se),
    )


def _about_controls(bench: Bench) -> Markup:
    compared = [pair for pair in controls(bench) if pair.control]
    if not compared:
        return Markup("")
    cost_name = "latency" if controls_by_time(bench) else "number of evaluations"
    won = [pair.plan.name for pair in compared if pair.judgement == "better"]
    lost = [pair.plan.name for pair in compared if pair.judgement != "better"]
    start = Markup("Against the best {} of equal {}, ").format(bench.subject.stock, cost_name)
    if not lost:
        return start + Markup("every plan is better beyond two standard errors ({}).").format(_listed(won))
    if not won:
        return start + Markup("no plan is better beyond two standard errors ({}).").format(_listed(lost))
    return start + Markup("{} better beyond two standard errors; {} not.").format(
        _listed(won) + (" is" if len(won) == 1 else " are"),
        _listed(lost) + (" is" if len(lost) == 1 else " are"),
    )


def _about_size(metric: str, scored: list[Run]) -> Markup:
    fewest = min(run.metrics[metric].n for run in scored)
    if metric_family(metric) not in ("fd", "fid") or fewest >= FEW_IMAGES:
        return Markup("")
    return Markup(
        "With {} images a Fréchet distance is biased upwards: compare the rows of this report with each"
        " other, not with published figures."
    ).format(f"{fewest:,}")


def number_of_times(ratio: float) -> str:
    """``5.2 times``, with no more digits than a timing supports."""
    return f"{ratio:.2g} times" if ratio < 100 else f"{ratio:.0f} times"


def _strong(name: str) -> Markup:
    return Markup("<strong>{}</strong>").format(name)


def _listed(names: list[str]) -> Markup:
    return Markup(", ").join(_strong(name) for name in names)
