"""What every network of the project is: pixels in, logits out, routes returned on request."""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from advmoe.moe import HARD, Channels, DenseKind, Gate, MaskedNorm, RoutedNetwork, Routing, Routings

Stem = Literal["cifar", "imagenet"]


class Normalize(nn.Module):
    """(x - mean) / std per channel: the network's own first layer, so that epsilon is in pixels."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def chain(blocks: Iterable[nn.Module], h: Tensor, gate: Gate, logits: Tensor | None) -> tuple[Tensor, Routings]:
    """`h` through one block after the other, and all blocks' routings."""
    routings: Routings = ()
    for block in blocks:
        h, decided = block(h, gate, logits)
        routings += decided
    return h, routings


class Classifier(RoutedNetwork):
    """Base of the backbones: normalisation, the network's router if it has one, the backbone's `features`, pooling, classifier.

    A backbone builds its layers in its constructor and calls `finish` at its end.
    """

    def __init__(self, kind: DenseKind, stem: Stem, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.router = kind.network_router(len(mean), stem)

    def finish(self, outputs: Channels, num_classes: int) -> None:
        """Add the classifier on `outputs`; own the masks; tell each MoE layer the place of its choice in a route."""
        self.outputs, self.num_classes = outputs, num_classes
        self.feature_maps = nn.Identity()  # its output [B, C', H', W'] is what GradCAM and the like can hook
        self.classifier = nn.Linear(outputs.width, num_classes)
        norms = [module for module in self.modules() if isinstance(module, MaskedNorm)]
        self.masks = nn.ModuleList(dict.fromkeys(mask for norm in norms for mask in norm.channels.masks))
        for place, layer in enumerate(self.moe_layers()):
            layer.index = place if self.router is None else 0

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W] with pixels in [0, 1], through the hard gate."""
        return self.forward_routed(x)[0]

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, Routings]:
        """Logits [B, classes], and one Routing for each choice: of each MoE layer in order, or of the network's router."""
        x = self.normalize(x)
        logits = None if self.router is None else self.router(x)
        h, routings = self.features(x, gate, logits)
        if logits is not None:
            routings = (Routing(logits, gate.weights(logits, 0).experts),)
        return self.classifier(self.feature_maps(h).mean(dim=(2, 3))), routings

    def features(self, x: Tensor, gate: Gate, logits: Tensor | None) -> tuple[Tensor, Routings]:
        """The last layer's output [B, C', H', W'] of normalised images, and the routings of the layers' routers.

        `logits` [B, N] are the network router's, if there is one; every layer gets them beside the gate.
        """
        raise NotImplementedError
