"""Exported networks: what they say, what they compute, what their files hold."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from advmoe.config import DataConfig, ModelConfig
from advmoe.data import PictureSpec, load_dataset
from advmoe.errors import UserError
from advmoe.export import BATCHES, FORMATS, answers, compare, export, onnx_predictor
from advmoe.export.onnx import INPUT
from advmoe.export.traceable import RoutedConv2d, Traceable
from advmoe.models import MODELS, build_model, compact
from advmoe.moe import DenseKind, ExpertNorm, MaskedKind, MoEKind

SPEC = PictureSpec(("a", "b", "c"), (3, 16, 16), (0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
GREY = PictureSpec(tuple("abcdefghij"), (1, 28, 28), (0.3,), (0.35,))
WIDTHS = {"resnet18": 8, "wrn28_10": 20, "vgg16_bn": 8, "densenet40": 4, "densenet121": 4}
KINDS = [DenseKind(0.5), MoEKind(0.5, 2), MoEKind(0.75, 3, norms="shared"), MoEKind(0.5, 3, "disjoint", "per_network")]


def noise(count):
    """Pictures of noise, some dark and some bright, so that routers tell them apart."""
    return torch.rand(count, *SPEC.shape) ** torch.logspace(-1, 1, count)[:, None, None, None]


def learned(kind, backbone="resnet18", spec=SPEC):
    """A network in eval mode whose experts and norms are anything but fresh."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(backbone, WIDTHS[backbone]), kind, spec).train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | ExpertNorm):
                module.momentum = None  # a plain mean
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
        for layer in model.moe_layers():
            nn.init.normal_(layer.filters, std=0.1)
        for _ in range(3):
            model(torch.rand(32, *spec.shape) ** torch.logspace(-1, 1, 32)[:, None, None, None])
    return model.eval()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("backbone", MODELS)
def test_what_is_traced_says_what_the_network_says(backbone, kind):
    model, pixels = learned(kind, backbone), noise(32)
    known = answers(model, pixels)
    said = Traceable(model)(pixels)
    assert known.margins.min() > 1e-5
    torch.testing.assert_close(said[0], known.logits, rtol=1e-4, atol=1e-4)
    assert len(said) == 1 + bool(model.moe_layers())
    if model.moe_layers():
        assert torch.equal(said[1], known.routes)
        assert len(known.routes.unique()) > 1


@pytest.fixture(scope="module")
def real():
    """1,000 real pictures."""
    return load_dataset(DataConfig(dataset="fashion-mnist", limit_test=1000)).test.pixels()


@pytest.mark.parametrize("form", FORMATS)
def test_equal_to_pytorch_on_real_pictures_at_every_batch(form, real, tmp_path):
    model = learned(MoEKind(0.5, 2), spec=GREY)
    predict, known = export(model, GREY.shape, tmp_path / "network", form), answers(model, real)
    assert len(known.routes.unique(dim=0)) > 10
    for batch in BATCHES:
        found = compare(known, predict, real, batch)
        assert found.equal, found
        assert found.pictures == 1000
        assert len(found.undecided) < 5
        assert found.largest <= 1e-4


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("kind", "backbone"), [(DenseKind(0.5), "resnet18"), (KINDS[3], "vgg16_bn")], ids=str)
def test_other_networks(form, kind, backbone, tmp_path):
    model, pixels = learned(kind, backbone), noise(20)
    predict = export(model, SPEC.shape, tmp_path / "network", form)
    assert all(compare(answers(model, pixels), predict, pixels, batch).equal for batch in BATCHES)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [KINDS[2], KINDS[1]], ids=str)
@pytest.mark.parametrize("backbone", MODELS)
def test_every_backbone_as_onnx(kind, backbone, tmp_path):
    model, pixels = learned(kind, backbone), noise(20)
    predict = export(model, SPEC.shape, tmp_path / "network.onnx")
    assert all(compare(answers(model, pixels), predict, pixels, batch).equal for batch in BATCHES)


def test_a_masked_network_goes_out_compact(tmp_path):
    model, pixels = compact(learned(MaskedKind(0.5), "vgg16_bn")), noise(5)
    predict = export(model, SPEC.shape, tmp_path / "network.onnx")
    assert compare(answers(model, pixels), predict, pixels, 5).equal


def test_each_picture_meets_one_expert_a_layer(tmp_path):
    """Told by ONNX Runtime, from the shapes that the experts' convolutions give."""
    import onnx

    model, path = learned(MoEKind(0.5, 3)), tmp_path / "network.onnx"
    export(model, SPEC.shape, path)
    graph = onnx.load(path)
    experts = [node.output[0] for node in graph.graph.node if node.op_type == "Conv" and ".experts." in node.input[1]]
    assert len(experts) == 3 * len(model.moe_layers())
    del graph.graph.output[:]
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in experts)
    onnx.save(graph, tmp_path / "experts.onnx")
    for batch in (1, 10):
        pictures = [len(rows) for rows in onnx_predictor(tmp_path / "experts.onnx")(noise(batch))]
        assert [sum(pictures[layer : layer + 3]) for layer in range(0, len(pictures), 3)] == [batch] * len(model.moe_layers())


def test_an_expert_sees_its_own_pictures_alone():
    model = Traceable(learned(MoEKind(0.5, 2)))
    seen = []
    layer = next(module for module in model.modules() if isinstance(module, RoutedConv2d))
    for expert in layer.experts:
        expert.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    _, routes = model(noise(12))
    assert seen == torch.bincount(routes[:, 0], minlength=2).tolist()


def test_the_network_itself_is_untouched(tmp_path):
    model = learned(MoEKind(0.5, 2), "vgg16_bn")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export(model, SPEC.shape, tmp_path / "network.pt2", "torch-export")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_holds_its_facts_and_no_path_of_this_machine(form, tmp_path):
    path = tmp_path / "network"
    export(learned(MoEKind(0.5, 2), "vgg16_bn"), SPEC.shape, path, form, {"classes": ["a", "b", "c"]})
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
        export(learned(DenseKind(0.5), "vgg16_bn"), SPEC.shape, tmp_path / "network.onnx")
    assert list(tmp_path.iterdir()) == []


def test_unknown_format(tmp_path):
    with pytest.raises(UserError, match="unknown format 'onx': did you mean onnx"):
        export(learned(DenseKind(0.5), "vgg16_bn"), SPEC.shape, tmp_path / "network.onnx", "onx")


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_that_is_none(form, tmp_path):
    (tmp_path / "network").write_bytes(b"something else")
    with pytest.raises(UserError, match="network: not a"):
        FORMATS[form].predictor(tmp_path / "network")
