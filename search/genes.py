"""Candidates of an evolutionary search, and how the parameters of a trial spell them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from ..samplers import InputError

TIMES, LAYERS = "grid-index.", "layers."
"What the parameters of train times and of skipped layers begin with."


@dataclass(frozen=True)
class Candidate:
    """One sequence.

    Attributes:
        times: train times, from the noisiest on; none where no axis chooses them.
        skipped: the modules that each step skips; none where no axis chooses them.
        others: values of the other parameters, in the order of their names.
    """

    times: tuple[int, ...]
    skipped: tuple[frozenset[str], ...]
    others: tuple[Any, ...]


@dataclass(frozen=True)
class Genes:
    """How parameters spell a candidate.

    Attributes:
        times: the train times there are, ascending; empty where no axis chooses them.
        steps: of the sequence.
        modules: those that each step may skip; empty where no axis chooses them.
        others: names of the other parameters.
        values: what a layer's parameter is when the layer runs, and when it is skipped.
        fixed: names of the others that have one value only.
    """

    times: Sequence[int]
    steps: int
    modules: tuple[frozenset[str], ...]
    others: tuple[str, ...]
    values: Mapping[str, tuple[Any, Any]]
    fixed: frozenset[str]

    @classmethod
    def of(cls, space: Mapping[str, BaseDistribution], steps: int) -> Genes:
        """Reads the names and distributions.

        Raises:
            InputError: when they do not choose ``steps`` times, or have fewer to choose from.
        """
        times = {name: space[name] for name in space if name.startswith(TIMES)}
        layers = {name: off_and_on(space[name]) for name in space if name.startswith(LAYERS)}
        choices = {values(one) for one in times.values()}
        if times and (set(times) != {f"{TIMES}{k}" for k in range(steps)} or len(choices) != 1):
            raise InputError(
                f"evolution chooses {steps} times out of the same ones; the parameters are {', '.join(times)}"
            )
        known = choices.pop() if choices else range(0)
        uniform_times(known, steps)
        modules: list[set[str]] = [set() for _ in range(steps if layers else 0)]
        for name in layers:
            step, module = name.removeprefix(LAYERS).split(".", 1)
            if int(step) >= steps:
                raise InputError(f"{name} is a parameter of step {step}; evolution has {steps}, counted from 0")
            modules[int(step)].add(module)
        others = tuple(sorted(set(space) - set(times) - set(layers)))
        fixed = frozenset(name for name in others if space[name].single())
        return cls(known, steps, tuple(map(frozenset, modules)), others, layers, fixed)

    def read(self, params: Mapping[str, Any]) -> Candidate:
        """The candidate of some parameters, whose times may come in any order."""
        steps = [params[f"{TIMES}{k}"] for k in range(len(params)) if f"{TIMES}{k}" in params] if self.times else []
        skipped = [
            frozenset(m for m in modules if params[f"{LAYERS}{k}.{m}"] == self.values[f"{LAYERS}{k}.{m}"][1])
            for k, modules in enumerate(self.modules)
        ]
        return self.ordered(steps, skipped, tuple(params[name] for name in self.others))

    def write(self, candidate: Candidate) -> dict[str, Any]:
        """The parameters of a candidate."""
        params: dict[str, Any] = {f"{TIMES}{k}": time for k, time in enumerate(candidate.times)}
        for k, modules in enumerate(self.modules):
            for module in sorted(modules):
                name = f"{LAYERS}{k}.{module}"
                params[name] = self.values[name][module in candidate.skipped[k]]
        return params | dict(zip(self.others, candidate.others, strict=True))

    def ordered(self, times: Sequence[int], skipped: Sequence[frozenset[str]], others: tuple[Any, ...]) -> Candidate:
        """The candidate with its times in order, from the noisiest on; what a step skips goes with its time."""
        if times and skipped:
            order = sorted(range(len(times)), key=lambda k: -times[k])
            skipped = [skipped[k] & modules for k, modules in zip(order, self.modules, strict=True)]
        return Candidate(tuple(sorted(times, reverse=True)), tuple(skipped), others)


def uniform_times(times: Sequence[int], steps: int) -> list[tuple[int, ...]]:
    """The leading and the trailing sequence of evenly spaced times, from the noisiest on; one if they are equal.

    Args:
        times: those there are, ascending; for none, the empty sequence.
        steps: how many to choose, at least 1.

    Raises:
        InputError: when there are fewer times than steps.
    """
    if not times:
        return [()]
    if len(times) < steps:
        raise InputError(f"{steps} distinct times cannot be chosen from {len(times)}; give fewer steps")
    leading = tuple(times[k * (len(times) // steps)] for k in reversed(range(steps)))
    trailing = tuple(times[round((steps - k) * len(times) / steps) - 1] for k in range(steps))
    return list(dict.fromkeys((leading, trailing)))


def values(distribution: BaseDistribution) -> range:
    """The train times that a parameter chooses from.

    Raises:
        InputError: when it is no integer.
    """
    if not isinstance(distribution, IntDistribution):
        raise InputError(f"a train time's parameter is an integer; got {distribution}")
    return range(distribution.low, distribution.high + 1, distribution.step)


def off_and_on(distribution: BaseDistribution) -> tuple[Any, Any]:
    """The values for a layer that runs and one that is skipped: the lower and the higher of two.

    Raises:
        InputError: when there are not two.
    """
    two: Sequence[Any] = ()
    if isinstance(distribution, IntDistribution):
        two = values(distribution)
    elif isinstance(distribution, CategoricalDistribution):
        two = distribution.choices
    if len(two) != 2:
        raise InputError(f"a layer's parameter has two values, such as 0 and 1; got {distribution}")
    return min(two), max(two)
