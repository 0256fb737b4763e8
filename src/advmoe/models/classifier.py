"""The base class of all backbones: pixels in, logits out, and the routes on request."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from advmoe.config.choices import Stem
from advmoe.data import ImageSpec
from advmoe.errors import UserError
from advmoe.moe import HARD, Channels, DenseKind, Gate, MaskedNorm, RoutedNetwork, Routings
from advmoe.moe.network import shared_choice


class Normalize(nn.Module):
    """(x - mean) / std per channel. It is the network's first layer, so epsilon is measured in pixel values."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Pixels [B, C, H, W] in [0, 1] -> the same shape, standardised."""
        return (x - self.mean) / self.std


class Classifier(RoutedNetwork):
    """Base class of the backbones: normalisation, the network's router if there is one, `features`, pooling, linear classifier.

    A subclass builds its layers in its constructor, calls `begin_stage` before the first block of each stage, and `finish` last.
    """

    def __init__(self, kind: DenseKind, spec: ImageSpec, stem: Stem) -> None:
        super().__init__()
        self.num_classes = len(spec.classes)
        self.normalize = Normalize(spec.mean, spec.std)
        self.router = kind.network_router(spec.shape[0], stem)
        self.stage_starts: list[int] = []  # the number of each stage's first block, if stages have routers

    def begin_stage(self, kind: DenseKind, inputs: Channels, block: int) -> None:
        """Add the router of the stage that begins with `blocks[block]` of `chain`, which gets `inputs`, if the kind has one."""
        router = kind.stage_router(inputs)
        if router is not None:
            self.stage_routers.append(router)
            self.stage_starts.append(block)

    def finish(self, outputs: Channels) -> None:
        """Add the classifier on top of `outputs`, register the masks, and give each MoE layer its index in a route.

        Raises UserError if stages have routers and the first stage does not begin with block 0.
        """
        if self.stage_starts and self.stage_starts[0] != 0:
            raise UserError(
                f"routers per_stage: the first stage of {type(self).__name__} begins with block {self.stage_starts[0]}, not 0; "
                "call begin_stage before the first block of each stage"
            )
        self.outputs = outputs
        self.feature_maps = nn.Identity()  # GradCAM and similar tools can hook its output [B, C', H', W']
        self.classifier = nn.Linear(outputs.width, self.num_classes)
        norms = [module for module in self.modules() if isinstance(module, MaskedNorm)]
        self.masks = nn.ModuleList(dict.fromkeys(mask for norm in norms for mask in norm.channels.masks))
        for index, layer in enumerate(self.moe_layers()):
            layer.index = 0 if layer.router is None else index

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W] with pixels in [0, 1], through the hard gate."""
        return self.forward_routed(x)[0]

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, Routings]:
        """Logits [B, classes], and the Routings in order: one for each MoE layer, for each stage, or for the network."""
        self.check_mode()
        x = self.normalize(x)
        gate, logits, choice = self.choose(x, gate)
        h, routings = self.features(x, gate, logits)
        return self.classifier(self.feature_maps(h).mean(dim=(2, 3))), choice + routings

    def features(self, x: Tensor, gate: Gate, logits: Tensor | None) -> tuple[Tensor, Routings]:
        """The last layer's output [B, C', H', W'] for normalised images `x`, and the routings of its layers or stages.

        `logits` [B, N] come from the network's router, or None if there is none. Pass them to every layer, with the gate.
        """
        raise NotImplementedError

    def chain(
        self,
        blocks: Iterable[nn.Module],
        h: Tensor,
        gate: Gate,
        logits: Tensor | None,
        after: Callable[[int, Tensor], Tensor] = lambda block, h: h,
    ) -> tuple[Tensor, Routings]:
        """Run `h` through the blocks in order, and through `after(number of the block, h)` after each.

        The router of a stage, if it has one, chooses for all its blocks, from the input of the first one. Returns the output, and
        the routings of stages and blocks.
        """
        routings: Routings = ()
        stage_gate = gate
        for number, block in enumerate(blocks):
            if number in self.stage_starts:
                stage = self.stage_starts.index(number)
                stage_gate, logits, choice = shared_choice(self.stage_routers[stage], stage, h, gate)
                routings += choice
            h, of_block = block(h, stage_gate, logits)
            h, routings = after(number, h), routings + of_block
        return h, routings
