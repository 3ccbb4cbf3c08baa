"""The README of a student: what it is, how it was trained, and how to sample with it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from torch import nn

from ..eval.assets import PREFIX, is_demo
from ..eval.conditions import Conditions
from ..samplers import Plan
from ..samplers.files import write_text
from .export import PLAN_FILE, Export, call_arguments
from .export_lora import LoraFiles
from .hub import without_token
from .loop_options import LoopOptions
from .method import Method
from .stock import StockSampling, stock_sampling

CARD_FILE = "README.md"

PACKAGES = ("fewstep", "torch", "diffusers", "peft", "accelerate")

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Training:
    """The facts of a run that a card tells.

    Attributes:
        base: what the pipeline was loaded from: a folder, a repository of the hub, or ``demo:NAME``.
        method: with its hyper-parameters.
        options: of the run.
        updates: of the student, done.
        processes: that trained together.
        guidance: scale of the teacher where the method says none.
        trainable: number of the student's trained parameters.
        conditions: what examples show: the first of them.
        call_kwargs: further arguments of the pipeline's call.
        student: plan of the student that it began with; None for the teacher.
        data: what it was trained on, in words; None to say nothing.
        command: that trained it, as one types it; None to say nothing.
        seconds: that the training took; None to say nothing.
        precision: of the forward passes; None for that of the weights.
    """

    base: str
    method: Method
    options: LoopOptions
    updates: int
    processes: int
    guidance: float
    trainable: int
    conditions: Conditions
    call_kwargs: Mapping[str, Any] = field(default_factory=dict)
    student: str | None = None
    data: str | None = None
    command: str | None = None
    seconds: float | None = None
    precision: str | None = None


def write_card(pipe: Any, export: Export, training: Training) -> Path:
    """Writes ``README.md`` beside an exported student, complete or not at all.

    What was measured is taken from the evidence of the plans.

    Args:
        pipe: the teacher's pipeline.
        export: the student.
        training: what to tell.

    Raises:
        InputError: when it cannot be written.
    """
    path = export.folder / CARD_FILE
    parts = [
        _front_matter(training, export),
        f"# {export.folder.resolve().name}",
        _summary(pipe, export, training),
        *(_deployment(pipe, export, training) if export.plans else ()),
        "## Training",
        _training(training),
        *_command(training),
        f"Method `{training.method.type}`: {_paragraph(type(training.method).__doc__)}",
        "Its hyper-parameters:",
        _hyper_parameters(training.method),
        f"Versions: {', '.join(_versions())}.",
    ]
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def _front_matter(training: Training, export: Export) -> str:
    """The block that the hub reads; the licence is for the user to add."""
    base = training.base if _is_repository(training.base) else None
    tags = ["fewstep", "distillation", "few-step", training.method.type, *(["lora"] if export.lora else [])]
    data = ModelCardData(base_model=base, library_name="diffusers", tags=tags)
    return f"---\n{data.to_yaml()}\n---"


def _is_repository(base: str) -> bool:
    return _REPOSITORY.fullmatch(base) is not None and not Path(base).exists()


def _summary(pipe: Any, export: Export, training: Training) -> str:
    what = "A LoRA for the" if export.lora else "A full"
    average = ", averaged over the run" if export.role == "average" else ""
    purpose = f", the {export.role} beside the one that is sampled"
    if export.plans:
        first, *others = export.plans
        further = f". There are plans for {_list_of(others)} too" if others else ""
        purpose = f" to sample in {_count(first, 'step')}{average}{further}"
    return (
        f"{what} {export.component} of `{training.base}` ({type(pipe).__name__}), distilled by `{training.method.type}`"
        f"{purpose}.\n\n"
        "No licence is stated; add one to the front matter before you publish this, in accord with that of the base."
    )


def _deployment(pipe: Any, export: Export, training: Training) -> Iterator[str]:
    """How it is sampled, and what was measured."""
    yield "## Sampling"
    yield from _sampling(pipe, export, training)
    yield "## Steps"
    yield _steps(export.plans)
    yield from _measured(export.plans)


def _sampling(pipe: Any, export: Export, training: Training) -> Iterator[str]:
    """Two programs that sample by the first plan: with fewstep, and with diffusers alone where it can."""
    plan = export.plans[next(iter(export.plans))]
    name = type(pipe).__name__
    folder = f'"{export.folder.resolve().name}"'
    own: nn.Module = getattr(pipe, export.component)
    dtype = next(own.parameters()).dtype
    source = [f'"{_source(training.base)}"', *([] if dtype == torch.float32 else [f"dtype={dtype}"])]
    torch_import = [] if dtype == torch.float32 else ["import torch"]
    shown = training.conditions.inputs([0]) | call_arguments(plan, training.call_kwargs)
    asked = [f"{key}={value!r}" for key, value in shown.items()]
    yield "With fewstep, from the folder above this one:"
    yield _block(
        [
            *torch_import,
            f"from diffusers import {name}",
            "from fewstep.samplers import Plan, attach",
            "",
            f"pipe = {name}.from_pretrained({', '.join(source)})",
            f'with attach(pipe, Plan.load({folder[:-1]}/{PLAN_FILE}")):',
            f"    image = pipe({', '.join(asked)}).images[0]",
        ]
    )
    stock = stock_sampling(pipe, plan)
    if stock is None:
        yield (
            "The schedulers of diffusers cannot take these steps by themselves, at these times with the right "
            "coefficients; the weights load in diffusers as they are."
        )
        return
    yield "With diffusers alone:"
    yield _block([*torch_import, *_stock_lines(pipe, export, stock, source, asked)])


def _stock_lines(pipe: Any, export: Export, stock: StockSampling, source: list[str], asked: list[str]) -> Iterator[str]:
    name, folder = type(pipe).__name__, export.folder.resolve().name
    classes = {name} if stock.scheduler is None else {name, stock.scheduler}
    before: list[str] = []
    if export.lora is None:
        network = type(getattr(pipe, export.component)).__name__
        classes.add(network)
        weights = [f'"{folder}"', f'subfolder="{export.component}"', *source[1:]]
        before = [f"{export.component} = {network}.from_pretrained({', '.join(weights)})"]
        source = [*source, f"{export.component}={export.component}"]
    yield from stock.imports
    yield f"from diffusers import {', '.join(sorted(classes))}"
    if export.lora is not None and export.lora.imports:
        yield export.lora.imports
    yield ""
    yield from before
    yield f"pipe = {name}.from_pretrained({', '.join(source)})"
    if export.lora is not None:
        yield _load_line(export.lora, folder)
    yield from stock.setup
    yield f"image = pipe({', '.join([*asked, *stock.arguments])}).images[0]"


def _load_line(lora: LoraFiles, folder: str) -> str:
    return lora.load.replace("FOLDER", folder)


def _source(base: str) -> str:
    """What ``from_pretrained`` takes; the demos are folders of fewstep's checkout."""
    return f"eval/demo/{base.removeprefix(PREFIX)}" if is_demo(base) else base


