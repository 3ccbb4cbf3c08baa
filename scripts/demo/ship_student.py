"""Ships a student of a demo beside the plans: its weights in half precision, and its plans with measured evidence.

``python -m fewstep.scripts.demo.ship_student --pipe demo:fashion-dit --student DIR --name reflow --work DIR``

Each plan is called ``NAME-N-step``; they share the weights. The evidence is measured on what ships, on seeds on which
nobody was trained or chosen, beside the demo's reference.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fewstep.distill.export import write_network
from fewstep.eval.assets import load_pipeline, plan_folder, reference_plan
from fewstep.samplers import Evidence, InputError, Plan, StudentWeights, attach
from fewstep.scripts.bench.excess import FRESH_SEED
from fewstep.scripts.bench.judge import Judge, fd_difference

TEACHER_STEPS = 50


def with_half_weights(spec: str, plans: Sequence[Plan], folder: Path, name: str) -> list[Plan]:
    """Writes the student of some plans in half precision to a folder, and gives the plans that name it.

    Args:
        spec: the demo.
        plans: of one student, loaded from their files.
        folder: of the plans that ship.
        name: of the student's own folder there.

    Raises:
        InputError: when the plans do not have the weights of one student.
    """
    parts = {part for plan in plans for part in plan.weights}
    (part,) = parts if len(parts) == 1 else (None,)
    if not isinstance(part, StudentWeights) or part.component is None:
        raise InputError("the plans do not have the weights of one student; ship an adapter's files as they are")
    pipe: Any = load_pipeline(spec)
    with attach(pipe, plans[0]):
        write_network(getattr(pipe, part.component), folder / name, torch.float16)
    weights = [part.model_copy(update={"folder": name}).model_dump()]
    return [
        Plan.from_json(plan.to_json() | {"name": f"{name}-{plan.nominal_steps}-step", "weights": weights})
        for plan in plans
    ]


def main() -> None:
    """Writes the weights and the plans."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipe", required=True, help="a demo, such as demo:fashion-dit")
    parser.add_argument("--student", type=Path, required=True, help="what fewstep distill wrote")
    parser.add_argument("--plans", nargs="+", default=["plan.json"], help="which of its plans")
    parser.add_argument("--name", required=True, help="of the folder of its weights, and with the steps of each plan")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--n", type=int, default=1280)
    parser.add_argument("--seed", type=int, default=FRESH_SEED, help="first; others than those it was chosen on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = plan_folder(options.pipe)
    if folder is None:
        raise InputError(f"plans ship for demos; got --pipe {options.pipe}")
    found = [Plan.load(options.student / file) for file in options.plans]
    judge = Judge(options.pipe, options.work, options.n, options.seed)
    base = judge.row(reference_plan(options.pipe, TEACHER_STEPS))
    common = {
        "n": options.n,
        "seeds": (options.seed, options.seed + options.n),
        "command": shlex.join(["python", "-m", "fewstep.scripts.demo.ship_student", *sys.argv[1:]]),
    }
    for plan in with_half_weights(options.pipe, found, folder, options.name):
        path = folder / f"{plan.name}.json"
        plan.save(path)
        row = judge.row(path)
        value, se = fd_difference(row, base)
        own = row["metrics"]["fd"]
        evidence = (
            Evidence(metric="fd_fashion", value=own["value"], se=own["se"], **common),
            Evidence(metric="fd_fashion difference", value=value, se=se, against="reference-50", **common),
        )
        plan.model_copy(update={"evidence": evidence}).save(path)
        sys.stdout.write(f"{path} {own['value']:.2f} +- {own['se']:.2f}, {value:+.2f} +- {se:.2f}\n")


if __name__ == "__main__":
    main()
