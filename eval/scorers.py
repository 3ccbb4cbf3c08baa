"""Judges of single samples, for parts and searches that decide by one: `fewstep.samplers.scoring.Scorer`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..samplers.errors import InputError
from ..samplers.registry import Registry
from .clipscore import ClipScore
from .features import Classifier, load_feature_net
from .quantise import to_uint8

SCORERS: Registry[Any] = Registry("scorer")


@SCORERS.register("class")
@dataclass(frozen=True)
class ClassScorer:
    """Log-probability (nats, at most 0) that a classifier gives to the class that was asked for.

    Args:
        net: a feature net that also classifies; labels are the positions of its logits.
    """

    net: Classifier

    @classmethod
    def load(cls, net: str, path: Path | None) -> ClassScorer:
        """The scorer of a feature net by name.

        Raises:
            InputError: when the net does not classify.
        """
        loaded = load_feature_net(net, path)
        if not isinstance(loaded, Classifier):
            raise InputError(f"--net {net} does not classify; use fashion-features, or --scorer clip")
        return cls(loaded)

    def __call__(self, samples: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        """Scores (B,) of images (B, C, H, W) in 0 to 1 with ``class_labels`` among the conditions."""
        if "class_labels" not in conditions:
            raise InputError(f"the class scorer needs class_labels in the call; got {', '.join(conditions) or 'none'}")
        logits = self.net.class_logits(to_uint8(samples)).cpu()
        labels = torch.as_tensor(conditions["class_labels"])
        return logits.log_softmax(dim=1).gather(1, labels.reshape(-1, 1))[:, 0]


@SCORERS.register("clip")
@dataclass(frozen=True)
class PromptScorer:
    """CLIPScore (arXiv:2104.08718) of each image and its prompt, 0 to 100.

    Args:
        clip: the CLIP that judges.
    """

    clip: ClipScore

    @classmethod
    def load(cls, net: str, path: Path | None) -> PromptScorer:
        """The scorer of a local CLIP folder.

        Raises:
            InputError: when no folder is given.
        """
        if path is None:
            raise InputError("--scorer clip needs --net_path, a local CLIP folder")
        return cls(ClipScore.from_folder(path))

    def __call__(self, samples: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        """Scores (B,) of images (B, C, H, W) in 0 to 1 with ``prompt`` among the conditions."""
        if "prompt" not in conditions:
            raise InputError(f"the clip scorer needs a prompt in the call; got {', '.join(conditions) or 'none'}")
        return self.clip.per_image(to_uint8(samples), list(conditions["prompt"]))
