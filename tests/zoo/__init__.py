"""Tiny random-weight pipelines of every family: for mechanism, never for quality."""

from . import flux, others, transformers, unets, video
from .family import Family, Guidance

ZOO: dict[str, Family] = {
    family.name: family for module in (unets, transformers, flux, video, others) for family in module.FAMILIES
}

__all__ = ["ZOO", "Family", "Guidance"]
