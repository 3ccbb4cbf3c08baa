"""The correction: what is done to the network's output before the solver sees it."""

from __future__ import annotations

from .part import Part
from .registry import Registry

CORRECTIONS: Registry[type[Part]] = Registry("correction type")
