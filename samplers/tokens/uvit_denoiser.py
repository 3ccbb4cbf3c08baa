"""diffusers' U-ViT of image tokens (aMUSEd) as a denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .denoiser import DenoiserSpec, WholeRows, at_least_float32


class UViTDenoiser(WholeRows):
    """`UVit2DModel` over a canvas of height x width tokens (aMUSEd, arXiv:2401.01808).

    The conditioning of `decode` holds ``encoder_hidden_states`` (B, n, d), ``pooled_text_emb`` (B, d) and
    ``micro_conds`` (B, 5): width, height, crop and aesthetic score, as `AmusedPipeline` makes them.

    Args:
        model: in evaluation mode.
        height: of the canvas, in tokens.
        width: of the canvas, in tokens.
        mask_id: the mask's id; the last one of the vocabulary by default.
    """

    def __init__(self, model: Any, height: int, width: int, mask_id: int | None = None) -> None:
        if model.training:
            raise InputError(f"{type(model).__name__} is in training mode; call model.eval() first")
        self.model = model
        self.height = height
        self.width = width
        self.spec = DenoiserSpec(
            mask_id=model.config.vocab_size - 1 if mask_id is None else mask_id, vocab_size=model.config.codebook_size
        )

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        device: torch.device = self.model.device
        return device

    def evaluate(self, tokens: Tensor, time: Tensor | None, cond: Mapping[str, Tensor]) -> Tensor:
        """(R, height * width, codebook)."""
        if tokens.shape[1] != self.height * self.width:
            raise InputError(
                f"the canvas has {tokens.shape[1]} tokens, the image {self.height} x {self.width}; decode with an "
                f"empty prompt and gen_length={self.height * self.width}"
            )
        missing = {"encoder_hidden_states", "pooled_text_emb", "micro_conds"} - set(cond)
        if missing:
            raise InputError(f"{type(self.model).__name__} needs {', '.join(sorted(missing))}; give them in cond")
        logits = self.model(tokens.view(-1, self.height, self.width), **cond)
        return at_least_float32(logits.flatten(2).transpose(1, 2))
