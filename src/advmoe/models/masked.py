"""Networks with channel masks: the initial scores, and the smaller network without masks that computes the same."""

import torch
from torch import nn

from advmoe.errors import UserError
from advmoe.models.classifier import Classifier
from advmoe.moe import ChannelMask, Channels, MaskedNorm, PlainConv2d
from advmoe.moe.copies import copied
from advmoe.moe.replace import replace_modules


@torch.no_grad()
def start_scores(model: Classifier) -> None:
    """Set the score of each channel to the mean L2 norm of the filters that write it.

    Raises UserError for a mask without filters.
    """
    convolutions = [module for module in model.modules() if isinstance(module, PlainConv2d)]
    for mask in model.masks:
        assert isinstance(mask, ChannelMask)
        norms = [conv.weight.flatten(1).norm(dim=1) for conv in convolutions if mask in conv.outputs.masks]
        if not norms:
            raise UserError("a channel mask belongs to no convolution made by kind.plain() or kind.conv()")
        mask.scores.copy_(torch.stack(norms).mean(dim=0))


@torch.no_grad()
def compact(model: Classifier) -> Classifier:
    """A copy of the network without its masked channels. It computes the same logits at the cost of the small dense network.

    A network without masks is returned as an equal copy.
    """
    compacted = copied(model)
    if not model.masks:
        return compacted
    replace_modules(compacted, lambda module: _compact_norm(module) if isinstance(module, MaskedNorm) else module)
    for module in compacted.modules():
        if isinstance(module, PlainConv2d):
            _compact_convolution(module)
    kept = compacted.outputs.kept().to(compacted.classifier.weight.device)
    compacted.classifier.weight = nn.Parameter(compacted.classifier.weight[:, kept])
    compacted.classifier.in_features = len(kept)
    compacted.outputs, compacted.masks = _without_masks(compacted.outputs), nn.ModuleList()
    return compacted


def _compact_norm(norm: MaskedNorm) -> nn.BatchNorm2d:
    kept = norm.channels.kept().to(norm.weight.device)
    plain = nn.BatchNorm2d(len(kept)).to(norm.weight).train(norm.training)
    plain.load_state_dict({name: value[kept] if value.ndim else value for name, value in norm.state_dict().items()})
    return plain


def _compact_convolution(conv: PlainConv2d) -> None:
    device = conv.weight.device
    filters = conv.weight[conv.outputs.kept().to(device)][:, conv.inputs.kept().to(device)]
    conv.weight = nn.Parameter(filters)
    conv.out_channels, conv.in_channels = filters.shape[:2]
    conv.inputs, conv.outputs = _without_masks(conv.inputs), _without_masks(conv.outputs)


def _without_masks(channels: Channels) -> Channels:
    return Channels(channels.full, len(channels.kept()))
