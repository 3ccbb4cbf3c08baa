"""The demo's feature network: a small residual classifier of 32x32 grey images."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a 1x1 shortcut; halves the side when ``stride`` is 2."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels_out),
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
            nn.BatchNorm2d(channels_out),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return torch.relu(self.body(x_BCHW) + self.shortcut(x_BCHW))


class FashionNet(nn.Module):
    """Classifier whose pooled last layer is the feature vector.

    Args:
        widths: channels of the three stages (sides 32, 16, 8); the last one is the feature dimension.
        classes: number of labels.
    """

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 128), classes: int = 10) -> None:
        super().__init__()
        first, second, third = widths
        self.stem = nn.Sequential(
            nn.Conv2d(1, first, 3, 1, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU(inplace=True)
        )
        self.stage1 = ResidualBlock(first, first, 1)
        self.stage2 = ResidualBlock(first, second, 2)
        self.stage3 = ResidualBlock(second, third, 2)
        self.head = nn.Linear(third, classes)

    def maps(self, x_BCHW: Tensor) -> list[Tensor]:
        """Feature maps of the three stages for ``x`` float in [-1, 1], shape (B, 1, 32, 32)."""
        first = self.stage1(self.stem(x_BCHW))
        second = self.stage2(first)
        return [first, second, self.stage3(second)]

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, d) and logits (B, classes) of ``x`` float in [-1, 1], shape (B, 1, 32, 32)."""
        features = self.maps(x_BCHW)[-1].mean(dim=(2, 3))
        return features, self.head(features)
