"""Batch norm for channels that are masked, and for channels that several experts write."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from advmoe.distributed import pooled_statistics
from advmoe.moe.channels import Channels
from advmoe.moe.routing import MOMENTUM, Router


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that can take its statistics from all ranks' parts of a batch (`synchronised`), on any device."""

    synchronised = False

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.synchronised):
            return super().forward(x)
        y = x.to(self.weight.dtype)
        mean, var = y.mean(dim=(0, 2, 3)), y.var(dim=(0, 2, 3), correction=0)
        values, mean, var = pooled_statistics(y.new_full((), y.numel() / y.shape[1]), mean, var)
        self._follow(mean.detach(), (var * values / (values - 1)).detach())
        scale = self.weight * (var + self.eps).rsqrt()
        out: Tensor = torch.addcmul((self.bias - mean * scale)[:, None, None], y, scale[:, None, None]).to(x.dtype)
        return out

    @torch.no_grad()
    def _follow(self, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = 1 / self.num_batches_tracked if self.momentum is None else mean.new_full((), self.momentum)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(var, share)


class MaskedNorm(BatchNorm):
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

    Shapes: B images, N experts, K channels. Statistics are those of the images that chose the expert; one that none of
    a batch chose keeps its own. Under mixing gates, too, an expert's statistics come from its images alone, as at inference.
    """

    running_mean: Tensor
    running_var: Tensor
    batches: Tensor
    synchronised = False

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
        if self.training and not self.synchronised:
            normalised, mean, var, values = _Normalised.apply(
                y.to(torch.promote_types(y.dtype, self.weight.dtype)), self.weight, self.bias, experts, self.eps
            )  # type: ignore[no-untyped-call]
            self._follow(mean, var, values)
            out: Tensor = normalised.to(y.dtype)
            return out
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
        """Mean and biased variance [N, K] over each expert's images; running ones follow."""
        mine = one_hot(experts, len(self.weight)).to(parts.dtype)  # [B, N]
        count = mine.sum(dim=0)[:, None]
        share = mine[:, :, None] / count.clamp(min=1)
        means = parts.mean(dim=(3, 4))  # of each image
        mean = (share * means).sum(dim=0)
        var = (share * (parts.var(dim=(3, 4), correction=0) + (means - mean).square())).sum(dim=0)
        if self.synchronised:
            counts, mean, var = pooled_statistics(count, mean, var)
            count = counts[:, :1]
        self._follow(mean.detach(), var.detach(), count * parts[0, 0, 0].numel())
        return torch.where(count > 0, mean, self.running_mean), torch.where(count > 0, var, self.running_var)

    def reset_running_stats(self) -> None:
        """As batch norm's."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.batches.zero_()

    @torch.no_grad()
    def _follow(self, mean: Tensor, var: Tensor, values: Tensor) -> None:
        """Let the running statistics follow those of `values` [N, 1] values a channel; of none, not at all."""
        seen, var = values > 0, var * values / (values - 1).clamp(min=1)
        self.batches += seen
        share = 1 / self.batches.clamp(min=1) if self.momentum is None else self.batches.new_full((), self.momentum)
        share = torch.where(seen, share, 0.0)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(var, share)


class _Normalised(torch.autograd.Function):
    """The chosen experts' outputs normalised by their images' own statistics, which are returned beside them.

    Batch norm's closed gradients, in a third of the passes over the images that autograd would make.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weight: Tensor, bias: Tensor, experts: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        size = y[0, 0].numel()
        values = size * one_hot(experts, len(weight)).sum(dim=0).to(y.dtype)[:, None]  # bincount would wait for the device
        mean = _gathered(y.sum(dim=(2, 3)), experts, weight) / values.clamp(min=1)
        centred = y - mean[experts][:, :, None, None]
        squares = torch.linalg.vector_norm(centred, dim=(2, 3)).square()
        var = _gathered(squares, experts, weight) / values.clamp(min=1)
        rate = (var + eps).rsqrt()
        scale = (weight * rate)[experts][:, :, None, None]
        ctx.eps = eps
        ctx.save_for_backward(y, weight, experts, mean, rate, values)
        ctx.mark_non_differentiable(mean, var, values)
        return torch.addcmul(bias[experts][:, :, None, None], centred, scale), mean, var, values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, experts, mean, rate, values = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: somebody wants the gradient's gradient
            return *_differentiable_gradients(gradient, y, weight, experts, values, ctx.eps), None, None
        to_bias = _gathered(gradient.sum(dim=(2, 3)), experts, weight)
        to_weight = (_gathered((gradient * y).sum(dim=(2, 3)), experts, weight) - mean * to_bias) * rate
        slope = -weight * rate.square() * to_weight / values.clamp(min=1)  # of y
        level = -weight * rate * to_bias / values.clamp(min=1) - slope * mean
        to_y = torch.addcmul(level[experts][:, :, None, None], y, slope[experts][:, :, None, None])
        to_y.addcmul_(gradient, (weight * rate)[experts][:, :, None, None])
        return to_y, to_weight, to_bias, None, None


def _differentiable_gradients(
    gradient: Tensor, y: Tensor, weight: Tensor, experts: Tensor, values: Tensor, eps: float
) -> tuple[Tensor | None, ...]:
    """The gradients to y, weight and bias of `_Normalised` as functions of y, weight and `gradient`."""
    inputs = [y.view_as(y), weight.view_as(weight)]  # aliases: a path from one to the other is not counted here
    count = values.clamp(min=1)
    mean = _gathered(inputs[0].sum(dim=(2, 3)), experts, weight) / count
    centred = inputs[0] - mean[experts][:, :, None, None]
    var = _gathered(centred.square().sum(dim=(2, 3)), experts, weight) / count
    out = centred * (inputs[1] * (var + eps).rsqrt())[experts][:, :, None, None]
    wanted = [t for t in inputs if t.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, gradient, create_graph=True) if wanted else ())
    return *(next(found) if t.requires_grad else None for t in inputs), _gathered(gradient.sum(dim=(2, 3)), experts, weight)


