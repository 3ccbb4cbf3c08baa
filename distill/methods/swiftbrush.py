"""Variational score distillation of one-step students."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from ...samplers.process import Process
from ..conditions import Condition
from ..method import METHODS, Moment
from ..sources import Batch
from ..team import Team, noise_like
from ..terms import VSD, Regression
from ..times import UniformTimes, uniform
from .one_step import OneStep


@METHODS.register("swiftbrush")
class SwiftBrush(OneStep):
    """SwiftBrush (arXiv:2312.05239): variational score distillation without data, the fake an adapter of rank 64.

    As in the released code the fake has the teacher's guidance too, for which it is told nothing in a tenth of its
    samples, and its loss is weighted by alpha. With guidance on both sides the gap vanishes where the student's law is
    the teacher's without guidance; ``guided_fake`` off makes it the guided one.
    """

    type: Literal["swiftbrush"] = "swiftbrush"
    fake_rank: int | None = Field(
        default=64, ge=0, description="Rank of the fake's adapter; 0 trains a copy, none holds it as the student."
    )
    fake_rate: float = Field(
        default=10.0, gt=0, description="Learning rate of the fake as a multiple of the student's; the paper has 1000."
    )
    guided_fake: bool = Field(default=True, description="Guide the fake as the teacher.")
    drop_rate: float = Field(default=0.1, ge=0, lt=1, description="Share of samples that a guided fake learns untold.")

    def gap(self, batch: Batch, roles: Team, moment: Moment, made: Tensor) -> Tensor:
        """sigma^2 times the difference of the two networks' noise."""
        t = UniformTimes(0.02, 0.98)(roles.process, len(batch), moment.generators)
        scale = roles.scales(self.guidance_scale, len(batch), moment.generators)
        teacher = roles.guided("teacher", batch.condition, scale)
        fake = roles.guided("fake", batch.condition, scale if self.guided_fake else 1.0, frozen=True)
        return VSD(roles.process)(teacher, fake, made, noise_like(made, moment), t)

    def told(self, condition: Condition, moment: Moment) -> Condition:
        """The condition, left out of some samples where the fake is guided."""
        if condition.uncond is None or not self.guided_fake:
            return condition
        return condition.without(uniform(moment.generators, len(condition)) < self.drop_rate)

    def followed(self, process: Process) -> Regression:
        """The noise, weighted by alpha."""
        return Regression(process, "epsilon", weight=lambda process, t: process.alpha(t))
