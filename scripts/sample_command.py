"""``fewstep sample``: a few images with a plan, as one picture."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from jsonargparse import ArgumentParser, Namespace
from PIL import Image
from rich.console import Console
from torch import Tensor

from ..eval.assets import Dtype, load_pipeline, plan_file
from ..eval.bench import process_state
from ..eval.commandline import Flag, options_parser, read_options
from ..eval.conditions import conditions_for
from ..eval.generate import sample_images
from ..eval.options import pipeline_arguments
from ..samplers import Plan, PlanWarning, SpacingGrid, Stats, attach
from ..samplers.errors import InputError
from ..samplers.files import atomic_path


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """The flags of ``fewstep sample``."""

    pipe: Annotated[str, Flag("Pipeline folder, or a demo such as demo:fashion-dit.", "PATH|demo:NAME")] = (
        "demo:fashion-dit"
    )
    plan: Annotated[Path | None, Flag("Plan file; default: the pipeline as it is.")] = None
    steps: Annotated[int | None, Flag("Number of steps, for a plan without a grid.")] = None
    out: Annotated[Path, Flag("PNG file to write.", "FILE")] = Path("grid.png")
    n: Annotated[int, Flag("Number of images.")] = 16
    seed: Annotated[int, Flag("Seed of the first image; image i has seed + i.")] = 0
    prompts: Annotated[Path | None, Flag("Text file with one prompt a line.", "FILE")] = None
    class_labels: Annotated[
        tuple[int, ...], Flag("Labels to cycle through; default: all of the pipeline's.", "LABEL")
    ] = ()
    call_kwargs: Annotated[tuple[str, ...], Flag("Further arguments of the pipeline's call.", "KEY=VALUE")] = ()
    batch_size: Annotated[int, Flag("Images per call; it does not change them.")] = 16
    device: Annotated[str | None, Flag("cpu, cuda, cuda:1, ...; default: the best there is.")] = None
    dtype: Annotated[Dtype, Flag("Of weights and computation.")] = "float32"
    download: Annotated[bool, Flag("Whether weights may be fetched from a hub.")] = False

    def __post_init__(self) -> None:
        for name, least in (("n", 1), ("seed", 0), ("batch_size", 1), ("steps", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name} must be at least {least}; got {value}")
        if self.out.suffix.lower() != ".png":
            raise InputError(f"--out {self.out} is not a PNG file; give a name that ends in .png")


def sample_parser() -> ArgumentParser:
    """The flags of ``fewstep sample``."""
    return options_parser(SampleOptions, "Make images with a plan, in one PNG file.")


def run_sample_command(parsed: Namespace, command: str) -> None:
    """Samples, writes the grid, and prints what the calls did."""
    options = read_options(SampleOptions, parsed)
    plan = chosen_plan(options)
    device = options.device or str(process_state(None).device)
    pipe = load_pipeline(options.pipe, dtype=options.dtype, device=device, download=options.download)
    conditions = conditions_for(pipe, class_labels=options.class_labels, prompts=options.prompts)
    call_kwargs = pipeline_arguments(pipe, options.call_kwargs)
    console = Console()
    with warnings.catch_warnings(action="ignore", category=PlanWarning), attach(pipe, plan) as handle:
        seeds = list(range(options.seed, options.seed + options.n))
        batches = [seeds[i : i + options.batch_size] for i in range(0, options.n, options.batch_size)]
        images = torch.cat([sample_images(pipe, conditions, batch, call_kwargs)[0] for batch in batches])
    write_grid(images, options.out)
    if handle.stats is not None:
        console.print(describe(handle.stats), highlight=False)
    console.print(str(options.out), highlight=False, soft_wrap=True)


def chosen_plan(options: SampleOptions) -> Plan:
    """The plan of the options, with ``--steps`` as its grid.

    Raises:
        InputError: when the plan has a grid of its own as well.
    """
    plan = Plan.load(plan_file(options.plan)) if options.plan else Plan()
    if options.steps is None:
        return plan
    if plan.grid is not None:
        raise InputError(f"--steps {options.steps}: {options.plan} has a grid of its own; leave --steps out")
    return plan.model_copy(update={"grid": SpacingGrid(steps=options.steps)})


def write_grid(images: Tensor, path: Path) -> None:
    """Writes uint8 images (n, C, H, W) side by side as a PNG file, complete or not at all; C is 1 or 3."""
    count, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = torch.zeros(rows * columns, channels, height, width, dtype=torch.uint8)
    grid[:count] = images
    picture = grid.reshape(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    pixels = picture.reshape(rows * height, columns * width, channels).squeeze(-1).numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def describe(stats: Stats) -> str:
    """What a call did, in a few lines."""
    nfe, steps = stats.nfe, [f"{step.timestep:g}" for step in stats.steps]
    lines = [
        f"{nfe:g} network evaluation{'s' * (nfe != 1)} per image in {len(steps)} step{'s' * (len(steps) != 1)}",
        f"timesteps: {', '.join(steps)}",
    ]
    return "\n".join([*lines, *(f"warning: {sentence}" for sentence in stats.warnings)])
