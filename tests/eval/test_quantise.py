import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given
from hypothesis import strategies as st

from fewstep.eval import as_rgb, check_uint8, to_uint8
from fewstep.samplers.errors import InputError


def test_rounds_as_diffusers_does() -> None:
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pil = VaeImageProcessor.numpy_to_pil(images.permute(0, 2, 3, 1).numpy())
    theirs = torch.from_numpy(np.stack([np.asarray(picture) for picture in pil])).permute(0, 3, 1, 2)
    assert torch.equal(to_uint8(images), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_level_survives(dtype: torch.dtype) -> None:
    levels = torch.arange(256, dtype=dtype).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(levels / 255), levels.to(torch.uint8))


@given(st.floats(-0.5, 1.5, width=32))
def test_error_is_at_most_half_a_level(value: float) -> None:
    level = to_uint8(torch.full((1, 1, 1, 1), value)).item()
    assert abs(level - 255 * min(max(value, 0), 1)) <= 0.5 + 1e-4


def test_half_precision_is_rounded_in_float32() -> None:
    half = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(1)).half()
    assert torch.equal(to_uint8(half), to_uint8(half.float()))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), r"floating point tensor in \[0, 1\]; got uint8"),
        (np.zeros((1, 3, 4, 4)), "got ndarray"),
        (torch.zeros(3, 4, 4), r"shape \(B, C, H, W\); got \(3, 4, 4\)"),
        (torch.zeros(0, 3, 4, 4), r"got \(0, 3, 4, 4\)"),
        (torch.tensor([0.0, torch.nan, torch.inf]).view(3, 1, 1, 1), r"2 of 3 images hold NaN .* image 1"),
        (torch.full((1, 1, 2, 2), -1.0), r"lie in \[0, 1\]; got \[-1, -1\]: rescale"),
        (torch.full((1, 1, 2, 2), 255.0), r"got \[255, 255\]"),
    ],
)
def test_refuses(images: torch.Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words):
        to_uint8(images)


@pytest.mark.parametrize(
    ("images", "channels", "words"),
    [
        (torch.zeros(1, 3, 4, 4), None, "only uint8 images are scored; got float32: use to_uint8 first"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), None, r"shape \(B, C, H, W\)"),
        (torch.zeros(1, 2, 4, 4, dtype=torch.uint8), (1, 3), "must have 1 or 3 channels; got 2"),
    ],
)
def test_check_refuses(images: torch.Tensor, channels: tuple[int, ...] | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_uint8(images, channels)


def test_grey_is_repeated_and_colour_kept() -> None:
    grey = torch.randint(0, 256, (2, 1, 3, 3), dtype=torch.uint8)
    assert all(torch.equal(as_rgb(grey)[:, c], grey[:, 0]) for c in range(3))
    colour = torch.randint(0, 256, (2, 3, 3, 3), dtype=torch.uint8)
    assert torch.equal(as_rgb(colour), colour)
