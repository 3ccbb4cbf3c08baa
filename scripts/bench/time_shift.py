"""Fréchet distance over the window and the cutoff of the time-shift part, per solver, at ten evaluations.

``python -m fewstep.scripts.bench.time_shift --work DIR --solvers solvers.json --n 1280 --out time_shift.json``

The best cell is found on some seeds (from `SEARCH_SEED` on) and reported on others (from 0 on), beside the solver
without the part. PNDM is left out: diffusers' scheduler is wrong for networks that predict v, as the demo's do.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from fewstep.samplers.files import read_json, write_json

from .judge import Judge, best, compared
from .solvers import SCREEN_SEED, SCREENED, SOLVERS, choose, guidance_of

EVALUATIONS = 10
NAMES = ("ddim", "ddpm", "deis", "dpmpp-2m")
WINDOWS = (5, 10, 20, 40, 80)
CUTOFFS = (0, 100, 300, 550, 700)
SEARCH_SEED = 2_000_000


def base_plan(solver: str, budget: int, screen: Judge, solvers: Path) -> tuple[str, dict[str, Any]]:
    """A solver at the spacing that ``solvers.json`` chose for a budget, or chosen here where it is not in it yet."""
    guidance = guidance_of(screen.pipe)
    screened = SCREENED.get(budget, EVALUATIONS)
    found = read_json(solvers)["solvers"].get(solver) if solvers.is_file() else None
    choice = found["screened"][str(screened)] if found else choose(screen, SOLVERS[solver], screened, guidance)
    return choice["spacing"], SOLVERS[solver].plans(budget, guidance)[choice["spacing"]]


def shifted(plan: dict[str, Any], window: int, cutoff: float, **rest: Any) -> dict[str, Any]:
    """The plan with a time-shift part."""
    return plan | {"conditioning": {"type": "time-shift", "window": window, "cutoff": cutoff} | rest}


def searched(judge: Judge, plan: dict[str, Any], windows: list[int], cutoffs: list[int]) -> list[dict[str, Any]]:
    """A row for each cell, compared with the solver without the part."""
    plain = judge.row(plan)
    return [
        compared(judge.row(shifted(plan, window, cutoff)), plain) | {"window": window, "cutoff": cutoff}
        for window in windows
        for cutoff in cutoffs
    ]


def reported(judge: Judge, plan: dict[str, Any], cell: dict[str, Any], data_variance: float) -> dict[str, Any]:
    """The solver without the part, with its best cell, and with that and the data's variance."""
    plain = judge.row(plan)
    window, cutoff = cell["window"], cell["cutoff"]
    known = {"criterion": "data-variance", "data_variance": data_variance}
    return {
        "plain": compared(plain),
        "residual": compared(judge.row(shifted(plan, window, cutoff)), plain),
        "data-variance": compared(judge.row(shifted(plan, window, cutoff, **known)), plain),
    }


def main() -> None:
    """Writes ``--out`` after each search and each report, beside what it has of other solvers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipe", default="demo:fashion-unet")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--solvers", type=Path, required=True, help="result of fewstep.scripts.bench.solvers")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=1280)
    parser.add_argument("--search_n", type=int, default=256)
    parser.add_argument("--names", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--windows", nargs="+", type=int, default=list(WINDOWS))
    parser.add_argument("--cutoffs", nargs="+", type=int, default=list(CUTOFFS))
    parser.add_argument("--data_variance", type=float, default=0.4035, help="of the values of one image")
    options = parser.parse_args()
    torch.set_num_threads(1)
    screen = Judge(options.pipe, options.work, options.search_n, SCREEN_SEED)
    search = Judge(options.pipe, options.work, options.search_n, SEARCH_SEED)
    judge = Judge(options.pipe, options.work, options.n, 0)
    table: dict[str, Any] = read_json(options.out)["solvers"] if options.out.is_file() else {}
    result = {key: getattr(options, key) for key in ("pipe", "n", "search_n", "data_variance")}
    result |= {"search_seed": SEARCH_SEED, "solvers": table}
    for name in options.names:
        spacing, plan = base_plan(name, EVALUATIONS, screen, options.solvers)
        cells = searched(search, plan, options.windows, options.cutoffs)
        _, cell = best((name, cell) for cell in cells)
        table[name] = {"spacing": spacing, "cells": cells, "best": {key: cell[key] for key in ("window", "cutoff")}}
        write_json(options.out, result)
        table[name]["rows"] = reported(judge, plan, cell, options.data_variance)
        print(name, table[name]["best"], cell["difference"], flush=True)  # noqa: T201
        write_json(options.out, result)


if __name__ == "__main__":
    main()
