"""Exported networks: their outputs, the experts that they compute, and what their files contain."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from learned_networks import GREY, KINDS, SPEC, learned, noise
from small_backbone import SMALL, SMALLEST
from torch import nn

from advmoe.config import DataConfig
from advmoe.data import load_dataset
from advmoe.errors import UserError
from advmoe.export import BATCHES, FORMATS, Encoding, agreement, compare, export, onnx_predictor, outputs
from advmoe.export.onnx import INPUT
from advmoe.export.traceable import Traceable, TraceableConv2d
from advmoe.models import MODELS, compact
from advmoe.moe import DenseKind, MaskedKind, MoEKind, convert

NETWORKS = [  # densenet121 is densenet40 with more layers
    *((backbone, kind) for backbone in MODELS for kind in KINDS if backbone != "densenet121" or kind is KINDS[1]),
    ("resnet18", MoEKind(0.5, 3, routers="per_stage")),
]


@pytest.mark.parametrize(("backbone", "kind"), NETWORKS, ids=str)
def test_the_traceable_network_has_the_outputs_of_the_network(backbone, kind):
    model, pixels = learned(kind, backbone), noise(32)
    reference = outputs(model, pixels)
    logits, *routes = Traceable(model)(pixels)
    assert not reference.undecided.any()
    torch.testing.assert_close(logits, reference.logits, rtol=1e-4, atol=1e-4)
    assert len(routes) == bool(model.moe_layers())
    if routes:
        assert torch.equal(routes[0], reference.routes)
        assert len(reference.routes.unique()) > 1


@pytest.mark.parametrize(("backbone", "kind"), NETWORKS, ids=str)
def test_in_bfloat16_routers_and_logits_stay_float32(backbone, kind):
    """For images with the same route, the logits are within bfloat16's rounding. A network router reads pixels in float32."""
    model, pixels = learned(kind, backbone), noise(32)
    reference = outputs(model, pixels)
    logits, *routes = Traceable(model, torch.bfloat16)(pixels)
    assert logits.dtype is torch.float32
    same = (routes[0] == reference.routes).all(dim=1) if routes else torch.ones(32, dtype=torch.bool)
    assert same.sum() > 3
    off = (logits - reference.logits)[same].norm() / reference.logits[same].norm()
    assert 1e-5 < off < 0.06
    if model.router is not None:
        assert same.all()


@torch.no_grad()
def test_prelus_of_a_converted_network_run_in_bfloat16():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.PReLU(8), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.PReLU(8), nn.Linear(8, 3)]
    model = convert(nn.Sequential(*layers, *head), 2, 1.0, example_input=noise(2)).eval()
    logits, _ = Traceable(model, torch.bfloat16)(noise(4))
    torch.testing.assert_close(logits, model(noise(4)), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[3]], ids=str)
def test_tracing_does_not_change_the_network(kind):
    model = learned(kind).double()
    Traceable(model)
    assert {(parameter.dtype, parameter.requires_grad) for parameter in model.parameters()} == {(torch.float64, True)}


def test_a_bfloat16_file_has_the_outputs_of_the_traceable_network_at_every_batch(tmp_path):
    model, pixels = learned(MoEKind(0.5, 2), SMALLEST), noise(70)
    predict = export(model, SPEC.shape, tmp_path / "network", encoding=Encoding("torch-export", "bfloat16"))
    logits, routes = Traceable(model, torch.bfloat16)(pixels)
    for batch in BATCHES:
        predictions = [predict(chunk) for chunk in pixels.split(batch)]
        assert torch.equal(torch.cat([chunk_routes for _, chunk_routes in predictions]), routes)
        torch.testing.assert_close(torch.cat([chunk for chunk, _ in predictions]), logits, rtol=1e-2, atol=1e-3)
    stored = torch.export.load(tmp_path / "network").state_dict
    low = {name for name, value in stored.items() if value.dtype is torch.bfloat16}
    assert {name for name, value in stored.items() if value.ndim == 4} <= low  # filters
    assert not any("router" in name or "classifier" in name for name in low)
    assert agreement(outputs(model, pixels), predict, pixels, None, 64).classes > 80


@pytest.mark.parametrize(("form", "dtype"), [("onnx", "bfloat16"), ("torch-export", "int8")])
def test_what_a_format_does_not_have_is_one_line(form, dtype):
    with pytest.raises(UserError, match=rf"^{form} with {dtype}: .*; take --dtype [a-z0-9]+, or [a-z-]+ \(\.[a-z0-9]+\)$"):
        Encoding(form, dtype)


def test_onnx_runtime_has_no_bfloat16_convolution():
    """The reason why `export` refuses bfloat16 for ONNX. When this test fails, it can be supported."""
    from onnx import TensorProto, helper
    from onnxruntime import InferenceSession

    filters = helper.make_tensor("filters", TensorProto.BFLOAT16, [1, 1, 1, 1], [1.0])
    nodes = [
        helper.make_node("Cast", ["x"], ["low"], to=TensorProto.BFLOAT16),
        helper.make_node("Conv", ["low", "filters"], ["convolved"]),
        helper.make_node("Cast", ["convolved"], ["y"], to=TensorProto.FLOAT),
    ]
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 2, 2])] for name in "xy"]
    graph = helper.make_graph(nodes, "g", *ends, [filters])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    with pytest.raises(Exception, match=r"NOT_IMPLEMENTED.*Conv"):
        InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def real():
    """200 real images."""
    return load_dataset(DataConfig(dataset="fashion-mnist", limit_test=200)).test.pixels()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """exported(format): a routed network, its state before the export, its file with facts, and a function that runs it."""

    @cache
    def write(form):
        model, path = learned(MoEKind(0.5, 2), SMALL, GREY), tmp_path_factory.mktemp(form) / "network"
        before = {name: value.clone() for name, value in model.state_dict().items()}
        predict = export(model, GREY.shape, path, encoding=Encoding(form), facts={"classes": ["a", "b", "c"]})
        return model, before, path, predict

    return write


