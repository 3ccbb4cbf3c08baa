"""One network for some steps, another one for the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import nn

from .call import CallHook
from .models import MODELS
from .network import Evaluation
from .part import Part, Run
from .substitute import check_network, device_of, load_network, own_network

SELF = "self"
"The pipeline's own network, by this name in a plan."


@MODELS.register("model-switch")
class ModelSwitch(Part):
    """Which network runs which steps: Hybrid SD (arXiv:2408.06646), big first, small for the rest.

    A network is ``self`` (the pipeline's own), one handed over with ``attach(..., resources={name: network})``, or a
    folder beside the plan. They share the scheduler, whose multistep history carries over, the autoencoder and the
    encoders. That all of them predict the same thing (epsilon, v, ...) is not written in a network and cannot be
    checked: a network of another prediction type gives noise.
    """

    type: Literal["model-switch"] = "model-switch"
    networks: tuple[str, ...] = Field(min_length=1, description="Names of networks, in the order in which they run.")
    steps: tuple[int, ...] = Field(
        default=(),
        description="Positions in the scheduler's timesteps, from 0, where the next network takes over.",
    )
    times: tuple[float, ...] = Field(
        default=(),
        description="Instead of steps: the next network takes over at the first step whose timestep is at most this.",
    )
    folders: dict[str, str] = Field(
        default_factory=dict, description="Folders of networks (config.json, safetensors) within the plan's, by name."
    )
    component: str | None = Field(
        default=None, description="Which denoiser of the pipeline is switched; null where it has one."
    )

    @model_validator(mode="after")
    def _consistent(self) -> ModelSwitch:
        if self.steps and self.times:
            raise ValueError("give steps or times, not both")
        borders = self.steps or self.times
        if len(borders) != len(self.networks) - 1:
            raise ValueError(
                f"{len(self.networks)} networks need {len(self.networks) - 1} steps or times; got {len(borders)}"
            )
        if any(after <= before for before, after in pairwise(self.steps)) or (self.steps and self.steps[0] < 0):
            raise ValueError(f"steps must increase from 0 or more; got {list(self.steps)}")
        if any(after >= before for before, after in pairwise(self.times)):
            raise ValueError(f"times must decrease; got {list(self.times)}")
        for name in self.folders:
            if name not in self.networks or name == SELF:
                raise ValueError(f"folder {name!r} is for no network of this part; it has {list(self.networks)}")
        return self

    @property
    def files(self) -> tuple[str, ...]:
        """Files and folders beside the plan that this part reads."""
        return tuple(self.folders.values())

    def prepare(self, run: Run, known_arguments: frozenset[str]) -> None:
        """Finds and checks the networks and adds the hook.

        Raises:
            InputError: when a network is missing, or does not fit where the pipeline's own one does.
        """
        component, own = own_network(run.pipe, "model-switch", self.component)
        device = device_of(run.pipe, own)
        found: dict[str, nn.Module] = {}
        for name in self.networks:
            if name == SELF:
                continue
            if name in self.folders:
                found[name] = load_network(run, "model-switch", self.folders[name], own).to(device)
            else:
                found[name] = run.resource("model-switch", name)
            check_network(name, found[name], own, device)
        run.hooks.append(lambda: _Switch(self, component, found))

    def network_of(self, index: int, time: float) -> str:
        """The name of the network that runs a step.

        Args:
            index: the step's position in the scheduler's timesteps.
            time: its timestep.
        """
        passed = sum(index >= step for step in self.steps) + sum(time <= border for border in self.times)
        return self.networks[passed]


@dataclass
class _Switch(CallHook):
    part: ModelSwitch
    component: str
    networks: dict[str, nn.Module]

    def evaluate(self, evaluation: Evaluation, proceed: Callable[[Evaluation], Any]) -> Any:
        """Has the network of this step evaluated."""
        name = self.part.network_of(evaluation.index, evaluation.time)
        if evaluation.component == self.component and name != SELF:
            evaluation = replace(evaluation, component=name, network=self.networks[name])
        return proceed(evaluation)
