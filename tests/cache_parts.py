"""The caches that run on a family of the zoo."""

import warnings

from support_matrix import columns

from fewstep.samplers import InputError, Plan, PlanWarning, attach


def makers_of(family):
    """By name of a cache, what makes it for a pipeline of this family and a number of steps."""
    pipe, found = family.build(), {}
    for name, column in columns().items():
        for make in column.makers:
            if _runs(family, pipe, make):
                found[name] = make
                break
    return found


def _runs(family, pipe, make, steps=3):
    try:
        with (
            warnings.catch_warnings(action="ignore", category=PlanWarning),
            attach(pipe, Plan(caches=make(pipe, steps))),
        ):
            family.call(pipe, batch=1, steps=steps)
    except InputError:
        return False
    return True
