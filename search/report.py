"""The report of a search, one page derived from what it found and from nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..eval.jackknife import Estimate
from ..eval.page import flat, flops, page_template
from ..eval.report_runs import Difference, metric_family
from ..eval.verdict import FEW_IMAGES, Judgement, judge, number, seconds, with_error
from ..samplers.files import write_text
from .found import Candidate, Found, Scored, Transfer
from .report_plots import (
    COSTS,
    RUNG_MARKS,
    best_so_far,
    fresh_drawing,
    front_drawing,
    grids_drawing,
    history_drawing,
    rungs,
)

MINUS = "\N{MINUS SIGN}"

MAX_DRAWN = 12
"Candidates of the front in a picture that has a line for each."
MAX_REASONS = 12
MAX_IMPROVEMENTS = 20

LEADING = ("pipe", "steps", "objective", "limits", "space", "seeds", "fresh_seeds")
"Settings that the page starts with."


@dataclass(frozen=True)
class Cell:
    """A measured value, the number of images below it, and where it is compared, the judgement."""

    text: str
    n: int
    judgement: Judgement = "unknown"


@dataclass(frozen=True)
class Row:
    """One candidate as the tables print it."""

    title: str
    trial: str
    kind: str
    at_search: Cell | None
    fresh: Cell | None
    change: Cell | None
    gap: Cell | None
    paired: bool
    others: tuple[Cell | None, ...]
    costs: tuple[str, ...]
    holds: bool


@dataclass(frozen=True)
class Ending:
    """How some of the trials ended."""

    mark: str
    css: str
    text: str
    count: int


def write_search_report(path: str | Path, found: Found) -> Path:
    """Writes one HTML file without external resources or scripts, and returns its path."""
    compared = [*found.baselines, *([found.teacher] if found.teacher else [])]
    drawn = [*_drawn_front(found), *compared]
    scored = [s for c in (*found.front, *compared) for s in (c.at_search, c.fresh) if s is not None]
    others = sorted({name for s in scored for name in s.others})
    costs = sorted({name for s in scored for name in s.costs}, key=lambda name: (name != "nfe", name))
    front_rows = [_row(found, candidate, others, costs) for candidate in found.front]
    page = page_template("search.html", Path(__file__).parent).render(
        found=found,
        title=f"Search of few steps on {found.settings.get('pipe') or 'a pipeline'}",
        leading=[(name, text) for name, text in _settings(found) if text and name.split(".")[0] in LEADING],
        settings=_settings(found),
        took=_duration(found.seconds),
        verdict=_verdict(found),
        warnings=_warnings(found),
        better="higher" if found.higher_is_better else "lower",
        plan_json=json.dumps(found.plan.to_json(), indent=2),
        plan_rows=[_row(found, candidate, others, costs) for candidate in (found.best, *compared)],
        front_rows=front_rows,
        others=others,
        costs=[(name, COSTS.get(name, name)) for name in costs],
        front=front_drawing(found),
        fresh=fresh_drawing(found, drawn),
        undrawn=len(found.front) - len(drawn) + len(compared),
        history=history_drawing(found),
        endings=_endings(found),
        improvements=[(trial.order, _cell(trial.at_search)) for trial in best_so_far(found)[-MAX_IMPROVEMENTS:]],
        reasons=_reasons(found),
        grids=grids_drawing(found, drawn),
        parameters=_parameters(found.front),
        transfers=_transfers(found.transfers),
    )
    path = Path(path)
    write_text(path, page)
    return path


def _drawn_front(found: Found) -> list[Candidate]:
    """The first of the front, and the plan found."""
    first = list(found.front[:MAX_DRAWN])
    return first if any(candidate is found.best for candidate in first) else [*first[:-1], found.best]


def _row(found: Found, candidate: Candidate, others: Sequence[str], costs: Sequence[str]) -> Row:
    kind = "found" if candidate is found.best else "teacher" if candidate is found.teacher else ""
    if not kind:
        kind = "baseline" if any(candidate is other for other in found.baselines) else "candidate"
    seen, fresh = candidate.at_search, candidate.fresh
    shown = fresh or seen
    return Row(
        title=candidate.title,
        trial=str(candidate.order) if candidate.order >= 0 else "",
        kind=kind,
        at_search=_cell(seen),
        fresh=_cell(fresh),
        change=_change(found, seen, fresh) if seen and fresh else None,
        gap=_gap(found, candidate),
        paired=candidate.gap is not None,
        others=tuple(_estimate(shown.others[name]) if shown and name in shown.others else None for name in others),
        costs=tuple(_cost(name, shown.costs.get(name) if shown else None) for name in costs),
        holds=candidate.holds,
    )


def _cell(scored: Scored | None) -> Cell | None:
    return None if scored is None else Cell(with_error(scored.quality.value, scored.quality.se), scored.n)


def _estimate(value: Estimate) -> Cell:
    return Cell(with_error(value.value, value.se), value.n)


def _independent(one: Estimate, other: Estimate) -> Estimate:
    """``one`` minus ``other`` as if of independent samples."""
    return Estimate(one.value - other.value, math.hypot(one.se, other.se), min(one.n, other.n))


def _judged(found: Found, gap: Estimate) -> Cell:
    judgement = judge(Difference(difference=gap.value, se=gap.se), found.higher_is_better)
    return Cell(with_error(gap.value, gap.se, signed=True), gap.n, judgement)


def _change(found: Found, at_search: Scored, fresh: Scored) -> Cell:
    return _judged(found, _independent(fresh.quality, at_search.quality))


def _gap(found: Found, candidate: Candidate) -> Cell | None:
    """How far it is from the plan found, on fresh seeds."""
    best = found.best
    if candidate is best:
        return None
    if candidate.gap is not None:
        return _judged(found, candidate.gap)
    if candidate.fresh is None or best.fresh is None:
        return None
    return _judged(found, _independent(candidate.fresh.quality, best.fresh.quality))


def _cost(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return {"flops": flops, "latency_s": seconds}.get(name, number)(value)


def _duration(value: float) -> str:
    """``3 h 05 min``, ``4.2 min`` or ``12 s``."""
    minutes = value / 60
    if minutes >= 60:
        return f"{minutes // 60:.0f} h {minutes % 60:02.0f} min"
    return f"{minutes:.1f} min" if minutes >= 1 else f"{value:.3g} s"


def _settings(found: Found) -> list[tuple[str, str]]:
    """Names and texts; ranges of seeds from first to last."""
    items = dict(found.settings)
    for name in ("seeds", "fresh_seeds"):
        if (seeds := _range(found, name)) is not None:
            items[name] = f"{seeds.start:,} to {seeds.stop - 1:,}"
    ranks = {name: rank for rank, name in enumerate(LEADING)}
    listed = flat(items)
    return sorted(listed, key=lambda item: ranks.get(item[0].split(".")[0], len(ranks)))


def _range(found: Found, name: str) -> range | None:
    match found.settings.get(name):
        case [int(first), int(end)]:
            return range(first, end)
    return None


def _verdict(found: Found) -> Markup:
    """What was found, what of it was luck, and how it stands to the rest, in sentences."""
    best = found.best
    assert best.at_search is not None
    seen = best.at_search
    searched = f"{with_error(seen.quality.value, seen.quality.se)} (n = {seen.n:,})"
    if best.fresh is None:
        return Markup(
            "<strong>{}</strong> scores {} {} on the seeds of the search; fresh seeds were not tried."
        ).format(best.title, found.metric, searched)
    fresh, change = best.fresh, _change(found, seen, best.fresh)
    sentences = [
        Markup("On fresh seeds <strong>{}</strong> scores {} {} (n = {}).").format(
            best.title, found.metric, with_error(fresh.quality.value, fresh.quality.se), f"{fresh.n:,}"
        ),
        Markup("The search had shown {}: {}").format(
            searched,
            "the difference is within two errors."
            if change.judgement == "level"
            else f"the fresh value is {change.judgement} by {change.text.lstrip('+' + MINUS)}.",
        ),
        *(_against(found, other) for other in (_nearest(found), found.teacher)),
    ]
    return Markup(" ").join(sentence for sentence in sentences if sentence)


def _nearest(found: Found) -> Candidate | None:
    """The best baseline on fresh seeds."""
    sign = -1 if found.higher_is_better else 1
    measured = [(sign * other.fresh.quality.value, place) for place, other in enumerate(found.baselines) if other.fresh]
    return found.baselines[min(measured)[1]] if measured else None


def _against(found: Found, other: Candidate | None) -> Markup:
    """One sentence on the plan beside a baseline or the teacher."""
    gap = _gap(found, other) if other else None
    if other is None or other.fresh is None or gap is None:
        return Markup("")
    value = with_error(other.fresh.quality.value, other.fresh.quality.se)
    what = "teacher" if other is found.teacher else "best baseline"
    words = {
        "better": "is better than the plan",
        "worse": "is worse than the plan",
        "level": "cannot be told apart from the plan",
        "unknown": "has no error to compare it by",
    }[gap.judgement]
    return Markup("The {} {} scores {} (n = {}) and {}.").format(what, other.title, value, f"{other.fresh.n:,}", words)


def _warnings(found: Found) -> list[str]:
    best, texts = found.best, []
    seen, fresh = _range(found, "seeds"), _range(found, "fresh_seeds")
    if seen and fresh and seen.start < fresh.stop and fresh.start < seen.stop:
        texts.append("The fresh seeds overlap those of the search, so the plan found is flattered by its luck.")
    if best.fresh is None:
        texts.append("The plan found was not measured on fresh seeds; its value is that of the luckiest candidate.")
    if not best.holds:
        texts.append("The plan found breaks a limit: no candidate holds them all.")
    if found.cost is None:
        ahead = [c.title for c in found.front if (gap := _gap(found, c)) and gap.judgement == "better"]
        if ahead:
            texts.append(f"On fresh seeds better than the plan found: {', '.join(ahead)}.")
    counts = {s.n for c in (*found.front, *found.baselines) for s in (c.at_search, c.fresh) if s is not None}
    if metric_family(found.metric) in ("fd", "fid") and min(counts) < FEW_IMAGES:
        texts.append(
            f"With n = {min(counts):,} a Fréchet distance is biased upwards: values of unequal n differ by more than "
            "luck, and none compares with published figures."
        )
    return texts


def _endings(found: Found) -> list[Ending]:
    """Counts of the trials by how they ended, those pruned by the number of images."""
    done = [trial for trial in found.history if trial.state == "complete"]
    endings = [
        Ending("●", "dominated", "complete", sum(trial.holds for trial in done)),
        Ending("○", "dominated", "complete, breaks a limit", sum(not trial.holds for trial in done)),
    ]
    pruned = [trial.at_search.n for trial in found.history if trial.state == "pruned" and trial.at_search]
    for rung, n in enumerate(rungs(found)):
        mark = RUNG_MARKS[min(rung, len(RUNG_MARKS) - 1)][1]
        endings.append(Ending(mark, "dominated", f"pruned at n = {n:,}", pruned.count(n)))
    failed = sum(trial.state == "failed" for trial in found.history)
    endings.append(Ending("×", "baseline", "failed", failed))
    return [ending for ending in endings if ending.count]


def _reasons(found: Found) -> list[tuple[str, list[int]]]:
    """Why trials failed, the commonest first, each with the numbers of its trials."""
    listed: dict[str, list[int]] = {}
    for trial in found.history:
        if trial.state == "failed":
            listed.setdefault(trial.reason or "", []).append(trial.order)
    return sorted(listed.items(), key=lambda item: -len(item[1]))[:MAX_REASONS]


def _parameters(front: Sequence[Candidate]) -> list[tuple[str, list[str]]]:
    """Every parameter with its value in each candidate, empty where it has none."""
    names = list(dict.fromkeys(name for candidate in front for name in candidate.params))
    return [(name, [_parameter(candidate.params, name) for candidate in front]) for name in names]


def _parameter(params: Mapping[str, Any], name: str) -> str:
    value = params.get(name)
    if isinstance(value, float):
        return number(value)
    return "" if value is None else str(value)


def _transfers(transfers: Sequence[Transfer]) -> tuple[list[str], list[tuple[str, list[Cell | None]]]]:
    """Names of the columns, and of each setting its cells."""
    names = list(dict.fromkeys(transfer.name for transfer in transfers))
    scored = {(transfer.setting, transfer.name): transfer.scored for transfer in transfers}
    settings = dict.fromkeys(transfer.setting for transfer in transfers)
    return names, [(setting, [_cell(scored.get((setting, name))) for name in names]) for setting in settings]
