"""The slots of the decode loop. A policy is one file: a subclass registered in its slot's registry.

    @UNMASKS.register("every-second")
    class EverySecond(Unmask):
        '''Commits every second open position.'''

        type: Literal["every-second"] = "every-second"

        def select(self, state: DecodeState) -> Tensor:
            return state.candidates & (state.columns % 2 == state.block_step[:, None] % 2)

Import the file in ``tokens/__init__.py``; a recipe can then name it, `decode` runs it, and it is saved with the recipe.
A line in ``CASES`` of ``tests/tokens/token_cases.py`` puts it through the tests that hold for all policies.

What holds for every policy:

* Policies are frozen data: their fields are what a recipe's JSON says. What they keep during a decoding is in
  ``state.memory[self]``, made in ``begin``. They read the state and return what they decide; the loop writes.
* Everything is by row. Tensors are (B, L) over the canvas or (B,) over rows; a row never looks at another one, and
  what depends on chance comes from ``state.uniform(stream)``, never from torch's global generator.
* Logits are kept flat, (N, V), for the known positions only; ``state.at`` says where these are and ``state.spread``
  makes (B, L) of one number for each. ``state.confidence(kind)`` is minus infinity where nothing is known, so a
  choice within ``state.candidates`` never rests on logits that were not computed. A policy that needs logits beyond
  the open positions (masks of the active block) says so in ``wants``.
* What the loop sees to: choices outside the candidates are dropped; a live row that chose nothing commits its surest
  candidate, unless the policy is ``paced``; the mask's id is never committed; the prompt never changes; a rewritten
  position loses its keys and values.
* ``check(recipe)`` refuses a combination when the recipe is made, ``suits(denoiser)`` a denoiser when decoding starts;
  both raise `InputError` with the reason and the mend. What a policy gets wrong at run time is a `PolicyError`.

One iteration: the block schedule moves rows whose block is full; the cache plans what is evaluated; the denoiser
evaluates; logits processors; proposal; unmask policy and exit choose; constraint and scorer have their say; the commit;
the remask policy; the exit moves ends.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..part import Member
from ..registry import Registry
from .denoiser import Denoiser, DenoiserSpec
from .state import Confidence, DecodeState

if TYPE_CHECKING:
    from .recipe import Recipe

BLOCKS: Registry[type[BlockSchedule]] = Registry("block schedule")
UNMASKS: Registry[type[Unmask]] = Registry("unmask policy")
EXITS: Registry[type[Exit]] = Registry("exit")
REMASKS: Registry[type[Remask]] = Registry("remask policy")
CACHES: Registry[type[TokenCache]] = Registry("token cache")
LOGITS: Registry[type[LogitsProcessor]] = Registry("logits processor")
CONSTRAINTS: Registry[type[Constraint]] = Registry("constraint")
SCORERS: Registry[type[Scorer]] = Registry("scorer")


class PolicyError(RuntimeError):
    """A policy broke a rule of the loop: a defect of the policy, not of what the user gave."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Positions and the tokens they get.

    Attributes:
        select: (B, L) bool.
        tokens: (B, L) int64, read where selected.
        failed: (B,) bool, rows that have to be given up; None for none.
    """

    select: Tensor
    tokens: Tensor
    failed: Tensor | None = None


class Policy(Member):
    """What fills a slot."""

    @property
    def files(self) -> tuple[str, ...]:
        """Files beside the recipe that this policy reads."""
        return ()

    def check(self, recipe: Recipe) -> None:
        """Raises `InputError` when this policy cannot work with the rest of ``recipe``."""

    def suits(self, denoiser: Denoiser) -> None:
        """Raises `InputError` when this policy cannot work with ``denoiser``."""

    def begin(self, state: DecodeState) -> None:
        """Called once, before the first step: makes ``state.memory[self]`` where something is to be kept."""

    def wants(self, state: DecodeState) -> Tensor | None:
        """(B, L) bool, positions whose logits this policy reads beside the open ones; None for none."""
        return None


class BlockSchedule(Policy):
    """Which part of the canvas is filled next."""

    slides: ClassVar[bool] = False
    """True when a row's block moves in every step, and not only when it is full; it counts as one block."""

    @abstractmethod
    def next(self, state: DecodeState) -> tuple[Tensor, Tensor]:
        """The block that each row works on next; only rows whose block has no masks left take it, unless it slides.

        A row is done when no masks are left in it, so a block that is returned for a live row has to have masks.

        Returns:
            (B,) first columns and (B,) columns after the last.
        """

    @abstractmethod
    def count(self, state: DecodeState) -> Tensor:
        """(B,) int64, number of blocks of a row that has everything before it."""


