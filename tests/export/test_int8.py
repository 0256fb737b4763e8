"""ONNX files with 8-bit convolutions: which they are, and what they say."""

import json

import pytest
import torch
from learned_networks import SPEC, learned, noise
from small_backbone import SMALL

from advmoe.config import ModelConfig
from advmoe.export import Encoding, agreement, export, outputs
from advmoe.models import build_model
from advmoe.moe import DenseKind, MoEKind

SEEN = noise(300)


def written(model, path, facts=None):
    return export(model, SPEC.shape, path, encoding=Encoding("onnx", "int8"), facts=facts, calibration=SEEN)


def convolutions(path):
    """For each convolution of the file its filters' name and whether it reads 8-bit values; a layer's may stand in any order."""
    import onnx

    graph = onnx.load(path).graph
    makers = {node.output[0]: node for node in graph.node}

    def lower(name):
        return name in makers and makers[name].op_type == "DequantizeLinear"

    def stored(name):
        return makers[name].input[0].removesuffix("_quantized") if lower(name) else name

    return [(stored(node.input[1]), lower(node.input[0])) for node in graph.node if node.op_type == "Conv"]


def kept(found):
    """How many experts of each layer stay exact, in the layers' order, of what `convolutions` found."""
    layers = {}
    for name, lower in found:
        layers.setdefault(name.partition(".experts.")[0], []).append(not lower)
    return [sum(flags) for layer, flags in sorted(layers.items(), key=lambda item: int(item[0].rpartition(".")[2]))]


def rare(model):
    """How many experts of each layer fewer than 16 calibration images chose: what ought to stay exact."""
    counts = [torch.bincount(choice, minlength=2) for choice in outputs(model, SEEN).routes.T]
    return [int((count < 16).sum()) for count in counts]


def test_convolutions_are_in_8_bits_but_for_the_first_and_those_of_experts_that_nobody_chose(tmp_path):
    import onnx

    model, path = learned(MoEKind(0.5, 2), SMALL), tmp_path / "network.onnx"
    with torch.no_grad():
        for layer in (0, 3):
            model.moe_layers()[layer].router.linear.bias[1] += 1e4
    predict = written(model, path, {"classes": ["a"]})
    first, *experts = convolutions(path)
    assert first == ("network.stem.weight", False)
    assert kept(experts) == rare(model)
    for layer in (0, 3):
        assert dict(experts)[f"network.layers.{layer}.experts.0.weight"] is False
        assert dict(experts)[f"network.layers.{layer}.experts.1.weight"] is True
    assert sum(lower for _, lower in experts) > len(model.moe_layers())
    whole = onnx.load(path)
    assert {prop.key: prop.value for prop in whole.metadata_props}["advmoe"] == json.dumps({"classes": ["a"]})
    gemms = [node for node in whole.graph.node if node.op_type == "Gemm"]
    stored = {tensor.name: tensor.data_type for tensor in whole.graph.initializer}
    assert {stored[node.input[1]] for node in gemms} == {onnx.TensorProto.FLOAT}  # routers and classifier
    assert [value.name for value in whole.graph.output] == ["logits", "routes"]
    assert predict(noise(8))[0].isfinite().all()


def test_a_network_router_is_untouched_and_so_are_its_routes(tmp_path):
    model, path = learned(MoEKind(0.5, 2, "disjoint", "per_network"), SMALL), tmp_path / "network.onnx"
    pixels = noise(64)
    predict, reference = written(model, path), outputs(model, pixels)
    assert len(reference.routes.unique()) == 2
    assert torch.equal(predict(pixels)[1], reference.routes)
    found = convolutions(path)
    routers = [lower for name, lower in found if name.startswith("network.router.")]
    assert len(routers) > 10
    assert not any(routers)
    others = [(name, lower) for name, lower in found if not name.startswith("network.router.")]
    assert [name for name, lower in others if not lower] == ["network.stem.weight"]
    assert len(others) == 1 + 2 * len(model.moe_layers())


def test_equal_experts_share_filters_in_the_file_and_are_distinguished(tmp_path):
    torch.manual_seed(0)
    model = build_model(ModelConfig(backbone=SMALL, width=8), MoEKind(0.5, 2), SPEC).eval()
    with torch.no_grad():
        model.moe_layers()[0].router.linear.bias[1] += 1e4
    written(model, tmp_path / "network.onnx")
    experts = convolutions(tmp_path / "network.onnx")[1:]
    assert experts[0][0] == experts[1][0]
    assert kept(experts) == rare(model)
    assert kept(experts)[0] == 1


@pytest.mark.parametrize("backbone", ["resnet18", "densenet40"])
def test_says_nearly_what_the_network_says_at_every_batch(backbone, tmp_path):
    model, pixels = learned(DenseKind(0.5), backbone), noise(64)
    predict, reference = written(model, tmp_path / "network.onnx"), outputs(model, pixels)
    said = predict(pixels)[0]
    assert 1e-4 < (said - reference.logits).norm() / reference.logits.norm() < 0.1
    torch.testing.assert_close(torch.cat([predict(chunk)[0] for chunk in pixels.split(7)]), said, rtol=1e-4, atol=1e-4)
    assert agreement(reference, predict, pixels, None, 64).classes > 85


def test_needs_images(tmp_path):
    with pytest.raises(ValueError, match="int8 needs images"):
        export(learned(DenseKind(0.5), SMALL), SPEC.shape, tmp_path / "network.onnx", encoding=Encoding("onnx", "int8"))
