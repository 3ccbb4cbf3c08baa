"""What methods share whose student may be told the guidance scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from ...samplers.errors import InputError
from ..guidance_embedding import told, with_guidance_embedding
from ..method import Method, Moment
from ..role_kinds import Adapter, Kind
from ..sources import Batch
from ..team import Team
from ..times import Draws


class Embedding(Method):
    """A method whose students may be told the guidance scale."""

    embed_guidance: bool = Field(
        default=False, description="Whether the student is told the guidance scale; needs a U-Net that can be told."
    )

    @property
    def guidance_in_student(self) -> bool:
        """Not where it is told the scale: then the pipeline's ``guidance_scale`` says it, at one evaluation a step."""
        return not self.embed_guidance

    @property
    def learns_guidance(self) -> bool:
        """Where the student is told the scale."""
        return self.embed_guidance

    def fitted(self, network: nn.Module) -> nn.Module:
        """With an input for the guidance scale where the student is told it."""
        return with_guidance_embedding(network) if self.embed_guidance else network

    def refuse_adapter(self, student: Kind) -> None:
        """Refuses a student that is told the scale and has no weights for it.

        Raises:
            InputError: for an adapter.
        """
        if self.embed_guidance and isinstance(student, Adapter):
            raise InputError(
                "an adapter gives the pipeline's network no input for the guidance scale; train all weights, or set "
                "embed_guidance to false"
            )


class Telling(Embedding):
    """A method whose student may be told the guidance scale, and then learns a range of them."""

    guidance_scale: tuple[float, ...] = Field(
        default=(),
        max_length=2,
        description="Of the teacher: one, or the ends of a range. None for the pipeline's, or with embed_guidance "
        "for 1 to twice it.",
    )

    @model_validator(mode="after")
    def _a_range_is_told(self) -> Self:
        if self.embed_guidance and len(self.guidance_scale) == 1:
            raise ValueError(
                f"embed_guidance trains a range of guidance scales; got {self.guidance_scale[0]:g} alone, "
                "give both ends or set it to false"
            )
        return self

    def drawn(self, batch: Batch, roles: Team, moment: Moment) -> tuple[Batch, Team]:
        """The batch whose student is told what its teacher is guided with, and the team in which that is decided.

        All roles are told; the teacher has no weights for it, and predicts what it did.

        Raises:
            InputError: when the pipeline does not guide, or would not tell its network the scale.
        """
        if not self.embed_guidance:
            return batch, roles
        batch.condition.branch("uncond")
        ends = self.guidance_scale or (1.0, 2 * roles.guidance)
        scales = roles.scales(ends, len(batch), moment.generators)
        condition = told(batch.condition, scales, batch.numbers.device)
        decided = _Decided(roles=roles.roles, process=roles.process, guidance=roles.guidance, drawn=scales)
        return replace(batch, condition=condition), decided


@dataclass(frozen=True, kw_only=True)
class _Decided(Team):
    """A team whose guidance scales are drawn: all who ask get the same."""

    drawn: Tensor

    def scales(self, ends: Sequence[float], count: int, draws: Draws) -> Tensor:
        return self.drawn
