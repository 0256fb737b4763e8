import pytest
import torch
from image_specs import image_spec
from torch import nn

from advmoe.models import MODELS
from advmoe.models.resnet import ResNet
from advmoe.moe import HARD, DenseKind, ExpertNorm, ForcedGate, MoEConv2d, MoEKind, ScaledGate, SoftGate, StraightThroughGate

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
NORMS = pytest.mark.parametrize("norms", ["shared", "per_expert"])


def resnet18(kind, width=64, stem="cifar", classes=10):
    torch.manual_seed(0)
    make, _ = MODELS["resnet18"]
    return make(kind, image_spec(classes, MEAN, STD), width=width, stem=stem)


def tiny(kind, mean=MEAN, std=STD):
    torch.manual_seed(0)
    return ResNet(kind, image_spec(3, mean, std), blocks=(1, 1), width=4, stem="cifar")


def spread(model, x):
    """Make experts differ, and set all running statistics from x, so that the routers use several experts for x."""
    with torch.no_grad():
        for norm in [module for module in model.modules() if isinstance(module, nn.BatchNorm2d | ExpertNorm)]:
            norm.momentum = 1.0
        for layer in model.moe_layers():
            layer.filters.normal_(std=0.3)
        model.train()(x)
        model.eval()
    return model


def images(count, size=12):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def block_widths(model):
    return [block.conv1.norm.num_features for block in model.blocks]


@pytest.mark.parametrize(
    ("scale", "stem", "widths"),
    [(0.5, 32, [32, 64, 128, 256]), (0.2, 12, [12, 25, 51, 102]), (0.8, 51, [51, 102, 204, 409])],
)
def test_small_dense_scales_every_width(scale, stem, widths):
    model = resnet18(DenseKind(scale))
    assert model.stem[0].out_channels == stem
    assert block_widths(model) == [width for width in widths for _ in range(2)]
    assert model.classifier.in_features == widths[-1]
    assert model.moe_layers() == []
    assert model.blocks[0].shortcut is None


@pytest.mark.parametrize(("scale", "widths"), [(0.5, [32, 64, 128, 256]), (0.2, [12, 25, 51, 102])])
def test_moe_keeps_the_stem_and_starts_with_a_projection(scale, widths):
    model = resnet18(MoEKind(scale, num_experts=2, norms="shared"))
    assert model.stem[0].out_channels == 64
    assert block_widths(model) == [width for width in widths for _ in range(2)]
    first = model.blocks[0]
    assert first.conv1.in_channels == 64
    assert first.shortcut.kernel_size == (1, 1)
    assert (first.shortcut.in_channels, first.shortcut.out_channels) == (64, widths[0])
    assert model.blocks[1].shortcut is None
    assert [layer.filters.shape[1] for layer in model.moe_layers()][:3] == [64, widths[0], widths[0]]


def test_moe_resnet18_has_sixteen_routed_layers_numbered_in_order():
    model = resnet18(MoEKind(0.5, num_experts=4), width=8)
    layers = model.moe_layers()
    assert len(layers) == 16
    assert [layer.index for layer in layers] == list(range(16))
    assert all(isinstance(layer, MoEConv2d) for block in model.blocks for layer in (block.conv1, block.conv2))
    _, routings = model.eval().forward_routed(images(2, 16))
    assert len(routings) == 16
    assert all(routing.logits.shape == (2, 4) and routing.experts.shape == (2,) for routing in routings)


def test_parameters_split_into_routers_and_weights():
    model = resnet18(MoEKind(0.5, num_experts=4), width=8)
    routers, weights = model.router_parameters(), model.weight_parameters()
    named = dict(model.named_parameters())
    assert {id(p) for p in routers} == {id(p) for name, p in named.items() if ".router." in name}
    assert len(routers) == 32
    assert {id(p) for p in routers} | {id(p) for p in weights} == {id(p) for p in named.values()}
    assert len(routers) + len(weights) == len(named)


def test_routings_are_in_the_order_of_the_layers():
    model = tiny(MoEKind(0.5, num_experts=2)).eval()
    with torch.no_grad():
        for layer, bias in zip(model.moe_layers(), [1.0, 2.0, 3.0, 4.0], strict=True):
            layer.router.linear.weight.zero_()
            layer.router.linear.bias.copy_(torch.tensor([0.0, bias]))
    _, routings = model.forward_routed(images(1))
    assert [routing.logits[0, 1].item() for routing in routings] == [1, 2, 3, 4]


