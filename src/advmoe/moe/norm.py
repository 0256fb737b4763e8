"""Batch norm for channels that are masked, and for channels that several experts write."""

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from advmoe.moe.channels import Channels
from advmoe.moe.routing import MOMENTUM


class MaskedNorm(nn.BatchNorm2d):
    """Batch norm whose masked channels are zero, so that whatever reads them reads nothing."""

    def __init__(self, channels: Channels) -> None:
        super().__init__(channels.width)
        self.channels = channels

    def mask(self) -> Tensor:
        """[C], 0 for masked channels."""
        return torch.cat([mask() for mask in self.channels.masks])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.mask().to(x.dtype)[:, None, None]


class ExpertNorm(nn.Module):
    """Batch norm with weights and statistics of its own for each expert; as there, momentum None means plain means.

    Shapes: B pictures, N experts, K channels. Statistics are those of the pictures that chose the expert; one that none of
    a batch chose keeps its own. Under mixing gates, too, an expert's statistics come from its pictures alone, as at inference.
    """

    running_mean: Tensor
    running_var: Tensor
    batches: Tensor

    def __init__(self, num_experts: int, channels: int, momentum: float | None = MOMENTUM, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(num_experts, channels))
        self.bias = nn.Parameter(torch.zeros(num_experts, channels))
        self.register_buffer("running_mean", torch.zeros(num_experts, channels))
        self.register_buffer("running_var", torch.ones(num_experts, channels))
        self.register_buffer("batches", torch.zeros(num_experts, 1))

    def forward(self, y: Tensor, experts: Tensor) -> Tensor:
        """Outputs [B, K, H, W] of the chosen experts [B], each normalised by its own."""
        weights, shift = self._affine(y[:, None], experts)
        return torch.addcmul(shift[experts][:, :, None, None], y, weights[experts][:, :, None, None])

    def every(self, parts: Tensor, experts: Tensor) -> Tensor:
        """All experts' outputs [B, N, K, H, W], expert e's normalised by its own; `experts` [B] are the chosen ones."""
        weights, shift = self._affine(parts, experts)
        return torch.addcmul(shift[:, :, None, None], parts, weights[:, :, None, None])

    def _affine(self, parts: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and shift [N, K] that normalise `parts` [B, N or 1, K, H, W]."""
        mean, var = (
            self._statistics(parts.to(self.running_mean.dtype), experts) if self.training else (self.running_mean, self.running_var)
        )
        weights = self.weight * (var + self.eps).rsqrt()
        return weights.to(parts.dtype), (self.bias - mean * weights).to(parts.dtype)

    def _statistics(self, parts: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance [N, K] over each expert's pictures; running ones follow."""
        mine = one_hot(experts, len(self.weight)).to(parts.dtype)  # [B, N]
        count = mine.sum(dim=0)[:, None]
        share = mine[:, :, None] / count.clamp(min=1)
        means = parts.mean(dim=(3, 4))  # of each picture
        mean = (share * means).sum(dim=0)
        var = (share * (parts.var(dim=(3, 4), correction=0) + (means - mean).square())).sum(dim=0)
        seen, values = count > 0, count * parts[0, 0, 0].numel()
        self._follow(mean.detach(), (var * values / (values - 1).clamp(min=1)).detach(), seen)
        return torch.where(seen, mean, self.running_mean), torch.where(seen, var, self.running_var)

    def reset_running_stats(self) -> None:
        """As batch norm's."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.batches.zero_()

    @torch.no_grad()
    def _follow(self, mean: Tensor, var: Tensor, seen: Tensor) -> None:
        self.batches += seen
        share = 1 / self.batches.clamp(min=1) if self.momentum is None else self.batches.new_full((), self.momentum)
        share = torch.where(seen, share, 0.0)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(var, share)
