"""What the fast search and AutoDiffusion's evolution find, and how much of the network each of them runs for it.

``python -m fewstep.scripts.bench.evolution --pipe demo:fashion-dit --steps 5 --work DIR --out evolution.json``

Searches are ``fewstep search plan`` with the preset ``autodiffusion``, with ``fast``, and with ``fast`` on the grid
alone, which is all that the evolution varies. Each has its preset's number of trials, or ``--trials``, on the same
samples. The plans found are compared on seeds that no search saw, by their Fréchet distance to Fashion-MNIST's 10,000
test images. Rows are those that went through the network, a guided step counted twice; those of a trial are the images
that it was measured on times its rows an image. The same ``--work`` goes on where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fewstep.eval.assets import DEMO
from fewstep.samplers.files import write_json
from fewstep.search.found import Found

from ..plan_search_command import search_for_plan
from ..search_options import PlanOptions
from ..search_setting import Setting
from .judge import Judge, compared

BASELINE = "autodiffusion"
PRESETS = {BASELINE: ("autodiffusion", None), "fast": ("fast", None), "fast-grid": ("fast", "grid")}
"Of each search, by its name: the preset, and the space where that is not the preset's own."

FRESH_SEED = 5_000_000


def searched(name: str, pipe: str, steps: int, work: Path, n: int, trials: int | None, seed: int) -> Path:
    """Searches, and returns the folder with ``found.json`` and ``plan.json``.

    Args:
        name: of `PRESETS`.
        pipe: a demo such as ``demo:fashion-dit``.
        steps: of the plan.
        work: the folder of the search is in it.
        n: samples that decide between candidates; twice as many fresh ones between the best of them.
        trials: distinct plans to measure; None for the preset's own number.
        seed: of the proposals.
    """
    folder = work / f"{name}-{steps}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    preset, space = PRESETS[name]
    options = PlanOptions(
        pipe=pipe,
        out=folder / "plan.json",
        study=folder,
        steps=steps,
        n=n,
        trials=trials,
        search_seed=seed,
        fresh_n=2 * n,
        device="cpu",
        preset=preset,
        space=space,
    )

    def progress(done: int, total: int, note: str) -> None:
        if done % 10 == 0:
            print(f"{folder.name}: {done} of {total}, {note}", flush=True)  # noqa: T201

    setting = Setting.of(options, f"python -m fewstep.scripts.bench.evolution --pipe {pipe} --steps {steps}")
    search_for_plan(setting, options, progress).save(options.out)
    return folder


def trajectory(found: Found) -> Iterator[tuple[int, float]]:
    """Rows of all trials so far and the least loss, at each trial that lowered it.

    Only trials that were measured on all samples count as better; the rows of the others count all the same.
    """
    rows, least = 0, float("inf")
    for candidate in found.history:
        if candidate.at_search is None:
            continue
        scored = candidate.at_search
        rows += round(scored.n * scored.costs["nfe"])
        loss = -scored.quality.value if found.higher_is_better else scored.quality.value
        if candidate.state == "complete" and candidate.holds and loss < least:
            least = loss
            yield rows, loss


def rows_of_trials(found: Found) -> int:
    """Rows of all trials that were measured."""
    scored = [candidate.at_search for candidate in found.history if candidate.at_search is not None]
    return sum(round(each.n * each.costs["nfe"]) for each in scored)


def entry(found: Found) -> dict[str, Any]:
    """A search in the file of results."""
    states = [candidate.state for candidate in found.history]
    return {
        "trials": {state: states.count(state) for state in sorted(set(states))},
        "rows": found.spent,
        "rows_of_trials": rows_of_trials(found),
        "seconds": found.seconds,
        "best_so_far": list(trajectory(found)),
    }


def rows_to_reach(found: Found, loss: float) -> int | None:
    """Rows of trials until one of them had a loss at most this; None if none had."""
    return next((rows for rows, least in trajectory(found) if least <= loss), None)


def main() -> None:
    """Writes ``--out`` after each number of steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipe", default="demo:fashion-dit")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[5])
    parser.add_argument("--n", type=int, default=1024)
    parser.add_argument("--trials", type=int, help="of each search, to try the script out")
    parser.add_argument("--search_seed", type=int, default=0)
    parser.add_argument("--fresh_n", type=int, default=10_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    test = DEMO / "fashion-features" / "test.safetensors"
    judge = Judge(options.pipe, options.work / "judge", options.fresh_n, FRESH_SEED, stats=test)
    result: dict[str, Any] = {"pipe": options.pipe, "n": options.n, "fresh_n": options.fresh_n, "steps": {}}
    ours = [name for name in PRESETS if name != BASELINE]
    for steps in options.steps:

        def outcome(name: str, steps: int = steps) -> tuple[Found, dict[str, Any]]:
            folder = searched(name, options.pipe, steps, options.work, options.n, options.trials, options.search_seed)
            return Found.load(folder / "found.json"), judge.row(folder / "plan.json")

        base, base_row = outcome(BASELINE)
        *_, (_, reached) = trajectory(base)
        entries = {BASELINE: entry(base) | {"fresh": compared(base_row)}}
        for name in ours:
            found, row = outcome(name)
            entries[name] = entry(found) | {
                "fresh": compared(row, base_row),
                "share_of_rows": found.spent / base.spent,
                "rows_to_reach_baseline": rows_to_reach(found, reached),
            }
        result["steps"][steps] = entries
        write_json(options.out, result)


if __name__ == "__main__":
    main()
