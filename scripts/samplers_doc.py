"""Makes docs/samplers.md: what solvers and parts were measured to do on the demo's teachers, from docs/results."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..samplers.files import read_json
from . import markdown
from .bench.solvers import SOLVERS
from .bench.time_shift import NAMES

Found = dict[str, Any]
"What a benchmark wrote."

RESULTS = "docs/results"
DEMOS = ("fashion-dit", "fashion-unet")
BUDGETS = (4, 5, 6, 8, 10)
METRICS = {"class_accuracy": "accuracy", "precision": "precision", "recall": "recall"}

HEAD = """# Samplers, measured

Made by `python -m fewstep.scripts.tables` from `docs/results/*.json`, which the commands below wrote. Distances are
`fd_fashion` against the 60,000 training images (lower is better), ± one standard error from a jackknife over 20 blocks
of seeds. A difference is that of two rows on the same seeds, ± the error of the difference, which is smaller than the
errors of the rows; it is bold where it is beyond two of them. So many comparisons make a few bold ones by chance: one
in twenty, if nothing helped. NFE is counted by the pipeline, per image: with guidance, a step of one evaluation
counts two. Everything ran in float32 on the CPU; the teachers are small and so are the images, and what helps here
may not on larger ones.
"""

SOLVERS_HEAD = """## Every scheduler in few evaluations

The best of the scheduler's own spacings, in brackets, was chosen on other seeds (from 1,000,000 on, at 5 evaluations
for 4 to 6 and at 10 for 8 and 10), among leading, linspace and trailing, and Karras', exponential and beta sigmas where
it has them. A scheduler that evaluates twice a step takes half as many steps. The least of each column is bold.
"""

SOLVERS_NOTE = """Euler is DDIM and Euler ancestral is DDPM in another parametrisation; they differ where their spacings
do. `pndm-s`, diffusers' PNDM without Runge-Kutta steps, blends several outputs of the network as they are and reads the
blend at one state, which holds for noise predictions; these teachers predict v, so its distances tell of that defect of
the host and not of the method. Not here: PNDM with Runge-Kutta steps (13 evaluations at the least), the parallel and
CogVideoX forms of DDIM and DDPM (the same numbers), and schedulers of other processes (EDM, flow matching)."""

PARTS_HEAD = """## Parts, one at a time

