"""Fashion-MNIST as a folder of images, one folder a label: what ``fewstep distill --train_data_dir`` reads.

python -m fewstep.scripts.demo.write_images --out DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from fewstep.scripts.demo.data import DEFAULT_DATA, load_fashion


def main() -> None:
    """Writes the images that are not there yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the images")
    parser.add_argument("--split", choices=("train", "test"), default="train", help="which of them")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of the data set")
    options = parser.parse_args()
    images, labels = load_fashion(options.split, options.data)
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        path = options.out / str(label) / f"{number:05d}.png"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(path)


if __name__ == "__main__":
    main()
