"""``fewstep search plan``: the search for a whole plan, its report, and its files."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..eval.assets import plan_file, reference_plan
from ..eval.baselines import baseline_rows
from ..samplers import InputError, Plan, RuleGrid, SpacingGrid, denoisers, fingerprint
from ..samplers.document import Document
from ..samplers.files import atomic_path
from ..search import PRESETS, Judges, Limit, Objective, SearchSetting, Space, search, write_search_report
from ..search.optuna_samplers import STOPS_NONE
from ..search.presets import Beginning, preset_space, suggested_starts
from ..search.space import plan_key
from .search_options import PlanOptions
from .search_setting import Setting, judges_of

REFERENCE_STEPS = 50

RIVALS = ("dpmpp-2m", "unipc", "flow-euler")
"Baselines of a bench that the plan found is compared with."


def search_for_plan(setting: Setting, options: PlanOptions, progress: Callable[..., None]) -> Plan:
    """Searches, writes ``found.json`` and ``report.html`` into the folder of the study, and returns the plan.

    Raises:
        InputError: for flags that contradict each other or the pipeline.
    """
    pipe, preset, judges = setting.pipe, PRESETS[options.preset], judges_of(options)
    reference = reference_plan(options.pipe, REFERENCE_STEPS)
    base = _base(setting, options, reference)
    steps = base.nominal_steps
    if steps is None:
        raise InputError("--steps is needed, or a --plan with a grid")
    space = (
        Space.of(pipe, base, [name.strip() for name in options.space.split(",")])
        if options.space
        else preset_space(pipe, base, preset)
    )
    beginning = _beginning(setting, options, space, steps) if preset.suggests else Beginning(())
    rivals = _rivals(pipe, base, steps)
    found = search(
        pipe,
        space,
        _objective(options, judges),
        setting.call,
        SearchSetting(
            storage=options.storage or str(options.folder),
            trials=options.trials or preset.trials,
            seed=options.search_seed,
            sampler=_sampler(options),
            confirm=options.confirm,
            fresh_n=options.fresh_n,
            batch_size=options.batch_size,
            first_seed=options.seed,
            key={"preset": options.preset, "conditions": setting.conditions.to_json(), "call": setting.call_kwargs},
        ),
        judges=judges,
        teacher=Plan.load(plan_file(options.teacher)) if options.teacher else reference,
        also=options.also,
        starts=[*map(Plan.load, map(plan_file, options.starts)), *beginning.plans],
        baselines=rivals,
        progress=progress,
        command=setting.command,
    )
    found = replace(found, spent=found.spent + beginning.rows, settings={"pipe": options.pipe} | found.settings)
    found.save(options.folder / "found.json")
    report = write_search_report(options.folder / "report.html", found)
    copy_files(found.plan, options.out.parent)
    setting.console.print(str(report), highlight=False, soft_wrap=True)
    return found.plan


def _beginning(setting: Setting, options: PlanOptions, space: Space, steps: int) -> Beginning:
    """The plans that the preset begins with; those of an earlier sitting of the search where there was one."""
    weights = fingerprint(next(iter(denoisers(setting.pipe).values())))
    axes, conditions = [axis.name for axis in space.axes], setting.conditions.to_json()
    known = [weights, plan_key(space.base), axes, steps, setting.seed, conditions, setting.call_kwargs]
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
    path = options.folder / f"starts-{digest}.json"
    if path.is_file():
        return Beginning.load(path)
    beginning = suggested_starts(setting.pipe, space, setting.call, steps)
    beginning.save(path)
    return beginning


def _rivals(pipe: Any, base: Plan, steps: int) -> dict[str, Plan]:
    """Baselines of a bench that the plan found is compared with, and the second of them on Karras' sigmas."""
    found = {row.name: row.plan for row in baseline_rows(pipe, base, [steps]) if row.name.rsplit("-", 1)[0] in RIVALS}
    unipc = found.get(f"unipc-{steps}")
    if unipc is not None:
        karras = {"grid": RuleGrid(rule="karras", steps=steps)}
        found[f"unipc-karras-{steps}"] = unipc.model_copy(update=karras | {"name": f"unipc-karras-{steps}"})
    return found


def copy_files(document: Document, folder: Path) -> None:
    """Copies the files that a plan or a recipe names from beside it into a folder."""
    for name in document.file_digests():
        if document.folder is not None and (source := document.folder / name) != (folder / name).resolve():
            with atomic_path(folder / name) as path:
                shutil.copyfile(source, path)


def _base(setting: Setting, options: PlanOptions, reference: Plan) -> Plan:
    """The plan to begin with, in the number of steps that was asked for."""
    base = setting.plan if options.plan else reference
    if options.steps is not None and (options.plan is None or base.nominal_steps != options.steps):
        spaced = "timestep_spacing" in setting.pipe.scheduler.config
        grid = SpacingGrid(steps=options.steps, spacing="trailing" if spaced else None)
        return base.model_copy(update={"grid": grid})
    return base if options.plan else base.model_copy(update={"grid": None})


def _objective(options: PlanOptions, judges: Judges) -> Objective:
    quality = options.objective or ("fd" if judges.real is not None else "relative_error")
    least = 2 * judges.net.dim if quality == "fd" and judges.net is not None else 8
    first = max(options.n // 4, least)
    stops = options.cost is None and _sampler(options) not in STOPS_NONE and first < options.n
    return Objective(
        quality, options.cost, tuple(map(Limit.parse, options.limits)), (first, options.n) if stops else (options.n,)
    )


def _sampler(options: PlanOptions) -> str | None:
    """The sampler that was asked for, or the preset's; None leaves it to two objectives."""
    return options.sampler or (PRESETS[options.preset].sampler if options.cost is None else None)
