"""The start: what sampling starts from, if not the pipeline's own noise."""

from __future__ import annotations

from .part import Part
from .registry import Registry

STARTS: Registry[type[Part]] = Registry("start type")
