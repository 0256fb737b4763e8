"""ONNX files with 8-bit convolutions: which convolutions are in 8 bits, and the outputs."""

import json

import pytest
import torch
from learned_networks import SPEC, learned, noise
from small_backbone import SMALLEST
from torch import nn

from advmoe.config import ModelConfig
from advmoe.export import Encoding, agreement, export, outputs
from advmoe.models import build_model
from advmoe.moe import DenseKind, MoEKind, convert

torch.manual_seed(0)  # the same images whichever test files were imported before
CALIBRATION = noise(150)


def export_int8(model, path, facts=None):
    return export(model, SPEC.shape, path, encoding=Encoding("onnx", "int8"), facts=facts, calibration=CALIBRATION)


def convolutions(path):
    """For each convolution of the file, the name of its filters, and whether its input is in 8 bits. The order is the file's."""
    import onnx

    graph = onnx.load(path).graph
    producers = {node.output[0]: node for node in graph.node}

    def in_8_bits(name):
        return name in producers and producers[name].op_type == "DequantizeLinear"

    def stored_name(name):
        return producers[name].input[0].removesuffix("_quantized") if in_8_bits(name) else name

    return [(stored_name(node.input[1]), in_8_bits(node.input[0])) for node in graph.node if node.op_type == "Conv"]


def exact_experts(convolutions):
    """The number of experts in float32 of each layer, in the order of the layers, from the pairs of `convolutions`."""
    layers = {}
    for name, in_8_bits in convolutions:
        layers.setdefault(name.partition(".experts.")[0], []).append(not in_8_bits)
    return [sum(flags) for layer, flags in sorted(layers.items(), key=lambda item: int(item[0].rpartition(".")[2]))]


def rare_experts(model):
    """The number of experts of each layer that fewer than 16 calibration images chose. They must stay in float32."""
    counts = [torch.bincount(choice, minlength=2) for choice in outputs(model, CALIBRATION).routes.T]
    return [int((count < 16).sum()) for count in counts]


def test_convolutions_are_in_8_bits_but_for_the_first_and_those_of_experts_that_nobody_chose(tmp_path):
    import onnx

    model, path = learned(MoEKind(0.5, 2), SMALLEST), tmp_path / "network.onnx"
    with torch.no_grad():
        for layer in (0, 2):
            model.moe_layers()[layer].router.linear.bias[1] += 1e4
    predict = export_int8(model, path, {"classes": ["a"]})
    first, *experts = convolutions(path)
    assert first == ("network.stem.weight", False)
    assert exact_experts(experts) == rare_experts(model)
    for layer in (0, 2):
        assert dict(experts)[f"network.layers.{layer}.experts.0.weight"] is False
        assert dict(experts)[f"network.layers.{layer}.experts.1.weight"] is True
    assert sum(in_8_bits for _, in_8_bits in experts) > len(model.moe_layers())
    file = onnx.load(path)
    assert {prop.key: prop.value for prop in file.metadata_props}["advmoe"] == json.dumps({"classes": ["a"]})
    gemms = [node for node in file.graph.node if node.op_type == "Gemm"]
    stored = {tensor.name: tensor.data_type for tensor in file.graph.initializer}
    assert {stored[node.input[1]] for node in gemms} == {onnx.TensorProto.FLOAT}  # routers and classifier
    assert [value.name for value in file.graph.output] == ["logits", "routes"]
    assert predict(noise(8))[0].isfinite().all()


def test_a_network_router_is_untouched_and_so_are_its_routes(tmp_path):
    model, path = learned(MoEKind(0.5, 2, "disjoint", "per_network"), SMALLEST), tmp_path / "network.onnx"
    pixels = noise(64)
    predict, reference = export_int8(model, path), outputs(model, pixels)
    assert len(reference.routes.unique()) == 2
    assert torch.equal(predict(pixels)[1], reference.routes)
    assert agreement(reference, predict, pixels, None, 64).classes > 85
    pairs = convolutions(path)
    routers = [in_8_bits for name, in_8_bits in pairs if name.startswith("network.router.")]
    assert len(routers) > 10
    assert not any(routers)
    others = [(name, in_8_bits) for name, in_8_bits in pairs if not name.startswith("network.router.")]
    assert [name for name, in_8_bits in others if not in_8_bits] == ["network.stem.weight"]
    assert len(others) == 1 + 2 * len(model.moe_layers())


def test_equal_experts_share_filters_in_the_file_and_are_distinguished(tmp_path):
    torch.manual_seed(0)
    model = build_model(ModelConfig(backbone=SMALLEST, width=8), MoEKind(0.5, 2), SPEC).eval()
    with torch.no_grad():
        model.moe_layers()[0].router.linear.bias[1] += 1e4
    export_int8(model, tmp_path / "network.onnx")
    experts = convolutions(tmp_path / "network.onnx")[1:]
    assert experts[0][0] == experts[1][0]
    assert exact_experts(experts) == rare_experts(model)
    assert exact_experts(experts)[0] == 1


def with_list(kind):
    """A network with a list of plain convolutions called `experts`."""

    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.experts = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))
            self.last, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 3)

        def forward(self, x):
            h = self.stem(x)
            for layer in (*self.experts, self.last):
                h = layer(h.relu())
            return self.head(h.mean((2, 3)))

    torch.manual_seed(0)
    return convert(Listed(), kind=kind, example_input=noise(2)).eval()


@pytest.mark.parametrize("kind", [DenseKind(), MoEKind(0.5, 2)], ids=["dense", "MoE"])
def test_a_list_of_plain_convolutions_may_be_called_experts(kind, tmp_path):
    model = with_list(kind)
    with torch.no_grad():
        for layer in model.moe_layers():
            layer.filters.add_(0.1 * torch.randn_like(layer.filters))
            layer.router.linear.bias[1] += 1e4
    export_int8(model, tmp_path / "network.onnx")
    exact = [name.removeprefix("network.traced.") for name, in_8_bits in convolutions(tmp_path / "network.onnx") if not in_8_bits]
    assert exact == ["stem.weight", *(["last.experts.0.weight"] if model.moe_layers() else [])]


def test_outputs_are_close_to_the_networks_at_every_batch(tmp_path):
    model, pixels = learned(DenseKind(0.5), "resnet18"), noise(64)
    predict, reference = export_int8(model, tmp_path / "network.onnx"), outputs(model, pixels)
    logits = predict(pixels)[0]
    assert 1e-4 < (logits - reference.logits).norm() / reference.logits.norm() < 0.1
    torch.testing.assert_close(torch.cat([predict(chunk)[0] for chunk in pixels.split(7)]), logits, rtol=1e-4, atol=1e-4)
    assert agreement(reference, predict, pixels, None, 64).classes > 85


def test_needs_images(tmp_path):
    with pytest.raises(ValueError, match="int8 needs images"):
        export(learned(DenseKind(0.5), SMALLEST), SPEC.shape, tmp_path / "network.onnx", encoding=Encoding("onnx", "int8"))
