"""A network for use: batch norms that directly follow a convolution folded into its filters."""

import copy

import torch
from torch import Tensor, nn

from advmoe.models.classifier import Classifier
from advmoe.moe import ExpertNorm, MaskedNorm, MoEConv2d, PlainConv2d


@torch.no_grad()
def fused(model: Classifier) -> Classifier:
    """A copy in eval mode that gives the same logits and routes (but for rounding) in less time.

    Its router parameters are the model's own, so that they can be learned through it; all else is copied and frozen.
    """
    routers = {id(parameter): parameter for parameter in model.router_parameters()}
    twin = copy.deepcopy(model, dict(routers)).eval()
    for parameter in (*twin.weight_parameters(), *twin.mask_parameters()):
        parameter.requires_grad_(False)
    for layer in twin.modules():
        if isinstance(layer, MoEConv2d) and layer.norm is not None:
            _fold_experts(layer)
        elif isinstance(layer, PlainConv2d) and isinstance(layer.norm, nn.BatchNorm2d):
            scale, shift = _affine(layer.norm)
            layer.weight.mul_(scale[:, None, None, None])
            layer.bias, layer.norm = _frozen(shift), None
    return twin


def _fold_experts(layer: MoEConv2d) -> None:
    """Every expert gets filters and a bias of its own where they have norms of their own; else they share the shift."""
    assert isinstance(layer.norm, nn.BatchNorm2d | ExpertNorm)
    scale, shift = _affine(layer.norm)
    if isinstance(layer.norm, ExpertNorm):
        filters = torch.cat([layer.own.filters(e) * scale[e][:, None, None, None] for e in range(layer.num_experts)])
        layer.starts = tuple(e * layer.width for e in range(layer.num_experts))
    else:
        channel = torch.arange(len(layer.filters), device=scale.device) % layer.width
        filters = layer.filters * scale[channel][:, None, None, None]
        shift = shift.expand(layer.num_experts, -1)
    layer.filters, layer.bias, layer.norm = _frozen(filters), _frozen(shift.clone()), None


def _affine(norm: nn.BatchNorm2d | ExpertNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift of a norm in eval mode, of its weights' shape."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    return (scale * norm.mask(), shift * norm.mask()) if isinstance(norm, MaskedNorm) else (scale, shift)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
