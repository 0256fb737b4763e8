import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from advmoe.config import ModelConfig
from advmoe.data import ImageSpec
from advmoe.errors import UserError
from advmoe.evaluation.cost import cost
from advmoe.models import MODELS, build_model, compact, start_scores
from advmoe.moe import ChannelMask, Channels, DenseKind, MaskedKind, MaskedNorm, MoEKind

SHAPE = (3, 16, 16)
SPEC = ImageSpec(("a", "b", "c"), SHAPE, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
WIDTHS = {"resnet18": 4, "wrn28_10": 20, "vgg16_bn": 4, "densenet40": 4, "densenet121": 4}


def build(backbone, kind, stem="cifar", seed=0):
    torch.manual_seed(seed)
    spec = replace(SPEC, shape=(3, 32, 32)) if stem == "imagenet" else SPEC
    return build_model(ModelConfig(backbone=backbone, width=WIDTHS[backbone], stem=stem), kind, spec).double()


def images(count=6, size=16, seed=1):
    """Noise, each image in a different colour."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.rand(count, 3, 1, 1, generator=generator, dtype=torch.float64)
    return colours * torch.rand(count, 3, size, size, generator=generator, dtype=torch.float64)


def trained(model, size=16, steps=2, lr=0.05):
    """The model after some updates of weights and scores, in eval mode."""
    generator = torch.Generator().manual_seed(3)
    before = [mask.indices() for mask in model.masks]
    for norm in [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]:
        norm.momentum = 1.0  # deep networks in eval mode tell images apart only by true statistics
    optimizer = torch.optim.SGD(
        [{"params": model.weight_parameters(), "lr": lr}, {"params": model.mask_parameters() or [torch.zeros(1)], "lr": 5.0}]
    )
    for step in range(steps):
        x, y = images(8, size, seed=step), torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model.train()(x), y).backward()
        optimizer.step()
    if model.masks:
        assert any(not torch.equal(old, mask.indices()) for old, mask in zip(before, model.masks, strict=True))
    return model.eval()


def test_a_mask_without_a_convolution_is_refused():
    model = build("resnet18", MaskedKind(0.5))
    model.masks.append(ChannelMask(8, 0.5))
    with pytest.raises(UserError, match=r"belongs to no convolution made by kind\.plain"):
        start_scores(model)


@pytest.mark.parametrize(
    ("scale", "stem", "activation"), [(0.5, "cifar", "relu"), (0.5, "imagenet", "relu"), (0.8, "cifar", "silu")]
)
@pytest.mark.parametrize("backbone", [name for name in MODELS if name != "densenet121"])  # it is densenet40 with more layers
def test_compact_is_the_small_dense_network_with_the_same_logits(backbone, scale, stem, activation):
    size = 32 if stem == "imagenet" else 16
    model, x = trained(build(backbone, MaskedKind(scale, activation=activation), stem), size), images(size=size)
    small, dense = compact(model), build(backbone, DenseKind(scale, activation=activation), stem, seed=9)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-9)
        assert not small.training
        dense.load_state_dict(small.state_dict())
        torch.testing.assert_close(dense.eval()(x), model(x), rtol=1e-9, atol=1e-9)
        assert model(x).std(dim=0).min() > 1e-5  # images still differ
    assert {name: p.shape for name, p in small.named_parameters()} == {name: p.shape for name, p in dense.named_parameters()}
    gmacs = [cost(network, (3, size, size)).gmacs_ideal for network in (small, dense, model)]
    assert gmacs[0] == gmacs[1] < gmacs[2]
    assert small.mask_parameters() == []


def test_compact_does_not_change_the_masked_network():
    model = trained(build("resnet18", MaskedKind(0.5)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compact(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(model.masks) == 12


@pytest.mark.parametrize(
    "kind", [DenseKind(), DenseKind(0.5), MoEKind(0.5, norms="shared"), MoEKind(0.5, routers="per_network", norms="per_expert")]
)
def test_compact_of_an_unmasked_network_is_an_equal_copy(kind):
    model, x = trained(build("resnet18", kind)), images()
    copy_of_model = compact(model)
    assert copy_of_model is not model
    assert list(copy_of_model.state_dict()) == list(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in copy_of_model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(copy_of_model(x), model(x))
        copy_of_model.classifier.bias.add_(1)
        assert not torch.equal(copy_of_model(x), model(x))


def test_scores_start_at_the_norms_of_the_filters():
    model = build("vgg16_bn", MaskedKind(0.5))
    with torch.no_grad():
        model.stem.weight.zero_()
        model.stem.weight[0, 0, 1, 1] = 3.0
        model.stem.weight[0, 2, 0, 0] = -4.0
        model.stem.weight[2].fill_(2.0)  # 27 weights
    start_scores(model)
    assert model.stem.outputs.masks[0].scores.tolist() == pytest.approx([5.0, 0.0, 2 * 27**0.5, 0.0])
    assert model.stem.outputs.kept().tolist() == [0, 2]


def test_scores_of_a_residual_stream_start_at_the_mean_over_its_layers():
    model = build("resnet18", MaskedKind(0.5))
    layers = [model.stem[0], model.blocks[0].conv2, model.blocks[1].conv2]
    with torch.no_grad():
        for conv, value in zip(layers, (1.0, 2.0, 6.0), strict=True):
            conv.weight.zero_()
            conv.weight[1, 0, 0, 0] = value
    start_scores(model)
    assert model.stem[0].outputs.masks[0].scores.tolist() == pytest.approx([0.0, 3.0, 0.0, 0.0])


def test_build_model_starts_the_scores():
    model = build("resnet18", MaskedKind(0.5))
    norms = model.blocks[0].conv1.weight.flatten(1).norm(dim=1)
    assert torch.allclose(model.blocks[0].conv1.outputs.masks[0].scores, norms)


def test_layers_of_a_residual_stream_share_one_mask():
    model = build("resnet18", MaskedKind(0.5))
    (stem,) = model.stem[0].outputs.masks
    assert model.blocks[0].conv2.outputs.masks[0] is model.blocks[1].conv2.outputs.masks[0] is stem
    for block in (2, 4, 6):
        head, tail = model.blocks[block], model.blocks[block + 1]
        assert head.conv2.outputs.masks[0] is head.shortcut.outputs.masks[0] is tail.conv2.outputs.masks[0]
        assert tail.conv1.inputs.masks[0] is head.conv2.outputs.masks[0]
    block_masks = [block.conv1.outputs.masks[0] for block in model.blocks]
    assert len({id(mask) for mask in block_masks} | {id(stem)}) == 9
    assert all(block.conv2.inputs.masks[0] is mask for block, mask in zip(model.blocks, block_masks, strict=True))
    assert len(model.masks) == len(model.mask_parameters()) == 12  # 8 in blocks, 4 of streams


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("backbone", ["resnet18", "densenet40"])
def test_copies_share_masks_between_layers_but_not_with_the_original(backbone, make_copy):
    model = build(backbone, MaskedKind(0.5))
    copied, x = make_copy(model), images()
    masks = {id(mask) for mask in copied.masks}
    assert not masks & {id(mask) for mask in model.masks}
    norms = [module for module in copied.modules() if isinstance(module, MaskedNorm)]
    assert {id(mask) for norm in norms for mask in norm.channels.masks} == masks
    copied.load_state_dict(trained(copy.deepcopy(model)).state_dict())
    assert not torch.allclose(copied.eval()(x), model.eval()(x))
    assert len(masks) == len(model.masks)


def test_a_mask_keeps_the_highest_scores_and_of_equal_ones_the_first():
    mask = ChannelMask(5, 3)
    assert mask.indices().tolist() == [0, 1, 2]
    mask.scores.data = torch.tensor([0.5, -1.0, 2.0, 0.5, 0.5])
    assert mask.indices().tolist() == [0, 2, 3]
    assert mask().tolist() == [1, 0, 1, 1, 0]


def test_a_scores_gradient_is_that_of_its_mask():
    channels = Channels(3, 3, (ChannelMask(3, 1),))
    (mask,) = channels.masks
    mask.scores.data = torch.tensor([1.0, 3.0, 2.0])
    norm = MaskedNorm(channels).double().eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 4.0]))
        norm.bias.copy_(torch.tensor([0.5, 0.0, -1.0]))
        norm.running_var.fill_(1 - norm.eps)
    x = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]], dtype=torch.float64)[:, :, None, None]
    y = norm(x)
    assert y[:, :, 0, 0].tolist() == [[0, 4, 0], [0, 40, 0]]
    (y[:, :, 0, 0] * torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, -1.0]])).sum().backward()
    # unmasked: 1.5, 4, 11 and 10.5, 40, 119; times the probe, over both images
    assert mask.scores.grad.tolist() == pytest.approx([1.5, 44.0, 11 - 119])


def test_a_masked_channel_is_zero_and_its_filter_gets_no_gradient():
    model = build("resnet18", MaskedKind(0.5)).train()
    conv = model.blocks[0].conv1
    kept = conv.outputs.kept().tolist()
    y, _ = conv(torch.rand(4, 4, 8, 8, dtype=torch.float64), None)
    assert [channel for channel in range(4) if y[:, channel].abs().max() > 0] == kept
    y.square().sum().backward()
    assert [channel for channel in range(4) if conv.weight.grad[channel].abs().max() > 0] == kept


def test_concatenated_channels_keep_the_channels_of_their_parts():
    first, plain, second = Channels(3, 3, (ChannelMask(3, 2),)), Channels(4, 2), Channels(2, 2, (ChannelMask(2, 1),))
    first.masks[0].scores.data = torch.tensor([1.0, 0.0, 2.0])
    second.masks[0].scores.data = torch.tensor([0.0, 1.0])
    assert (first + second).kept().tolist() == [0, 2, 4]
    assert ((plain + plain).full, (plain + plain).width, plain.kept().tolist()) == (8, 4, [0, 1])


def test_unmasked_networks_have_plain_norms():
    assert not any(isinstance(module, MaskedNorm) for module in build("resnet18", DenseKind(0.5)).modules())
    assert isinstance(build("resnet18", DenseKind(0.5)).blocks[0].conv1.norm, nn.BatchNorm2d)
