"""Ships the plan that a search found for a demo, and adds the search to the repository's results.

``python -m fewstep.scripts.demo.ship_found --pipe demo:fashion-dit --found plan.search/found.json``

The plan's evidence is the search's own, measured on seeds on which nothing was chosen.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from fewstep.eval.assets import plan_folder
from fewstep.eval.jackknife import Estimate
from fewstep.samplers import InputError, Plan
from fewstep.samplers.files import read_json, write_json
from fewstep.scripts.plan_search_command import copy_files
from fewstep.search import Candidate, Found, Scored

DIGITS = 6


def summary(found: Found) -> dict[str, Any]:
    """What the documents show of a search."""
    states = [candidate.state for candidate in found.history]
    return {
        "metric": found.metric,
        "command": found.command,
        "trials": {state: states.count(state) for state in sorted(set(states))},
        "rows": found.spent,
        "seconds": round(found.seconds),
        "front": [_candidate(each) for each in found.front],
        "baselines": [_candidate(each) for each in found.baselines],
        "evidence": [each.model_dump(mode="json", exclude_none=True) for each in found.plan.evidence],
    }


def check_better(found: Found) -> None:
    """Raises ``InputError`` unless the plan is better than every baseline by two standard errors on fresh seeds."""
    for candidate in found.baselines:
        gap = candidate.gap
        if gap is None or (-gap.value if found.higher_is_better else gap.value) < 2 * gap.se:
            shown = "not paired" if gap is None else f"{gap.value:.3f} ± {gap.se:.3f}"
            raise InputError(f"the plan is not better than {candidate.title} by two standard errors: {shown}")


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "name": candidate.title,
        "at_search": _scored(candidate.at_search),
        "fresh": _scored(candidate.fresh),
        "gap": _estimate(candidate.gap) if candidate.gap else None,
    }


def _scored(scored: Scored | None) -> dict[str, Any] | None:
    if scored is None:
        return None
    return {"n": scored.n, "quality": _estimate(scored.quality), "costs": dict(scored.costs)}


def _estimate(value: Estimate) -> dict[str, Any]:
    return {key: float(f"{each:.{DIGITS}g}") for key, each in dataclasses.asdict(value).items()}


def main() -> None:
    """Writes the plan and the files that it names, and the summary of the search."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipe", required=True, help="a demo, such as demo:fashion-dit")
    parser.add_argument("--found", type=Path, required=True)
    parser.add_argument("--plan", type=Path, required=True, help="the plan file that the search wrote")
    parser.add_argument("--results", type=Path, default=Path("docs/results/searches.json"))
    options = parser.parse_args()
    folder = plan_folder(options.pipe)
    if folder is None:
        raise InputError(f"plans ship for demos; got --pipe {options.pipe}")
    found, plan = Found.load(options.found), Plan.load(options.plan)
    check_better(found)
    name = f"{plan.nominal_steps}-step"
    copy_files(plan, folder)
    plan.model_copy(update={"name": name}).save(folder / f"{name}.json")
    results = read_json(options.results) if options.results.is_file() else {}
    demo = options.pipe.removeprefix("demo:")
    results.setdefault(demo, {})[str(plan.nominal_steps)] = summary(found)
    write_json(options.results, results)
    sys.stdout.write(f"{folder / name}.json {found.best.fresh.quality.value if found.best.fresh else ''}\n")


if __name__ == "__main__":
    main()
