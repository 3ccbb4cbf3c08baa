"""Latent consistency distillation of an adapter."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ..method import METHODS
from .lcm import LCM


@METHODS.register("lcm-lora")
class LCMLora(LCM):
    """LCM-LoRA (arXiv:2311.05556): the student is an adapter on the teacher, and its own target."""

    lora_rank: ClassVar[int] = 64

    type: Literal["lcm-lora"] = "lcm-lora"  # type: ignore[assignment]
    embed_guidance: Literal[False] = Field(default=False, description="An adapter cannot be told the guidance scale.")
    target_decay: float | None = Field(
        default=None, ge=0, lt=1, description="Of the average that is the target; none for the student itself."
    )
