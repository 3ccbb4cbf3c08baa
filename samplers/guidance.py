"""Classifier-free guidance (arXiv:2207.12598)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .part import Part, Run
from .registry import Registry

GUIDANCES: Registry[type[Part]] = Registry("guidance type")


@GUIDANCES.register("constant")
class ConstantGuidance(Part):
    """One guidance scale for all steps, in the convention of the pipeline that it is attached to."""

    type: Literal["constant"] = "constant"
    scale: float = Field(ge=0, description="The pipeline's guidance_scale; most pipelines do not guide at 1 or less.")
    rescale: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="The pipeline's guidance_rescale (arXiv:2305.08891, Section 3.4).",
    )

    def prepare(self, run: Run, known_arguments: frozenset[str]) -> None:
        """Sets the scale in the call; 1 or less also where a pipeline has another argument for its two branches.

        Raises:
            InputError: when the pipeline takes no guidance_scale, or no guidance_rescale where one is asked for.
        """
        run.set_argument("guidance", "guidance_scale", self.scale, known_arguments)
        if self.scale <= 1 and "true_cfg_scale" in known_arguments:
            run.set_argument("guidance", "true_cfg_scale", 1.0, known_arguments)
        if self.rescale is not None:
            run.set_argument("guidance", "guidance_rescale", self.rescale, known_arguments)
