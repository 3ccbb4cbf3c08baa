"""Trains the demo's classifiers: the judge (``fashion-features``) and, with another seed, the perceptual net.

The autoencoder's perceptual term uses the second one, never the judge: a teacher that was fitted to the
features it is scored with would score better than it looks.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Generator, Tensor, nn

from fewstep.eval.nets.fashion import FashionNet
from fewstep.scripts.demo.data import load_fashion, to_float
from fewstep.scripts.demo.trainer import Recipe, train, training_parser

BATCH = 128


def augment(images: Tensor, generator: Generator) -> Tensor:
    """Random mirror and shift by up to two pixels of uint8 images (B, 1, 32, 32)."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    dy, dx = torch.randint(-2, 3, (2,), generator=generator).tolist()
    return images.roll((dy, dx), dims=(2, 3))


def accuracy(net: FashionNet, images: Tensor, labels: Tensor) -> float:
    """Share of right answers, in [0, 1]."""
    net.eval()
    with torch.no_grad():
        answers = [net(to_float(batch))[1].argmax(1) for batch in torch.split(images, 500)]
    return (torch.cat(answers) == labels).float().mean().item()


def load_classifier(folder: Path) -> FashionNet:
    """The averaged weights of a run, frozen."""
    net = FashionNet((16, 64, 128))
    tensors = load_file(folder / "state.safetensors")
    net.load_state_dict({k.removeprefix("average."): v for k, v in tensors.items() if k.startswith("average.")})
    return net.eval().requires_grad_(False)


def train_classifier(folder: Path, data: Path, steps: int, seed: int) -> tuple[FashionNet, dict[str, float]]:
    """Trains one classifier, or resumes it from ``folder``; returns it with its test accuracy and time."""
    images, labels = load_fashion("train", data)
    torch.manual_seed(seed)
    net = FashionNet((16, 64, 128))
    net.to(memory_format=torch.channels_last)

    def loss_function(generator: Generator) -> dict[str, Tensor]:
        index = torch.randint(len(images), (BATCH,), generator=generator)
        x = to_float(augment(images[index], generator))
        logits = net(x.to(memory_format=torch.channels_last))[1]
        return {"ce": nn.functional.cross_entropy(logits.float(), labels[index], label_smoothing=0.05)}

    recipe = Recipe(steps=steps, lr=3e-3, weight_decay=0.02, ema=0.995, seed=seed, bf16=True)
    record = train(net, loss_function, recipe, folder)
    return net, record | {"test_accuracy": accuracy(net, *load_fashion("test", data))}


def main() -> None:
    """Trains one classifier into ``--work``."""
    parser = training_parser(__doc__, steps=3000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(train_classifier(options.work, options.data, options.steps, options.seed)[1])  # noqa: T201


if __name__ == "__main__":
    main()
