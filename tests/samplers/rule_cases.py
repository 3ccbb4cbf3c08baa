"""What the tests of grid rules share."""

from fewstep.samplers import Run
from fewstep.samplers.rule_grid import RuleGrid


def grid(scheduler, rule, steps, **options):
    """The list that a plan's part makes on a scheduler, and the scheduler that it prepared."""
    run = Run(None, scheduler)
    RuleGrid(rule=rule, steps=steps, options=options).prepare(run, frozenset({"num_inference_steps"}))
    return run.timesteps, run.scheduler
