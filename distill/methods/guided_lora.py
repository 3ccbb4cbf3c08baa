"""Distillation of classifier-free guidance into an adapter."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ..method import METHODS
from .guided import Guided


@METHODS.register("guided-lora")
class GuidedLora(Guided):
    """Guided distillation at one guidance scale: the student is an adapter on the teacher, and told no scale."""

    lora_rank: ClassVar[int] = 64

    type: Literal["guided-lora"] = "guided-lora"  # type: ignore[assignment]
    embed_guidance: Literal[False] = Field(default=False, description="An adapter cannot be told the guidance scale.")
