"""docs/caches.md: what caches save and what that costs, beside those of other packages."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..samplers.files import read_json
from .bench.curves import Equal, Speed, at_equal_distance, by_operations, by_time
from .markdown import number, table

RESULTS = "docs/results"
TEACHERS = {"dit": "demo:fashion-dit", "unet": "demo:fashion-unet"}
BATCHES = (1, 64)
CLOCKS = ("wall", "processor")
GOAL, WIDE_GOAL = 1.2, 0.95
WHOSE = {"control": "Without a cache", "peer": "Other packages", "ours": "This package"}

HEAD = """# Caches, measured

All rows of a table are DDIM in 20 trailing steps on the same seeds, or in fewer for the control. PSNR and `distance`,
the Euclidean distance in the features of the demo's classifier, are to the uncached run of the same seed; `fd` is to
real images, and the difference beside it to the uncached run, with one standard error; it is bold beyond two.
`operations` is by what factor a call does fewer floating-point operations, `wall` by what factor it takes less time and
`processor` the same by the processor time of its one thread, which other work on the machine moves less: medians of
calls in turn with the uncached run, quartiles in brackets. All leave the decoder out. KiB are the most that the cache
held at once, for each image.

DeepCache is the package 0.1.1 of its authors. cache-dit computes one first block, two steps of warm-up and the
threshold that is named; `mask` computes every n-th step whatever the data say, and `Taylor 1` is its TaylorSeer
calibrator. FirstBlockCache, TaylorSeer and MagCache are those of diffusers, which a DiT has no switch for: their hooks
were put on by hand, in one context, as both branches of guidance are in one batch. TaylorSeer is told which modules to
cache, as its own patterns match none in a DiT, and keeps float32. MagCache's ratios were calibrated on other seeds, as
were `measured` steps, which `measure_changes` chose, and `calibrated` ones, rungs of the ladder of `fewstep search
cache`.
"""

EQUAL_HEAD = """At each distance where one of the other packages' settings is the fastest of them: how much faster the
best of ours is there, between its own settings on a straight line."""

WIDE_HEAD = """## Wide networks

What a fixed mask saves does not depend on the weights: these are random. One image, no decoder; the share
is that of the factor of time in the factor of operations."""

NOTES = """## What helps, and what does not

* **By operations** tables of attentions and MLPs that were calibrated (`block-mask`) are ahead: each module computes
  where its output changes, and gates and modulations are always those of the step.
* **By the clock** it is whole steps that were calibrated (`step-rehash`): a skipped step costs the embedding and the
  last layer alone, and a twelfth of the memory is kept. In a DiT as narrow as this one a step of a single image takes
  most of its time even without its attentions and MLPs.
* **Forecasts** of order 2 more than halve the distance where half of the steps compute. Order 1 does little there, and
  where one step in three computes it is worse than reuse, in other packages as here.
* **Gates** skip as much as other packages' at the same distance, and decide for each sample; they need no calibration.
* **Fewer steps** of the same solver are the control that every cache has to beat: at half of the operations they cost
  2.9 in `fd`, and calibrated tables 0.6 at less than a third.