def _steps(plans: Mapping[int, Plan]) -> str:
    rows = []
    for number, (steps, plan) in enumerate(plans.items()):
        times = ", ".join(f"{time:g}" for time in getattr(plan.grid, "timesteps", ()))
        scheduler = getattr(plan.solver, "scheduler", "the pipeline's own")
        options = ", ".join(f"{key}={value!r}" for key, value in getattr(plan.solver, "config", {}).items())
        guidance = getattr(plan.guidance, "scale", None)
        shown = "the pipeline's own" if guidance is None else "off" if guidance <= 1 else f"{guidance:g}"
        file = PLAN_FILE if number == 0 else f"plan-{steps}.json"
        rows.append([str(steps), f"{scheduler}{f' ({options})' if options else ''}", times, shown, f"`{file}`"])
    return _table(["steps", "scheduler", "timesteps", "guidance", "plan"], rows)


def _measured(plans: Mapping[int, Plan]) -> Iterator[str]:
    found = [(steps, evidence) for steps, plan in plans.items() for evidence in plan.evidence]
    if not found:
        return
    yield "## Measured"
    rows = [
        [
            str(steps),
            each.metric,
            f"{each.value:.4g}" + (f" ± {each.se:.2g}" if each.se is not None else ""),
            f"{each.n:,}",
            each.against or "",
        ]
        for steps, each in found
    ]
    yield _table(["steps", "metric", "value ± standard error", "images", "against"], rows)
    commands = dict.fromkeys(each.command for _, each in found if each.command)
    if commands:
        yield "Measured by:"
        yield _block(commands, "shell")


def _training(training: Training) -> str:
    options, batch = training.options, training.options.global_batch(training.processes)
    lines = {
        "Began with the weights of": training.student,
        "Data": training.data,
        "Updates": f"{training.updates:,}",
        "Batch": f"{batch:,} samples ({training.processes} x {options.train_batch_size} x "
        f"{options.gradient_accumulation_steps}: processes, rows, accumulation)",
        "Learning rate": f"{options.learning_rate:g}, {options.lr_scheduler}, warmup {options.lr_warmup_steps}",
        "Optimizer": f"{options.optimizer}{', 8 bit' if options.use_8bit_adam else ''}, "
        f"betas {options.adam_beta1:g} and {options.adam_beta2:g}, weight decay {options.adam_weight_decay:g}",
        "Gradient norm": "not clipped" if options.max_grad_norm is None else f"at most {options.max_grad_norm:g}",
        "Mixed precision": training.precision,
        "Guidance of the teacher where the method says none": f"{training.guidance:g}",
        "Trained parameters": f"{training.trainable:,}",
        "Seed": str(options.seed),
        "Time": None if training.seconds is None else f"{training.seconds / 60:.0f} minutes",
    }
    return "\n".join(f"* {name}: {value}" for name, value in lines.items() if value is not None)


def _command(training: Training) -> Iterator[str]:
    if training.command is not None:
        yield _block([without_token(training.command)], "shell")


def _hyper_parameters(method: Method) -> str:
    values = method.model_dump(mode="json")
    rows = [
        [f"`{name}`", f"`{values[name]}`", info.description or ""]
        for name, info in type(method).model_fields.items()
        if name != "type"
    ]
    return _table(["name", "value", ""], rows)


def _paragraph(text: str | None) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((text or "").split("\n\n")[0].split())


def _versions() -> Iterator[str]:
    for name in PACKAGES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            continue


def _block(lines: Any, language: str = "python") -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "/") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _list_of(numbers: list[int]) -> str:
    *some, last = numbers
    return f"{', '.join(map(str, some))} and {_count(last, 'step')}" if some else _count(last, "step")
