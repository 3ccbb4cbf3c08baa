"""The weights: what a plan adds to the pipeline's network, or runs instead of it."""

from __future__ import annotations

from .part import Part
from .registry import Registry

WEIGHTS: Registry[type[Part]] = Registry("weights type")
