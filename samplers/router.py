"""Learned routers (HarmoniCa, arXiv:2410.01723; Learning-to-Cache, arXiv:2406.01733): what computes is learned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from .cache import CACHES
from .errors import InputError
from .files import read_tensors, write_tensors
from .mask import MaskPart, Table, Target, targets_in
from .part import Run

Probability = Annotated[float, Field(ge=0, le=1)]
SUBLAYERS: tuple[Target, ...] = ("attention", "cross-attention", "mlp")

_FORMAT = "fewstep-router-1"


@CACHES.register("router")
class Router(MaskPart):
    """Computes a sublayer of a transformer's blocks where a trained probability is above the threshold.

    Where it is not, the sublayer answers with the output that it computed last, before the block's gate. The first
    step computes everything. The probabilities hold for one network, number of steps, solver and guidance; they are in
    a file beside the plan, or in the plan itself.
    """

    type: Literal["router"] = "router"
    file: str = Field(
        default="router.safetensors",
        description="Probabilities beside the plan (write_router), if they are not in it.",
    )
    probabilities: tuple[tuple[Probability, ...], ...] = Field(
        default=(), description="For each timestep of the scheduler, one for each attention and MLP, block by block."
    )
    threshold: float = Field(default=0.1, ge=0, lt=1, description="A sublayer computes above it.")

    @model_validator(mode="after")
    def _even(self) -> Self:
        widths = {len(row) for row in self.probabilities}
        if len(widths) > 1 or 0 in widths:
            raise ValueError(f"the rows of a router have one probability for each sublayer; got {sorted(widths)}")
        return self

    @property
    def files(self) -> tuple[str, ...]:
        """Files and folders beside the plan that this part reads."""
        return () if self.probabilities else (self.file,)

    @classmethod
    def suggest(cls, pipe: Any, steps: int) -> Router:
        """All sublayers compute in every second step.

        Raises:
            InputError: when no network of the pipeline has blocks.
        """
        part = cls(probabilities=tuple((float(index % 2 == 0),) for index in range(steps)))
        part.modules(pipe)
        return part

    def table(self) -> Table | None:
        """Which sublayers compute at which step."""
        if not self.probabilities:
            return None
        first, *rest = self.probabilities
        return [[True] * len(first), *([value > self.threshold for value in row] for row in rest)]

    def reach(self, network: nn.Module) -> tuple[str, ...]:
        """Attentions, cross-attentions and MLPs, block by block.

        Raises:
            InputError: when the network has none, or more or fewer than the router.
        """
        return self.check_modules(network, targets_in(network, SUBLAYERS))

    def prepare(self, run: Run, known_arguments: frozenset[str]) -> None:
        """Reads the probabilities, finds the modules and adds the hook.

        Raises:
            InputError: when the file is missing or something else, or as every cache.
        """
        if self.probabilities:
            super().prepare(run, known_arguments)
            return
        rows = read_router(run.file(self.type, self.file))
        self.model_copy(update={"probabilities": tuple(map(tuple, rows.tolist()))}).prepare(run, known_arguments)


def write_router(path: str | Path, probabilities: Tensor, names: Sequence[str]) -> None:
    """Writes the probabilities of a router as safetensors; the file is complete or absent.

    Args:
        path: in the folder of the plan.
        probabilities: (timesteps, sublayers) between 0 and 1.
        names: of the sublayers, as `Router.reach` gives them.
    """
    header = {"format": _FORMAT, "modules": json.dumps(list(names))}
    write_tensors(Path(path), {"probabilities": probabilities.detach().float().cpu()}, header)


def read_router(path: str | Path) -> Tensor:
    """Probabilities that `write_router` wrote, (timesteps, sublayers) float32.

    Raises:
        InputError: when the file is missing, a pickle, corrupted, or holds something else.
    """
    tensors, header = read_tensors(Path(path))
    rows = tensors.get("probabilities", torch.zeros(0))
    sound = rows.ndim == 2 and rows.numel() and rows.is_floating_point() and bool(((rows >= 0) & (rows <= 1)).all())
    if header.get("format") != _FORMAT or not sound:
        raise InputError(f"{path} holds no router; write one with write_router, or train one")
    return rows.float()
