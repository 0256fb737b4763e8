"""Batch norm for masked channels and for the outputs of experts, with statistics over all ranks if wanted."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.nn.modules.batchnorm import _BatchNorm

from advmoe.distributed import pooled_statistics, sum_over_ranks
from advmoe.moe.channels import Channels
from advmoe.moe.replace import kept_modes, replace_modules
from advmoe.moe.routing import MOMENTUM, Router


class _Synchronised(_BatchNorm):
    """Batch norm. With `synchronised` its statistics cover the batches of all ranks, on any device."""

    synchronised = False

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.synchronised):
            return super().forward(x)
        images = x[(..., *[None] * (4 - x.ndim))]  # [B, C, H, W] in every case
        one_expert = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        weight, bias = self.weight, self.bias
        if weight is None:  # affine=False
            weight = x.new_ones(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
            bias = torch.zeros_like(weight)
        out, mean, var, values = _normalise(images, weight[None], bias[None], one_expert, self.eps, True)
        if self.track_running_stats:
            self._update_running(mean[0], (var * values / (values - 1))[0])
        return out.view_as(x)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = 1 / self.num_batches_tracked if self.momentum is None else mean.new_full((), self.momentum)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(var, share)


class BatchNorm1d(_Synchronised, nn.BatchNorm1d):
    """`nn.BatchNorm1d` with statistics of all ranks."""


class BatchNorm2d(_Synchronised, nn.BatchNorm2d):
    """`nn.BatchNorm2d` with statistics of all ranks."""


class _Irreplaceable(_BatchNorm):
    """A norm that does more than torch's batch norms. `nn.SyncBatchNorm.convert_sync_batchnorm` raises AttributeError.

    It has no attribute `num_features`, which that function reads.
    """

    purpose: ClassVar[str]

    def __getattr__(self, name: str) -> Any:
        if name == "num_features":
            raise AttributeError(
                f"{self.purpose}, so torch's batch norms, such as SyncBatchNorm, cannot replace it; "
                "advmoe.moe.synchronise(model, True) takes the statistics of all ranks"
            )
        return super().__getattr__(name)


class MaskedNorm(_Irreplaceable, BatchNorm2d):
    """Batch norm that sets masked channels to zero, so that they add nothing to the layers after it."""

    purpose = "a MaskedNorm sets the masked channels to zero"

    def __init__(self, channels: Channels) -> None:
        super().__init__(channels.width)
        del self.num_features
        self.channels = channels

    def mask(self) -> Tensor:
        """The mask [C]: 1 for kept channels, 0 for masked ones."""
        return torch.cat([mask() for mask in self.channels.masks])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return super().forward(x) * self.mask().to(x.dtype)[:, None, None]

    def extra_repr(self) -> str:
        return f"{self.channels.width} channels, eps={self.eps}, momentum={self.momentum}"


class ExpertNorm(_Irreplaceable):
    """Batch norm with separate weights and statistics for each expert. `momentum` None means plain averages, as in torch.

    Shapes: B images, N experts, K channels. An expert's statistics come only from the images that chose it, also under gates
    that mix experts. If no image of a batch chose an expert, its running statistics do not change. While the norm is `tied`, every
    image has the norm of expert 0, and its statistics are copied to the others.

    It is one of torch's batch norms for programs that reset and recompute running statistics, such as
    `torch.optim.swa_utils.update_bn`.
    """

    purpose = "an ExpertNorm has separate statistics for each expert"
    running_mean: Tensor
    running_var: Tensor
    batches: Tensor
    synchronised = False
    tied = False

    def __init__(self, num_experts: int, channels: int, momentum: float | None = MOMENTUM, eps: float = 1e-5) -> None:
        nn.Module.__init__(self)
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(num_experts, channels))
        self.bias = nn.Parameter(torch.zeros(num_experts, channels))
        self.register_buffer("running_mean", torch.zeros(num_experts, channels))
        self.register_buffer("running_var", torch.ones(num_experts, channels))
        self.register_buffer("batches", torch.zeros(num_experts, 1))

    def forward(self, y: Tensor, experts: Tensor) -> Tensor:  # type: ignore[override]  # torch's has no experts
        """Normalise `y` [B, K, H, W], the outputs of the chosen `experts` [B] int64, each with the norm of its expert."""
        if self.training:
            experts = torch.zeros_like(experts) if self.tied else experts
            out, mean, var, values = _normalise(y, self.weight, self.bias, experts, self.eps, self.synchronised)
            self._update_running(mean, var, values)
            return out
        weights, shift = self._affine(y[:, None], experts)
        return torch.addcmul(shift[experts][:, :, None, None], y, weights[experts][:, :, None, None])

    def every(self, parts: Tensor, experts: Tensor) -> Tensor:
        """Normalise `parts` [B, N, K, H, W], the outputs of all experts. `experts` [B] int64 are the chosen ones."""
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
        """Mean and biased variance [N, K] over each expert's images, [1, K] while tied; updates the running ones."""
        chosen = one_hot(torch.zeros_like(experts) if self.tied else experts, len(self.weight)).to(parts.dtype)  # [B, N]
        count = chosen.sum(dim=0)[:, None]
        share = chosen[:, :, None] / count.clamp(min=1)
        means = parts.mean(dim=(3, 4))  # of each image: [B, N, K]
        mean = (share * means).sum(dim=0)
        var = (share * (parts.var(dim=(3, 4), correction=0) + (means - mean).square())).sum(dim=0)
        if self.synchronised:
            counts, mean, var = pooled_statistics(count, mean, var)
            count = counts[:, :1]
        self._update_running(mean.detach(), var.detach(), count * parts[0, 0, 0].numel())
        mean, var = torch.where(count > 0, mean, self.running_mean), torch.where(count > 0, var, self.running_var)
        return (mean[:1], var[:1]) if self.tied else (mean, var)

    @property
    def num_batches_tracked(self) -> Tensor:  # type: ignore[override]  # read by update_bn, never set
        """The number of batches [N, 1] in the statistics of each expert."""
        return self.batches

    def extra_repr(self) -> str:
        return f"{len(self.weight)} experts, {self.weight.shape[1]} channels, eps={self.eps}, momentum={self.momentum}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        nn.Module._load_from_state_dict(self, *args, **kwargs)  # torch's would add num_batches_tracked to older files

    def reset_running_stats(self) -> None:
        """Set the running statistics to mean 0 and variance 1, as in `nn.BatchNorm2d`."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.batches.zero_()

    @torch.no_grad()
    def _update_running(self, mean: Tensor, var: Tensor, values: Tensor) -> None:
        """Update the running statistics with those of a batch. `values` [N, 1] are values per channel; 0: no update."""
        has_values, var = values > 0, var * values / (values - 1).clamp(min=1)
        self.batches += has_values
        share = 1 / self.batches.clamp(min=1) if self.momentum is None else self.batches.new_full((), self.momentum)
        share = torch.where(has_values, share, 0.0)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(var, share)
        if self.tied:
            for statistic in (self.running_mean, self.running_var, self.batches):
                statistic[1:] = statistic[:1]


def _normalise(
    y: Tensor, weight: Tensor, bias: Tensor, experts: Tensor, eps: float, pooled: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`y` normalised in train mode, in its dtype; the mean and variance [N, K]; and the values per channel [N, 1] behind them.

    With `pooled`, the statistics cover the images of all ranks.
    """
    wide = y.to(torch.promote_types(y.dtype, weight.dtype))
    out, mean, var, values = _Normalised.apply(wide, weight, bias, experts, eps, pooled)  # type: ignore[no-untyped-call]
    return out.to(y.dtype), mean, var, values