class Unmask(Policy):
    """Which candidates are committed in this step."""

    paced: ClassVar[bool] = False
    """True for a policy with a clock of its own, which may leave a row as it is in a step (ancestral sampling)."""

    @property
    def clocked(self) -> bool:
        """Whether the steps of a block are planned when it begins, so that its masks have to be known then."""
        return False

    @abstractmethod
    def select(self, state: DecodeState) -> Tensor:
        """(B, L) bool, within ``state.candidates``."""

    def quota(self, state: DecodeState) -> Tensor | None:
        """(B,) how many positions ``select`` takes, for a policy that knows; the loop holds it to that."""
        return None

    def ahead(self, state: DecodeState) -> Tensor | None:
        """(B, L) bool, what ``select`` will take, asked before the evaluation; None where that depends on logits."""
        return None

    def limit(self, generated: int) -> int:
        """Most steps that a row of ``generated`` masks can need; the loop stops a decoding that runs on."""
        return generated

    def time(self, state: DecodeState) -> Tensor:
        """(B,) float64 in [0, 1], the time that a time-conditioned denoiser is told: the masked share by default."""
        return state.masked.sum(1).double() / state.editable.sum(1).clamp(min=1)


class Exit(Policy):
    """When there is no need to go on."""

    def all_in(self, state: DecodeState) -> Tensor | None:
        """(B,) bool, rows that commit everything that is known and masked now, in any block; None for no row."""
        return None

    def ends(self, state: DecodeState) -> Tensor | None:
        """(B,) int64, asked after the commit: column after the last one that is to exist; None where nothing changes.

        Positions past it are neither decoded nor evaluated nor seen any more, and are filled with the first of
        ``spec.eos_ids`` at the end. Shapes stay.
        """
        return None


class Remask(Policy):
    """Which committed tokens are taken back, or replaced."""

    rewrites: ClassVar[bool] = True
    """False for the policy that never does."""

    @abstractmethod
    def select(self, state: DecodeState, committed: Tensor) -> Choice:
        """Asked after the commit.

        Args:
            state: with ``x`` after the commit.
            committed: (B, L) bool, what this step committed; such positions are left alone.

        Returns:
            The positions to rewrite, and with what: the mask's id, or another token.
        """

    def holds(self, state: DecodeState) -> Tensor | None:
        """(B,) bool, asked after ``select``: rows that do not leave their block yet if it is full; None for none.

        All of a held block is evaluated again, nothing is committed, and ``select`` is asked. ``state.held`` says which
        rows were held in this step.
        """
        return None

    def limit(self, generated: int) -> int:
        """Steps that this policy can add to those of the unmask policy."""
        return 0


@dataclass(frozen=True, slots=True)
class CachePlan:
    """What one step evaluates. Keys and values of what is evaluated are written to the store.

    Attributes:
        query: (B, L) bool, positions to be evaluated. The loop drops padding and rows that are done; it adds what a
            shift of the logits needs, and every position that a query may see and that has no keys and values yet.
        visible: positions whose keys queries may see, if the denoiser's attention lets them: (B, L), or (B, L, L) by
            query and key; None for all. Keys of queries are fresh ones.
        probe: whether to measure ``state.drift`` at queries that were stored before.
    """

    query: Tensor
    visible: Tensor | None = None
    probe: bool = False


