"""What a distillation needs before it begins: loaded, checked and made from a method and options."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from ..eval.assets import is_demo, load_pipeline, plan_file, reference_plan
from ..eval.conditions import Conditions
from ..eval.options import pipeline_arguments
from ..eval.progress import Meter
from ..samplers import ConstantGuidance, Plan, PlanWarning, Process, TunedFor, attach, denoisers
from ..samplers.errors import InputError
from ..samplers.fingerprint import fingerprint_of
from .beginning import begin, read_beginning
from .checkpoints import Checkpoints, check_run
from .encoder import Encoder
from .export import Student, origin
from .guiding import guiding, refuse_unseen_guidance
from .hub import refuse_logged_token
from .loop import identity_of, refuse_sharding
from .lora import LoraSetting
from .materials import check_data, make_source, open_data, shown_conditions
from .method import Method
from .optimisers import optimiser_class
from .options import STEPS, DistillOptions
from .roles import refuse_no_checkpointing
from .run_log import make_accelerator
from .shards import Sharing
from .shift import process_of_call
from .sources import Batches
from .team import Team, make_cast, team_of

TEACHER_STEPS = 50
"Steps of the teacher where no plan says them."

_MOST_STEPS = 64
"Numbers of steps up to here are tried where none is asked for."


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
        identity: what a resumed run must have in common with this one besides method and options.
    """

    method: Method
    options: DistillOptions
    pipe: Any
    component: str
    teacher: Plan
    plans: Mapping[int, Plan]
    team: Team
    source: Batches
    accelerator: Accelerator
    conditions: Conditions
    call_kwargs: Mapping[str, Any]
    base: TunedFor
    identity: Mapping[str, Any]

    def student(self, role: str) -> Student:
        """A student of the method."""
        return Student(self.pipe, self.component, self.team, role, self.method, self.plans)


def prepare(method: Method, options: DistillOptions, bar: Meter, accelerator: Accelerator | None = None) -> Course:
    """Loads, checks and makes everything that a run needs; what can be refused is refused before work begins.

    Args:
        method: with its hyper-parameters.
        options: of the run.
        bar: shows what is encoded or made.
        accelerator: of `make_accelerator`; None to make it.

    Raises:
        InputError: naming the option and the mend.
    """
    lora = options.lora(method.lora_rank)
    accelerator = accelerator or make_accelerator(options)
    _check_folder(options)
    refuse_sharding(accelerator)
    sharing = sharing_of(options, accelerator)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.allow_tf32
    chosen = Checkpoints(options.output_dir).choose(options.resume_from_checkpoint)
    if chosen is not None:
        check_run(chosen, identity_of(method, options, accelerator, {}), options.max_train_steps)
    images = open_data(options)
    bar.doing("loading")
    pipe = load_pipeline(options.pipe, dtype=options.dtype, device=str(accelerator.device), download=options.download)
    network: nn.Module = next(iter(denoisers(pipe).values()))
    teacher = Plan.load(plan_file(options.teacher)) if options.teacher else reference_plan(options.pipe, TEACHER_STEPS)
    arguments = pipeline_arguments(pipe, options.call_kwargs)
    guided = guiding(pipe, network, method, teacher, arguments)
    conditions = shown_conditions(options, pipe, images)
    encoder = Encoder(pipe, {**arguments, **guided.told}, options.cache / "conditions")
    steps = {} if teacher.nominal_steps is None else {"num_inference_steps": teacher.nominal_steps}
    process = process_of_call(pipe, encoder.arguments([encoder.something]) | steps)
    plans = student_plans(method, options, process, guided.inside)
    cast = make_cast(network, method, lora, options.seed, options.use_ema)
    if options.gradient_checkpointing:
        refuse_no_checkpointing(cast.network)
    base = origin(pipe)
    beginning = read_beginning(pipe, options.student, method, cast, lora) if options.student else None
    identity = {"base": base.fingerprint, "guidance": guided.scale, "inside": guided.inside, "lora": _facts(lora)}
    if beginning is not None:
        identity["student"] = fingerprint_of(beginning)
    if chosen is not None:
        check_run(chosen, identity_of(method, options, accelerator, identity), options.max_train_steps)
    with warnings.catch_warnings(action="ignore", category=PlanWarning), attach(pipe, teacher):
        pass  # refuses a plan that cannot run on this pipeline
    refuse_unseen_guidance(encoder.layout, guided, method)
    values = conditions.values if images is None else ()
    source = make_source(images, values, method, options, encoder, teacher, accelerator, _told(bar))
    team = team_of(cast, process, guided.scale, options.seed, sharing)
    if beginning is not None:
        begin(team, beginning)
    team.roles.to(accelerator.device)
    if options.gradient_checkpointing:
        team.roles.enable_gradient_checkpointing()
    return Course(
        method, options, pipe, encoder.layout.component, teacher, plans, team, source, accelerator, conditions,
        arguments, base, identity,
    )  # fmt: skip


