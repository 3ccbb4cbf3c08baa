"""Learn2PD's filter, trained on decodings of one token a step, and the recipe that decodes with it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ...eval.tokens import Question, TokenModels
from ...samplers.errors import InputError
from ...samplers.tokens import (
    EosExit,
    FilterData,
    Fixed,
    Learned,
    Quota,
    Recipe,
    TokenFilter,
    decode,
    replay,
    train_filter,
)
from .candidates import Candidates, RecipeCandidate, unnamed
from .journal import Journal

PATH = "unmask.threshold"
"""What the candidates differ in."""


@dataclass(frozen=True)
class FilterTraining:
    """How a filter is trained.

    Attributes:
        length: positions of the blocks.
        gen_length: masks after each prompt.
        steps: of the optimiser, all data in each.
        lr: its rate.
        seed: of the initial weights.
    """

    length: int = 32
    gen_length: int = 64
    steps: int = 4000
    lr: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("length", "gen_length", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not 0 < self.lr < 1:
            raise InputError(f"lr must be between 0 and 1; got {self.lr:g}")


def filter_base(length: int) -> Recipe:
    """What a filter is used in unless another recipe is given: blocks of its length, up to the first end."""
    return Recipe(blocks=Fixed(length=length), unmask=Quota(tokens=1), exit=EosExit())


def filter_data(
    models: TokenModels,
    questions: Sequence[Question],
    base: Recipe,
    training: FilterTraining,
    *,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda count: None,
) -> FilterData:
    """What a filter learns from: questions decoded with the likeliest token, one a step, and replayed by an oracle.

    Args:
        models: the first of them that ``base`` works with is asked.
        questions: to train on.
        base: the recipe that the filter is for; its blocks are used.
        training: lengths.
        batch_size: questions at a time.
        progress: called with the number of questions that were decoded.

    Raises:
        InputError: when a block of ``base`` is longer than the filter.
    """
    network = models.denoisers[models.denoiser_for(base)]
    recipe = Recipe(blocks=base.blocks, unmask=Quota(tokens=1))
    parts = []
    for first in range(0, len(questions), batch_size):
        prompts = [models.ids(question.prompt) for question in questions[first : first + batch_size]]
        reference = decode(network, prompts, training.gen_length, recipe)
        parts.append(replay(network, prompts, reference, base.blocks, training.length))
        progress(len(prompts))
    return FilterData(
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("features", "final", "counted"))
    )


def fitted_filter(
    models: TokenModels,
    questions: Sequence[Question],
    base: Recipe,
    training: FilterTraining,
    file: Path,
    journal: Journal,
    *,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Trains a filter and writes its file, unless the journal says that the file is what this training made.

    Arguments as of `filter_data`; ``file`` is written atomically.
    """
    what = {
        "denoiser": models.denoiser_for(base),
        "blocks": base.blocks.model_dump(mode="json"),
        "training": asdict(training),
        "seeds": [question.seed for question in questions],
    }
    if (made := journal.made(what)) is not None and file.is_file() and _digest(file) == made:
        return
    data = filter_data(models, questions, base, training, batch_size=batch_size, progress=progress)
    network: TokenFilter = train_filter(data, steps=training.steps, lr=training.lr, seed=training.seed)
    network.save(file)
    journal.note(what, _digest(file))


def filter_candidates(base: Recipe, file: Path, length: int, thresholds: Sequence[float]) -> Candidates:
    """The recipe with a filter in the place of its unmask policy, at some thresholds.

    Args:
        base: the rest of the recipe; its name and evidence are left behind.
        file: of the filter; the recipes are beside it.
        length: of the filter.
        thresholds: probabilities of being final above which a token is committed.

    Raises:
        InputError: when a threshold is no probability, or the policy does not go with the rest of the recipe.
    """
    if wrong := [threshold for threshold in thresholds if not 0 <= threshold <= 1]:
        raise InputError(f"a threshold is a probability, 0 to 1; got {wrong[0]:g}")
    beside, recipes = unnamed(base).beside(file.parent), []
    for threshold in dict.fromkeys(thresholds):
        policy = Learned(file=file.name, length=length, threshold=threshold)
        recipes.append(RecipeCandidate(beside.replace(unmask=policy), {PATH: threshold}))
    return Candidates(tuple(recipes))


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
