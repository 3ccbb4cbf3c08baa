"""Ships a plan for a demo, with the evidence that it beats another one on seeds that neither was chosen on.

``python -m fewstep.scripts.demo.ship_plan --pipe demo:fashion-dit --plan plan.json --against plain.json --work DIR``
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from fewstep.eval.assets import load_pipeline, plan_folder
from fewstep.samplers import Evidence, InputError, Plan, TunedFor, denoisers, fingerprint
from fewstep.samplers.files import atomic_path
from fewstep.scripts.bench.judge import Judge, fd_difference

FRESH_SEED = 4_000_000


def evidence_of(row: dict[str, Any], base: dict[str, Any], against: str, command: str) -> tuple[Evidence, Evidence]:
    """The distance of a plan, and that less the distance of another one on the same seeds.

    Args:
        row: of the plan, by `Judge.row`.
        base: of the other one.
        against: what the other one is called.
        command: what measured both.

    Raises:
        InputError: when the difference is not beyond two standard errors.
    """
    value, se = fd_difference(row, base)
    if value > -2 * se:
        raise InputError(f"the plan is not better than {against} by two standard errors: {value:.3f} ± {se:.3f}")
    seeds = (row["seed"], row["seed"] + row["n"])
    shared: dict[str, Any] = {"n": row["n"], "seeds": seeds, "command": command}
    own = row["metrics"]["fd"]
    return (
        Evidence(metric="fd_fashion", value=round(own["value"], 3), se=round(own["se"], 3), **shared),
        Evidence(metric="fd_fashion difference", value=round(value, 3), se=round(se, 3), against=against, **shared),
    )


def main() -> None:
    """Writes the plan, and the files that it names, into the folder of those that ship."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipe", required=True, help="a demo, such as demo:fashion-dit")
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--against", type=Path, required=True, help="plan that it is compared with")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--n", type=int, default=2560)
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan, against = Plan.load(options.plan), Plan.load(options.against)
    name, other = plan.name or options.plan.stem, against.name or options.against.stem
    judge = Judge(options.pipe, options.work, options.n, FRESH_SEED)
    command = (
        f"python -m {__spec__.name} --pipe {options.pipe} --plan {name}.json --against {other}.json --n {options.n}"
    )
    evidence = evidence_of(judge.row(options.plan), judge.row(options.against), other, command)
    pipe, folder = load_pipeline(options.pipe), plan_folder(options.pipe)
    if folder is None:
        raise InputError(f"plans ship for demos; got --pipe {options.pipe}")
    tuned_for = TunedFor(
        fingerprint=fingerprint(next(iter(denoisers(pipe).values()))),
        pipeline=type(pipe).__name__,
        steps=plan.nominal_steps,
    )
    shipped = plan.model_copy(update={"name": name, "tuned_for": tuned_for, "evidence": evidence})
    for file in (file for part in plan.parts for file in part.files):
        with atomic_path(folder / file) as path:
            shutil.copyfile(options.plan.with_name(file), path)
    shipped.save(folder / f"{name}.json")
    sys.stdout.write(f"{folder / name}.json {evidence[0].value} {evidence[1].value} ± {evidence[1].se}\n")


if __name__ == "__main__":
    main()
