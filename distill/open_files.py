"""Files of latents and of pairs, which stay open: a batch takes its rows from many of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors

from ..samplers.errors import InputError

OPEN = 256
"Files that are open at a time, at most."


@contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """Turns what a damaged file raises in the block into an error that names it.

    Raises:
        InputError: instead.
    """
    try:
        yield
    except (safetensors.SafetensorError, KeyError, IndexError) as error:
        raise InputError(f"{path} is corrupted ({error}); delete it and make it again") from None
