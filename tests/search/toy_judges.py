"""A feature network of four numbers, and real images for it."""

import torch

from fewstep.eval import FeatureStats
from fewstep.eval.reference import RealImages
from fewstep.search.budget import Judges

PRINT = "0" * 64


class ToyNet:
    """Four means of pixels; the class is the brightest of the first three."""

    name, dim, channels, preprocess, fingerprint = "toy", 4, (1,), "none", PRINT

    def __init__(self):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return images.float().flatten(1).unflatten(1, (4, -1)).mean(2) / 255

    def logits_from_features(self, features):
        return features[:, :3]


def toy_judges():
    net = ToyNet()
    features = torch.rand(40, 4, generator=torch.Generator().manual_seed(3))
    stats = FeatureStats.from_features(features, fingerprint=PRINT)
    return Judges(net=net, real=RealImages("real", "key", stats, features, {}))