class _Normalised(torch.autograd.Function):
    """The chosen experts' outputs, normalised with the statistics of each expert's images; and these statistics.

    The backward pass is batch norm's formula. It reads the images a third as often as autograd would. If the statistics are pooled
    over ranks, each direction sends one message.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weight: Tensor, bias: Tensor, experts: Tensor, eps: float, pooled: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        size = y[0, 0].numel()
        values = size * one_hot(experts, len(weight)).sum(dim=0).to(y.dtype)[:, None]  # bincount would synchronise
        mean = _expert_sums(y.sum(dim=(2, 3)), experts, weight) / values.clamp(min=1)
        centred = y - mean[experts][:, :, None, None]
        squares = torch.linalg.vector_norm(centred, dim=(2, 3)).square()
        var = _expert_sums(squares, experts, weight) / values.clamp(min=1)
        shift = bias
        if pooled:
            of_rank = mean
            counts, mean, var = pooled_statistics(values, mean, var)
            values = counts[:, :1]
            shift = bias + (of_rank - mean) * weight * (var + eps).rsqrt()
        rate = (var + eps).rsqrt()
        scale = (weight * rate)[experts][:, :, None, None]
        ctx.eps, ctx.pooled = eps, pooled
        ctx.save_for_backward(y, weight, experts, mean, rate, values)
        ctx.mark_non_differentiable(mean, var, values)
        return torch.addcmul(shift[experts][:, :, None, None], centred, scale), mean, var, values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, experts, mean, rate, values = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: second derivatives are wanted
            return *_differentiable_gradients(ctx, gradient), None, None, None
        to_bias = _expert_sums(gradient.sum(dim=(2, 3)), experts, weight)
        to_weight = (_expert_sums((gradient * y).sum(dim=(2, 3)), experts, weight) - mean * to_bias) * rate
        weight_sum, bias_sum = _total(torch.stack([to_weight, to_bias]), ctx.pooled)
        slope = -weight * rate.square() * weight_sum / values.clamp(min=1)  # factor of y in its gradient
        level = -weight * rate * bias_sum / values.clamp(min=1) - slope * mean
        to_y = torch.addcmul(level[experts][:, :, None, None], y, slope[experts][:, :, None, None])
        to_y.addcmul_(gradient, (weight * rate)[experts][:, :, None, None])
        return to_y, to_weight, to_bias, None, None, None


def _total(x: Tensor, pooled: bool) -> Tensor:
    """The sum of `x` over the ranks if `pooled`; else `x`."""
    return sum_over_ranks(x) if pooled else x


def _differentiable_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients to y, weight and bias of `_Normalised` as functions of y, weight and `gradient`."""
    y, weight, experts, _, _, values = ctx.saved_tensors
    inputs = [y.view_as(y), weight.view_as(weight)]  # views, so that a path from one to the other is not counted
    count = values.clamp(min=1)
    mean = _total(_expert_sums(inputs[0].sum(dim=(2, 3)), experts, weight), ctx.pooled) / count
    centred = inputs[0] - mean[experts][:, :, None, None]
    var = _total(_expert_sums(centred.square().sum(dim=(2, 3)), experts, weight), ctx.pooled) / count
    out = centred * (inputs[1] * (var + ctx.eps).rsqrt())[experts][:, :, None, None]
    needed = [t for t in inputs if t.requires_grad]
    gradients = iter(torch.autograd.grad(out, needed, gradient, create_graph=True) if needed else ())
    return *(next(gradients) if t.requires_grad else None for t in inputs), _expert_sums(gradient.sum(dim=(2, 3)), experts, weight)


