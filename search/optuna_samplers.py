"""Optuna's samplers as a search uses them, by name: who proposes the next candidate."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import optuna
from optuna.samplers import BaseSampler

from ..samplers import Plan
from ..samplers.registry import Registry
from .evolution import EvolutionSampler
from .proposals import Constraints
from .trust_region import TrustRegionSampler

NamedSampler = Callable[[int, Plan, Constraints | None], BaseSampler]
"""From a seed, the plan that the search begins with and how violated limits are read to a sampler."""

OPTUNA_SAMPLERS: Registry[NamedSampler] = Registry("sampler of a search")

STOPS_NONE = ("gp", "evolution")
"Samplers whose candidates are all measured to the end."

STARTUP = 8
"Random candidates before a model of the loss is made."


@OPTUNA_SAMPLERS.register("tpe")
def tree_parzen(seed: int, base: Plan, constraints: Constraints | None) -> BaseSampler:
    """Tree-structured Parzen estimators over all parameters together (arXiv:2304.11127)."""
    with _quiet():
        return optuna.samplers.TPESampler(
            seed=seed,
            n_startup_trials=STARTUP,
            multivariate=True,
            group=True,
            constant_liar=True,
            constraints_func=constraints,
        )


@OPTUNA_SAMPLERS.register("gp")
def gaussian_process(seed: int, base: Plan, constraints: Constraints | None) -> BaseSampler:
    """Gaussian processes in a trust region about the best plan, see `TrustRegionSampler`.

    They learn from candidates that were measured to the end only, so a search with them stops none early.
    """
    return TrustRegionSampler(seed, constraints=constraints)


@OPTUNA_SAMPLERS.register("nsga2")
def non_dominated_sorting(seed: int, base: Plan, constraints: Constraints | None) -> BaseSampler:
    """NSGA-II (Deb et al. 2002), for two objectives."""
    with _quiet():
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=24, constraints_func=constraints)


@OPTUNA_SAMPLERS.register("evolution")
def evolution(seed: int, base: Plan, constraints: Constraints | None) -> BaseSampler:
    """AutoDiffusion's evolution (arXiv:2309.10438), see `EvolutionSampler`."""
    return EvolutionSampler(steps=base.nominal_steps or 1, seed=seed, constraints=constraints)


@OPTUNA_SAMPLERS.register("random")
def independent(seed: int, base: Plan, constraints: Constraints | None) -> BaseSampler:
    """Uniform in the space: what the others must beat."""
    return optuna.samplers.RandomSampler(seed=seed)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back that samplers are experimental, and that optuna 5 has another way to say constraints than optuna 4."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield
