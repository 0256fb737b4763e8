"""The channels of a layer's output: how many there are, and which of them the masks keep."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


class ChannelMask(nn.Module):
    """Keeps the `kept` channels with the highest scores, out of `channels`. All images get the same mask (AT (Sparse)).

    The gradient of a channel's mask is passed to its score unchanged (straight-through).
    """

    def __init__(self, channels: int, kept: int) -> None:
        super().__init__()
        self.kept = kept
        self.scores = nn.Parameter(torch.ones(channels))

    def forward(self) -> Tensor:
        """The mask [channels]: 1 for kept channels, 0 for the others."""
        hard = torch.zeros_like(self.scores).index_fill(0, self.indices(), 1.0)
        return hard + (self.scores - self.scores.detach())

    @torch.no_grad()
    def indices(self) -> Tensor:
        """Indices of the kept channels, [kept] int64, ascending. Of channels with equal scores the first are kept."""
        return self.scores.sort(descending=True, stable=True).indices[: self.kept].sort().values


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of one tensor. Layers that must agree on them, such as those of one residual stream, share one object.

    There are `full` channels in the dense network and `width` in this one. `masks` holds one mask for each concatenated part, or
    is empty.
    """

    full: int
    width: int
    masks: tuple[ChannelMask, ...] = ()

    def __add__(self, other: "Channels") -> "Channels":
        """The channels of a concatenation."""
        return Channels(self.full + other.full, self.width + other.width, self.masks + other.masks)

    def kept(self) -> Tensor:
        """Indices of the channels that the masks keep, int64 on the CPU. Without masks, all channels."""
        if not self.masks:
            return torch.arange(self.width)
        offsets = [0, *torch.tensor([len(mask.scores) for mask in self.masks]).cumsum(0).tolist()]
        return torch.cat([mask.indices().cpu() + offset for mask, offset in zip(self.masks, offsets, strict=False)])


def images(channels: int) -> Channels:
    """The channels of the network's input. They are never scaled or masked."""
    return Channels(channels, channels)
