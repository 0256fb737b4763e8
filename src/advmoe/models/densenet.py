"""DenseNet-BC (Huang et al. 2017): bottlenecks and compression; CIFAR and ImageNet stems."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from advmoe.config.choices import Stem
from advmoe.data import ImageSpec
from advmoe.models.classifier import Classifier
from advmoe.models.resnet import make_stem
from advmoe.moe import Channels, DenseKind, Gate, Routings, images

BOTTLENECK = 4  # width of the bottleneck, in growth rates


class DenseLayer(nn.Module):
    """Norm, activation, 1x1 convolution, norm, activation, 3x3 convolution; the output is concatenated to the input."""

    def __init__(self, kind: DenseKind, inputs: Channels, growth: int) -> None:
        super().__init__()
        bottleneck, self.outputs = kind.channels(BOTTLENECK * growth), kind.channels(growth)
        self.norm1 = kind.norm(inputs)
        self.conv1 = kind.conv(inputs, bottleneck, kernel_size=1)
        self.conv2 = kind.conv(bottleneck, self.outputs, norm=False)
        self.activation = kind.nonlinearity()

    def forward(self, x: Tensor, gate: Gate, logits: Tensor | None = None) -> tuple[Tensor, Routings]:
        """[B, C, H, W] -> [B, C + growth, H, W], and the Routings of the two convolutions."""
        h, first = self.conv1(self.activation(self.norm1(x)), gate, logits)
        h, second = self.conv2(self.activation(h), gate, logits)
        return torch.cat([x, h], dim=1), first + second


class Transition(nn.Module):
    """Norm, activation, 1x1 convolution to half the channels, 2x2 average pooling."""

    def __init__(self, kind: DenseKind, inputs: Channels, outputs: Channels) -> None:
        super().__init__()
        self.norm, self.activation = kind.norm(inputs), kind.nonlinearity()
        self.conv = kind.plain(inputs, outputs, kernel_size=1, norm=False)

    def forward(self, x: Tensor, gate: Gate, logits: Tensor | None = None) -> tuple[Tensor, Routings]:
        """[B, C, H, W] -> [B, C', H / 2, W / 2], and no routings."""
        return avg_pool2d(self.conv(self.activation(self.norm(x))), 2), ()


class DenseNet(Classifier):
    """`layers[i]` dense layers in block i. `width` is the dense network's growth rate; its stem has 2 * `width` channels."""

    def __init__(self, kind: DenseKind, spec: ImageSpec, *, layers: Sequence[int], width: int, stem: Stem) -> None:
        super().__init__(kind, spec, stem)
        # each transition halves the side and rounds down; the ImageNet stem divides it by 4 and rounds up
        self.min_size = 2 ** (len(layers) - 1) if stem == "cifar" else 4 * 2 ** (len(layers) - 1) - 3
        channels, inputs = kind.channels(2 * width), images(spec.shape[0])
        self.stem = make_stem(kind, stem, inputs, channels) if stem == "imagenet" else kind.plain(inputs, channels, norm=False)
        parts: list[nn.Module] = []
        for block, depth in enumerate(layers):
            if block > 0:
                outputs = kind.channels(channels.full // 2)
                parts.append(Transition(kind, channels, outputs))
                channels = outputs
            self.begin_stage(kind, channels, len(parts))
            for _ in range(depth):
                layer = DenseLayer(kind, channels, width)
                parts.append(layer)
                channels += layer.outputs
        self.parts = nn.ModuleList(parts)
        self.norm, self.activation = kind.norm(channels), kind.nonlinearity()
        self.finish(channels)

    def features(self, x: Tensor, gate: Gate, logits: Tensor | None) -> tuple[Tensor, Routings]:
        h, routings = self.chain(self.parts, self.stem(x), gate, logits)
        return self.activation(self.norm(h)), routings
