"""Score implicit matching of one-step students."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from ..method import METHODS, Moment
from ..sources import Batch
from ..team import Team, noise_like
from ..terms import SIM, SiD
from ..times import UniformTimes
from .one_step import OneStep


@METHODS.register("sim")
class ScoreImplicit(OneStep):
    """Score implicit matching (arXiv:2410.16794), or score identity distillation (SiD, arXiv:2404.04057), without data.

    Both differentiate teacher and fake by what they are shown, which costs the memory of two more backward passes; the
    networks' weights are frozen meanwhile. Only the teacher is guided. Noise levels are even in the scheduler's own
    spacing, in place of the papers' laws for EDM.
    """

    type: Literal["sim"] = "sim"
    loss: Literal["sim", "sid"] = Field(default="sim", description="Score implicit matching, or score identity.")
    huber_c: float = Field(default=0.01, gt=0, description="Of sim: where its distance turns from square to norm.")
    alpha: float = Field(default=1.0, ge=0, description="Of sid: the paper's alpha, 1 or 1.2 in its experiments.")

    def gap(self, batch: Batch, roles: Team, moment: Moment, made: Tensor) -> Tensor:
        """The loss, which passes through both networks."""
        t = UniformTimes(0.02, 0.98)(roles.process, len(batch), moment.generators)
        scale = roles.scales(self.guidance_scale, len(batch), moment.generators)
        teacher = roles.guided("teacher", batch.condition, scale, grad=True, frozen=True)
        fake = roles.denoiser("fake", batch.condition, frozen=True)
        term = SIM(roles.process, self.huber_c) if self.loss == "sim" else SiD(roles.process, self.alpha)
        return term(teacher, fake, made, noise_like(made, moment), t)
