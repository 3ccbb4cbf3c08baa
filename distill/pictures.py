"""Rows of images with labels, as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SMALLEST, LARGEST = 96, 224
"Pixels of an image's longer side: smaller ones are enlarged by a whole number, larger ones shrunk."

_GAP, _MARGIN, _FONT, _LINE = 6, 14, 14, 19
_INK, _MUTED, _PAPER = "#1a1a1a", "#6b6b6b", "#ffffff"


@dataclass(frozen=True)
class Row:
    """Images side by side.

    Attributes:
        label: written beside them.
        notes: smaller lines beneath it.
        images: uint8 (n, C, H, W), C 1 or 3.
    """

    label: str
    notes: tuple[str, ...]
    images: Tensor


def labelled_rows(title: str, heads: Sequence[str], rows: Sequence[Row]) -> Image.Image:
    """A picture of some rows, with a title and a head for each column.

    Args:
        title: written above everything.
        heads: one for each image of a row; cut where they are too long.
        rows: of equal length, images of one size.

    Returns:
        RGB.
    """
    font = ImageFont.load_default(_FONT)
    height, width = rows[0].images.shape[2:]
    wide, high = _shown(width, height)
    texts = [text for row in rows for text in (row.label, *row.notes)]
    side = math.ceil(max(font.getlength(text) for text in texts)) + 2 * _GAP
    top = _MARGIN + 2 * _LINE + _GAP
    size = (
        2 * _MARGIN + side + len(heads) * (wide + _GAP) - _GAP,
        top + len(rows) * (high + _GAP) - _GAP + _MARGIN,
    )
    picture = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((_MARGIN, _MARGIN), title, fill=_INK, font=font)
    for column, head in enumerate(heads):
        at = (_MARGIN + side + column * (wide + _GAP), _MARGIN + _LINE)
        draw.text(at, _cut(head, font, wide), fill=_MUTED, font=font)
    for number, row in enumerate(rows):
        y = top + number * (high + _GAP)
        lines = [(row.label, _INK), *((note, _MUTED) for note in row.notes)]
        start = y + max(0, (high - len(lines) * _LINE) // 2)
        for line, (text, colour) in enumerate(lines):
            draw.text((_MARGIN, start + line * _LINE), text, fill=colour, font=font)
        for column, image in enumerate(row.images):
            picture.paste(_resized(image, (wide, high)), (_MARGIN + side + column * (wide + _GAP), y))
    return picture


def _shown(width: int, height: int) -> tuple[int, int]:
    longer = max(width, height)
    factor = LARGEST / longer if longer > LARGEST else max(1, SMALLEST // longer)
    return round(width * factor), round(height * factor)


def _resized(image: Tensor, size: tuple[int, int]) -> Image.Image:
    array = image.permute(1, 2, 0).cpu().numpy()
    made = Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array)).convert("RGB")
    enlarged = size[0] >= made.width
    return made.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text.rstrip()}..."
