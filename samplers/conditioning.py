"""The conditioning: the time that the network is told, if not the grid's."""

from __future__ import annotations

from .part import Part
from .registry import Registry

CONDITIONINGS: Registry[type[Part]] = Registry("conditioning type")