@contextmanager
def recomputed_statistics(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Reset the running statistics of the batch norms, expert norms and routers among `modules`. The block recomputes them.

    Inside it the norms take plain averages over all batches; the routers take plain averages over the first ten and moving ones
    after them.
    The norms' momentum is restored afterwards.
    """
    modules = list(modules)
    momenta = {norm: norm.momentum for norm in modules if isinstance(norm, _BatchNorm)}
    for norm in momenta:
        norm.reset_running_stats()
        norm.momentum = None  # in torch, None means plain averages
    for router in (module for module in modules if isinstance(module, Router)):
        router.mean.zero_()
        router.var.fill_(1)
        router.batches.zero_()
    try:
        yield
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum


@torch.no_grad()
def update_norms(model: nn.Module, batches: Iterable[Tensor | Sequence[Tensor]]) -> None:
    """Recompute the running statistics of batch norms, expert norms and routers over `batches` of images [B, C, H, W].

    Of a batch that is a tuple or a list, such as (images, labels), the first tensor is taken.
    Use it after you average or change weights. `torch.optim.swa_utils.update_bn` does the same only for norms. The
    norms get plain averages over all batches; the routers get plain averages over the first ten and moving ones after them. An
    expert that no image chose has mean 0 and variance 1 afterwards. The model's mode and the norms' momentum do not change.
    """
    with kept_modes(model), recomputed_statistics(model.modules()):
        model.train()
        for batch in batches:
            model(batch[0] if isinstance(batch, tuple | list) else batch)


def synchronise(model: nn.Module, wanted: bool) -> None:
    """Set whether norms and routers of `model` train with the statistics of all ranks' images (`wanted`) or of this rank's."""
    if wanted:
        replace_modules(model, _synchronisable)
    for module in model.modules():
        if isinstance(module, _Synchronised | ExpertNorm | Router):
            module.synchronised = wanted


def _synchronisable(module: nn.Module) -> nn.Module:
    """A batch norm of torch as one of this module's, with the same parameters and buffers. Other modules are returned unchanged."""
    kinds: dict[type[nn.Module], type[_BatchNorm]] = {nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d}
    if type(module) not in kinds:
        return module
    norm = kinds[type(module)](0, device="meta")
    norm.__dict__ = module.__dict__
    return norm


def _expert_sums(per_image: Tensor, experts: Tensor, like: Tensor) -> Tensor:
    """The sums [N, K] of `per_image` [B, K] over the images of each expert, in the shape and dtype of `like`."""
    return torch.zeros_like(like).index_add_(0, experts, per_image.to(like.dtype))
