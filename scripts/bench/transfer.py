"""How a plan that was searched for one setting does in others: other guidance scales, and other numbers of steps.

``python -m fewstep.scripts.bench.transfer --pipe demo:fashion-dit --plan plan.json --against plain.json --work DIR``

``--against`` is diffusers' best scheduler in as many steps; it is changed in the same way. In other numbers of steps
the log-SNR of the plan's times is interpolated over their places in the list.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.eval.assets import load_pipeline
from fewstep.samplers import ConstantGuidance, ExplicitGrid, GuidanceSchedule, InputError, Part, Plan, SpacingGrid
from fewstep.samplers.files import write_json
from fewstep.search.axes.steps import prepared, timesteps_of

from .judge import Judge, compared

FRESH_SEED = 5_000_000
SCALES = (1.0, 1.25, 2.0, 3.0)
STEPS = (4, 5, 6, 8, 10, 15, 20)


def with_scale(plan: Plan, scale: float) -> Plan:
    """The plan as if its pipeline guided by another scale; what it guides more or less by step keeps its proportion.

    Raises:
        InputError: when the plan does not guide.
    """
    part = plan.guidance
    changed: Part
    if isinstance(part, ConstantGuidance):
        changed = part.model_copy(update={"scale": scale})
    elif isinstance(part, GuidanceSchedule):
        listed = part.scale if isinstance(part.scale, tuple) else (part.scale,)
        ratio = (scale - 1) / (sum(listed) / len(listed) - 1)
        moved = tuple(1 + (each - 1) * ratio for each in listed)
        changed = (
            ConstantGuidance(scale=1.0)
            if max(moved) <= 1
            else part.model_copy(update={"scale": moved if isinstance(part.scale, tuple) else moved[0]})
        )
    else:
        raise InputError(f"{plan.name or 'the plan'} has no guidance to change")
    return plan.model_copy(update={"guidance": changed})


def with_steps(pipe: Any, plan: Plan, steps: int) -> Plan:
    """The plan in another number of steps.

    Raises:
        InputError: when its times are not known before it runs.
    """
    if isinstance(plan.grid, SpacingGrid):
        return plan.model_copy(update={"grid": plan.grid.model_copy(update={"steps": steps})})
    process = prepared(pipe, plan).process
    times = timesteps_of("grid", pipe, plan)
    levels = _resampled([float(process.log_snr(time)) for time in times], steps)
    grid = ExplicitGrid(timesteps=tuple(round(float(process.time_of_log_snr(level)), 3) for level in levels))
    part = plan.guidance
    if isinstance(part, GuidanceSchedule) and isinstance(part.scale, tuple):
        part = part.model_copy(update={"scale": tuple(_resampled(part.scale, steps))})
    return plan.model_copy(update={"grid": grid, "guidance": part})


def _resampled(values: Sequence[float], count: int) -> list[float]:
    places = np.linspace(0, len(values) - 1, count) if count > 1 else np.zeros(1)
    found: list[float] = np.interp(places, np.arange(len(values)), values).tolist()
    return found


def main() -> None:
    """Writes ``--out`` after each setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipe", default="demo:fashion-dit")
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--against", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=2560)
    parser.add_argument("--scales", type=float, nargs="*", default=list(SCALES))
    parser.add_argument("--steps", type=int, nargs="*", default=list(STEPS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    judge = Judge(options.pipe, options.work, options.n, FRESH_SEED)
    pipe = load_pipeline(options.pipe)
    plans = [Plan.load(options.plan), Plan.load(options.against)]
    settings = {f"guidance {scale:g}": [with_scale(plan, scale) for plan in plans] for scale in options.scales}
    settings |= {f"{steps} steps": [with_steps(pipe, plan, steps) for plan in plans] for steps in options.steps}
    result: dict[str, Any] = {"pipe": options.pipe, "n": options.n, "seed": FRESH_SEED, "settings": {}}
    for name, pair in settings.items():
        ours, theirs = (judge.row(changed) for changed in pair)
        result["settings"][name] = {"plan": compared(ours, theirs), "against": compared(theirs)}
        write_json(options.out, result)


if __name__ == "__main__":
    main()
