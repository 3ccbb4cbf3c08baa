"""Judges of samples that are handed to a plan: what they see, and what their answer must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from .errors import InputError

Judged = Literal["images", "latents"]
"What a scorer sees: images (B, C, H, W) in 0 to 1, or the latents that the pipeline would decode, (B, ...)."


class Scorer(Protocol):
    """Judges samples: an image reward, a classifier, a distance to a teacher."""

    def __call__(self, samples: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        """A score for each sample, higher is better.

        Args:
            samples: (B, ...) images or latents, as the part of the plan says.
            conditions: the call's arguments with one entry a sample, by name: class labels, prompts, embeddings.

        Returns:
            (B,) finite numbers that do not depend on the other samples of the batch.
        """


def score(scorer: Any, samples: Tensor, conditions: Mapping[str, Any]) -> Tensor:
    """What ``scorer`` says of ``samples``, (B,) float64 on the CPU.

    Raises:
        InputError: when it is not one finite number a sample.
    """
    if not callable(scorer):
        raise InputError(f"a scorer is called with samples and conditions; got {type(scorer).__name__}")
    with torch.no_grad():
        scores = torch.as_tensor(scorer(samples, conditions)).detach().to("cpu", torch.float64)
    if scores.shape != (len(samples),):
        raise InputError(f"a scorer gives one number a sample, ({len(samples)},); got {tuple(scores.shape)}")
    if not bool(scores.isfinite().all()):
        index = int((~scores.isfinite()).nonzero()[0, 0])
        raise InputError(f"the scorer gave {float(scores[index])} for sample {index}; give finite numbers")
    return scores


def refuse_without_images(part: str, output_type: str) -> None:
    """Raises ``InputError`` where a call of this ``output_type`` makes no images that a scorer could see."""
    if output_type not in ("np", "pil", "pt"):
        raise InputError(
            f"the {part} part scores images, and output_type={output_type!r} makes none; use np, pil or pt, or score "
            "latents"
        )


def finished(pipe: Any, images: Tensor, output_type: str) -> Any:
    """Images as ``pipe`` would have returned them.

    Args:
        pipe: the pipeline.
        images: (B, C, H, W), what it returned for ``output_type="pt"``.
        output_type: np, pil or pt.
    """
    if output_type == "pt":
        return images
    array = images.cpu().permute(0, 2, 3, 1).float().numpy()
    return array if output_type == "np" else pipe.numpy_to_pil(array)


def images_in(output: Any) -> Tensor:
    """The images in what a pipeline returned for ``output_type="pt"``, (B, C, H, W).

    Raises:
        InputError: when there are none.
    """
    images = output[0]
    if not isinstance(images, Tensor) or images.ndim != 4:
        what = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"a scorer sees images (B, C, H, W), and the pipeline returned {what}; score latents instead")
    return images
