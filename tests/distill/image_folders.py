"""Folders of random images, and a pipeline that takes such images."""

import numpy as np
from PIL import Image
from zoo import ZOO


def dit():
    return ZOO["dit"].build()


def save_images(folder, names, size=(8, 8), mode="L"):
    draw = np.random.default_rng(0)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
        Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8), mode).save(path)
    return folder
