"""``fewstep search``: plans whose parts are fitted to a pipeline, and recipes for token models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from ..eval.assets import plan_file
from ..eval.commandline import options_parser, read_options
from ..eval.progress import meter
from ..eval.scorers import SCORERS
from ..samplers import Plan, SpacingGrid, denoisers
from ..samplers.analytic_init import AnalyticInit, estimate_start_statistics
from ..samplers.build_knowledge import build_knowledge_base
from ..samplers.errors import InputError
from ..samplers.escalate import Escalate, calibrate_escalation
from ..samplers.redi import ReDi
from ..samplers.tokens import Recipe
from ..search.adaptive import RewardRule, search_adaptive
from ..search.aligner import fit_aligner
from ..search.budget import Budget
from ..search.cache import FRESH, search_cache
from ..search.router import HARMONICA, LEARNING_TO_CACHE, RouterTraining, train_router
from .plan_search_command import search_for_plan
from .recipe_search_command import TokenSetting, search_for_filter, search_for_recipe
from .search_options import (
    ACTIONS,
    AdaptiveOptions,
    AlignerOptions,
    CacheOptions,
    EscalateOptions,
    KnowledgeOptions,
    PlanOptions,
    RouterOptions,
    StartOptions,
)
from .search_setting import BATCH, Setting, judges_of


def search_parser() -> ArgumentParser:
    """The parser of ``fewstep search``, still without its actions."""
    return ArgumentParser(
        description="Find a plan for a pipeline or a recipe for token models, or fit a part of one.",
        exit_on_error=False,
    )


def add_search_actions(parser: ArgumentParser) -> None:
    """Adds the actions of ``fewstep search``, which jsonargparse wants after their parser was added itself."""
    commands = parser.add_subcommands(dest="action", metavar="ACTION", required=True)
    for name, (options, text) in ACTIONS.items():
        commands.add_subcommand(name, options_parser(options, f"{text[0].upper()}{text[1:]}."), help=text)


def run_search_command(parsed: Namespace, command: str) -> None:
    """Runs the chosen search and writes its plan or recipe, complete or not at all."""
    options = read_options(ACTIONS[parsed.action][0], parsed[parsed.action])
    opened, run = RUN[parsed.action]
    setting = opened(options, command)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with meter(setting.console, shown=True) as bar:
        bar.doing(parsed.action)
        shown = expected = 0

        def progress(done: int, total: int, note: float | str | None = None) -> None:
            nonlocal shown, expected
            bar.expect(total - expected)
            if isinstance(note, str):
                bar.doing(note)
            bar.advance(done - shown)
            shown, expected = done, total

        found = run(setting, options, progress)
    found.model_copy(update={"name": found.name or options.out.stem}).save(options.out)
    setting.console.print(str(options.out), highlight=False, soft_wrap=True)


def _plan(setting: Setting, options: PlanOptions, progress: Callable[..., None]) -> Plan:
    return search_for_plan(setting, options, progress)


def _aligner(setting: Setting, options: AlignerOptions, progress: Callable[..., None]) -> Plan:
    samples = setting.samples(options.n, options.teacher, setting.plan.guidance)
    return fit_aligner(
        setting.pipe,
        setting.plan,
        samples=samples,
        mode=options.mode,
        iterations=options.iterations,
        batch=min(BATCH, options.n),
        lr=options.lr,
        seed=options.seed,
        call=lambda numbers: setting.conditions.inputs(numbers) | setting.call_kwargs,
        progress=progress,
    )


def _cache(setting: Setting, options: CacheOptions, progress: Callable[..., None]) -> Plan:
    found = search_cache(
        setting.pipe,
        setting.plan,
        options.cache,
        Budget.parse(options.budget),
        setting.call,
        options.n,
        judges=judges_of(options),
        batch_size=BATCH,
        seeds=(options.seed + FRESH, options.seed + FRESH + options.n),
        progress=progress,
    )
    for trial in found.trials:
        seeds = "fresh seeds" if trial.fresh else "seeds to choose on"
        setting.console.print(
            f"{trial.part.model_dump_json(exclude_defaults=True)}: {trial.value.value:.4g} +- {trial.value.se:.2g} on "
            f"{seeds}, {100 * trial.skipped:.0f} % skipped",
            highlight=False,
            soft_wrap=True,
        )
    return found.plan


def _router(setting: Setting, options: RouterOptions, progress: Callable[..., None]) -> Plan:
    training = RouterTraining(
        penalty=options.penalty,
        iterations=max(1, options.n // options.batch_size),
        batch_size=options.batch_size,
        lr=options.lr,
        threshold=options.threshold,
        recipe={"harmonica": HARMONICA, "learning-to-cache": LEARNING_TO_CACHE}[options.method],
    )
    call = setting.call
    return train_router(
        setting.pipe,
        setting.plan,
        lambda numbers: call(numbers) | {"output_type": "np"},
        options.out.parent,
        training,
        progress,
    )


def _adaptive(setting: Setting, options: AdaptiveOptions, progress: Callable[..., None]) -> Plan:
    return search_adaptive(
        setting.pipe,
        setting.plan,
        [SpacingGrid(steps=steps, spacing=options.spacing) for steps in sorted(options.steps)],
        SCORERS[options.scorer].load(options.net, options.net_path),
        setting.call,
        options.n,
        options.out.parent,
        reward=RewardRule(options.top, options.weight, options.penalty),
        batch_size=BATCH,
        progress=progress,
    )


def _escalate(setting: Setting, options: EscalateOptions, progress: Callable[..., None]) -> Plan:
    if options.teacher is None:
        raise InputError("--teacher is needed: a plan, with a grid, that finishes rejected samples")
    part = Escalate(teacher=Plan.load(plan_file(options.teacher)).to_json(), strength=options.strength, threshold=0.0)
    return calibrate_escalation(
        setting.pipe,
        setting.plan.model_copy(update={"models": part}),
        SCORERS[options.scorer].load(options.net, options.net_path),
        setting.call,
        options.n,
        options.percentile,
        batch_size=BATCH,
    )


def _start(setting: Setting, options: StartOptions, progress: Callable[..., None]) -> Plan:
    samples = setting.samples(options.n, options.teacher, setting.plan.guidance)
    part = AnalyticInit(file=f"{options.out.stem}.start.safetensors")
    network = next(iter(denoisers(setting.pipe).values()))
    estimate_start_statistics(samples, network).save(options.out.with_name(part.file))
    return setting.plan.model_copy(update={"start": part})


def _knowledge(setting: Setting, options: KnowledgeOptions, progress: Callable[..., None]) -> Plan:
    if not isinstance(setting.plan.start, ReDi):
        raise InputError("--plan is needed: a plan whose start is a redi part")
    part = setting.plan.start.model_copy(update={"file": f"{options.out.stem}.knowledge.safetensors"})
    plan = setting.plan.model_copy(update={"start": part})
    build_knowledge_base(setting.pipe, plan, setting.calls(options.n)).save(options.out.with_name(part.file))
    return plan


ON_PIPELINES: dict[str, Callable[[Setting, Any, Callable[..., None]], Plan]] = {
    "plan": _plan,
    "aligner": _aligner,
    "cache": _cache,
    "router": _router,
    "adaptive": _adaptive,
    "escalate": _escalate,
    "start": _start,
    "knowledge": _knowledge,
}

ON_TOKENS: dict[str, Callable[[TokenSetting, Any, Callable[..., None]], Recipe]] = {
    "recipe": search_for_recipe,
    "token-filter": search_for_filter,
}

RUN: dict[str, tuple[Callable[[Any, str], Any], Callable[..., Plan | Recipe]]] = {
    **{name: (Setting.of, run) for name, run in ON_PIPELINES.items()},
    **{name: (TokenSetting.of, run) for name, run in ON_TOKENS.items()},
}
"""By action: what opens the setting for the options and the command line, and what searches in it."""


def with_action(arguments: Sequence[str]) -> list[str]:
    """The words of a command line, with the action ``plan`` where ``search`` is followed by a flag or by nothing."""
    words = list(arguments)
    if words[:1] == ["search"] and (len(words) == 1 or (words[1].startswith("-") and words[1] not in ("-h", "--help"))):
        words.insert(1, "plan")
    return words
