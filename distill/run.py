"""A whole distillation: from a pipeline and options to a student that stock diffusers loads."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from rich.console import Console
from torch import nn

from ..eval.assets import is_demo, load_pipeline, reference_plan, torch_dtype
from ..eval.conditions import Conditions
from ..eval.features import load_feature_net
from ..eval.options import pipeline_arguments
from ..eval.progress import Meter, meter
from ..eval.reference import demo_images
from ..samplers import Plan, Process, TunedFor
from ..samplers.errors import InputError
from ..samplers.files import write_json
from .dry_run import measured_needs, peak_bytes, scratch, table_of
from .encoder import Encoder
from .export import Export, export_student, origin
from .hub import push_to_hub
from .loop import Loop, Outcome
from .materials import check_data, data_in_words, make_source, shown_conditions
from .method import Method
from .model_card import Training, write_card
from .options import STEPS, DistillOptions
from .plots import write_plots
from .run_log import RunLog, make_accelerator
from .sources import Batches
from .team import Team, make_team
from .validation import Judge, Shown, Validation

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
        base: what the student's plans say about the pipeline.
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
    base: TunedFor


def distill(method: Method, options: DistillOptions, command: str = "", console: Console | None = None) -> Outcome:
    """Trains a student and leaves it in ``options.output_dir``: weights, plans, a card, pictures and the log.

    Args:
        method: with its hyper-parameters.
        options: of the run.
        command: as the user wrote it, for the card.
        console: to show progress on; None for a quiet run.

    Returns:
        How the run ended. One that a signal stopped has left a checkpoint and no student.

    Raises:
        InputError: one line that names what is wrong and the mend.
    """
    shown = console is not None and PartialState().is_main_process
    with meter(console or Console(), shown) as bar:
        if options.dry_run:
            with scratch(options) as tried:
                course = prepare(method, tried, bar)
                outcome = train(course, bar)
                needs = measured_needs(tried.output_dir, course.accelerator.device)
            if shown and console is not None:
                console.print(table_of(course.team.roles, needs, options.max_train_steps))
            return outcome
        course = prepare(method, options, bar)
        outcome = train(course, bar)
        if outcome.stopped_by is None and course.accelerator.is_main_process:
            bar.doing("writing the student")
            finish(course, outcome, command)
        course.accelerator.wait_for_everyone()
    course.accelerator.end_training()
    if shown and console is not None:
        where = options.output_dir if outcome.stopped_by is None else outcome.checkpoint
        console.print(str(where), highlight=False, soft_wrap=True)
    return outcome


def train(course: Course, bar: Meter) -> Outcome:
    """Runs the loop, with validation.

    Raises:
        InputError: as `Loop.run`.
    """
    options, last = course.options, course.options.max_train_steps
    validation = _validation(course)
    bar.doing(f"training {course.method.type}")
    bar.expect(last)
    done = 0

    def watch(step: int) -> dict[str, float]:
        nonlocal done
        bar.advance(step - done)
        done = step
        return {} if validation is None else validation(step)

    return Loop(course.method, course.team, course.source, options, course.accelerator, watch).run()


def finish(course: Course, outcome: Outcome, command: str) -> list[Export]:
    """Writes the students, their cards, ``run.json`` and the plot of the losses; uploads them where that is wanted.

    Raises:
        InputError: when something cannot be written or uploaded.
    """
    method, options, team = course.method, course.options, course.team
    device = course.accelerator.device
    seconds = sum(line.get("seconds") or 0.0 for line in RunLog(options.output_dir).lines())
    trained = {role: sum(p.numel() for p in team.trainable(role).values()) for role in team.roles.trained}
    facts = {
        "method": method.model_dump(mode="json"),
        "pipe": options.pipe,
        "updates": outcome.step,
        "global_batch": options.global_batch(course.accelerator.num_processes),
        "data": data_in_words(method, options),
        "seconds": seconds,
        "peak_bytes": peak_bytes(device),
        "device": str(device),
        "trained_parameters": trained,
        "command": command,
    }
    write_json(options.output_dir / "run.json", facts)
    dtype = torch_dtype(options.export_dtype)
    exports = []
    for role in method.students:
        export = export_student(
            course.pipe, course.component, team, role, method, course.plans, options.output_dir,
            base=course.base, dtype=dtype, kohya=options.kohya,
        )  # fmt: skip
        training = Training(
            base=options.pipe,
            method=method,
            options=options,
            updates=outcome.step,
            processes=course.accelerator.num_processes,
            guidance=team.guidance,
            trainable=trained[role],
            conditions=course.conditions,
            call_kwargs=course.call_kwargs,
            data=data_in_words(method, options),
            command=command or None,
            seconds=seconds,
            precision=course.accelerator.mixed_precision,
        )
        write_card(course.pipe, export, training)
        exports.append(export)
    write_plots(options.output_dir)
    if options.push_to_hub and options.hub_model_id is not None:
        push_to_hub(options.output_dir, options.hub_model_id, options.hub_token, options.hub_private)
    return exports


def prepare(method: Method, options: DistillOptions, bar: Meter) -> Course:
    """Loads, checks and makes everything that a run needs; what can be refused is refused before work begins.

    Raises:
        InputError: naming the option and the mend.
    """
    check_data(method, options)
    lora = options.lora(method.lora_rank)
    accelerator = make_accelerator(options)
    torch.backends.cuda.matmul.allow_tf32 = options.allow_tf32
    pipe = load_pipeline(options.pipe, dtype=options.dtype, device=str(accelerator.device), download=options.download)
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
    base = origin(pipe)
    source = make_source(method, options, encoder, teacher, accelerator, _told(bar))
    conditions = shown_conditions(options, pipe)
    team = make_team(network, process, method, lora, guidance, options.seed, average=options.use_ema)
    team.roles.to(accelerator.device)
    if options.gradient_checkpointing:
        team.roles.enable_gradient_checkpointing()
    return Course(
        method, options, pipe, component, teacher, plans, team, source, accelerator, conditions, arguments, base
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


def _validation(course: Course) -> Validation | None:
    """The validation of a run; None where no images are wanted."""
    options = course.options
    if not options.num_validation_images:
        return None
    judge = None
    if is_demo(options.pipe):
        net = load_feature_net("fashion-features", None, device=str(course.accelerator.device))
        judge = Judge(net, demo_images(net), options.validation_n)
    shown = Shown(
        course.conditions, options.num_validation_images, course.call_kwargs, batch_size=options.encode_batch_size
    )
    return Validation(
        course.pipe, course.component, course.team, course.method.students[0], course.method, course.plans,
        course.teacher, course.accelerator, folder=options.output_dir, every=options.validation_steps,
        last=options.max_train_steps, shown=shown, judge=judge,
    )  # fmt: skip
