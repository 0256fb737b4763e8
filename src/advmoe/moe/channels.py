"""The channels of a layer's output, as layers share them: how many there are, and which of them a mask keeps."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


class ChannelMask(nn.Module):
    """Keeps the `kept` of `channels` channels with the highest scores, the same for all inputs (AT (Sparse)).

    Each score gets the gradient of its channel's mask as if the mask were the score (straight-through).
    """

    def __init__(self, channels: int, kept: int) -> None:
        super().__init__()
        self.kept = kept
        self.scores = nn.Parameter(torch.ones(channels))

    def forward(self) -> Tensor:
        """[channels], 1 where a channel is kept and 0 elsewhere."""
        hard = torch.zeros_like(self.scores).index_fill(0, self.indices(), 1.0)
        return hard + (self.scores - self.scores.detach())

    @torch.no_grad()
    def indices(self) -> Tensor:
        """[kept] int64, ascending; of equal scores the first stay."""
        return self.scores.sort(descending=True, stable=True).indices[: self.kept].sort().values


@dataclass(frozen=True, eq=False)
class Channels:
    """Layers that must agree on their channels, such as those that write one residual stream, are given the same object.

    `full` channels in the dense network, `width` in this one. `masks`, one for each part that was joined, or none.
    """

    full: int
    width: int
    masks: tuple[ChannelMask, ...] = ()

    def __add__(self, other: "Channels") -> "Channels":
        """The channels of a concatenation."""
        return Channels(self.full + other.full, self.width + other.width, self.masks + other.masks)

    def kept(self) -> Tensor:
        """Indices of the channels that the masks keep; all where there is no mask."""
        if not self.masks:
            return torch.arange(self.width)
        offsets = [0, *torch.tensor([len(mask.scores) for mask in self.masks]).cumsum(0).tolist()]
        return torch.cat([mask.indices().cpu() + offset for mask, offset in zip(self.masks, offsets, strict=False)])


def images(channels: int) -> Channels:
    """The channels of the network's input: no scale or mask touches them."""
    return Channels(channels, channels)
