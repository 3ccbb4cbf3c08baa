"""Block masks: which blocks, attentions and MLPs of a transformer compute at which step, as a table."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator
from torch import nn

from .cache import CACHES
from .errors import InputError
from .mask import RowsPart, Target, check_targets, is_block, targets_in


def uniform_mask(steps: int, every: int, targets: tuple[Target, ...] = ("block",), order: int = 0) -> BlockMask:
    """The mask in which every so manyth step computes everything, from the first on, and the others nothing.

    Args:
        steps: timesteps of the scheduler.
        every: how many steps from one that computes to the next; 1 computes all.
        targets: kinds of modules that it decides about.
        order: degree of the forecast.

    Raises:
        InputError: when ``steps`` or ``every`` is less than 1.
    """
    if min(steps, every) < 1:
        raise InputError(f"a uniform mask has at least 1 step and computes every 1 or more; got {steps} and {every}")
    rows = tuple("0" if index % every else "1" for index in range(steps))
    return BlockMask(rows=rows, targets=targets, order=order)


@CACHES.register("block-mask")
class BlockMask(RowsPart):
    """Computes a module where the table has a 1, and goes on from its last values where it has a 0.

    The modules of a network are counted in the order in which it holds them: block after block, and within a block
    itself, its attentions and its MLPs, of the kinds in ``targets``. A module within a block that is left out is not
    asked. Of a whole block each stream x becomes x plus the change that the block made when it was computed
    (``reuse="residual"``); of the others the output is kept, before any gate. Order 1 and 2 put a polynomial in the
    step's position through the last 2 or 3 computed values, as TaylorSeer does (arXiv:2503.06923); until there are as
    many the order is lower.
    """

    type: Literal["block-mask"] = "block-mask"
    targets: tuple[Target, ...] = Field(default=("block",), min_length=1, description="Kinds of modules in the table.")
    reuse: Literal["residual", "output"] = Field(default="residual", description="What is kept of whole blocks.")
    order: int = Field(default=0, ge=0, le=2, description="Degree of the forecast; 0 reuses the last value.")

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if "0" in self.rows[0]:
            raise ValueError(
                f"the first row of a block mask computes everything, for there is nothing to reuse; got {self.rows[0]}"
            )
        check_targets("block mask", self.targets)
        return self

    @classmethod
    def suggest(cls, pipe: Any, steps: int) -> BlockMask:
        """Every second step computes all blocks.

        Raises:
            InputError: when no network of the pipeline has blocks.
        """
        part = uniform_mask(steps, every=2)
        part.modules(pipe)
        return part

    def forecasts(self) -> int:
        """The order."""
        return self.order

    def residual(self, name: str) -> bool:
        """True of whole blocks, unless their output is reused."""
        return self.reuse == "residual" and is_block(name)

    def reach(self, network: nn.Module) -> tuple[str, ...]:
        """The modules of the table.

        Raises:
            InputError: when the network has no stack of blocks, or more or fewer modules than the table.
        """
        return self.check_modules(network, targets_in(network, self.targets))
