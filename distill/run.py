"""A whole distillation: from a pipeline and options to a student that stock diffusers loads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from rich.console import Console

from ..eval.assets import is_demo, torch_dtype
from ..eval.features import load_feature_net
from ..eval.progress import Meter, meter
from ..eval.reference import demo_images
from ..samplers.files import write_json
from .course import Course, check_options, prepare
from .dry_run import in_words, measured_needs, peak_bytes, scratch, table_of
from .export import Export, export_student
from .hub import push_to_hub, without_token
from .idle import idle_parts, placed
from .loop import Loop, Outcome
from .materials import data_in_words
from .method import Method
from .model_card import Training, write_card
from .options import DistillOptions
from .plots import write_plots
from .progress import together, training_bar
from .run_log import RunLog, make_accelerator
from .shards import size_of
from .sources import ImageBatches
from .validation import Judge, Shown, Validation


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
    check_options(method, options)
    command = without_token(command)
    options = options.model_copy(update={"report_to": "none"}) if options.dry_run else options
    accelerator = make_accelerator(options)
    shown = console is not None and accelerator.is_main_process
    with meter(console or Console(), shown) as bar:
        if options.dry_run:
            with scratch(options) as tried:
                course = prepare(method, tried, bar, accelerator)
                outcome = train(course, bar)
                needs = measured_needs(tried.output_dir, accelerator.device)
            if shown and console is not None:
                console.print(table_of(course.team.roles))
                console.print(in_words(needs, options.max_train_steps), highlight=False, soft_wrap=True)
            return outcome
        course = prepare(method, options, bar, accelerator)
        outcome = train(course, bar)
        if outcome.stopped_by is None:
            bar.doing("writing the student")
            for role in method.students:
                course.team.roles.join(course.student(role).deployed_role)
            if accelerator.is_main_process:
                finish(course, outcome, command)
        accelerator.wait_for_everyone()
    accelerator.end_training()
    if shown and console is not None:
        where = options.output_dir if outcome.stopped_by is None else outcome.checkpoint
        console.print(str(where), highlight=False, soft_wrap=True)
    return outcome


def train(course: Course, bar: Meter) -> Outcome:
    """Runs the loop, with validation.

    Raises:
        InputError: as `Loop.run`.
    """
    validation, host, device = _validation(course), torch.device("cpu"), course.accelerator.device
    idle = idle_parts(course.pipe, encodes=isinstance(course.source, ImageBatches))

    def validated(step: int) -> Mapping[str, float]:
        if validation is None or not validation.due(step):
            return {}
        with placed(idle, device, host):
            return validation(step)

    watch = together(training_bar(bar, course.options.max_train_steps), validated)
    loop = Loop(
        course.method,
        course.team,
        course.source,
        course.options,
        course.accelerator,
        watch,
        course.identity,
        course.team.sharing,
    )
    with placed(idle, host, device):
        return loop.run()


def finish(course: Course, outcome: Outcome, command: str) -> list[Export]:
    """Writes the students, their cards, ``run.json`` and the plot of the losses; uploads them where that is wanted.

    Raises:
        InputError: when something cannot be written or uploaded.
    """
    method, options, team = course.method, course.options, course.team
    device = course.accelerator.device
    seconds = sum(line.get("seconds") or 0.0 for line in RunLog(options.output_dir).lines())
    student = None if options.student is None else str(options.student)
    trained = {role: size_of(team.trainable(role).values()) for role in team.roles.trained}
    facts = {
        "method": method.model_dump(mode="json"),
        "pipe": options.pipe,
        "student": student,
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
            course.student(role), options.output_dir, base=course.base, dtype=dtype, kohya=options.kohya
        )
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
            student=student,
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
        course.student(course.method.students[0]),
        course.teacher,
        course.accelerator,
        folder=options.output_dir,
        every=options.validation_steps,
        last=options.max_train_steps,
        shown=shown,
        judge=judge,
    )
