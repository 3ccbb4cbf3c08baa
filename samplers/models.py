"""The models: which network runs which steps."""

from __future__ import annotations

from .part import Part
from .registry import Registry

MODELS: Registry[type[Part]] = Registry("models type")
