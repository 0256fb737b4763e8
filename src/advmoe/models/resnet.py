"""ResNet with basic blocks (He et al. 2016), CIFAR and ImageNet stems."""

from collections.abc import Sequence

from torch import Tensor, nn

from advmoe.config.choices import Stem
from advmoe.data import ImageSpec
from advmoe.models.classifier import Classifier
from advmoe.moe import Channels, DenseKind, Gate, Routings, images


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut. Where the shape changes, the shortcut is a 1x1 projection."""

    def __init__(self, kind: DenseKind, inputs: Channels, outputs: Channels, stride: int) -> None:
        super().__init__()
        hidden = kind.channels(outputs.full)
        self.conv1 = kind.conv(inputs, hidden, stride=stride)
        self.conv2 = kind.conv(hidden, outputs)
        self.shortcut = None if inputs is outputs else kind.plain(inputs, outputs, kernel_size=1, stride=stride)
        self.activation = kind.nonlinearity()

    def forward(self, x: Tensor, gate: Gate, logits: Tensor | None = None) -> tuple[Tensor, Routings]:
        """[B, C, H, W] -> [B, C', H', W'], and the Routings of the two convolutions."""
        h, first = self.conv1(x, gate, logits)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        h, second = self.conv2(self.activation(h), gate, logits, shortcut)
        return self.activation(h), first + second


class ResNet(Classifier):
    """`blocks[i]` basic blocks in stage i, which has `width` * 2**i channels in the dense network."""

    def __init__(self, kind: DenseKind, spec: ImageSpec, *, blocks: Sequence[int], width: int, stem: Stem) -> None:
        super().__init__(kind, spec, stem)
        channels = kind.stem_channels(width)
        self.stem = make_stem(kind, stem, images(spec.shape[0]), channels)
        stages: list[nn.Module] = []
        for stage, depth in enumerate(blocks):
            outputs = kind.channels(width * 2**stage)
            if stage == 0 and outputs.width == channels.width:
                outputs = channels  # the stem writes the first stage's residual stream
            self.begin_stage(kind, channels, len(stages))
            for block in range(depth):
                stages.append(BasicBlock(kind, channels, outputs, stride=2 if stage > 0 and block == 0 else 1))
                channels = outputs
        self.blocks = nn.ModuleList(stages)
        self.finish(channels)

    def features(self, x: Tensor, gate: Gate, logits: Tensor | None) -> tuple[Tensor, Routings]:
        return self.chain(self.blocks, self.stem(x), gate, logits)


def make_stem(kind: DenseKind, stem: Stem, inputs: Channels, outputs: Channels) -> nn.Sequential:
    """The first layers: a convolution, batch norm and activation.

    `cifar`: 3x3, stride 1. `imagenet`: 7x7, stride 2, then 3x3 max pooling of stride 2.
    """
    if stem == "cifar":
        return nn.Sequential(kind.plain(inputs, outputs), kind.nonlinearity())
    convolution = kind.plain(inputs, outputs, kernel_size=7, stride=2)
    return nn.Sequential(convolution, kind.nonlinearity(), nn.MaxPool2d(3, stride=2, padding=1))
