"""Turns a trained classifier into ``eval/demo/fashion-features``: the net, and statistics of real images.

A Fréchet distance has the unit of the squared features, which training leaves open. It is fixed here: the features
are scaled so that the floor (10,000 real test images against the 60,000 training images) is 0.16. Ratios of
distances, accuracy, precision and recall do not depend on it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from fewstep.eval.distances import frechet_distance
from fewstep.eval.features import FeatureNet, FeatureStats, load_feature_net
from fewstep.eval.nets.fashion import FashionNet
from fewstep.samplers.files import write_json, write_tensors, write_text
from fewstep.scripts.demo.data import DEFAULT_DATA, load_fashion
from fewstep.scripts.demo.train_features import accuracy, load_classifier
from fewstep.scripts.demo.trainer import read_header

FLOOR = 0.16
REAL_SAMPLES = 5_000
"Raw features of this many training images ship, for the kernel distance and the manifold metrics."

CARD = """# fashion-features

A residual classifier of 32x32 grey images ({parameters:,} parameters); its {dim} pooled features judge the demo's
teachers (`fd_fashion`, `kd_fashion`, precision, recall, density, coverage, class accuracy); no score of it is an FID.

* Data: the 60,000 training images of Fashion-MNIST (Xiao et al., arXiv:1708.07747; MIT licence), zero-padded to 32x32,
  with random mirroring and shifts of up to two pixels.
* Training: {steps} steps of 128, AdamW, cross entropy with label smoothing 0.05, {minutes:.0f} minutes on one CPU core:
  `python -m fewstep.scripts.demo.train_features`, then `python -m fewstep.scripts.demo.ship_features`.
* Test accuracy: {accuracy:.4f} on the 10,000 test images.
* Floor: `fd_fashion` of the test images against the training images is {floor:.4f}. The features are scaled by
  {scale:.4f}, folded into the last stage, to put it there: a unit, on which no ratio depends.
* Files: `train.safetensors` and `test.safetensors` (additive statistics of all images), `real.safetensors` (features
  of {samples:,} training images, every {stride}th).
* Licence of weights and statistics: Apache-2.0.
"""


def scale_features(net: FashionNet, scale: float) -> None:
    """Multiplies the features by ``scale`` and leaves the logits: the ReLU at the end is homogeneous."""
    with torch.no_grad():
        for norm in (net.stage3.body[-1], net.stage3.shortcut[-1]):
            norm.weight.mul_(scale)  # type: ignore[operator]
            norm.bias.mul_(scale)  # type: ignore[operator]
        net.head.weight.div_(scale)


def features_of(net: FeatureNet, images: Tensor) -> Tensor:
    """Features float32 (n, d) of uint8 images."""
    return torch.cat([net(batch) for batch in torch.split(images, 500)])


def save_net(net: FashionNet, out: Path) -> None:
    """Writes ``config.json`` and ``model.safetensors``."""
    write_json(out / "config.json", {"widths": [16, 64, 128], "classes": 10})
    write_tensors(out / "model.safetensors", net.state_dict())


def main() -> None:
    """Writes the folder ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="run of train_features")
    parser.add_argument("--out", type=Path, required=True, help="such as eval/demo/fashion-features")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    options = parser.parse_args()
    torch.set_num_threads(1)
    train_images, _ = load_fashion("train", options.data)
    test_images, test_labels = load_fashion("test", options.data)
    module = load_classifier(options.work)
    scale = 1.0
    while True:  # once to measure the floor, once more with the features scaled
        save_net(module, options.out)
        net = load_feature_net("fashion-features", options.out)
        train = features_of(net, train_images)
        test = FeatureStats.from_features(features_of(net, test_images), fingerprint=net.fingerprint)
        everything = FeatureStats.from_features(train, fingerprint=net.fingerprint)
        floor = frechet_distance(test, everything)
        if scale != 1.0:
            break
        scale = (FLOOR / floor) ** 0.5
        scale_features(module, scale)
    everything.save(options.out / "train.safetensors")
    test.save(options.out / "test.safetensors")
    stride = len(train) // REAL_SAMPLES
    write_tensors(options.out / "real.safetensors", {"features": train[::stride]}, {"fingerprint": net.fingerprint})
    header = read_header(options.work)
    card = CARD.format(
        parameters=sum(p.numel() for p in module.parameters()),
        dim=net.dim,
        steps=header["step"],
        minutes=float(header["train_s"]) / 60,
        accuracy=accuracy(module, test_images, test_labels),
        floor=floor,
        scale=scale,
        samples=REAL_SAMPLES,
        stride=stride,
    )
    write_text(options.out / "README.md", card)


if __name__ == "__main__":
    main()
