"""A preflight: what a plan would do on a pipeline, before a step is spent; and a short run, when asked for."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from .attach import PlanWarning, attach
from .cache import CACHES, CachePart, count_timesteps
from .diagnosis import Diagnosis, Finding
from .errors import InputError
from .explicit import EXPLICIT, ExplicitSupport, explicit_support, grid_adapter
from .guidance_schedule import GuidanceSchedule
from .network import denoisers
from .part import Part, Run
from .plan import Plan
from .self_test import self_test

Arguments = Callable[[], Mapping[str, Any]]

DEFAULT_STEPS = 50
"Steps that are assumed where neither the plan nor the pipeline's call says a number."


def doctor(
    pipe: Any,
    plan: Plan | None = None,
    arguments: Arguments | None = None,
    resources: Mapping[str, Any] | None = None,
) -> Diagnosis:
    """Looks at a pipeline and a plan, changes nothing, and says what will run, what will not, and why.

    Args:
        pipe: a diffusers pipeline.
        plan: what to look at; None to see which caches, grids and guidance this pipeline can have.
        arguments: makes the arguments of one call of the pipeline, with fresh generators each time: then a self-test
            runs the plan (two steps, where it has no grid), at whatever size they ask for. Without, nothing is run.
        resources: as for `attach`.

    Returns:
        The report: ``print`` it, or look at ``.ok``, ``.findings`` and ``.to_json()``.
    """
    findings = _about_pipeline(pipe)
    if not findings:
        findings = _about_plan(pipe, plan, resources or {}) if plan else _about_possibilities(pipe)
        if plan and arguments and all(finding.verdict != "refused" for finding in findings):
            findings += self_test(pipe, plan, arguments, resources or {})
    return Diagnosis(type(pipe).__name__, plan.name if plan else None, tuple(findings))


def _about_pipeline(pipe: Any) -> list[Finding]:
    """Why nothing can be attached to the pipeline at all, if so."""
    if not hasattr(pipe, "components") or not hasattr(pipe, "scheduler"):
        return [Finding("pipeline", "refused", f"{type(pipe).__name__} is no diffusers pipeline with a scheduler")]
    if "_fewstep_attachment" in vars(pipe):
        return [Finding("pipeline", "refused", "a plan is attached to it; detach that one first")]
    try:
        denoisers(pipe)
    except InputError as error:
        return [Finding("pipeline", "refused", str(error))]
    return []


def _about_plan(pipe: Any, plan: Plan, resources: Mapping[str, Any]) -> list[Finding]:
    """Each part by itself, in the order of the plan; then all together."""
    run = Run(pipe, copy.deepcopy(pipe.scheduler), resources=resources, folder=plan.folder)
    known = frozenset(inspect.signature(type(pipe).__call__).parameters)
    findings = [_about_part(f"{slot}: {part.type}", part, run, known) for slot, part in plan.placed]
    if run.timesteps is not None:
        try:
            grid_adapter(run.scheduler, run.timesteps)
        except InputError as error:
            findings.append(Finding("grid", "refused", str(error)))
    if all(finding.verdict != "refused" for finding in findings):
        try:
            with warnings.catch_warnings(record=True) as notes:
                warnings.simplefilter("always", PlanWarning)
                attach(pipe, plan, resources).detach()
        except InputError as error:
            findings.append(Finding("plan", "refused", str(error)))
        else:
            findings += [Finding("plan", "note", str(note.message)) for note in notes]
    return findings


def _about_part(subject: str, part: Part, run: Run, known: frozenset[str]) -> Finding:
    try:
        noted = len(run.notes)
        part.prepare(run, known)
        if not isinstance(part, CachePart):
            return Finding(subject, "runs", "; ".join(run.notes[noted:]))
        return _about_cache(subject, part, run.pipe, count_timesteps(run) or _default_steps(run.pipe))
    except InputError as error:
        return Finding(subject, "refused", str(error))


def _about_cache(subject: str, part: CachePart, pipe: Any, steps: int) -> Finding:
    """How far a cache reaches, and when it computes."""
    modules = list(part.modules(pipe))
    reach = f"reaches {len(modules)} modules, {modules[0]} to {modules[-1]}"
    computes = part.computes(steps)
    if computes is None:
        return Finding(subject, "runs", f"{reach}; what computes is decided during the call")
    count = sum(computes)
    if count == steps:
        return Finding(subject, "refused", f"{reach}, but computes all of {steps} steps: it would never save anything")
    return Finding(subject, "runs", f"{reach}; computes {count} of {steps} steps in full")


def _default_steps(pipe: Any) -> int:
    """Number of steps of the pipeline's default call."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get("num_inference_steps")
    return parameter.default if parameter and isinstance(parameter.default, int) else DEFAULT_STEPS


def _about_possibilities(pipe: Any) -> list[Finding]:
    """What a plan for this pipeline could have."""
    name = type(pipe.scheduler).__name__
    support = next((s for s in explicit_support() if s.scheduler == name), None)
    findings = [_about_grid(name, support), _about_guidance(pipe)]
    for cache in CACHES.names():
        kind = CACHES[cache]
        assert issubclass(kind, CachePart)
        subject = f"caches: {cache}"
        try:
            findings.append(_about_cache(subject, kind.suggest(pipe, DEFAULT_STEPS), pipe, DEFAULT_STEPS))
        except InputError as error:
            findings.append(Finding(subject, "note", f"not here: {error}"))
    return findings


def _about_grid(name: str, support: ExplicitSupport | None) -> Finding:
    if name in EXPLICIT and support is not None:
        return Finding("grid: explicit", "runs", f"{name} runs any list of timesteps")
    reason = support.reason if support is not None else "fewstep does not know this scheduler"
    return Finding("grid: explicit", "note", f"not here: {name} runs its own grids only: {reason}")


def _about_guidance(pipe: Any) -> Finding:
    known = frozenset(inspect.signature(type(pipe).__call__).parameters)
    try:
        GuidanceSchedule(scale=2.0).prepare(Run(pipe, copy.deepcopy(pipe.scheduler)), known)
    except InputError as error:
        return Finding("guidance: guidance", "note", f"not here: {error}")
    return Finding("guidance: guidance", "runs", "takes a guidance scale; the self-test shows whether it has branches")
