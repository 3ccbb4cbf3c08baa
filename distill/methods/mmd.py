"""Finetuning of a few deterministic steps by the maximum mean discrepancy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from ...samplers import Plan
from ...samplers.errors import InputError
from ...samplers.process import Process
from ..deploy import landing_plan
from ..distances import wide
from ..features import blocks_to_tap, features_of
from ..method import METHODS, Loss, Method, Moment
from ..role_kinds import Base, Kind
from ..rollout import Rollout, start
from ..schedule import Schedule
from ..sources import Batch
from ..spans import even_points
from ..team import Team, noise_like
from ..terms import MMD, Polynomial


@METHODS.register("mmd")
class Discrepancy(Method):
    """MMD-DDM (arXiv:2301.07969): all steps of DDIM are unrolled, and the samples' features brought to the data's.

    The paper's features are Inception's or CLIP's of decoded images. These are the teacher's own: they are there for
    any pipeline, need no decoder in the backward pass, and are not the space in which the student is scored later. The
    teacher sees samples and data under a little noise, told their condition, and tokens are normalised and averaged.
    The discrepancy is that of each process' micro-batch, so this should be large.
    """

    type: Literal["mmd"] = "mmd"
    student_steps: int = Field(default=5, ge=1, description="Steps of the student, which it is sampled in.")
    feature_maps: int = Field(default=4, ge=1, description="Blocks of the teacher whose features are compared.")
    feature_noise: float = Field(
        default=0.1, ge=0, le=1, description="Noise level at which the teacher looks, as a fraction of its times."
    )
    degree: int = Field(default=3, ge=1, description="Of the polynomial kernel.")
    checkpoint_steps: bool = Field(default=False, description="Run each step again in the backward pass, for memory.")

    def kinds(self, student: Kind, network: nn.Module) -> Mapping[str, Kind]:
        """Student and teacher."""
        blocks_to_tap(network, self.feature_maps)
        return {"student": student, "teacher": Base()}

    def turns(self) -> Schedule:
        """The student in every turn."""
        return Schedule()

    def times(self, process: Process) -> tuple[float, ...]:
        """Where the student is asked, noisiest first, spread evenly."""
        return tuple(reversed(even_points(process, self.student_steps)[1:]))

    def plan(self, process: Process, steps: int) -> Plan:
        """The steps that were unrolled."""
        if steps != self.student_steps:
            raise InputError(f"mmd trains a student of {self.student_steps} steps; it cannot be sampled in {steps}")
        return landing_plan(process, self.times(process))

    def losses(self, batch: Batch, roles: Team, moment: Moment) -> Iterator[Loss]:
        """The discrepancy, through all steps."""
        assert batch.x0 is not None
        x = start(roles.process, batch.condition, moment)
        rollout = Rollout(roles.process, self.times(roles.process), fresh=False, checkpointed=self.checkpoint_steps)
        student = roles.denoiser("student", batch.condition)
        made = rollout(student, x, lambda: noise_like(x, moment), "all")
        real = self._features(batch, roles, moment, batch.x0)
        yield Loss("mmd", "student", MMD(Polynomial(self.degree))(self._features(batch, roles, moment, made), real))

    def _features(self, batch: Batch, roles: Team, moment: Moment, x: Tensor) -> Tensor:
        """Features (B, D) of clean samples, float32."""
        t = roles.process.from_uniform(torch.full((len(x),), self.feature_noise, dtype=torch.float64))
        noised = roles.process.add_noise(wide(x), noise_like(x, moment), t)
        features = features_of(roles, "teacher", batch.condition, self.feature_maps, grad=x.requires_grad)(noised, t)
        return torch.cat([layer_norm(wide(each), each.shape[2:]).mean(dim=1) for each in features], dim=1)
