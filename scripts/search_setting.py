"""What every search of the command line works with: the pipeline, the plan, and calls for samples by number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..eval.assets import is_demo, load_pipeline, plan_file
from ..eval.bench import process_state
from ..eval.conditions import Conditions, conditions_for
from ..eval.features import load_feature_net
from ..eval.options import pipeline_arguments
from ..eval.paired import Lpips
from ..eval.reference import demo_images
from ..samplers import DiffusersSolver, Plan, SpacingGrid
from ..samplers.recording import clean_samples
from ..search import Judges
from .search_options import FitOptions, NetOptions

BATCH = 32


@dataclass(frozen=True)
class Setting:
    """What every search works with."""

    pipe: Any
    plan: Plan
    conditions: Conditions
    call_kwargs: dict[str, Any]
    seed: int
    console: Console
    command: str

    @classmethod
    def of(cls, options: FitOptions, command: str) -> Setting:
        """Loads the pipeline and the plan of the options."""
        plan = Plan.load(plan_file(options.plan)) if options.plan else Plan()
        device = options.device or str(process_state(None).device)
        pipe = load_pipeline(options.pipe, dtype=options.dtype, device=device, download=options.download)
        conditions = conditions_for(pipe, class_labels=options.class_labels, prompts=options.prompts)
        call_kwargs = pipeline_arguments(pipe, options.call_kwargs)
        return cls(pipe, plan, conditions, call_kwargs, options.seed, Console(), command)

    def call(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Arguments of a call for some samples, by number, seeds included."""
        generators = [torch.Generator("cpu").manual_seed(self.seed + number) for number in numbers]
        return self.conditions.inputs(numbers) | self.call_kwargs | {"generator": generators}

    def samples(self, n: int, teacher: Path | None, guidance: Any) -> Tensor:
        """Clean samples (n, ...) as the network sees them, made by a teacher's plan."""
        plan = Plan.load(plan_file(teacher)) if teacher else _fifty_steps(guidance)
        return torch.cat([x.cpu() for x in clean_samples(self.pipe, plan, self.calls(n))])

    def calls(self, n: int) -> Iterator[dict[str, Any]]:
        """Arguments of the calls for samples 0 to n - 1, a batch each."""
        for first in range(0, n, BATCH):
            yield self.call(range(first, min(first + BATCH, n))) | {"output_type": "np"}


def judges_of(options: NetOptions) -> Judges:
    """What the options judge with; images of a demo by its own network and real images unless they say otherwise."""
    name = options.net or ("fashion-features" if is_demo(options.pipe) else None)
    net = load_feature_net(name, options.net_path, download=options.download) if name else None
    return Judges(
        net=net,
        real=demo_images(net) if net and net.name == "fashion-features" and is_demo(options.pipe) else None,
        lpips=Lpips(options.lpips_path) if options.lpips_path else None,
    )


def _fifty_steps(guidance: Any) -> Plan:
    solver = DiffusersSolver(scheduler="DDIMScheduler")
    return Plan(solver=solver, grid=SpacingGrid(steps=50, spacing="trailing"), guidance=guidance)
