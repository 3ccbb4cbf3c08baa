"""How far few-step plans stay behind the teacher itself, as a share of how far diffusers' best scheduler does.

``python -m fewstep.scripts.bench.excess --pipe demo:fashion-dit --solvers solvers.json --work DIR --out excess.json``

The excess of a sampler is its Fréchet distance less the teacher's converged one: that of the best of its schedulers
at 100 steps. For each number of steps the baseline is the best of diffusers' schedulers, each at its best built-in
spacing, among the ``--top`` best of the file of ``scripts.bench.solvers``. Distances are to Fashion-MNIST's 10,000 test
images, on seeds that nothing was chosen on; precision and recall to training images. What ``--out`` has of the same
pipeline, number of images and seed is kept, and budgets and schedulers are added to it.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from fewstep.eval.assets import DEMO, plan_folder
from fewstep.samplers.errors import InputError
from fewstep.samplers.files import read_json, write_json

from .judge import Judge, best, compared, fd
from .solvers import SOLVERS, guidance_of

FRESH_SEED = 5_000_000
CONVERGED_STEPS = 100
CONVERGED = ("ddim", "ddpm", "dpmpp-2m", "dpmpp-2m-sde", "unipc", "deis", "sa-solver")
BUDGETS = (4, 5, 6, 8, 10)


def converged_plan(pipe: str, name: str) -> dict[str, Any]:
    """A scheduler at `CONVERGED_STEPS` steps, guided as the demo is.

    Args:
        pipe: a demo.
        name: of a scheduler, for its trailing spacing, or ``scheduler:spacing``.

    Raises:
        InputError: for a name that is none.
    """
    solver, _, spacing = name.partition(":")
    plans = SOLVERS[solver].plans(CONVERGED_STEPS, guidance_of(pipe)) if solver in SOLVERS else {}
    if (spacing or "trailing") not in plans:
        known = f"its spacings are {', '.join(plans)}" if plans else f"schedulers are {', '.join(SOLVERS)}"
        raise InputError(f"--converged names schedulers, or scheduler:spacing; got {name}; {known}")
    return plans[spacing or "trailing"]


def baselines(table: dict[str, Any], budget: int, top: int) -> dict[str, dict[str, Any]]:
    """The best rows of a budget in a file of ``scripts.bench.solvers``, as plans by name."""
    rows = {name: entry["rows"].get(str(budget)) for name, entry in table["solvers"].items()}
    found = sorted((fd(row), name) for name, row in rows.items() if row)
    return {name: rows[name]["plan"] for _, name in found[:top]}


def excess_ratio(plan: dict[str, Any], base: dict[str, Any], converged: dict[str, Any]) -> dict[str, float]:
    """(plan - converged) / (base - converged) and its error to first order.

    The rows of ``plan``, which says its difference to ``base``, and ``base`` are on the same seeds; ``converged`` may
    have fewer, so its error is taken as independent of theirs.
    """
    over, under = fd(plan) - fd(converged), fd(base) - fd(converged)
    ratio = over / under
    difference = plan["difference"][1]
    base_se, converged_se = base["metrics"]["fd"]["se"], converged["metrics"]["fd"]["se"]
    se = math.hypot(difference, (1 - ratio) * base_se, (1 - ratio) * converged_se) / abs(under)
    return {"excess": over, "baseline_excess": under, "ratio": ratio, "se": se}


def earlier(out: Path, said: dict[str, Any]) -> dict[str, Any]:
    """What a file of results has, nothing where there is none.

    Raises:
        InputError: when it was made with other settings.
    """
    if not out.is_file():
        return {}
    found = dict(read_json(out))
    other = {key: found.get(key) for key in said if found.get(key) != said[key]}
    if other:
        raise InputError(f"{out} has results of other settings ({other}); give another --out, or these settings")
    return found


def save(out: Path, result: dict[str, Any]) -> None:
    """Writes the results, with the shares of the excess over the best converged row."""
    converged = result["converged"]
    converged["best"], least = best(converged["rows"].items())
    result["budgets"] = dict(sorted(result["budgets"].items(), key=lambda item: int(item[0])))
    for entry in result["budgets"].values():
        if "plan" in entry:
            entry["goal"] = excess_ratio(entry["plan"], entry["baselines"][entry["baseline"]], least)
    write_json(out, result)


def main() -> None:
    """Writes ``--out`` after each number of steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipe", default="demo:fashion-dit")
    parser.add_argument("--solvers", type=Path, required=True, help="written by scripts.bench.solvers")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--converged", nargs="*", default=list(CONVERGED), help="scheduler, or scheduler:spacing")
    parser.add_argument("--converged_n", type=int, default=10_000)
    parser.add_argument("--top", type=int, default=2)
    parser.add_argument("--seed", type=int, default=FRESH_SEED)
    parser.add_argument("--budgets", type=int, nargs="*", default=list(BUDGETS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = plan_folder(options.pipe)
    if folder is None:
        raise InputError(f"plans ship for demos; got --pipe {options.pipe}")
    test = DEMO / "fashion-features" / "test.safetensors"
    judge = Judge(options.pipe, options.work, options.n, options.seed, stats=test)
    others = Judge(options.pipe, options.work, options.n, options.seed)
    anchor = Judge(options.pipe, options.work, options.converged_n, options.seed, stats=test)
    said = {"pipe": options.pipe, "n": options.n, "seed": options.seed}
    result = earlier(options.out, said) or said | {"converged": {"rows": {}}, "budgets": {}}
    if not (options.converged or result["converged"]["rows"]):
        raise InputError(f"--converged is empty, and {options.out} has no converged rows; name a scheduler")
    for name in options.converged:
        result["converged"]["rows"][name] = compared(anchor.row(converged_plan(options.pipe, name)))
        save(options.out, result)
    table = read_json(options.solvers)
    for budget in options.budgets:
        file = folder / f"{budget}-step.json"
        rivals = {rival: judge.row(plan) for rival, plan in baselines(table, budget, options.top).items()}
        rival, base = best(rivals.items())
        entry: dict[str, Any] = {"baseline": rival, "baselines": {key: compared(row) for key, row in rivals.items()}}
        entry["baseline_others"] = others.row(base["plan"])["metrics"]
        if file.is_file():
            entry |= {"plan": compared(judge.row(file), base), "plan_others": others.row(file)["metrics"]}
        result["budgets"][str(budget)] = entry
        save(options.out, result)


if __name__ == "__main__":
    main()