class TokenCache(Policy):
    """What is not evaluated again.

    ``plan`` sees the state before the evaluation: ``state.open`` is what has to become known (some of it, in every
    live row), ``stored``, ``seen``, ``age``, ``stale`` and ``fresh`` say what the store holds, ``block_step == 0`` that
    a block has just begun. A position becomes known when ``state.sources`` of it is queried, which the loop adds for
    queried positions. Examples, for a full-attention denoiser with b = ``state.in_block``:

    * everything, each step: ``query=state.present``;
    * dual cache: b, and everything where ``block_step == 0``;
    * prefix cache: everything from ``block_start`` on; the same where ``block_step == 0`` plus what lies before;
    * delayed sets (dKV): everything that was not committed two steps ago, which ``begin`` and ``on_commit`` track;
    * prompt refreshed every r steps: the prompt where ``state.age >= r``, beside the block;
    * groups (ReCAP): at a full step everything, then only the union chosen there; other rows are at other stages;
    * prompt by itself first (Dimple): ``visible`` (B, L, L) keeps prompt queries from seeing the answer;
    * block-causal prefix: ``state.sources(state.open) | (state.reach(state.open) & ~state.fresh)``, exact for every
      denoiser, and worth something for a block-causal one.
    """

    keeps: ClassVar[Literal["nothing", "logits", "kv"]] = "kv"
    """"kv": plans over a store of keys and values. "logits": rows that are not queried reuse their logits, which the
    loop allows while their tokens have not changed. "nothing": every step evaluates whatever the open positions need.
    """

    @abstractmethod
    def plan(self, state: DecodeState) -> CachePlan:
        """What the next evaluation computes."""

    def on_commit(self, state: DecodeState, changed: Tensor) -> None:
        """Called after each step with the (B, L) bool positions that were committed."""

    def invalidate(self, state: DecodeState, positions: Tensor) -> None:
        """Called when committed tokens were rewritten, (B, L) bool: by default they lose their keys and values.

        The loop then evaluates them again as soon as a query may see them.
        """
        state.stored &= ~positions

    @abstractmethod
    def exactness(self, spec: DenoiserSpec) -> bool:
        """Whether the tokens are those of no cache, for every prompt and every rest of the recipe.

        The loop checks in each step that a cache which says so evaluates everything that is not ``state.fresh``.
        """


class LogitsProcessor(Policy):
    """What is done to logits and confidences before anything is chosen."""

    branches: ClassVar[tuple[str, ...]] = ()
    """Further evaluations of the same positions that this processor reads as ``state.branches[name]``."""

    def branch_tokens(self, state: DecodeState, name: str) -> Tensor:
        """(B, L) int64, the canvas as branch ``name`` sees it."""
        return state.x

    def branch_cond(self, state: DecodeState, name: str) -> Mapping[str, Tensor]:
        """The conditioning tensors of branch ``name``, of all rows."""
        return state.cond

    def process(self, state: DecodeState, logits: Tensor) -> Tensor:
        """(N, V) from (N, V), at ``state.at``; the argument is not changed in place."""
        return logits

    def confidence(self, state: DecodeState, confidence: Tensor, kind: Confidence) -> Tensor:
        """(B, L) from (B, L), minus infinity where nothing is known."""
        return confidence


class Constraint(Policy):
    """Which choices are allowed."""

    def restrict(self, state: DecodeState, logits: Tensor) -> Tensor:
        """(N, V) from (N, V) at ``state.at``, after the logits processors: minus infinity where a token cannot stand.

        What is proposed, and how sure it is, then rests on what is possible; `filter` sees to choices that are
        possible one by one and not together. The argument is not changed in place.
        """
        return logits

    def filter(self, state: DecodeState, choice: Choice) -> Choice:
        """Takes choices back, changes their tokens, chooses others of the candidates, or gives rows up.

        A live row has to keep at least one choice or be given up, unless the unmask policy is paced.
        """
        return choice


class Scorer(Policy):
    """A second opinion on what is about to be committed: another model, an energy, a rejection rule."""

    def accept(self, state: DecodeState, choice: Choice) -> Choice:
        """Like `Constraint.filter`, after it."""
        return choice


def nothing_of(state: DecodeState) -> Choice:
    """The choice of nothing."""
    return Choice(torch.zeros_like(state.known), state.x)


SLOTS: dict[str, tuple[Registry[Any], type[Policy]]] = {
    "blocks": (BLOCKS, BlockSchedule),
    "unmask": (UNMASKS, Unmask),
    "exit": (EXITS, Exit),
    "remask": (REMASKS, Remask),
    "cache": (CACHES, TokenCache),
    "logits": (LOGITS, LogitsProcessor),
    "constraint": (CONSTRAINTS, Constraint),
    "scorer": (SCORERS, Scorer),
}
"""Fields of a recipe: the registry, and the class of its members."""
