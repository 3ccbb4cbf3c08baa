"""The rows of a bench of token models: baselines, the literature, what the user gives, and static controls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...samplers.errors import InputError
from ...samplers.tokens import RECIPES, DecodeState, DenoiserSpec, EosExit, EotExit, Fixed, Quota, Recipe, Whole, decode
from ..record import Role
from .models import TokenModels
from .tasks import Question

LITERATURE = (
    "fast-dllm",
    "fast-dllm-prefix",
    "fast-dllm-dual",
    "entropy-bound",
    "local-leap",
    "dkv",
    "dimple-prefill",
    "prophet",
    "fast-dllm-v2",
)
"Presets that every bench has, where one of its networks can run them."

BLOCK = 32
"Positions in a block of the static baselines, as in Fast-dLLM."

UNPADDED_BLOCK = 16
"Positions in a block of the baseline that decodes no padding: in longer ones the surest token is padding far ahead."

STATIC = (2, 4, 8)
"Tokens per step of the static baselines."

TWIN = "autoregressive"


@dataclass(frozen=True)
class TokenRow:
    """One line of the table.

    Attributes:
        name: of the row and of its file.
        role: what it is in the comparison.
        network: folder of the model that answers.
        recipe: how; None for the autoregressive twin, the likeliest token each time.
        control: name of the row that is this plan's static control, once it is known.
    """

    name: str
    role: Role
    network: str
    recipe: Recipe | None
    control: str | None = None

    @property
    def plan(self) -> dict[str, Any]:
        """How the row answers, as JSON."""
        said: dict[str, Any] = {"name": self.name, "network": self.network}
        if self.recipe is None:
            return said | {"decoding": "greedy, keys and values kept"}
        files = self.recipe.file_digests()
        return self.recipe.to_json() | said | ({"files": files} if files else {})


@dataclass(frozen=True)
class Rows:
    """The rows of a bench without controls, the reference first, and why presets are left out."""

    rows: tuple[TokenRow, ...]
    left_out: tuple[str, ...]


def token_rows(models: TokenModels, given: Sequence[tuple[str, Recipe]], asked: Question, gen_length: int) -> Rows:
    """All rows but the controls, each tried for one step on a question.

    Args:
        models: that answer.
        given: recipes by the name of their file or preset: those that ship, and those of the user.
        asked: the question.
        gen_length: masks after each prompt.

    Raises:
        InputError: when one of ``given`` cannot run.
    """
    first = next(iter(models.denoisers))
    rows = [TokenRow("one-token", "reference", first, one_token(models.denoisers[first].spec))]
    optional = []
    spec = models.denoisers[first].spec
    if spec.eos_ids:
        blocks = Fixed(length=UNPADDED_BLOCK) if spec.attention == "full" else one_token(spec).blocks
        unpadded = Recipe(blocks=blocks, unmask=Quota(tokens=1), exit=EotExit())
        rows.append(TokenRow("one-token-eot", "baseline", first, unpadded))
    rows += [static_row(models, first, tokens, "baseline") for tokens in STATIC]
    if models.causal is not None:
        rows.append(TokenRow(TWIN, "baseline", "ar", None))
    left_out = []
    for name in LITERATURE:
        try:
            optional.append(plan_row(models, name, RECIPES[name], asked, gen_length))
        except InputError as error:
            left_out.append(f"{name} is left out: {error}")
    for name, recipe in given:
        row = plan_row(models, recipe.name or name, recipe, asked, gen_length)
        if row not in optional:
            optional.append(row)
    return Rows((*rows, *optional), tuple(left_out))


def one_token(spec: DenoiserSpec) -> Recipe:
    """One token a step, the surest, over the whole answer or block by block of the attention, everything anew."""
    blocks = Whole() if spec.attention == "full" else Fixed(length=None)
    return Recipe(blocks=blocks, unmask=Quota(tokens=1))


def static_row(models: TokenModels, network: str, tokens: int, role: Role) -> TokenRow:
    """A number of tokens a step in blocks, up to the end of the answer; of the first network, or of one by name."""
    spec = models.denoisers[network].spec
    recipe = Recipe(blocks=Fixed(length=_block_of(spec)), unmask=Quota(tokens=tokens))
    recipe = recipe.replace(exit=EosExit()) if spec.eos_ids else recipe
    prefix = "" if network == next(iter(models.denoisers)) else f"{network}-"
    return TokenRow(f"{prefix}static-{tokens}", role, network, recipe)


def _block_of(spec: DenoiserSpec) -> int | None:
    return BLOCK if spec.attention == "full" else None


def most_tokens(models: TokenModels, network: str) -> int:
    """Tokens a step beyond which a static row does not get faster: those of a block."""
    spec = models.denoisers[network].spec
    return _block_of(spec) or spec.block_length or BLOCK


def control_tokens(nfe: float, static_nfe: Callable[[int], float], most: int) -> int:
    """Tokens a step of the static row whose evaluations come nearest to ``nfe`` from below.

    Args:
        nfe: mean evaluations of a plan.
        static_nfe: those of a static row, measured when they are asked for.
        most: tokens a step.

    Returns:
        The fewest that are not above ``nfe``, searched from where evaluations inversely proportional to tokens would
        put them; ``most`` where all are above.
    """
    start = min(most, STATIC[1])
    tokens = min(most, max(1, math.ceil(start * static_nfe(start) / nfe)))
    while tokens < most and static_nfe(tokens) > nfe:
        tokens += 1
    return tokens


def plan_row(models: TokenModels, name: str, recipe: Recipe, asked: Question, gen_length: int) -> TokenRow:
    """The row of a recipe with the first network that it works with.

    Raises:
        InputError: when it works with none, or not with so long an answer.
    """
    row = TokenRow(name, "plan", models.denoiser_for(recipe), recipe)
    _try_step(models, row.network, recipe, asked, gen_length)
    return row


class _FirstStep(Exception):
    """The first step was evaluated."""


def _try_step(models: TokenModels, network: str, recipe: Recipe, asked: Question, gen_length: int) -> None:
    def stop(_: DecodeState) -> None:
        raise _FirstStep

    prompt = [models.ids(asked.prompt)]
    try:
        decode(models.denoisers[network], prompt, gen_length, recipe, resources=models.resources, watch=stop)
    except _FirstStep:
        return


def read_recipes(files: Iterable[Path], names: Iterable[Path]) -> list[tuple[str, Recipe]]:
    """Recipes with names.

    Args:
        files: recipe files.
        names: recipe files, or names of presets where there is no such file.

    Raises:
        InputError: for a file that is no recipe, or a name that is none.
    """
    found = [(path.stem, Recipe.load(path)) for path in files]
    for path in names:
        preset = not path.is_file() and path.suffix != ".json" and len(path.parts) == 1
        found.append((path.stem, RECIPES[path.name] if preset else Recipe.load(path)))
    return found
