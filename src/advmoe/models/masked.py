"""Networks under channel masks: where their scores start, and the plain small network that they come to."""

import copy

import torch
from torch import nn

from advmoe.models.classifier import Classifier
from advmoe.moe import ChannelMask, Channels, MaskedNorm, PlainConv2d


@torch.no_grad()
def start_scores(model: Classifier) -> None:
    """Set each channel's score to the mean L2 norm of the filters that write it."""
    convolutions = [module for module in model.modules() if isinstance(module, PlainConv2d)]
    for mask in model.masks:
        assert isinstance(mask, ChannelMask)
        norms = [conv.weight.flatten(1).norm(dim=1) for conv in convolutions if mask in conv.outputs.masks]
        mask.scores.copy_(torch.stack(norms).mean(dim=0))


@torch.no_grad()
def compact(model: Classifier) -> Classifier:
    """The network without its masked channels: the same logits, at the small dense network's cost.

    What is not masked comes back as an equal copy.
    """
    small = copy.deepcopy(model)
    if not model.masks:
        return small
    for parent in list(small.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, MaskedNorm):
                setattr(parent, name, _compact_norm(child))
    for module in small.modules():
        if isinstance(module, PlainConv2d):
            _compact_convolution(module)
    kept = small.outputs.kept().to(small.classifier.weight.device)
    small.classifier.weight = nn.Parameter(small.classifier.weight[:, kept])
    small.classifier.in_features = len(kept)
    small.outputs, small.masks = _without_masks(small.outputs), nn.ModuleList()
    return small


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
