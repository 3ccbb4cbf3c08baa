"""Makes docs/search.md: the plans that a search found, and what was measured of them, from docs/results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..eval.assets import plan_folder
from ..samplers import Plan
from ..samplers.files import read_json
from . import markdown
from .bench.solvers import SIGMAS

Found = Mapping[str, Any]
"What a benchmark wrote."

DEMOS = ("fashion-dit", "fashion-unet")
METRICS = {"precision": "precision", "recall": "recall", "class_accuracy": "accuracy"}

HEAD = """# Searches, measured

Made by `python -m fewstep.scripts.tables` from the plans that ship and from `docs/results`. Distances are `fd_fashion`,
lower is better, ± one standard error from a jackknife over blocks of seeds; differences are on the same seeds. All of
it ran in float32 on two CPU cores; the teachers are small, and what a search finds on them says little of others.

`fewstep search --steps 5` measures candidate plans on the same noise. It begins with grids that diffusers has, an early
start, and grids that dynamic programming over a recorded trajectory of the teacher suggests (Watson et al.,
arXiv:2106.03802; GITS, arXiv:2405.11326), and goes on by Gaussian processes. The best few are measured again on fresh
noise, and the evidence of the one that wins comes from a third set, on which nothing was chosen. No weights change."""

PLANS_HEAD = """## Plans that ship

`eval/demo/plans/<teacher>/<steps>-step.json`, the evidence inside. The one of 20 steps is DDIM with a cache, found by
`fewstep search cache --plan ddim-20.json --cache block-mask --budget "feature_distance<=1.5" --n 64`: a quarter of its
attentions and MLPs run, and its distance is to the same plan without the cache."""

GOALS_HEAD = """## Beside diffusers' best scheduler

Against Fashion-MNIST's 10,000 *test* images, on seeds from 5,000,000 on, on which nothing was chosen. The baseline of
each number of steps is the best of diffusers' schedulers, each at its best built-in spacing. The excess is what a
distance is above the teacher's converged one, that of the best of its schedulers at 100 steps; the share is the plan's
excess as a part of the baseline's. Where the baseline has hardly any, its error is large and it says little, and where
it is below the converged distance itself both excesses stand instead, the plan's first. Below 0 the plan is nearer to
the test images than the teacher itself at 100 steps: its guidance and scales were chosen on real images and the
teacher's were not."""

FRESH_HEAD = """## At search, and on fresh noise

The leaders of each search, on the samples that they were chosen on and on fresh ones; the plan found is the best on the
fresh ones. On `fashion-unet` a distance of 512 images has an error of 2.9, so a search on them chooses noise too: over
the grid of ten steps it found 11.9 at search, 14.7 ± 1.3 on fresh noise, and on 1,024 further seeds 16.1 ± 1.3 where
UniPC with Karras' sigmas has 12.4 ± 1.2. So its plans of eight and ten steps keep Karras' grid, and only epsilon
scaling and the start were searched, on 1,024 images.

No plan ships that was found by the distance to the teacher's own samples, which has little noise: 64 images a candidate
(`--objective feature_distance --n 64`) halve it within a hundred trials, from 3.94 to 2.15 on 256 fresh images where
UniPC's 40 steps are the teacher. But the nearer to the teacher, the farther from real images: the plan's Fréchet
distance is 2.7 ± 0.5 above that of Karras' ten steps (2,560 images), which are nearer to the test images than any of
its schedulers at 100 steps."""

TRANSFER_HEAD = """## In other settings

The five-step plan at other guidance scales and in other numbers of steps (its log-SNR interpolated), beside diffusers'
best five-step scheduler changed in the same way, on the same seeds. A plan keeps its lead at guidance near its own and
within a step of its number; farther off, and without guidance, it is no better and then worse: search again."""

EVOLUTION_HEAD = """## Beside AutoDiffusion's evolution

The presets `autodiffusion` (arXiv:2309.10438: evolution over the steps of the pipeline's own DDIM) and `fast` on
`fashion-dit`, in one run on the same samples; `fast-grid` is `fast` over the steps alone, as the evolution is. Rows are
evaluations of the network, a guided step counted twice, those included that suggest grids and that measure the best and
the baselines on fresh noise. Rows until as good are those of trials, until one had at search what the best of the
evolution had there. Over the steps alone both end at the same distance; what is gained beyond it is the solver's, the
guidance's and the correction's, and the first plan that `fast` begins with was past it already."""


COMMANDS_HEAD = """## Commands

`unet-base.json` has nothing but the start `analytic-init` that ships beside the plans; `karras-N.json` is UniPC with
Karras' sigmas in N steps, and `karras-init-N.json` the same from that start. `dit-from-*.json` are the found plans of
five and ten steps in eight, their log-SNR interpolated as under "In other settings", and `best-*.json` the baseline of
five steps."""


