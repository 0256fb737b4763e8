"""One router for all layers of a network: a small CNN on the image."""

from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import relu

from advmoe.moe.routing import Router

STAGES = (16, 32, 64)
BLOCKS = 3


class NetworkRouter(nn.Module):
    """A ResNet with three stages of 16, 32 and 64 channels, 3 residual blocks each. A Router computes logits from its output.

    For large images (`stem` imagenet) it starts with a 7x7 convolution of stride 2 and max pooling, like the network.
    """

    def __init__(self, in_channels: int, num_experts: int, stem: str) -> None:
        super().__init__()
        large = stem == "imagenet"
        first = nn.Conv2d(
            in_channels, STAGES[0], 7 if large else 3, stride=2 if large else 1, padding=3 if large else 1, bias=False
        )
        pool = [nn.MaxPool2d(3, stride=2, padding=1)] if large else []
        self.stem = nn.Sequential(first, nn.BatchNorm2d(STAGES[0]), nn.ReLU(inplace=True), *pool)
        widths = [STAGES[0], *(width for width in STAGES for _ in range(BLOCKS))]
        self.blocks = nn.Sequential(*(_Block(*pair) for pair in pairwise(widths)))
        self.router = Router(STAGES[-1], num_experts)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, N], float32, of images [B, C, H, W] as the network's first layer gets them: normalised in a Classifier."""
        logits: Tensor = self.router(self.blocks(self.stem(x)))
        return logits


class _Block(nn.Module):
    """Two 3x3 convolutions; where the width grows, stride 2 and a 1x1 projection."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        grows = channels != in_channels
        stride = 2 if grows else 1
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip
        projection = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
        self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels)) if grows else None

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.body(x) + (x if self.shortcut is None else self.shortcut(x)))
