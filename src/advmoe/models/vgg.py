"""VGG with batch norm (Simonyan and Zisserman 2015), ending in global pooling and one linear layer."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from advmoe.config.choices import Stem
from advmoe.data import ImageSpec
from advmoe.models.classifier import Classifier
from advmoe.moe import DenseKind, Gate, Routings, images

FACTORS = (1, 2, 4, 8, 8)


class VGG(Classifier):
    """`convolutions[i]` 3x3 convolutions in stage i, then 2x2 max pooling. Stage i has FACTORS[i] * `width` channels in the dense
    network. The first convolution is plain. All image sizes use the same stem."""

    def __init__(self, kind: DenseKind, spec: ImageSpec, *, convolutions: Sequence[int], width: int, stem: Stem) -> None:
        super().__init__(kind, spec, stem)
        channels = kind.channels(width)
        self.stem = kind.plain(images(spec.shape[0]), channels)
        layers: list[nn.Module] = []
        self.ends: list[bool] = []
        for stage, (depth, factor) in enumerate(zip(convolutions, FACTORS, strict=True)):
            positions = range(1 if stage == 0 else 0, depth)
            if positions:
                self.begin_stage(kind, channels, len(layers))
            for position in positions:
                outputs = kind.channels(width * factor)
                layers.append(kind.conv(channels, outputs))
                self.ends.append(position == depth - 1)
                channels = outputs
        self.layers = nn.ModuleList(layers)
        self.activation = kind.nonlinearity()
        self.finish(channels)

    def features(self, x: Tensor, gate: Gate, logits: Tensor | None) -> tuple[Tensor, Routings]:
        return self.chain(self.layers, self.activation(self.stem(x)), gate, logits, self._after)

    def _after(self, layer: int, h: Tensor) -> Tensor:
        """The activation, and the pooling at the end of a stage."""
        h = self.activation(h)
        if self.ends[layer]:
            h = max_pool2d(h, 2, ceil_mode=True)  # ceil: the last stage of a 28x28 image still has a pixel
        return h
