"""A whole distillation: from a pipeline and options to a student that stock diffusers loads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..eval.assets import load_pipeline, reference_plan
from ..eval.conditions import Conditions
from ..eval.options import pipeline_arguments
from ..eval.progress import Meter
from ..samplers import Plan, Process
from ..samplers.errors import InputError
from .encoder import Encoder
from .loop import Loop, Outcome
from .materials import check_data, make_source, shown_conditions
from .method import Method
from .options import STEPS, DistillOptions
from .run_log import make_accelerator
from .sources import Batches
from .team import Team, make_team

TEACHER_STEPS = 50
"Steps of the teacher where no plan says them."


@dataclass(frozen=True)
class Course:
    """A distillation that is ready to begin.

    Attributes:
        method: what is trained.
        options: of the run.
        pipe: the teacher's pipeline.
        component: the pipeline's name of the network.
        teacher: how the teacher samples.
        plans: how the student is sampled, by number of steps; the first is the one that ships.
        team: the networks.
        source: of the batches.
        accelerator: of the run.
        conditions: prompts or labels of the images that are looked at.
        call_kwargs: further arguments of the pipeline's call.
    """

    method: Method
    options: DistillOptions
    pipe: Any
    component: str
    teacher: Plan
    plans: dict[int, Plan]
    team: Team
    source: Batches
    accelerator: Accelerator
    conditions: Conditions
    call_kwargs: dict[str, Any]


def prepare(method: Method, options: DistillOptions, bar: Meter) -> Course:
    """Loads, checks and makes everything that a run needs; what can be refused is refused before work begins.

    Raises:
        InputError: naming the option and the mend.
    """
    check_data(method, options)
    lora = options.lora(method.lora_rank)
    accelerator = make_accelerator(options)
    torch.backends.cuda.matmul.allow_tf32 = options.allow_tf32
    pipe = load_pipeline(
        options.pipe, dtype=options.dtype, device=str(accelerator.device), download=options.download
    )
    process = Process.from_scheduler(pipe.scheduler)
    teacher = Plan.load(options.teacher) if options.teacher else reference_plan(options.pipe, TEACHER_STEPS)
    guidance = teacher_guidance(pipe, teacher)
    plans = student_plans(method, options, process)
    arguments = pipeline_arguments(pipe, options.call_kwargs)
    scales = [guidance, *getattr(method, "guidance_scale", ())]
    told = {"guidance_scale": max(scales)} if "guidance_scale" in inspect.signature(pipe.__call__).parameters else {}
    encoder = Encoder(pipe, {**told, **arguments}, options.cache / "conditions")
    component = encoder.layout.component
    network: nn.Module = getattr(pipe, component)
    source = make_source(method, options, encoder, teacher, accelerator, _told(bar))
    conditions = shown_conditions(options, pipe)
    team = make_team(network, process, method, lora, guidance, average=options.use_ema)
    team.roles.to(accelerator.device)
    if options.gradient_checkpointing:
        team.roles.enable_gradient_checkpointing()
    return Course(
        method, options, pipe, component, teacher, plans, team, source, accelerator, conditions, arguments
    )


def teacher_guidance(pipe: Any, teacher: Plan) -> float:
    """The scale with which the teacher is guided: its plan's, else the default of the pipeline's call, else 1."""
    scale = getattr(teacher.guidance, "scale", None)
    if isinstance(scale, int | float):
        return float(scale)
    if teacher.guidance is not None:
        raise InputError(
            f"the teacher's plan has the guidance {teacher.guidance.type!r}; a student learns one scale, so give a "
            "plan with constant guidance"
        )
    known = inspect.signature(pipe.__call__).parameters.get("guidance_scale")
    return float(known.default) if known is not None and isinstance(known.default, int | float) else 1.0


def student_plans(method: Method, options: DistillOptions, process: Process) -> dict[int, Plan]:
    """How the student is sampled, by number of steps, ``--num_inference_steps`` first.

    Raises:
        InputError: for steps that were asked for and that the method does not train.
    """
    plans = {options.num_inference_steps: method.plan(process, options.num_inference_steps)}
    for steps in options.validation_num_inference_steps:
        plans[steps] = method.plan(process, steps)
    if not options.validation_num_inference_steps:
        for steps in STEPS:
            try:
                plans.setdefault(steps, method.plan(process, steps))
            except InputError:
                continue
    return plans


def _told(bar: Meter) -> Callable[[str, int], Callable[[int], None]]:
    def tell(what: str, count: int) -> Callable[[int], None]:
        bar.doing(what)
        bar.expect(count)
        return bar.advance

    return tell