"""


def document(results: Path) -> str:
    """The text of docs/caches.md.

    Args:
        results: the folder of the files that the benchmarks wrote; a section without its file says so.
    """
    found = {name: _read(results, f"caches-{name}") for name in (*TEACHERS, "wide")}
    sections = [HEAD, *(_teacher(name, found[name]) for name in TEACHERS)]
    sections += [_wide(found["wide"]), NOTES, _commands(found)]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _read(results: Path, name: str) -> dict[str, Any] | None:
    path = results / f"{name}.json"
    return dict(read_json(path)) if path.is_file() else None


def _teacher(name: str, found: dict[str, Any] | None) -> str:
    title = f"## `{TEACHERS[name].removeprefix('demo:')}`"
    if found is None:
        return f"{title}\n\nNot measured."
    rows = found["rows"]
    about = f"{found['n']:,} images a row, seeds from {found['seed']} on. {_machine(found['machine'])}"
    tables = [f"**{said}**\n\n{_rows(rows, whose)}" for whose, said in WHOSE.items()]
    equal = [_equal(rows, by_operations, "operations")]
    equal += [
        _equal(rows, by_time(batch, clock), f"{clock} time, batch {batch}") for batch in BATCHES for clock in CLOCKS
    ]
    return "\n\n".join([title, about, *tables, f"### At equal distance\n\n{EQUAL_HEAD}", *filter(None, equal)])


def _machine(found: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    return f"Measured on {found['cpu']}, {found['cores']} cores, {found['threads']} thread, with {packages}."


def _rows(rows: Sequence[dict[str, Any]], whose: str) -> str:
    chosen = [row for row in rows if row["whose"] == whose]
    batches = [batch for batch in BATCHES if any(str(batch) in row["times"] for row in chosen)]
    cells = [
        [
            f"{row['method']}: {row['setting']}",
            _metric(row, "psnr", 1),
            _metric(row, "feature_distance", 3),
            _metric(row, "fd", 2),
            _difference(row.get("difference")),
            f"{row['flops']:.2f}",
            *(_time(row["times"].get(str(batch)), clock) for batch in batches for clock in CLOCKS),
            f"{row['bytes'] / 1024:.0f}",
        ]
        for row in sorted(chosen, key=lambda row: row["method"])
    ]
    timed = (f"{clock}, batch {batch}" for batch in batches for clock in CLOCKS)
    return table(["setting", "PSNR", "distance", "fd", "less uncached", "operations", *timed, "KiB"], cells)


def _metric(row: dict[str, Any], kind: str, digits: int) -> str:
    found = row["metrics"].get(kind)
    return number(found["value"], found["se"], digits) if found else ""


def _difference(pair: Sequence[float] | None) -> str:
    if pair is None:
        return ""
    text = number(pair[0], pair[1], sign="+")
    return f"**{text}**" if abs(pair[0]) > 2 * pair[1] else text


def _time(found: dict[str, Any] | None, clock: str) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(found[clock]["ratio"], *found[clock]["quartiles"]) if found else ""


def _equal(rows: Sequence[dict[str, Any]], speed: Speed, what: str) -> str:
    found = at_equal_distance(rows, speed)
    if not found:
        return ""
    cells = [
        [
            f"{equal.peer.distance:.3f}",
            f"{equal.peer.speed:.2f} ({equal.peer.name})",
            f"{equal.ours[0]:.2f} ({equal.ours[1]})",
            f"{equal.control:.2f}",
            f"{equal.ratio:.2f}",
        ]
        for equal in found
    ]
    head = ["distance", "best of the others", "best of ours", "fewer steps", "ours to theirs"]
    return f"By {what}:\n\n{table(head, cells)}\n\n{_verdict(found)}"


def _verdict(found: Sequence[Equal]) -> str:
    ratios = [equal.ratio for equal in found]
    met = sum(ratio >= GOAL for ratio in ratios)
    return (
        f"The goal is {GOAL} times the best of the others: it is met at {met} of {len(ratios)} distances; the median "
        f"is {statistics.median(ratios):.2f}, the range {min(ratios):.2f} to {max(ratios):.2f}."
    )


def _wide(found: dict[str, Any] | None) -> str:
    if found is None:
        return f"{WIDE_HEAD}\n\nNot measured."
    blocks = [WIDE_HEAD, f"{found['steps']} steps a call. {_machine(found['machine'])}"]
    for network in found["networks"].values():
        cells = [
            [
                row["cache"],
                f"{row['flops']:.3f}",
                *(_time(row["times"], clock) for clock in CLOCKS),
                *(f"{row['share'][clock]:.3f}" for clock in CLOCKS),
                _mebibytes(row),
            ]
            for row in network["rows"]
        ]
        head = ["cache", "operations", *CLOCKS, *(f"share, {clock}" for clock in CLOCKS), "MiB"]
        size = f"{network['parameters'] / 1e9:.2f} billion parameters"
        blocks.append(f"{network['about']} ({size}):\n\n{table(head, cells)}")
    for clock in CLOCKS:
        shares = [row["share"][clock] for network in found["networks"].values() for row in network["rows"]]
        met = sum(share >= WIDE_GOAL for share in shares)
        blocks.append(
            f"By the {clock} clock the goal, a share of {WIDE_GOAL}, is met by {met} of {len(shares)}; the least is "
            f"{min(shares):.3f}."
        )
    return "\n\n".join(blocks)


def _mebibytes(row: dict[str, Any]) -> str:
    return f"{row['bytes'] / 2**20:.1f}"


def _commands(found: dict[str, dict[str, Any] | None]) -> str:
    """The commands that measure all of it anew."""
    lines = ["pip install 'fewstep[bench]'"]
    for name, pipe in TEACHERS.items():
        if measured := found[name]:
            lines.append(
                f"python -m fewstep.scripts.bench.caches --pipe {pipe} --work work/{name} --n {measured['n']} "
                f"--repeats {measured['repeats']}{_batches(measured)} --out {RESULTS}/caches-{name}.json"
            )
    if wide := found["wide"]:
        flags = f"--steps {wide['steps']} --repeats {wide['repeats']}"
        lines.append(f"python -m fewstep.scripts.bench.wide {flags} --out {RESULTS}/caches-wide.json")
    return "## Commands\n\n```bash\n" + "\n".join(lines) + "\n```"


def _batches(found: dict[str, Any]) -> str:
    """The flag for the batches that were timed."""
    timed = sorted({int(batch) for row in found["rows"] for batch in row["times"]})
    return f" --batches {' '.join(map(str, timed))}" if timed else ""