def document(results: Path) -> str:
    """The text of docs/search.md.

    Args:
        results: the folder of the files that the benchmarks wrote; a section without its file says so.
    """
    searches = _read(results, "searches")
    sections = [HEAD, PLANS_HEAD, *(_plans(demo) for demo in DEMOS), GOALS_HEAD]
    excesses = {demo: _read(results, f"excess-{_short(demo)}") for demo in DEMOS}
    sections += [_titled(demo, found, _goals) for demo, found in excesses.items()]
    sections += [FRESH_HEAD, *(_fresh(demo, searches.get(demo, {})) for demo in DEMOS if searches)]
    transfers = {demo: _read(results, f"transfer-{_short(demo)}") for demo in DEMOS}
    sections += [TRANSFER_HEAD, *(_titled(demo, found, _transfer) for demo, found in transfers.items())]
    evolution = _read(results, "evolution-dit")
    sections += [EVOLUTION_HEAD, _evolution(evolution) if evolution else "Not measured."]
    sections += [COMMANDS_HEAD, _commands(searches, excesses, transfers, evolution)]
    return "\n\n".join(section.strip() for section in sections if section) + "\n"


def _read(results: Path, name: str) -> dict[str, Any]:
    path = results / f"{name}.json"
    return dict(read_json(path)) if path.is_file() else {}


def _short(demo: str) -> str:
    return demo.removeprefix("fashion-")


def _titled(demo: str, found: Found, section: Any) -> str:
    return f"**`{demo}`**{section(found) if found else ': not measured.'}"


def _plans(demo: str) -> str:
    folder = plan_folder(f"demo:{demo}")
    assert folder is not None
    plans = {path: Plan.load(path) for path in folder.glob("*-step*.json")}
    searched = {path: plan for path, plan in plans.items() if not plan.weights}
    rows = []
    for path, plan in sorted(searched.items(), key=lambda item: item[1].nominal_steps or 0):
        evidence = [f"{each.metric} {_estimate(each.value, each.se)}" for each in plan.evidence]
        rows.append([f"`{path.stem}`", _solver(plan), _times(plan), _others(plan), "; ".join(evidence)])
    return f"**`{demo}`**\n\n" + markdown.table(["plan", "solver", "timesteps", "besides", "evidence"], rows)


def _solver(plan: Plan) -> str:
    scheduler = str(getattr(plan.solver, "scheduler", "")).removesuffix("Scheduler")
    config = getattr(plan.solver, "config", {})
    order = config.get("solver_order") or config.get("predictor_order")
    return f"{scheduler} {order}" if order else scheduler


def _times(plan: Plan) -> str:
    times = getattr(plan.grid, "timesteps", None)
    if times:
        return ", ".join(f"{time:g}" for time in times)
    config = getattr(plan.solver, "config", {})
    named = [name for name, option in SIGMAS.items() if config.get(option)]
    return " ".join(named or [str(getattr(plan.grid, "spacing", ""))])


def _others(plan: Plan) -> str:
    found = []
    for slot, part in plan.placed:
        if slot in ("solver", "grid"):
            continue
        values = {key: value for key, value in part.model_dump(exclude_defaults=True).items() if key != "type"}
        shown = ", ".join(f"{key} {_shown(value)}" for key, value in values.items() if key not in ("file", "rows"))
        found.append(f"{part.type} {shown}".strip())
    return "; ".join(found)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(map(_shown, value)) if isinstance(value, list | tuple) else str(value)


def _estimate(value: float, se: float | None) -> str:
    return f"{value:.3g}" if se is None else markdown.number(value, se)


def _goals(found: Found) -> str:
    converged = found["converged"]["rows"][found["converged"]["best"]]
    metric = converged["metrics"]["fd"]
    rows = []
    for budget, entry in found["budgets"].items():
        base = entry["baselines"][entry["baseline"]]
        row = [budget, f"`{entry['baseline']}` {_metric(base, 'fd')}"]
        if "plan" in entry:
            goal = entry["goal"]
            difference = _difference(entry["plan"])
            row += [_metric(entry["plan"], "fd"), difference, _share(goal)]
            row += [_change(entry["plan_others"], entry["baseline_others"], kind) for kind in METRICS]
        rows.append(row + [""] * (8 - len(row)))
    head = ["steps", "best of diffusers", "plan", "difference", "share of the excess", *METRICS.values()]
    return (
        f", {found['n']:,} images a row; converged, `{found['converged']['best']}` at 100 steps: "
        f"{markdown.number(metric['value'], metric['se'])} ({converged['n']:,} images).\n\n"
        + markdown.table(head, rows)
    )


def _share(goal: Found) -> str:
    """The share of the excess; none where the baseline is no farther than the converged teacher."""
    if goal["baseline_excess"] <= 0:
        return f"{goal['excess']:+.2f} and {goal['baseline_excess']:+.2f}"
    return str(markdown.number(goal["ratio"], goal["se"]))


def _metric(row: Found, kind: str) -> str:
    metric = row["metrics"][kind]
    return markdown.number(metric["value"], metric["se"])


