"""The caches as an axis: of the blocks of a transformer, or of the deep levels of a U-Net."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from optuna.trial import BaseTrial

from ...samplers import BlockMask, InputError, Part, Plan, UNetDeep, denoisers
from ...samplers.mask import Target
from ...samplers.unet_cut import cut_unet
from ..space import AXES
from .steps import steps_of

Kind = TypeVar("Kind", bound=Part)

KINDS: tuple[tuple[Target, ...], ...] = (("block",), ("attention", "mlp"), ("attention",), ("mlp",))
"Sets of modules that block masks are searched over, where a network has them."


@dataclass(frozen=True)
class Rhythm:
    """Which steps compute everything: the first ``kept`` of them, and after those one in ``every``.

    Attributes:
        steps: of the plan.
        every: range of how many steps from one that computes to the next; 1 computes all.
        kept: range of how many steps compute before the first that does not.
    """

    steps: int
    every: tuple[int, int]
    kept: tuple[int, int]

    @classmethod
    def of(cls, axis: str, base: Plan) -> Rhythm:
        """One in 4 steps at least, and up to half of them kept.

        Raises:
            InputError: when the plan has no grid or a single step.
        """
        steps = steps_of(axis, base)
        if steps < 2:
            raise InputError(f"the {axis} axis reuses what an earlier step computed; give the plan 2 steps or more")
        return cls(steps, (1, min(4, steps)), (1, max(1, steps // 2)))

    def suggest(self, trial: BaseTrial, name: str) -> tuple[int, ...]:
        """The steps that compute everything, as a trial suggests."""
        every = trial.suggest_int(f"{name}.every", *self.every)
        return self.computed(every, trial.suggest_int(f"{name}.kept", *self.kept))

    def computed(self, every: int, kept: int) -> tuple[int, ...]:
        """The steps that compute everything."""
        return tuple(step for step in range(self.steps) if step < kept or (step - kept + 1) % every == 0)

    def params(self, name: str, computed: tuple[int, ...]) -> dict[str, Any]:
        """The parameters that give some steps, the smallest ones.

        Raises:
            InputError: when none do.
        """
        for every in range(self.every[0], self.every[1] + 1):
            for kept in range(self.kept[0], self.kept[1] + 1):
                if self.computed(every, kept) == computed:
                    return {f"{name}.every": every, f"{name}.kept": kept}
        raise InputError(f"the plan's cache computes at steps {computed}, which no rhythm of the {name} axis does")


@dataclass(frozen=True)
class MaskAxis:
    """A block mask: ``cache.every`` and ``cache.kept``, the modules ``cache.targets`` and the forecast ``cache.order``.

    Where every step computes everything there is no cache. Other caches of the plan stay.

    Attributes:
        rhythm: which steps compute.
        targets: sets of kinds of modules, of which to choose.
        orders: range of the degree of the forecast.
        name: of the axis.
    """

    rhythm: Rhythm
    targets: tuple[tuple[Target, ...], ...]
    orders: tuple[int, int] = (0, 2)
    name: str = "cache"

    @classmethod
    def of(cls, pipe: Any, base: Plan) -> MaskAxis:
        """The axis of a pipeline whose networks have blocks.

        Raises:
            InputError: when none has, or the plan has no grid of 2 steps or more.
        """
        rhythm = Rhythm.of("cache", base)
        BlockMask.suggest(pipe, rhythm.steps)
        found: dict[frozenset[str], tuple[Target, ...]] = {}
        for targets in KINDS:
            try:
                modules = BlockMask(rows=("1",), targets=targets).modules(pipe)
            except InputError:
                continue
            found.setdefault(frozenset(modules), targets)
        return cls(rhythm, tuple(found.values()))

    def suggest(self, trial: BaseTrial, plan: Plan) -> Plan:
        """The plan with the block mask that the trial suggests."""
        computed = self.rhythm.suggest(trial, self.name)
        targets = trial.suggest_categorical(f"{self.name}.targets", list(map("+".join, self.targets)))
        order = trial.suggest_int(f"{self.name}.order", *self.orders)
        rows = tuple("1" if step in computed else "0" for step in range(self.rhythm.steps))
        chosen = next(kinds for kinds in self.targets if "+".join(kinds) == targets)
        part = BlockMask(rows=rows, targets=chosen, order=order)
        return _with_cache(plan, None if "0" not in rows else part, BlockMask)

    def params(self, plan: Plan) -> dict[str, Any]:
        """The parameters of a plan's block mask.

        Raises:
            InputError: when the mask tells modules apart, or has another rhythm, targets or order.
        """
        everything = BlockMask(rows=("1",) * self.rhythm.steps, targets=self.targets[0], order=self.orders[0])
        part = _cache(self.name, plan, BlockMask) or everything
        low, high = self.orders
        fits = part.targets in self.targets and low <= part.order <= high and part.reuse == "residual"
        if not fits or len(part.rows) != self.rhythm.steps or any(len(set(row)) > 1 for row in part.rows):
            raise InputError(
                f"the plan's block mask is not in the {self.name} axis: {self.rhythm.steps} rows of one kind, order "
                f"{low} to {high}, targets {' or '.join(map('+'.join, self.targets))}"
            )
        computed = tuple(step for step, row in enumerate(part.rows) if row[0] == "1")
        found = self.rhythm.params(self.name, computed)
        return found | {f"{self.name}.targets": "+".join(part.targets), f"{self.name}.order": part.order}


@dataclass(frozen=True)
class DeepAxis:
    """Reuse of a U-Net's deep features: ``cache.every`` and ``cache.kept``, and ``cache.cut``, depth and layer.

    Where every step computes everything there is no cache. Other caches of the plan stay.

    Attributes:
        rhythm: which steps compute.
        cuts: pairs of depth and layer, of which to choose.
        name: of the axis.
    """

    rhythm: Rhythm
    cuts: tuple[tuple[int, int | None], ...]
    name: str = "cache"

    @classmethod
    def of(cls, pipe: Any, base: Plan) -> DeepAxis:
        """The axis of a pipeline with a U-Net, and of all places where that can be cut.

        Raises:
            InputError: when there is none, or the plan has no grid of 2 steps or more.
        """
        rhythm = Rhythm.of("cache", base)
        UNetDeep.suggest(pipe, rhythm.steps)
        found: dict[tuple[str, ...], tuple[int, int | None]] = {}
        for network in denoisers(pipe).values():
            for depth, block in enumerate(getattr(network, "down_blocks", ())):
                for layer in (*range(len(getattr(block, "resnets", ()))), None):
                    try:
                        found.setdefault(cut_unet(network, depth, layer).inside, (depth, layer))
                    except InputError:
                        continue
        return cls(rhythm, tuple(found.values()))

    def suggest(self, trial: BaseTrial, plan: Plan) -> Plan:
        """The plan with the cache that the trial suggests."""
        computed = self.rhythm.suggest(trial, self.name)
        names = {_cut_name(*cut): cut for cut in self.cuts}
        depth, layer = names[trial.suggest_categorical(f"{self.name}.cut", list(names))]
        part = UNetDeep(steps=computed, depth=depth, layer=layer)
        return _with_cache(plan, None if len(computed) == self.rhythm.steps else part, UNetDeep)

    def params(self, plan: Plan) -> dict[str, Any]:
        """The parameters of a plan's cache, also where it says an interval.

        Raises:
            InputError: when it has another rhythm or cut.
        """
        depth, layer = self.cuts[0]
        part = _cache(self.name, plan, UNetDeep) or UNetDeep(interval=1, depth=depth, layer=layer)
        if (part.depth, part.layer) not in self.cuts:
            raise InputError(
                f"the plan's cut {_cut_name(part.depth, part.layer)} is not in the {self.name} axis, which has "
                f"{', '.join(_cut_name(*cut) for cut in self.cuts)}"
            )
        computed = tuple(step for step, all_runs in enumerate(part.computes(self.rhythm.steps)) if all_runs)
        return self.rhythm.params(self.name, computed) | {f"{self.name}.cut": _cut_name(part.depth, part.layer)}


def _cut_name(depth: int, layer: int | None) -> str:
    return f"{depth}.{'all' if layer is None else layer}"


def _cache(axis: str, plan: Plan, kind: type[Kind]) -> Kind | None:
    """The one cache of a kind that a plan has, if it does."""
    found = [part for part in plan.caches if isinstance(part, kind)]
    if len(found) > 1:
        raise InputError(f"the plan has {len(found)} caches of one kind and the {axis} axis writes one; join them")
    return found[0] if found else None


def _with_cache(plan: Plan, part: Part | None, kind: type[Part]) -> Plan:
    """The plan with ``part`` in place of its caches of a kind."""
    others = tuple(other for other in plan.caches if not isinstance(other, kind))
    return plan.model_copy(update={"caches": (*others, part) if part is not None else others})


def _of(pipe: Any, base: Plan) -> MaskAxis | DeepAxis:
    """The axis of the cache that a pipeline's network can have.

    Raises:
        InputError: when it can have neither.
    """
    reasons = []
    makers: tuple[Callable[[Any, Plan], MaskAxis | DeepAxis], ...] = (MaskAxis.of, DeepAxis.of)
    for make in makers:
        try:
            return make(pipe, base)
        except InputError as error:
            reasons.append(str(error))
    raise InputError("; ".join(dict.fromkeys(reasons)))


AXES.register("cache")(_of)
