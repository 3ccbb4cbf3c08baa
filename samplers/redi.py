"""ReDi (arXiv:2302.02285) for fresh seeds: retrieve how a trajectory goes on, and keep the noise of this one.

Measured on the demo ``fashion-dit`` (512 fresh seeds, DPM-Solver++, 5 steps at guidance 1.75, fd_fashion and
recall_fashion, 2,000 trajectories in 4 MB). It does not help at equal evaluations:

=============================================================================  ============  =============
how                                                                            fd            recall
=============================================================================  ============  =============
5 steps from 999, evenly spaced                                                13.6 +- 1.0   0.71 +- 0.03
5 steps from 800, evenly spaced                                                 9.6 +- 0.8   0.78 +- 0.02
999, 899, 799, then 199, 99, without retrieval                                 33.1 +- 1.1   0.35 +- 0.03
the same with this part                                                        12.9 +- 1.1   0.75 +- 0.02
the same, the retrieved state copied                                           12.5 +- 0.8   0.71 +- 0.02
a random trajectory of the class from 199 on: 2 steps, nothing retrieved       10.0 +- 0.7   0.72 +- 0.02
released form, one noise for all seeds (10 steps, an image a class)           122.6 +- 0.7   0.00
with 200 trajectories: this part                                               16.8 +- 1.0   0.55 +- 0.03
with 200 trajectories: the retrieved state copied                              17.9 +- 1.0   0.41 +- 0.03
=============================================================================  ============  =============

Against the five even steps the paired difference of fd is -0.7 +- 1.0, and five steps of a better grid beat both. A
copied state replays the knowledge base, and its variety is the base's; with its own noise a trajectory keeps more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from .call import CallHook, Step
from .errors import InputError
from .fingerprint import fingerprint
from .history import forget_history
from .knowledge import HEADER_BYTES, KnowledgeBase, class_labels, same_time
from .network import Evaluation, denoisers
from .part import Part, Run
from .start import STARTS

RESOURCE = "knowledge_base"
"The name under which a knowledge base is handed to ``attach`` that is not in a file."


@STARTS.register("redi")
class ReDi(Part):
    """Retrieves how the nearest trajectory went on, lands at the value time with its clean sample, and samples on.

    The grid is [t_0, ..., t_key, t_value, ...]. The paper's keys are noisy states, which are near each other only when
    all seeds share one noise, and its value is another trajectory's state. Here the key is the clean sample predicted
    at the key step, compared within the class where there are labels, and the landing is
    x_value = alpha x0_retrieved + sigma eps with this trajectory's own predicted noise eps. The solver forgets its
    history. Network evaluations: the points of the grid.
    """

    type: Literal["redi"] = "redi"
    key_step: int = Field(ge=1, description="Steps before the retrieval; the value time is the next of the grid.")
    condition: str | None = Field(
        default=None,
        description="The network's input that holds class labels, such as class_labels: retrieval within the class.",
    )
    file: str = Field(
        default="knowledge.safetensors",
        description="Knowledge base beside the plan (KnowledgeBase.save), if it is not handed to attach.",
    )
    neighbours: int = Field(
        default=1, ge=1, le=64, description="Trajectories retrieved; several are weighted by least squares of the keys."
    )
    max_bytes: int = Field(default=1 << 30, ge=HEADER_BYTES, description="A larger file is refused.")

    @property
    def files(self) -> tuple[str, ...]:
        """Files and folders beside the plan that this part reads."""
        return (self.file,)

    def prepare(self, run: Run, known_arguments: frozenset[str]) -> None:
        """Reads the knowledge base, compares it with the grid and the weights, and adds the hook.

        Raises:
            InputError: when the knowledge base is missing, something else, too large, or of another grid.
        """
        base = run.resources.get(RESOURCE)
        if base is None:
            path = run.file(self.type, self.file)
            if path.stat().st_size > self.max_bytes:
                raise InputError(f"{path} has {path.stat().st_size} bytes; the redi part allows {self.max_bytes}")
            base = KnowledgeBase.load(path)
        if not isinstance(base, KnowledgeBase):
            raise InputError(f"the resource {RESOURCE!r} is {type(base).__name__}; give a KnowledgeBase")
        if len(base.grid) != self.key_step + 1:
            raise InputError(
                f"the knowledge base is for key_step {len(base.grid) - 1}; the redi part has {self.key_step}"
            )
        if self.condition is not None and base.labels is None:
            raise InputError(
                f"the knowledge base has no labels; leave condition {self.condition!r} out of the redi part"
            )
        if run.timesteps is not None:
            _check_grid(base, run.timesteps[: len(base.grid)])
        if base.weights and all(fingerprint(network) != base.weights for network in denoisers(run.pipe).values()):
            run.warnings.append(
                f"the knowledge base is of other weights (fingerprint {base.weights[:12]}); build it again"
            )
        placed = base.to(getattr(run.pipe, "_execution_device", "cpu"))
        run.hooks.append(lambda: _Retrieval(placed, self))


def _check_grid(base: KnowledgeBase, times: tuple[float, ...]) -> None:
    if len(times) < len(base.grid) or not all(map(same_time, times, base.grid)):
        raise InputError(
            f"the knowledge base is for a grid that starts {list(base.grid)}; got {list(times)}; build it for this grid"
        )


class _Retrieval(CallHook):
    """The retrieval of one call."""

    def __init__(self, base: KnowledgeBase, part: ReDi) -> None:
        self.base, self.part = base, part
        self.labels: list[Tensor] = []
        self.started = False

    def evaluate(self, evaluation: Evaluation, proceed: Callable[[Evaluation], Any]) -> Any:
        """Notes the classes at the key step."""
        if self.part.condition is not None and same_time(evaluation.time, self.base.grid[-2]):
            self.labels.append(class_labels(evaluation, self.part.condition))
        return proceed(evaluation)

    def before_step(self, step: Step) -> None:
        """The call must run the steps that the knowledge base is of, one evaluation each."""
        if self.started:
            return
        self.started = True
        if step.index:
            raise InputError("the redi part needs a call that starts at the first time of the grid; remove it here")
        times = [float(time) for time in step.scheduler.timesteps]
        for time in self.base.grid[-2:]:
            if sum(same_time(time, other) for other in times) > 1:
                raise InputError(
                    f"{type(step.scheduler).__name__} evaluates more than once at timestep {time:g}; the redi part "
                    "needs a solver of one evaluation a step there"
                )
        _check_grid(self.base, tuple(dict.fromkeys(times))[: len(self.base.grid)])

    def after_step(self, step: Step) -> None:
        """Replaces the landing of the key step."""
        if not same_time(step.time, self.base.grid[-2]):
            return
        key = step.x0()
        if key.shape[1:] != self.base.keys.shape[1:]:
            raise InputError(
                f"the knowledge base is of samples {tuple(self.base.keys.shape[1:])}, this call's are "
                f"{tuple(key.shape[1:])}; build one at this resolution"
            )
        half = len(key) // 2
        if len(key) == 2 * half and torch.equal(key[:half], key[half:]):  # guidance has stacked the samples twice
            value = self.retrieved(key[:half], half).repeat(2, *[1] * (key.ndim - 1))
        else:
            value = self.retrieved(key, len(key))
        eps = step.process.to_eps(step.output, step.x, step.time)
        step.x_next = step.process.jump(step.x, step.time, step.next_time, x0=value, eps=eps)
        forget_history(step.scheduler)

    def retrieved(self, key: Tensor, rows: int) -> Tensor:
        """The clean samples that the nearest trajectories predicted later, (rows, ...) of the dtype of ``key``.

        Several are weighted as in arXiv:2302.02285: the weighted keys come nearest to this one.
        """
        index = self.base.nearest(key, self._classes(rows), self.part.neighbours)
        found = self.base.values[index].float()
        if self.part.neighbours == 1:
            return found[:, 0].to(key.dtype)
        keys = self.base.keys[index].float().flatten(2)
        weights = torch.bmm(key.float().flatten(1)[:, None], torch.linalg.pinv(keys))
        return torch.bmm(weights, found.flatten(2)).reshape(key.shape).to(key.dtype)

    def _classes(self, rows: int) -> Tensor | None:
        """The class of each row: of the branches of guidance, the one whose labels the knowledge base has."""
        if self.part.condition is None:
            return None
        assert self.base.labels is not None
        for branch in (part for labels in self.labels for part in torch.split(labels, rows)):
            if len(branch) == rows and bool(torch.isin(branch, self.base.labels).all()):
                return branch
        seen = sorted(set(torch.cat(self.labels).tolist()))
        raise InputError(f"the knowledge base does not have all classes of this call, {seen}; build it with them")