Three solvers at their best spacing, and each part added to them. `early-start` is the same spacing from timestep 800
on, `analytic-init` that with the fitted Gaussian; its second difference is to the early start. `zero-snr` is trailing
steps on betas rescaled to zero terminal SNR. The scale of `epsilon-scaling` was chosen on seeds from 1,000,000 on, the
aligner's ratios and the Gaussian fitted on the teacher's samples of seeds from 3,000,000 on, and the cell of the
time-shift part found on the U-Net as below (UniPC has DPM-Solver++'s).
"""

SHIFT_HEAD = """## Time shift: window and cutoff

On `fashion-unet` at ten evaluations. Differences to the solver without the part, criterion `residual`, on the seeds
that the best cell was found on. PNDM has no grid: its distance is what diffusers' defect makes it, with or without.
"""

SHIFT_REPORT = "The best cell of each on other seeds, and the same cell with the criterion `data-variance`:"

NOTES = """## What helps, and what does not

* **Where the steps are** decides more than which solver takes them. On `fashion-unet`, which works on pixels, Karras'
  sigmas bring DPM-Solver++ from 37 with trailing steps (the README's table) to 13 at ten evaluations; on `fashion-dit`
  they are its best from eight on. Multistep solvers, PNDM apart, come before first-order ones at every budget.
* **An early start** helps both teachers in five steps of a multistep solver. In ten it depends on the grid: on
  `fashion-dit` it helps UniPC's even steps, changes nothing under Karras' and harms DDIM; on `fashion-unet` it costs
  much, because noise alone lacks the mean of the images.
* **Analytic-Init** puts that mean in. On pixels it takes far more off than the early start alone, for DDIM at both
  budgets; with Karras' steps it helps at five and costs a little at ten. On latents, whose mean is small, it adds
  nothing to the early start.
* **Epsilon scaling** depends on the grid. On `fashion-dit` 1.03 with five even steps takes almost half of the distance
  off and raises recall, which guidance had lowered; in ten steps it takes off up to a fourth. With Karras' steps 1.03
  tripled the distance on 256 screening images. On `fashion-unet` the smallest scale tried, 1.002, helps DDIM a little
  and harms the multistep solvers, as a network that starts at a time of hardly any signal is thrown off by any scale.
  Choose it with the grid, never alone.
* **The aligner** takes a little off on `fashion-dit`, beyond the errors in five of six, after its gradient steps. On
  `fashion-unet` it harms in five of six: what it fits, the error of a step, is not what the distance sees.
* **Time shift**, by its residual, makes DDIM and DEIS worse on `fashion-unet` but for narrow windows and high cutoffs,
  and changes DPM-Solver++ and DDPM by less than can be seen; the best cells are worth half a point or nothing on other
  seeds, with either criterion.
* **Zero terminal SNR** rescales the betas under teachers that were trained with signal left in the noisiest step: worse
  for the multistep solvers by far, and little for DDIM.
* **ReDi** at five evaluations loses to five plain steps, in recall most of all.
* **Guidance** can be left out early at no cost in distance or accuracy; left out late, it costs both.
"""

GUIDANCE_HEAD = """## Guidance in a window of the steps

DPM-Solver++ 2M on `fashion-dit`, scale 1.5; outside the window the unconditional branch is not evaluated, but for the
first step, where the part finds out which branch is which.
"""

LATENCY = """Latency is that of one call as a share of the call with full guidance, both called in turn: the median
of the pairs, quartiles in brackets."""

OVERHEAD_HEAD = """## What a part costs beside the network

Processor time of a call outside of the network, less that of the same call without the part, as a share of the
network's own time in the call without it; the decoder is left out of both. Medians of calls in turn, quartiles in
brackets. A share below zero is noise: the part costs less than calls differ. The aim is at most 1 % on `fashion-dit`.
The table is from before the levels of single times were kept and the variance was taken in two passes; in five pairs of
calls after that `time-shift` took 0.96 % there.
"""


def document(results: Path) -> str:
    """The text of docs/samplers.md.

    Args:
        results: the folder of the files that the benchmarks wrote; a section without its file says so.
    """
    solvers = {demo: _read(results, f"solvers-{_short(demo)}") for demo in DEMOS}
    parts = {demo: _read(results, f"parts-{_short(demo)}") for demo in DEMOS}
    shift, guidance = _read(results, "time-shift-unet"), _read(results, "guidance-dit")
    overhead = _read(results, "overhead")
    sections = [
        HEAD,
        SOLVERS_HEAD,
        *(_titled(demo, _solvers, solvers[demo]) for demo in DEMOS),
        SOLVERS_NOTE,
        PARTS_HEAD,
        *(_titled(demo, _parts, parts[demo]) for demo in DEMOS),
        _verdicts(parts),
        SHIFT_HEAD,
        _or_missing(_shift, shift),
        GUIDANCE_HEAD,
        _or_missing(_guidance, guidance),
        OVERHEAD_HEAD,
        _or_missing(_overhead, overhead),
        NOTES,
        _commands(solvers, parts, shift, guidance, overhead),
    ]
    return "\n\n".join(section.strip() for section in sections if section) + "\n"


def _read(results: Path, name: str) -> Found | None:
    path = results / f"{name}.json"
    return dict(read_json(path)) if path.is_file() else None


def _short(demo: str) -> str:
    return demo.removeprefix("fashion-")


def _titled(demo: str, section: Callable[[Found], str], found: Found | None) -> str:
    seeds = f", {found['n']:,} images a row, seeds from 0 on" if found else ""
    return f"**`{demo}`**{seeds}:\n\n{_or_missing(section, found)}"


def _or_missing(section: Callable[[Found], str], found: Found | None) -> str:
    return section(found) if found else "Not measured."


def _metric(row: dict[str, Any], kind: str, digits: int) -> str:
    found = row["metrics"].get(kind)
    return markdown.number(found["value"], found["se"], digits) if found else ""


def _difference(pair: Sequence[float] | None) -> str:
    if pair is None:
        return ""
    text = markdown.number(pair[0], pair[1], sign="+")
    return f"**{text}**" if _beyond(pair) else text


def _beyond(pair: Sequence[float]) -> bool:
    """Whether a difference is more than two standard errors."""
    return abs(pair[0]) > 2 * pair[1]


def _solvers(found: Found) -> str:
    table = {name: entry["rows"] for name, entry in found["solvers"].items()}
    least = {
        budget: min(row["metrics"]["fd"]["value"] for rows in table.values() if (row := rows[str(budget)]))
        for budget in BUDGETS
    }

    def cell(rows: dict[str, Any], budget: int) -> str:
        row = rows[str(budget)]
        if row is None:
            return "refused"
        text = _metric(row, "fd", 1)
        bold = row["metrics"]["fd"]["value"] == least[budget]
        return (f"**{text}**" if bold else text) + (f" ({row['spacing']})" if row["spacing"] != "None" else "")

    head = ["scheduler", *(f"{budget} evaluations" for budget in BUDGETS)]
    lines = markdown.table(
        head, ([f"`{name}`", *(cell(rows, budget) for budget in BUDGETS)] for name, rows in table.items())
    )
    return lines + _missing(SOLVERS, table)


def _missing(names: Iterable[str], found: Iterable[str]) -> str:
    """A sentence that lists the names that were not measured, if there are any."""
    missing = [f"`{name}`" for name in names if name not in set(found)]
    return f"\n\nNot measured: {', '.join(missing)}." if missing else ""


def _parts(found: Found) -> str:
    guided = any("class_accuracy" in row["metrics"] for case in found["cases"] for row in case["rows"].values())
    metrics = {kind: name for kind, name in METRICS.items() if guided or kind != "class_accuracy"}
    rows = [
        [
            f"`{case['solver']}` {case['budget']} ({case['spacing']})",
            _part(part, row),
            f"{row['nfe']:g}",
            _metric(row, "fd", 2),
            _difference(row.get("difference")),
            _difference(row.get("beside")),
            *(_metric(row, kind, 3) for kind in metrics),
        ]
        for case in found["cases"]
        for part, row in case["rows"].items()
    ]
    head = ["solver, evaluations", "part", "NFE", "fd", "less plain", "less early start", *metrics.values()]
    return markdown.table(head, rows)


def _part(part: str, row: dict[str, Any]) -> str:
    """The name of a part, with what was chosen for it."""
    plan = row["plan"]
    if "epsilon-scaling" in part:
        return f"`{part}` {plan['correction']['scale']:g}"
    if part == "time-shift":
        cell = plan["conditioning"]
        return f"`{part}` {cell['window']}, {cell.get('cutoff', 0):g}"
    if part == "guidance":
        return f"`{part}` {_window(plan['guidance'].get('window', (0, 1)))}"
    return "–" if part == "plain" else f"`{part}`"


def _window(window: Sequence[float]) -> str:
    return f"[{window[0]:g}, {window[1]:g})"


def _verdicts(parts: dict[str, Found | None]) -> str:
    """How often each part was beyond two standard errors, on each demo."""
    counts: dict[str, dict[str, list[int]]] = {}
    for demo, found in parts.items():
        for case in found["cases"] if found else ():
            for part, row in case["rows"].items():
                if pair := row.get("difference"):
                    count = counts.setdefault(part, {}).setdefault(demo, [0, 0, 0])
                    count[0] += _beyond(pair) and pair[0] < 0
                    count[1] += _beyond(pair) and pair[0] > 0
                    count[2] += 1
    if not counts:
        return ""
    text = "{} better, {} worse, of {}"
    rows = [
        [f"`{part}`", *(text.format(*found[demo]) if demo in found else "–" for demo in DEMOS)]
        for part, found in counts.items()
    ]
    return "Comparisons beyond two standard errors:\n\n" + markdown.table(
        ["part", *(f"`{demo}`" for demo in DEMOS)], rows
    )


def _shift(found: Found) -> str:
    blocks = []
    for name, entry in found["solvers"].items():
        cells = {(cell["window"], cell["cutoff"]): cell for cell in entry["cells"]}
        windows, cutoffs = (sorted({key[axis] for key in cells}) for axis in (0, 1))
        rows = [
            [str(window), *(_difference(cells[window, cutoff]["difference"]) for cutoff in cutoffs)]
            for window in windows
        ]
        title = f"`{name}` ({entry['spacing']}), {found['search_n']} images, seeds from {found['search_seed']:,} on:"
        blocks.append(title + "\n\n" + markdown.table(["window", *(f"cutoff {cutoff:g}" for cutoff in cutoffs)], rows))
    report = [
        [
            f"`{name}`",
            f"{entry['best']['window']}, {entry['best']['cutoff']:g}",
            _metric(entry["rows"]["plain"], "fd", 2),
            *(_difference(entry["rows"][criterion]["difference"]) for criterion in ("residual", "data-variance")),
        ]
        for name, entry in found["solvers"].items()
        if "rows" in entry
    ]
    missing = _missing(NAMES, found["solvers"])
    if not report:
        return "\n\n".join([*blocks, "The best cells were not measured on other seeds."]) + missing
    head = ["solver", "window, cutoff", "fd without", "`residual`", f"`data-variance` {found['data_variance']:g}"]
    seeds = f"{found['n']:,} images, seeds from 0 on."
    return "\n\n".join([*blocks, f"{SHIFT_REPORT} {seeds}", markdown.table(head, report)]) + missing


def _guidance(found: Found) -> str:
    sizes = sorted(
        {size for entry in found["steps"].values() for row in entry["rows"] for size in row.get("latency", ())}, key=int
    )

    def latency(row: dict[str, Any], size: str) -> str:
        timed = row.get("latency", {}).get(size)
        return "{:.2f} ({:.2f} to {:.2f})".format(timed["ratio"], *timed["ratio_quartiles"]) if timed else "1"

    rows = [
        [
            f"{steps} ({entry['spacing']})",
            _window(row["window"]),
            f"{row['nfe']:g}",
            _metric(row, "fd", 2),
            _difference(row.get("difference")),
            *(_metric(row, kind, 3) for kind in METRICS),
            *(latency(row, size) for size in sizes),
        ]
        for steps, entry in found["steps"].items()
        for row in entry["rows"]
    ]
    timed = [f"latency, batch {size}" for size in sizes]
    head = ["steps", "window", "NFE", "fd", "less full guidance", *METRICS.values(), *timed]
    note = LATENCY if sizes else "Latency was not measured."
    return f"{found['n']:,} images a row, seeds from 0 on. {note}\n\n" + markdown.table(head, rows)


def _overhead(found: Found) -> str:
    shares = found["overhead"]
    names = dict.fromkeys(part for parts in shares.values() for part in parts)

    def cell(share: dict[str, float] | None) -> str:
        if share is None:
            return ""
        low, median, high = (f"{100 * share[name]:.2f}" for name in ("q1", "share_of_network", "q3"))
        return f"{median} % ({low} to {high})"

    rows = [[f"`{name}`", *(cell(parts.get(name)) for parts in shares.values())] for name in names]
    about = f"{found['steps']} steps, batch {found['batch_size']}, {found['repeats']} pairs of calls."
    return f"{about}\n\n" + markdown.table(["part", *(f"`{demo.partition(':')[2]}`" for demo in shares)], rows)


def _commands(
    solvers: dict[str, Found | None],
    parts: dict[str, Found | None],
    shift: Found | None,
    guidance: Found | None,
    overhead: Found | None,
) -> str:
    """The commands that measure all of it anew."""
    lines = []

    def add(script: str, demo: str, out: str, found: Found | None, flags: Sequence[str], rest: str = "") -> None:
        if found:
            values = " ".join(f"--{flag} {found[flag]}" for flag in flags if flag in found)
            known = "" if script == "solvers" else f" --solvers {RESULTS}/solvers-{_short(demo)}.json"
            lines.append(
                f"python -m fewstep.scripts.bench.{script} --pipe demo:{demo} --work work/{_short(demo)}{known} "
                f"{values}{rest} --out {RESULTS}/{out}.json"
            )

    for demo in DEMOS:
        add("solvers", demo, f"solvers-{_short(demo)}", solvers[demo], ("n", "screen_n"))
    for names, windows, cutoffs in _grids(shift) if shift else ():
        rest = f" --names {names} --windows {windows} --cutoffs {cutoffs}"
        add("time_shift", "fashion-unet", "time-shift-unet", shift, ("n", "search_n", "data_variance"), rest)
    for demo in DEMOS:
        flags = ("n", "screen_n", "samples", "iterations", "trajectories")
        rest = f" --time_shift {RESULTS}/time-shift-unet.json{_chosen(parts[demo])}"
        add("parts", demo, f"parts-{_short(demo)}", parts[demo], flags, rest)
    add("guidance_window", "fashion-dit", "guidance-dit", guidance, ("n", "screen_n", "repeats"))
    if overhead:
        lines.append(
            f"python -m fewstep.scripts.bench.overhead --repeats {overhead['repeats']} --out {RESULTS}/overhead.json"
        )
    return "## Commands\n\n```bash\n" + "\n".join(lines) + "\n```"


def _chosen(parts: Found | None) -> str:
    """The flags for the solvers, budgets and parts that are in the results."""
    if parts is None:
        return ""
    cases = parts["cases"]
    flags: dict[str, Iterable[Any]] = {
        "bases": (case["solver"] for case in cases),
        "budgets": (case["budget"] for case in cases),
        "parts": (part for case in cases for part in case["rows"] if part != "plain"),
    }
    return "".join(f" --{flag} {shlex.join(map(str, dict.fromkeys(values)))}" for flag, values in flags.items())


def _grids(shift: Found) -> list[tuple[str, str, str]]:
    """Solvers, windows and cutoffs that were searched together."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, entry in shift["solvers"].items():
        axes = (sorted({cell[axis] for cell in entry["cells"]}) for axis in ("window", "cutoff"))
        windows, cutoffs = (" ".join(f"{value:g}" for value in values) for values in axes)
        found.setdefault((windows, cutoffs), []).append(name)
    return [(" ".join(names), *axes) for axes, names in found.items()]