def test_a_forced_route_is_followed_layer_by_layer():
    model = tiny(MoEKind(0.5, num_experts=2)).eval()
    route = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]])
    _, routings = model.forward_routed(images(2), ForcedGate(route))
    assert torch.equal(torch.stack([routing.experts for routing in routings], dim=1), route)


@NORMS
def test_forward_is_forward_routed_through_the_hard_gate(norms):
    x = images(8)
    model = spread(tiny(MoEKind(0.5, num_experts=2, norms=norms)), x)
    logits, routings = model.forward_routed(x, HARD)
    assert torch.equal(model(x), logits)
    assert torch.equal(model.forward_routed(x)[0], logits)
    assert any(len(routing.experts.unique()) == 2 for routing in routings)
    assert not torch.allclose(logits, model.forward_routed(x, SoftGate())[0])


@NORMS
def test_straight_through_gives_the_logits_of_hard(norms):
    x = images(8)
    model = spread(tiny(MoEKind(0.5, num_experts=2, norms=norms)), x).double()
    hard, straight = model(x.double()), model.forward_routed(x.double(), StraightThroughGate())[0]
    torch.testing.assert_close(hard, straight, rtol=1e-10, atol=1e-12)


@NORMS
def test_an_images_logits_do_not_depend_on_its_batch(norms):
    x = images(6).double()
    model = spread(tiny(MoEKind(0.5, num_experts=2, norms=norms)).double(), x)
    together = model(x)
    for i in range(6):
        torch.testing.assert_close(model(x[i : i + 1])[0], together[i], rtol=1e-10, atol=1e-12)


def test_cifar_stem_keeps_the_image_size():
    model = resnet18(DenseKind(), width=4).eval()
    assert model.stem(images(2, 32)).shape == (2, 4, 32, 32)
    assert model(images(2, 32)).shape == (2, 10)
    assert (model.stem[0].kernel_size, model.stem[0].stride) == ((3, 3), (1, 1))


def test_imagenet_stem_divides_the_image_size_by_four():
    model = resnet18(DenseKind(), width=4, stem="imagenet", classes=7).eval()
    assert model.stem(images(2, 64)).shape == (2, 4, 16, 16)
    assert model(images(2, 64)).shape == (2, 7)
    assert (model.stem[0].kernel_size, model.stem[0].stride) == ((7, 7), (2, 2))


def test_stages_halve_the_image_size():
    model, h, sizes = resnet18(DenseKind(), width=4).eval(), images(1, 32), []
    h = model.stem(h)
    for block in model.blocks:
        h, _ = block(h, HARD)
        sizes.append(h.shape[-1])
    assert sizes == [32, 32, 16, 16, 8, 8, 4, 4]


def test_the_network_normalises_its_images():
    model, plain = tiny(DenseKind()).eval(), tiny(DenseKind(), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)).eval()
    x = images(2)
    normalised = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(model(x), plain(normalised), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(model(x), plain(x))


@NORMS
@pytest.mark.parametrize("bank", ["backbone", "disjoint"])
@pytest.mark.parametrize("num_experts", [2, 4])
def test_every_parameter_gets_a_finite_gradient_under_straight_through(num_experts, bank, norms):
    x = images(16)
    model = spread(tiny(MoEKind(0.5, num_experts=num_experts, bank=bank, norms=norms)), x).train()
    logits, _ = model.forward_routed(x, StraightThroughGate())
    nn.functional.cross_entropy(logits, torch.arange(16) % 3).backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_dense_gets_a_finite_gradient_everywhere():
    model = tiny(DenseKind()).train()
    nn.functional.cross_entropy(model(images(6)), torch.arange(6) % 3).backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", [DenseKind(), MoEKind(0.5, num_experts=4), MoEKind(0.5, num_experts=4, norms="shared")])
def test_state_dict_round_trip(kind):
    x = images(8)
    model = spread(tiny(kind), x)
    torch.manual_seed(99)
    other = ResNet(kind, image_spec(3, (0.0,) * 3, (1.0,) * 3), blocks=(1, 1), width=4, stem="cifar").eval()
    assert not torch.allclose(other(x), model(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


@NORMS
@pytest.mark.parametrize("gate", [HARD, StraightThroughGate(), SoftGate(), ScaledGate()])
def test_a_forward_pass_in_eval_mode_changes_no_state(gate, norms):
    model = spread(tiny(MoEKind(0.5, num_experts=2, norms=norms)), images(8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    tensors = {name: [v for v in vars(m).values() if isinstance(v, torch.Tensor)] for name, m in model.named_modules()}
    first = model.forward_routed(images(4), gate)[0]
    model.forward_routed(images(3) * 0.5, gate)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(tensors.values())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(model.forward_routed(images(4), gate)[0], first)
