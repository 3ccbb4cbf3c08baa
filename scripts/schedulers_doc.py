"""Makes docs/schedulers.md: which grid rule runs on which scheduler of diffusers, tried one by one."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import diffusers
from diffusers.utils import dummy_torch_and_torchsde_objects

from ..samplers.errors import InputError
from ..samplers.explicit import explicit_support, grid_adapter
from ..samplers.part import Run
from ..samplers.rule_grid import RuleGrid
from ..samplers.rules import RULES, Rule
from ..samplers.wrapped import wrap_scheduler

STEPS = 10
HEAD = f"""# Schedulers and grid rules

Made by `python -m fewstep.scripts.tables`. Every mark is a scheduler that was built, given the grid of a rule with
{STEPS} steps, and found to have exactly those timesteps (a scheduler that evaluates more than once per step has points
of its own between). A number is the note below the table that says why it refuses. The network predicts v where the
scheduler can be told so, since zero terminal SNR leaves epsilon undefined; all else is the scheduler's default.
"""
RULES_HEAD = """## Rules

As in a plan: `"grid": {"type": "rule", "rule": "karras", "steps": 8, "options": {"rho": 5}}`.

* **Ends.** A grid runs from the process's noisiest time to its cleanest, or from `first` to `last`. Flow matching has
  no noise left at time 0, so it ends where diffusers' flow schedulers end. Infinite log-SNR counts as that of
  alpha^2 = 2^-24, which is what diffusers puts at the end of a zero-terminal-SNR table.
* **Whole timesteps.** Where the scheduler has a table of timesteps, diffusers' spacings, `quadratic`, `power` and
  `align-your-steps` round (`linspace` on Euler's family does not, as in diffusers); the others give fractions. `round`
  decides otherwise. A grid that would have a timestep twice is refused, with the number of steps that fit.
* **Flow matching.** `leading`, `linspace`, `trailing`, `power` and `quadratic` space time before the shift and then
  shift it, as the scheduler does by itself; where the pipeline computes the shift from the resolution (mu), give
  `shift` (exp(mu)). The other rules place shifted times themselves, on sigma (`karras`, `exponential`, `beta`, as
  diffusers) or on SNR (`logsnr-uniform`, `align-your-steps`). No shift comes on top of the list.
* **EDM.** The rules that space time space the scheduler's own parameter, so that `linspace` is its own grid.
"""


@dataclass(frozen=True)
class Row:
    """One row of the matrix: a scheduler with the options that it was built with."""

    name: str
    options: dict[str, Any]

    @property
    def title(self) -> str:
        """What the row is called."""
        flow = "use_flow_sigmas" in self.options
        return f"`{self.name}`" + (", `use_flow_sigmas`" if flow else "")

    @cached_property
    def scheduler(self) -> Any:
        """The scheduler, to copy."""
        return getattr(diffusers, self.name)(**self.options)


def rows() -> list[Row]:
    """A row for every scheduler that runs an explicit grid, and one more where it has flow sigmas."""
    found = []
    for name in (support.scheduler for support in explicit_support() if support.runs and not _needs_torchsde(support)):
        known = inspect.signature(getattr(diffusers, name).__init__).parameters
        edm = "sigma_data" in known
        found.append(Row(name, {"prediction_type": "v_prediction"} if "prediction_type" in known and not edm else {}))
        if "use_flow_sigmas" in known:
            found.append(Row(name, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}))
    return found


def refusal(row: Row, rule: str) -> str | None:
    """Why ``rule`` does not run on the scheduler of ``row``, or None when it does."""
    try:
        run = Run(None, copy.deepcopy(row.scheduler))
        RuleGrid(rule=rule, steps=STEPS).prepare(run, frozenset({"num_inference_steps"}))
        listed = run.timesteps or ()
        wrap_scheduler(run.scheduler, grid_adapter(run.scheduler, listed))
        run.scheduler.set_timesteps(STEPS)
    except InputError as error:
        return str(error).replace(row.name, "this scheduler")
    return None if _has(run.scheduler.timesteps.tolist(), listed) else "its timesteps are not those of the rule"


def _has(told: list[float], listed: tuple[float, ...]) -> bool:
    """Whether ``listed`` is in ``told`` in order, to the precision of float32."""
    rest = iter(told)
    return all(any(abs(time - want) <= 1e-6 * max(1.0, abs(want)) for time in rest) for want in listed)


def _needs_torchsde(support: Any) -> bool:
    """Whether diffusers has this scheduler only where torchsde is installed."""
    return hasattr(dummy_torch_and_torchsde_objects, support.scheduler)


def document() -> str:
    """The text of docs/schedulers.md."""
    notes: dict[str, int] = {}
    names = RULES.names()
    lines = ["| scheduler | " + " | ".join(f"`{name}`" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in rows():
        reasons = (refusal(row, name) for name in names)
        marks = ["✓" if why is None else str(notes.setdefault(why, len(notes) + 1)) for why in reasons]
        lines.append(f"| {row.title} | " + " | ".join(marks) + " |")
    matrix = "\n".join(lines)
    listed = "\n".join(f"{number}. {note}" for note, number in notes.items())
    parts = [HEAD, matrix, listed, _solvers(), _without_grid(), _rules()]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _solvers() -> str:
    lines = ["## Notes on schedulers", "", "| scheduler | order | |", "|---|---|---|"]
    for support in explicit_support():
        if support.runs:
            untried = "; not in the matrix" if _needs_torchsde(support) else ""
            order = "–" if support.order is None else support.order
            lines.append(f"| `{support.scheduler}` | {order} | {support.note}{untried} |")
    return "\n".join(lines)


def _without_grid() -> str:
    lines = ["## Schedulers without an explicit grid", "", "No rule runs on these; a `spacing` grid may.", ""]
    lines += [f"* `{support.scheduler}`: {support.reason}" for support in explicit_support() if not support.runs]
    return "\n".join(lines)


def _rules() -> str:
    lines = [RULES_HEAD]
    for name in RULES.names():
        own = (f"`{option}`{_default(field.default)}" for option, field in _own_first(RULES[name]).items())
        lines.append(f"* `{name}`: {_summary(RULES[name])} Options: {', '.join(own)}.")
    lines += ["", "Options:", ""]
    lines += [f"* `{option}`: {text}" for option, text in sorted(_meanings().items())]
    return "\n".join(lines)


def _summary(rule: type[Rule]) -> str:
    return (rule.__doc__ or "").strip().split("\n")[0].replace("``", "`")


def _own_first(rule: type[Rule]) -> dict[str, Any]:
    """Fields of a rule, its own before those of all rules."""
    return dict(sorted(rule.model_fields.items(), key=lambda item: item[0] in Rule.model_fields))


def _default(value: Any) -> str:
    return "" if value is None else f" ({value})"


def _meanings() -> dict[str, str]:
    every = [(option, field) for name in RULES.names() for option, field in RULES[name].model_fields.items()]
    return {option: field.description or "" for option, field in every}
