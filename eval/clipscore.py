"""CLIPScore (arXiv:2104.08718) with any CLIP folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..samplers.errors import InputError
from ..samplers.fingerprint import fingerprint
from .jackknife import Estimate, mean_estimate
from .nets.transformers_nets import embedding, load_local
from .quantise import as_rgb


@dataclass(frozen=True, eq=False)
class ClipScore:
    """100 max(cos, 0) between the embeddings of an image and its prompt.

    The factor 100 is the one in use today (the paper has 2.5). Scores of different CLIPs do not compare, so give
    the name of the folder with the number.

    Args:
        model: a ``transformers`` CLIP model.
        tokenizer: its tokenizer.
        image_processor: its image processor.
    """

    model: Any
    tokenizer: Any
    image_processor: Any

    @property
    def fingerprint(self) -> str:
        """Which weights judge."""
        return fingerprint(self.model)

    @classmethod
    def from_folder(cls, path: Path | str, device: str | torch.device = "cpu") -> ClipScore:
        """Loads a local CLIP folder (safetensors); nothing is downloaded.

        Raises:
            InputError: when it is missing, of another model, or without safetensors.
        """
        from transformers import AutoImageProcessor, AutoTokenizer

        model = load_local("clipscore", Path(path), ("clip",)).to(device)
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
            processor = AutoImageProcessor.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{path} lacks a tokenizer or image processor; save CLIPProcessor there ({reason})"
            ) from None
        return cls(model, tokenizer, processor)

    @torch.no_grad()
    def per_image(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores float64 (B,), in [0, 100]; prompts are cut at the length the text encoder can take.

        Args:
            images: uint8 (B, 1 or 3, H, W); grey is repeated to three channels.
            prompts: B texts.

        Raises:
            InputError: when there is not one prompt for each image.
        """
        pixels = as_rgb(images)
        if len(prompts) != len(pixels):
            raise InputError(f"CLIPScore needs one prompt for each image; got {len(prompts)} for {len(pixels)}")
        device = self.model.device
        inputs = self.image_processor(images=list(pixels.cpu()), return_tensors="pt")
        tokens = self.tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(device)
        image = embedding(self.model.get_image_features(pixel_values=inputs["pixel_values"].to(device)))
        text = embedding(
            self.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        )
        cosine = torch.nn.functional.cosine_similarity(image.double(), text.double(), dim=-1)
        return 100 * cosine.clamp(min=0).cpu()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Estimate:
        """Mean score and its standard error."""
        return mean_estimate(self.per_image(images, prompts))
