"""``fewstep doctor``: what a plan would do on a pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from ..eval.assets import Dtype, load_pipeline
from ..eval.bench import process_state
from ..eval.commandline import Flag, options_parser, read_options
from ..eval.conditions import conditions_for
from ..eval.options import pipeline_arguments
from ..samplers import doctor
from .plans_command import find_plan

SAMPLES = 2
"Samples of the self-test."


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """The flags of ``fewstep doctor``."""

    pipe: Annotated[str, Flag("Pipeline folder, or a demo such as demo:fashion-dit.", "PATH|demo:NAME")] = (
        "demo:fashion-dit"
    )
    plan: Annotated[
        str | None, Flag("Plan file, or a name that `fewstep plans ls` lists; default: what could be.", "PLAN")
    ] = None
    self_test: Annotated[bool, Flag("Also run the plan: two samples, two steps where it has no grid.")] = False
    call_kwargs: Annotated[
        tuple[str, ...], Flag("Further arguments of the self-test's call, such as height=64.", "KEY=VALUE")
    ] = ()
    json: Annotated[bool, Flag("Print JSON.")] = False
    device: Annotated[str | None, Flag("cpu, cuda, cuda:1, ...; default: the best there is.")] = None
    dtype: Annotated[Dtype, Flag("Of weights and computation.")] = "float32"
    download: Annotated[bool, Flag("Whether weights may be fetched from a hub.")] = False


def doctor_parser() -> ArgumentParser:
    """The flags of ``fewstep doctor``."""
    return options_parser(
        DoctorOptions, "Say what will run on a pipeline, what will not, and why. The exit status is 1 for a bad plan."
    )


def run_doctor_command(parsed: Namespace, command: str) -> int:
    """Prints the report; returns 0 when nothing is refused, and 1 otherwise."""
    options = read_options(DoctorOptions, parsed)
    plan = find_plan(options.plan) if options.plan else None
    device = options.device or str(process_state(None).device)
    pipe = load_pipeline(options.pipe, dtype=options.dtype, device=device, download=options.download)
    conditions = conditions_for(pipe) if options.self_test else None
    call_kwargs = pipeline_arguments(pipe, options.call_kwargs)

    def arguments() -> Mapping[str, Any]:
        assert conditions is not None
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(SAMPLES)]
        return {**conditions.inputs(range(SAMPLES)), **call_kwargs, "generator": generators, "output_type": "np"}

    report = doctor(pipe, plan, arguments if options.self_test else None)
    console = Console()
    if options.json:
        console.print_json(json.dumps(report.to_json()))
    else:
        console.print(report)
    return 0 if report.ok else 1
