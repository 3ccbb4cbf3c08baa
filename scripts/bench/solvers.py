"""Fréchet distance of every scheduler of diffusers in few evaluations, at the best of its own spacings.

``python -m fewstep.scripts.bench.solvers --pipe demo:fashion-dit --work DIR --n 2000 --out solvers.json``

For each scheduler and each budget of network evaluations the spacing is the one that did best on other seeds
(``--screen_n`` of them, at the budgets of `SCREENED`); what is stated was made with the seeds from 0 on. A scheduler
that evaluates twice a step gets the number of steps whose evaluations fit the budget, counted, not assumed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fewstep.eval.assets import reference_plan
from fewstep.samplers.errors import InputError
from fewstep.samplers.files import write_json

from .judge import Judge, best, compared, fd

BUDGETS = (4, 5, 6, 8, 10)
SCREENED = {4: 5, 5: 5, 6: 5, 8: 10, 10: 10}
"Which budget's screening decides the spacing of each budget."

SCREEN_SEED = 1_000_000
SIGMAS = {name: f"use_{name}_sigmas" for name in ("karras", "exponential", "beta")}
"Options of schedulers, by the name of the spacing that they make."


def _once(evaluations: int) -> int:
    return evaluations


def _twice(evaluations: int) -> int:
    return (evaluations + 1) // 2


@dataclass(frozen=True)
class Solver:
    """A scheduler with its options, and the spacings that it has of its own.

    Attributes:
        scheduler: class name.
        config: options besides the spacing.
        steps: the most steps that a number of evaluations allows.
        spacings: of ``timestep_spacing``.
        sigmas: whether it has Karras', exponential and beta sigmas.
    """

    scheduler: str
    config: dict[str, Any] = field(default_factory=dict)
    steps: Callable[[int], int] = _once
    spacings: tuple[str | None, ...] = ("leading", "linspace", "trailing")
    sigmas: bool = False

    def plans(self, budget: int, guidance: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
        """A plan for each of its spacings, by name."""
        rules: dict[str, tuple[str | None, dict[str, Any]]] = {str(name): (name, {}) for name in self.spacings}
        if self.sigmas:
            rules |= {name: (self.spacings[0], {option: True}) for name, option in SIGMAS.items()}
        plans = {}
        for name, (spacing, options) in rules.items():
            grid = {"type": "spacing", "steps": self.steps(budget)} | ({"spacing": spacing} if spacing else {})
            solver = {"type": "diffusers", "scheduler": self.scheduler, "config": self.config | options}
            plans[name] = {"solver": solver, "grid": grid} | ({"guidance": guidance} if guidance else {})
        return plans


SOLVERS = {
    "ddim": Solver("DDIMScheduler"),
    "ddpm": Solver("DDPMScheduler"),
    "pndm-s": Solver("PNDMScheduler", {"skip_prk_steps": True}, lambda nfe: nfe - 1),
    "deis": Solver("DEISMultistepScheduler", sigmas=True),
    "euler": Solver("EulerDiscreteScheduler", sigmas=True),
    "euler-ancestral": Solver("EulerAncestralDiscreteScheduler"),
    "heun": Solver("HeunDiscreteScheduler", {}, _twice, sigmas=True),
    "kdpm2": Solver("KDPM2DiscreteScheduler", {}, _twice, sigmas=True),
    "kdpm2-ancestral": Solver("KDPM2AncestralDiscreteScheduler", {}, _twice, sigmas=True),
    "lms": Solver("LMSDiscreteScheduler", sigmas=True),
    "dpmpp-2m": Solver("DPMSolverMultistepScheduler", sigmas=True),
    "dpmpp-2m-sde": Solver("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, sigmas=True),
    "dpmpp-2s": Solver("DPMSolverSinglestepScheduler", spacings=(None,), sigmas=True),
    "dpmpp-sde": Solver("DPMSolverSDEScheduler", {}, _twice, sigmas=True),
    "unipc": Solver("UniPCMultistepScheduler", sigmas=True),
    "sa-solver": Solver("SASolverScheduler", sigmas=True),
    "lcm": Solver("LCMScheduler"),
    "tcd": Solver("TCDScheduler"),
}
"""The schedulers of networks that predict noise on a table of alphas.

Not here: the parallel and CogVideoX forms of DDIM and DDPM (the same numbers), PNDM's four Runge-Kutta evaluations a
step (13 at the least), and those for other processes (EDM, flow matching, IPNDM's time, tokens).
"""


def choose(judge: Judge, solver: Solver, budget: int, guidance: dict[str, Any] | None) -> dict[str, Any]:
    """The spacing that does best for a budget on the judge's seeds: its name, and all values."""
    rows, refused = [], {}
    for name, plan in solver.plans(budget, guidance).items():
        try:
            rows.append((name, judge.row(plan)))
        except (InputError, ValueError, IndexError) as error:
            refused[name] = f"{type(error).__name__}: {error}"
    if not rows:
        return {"refused": refused}
    return {"spacing": best(rows)[0], "fd": {name: fd(row) for name, row in rows}, "refused": refused}


def guidance_of(pipe: str) -> dict[str, Any] | None:
    """The guidance that a demo is sampled with."""
    return reference_plan(pipe, 50).to_json().get("guidance")


def main() -> None:
    """Writes ``--out`` after each scheduler."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipe", default="demo:fashion-dit")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--screen_n", type=int, default=512)
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS), choices=list(SOLVERS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    screen = Judge(options.pipe, options.work, options.screen_n, SCREEN_SEED)
    judge = Judge(options.pipe, options.work, options.n, 0)
    guidance = guidance_of(options.pipe)
    table: dict[str, Any] = {}
    for name in options.solvers:
        solver = SOLVERS[name]
        chosen = {budget: choose(screen, solver, budget, guidance) for budget in sorted(set(SCREENED.values()))}
        rows = {}
        for budget in BUDGETS:
            spacing = chosen[SCREENED[budget]].get("spacing")
            plan = spacing and solver.plans(budget, guidance)[spacing]
            rows[budget] = compared(judge.row(plan)) | {"spacing": spacing} if plan else None
        table[name] = {"screened": chosen, "rows": rows}
        print(name, {b: r and f"{r['spacing']} {r['nfe']:g}: {fd(r):.2f}" for b, r in rows.items()}, flush=True)  # noqa: T201
        write_json(options.out, {"pipe": options.pipe, "n": options.n, "screen_n": options.screen_n, "solvers": table})


if __name__ == "__main__":
    main()