def _difference(row: Found) -> str:
    value, se = row["difference"]
    return markdown.number(value, se, sign="+")


def _change(ours: Found, theirs: Found, kind: str) -> str:
    """From the baseline's value to the plan's, bold where it is worse by two standard errors."""
    if kind not in ours or kind not in theirs:
        return ""
    before, after = theirs[kind], ours[kind]
    text = f"{before['value']:.3f} to {after['value']:.3f} ± {after['se']:.3f}"
    worse = before["value"] - after["value"] > 2 * math.hypot(before["se"], after["se"])
    return f"**{text}**" if worse else text


def _fresh(demo: str, searches: Found) -> str:
    rows = []
    for steps, found in sorted(searches.items(), key=lambda pair: pair[0].rjust(2)):
        for rank, candidate in enumerate(found["front"]):
            before, after = candidate["at_search"], candidate["fresh"]
            rows.append(
                [
                    steps if rank == 0 else "",
                    candidate["name"],
                    _quality(before),
                    _quality(after),
                ]
            )
    return f"**`{demo}`**\n\n" + markdown.table(["steps", "leader", "at search", "on fresh noise"], rows)


def _quality(scored: Found) -> str:
    quality = scored["quality"]
    return f"{markdown.number(quality['value'], quality['se'])} (n = {scored['n']:,})"


def _transfer(found: Found) -> str:
    rows = [
        [
            setting,
            _metric(entry["plan"], "fd"),
            _metric(entry["against"], "fd"),
            _difference(entry["plan"]),
        ]
        for setting, entry in found["settings"].items()
    ]
    head = ["setting", "plan", "diffusers' best at five steps", "difference"]
    return f", {found['n']:,} images a row\n\n{markdown.table(head, rows)}"


def _evolution(found: Found) -> str:
    rows = []
    for steps, searches in found["steps"].items():
        for name, search in searches.items():
            trials = ", ".join(f"{count} {state}" for state, count in search["trials"].items())
            row = [steps, f"`{name}`", trials, f"{search['rows']:,}", _metric(search["fresh"], "fd")]
            if "share_of_rows" in search:
                reached = search["rows_to_reach_baseline"]
                row += [
                    _difference(search["fresh"]),
                    f"{100 * search['share_of_rows']:.1f} %",
                    "never" if reached is None else f"{reached:,}",
                ]
            rows.append(row + [""] * (8 - len(row)))
    head = [
        "steps",
        "search",
        "candidates",
        "rows",
        "on fresh seeds",
        "difference",
        "share of rows",
        "rows until as good",
    ]
    return f"Candidates on {found['n']:,} images.\n\n{markdown.table(head, rows)}"


def _commands(searches: Found, excesses: Mapping[str, Found], transfers: Mapping[str, Found], evolution: Found) -> str:
    lines = [found["command"] for demo in DEMOS for found in searches.get(demo, {}).values()]
    lines += [line for demo, found in excesses.items() if found for line in _excess_commands(demo, found)]
    lines += [_transfer_command(demo, found) for demo, found in transfers.items() if found]
    if evolution:
        lines.append(
            f"python -m fewstep.scripts.bench.evolution --pipe {evolution['pipe']} "
            f"--steps {' '.join(evolution['steps'])} --n {evolution['n']} "
            f"--fresh_n {evolution['fresh_n']} --work work/evolution --out docs/results/evolution-dit.json"
        )
    return "```bash\n" + "\n".join(lines) + "\n```"


def _transfer_command(demo: str, found: Found) -> str:
    scales = [name.removeprefix("guidance ") for name in found["settings"] if name.startswith("guidance ")]
    steps = [name.removesuffix(" steps") for name in found["settings"] if name.endswith(" steps")]
    short = _short(demo)
    return " ".join(
        [
            f"python -m fewstep.scripts.bench.transfer --pipe demo:{demo} --plan eval/demo/plans/{demo}/5-step.json",
            f"--against best-{short}.json --work work/{short} --n {found['n']}",
            *["--scales", *scales, "--steps", *steps],
            f"--out docs/results/transfer-{short}.json",
        ]
    )


def _excess_commands(demo: str, found: Found) -> list[str]:
    """One command for each number of baselines; the converged schedulers are in the first."""
    reached, short = found["converged"]["rows"], _short(demo)
    converged = f"{' '.join(reached)} --converged_n {next(iter(reached.values()))['n']}"
    budgets: dict[int, list[str]] = {}
    for budget, entry in found["budgets"].items():
        budgets.setdefault(len(entry["baselines"]), []).append(budget)
    lines: list[str] = []
    for top, listed in sorted(budgets.items(), reverse=True):
        lines.append(
            f"python -m fewstep.scripts.bench.excess --pipe demo:{demo} --solvers docs/results/solvers-{short}.json "
            f"--work work/{short} --n {found['n']} --top {top} --converged {converged if not lines else ''} "
            f"--budgets {' '.join(listed)} --out docs/results/excess-{short}.json".replace("  ", " ")
        )
    return lines
