"""Where pipelines, the demo's plans and its statistics are, and how a pipeline is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging

from ..samplers import Plan
from ..samplers.errors import InputError, unknown_name

DEMO = Path(__file__).parent / "demo"
"The folder of everything that ships with the demo."

PREFIX = "demo:"

DEMO_TOKENS = "demo:tokens"
"Token models that ship, which are no pipeline."

Dtype = Literal["float32", "float16", "bfloat16"]

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def demo_names() -> list[str]:
    """Names of the pipelines that ship, as ``demo:NAME``."""
    return sorted(PREFIX + path.parent.name for path in DEMO.glob("*/model_index.json"))


def is_demo(spec: str) -> bool:
    """Whether ``spec`` names a pipeline that ships."""
    return spec.startswith(PREFIX)


def resolve_pipe(spec: str) -> Path:
    """The folder of a pipeline.

    Args:
        spec: the path of a diffusers pipeline folder, or ``demo:NAME``.

    Raises:
        InputError: when there is no such folder, it is no pipeline, or its weights are pickles only.
    """
    if is_demo(spec):
        if spec == DEMO_TOKENS:
            raise InputError(f"{spec} holds token models and no pipeline; give it to fewstep bench or search recipe")
        if spec not in demo_names():
            raise unknown_name("demo", spec, [*demo_names(), DEMO_TOKENS])
        return DEMO / spec.removeprefix(PREFIX)
    folder = Path(spec)
    if not folder.is_dir():
        raise InputError(
            f"--pipe {spec} is not a folder; give a diffusers pipeline folder "
            f"or one of {', '.join(demo_names())}, or allow the download of a hub repository with --download true"
        )
    if not (folder / "model_index.json").is_file():
        raise InputError(
            f"--pipe {spec} is not a diffusers pipeline (it holds no model_index.json); "
            "give the folder that save_pretrained wrote"
        )
    if not any(folder.rglob("*.safetensors")) and any(_pickles(folder)):
        raise InputError(
            f"--pipe {spec} holds pickled weights only ({next(_pickles(folder)).name}), which can run code "
            "when loaded; convert it with save_pretrained(safe_serialization=True)"
        )
    return folder


def _pickles(folder: Path) -> Iterator[Path]:
    return (path for pattern in _PICKLES for path in folder.rglob(pattern))


def load_pipeline(
    spec: str, *, dtype: Dtype = "float32", device: str = "cpu", download: bool = False
) -> DiffusionPipeline:
    """Loads a diffusers pipeline from safetensors, in inference mode and without progress bars.

    Args:
        spec: a pipeline folder, ``demo:NAME``, or with ``download`` a hub repository.
        dtype: of the weights and of the computation.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...
        download: whether diffusers may fetch ``spec`` from the hub.

    Raises:
        InputError: naming what is wrong with the folder, the dtype or the device.
    """
    hub = download and not is_demo(spec) and not Path(spec).is_dir()
    source = spec if hub else str(resolve_pipe(spec))
    try:
        with _quiet(is_demo(spec)):
            pipe = DiffusionPipeline.from_pretrained(
                source, dtype=torch_dtype(dtype), use_safetensors=True, local_files_only=not hub
            )
        pipe = pipe.to(device)
    except (OSError, ValueError, RuntimeError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--pipe {spec} cannot be loaded on {device}: {reason[:300]}") from error
    pipe.set_progress_bar_config(disable=True)
    return cast(DiffusionPipeline, pipe)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called ``name``.

    Raises:
        InputError: for a name other than those of `Dtype`.
    """
    if name not in get_args(Dtype):
        raise unknown_name("dtype", name, get_args(Dtype))
    return cast(torch.dtype, getattr(torch, name))


@contextmanager
def _quiet(known: bool) -> Iterator[None]:
    """Loading bars off, and back to what they were; for a ``known`` pipeline the warnings of diffusers too.

    Diffusers warns of the type of ``id2label`` in every DiT: JSON has no integer keys.
    """
    enabled, verbosity = diffusers_logging.is_progress_bar_enabled(), diffusers_logging.get_verbosity()
    diffusers_logging.disable_progress_bar()
    if known:
        diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)
        if enabled:
            diffusers_logging.enable_progress_bar()


def plan_folder(spec: str) -> Path | None:
    """The folder of the plans that ship for a demo pipeline, None for any other pipeline."""
    return DEMO / "plans" / spec.removeprefix(PREFIX) if is_demo(spec) else None


def shipped_plans(spec: str) -> list[Path]:
    """Plan files that ship for a demo pipeline, without the reference; empty for any other pipeline."""
    folder = plan_folder(spec)
    return sorted(p for p in folder.glob("*.json") if p.name != "reference.json") if folder else []


def named_plans() -> dict[str, Path]:
    """Files of all plans that ship for the demo's pipelines, references included, by the name ``DEMO/STEM``."""
    named: dict[str, Path] = {}
    for spec in demo_names():
        folder = DEMO / "plans" / spec.removeprefix(PREFIX)
        references = [path for path in (folder / "reference.json",) if path.is_file()]
        named |= {f"{folder.name}/{path.stem}": path for path in (*references, *shipped_plans(spec))}
    return named


def plan_file(name: str | Path) -> Path:
    """The file of a plan: of one that ships by its name, such as ``fashion-dit/5-step``, else the path itself.

    Raises:
        InputError: when it is neither, or a folder.
    """
    return file_of("plan", name, named_plans())


def file_of(what: str, name: str | Path, known: Mapping[str, Path], others: Sequence[str] = ()) -> Path:
    """The file of a known name, or the path that was given instead.

    Args:
        what: is looked for, as the error says it.
        name: the name or the path.
        known: files by name.
        others: names to suggest beside these.

    Raises:
        InputError: when it is neither, or a folder.
    """
    path = Path(name)
    if path.as_posix() in known:
        return known[path.as_posix()]
    if path.is_dir():
        raise InputError(f"{name} is a folder; give a plan file, such as {path / 'plan.json'}")
    if not path.exists() and path.suffix != ".json":
        raise unknown_name(what, str(name), [*known, *others])
    return path


def reference_plan(spec: str, steps: int) -> Plan:
    """The plan others are compared with: the demo's own, else the pipeline as it is in ``steps`` steps."""
    folder = plan_folder(spec)
    if folder and (folder / "reference.json").is_file():
        return Plan.load(folder / "reference.json")
    return Plan.from_json(
        {"fewstep_plan": 1, "name": f"reference-{steps}", "grid": {"type": "spacing", "steps": steps}}
    )


def component_modules(pipe: Any) -> dict[str, torch.nn.Module]:
    """The pipeline's networks by the name of their component."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
