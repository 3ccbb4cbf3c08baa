"""The models as an axis: at which step the second network takes over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optuna.trial import BaseTrial

from ...samplers import InputError, ModelSwitch, Plan
from ..space import AXES
from .steps import steps_of, timesteps_of


@dataclass(frozen=True)
class ModelsAxis:
    """The step in which the second of two networks takes over: the parameter ``models.step``.

    0 runs the second one alone, the number of steps the first one alone.

    Attributes:
        pipe: the pipeline.
        part: a switch between two networks, whose step is replaced.
        steps: of the plan, at least 1.
        name: of the axis.
    """

    pipe: Any
    part: ModelSwitch
    steps: int
    name: str = "models"

    def __post_init__(self) -> None:
        if len(self.part.networks) != 2:
            raise InputError(
                f"the {self.name} axis switches between two networks; the model-switch part names "
                f"{', '.join(self.part.networks)}"
            )

    @classmethod
    def of(cls, pipe: Any, base: Plan) -> ModelsAxis:
        """The axis of a plan's two networks.

        Raises:
            InputError: when the plan has no switch between two networks, or no grid.
        """
        if not isinstance(base.models, ModelSwitch):
            raise InputError(
                "the models axis moves the step at which networks change; give the plan a model-switch part"
            )
        return cls(pipe, base.models, steps_of("models", base))

    def suggest(self, trial: BaseTrial, plan: Plan) -> Plan:
        """The plan with the switch at the step that the trial suggests."""
        return plan.model_copy(update={"models": self._at(trial.suggest_int(f"{self.name}.step", 0, self.steps))})

    def params(self, plan: Plan) -> dict[str, Any]:
        """The step at which a plan's networks change, also where it says a time.

        Raises:
            InputError: when the networks are others, or none.
        """
        part = plan.models
        if not isinstance(part, ModelSwitch) or _switched(part) != _switched(self.part):
            raise InputError(f"the plan's models are not the networks of the {self.name} axis: {self.part.networks}")
        if part.steps:
            return {f"{self.name}.step": min(part.steps[0], self.steps)}
        times = timesteps_of(self.name, self.pipe, plan)
        return {f"{self.name}.step": sum(time > part.times[0] for time in times)}

    def _at(self, step: int) -> ModelSwitch:
        return self.part.model_copy(update={"steps": (step,), "times": ()})


def _switched(part: ModelSwitch) -> dict[str, Any]:
    """A switch without its border."""
    return part.model_dump(exclude={"steps", "times"})


AXES.register("models")(ModelsAxis.of)
