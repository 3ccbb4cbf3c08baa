"""``fewstep search recipe`` and ``token-filter``: how to decode tokens, chosen on questions and tried on others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rich.console import Console

from ..eval.bench import process_state
from ..eval.tokens import Answer, TokenModels, answers, load_token_models
from ..eval.tokens.rows import read_recipes
from ..eval.tokens.tasks import QuestionSource, question_source
from ..samplers.tokens import Recipe
from ..search.tokens import (
    REFERENCE,
    Candidates,
    FilterTraining,
    FoundRecipe,
    Journal,
    Tally,
    TokenLimit,
    TokenObjective,
    Variation,
    filter_base,
    filter_candidates,
    fitted_filter,
    search_recipe,
    vary,
)
from .plan_search_command import copy_files
from .search_options import FilterOptions, RecipeOptions, TokenOptions

SHOWN = 20
"Most candidates on the console; the file beside the recipe has all."

STATES = {
    "chosen": "chosen",
    "complete": "beyond a limit, or dearer",
    "limit": "beyond a limit",
    "waiting": "dearer",
}

FILE_ORDER = 0
"Seed of the order of a file's questions, so that both halves have questions of each task."


@dataclass(frozen=True)
class TokenSetting:
    """What every search on token models works with.

    Attributes:
        models: that are asked.
        questions: that they are asked.
        objective: what is searched for.
        reference: what its limits may be multiples of.
        journal: of what was measured.
    """

    models: TokenModels
    questions: QuestionSource
    objective: TokenObjective
    reference: Recipe
    journal: Journal
    console: Console
    command: str

    @classmethod
    def of(cls, options: TokenOptions, command: str) -> TokenSetting:
        """Loads the models and the questions of the options."""
        limits = tuple(map(TokenLimit.parse, options.limits))
        objective = TokenObjective(options.objective, limits) if limits else TokenObjective(options.objective)
        reference = REFERENCE if options.reference is None else named_recipe(options.reference)
        questions = question_source(options.pipe, options.questions, FILE_ORDER)
        device = options.device or str(process_state(None).device)
        models = load_token_models(options.pipe, dtype=options.dtype, device=device)
        setting = {
            "models": models.prints,
            "dtype": options.dtype,
            "gen_length": options.gen_length,
            "questions": [line.model_dump(mode="json") for line in questions.lines],
        }
        return cls(
            models=models,
            questions=questions,
            objective=objective,
            reference=reference,
            journal=Journal(options.out.with_suffix(".trials.json"), setting),
            console=Console(),
            command=command,
        )

    def search(
        self, candidates: Candidates, options: TokenOptions, seed: int, progress: Callable[..., None]
    ) -> FoundRecipe:
        """Chooses among candidates on questions of seeds from ``seed`` on, and tells of it."""

        def answering(recipe: Recipe, seeds: range) -> list[Answer]:
            return answers(
                self.models, self.questions(seeds), recipe, options.gen_length, batch_size=options.batch_size
            )

        found = search_recipe(
            candidates,
            self.objective,
            answering,
            n=options.n,
            seed=seed,
            reference=self.reference,
            journal=self.journal,
            progress=progress,
            command=self.command,
        )
        tell(found, self.console)
        return found


def named_recipe(name: str) -> Recipe:
    """The recipe of a file, or the preset of that name.

    Raises:
        InputError: when there is neither.
    """
    [(_, recipe)] = read_recipes((), (Path(name),))
    return recipe


def search_for_recipe(setting: TokenSetting, options: RecipeOptions, progress: Callable[..., None]) -> Recipe:
    """The best of the variations of a recipe; the files that it names go beside it."""
    setting.questions.check_supply(options.n, 2)
    candidates = vary(named_recipe(options.recipe), list(map(Variation.parse, options.vary)))
    found = setting.search(candidates, options, options.seed, progress).recipe
    copy_files(found, options.out.parent)
    return found


def search_for_filter(setting: TokenSetting, options: FilterOptions, progress: Callable[..., None]) -> Recipe:
    """The recipe with a filter that was trained on the first ``n`` questions, its threshold chosen on the next."""
    setting.questions.check_supply(options.n, 3)
    training = FilterTraining(options.length, options.gen_length, options.steps, options.lr, options.train_seed)
    base = filter_base(options.length) if options.recipe is None else named_recipe(options.recipe)
    file = options.out.with_name(f"{options.out.stem}.filter.safetensors")
    candidates = filter_candidates(base, file, options.length, options.thresholds)
    questions = setting.questions(range(options.seed, options.seed + options.n))
    decoded = 0

    def decoding(count: int) -> None:
        nonlocal decoded
        decoded += count
        progress(decoded, options.n, "questions to train on")

    fitted_filter(
        setting.models,
        questions,
        base,
        training,
        file,
        setting.journal,
        batch_size=options.batch_size,
        progress=decoding,
    )

    def choosing(done: int, total: int, note: str) -> None:
        progress(decoded + done, decoded + total, note)

    return setting.search(candidates, options, options.seed + options.n, choosing).recipe


def tell(found: FoundRecipe, console: Console) -> None:
    """Prints the candidates, what was refused, and the chosen recipe at search and on fresh questions."""
    objective = found.objective

    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    ranked = sorted(found.trials, key=lambda trial: (-trial.tally.n, trial.tally.estimate(objective.cost).value))
    for trial in ranked[:SHOWN]:
        line(f"{trial.candidate.title}: {_shown(trial.tally, objective)} ({STATES[trial.state]})")
    for reason, same in groupby(sorted(found.refused, key=lambda each: each.reason), key=lambda each: each.reason):
        first, *others = same
        line(f"refused: {first.title}{f' and {len(others)} more' if others else ''}: {reason}")
    if found.merged:
        line(f"{found.merged} candidates were the same as others")
    line(f"chosen at search: {_shown(found.chosen.tally, objective)}")
    line(f"on fresh questions: {_shown(found.fresh, objective)}")
    line("excess: " + ", ".join(f"{name} {found.excess(name):+.4g}" for name in objective.quantities))
    if found.reference_fresh is not None:
        line(f"the reference on fresh questions: {_shown(found.reference_fresh, objective)}")
    if not found.holds:
        line(f"on fresh questions it does not keep to {', '.join(map(str, objective.limits))}")


def _shown(tally: Tally, objective: TokenObjective) -> str:
    estimates = {name: tally.estimate(name) for name in objective.quantities}
    shown = (f"{name} {estimate.value:.4g} +- {estimate.se:.2g}" for name, estimate in estimates.items())
    return f"{', '.join(shown)} of {tally.n}"