def check_options(method: Method, options: DistillOptions) -> None:
    """Refuses what can be refused before processes, folders and pipelines are looked at.

    Raises:
        InputError: naming the option and the mend.
    """
    check_data(method, options)
    lora = options.lora(method.lora_rank)
    if options.kohya and lora is None:
        raise InputError("--kohya is for adapters, and this student has all weights; give --lora_rank or leave it out")
    if options.validation_n and not is_demo(options.pipe):
        raise InputError("--validation_n needs real images, which only the demos bring; score with fewstep bench")
    refuse_logged_token(options.hub_token, options.report_to)
    optimiser_class(options)
    least = method.least_updates
    if options.max_train_steps < least:
        raise InputError(
            f"{method.type} needs --max_train_steps {least} or more with these stages; got {options.max_train_steps}, "
            "so give more, or fewer --stage_steps"
        )


def sharing_of(options: DistillOptions, accelerator: Accelerator) -> Sharing | None:
    """The processes that the networks are cut over; None where each holds them whole.

    Args:
        options: of the run.
        accelerator: that is configured for FSDP asks for it too.

    Raises:
        InputError: with one process, or an optimiser whose moments cannot be cut.
    """
    configured = accelerator.distributed_type == DistributedType.FSDP
    if not options.shard_networks and not configured:
        return None
    what = "--shard_networks true" if options.shard_networks else "accelerate's FSDP"
    if accelerator.num_processes == 1:
        raise InputError(
            f"{what} cuts the networks over several processes, and this is one; give accelerate launch --num_processes "
            "2 or more, or leave it out"
        )
    if options.use_8bit_adam:
        raise InputError(
            f"--use_8bit_adam scales moments in blocks of each process's own, which {what} could not put together in a "
            "checkpoint; leave one of them out"
        )
    if configured and accelerator.is_main_process:
        warnings.warn(
            "accelerate is configured for FSDP: the networks are cut as by --shard_networks true, and FSDP's other "
            "settings are not used",
            stacklevel=2,
        )
    return Sharing(accelerator.device, accelerator.num_processes, accelerator.process_index)


def _check_folder(options: DistillOptions) -> None:
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.output_dir):
            pass
    except OSError as error:
        raise InputError(f"--output_dir {options.output_dir} cannot be written: {error.strerror or error}") from None


def student_plans(
    method: Method, options: DistillOptions, process: Process, inside: float | None = None
) -> dict[int, Plan]:
    """How the student is sampled, by number of steps, the one that ships first.

    Args:
        method: that trains it.
        options: of the run.
        process: of the pipeline.
        inside: the guidance scale that the network is told; None for networks that are not told.

    Raises:
        InputError: for steps that were asked for and that the method does not train.
    """
    wanted = [steps for steps in (options.num_inference_steps, *options.validation_num_inference_steps) if steps]
    plans = {steps: method.plan(process, steps) for steps in wanted}
    if not options.validation_num_inference_steps:
        for steps in STEPS:
            _try(plans, method, process, steps)
    if options.num_inference_steps is None:
        first = _first_steps(method, process)
        plans = {first: method.plan(process, first)} | plans
    if inside is None:
        return plans
    told = ConstantGuidance(scale=inside)
    return {steps: plan.model_copy(update={"guidance": told}) for steps, plan in plans.items()}


def _first_steps(method: Method, process: Process) -> int:
    """Steps of the plan that ships where none are asked for: 4, or the nearest that the method can do."""
    plans: dict[int, Plan] = {}
    for steps in sorted(range(1, _MOST_STEPS + 1), key=lambda steps: (abs(steps - max(STEPS) // 2), steps)):
        _try(plans, method, process, steps)
        if plans:
            return steps
    method.plan(process, max(STEPS) // 2)  # raises, and says why
    raise AssertionError


def _try(plans: dict[int, Plan], method: Method, process: Process, steps: int) -> None:
    try:
        plans.setdefault(steps, method.plan(process, steps))
    except InputError:
        return


def _facts(lora: LoraSetting | None) -> dict[str, Any] | None:
    return None if lora is None else asdict(lora) | {"targets": list(lora.targets)}


def _told(bar: Meter) -> Callable[[str, int], Callable[[int], None]]:
    def tell(what: str, count: int) -> Callable[[int], None]:
        bar.begin(what, count)
        return bar.advance

    return tell
