"""Wide ResNet (Zagoruyko and Komodakis 2016): pre-activation blocks, widened; CIFAR and ImageNet stems."""

from torch import Tensor, nn

from advmoe.config.choices import Stem
from advmoe.data import ImageSpec
from advmoe.models.classifier import Classifier
from advmoe.moe import Channels, DenseKind, Gate, Routings, images

STAGES = 3
WIDENING = 10


class PreActivationBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and an activation, and a shortcut.

    Where the shape changes, the shortcut is a 1x1 projection of the input after the first batch norm and activation.
    """

    def __init__(self, kind: DenseKind, inputs: Channels, outputs: Channels, stride: int) -> None:
        super().__init__()
        hidden = kind.channels(outputs.full)
        self.norm1 = kind.norm(inputs)
        self.conv1 = kind.conv(inputs, hidden, stride=stride)
        self.conv2 = kind.conv(hidden, outputs, norm=False)
        self.shortcut = None if inputs is outputs else kind.plain(inputs, outputs, kernel_size=1, stride=stride, norm=False)
        self.activation = kind.nonlinearity()

    def forward(self, x: Tensor, gate: Gate, logits: Tensor | None = None) -> tuple[Tensor, Routings]:
        """[B, C, H, W] -> [B, C', H', W'], and the Routings of the two convolutions."""
        activated = self.activation(self.norm1(x))
        h, first = self.conv1(activated, gate, logits)
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        h, second = self.conv2(self.activation(h), gate, logits, shortcut)
        return h, first + second


class WideResNet(Classifier):
    """Three stages of `blocks` blocks: depth 6 * `blocks` + 4.

    In the dense network stage i has `width` * 2**i channels, and the stem has max(`width` // 10, 1).
    """

    def __init__(self, kind: DenseKind, spec: ImageSpec, *, blocks: int, width: int, stem: Stem) -> None:
        super().__init__(kind, spec, stem)
        channels = kind.channels(max(width // WIDENING, 1))
        large = stem == "imagenet"
        first = kind.plain(images(spec.shape[0]), channels, kernel_size=7 if large else 3, stride=2 if large else 1, norm=False)
        self.stem = nn.Sequential(first, *([nn.MaxPool2d(3, stride=2, padding=1)] if large else []))
        stages: list[nn.Module] = []
        for stage in range(STAGES):
            outputs = kind.channels(width * 2**stage)
            self.begin_stage(kind, channels, len(stages))
            for block in range(blocks):
                stages.append(PreActivationBlock(kind, channels, outputs, stride=2 if stage > 0 and block == 0 else 1))
                channels = outputs
        self.blocks = nn.ModuleList(stages)
        self.norm, self.activation = kind.norm(channels), kind.nonlinearity()
        self.finish(channels)

    def features(self, x: Tensor, gate: Gate, logits: Tensor | None) -> tuple[Tensor, Routings]:
        h, routings = self.chain(self.blocks, self.stem(x), gate, logits)
        return self.activation(self.norm(h)), routings
