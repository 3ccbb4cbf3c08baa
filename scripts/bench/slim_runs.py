"""A slim copy of a bench of token models, for docs/results: what its runs scored and cost, without their settings.

``python -m fewstep.scripts.bench.slim_runs OUT docs/results/tokens-bench.json``
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fewstep.eval.record import read_run
from fewstep.samplers.errors import InputError
from fewstep.samplers.files import write_json

SLIM = "tokens-bench.json"
COSTS = ("network", "exact", "token_forwards", "tokens_per_forward", "tokens_per_s", "kv_bytes", "failed")
"Of a run's decoding."
ROLES = ("reference", "baseline", "plan", "control")


def slim(out: Path) -> dict[str, Any]:
    """What a bench measured.

    Args:
        out: its folder.

    Raises:
        InputError: when it holds no runs, or runs of images.
    """
    runs = [read_run(path) for path in sorted((out / "runs").glob("*.json"))]
    if not runs or not all(run.get("decoding") for run in runs):
        raise InputError(f"{out} holds no runs of token models; give the --out of a fewstep bench on such models")
    runs.sort(key=lambda run: (ROLES.index(run["role"]), run["nfe"]))
    first = runs[0]
    about = {name: first["decoding"][name] for name in ("gen_length", "batch_size", "device", "torch_threads")}
    return {"n": first["n"], "seeds": first["seeds"], "command": first["command"], **about} | {
        "rows": [_row(run) for run in runs]
    }


def _row(run: dict[str, Any]) -> dict[str, Any]:
    costs = {name: run["decoding"][name] for name in COSTS}
    metrics = {name: [metric["value"], metric["se"]] for name, metric in run["metrics"].items()}
    return {name: run[name] for name in ("name", "role", "control", "nfe")} | costs | {"metrics": metrics}


def main() -> None:
    """Writes the copy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="folder of the bench")
    parser.add_argument("out", type=Path, help="file to write")
    options = parser.parse_args()
    write_json(options.out, slim(options.runs))


if __name__ == "__main__":
    main()
