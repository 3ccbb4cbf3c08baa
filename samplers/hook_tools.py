"""What hooks share that move the time a network is told, or read what it predicts."""

from __future__ import annotations

from torch import Tensor

from .call import Step
from .errors import InputError
from .process import Process
from .schedules import FlowSchedule, InvertedFlowSchedule, TableSchedule, TimeRange


def train_steps(part: str, process: Process) -> TimeRange:
    """Cleanest and noisiest train step, where the process counts its time in train steps and towards noise.

    Args:
        part: the part that asks, as the user knows it.
        process: the forward process of the run.

    Raises:
        InputError: when it does not: EDM's time is a logarithm of sigma, an inverted flow's runs towards data.
    """
    schedule = process.schedule
    if not isinstance(schedule, TableSchedule | FlowSchedule) or isinstance(schedule, InvertedFlowSchedule):
        raise InputError(
            f"the {part} part moves times that count train steps from data to noise; "
            f"{type(schedule).__name__} has other times, remove the part or use another solver"
        )
    return process.time_range


def predicted(step: Step) -> Tensor:
    """What the network predicts of the state, (B, ...): the step's output without the channels of a learned variance.

    Raises:
        InputError: when the output has neither the state's channels nor twice as many.
    """
    output, x = step.output, step.x
    if output.shape == x.shape:
        return output
    if output.ndim == x.ndim and output.shape[1] == 2 * x.shape[1]:
        return output[:, : x.shape[1]]
    raise InputError(
        f"the scheduler is given an output of shape {tuple(output.shape)} for a state of shape {tuple(x.shape)}; "
        "this part knows the state's shape, or twice its channels for a learned variance"
    )