@torch.no_grad()
def update_norms(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Recompute the running statistics of batch norms, expert norms and routers over `batches` of images [B, C, H, W].

    Use it after weights were averaged or changed, in place of `torch.optim.swa_utils.update_bn`, which does not know expert norms
    and routers. Batch norms end with plain means over all batches; routers with theirs, which follow the later ones. An expert that
    no image chose keeps fresh statistics. The model's mode and the norms' momentum stay as they are.
    """
    modes = {module: module.training for module in model.modules()}
    norms = [module for module in modes if isinstance(module, nn.modules.batchnorm._BatchNorm | ExpertNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # in torch, None stands for plain means
    for router in (module for module in modes if isinstance(module, Router)):
        router.mean.zero_()
        router.var.fill_(1)
        router.batches.zero_()
    try:
        model.train()
        for images in batches:
            model(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training


def synchronise(model: nn.Module, wanted: bool) -> None:
    """Whether the statistics that `model` learns by are those of the whole batch, whichever rank its images are on."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if wanted and type(child) is nn.BatchNorm2d:
                setattr(parent, name, _batch_norm(child))
    for module in model.modules():
        if isinstance(module, BatchNorm | ExpertNorm | Router):
            module.synchronised = wanted


def _batch_norm(norm: nn.BatchNorm2d) -> BatchNorm:
    """The same norm with the same parameters and buffers."""
    made = BatchNorm(norm.num_features, norm.eps, norm.momentum, device="meta")
    made.__dict__ = norm.__dict__
    return made


def _gathered(per_image: Tensor, experts: Tensor, like: Tensor) -> Tensor:
    """Sums [N, K] over each expert's images of values [B, K]."""
    return torch.zeros_like(like).index_add_(0, experts, per_image.to(like.dtype))
