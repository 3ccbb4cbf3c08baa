"""The grid as a choice among the train steps, as AutoDiffusion has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optuna.trial import BaseTrial

from ...samplers import ExplicitGrid, InputError, Plan
from ...samplers.hook_tools import train_steps
from ..space import AXES
from .steps import distinct, prepared, steps_of, timesteps_of


@dataclass(frozen=True)
class GridIndexAxis:
    """A set of distinct train steps (arXiv:2309.10438, Section 3.2), each a parameter ``grid-index.i``.

    The parameters are whole numbers from 0 to T - 1 in any order: the plan sorts them, and those that coincide move
    down to the next free one. Variance preserving time is the number itself, flow matching's, which has no network
    evaluation at 0, one more.

    Attributes:
        pipe: the pipeline that runs the grids.
        steps: size of the set, at least 1.
        train_steps: T.
        cleanest: time of number 0.
        name: of the axis.
    """

    pipe: Any
    steps: int
    train_steps: int
    cleanest: int = 0
    name: str = "grid-index"

    @classmethod
    def of(cls, pipe: Any, base: Plan) -> GridIndexAxis:
        """The axis of a plan's number of steps.

        Raises:
            InputError: when the plan has no grid or more steps than there are train steps, its solver runs no explicit
                grid, or the process has no train steps.
        """
        steps = steps_of("grid-index", base)
        run = prepared(pipe, base)
        noisiest = int(train_steps("grid-index", run.process).noisiest)
        total = int(run.scheduler.config.num_train_timesteps)
        if steps > total:
            raise InputError(f"{steps} distinct steps of {total} train steps are too many; give the plan fewer")
        axis = cls(pipe, steps, total, noisiest - total + 1)
        prepared(pipe, base.model_copy(update={"grid": axis._grid(range(steps))}))
        return axis

    def suggest(self, trial: BaseTrial, plan: Plan) -> Plan:
        """The plan with the grid that the trial suggests."""
        chosen = [trial.suggest_int(name, 0, self.train_steps - 1) for name in self.names]
        return plan.model_copy(update={"grid": self._grid(chosen)})

    def params(self, plan: Plan) -> dict[str, Any]:
        """The numbers of the train steps nearest to a plan's grid, noisiest first.

        Raises:
            InputError: when it has another number of steps.
        """
        times = timesteps_of(self.name, self.pipe, plan)
        if len(times) != self.steps:
            raise InputError(f"the plan has {len(times)} steps and the {self.name} axis {self.steps}; give it as many")
        numbers = distinct((round(time) - self.cleanest for time in times), 0, self.train_steps - 1)
        return dict(zip(self.names, numbers, strict=True))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple(f"{self.name}.{index}" for index in range(self.steps))

    def _grid(self, numbers: Any) -> ExplicitGrid:
        positions = distinct(numbers, 0, self.train_steps - 1)
        return ExplicitGrid(timesteps=tuple(float(position + self.cleanest) for position in positions))


AXES.register("grid-index")(GridIndexAxis.of)
