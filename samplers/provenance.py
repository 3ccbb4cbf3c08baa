"""Where a plan comes from: what it was tuned for, and what was measured."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import nn

from .fingerprint import fingerprint
from .part import Record, Run


class TunedFor(Record):
    """The pipeline a plan was made on; used on another one, it warns."""

    fingerprint: str | None = Field(default=None, description="Fingerprint of the denoiser's weights.")
    pipeline: str | None = Field(default=None, description="Class name of the pipeline.")
    height: int | None = Field(default=None, ge=1, description="Pixels.")
    width: int | None = Field(default=None, ge=1, description="Pixels.")
    steps: int | None = Field(default=None, ge=1, description="Number of steps.")

    def check(self, run: Run, denoiser: nn.Module) -> None:
        """Adds a warning to ``run`` for everything that differs from the pipeline the plan was tuned for."""
        name: Any = type(run.pipe).__name__
        if self.pipeline is not None and self.pipeline != name:
            run.warnings.append(f"the plan was tuned for {self.pipeline}, not for {name}")
        if self.fingerprint is not None and self.fingerprint != (here := fingerprint(denoiser)):
            run.warnings.append(
                f"the plan was tuned for other weights (fingerprint {self.fingerprint[:12]}, here {here[:12]}); "
                "measure it again before you rely on its evidence"
            )


class Evidence(Record):
    """One measured number."""

    metric: str = Field(description="Name of the metric, such as fd_fashion.")
    value: float
    se: float | None = Field(default=None, ge=0, description="Standard error.")
    n: int = Field(ge=1, description="Number of images.")
    seeds: tuple[int, int] | None = Field(default=None, description="First seed, and one past the last.")
    against: str | None = Field(default=None, description="What it was compared with.")
    command: str | None = Field(default=None, description="The command that measured it.")
