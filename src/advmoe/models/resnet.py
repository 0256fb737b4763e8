"""ResNet with basic blocks (He et al. 2016), CIFAR and ImageNet stems."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import relu

from advmoe.models.classifier import Classifier, Normalize
from advmoe.moe import HARD, Gate, Kind, Routings

Stem = Literal["cifar", "imagenet"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 projection where the shape changes."""

    def __init__(self, kind: Kind, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        width = kind.width(channels)
        self.conv1 = kind.conv(in_channels, channels, stride=stride)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = kind.conv(width, channels)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != width:
            projection = nn.Conv2d(in_channels, width, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(width))

    def forward(self, x: Tensor, gate: Gate) -> tuple[Tensor, Routings]:
        h, first = self.conv1(x, gate)
        h, second = self.conv2(relu(self.norm1(h), inplace=True), gate)
        return relu(self.norm2(h) + self.shortcut(x), inplace=True), first + second


class ResNet(Classifier):
    """`blocks` basic blocks per stage; stage i has `width` * 2**i channels in the dense network."""

    def __init__(
        self, kind: Kind, *, blocks: Sequence[int], width: int, stem: Stem,
        num_classes: int, mean: Sequence[float], std: Sequence[float],
    ) -> None:  # fmt: skip
        super().__init__()
        self.normalize = Normalize(mean, std)
        channels = kind.stem_width(width)
        self.stem = make_stem(stem, len(mean), channels)
        stages = []
        for stage, depth in enumerate(blocks):
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(BasicBlock(kind, channels, width * 2**stage, stride))
                channels = kind.width(width * 2**stage)
        self.blocks = nn.ModuleList(stages)
        self.classifier = nn.Linear(channels, num_classes)
        self.number_layers()

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, Routings]:
        h = self.stem(self.normalize(x))
        routings: Routings = ()
        for block in self.blocks:
            h, decided = block(h, gate)
            routings += decided
        return self.classifier(h.mean(dim=(2, 3))), routings


def make_stem(stem: Stem, in_channels: int, channels: int) -> nn.Sequential:
    """`cifar`: 3x3 stride 1. `imagenet`: 7x7 stride 2, then 3x3 max pooling of stride 2."""
    size, stride = (7, 2) if stem == "imagenet" else (3, 1)
    convolution = nn.Conv2d(in_channels, channels, size, stride=stride, padding=size // 2, bias=False)
    pool = [nn.MaxPool2d(3, stride=2, padding=1)] if stem == "imagenet" else []
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True), *pool)
