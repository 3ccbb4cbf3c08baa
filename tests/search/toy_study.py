"""A small space of plans with a loss in closed form, and workers that can be killed."""

import json
import multiprocessing
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import optuna

from fewstep.samplers import ConstantGuidance, Plan, SpacingGrid
from fewstep.search.space import Space, plan_key
from fewstep.search.study import Outcome, StudySetting, finished_trials, run_study
from fewstep.search.study_storage import study_url

SPACINGS = ("leading", "linspace", "trailing")
STEPS = 8


@dataclass(frozen=True)
class GridAxis:
    """Steps and their spacing; the parameter ``twist`` changes nothing."""

    name: str = "grid"
    steps: int = STEPS

    def suggest(self, trial, plan):
        steps = trial.suggest_int("grid.steps", 1, self.steps)
        spacing = trial.suggest_categorical("grid.spacing", SPACINGS)
        trial.suggest_categorical("grid.twist", [False, True])
        return plan.model_copy(update={"grid": SpacingGrid(steps=steps, spacing=spacing)})

    def params(self, plan):
        return {"grid.steps": plan.grid.steps, "grid.spacing": plan.grid.spacing, "grid.twist": False}


@dataclass(frozen=True)
class GuidanceAxis:
    name: str = "guidance"

    def suggest(self, trial, plan):
        scale = trial.suggest_float("guidance.scale", 1.0, 5.0)
        return plan.model_copy(update={"guidance": ConstantGuidance(scale=scale)})

    def params(self, plan):
        return {"guidance.scale": plan.guidance.scale}


SMALL = Space(Plan(), (GridAxis(),))
"24 plans."

WIDE = Space(Plan(), (GridAxis(steps=30), GuidanceAxis()))
"A continuum."


def loss_of(plan):
    scale = plan.guidance.scale if plan.guidance is not None else 2.5
    return (plan.grid.steps - 7.3) ** 2 / 10 + 0.3 * SPACINGS.index(plan.grid.spacing) + (scale - 2.5) ** 2


def tpe(seed):
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=5)


def nsga2(seed):
    return optuna.samplers.NSGAIISampler(seed=seed, population_size=8)


@dataclass(frozen=True)
class Measure:
    """Notes every measurement in a file, one line of it for the start and one for the end."""

    log: Path
    sleep_s: float = 0.0
    objectives: int = 1
    rungs: tuple[int, ...] = (64,)

    def note(self, what, plan):
        with self.log.open("a") as stream:
            stream.write(json.dumps([what, os.getpid(), plan_key(plan)]) + "\n")

    def __call__(self, plan, keep_on):
        self.note("begun", plan)
        loss = loss_of(plan)
        for n in self.rungs:
            time.sleep(self.sleep_s)
            if not keep_on(n, loss + 1 / n):
                return Outcome((), notes={"n": n})
        self.note("ended", plan)
        return Outcome(
            (loss, float(plan.grid.steps))[: self.objectives], notes={"loss": loss, "rungs": len(self.rungs)}
        )


def measured(log, what="begun"):
    """Keys of the plans that were measured, in order."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [key for kind, _, key in lines if kind == what]


def setting_of(folder, trials, **changes):
    own = {"storage": study_url(folder), "name": "toy", "key": {"space": {"axes": ["grid"], "steps": STEPS}}, "seed": 3}
    return StudySetting(trials=trials, **(own | changes))


def told(study):
    """All that the finished trials say, in order; numbers left out, which count those of dead workers too."""
    return [
        (t.state.name, t.values, t.params, t.intermediate_values, t.user_attrs["plan"]) for t in finished_trials(study)
    ]


def start_worker(*arguments):
    """A process of its own that runs the study; it has imported everything, so it is at work at once."""
    process = multiprocessing.get_context("fork").Process(target=run_study, args=arguments)
    process.start()
    return process


def shares(log):
    """How many measurements each of some processes began."""
    return Counter(line.split(",")[1] for line in log.read_text().splitlines() if "begun" in line)


def check_shared(log, study, trials):
    """Nothing was measured twice, both workers had their share, and there are as many trials as asked for."""
    assert len(measured(log)) == len(set(measured(log))) == trials
    assert len(finished_trials(study)) == trials
    assert all(trial.state.is_finished() for trial in study.trials)
    by_process = shares(log)
    assert len(by_process) == 2
    assert min(by_process.values()) >= 2
