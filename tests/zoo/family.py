"""What a family of the zoo is, and the draws that its call arguments are made of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from typing import Any, Literal

import torch

PROMPTS = {"prompt_embeds": 0, "negative_prompt_embeds": 1}

Guidance = Literal["none", "doubled", "separate", "embedded"]


@dataclass(frozen=True)
class Family:
    """A pipeline of random weights, with the arguments it is called with.

    Attributes:
        name: Key of the family in ``ZOO``.
        build: A new pipeline; two builds have equal weights.
        arguments: Call arguments, without the steps, of ``batch`` images whose seeds are ``seed``, ``seed + 1``, ...
            Image ``seed + 1`` of a batch has the arguments it would have alone.
        denoiser: Component that is called once or twice a step.
        guidance: How the branches of guidance are evaluated: one call of twice the rows, two calls, inside the
            network from a scale that it is told, or not at all.
        scale: Argument that sets the scale of guidance.
        conditional_first: Whether doubled rows start with the conditional ones; two calls always do.
        share: Part of the steps asked for that the pipeline runs; below 1 where it starts from an image.
        steps_argument: Argument that sets the number of steps.
        tokens: Whether the denoiser predicts tokens instead of noise or velocity.
    """

    name: str
    build: Callable[[], Any]
    arguments: Callable[[Any, int, int], dict[str, Any]]
    denoiser: str
    guidance: Guidance
    scale: str = "guidance_scale"
    conditional_first: bool = False
    share: float = 1.0
    steps_argument: str = "num_inference_steps"
    tokens: bool = False

    def __str__(self) -> str:
        return self.name

    def call(self, pipe: Any, batch: int = 2, seed: int = 0, steps: int = 2, **overrides: Any) -> torch.Tensor:
        """Samples of a call that runs ``steps`` steps: (batch, ...), float32, or int64 of tokens."""
        asked = {self.steps_argument: round(steps / self.share)}
        result = pipe(**self.arguments(pipe, batch, seed) | asked | overrides)
        samples = next(iter(result.values()))
        return torch.as_tensor(samples)


def generators(batch: int, seed: int) -> list[torch.Generator]:
    """One generator per image."""
    return [torch.Generator().manual_seed(seed + index) for index in range(batch)]


def rows(batch: int, seed: int, shape: tuple[int, ...], salt: int = 0) -> torch.Tensor:
    """Standard normal draws, one per image and independent of the other images of the batch: (batch, *shape)."""
    return torch.stack([torch.randn(shape, generator=draw) for draw in generators(batch, seed + 1000 * (salt + 1))])


def pictures(batch: int, seed: int) -> torch.Tensor:
    """Random colour images in [0, 1]: (batch, 3, 16, 16)."""
    return rows(batch, seed, (3, 16, 16), salt=7).sigmoid()


def masks(batch: int) -> torch.Tensor:
    """Masks whose right half is to be painted: (batch, 1, 16, 16), 0 or 1."""
    mask = torch.zeros(batch, 1, 16, 16)
    mask[..., 8:] = 1
    return mask


def texts(batch: int, seed: int, width: int, names: Mapping[str, int] = PROMPTS) -> dict[str, torch.Tensor]:
    """Embeddings of a prompt and a negative prompt, each (batch, 4, width), by name; ``names`` maps them to salts."""
    return {name: rows(batch, seed, (4, width), salt) for name, salt in names.items()}


def pooled(batch: int, seed: int, width: int) -> dict[str, torch.Tensor]:
    """Pooled embeddings of a prompt and a negative prompt, each (batch, width)."""
    names = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return {name: rows(batch, seed, (width,), salt) for salt, name in enumerate(names, 2)}


def text_masks(batch: int, suffix: str = "") -> dict[str, torch.Tensor]:
    """Masks, each (batch, 4), of prompts that fill their length and negative prompts one token shorter."""
    whole = torch.ones(batch, 4, dtype=torch.long)
    shorter = whole.clone()
    shorter[:, -1] = 0
    return {f"prompt_attention_mask{suffix}": whole, f"negative_prompt_attention_mask{suffix}": shorter}


def lively(network: torch.nn.Module) -> torch.nn.Module:
    """The network in eval mode; matrices that start at zero hold small normal values."""
    draw = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if parameter.ndim > 1 and not parameter.any():
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=draw)
    return network.eval()


def finished(pipe: Any) -> Any:
    """The pipeline with lively networks and no progress bar."""
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            lively(component)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_pipeline(builder: str, *arguments: Any, **options: Any) -> Any:
    """A pipeline of ``tests/tiny.py`` that is as lively as the others."""
    return finished(getattr(import_module("tiny"), builder)(*arguments, **options))


def kl_vae(**options: Any) -> Any:
    """A small ``AutoencoderKL`` of four channels that halves an image."""
    from diffusers import AutoencoderKL

    sizes = {"latent_channels": 4, "block_out_channels": (8, 8), "norm_num_groups": 4, "sample_size": 16}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**sizes | blocks | options)


def assembled(kind: str, **parts: Any) -> Any:
    """A lively pipeline of the class called ``kind``; what it asks for and is not given, it does without."""
    import diffusers

    pipeline = getattr(diffusers, kind)
    asked = signature(pipeline).parameters.values()
    absent = {part.name: None for part in asked if part.default is part.empty}
    return finished(pipeline(**absent | parts))
