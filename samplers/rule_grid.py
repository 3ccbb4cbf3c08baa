"""The grid by rule: a name, a number of steps and the rule's options."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationError, model_validator

from . import level_rules  # noqa: F401  registers them
from .errors import unknown_name
from .grid import GRIDS
from .part import Part, Run
from .process import Process
from .recognise import own_option
from .rules import RULES, Rule


@GRIDS.register("rule")
class RuleGrid(Part):
    """A list of timesteps made by a rule, for every scheduler that runs an explicit grid.

    Rules that space time, on flow matching, space it before the shift and then shift, as diffusers does; a scheduler
    whose shift depends on the resolution needs the option ``shift`` (exp(mu) of the pipeline). The other rules
    place shifted times. What runs is the list: no shift comes on top.
    """

    type: Literal["rule"] = "rule"
    rule: str = Field(description="Name of the rule, such as karras.")
    steps: int = Field(ge=1, description="Number of steps.")
    options: dict[str, bool | int | float | str | None] = Field(
        default_factory=dict, description="Options of the rule that differ from its defaults."
    )

    @model_validator(mode="after")
    def _known(self) -> RuleGrid:
        cls = RULES[self.rule]
        for option in self.options:
            if option not in cls.model_fields:
                raise unknown_name(f"option of rule {self.rule!r}", option, cls.model_fields)
        try:
            cls.model_validate(self.options)
        except ValidationError as error:
            problem = error.errors()[0]
            place = f"option {problem['loc'][0]!r} of rule {self.rule!r}"
            raise ValueError(f"{place}: {problem['msg']}; got {problem['input']!r}") from None
        return self

    @property
    def nominal_steps(self) -> int:
        """Number of grid points."""
        return self.steps

    def prepare(self, run: Run, known_arguments: frozenset[str]) -> None:
        """Makes the list from the run's scheduler, and hands it to the run and its length to the call.

        Raises:
            InputError: when the rule makes no grid on this scheduler, or the pipeline takes no number of steps.
        """
        run.set_argument("grid", "num_inference_steps", self.steps, known_arguments)
        rule: Rule = RULES[self.rule].model_validate(self.options)
        run.scheduler = rule.prepared(run.scheduler)
        process = Process.from_scheduler(run.scheduler)
        run.timesteps = rule.suited(run.scheduler, process).times(process, self.steps)
        if own_option(run.scheduler, "shift_terminal"):
            run.warnings.append("the scheduler's shift_terminal does not act on a grid by rule; set 'last' if needed")
