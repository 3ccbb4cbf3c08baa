"""What a bench is told: one field for each flag of ``fewstep bench``."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ..samplers.errors import InputError, unknown_name
from .assets import Dtype
from .commandline import Flag, call_arguments

DEMO_N = 768
"""Images per row of the demo: what two cores score in under five minutes. The standard errors of Fréchet distances
hold from ten images per feature on, 1,280; the report says so."""

DEMO_ANSWERS = 128
"Answers per row of the token demo: sixteen of each task."

LEAST_SAMPLES = 8
"Fewest images or answers per row."

IMAGES_ONLY = (
    "steps",
    "reference",
    "reference_steps",
    "metrics",
    "net",
    "net_path",
    "reference_stats",
    "reference_images",
    "clip_path",
    "lpips_path",
    "prompts",
    "class_labels",
    "call_kwargs",
    "download",
)
ANSWERS_ONLY = ("gen_length", "questions")
"Flags that say nothing about token models, and about pipelines of images."

RESERVED_ARGUMENTS = {
    "generator": "it comes from --seed",
    "output_type": "only arrays are scored",
    "return_dict": "the result is read by name",
    "num_inference_steps": "the plans set it",
    "class_labels": "give --class_labels",
    "prompt": "give --prompts",
    "batch_size": "give --batch_size",
    "latents": "they come from --seed",
    "num_images_per_prompt": "each seed makes one image",
}


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """The flags of ``fewstep bench``."""

    pipe: Annotated[
        str, Flag("Folder of a pipeline or of token models, or a demo: demo:fashion-dit.", "PATH|demo:NAME")
    ] = "demo:fashion-dit"
    plans: Annotated[
        tuple[Path, ...], Flag("Plan files to compare; for token models recipes, or names of presets.", "PLAN")
    ] = ()
    out: Annotated[Path, Flag("Folder of the results; the same folder continues a stopped run.", "DIR")] = Path(
        "fewstep-bench"
    )
    n: Annotated[
        int | None, Flag(f"Images or answers per row; default: {DEMO_N} images, {DEMO_ANSWERS} answers.", "N")
    ] = None
    seed: Annotated[int, Flag("Seed of the first image or answer; number i has seed + i.")] = 0
    steps: Annotated[
        tuple[int, ...], Flag("Numbers of steps of the baselines, and of the plans that ship.", "STEPS")
    ] = (5, 10)
    reference: Annotated[
        Path | None, Flag("Plan of the reference row; default: the demo's, or the pipeline as it is.")
    ] = None
    reference_steps: Annotated[int, Flag("Steps of the reference where no plan says them.")] = 50
    metrics: Annotated[tuple[str, ...], Flag("Metrics to compute; default: all that can be.", "METRIC")] = ()
    net: Annotated[str | None, Flag("Feature network; default: the demo's own, none for other pipelines.")] = None
    net_path: Annotated[Path | None, Flag("Weights of the feature network, where it does not ship.")] = None
    reference_stats: Annotated[Path | None, Flag("Statistics of real images, as --reference_images wrote them.")] = None
    reference_images: Annotated[Path | None, Flag("Folder of real images to make the statistics from.", "DIR")] = None
    clip_path: Annotated[Path | None, Flag("CLIP folder for clip_score.", "DIR")] = None
    lpips_path: Annotated[Path | None, Flag("AlexNet weights (safetensors) for lpips.", "FILE")] = None
    prompts: Annotated[Path | None, Flag("Text file with one prompt a line.", "FILE")] = None
    class_labels: Annotated[
        tuple[int, ...], Flag("Labels to cycle through; default: all of the pipeline's.", "LABEL")
    ] = ()
    call_kwargs: Annotated[tuple[str, ...], Flag("Further arguments of the pipeline's call.", "KEY=VALUE")] = ()
    batch_size: Annotated[int, Flag("Images or answers per call; it does not change them.")] = 64
    timing_repeats: Annotated[int, Flag("Timed calls per row, after warm-up; of answers at least one a task.")] = 5
    gen_length: Annotated[int, Flag("Masks after each prompt of a token model.")] = 64
    questions: Annotated[
        Path | None,
        Flag("Questions for a token model, --n at least, one JSON object a line; default: the demo's tasks.", "FILE"),
    ] = None
    device: Annotated[str | None, Flag("cpu, cuda, cuda:1, ...; default: the best there is.")] = None
    dtype: Annotated[Dtype, Flag("Of weights and computation.")] = "float32"
    download: Annotated[bool, Flag("Whether weights may be fetched from a hub.")] = False

    def __post_init__(self) -> None:
        for name, least in (
            ("n", LEAST_SAMPLES),
            ("seed", 0),
            ("reference_steps", 1),
            ("batch_size", 1),
            ("timing_repeats", 1),
            ("gen_length", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name} must be at least {least}; got {value}")
        for value in self.steps:
            if value < 1:
                raise InputError(f"--steps must be at least 1; got {value}")
        if self.reference_stats is not None and self.reference_images is not None:
            raise InputError("--reference_stats and --reference_images exclude each other; give one")

    @property
    def images(self) -> int:
        """Images per row."""
        return DEMO_N if self.n is None else self.n

    @property
    def answers(self) -> int:
        """Answers per row."""
        return DEMO_ANSWERS if self.n is None else self.n

    def refuse(self, flags: Sequence[str], what: str) -> None:
        """Raises ``InputError`` when one of some flags was given that say nothing about ``what``."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        given = [f"--{name}" for name in flags if getattr(self, name) != defaults[name]]
        if given:
            raise InputError(f"{', '.join(given)}: not for {what}; leave {'it' if len(given) == 1 else 'them'} out")


def pipeline_arguments(pipe: Any, pairs: Sequence[str]) -> dict[str, Any]:
    """``key=value`` strings as arguments of a pipeline's call; values are JSON where possible, else strings.

    Raises:
        InputError: for an argument that the pipeline does not take, or that fewstep sets itself.
    """
    known = set(inspect.signature(pipe.__call__).parameters) - RESERVED_ARGUMENTS.keys()
    values = {}
    for key, text in call_arguments(pairs).items():
        if key in RESERVED_ARGUMENTS:
            raise InputError(f"--call_kwargs must not set {key}: {RESERVED_ARGUMENTS[key]}")
        if key not in known:
            raise unknown_name(f"argument of {type(pipe).__name__}", key, known)
        values[key] = _json_or_text(text)
    return values


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