@pytest.mark.parametrize("form", FORMATS)
def test_equal_to_pytorch_on_real_images_at_every_batch(form, real, exported):
    model, _, _, predict = exported(form)
    reference = outputs(model, real)
    assert all(len(choices.unique()) == 2 for choices in reference.routes.T)
    for batch in BATCHES:
        comparison = compare(reference, predict, real, batch)
        assert comparison.equal, comparison
        assert comparison.images == 200
        assert len(comparison.undecided) < 5
        assert comparison.largest <= 1e-4


@pytest.mark.parametrize(
    ("kind", "backbone"),
    [(DenseKind(0.5), "resnet18"), (KINDS[3], SMALLEST)],
    ids=str,
)
def test_other_networks_by_torch_export(kind, backbone, tmp_path):
    """As ONNX both are in test_int8.py, and a dense network in float32 below."""
    model, pixels = learned(kind, backbone), noise(20)
    predict = export(model, SPEC.shape, tmp_path / "network", encoding=Encoding("torch-export"))
    assert all(compare(outputs(model, pixels), predict, pixels, batch).equal for batch in BATCHES)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [KINDS[2], KINDS[1]], ids=str)
@pytest.mark.parametrize("backbone", MODELS)
def test_every_backbone_as_onnx(kind, backbone, tmp_path):
    model, pixels = learned(kind, backbone), noise(20)
    predict = export(model, SPEC.shape, tmp_path / "network.onnx")
    assert all(compare(outputs(model, pixels), predict, pixels, batch).equal for batch in BATCHES)


def test_a_masked_network_is_exported_compact(tmp_path):
    model, pixels = compact(learned(MaskedKind(0.5), SMALLEST)), noise(5)
    predict = export(model, SPEC.shape, tmp_path / "network.onnx")
    assert compare(outputs(model, pixels), predict, pixels, 5).equal


def test_each_image_is_computed_by_one_expert_in_each_layer(exported, real, tmp_path):
    """ONNX Runtime returns the outputs of the experts' convolutions, whose shapes count the images."""
    import onnx

    model, _, path, _ = exported("onnx")
    graph = onnx.load(path)
    experts = [node.output[0] for node in graph.graph.node if node.op_type == "Conv" and ".experts." in node.input[1]]
    assert len(experts) == 2 * len(model.moe_layers())
    del graph.graph.output[:]
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in experts)
    onnx.save(graph, tmp_path / "experts.onnx")
    for batch in (1, 10):
        images = [len(rows) for rows in onnx_predictor(tmp_path / "experts.onnx")(real[:batch])]
        assert [sum(images[layer : layer + 2]) for layer in range(0, len(images), 2)] == [batch] * len(model.moe_layers())


def test_an_expert_gets_the_images_that_chose_it_and_no_other():
    model = Traceable(learned(MoEKind(0.5, 2)))
    seen = []
    layer = next(module for module in model.modules() if isinstance(module, TraceableConv2d))
    for expert in layer.experts:
        expert.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    _, routes = model(noise(12))
    assert seen == torch.bincount(routes[:, 0], minlength=2).tolist()


@pytest.mark.parametrize("form", FORMATS)
def test_the_network_itself_is_untouched(form, exported):
    model, before, _, _ = exported(form)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_holds_its_facts_and_no_path_of_this_machine(form, exported):
    _, _, path, _ = exported(form)
    content = path.read_bytes()
    assert str(Path(__file__).parents[2]).encode() not in content
    assert b"traceable.py" not in content
    if form == "onnx":
        import onnx

        graph = onnx.load(path)
        assert {prop.key: json.loads(prop.value) for prop in graph.metadata_props} == {"advmoe": {"classes": ["a", "b", "c"]}}
        assert [value.name for value in graph.graph.input] == [INPUT]
        assert [value.name for value in graph.graph.output] == ["logits", "routes"]
        assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    else:
        extra = {"advmoe": ""}
        torch.export.load(path, extra_files=extra)
        assert json.loads(extra["advmoe"]) == {"classes": ["a", "b", "c"]}


def test_missing_extra_is_one_line_with_the_command(monkeypatch, tmp_path):
    from advmoe.export import onnx as module

    real_find = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else real_find(name))
    with pytest.raises(UserError, match=r"ONNX needs onnxruntime, not installed here: pip install 'advmoe\[export\]'"):
        export(learned(DenseKind(0.5), SMALL), SPEC.shape, tmp_path / "network.onnx")
    assert list(tmp_path.iterdir()) == []


def test_unknown_format():
    with pytest.raises(UserError, match="unknown format 'onx': did you mean onnx"):
        Encoding("onx")


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_with_something_else(form, tmp_path):
    (tmp_path / "network").write_bytes(b"something else")
    with pytest.raises(UserError, match="network: not a"):
        FORMATS[form].predictor(tmp_path / "network")
