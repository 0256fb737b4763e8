"""Networks unlike those of this package: they change their input, hide their routing, or have unusual parameters or images."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from image_specs import image_spec
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel
from toy_networks import ToyMoE, images, labels

from advmoe.attacks import autoattack
from advmoe.config import RunConfig
from advmoe.errors import UserError
from advmoe.evaluation import ATTACKS, evaluate
from advmoe.evaluation.precision import full_float32
from advmoe.evaluation.target import EvaluationOptions, make_target, routed_inside
from advmoe.evaluation.wrappers import CopiedInput, copying, gradient_network
from advmoe.models import deployed
from advmoe.models.resnet import ResNet
from advmoe.moe import DenseKind, MoEKind, convert
from advmoe.runs.loaded import Loaded

X = images(8)
EPSILON = 0.02
PLAN = ("pgd_10", "apgd_margin_t")


class InPlace(nn.Module):
    """Normalises its input in place: always, or only without gradients."""

    def __init__(self, *, always: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.always, self.layer = always, nn.Linear(36, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.sub_(0.5) if self.always or not x.requires_grad else x - 0.5
        out: Tensor = self.layer(x.flatten(1))
        return out


class OutOfPlace(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer((x - 0.5).flatten(1))
        return out


@pytest.mark.parametrize("always", [True, False])
def test_a_network_that_changes_its_input_gets_copies(always: bool) -> None:
    y = OutOfPlace(always=True)(X).argmax(dim=1)
    x, reference = X.clone(), evaluate(OutOfPlace(always=True).eval(), X, y, epsilon=EPSILON, preset=PLAN)
    evaluation = evaluate(InPlace(always=always).eval(), x, y, epsilon=EPSILON, preset=PLAN)
    assert torch.equal(x, X)
    assert (evaluation.sa, evaluation.broken) == (100, reference.broken)


def test_a_converted_network_that_changes_its_input_gets_copies() -> None:
    convolutions = [nn.Conv2d(channels, 8, 3, padding=1) for channels in (1, 8)]
    plain = nn.Sequential(nn.ReLU(inplace=True), *convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    model = convert(plain, example_input=X[:1]).eval()
    assert evaluate(model, X, model(X.clone()).argmax(dim=1), epsilon=EPSILON, preset=PLAN).sa == 100


class WithExtraState(OutOfPlace):
    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"steps": 3}


def test_state_that_is_no_tensor_is_left_out_of_the_key_of_stored_results() -> None:
    model = WithExtraState(always=True).eval()
    assert evaluate(model, X, model(X).argmax(dim=1), epsilon=EPSILON, preset=PLAN).sa == 100


def test_only_networks_that_need_copies_get_them() -> None:
    model = OutOfPlace(always=True)
    assert copying(model, X[:1]) is model
    assert isinstance(copying(InPlace(always=True), X[:1]), CopiedInput)


class View(nn.Module):
    """Flattens by `view`, as AutoAttack's code does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.view(len(x), -1))
        return out


@pytest.mark.parametrize("layout", ["permuted", "channels_last"])
def test_images_need_not_be_contiguous(layout: str) -> None:
    x = torch.rand(4, 6, 6, 3, generator=torch.Generator().manual_seed(0)).permute(0, 3, 1, 2)
    x = x if layout == "permuted" else x.contiguous(memory_format=torch.channels_last)
    model = View().eval()
    y = model(x.contiguous()).argmax(dim=1)
    evaluation = evaluate(model, x, y, epsilon=EPSILON, preset=("pgd_10", "aa_apgd-ce"))
    assert evaluation.broken == evaluate(model, x.contiguous(), y, epsilon=EPSILON, preset=("pgd_10", "aa_apgd-ce")).broken


ROUTED = MoEKind(0.5)


def network(kind: DenseKind = ROUTED) -> ResNet:
    torch.manual_seed(0)
    return ResNet(kind, image_spec(4, [0.5], [0.5]), blocks=(1,), width=4, stem="cifar").eval()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [AveragedModel, nn.DataParallel, compiled, lambda model: nn.DataParallel(compiled(model))])
def test_wrappers_of_a_network_that_routes_are_unwrapped(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = ToyMoE().eval()
    assert type(routed_inside(wrap(model))) is ToyMoE
    y = labels(model, X)
    evaluation = evaluate(wrap(model), X, y, epsilon=EPSILON, preset=("pgd_10", "reroute_quick"))
    assert evaluation.left_out == {}
    assert evaluation.broken == evaluate(model, X, y, epsilon=EPSILON, preset=("pgd_10", "reroute_quick")).broken


class Defence(nn.Module):
    """Changes images before a network, which is its attribute `module` as in the wrappers of PyTorch."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(1 - x)
        return out


def test_a_defence_with_a_module_is_not_unwrapped_and_hides_its_routing() -> None:
    model = Defence(ToyMoE()).eval()
    y = model(X).argmax(dim=1)
    options = EvaluationOptions(EPSILON)
    assert not torch.equal(model.module(X).argmax(dim=1), y)
    assert evaluate(model, X, y, epsilon=EPSILON, preset=PLAN).sa == 100
    assert make_target(model, X, y, options).hides_routing
    assert not make_target(Defence(OutOfPlace(always=True)).eval(), X, y, options).hides_routing


@pytest.mark.parametrize(("kind", "routes"), [(MoEKind(0.5), True), (DenseKind(), False)])
def test_a_wrapper_hides_routing_only_if_something_in_it_routes(kind: DenseKind, routes: bool) -> None:
    model = network(kind)
    x, options = torch.rand(2, 1, 8, 8), EvaluationOptions(EPSILON)
    y = model(x).argmax(dim=1)
    for inner in (model, deployed(model), Loaded(model, RunConfig(), image_spec(4, [0.5], [0.5]))):
        assert make_target(nn.Sequential(inner).eval(), x, y, options).hides_routing == routes


def test_routing_that_a_wrapper_hides_makes_the_evaluation_incomplete(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in autoattack.STANDARD:
        monkeypatch.setitem(ATTACKS, name, replace(ATTACKS[name], run=lambda job: job.x))
    model, x = nn.Sequential(nn.Identity(), network()).eval(), torch.rand(3, 1, 8, 8)
    with caplog.at_level("WARNING", "advmoe"):
        evaluation = evaluate(model, x, model(x).argmax(dim=1), epsilon=EPSILON, preset=("autoattack",))
    assert "contains one that routes but has no forward_routed" in caplog.text
    assert not evaluation.complete


def test_parametrised_and_pruned_networks_are_attacked_as_they_are() -> None:
    x, plain = torch.rand(3, 1, 8, 8), network()
    assert gradient_network(plain, bf16=False) is not plain
    pruned, normed = copy.deepcopy(plain), copy.deepcopy(plain)
    prune.l1_unstructured(pruned.classifier, "weight", 0.5)
    parametrizations.weight_norm(normed.classifier)
    for model in (pruned, normed):
        assert gradient_network(model, bf16=False) is model
        evaluation = evaluate(model, x, model(x).argmax(dim=1), epsilon=EPSILON, preset=("pgd_10", "reroute_quick"))
        assert evaluation.sa == 100


class Demanding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError(f"images of 28 x 28 are needed,\nnot of {x.shape}")


@pytest.mark.parametrize("model", [nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(8), nn.Flatten(), nn.Linear(4, 3)), Demanding()])
def test_images_of_a_wrong_size_are_refused_in_one_line(model: nn.Module) -> None:
    model.eval()
    with pytest.raises(UserError, match="the network does not take images of 1 x 6 x 6: ") as error:
        evaluate(model, X, torch.zeros(8, dtype=torch.long), epsilon=EPSILON, preset=PLAN)
    assert "\n" not in str(error.value)


@pytest.fixture
def _restored_precision() -> Iterator[None]:
    cudnn, cuda, mkldnn = torch.backends.cudnn, torch.backends.cuda, torch.backends.mkldnn
    settings = [cudnn.conv, cudnn.rnn, cuda.matmul, mkldnn.conv, mkldnn.matmul]
    before = [setting.fp32_precision for setting in settings]
    allowed, products = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    cudnn.allow_tf32 = True  # PyTorch's default, which the CUDA benchmark changes in its process
    yield
    cudnn.allow_tf32 = allowed  # kept apart from the settings: PyTorch raises an error wherever the two disagree
    torch.set_float32_matmul_precision(products)
    for setting, precision in zip(settings, before, strict=True):
        setting.fp32_precision = precision


@pytest.mark.usefixtures("_restored_precision")
@pytest.mark.parametrize("interface", ["default", "older", "newer"])
def test_the_judging_network_does_not_round_to_tf32(interface: str) -> None:
    convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    if interface == "older":
        torch.set_float32_matmul_precision("medium")
    elif interface == "newer":
        convolutions.fp32_precision = products.fp32_precision = "tf32"
        torch.backends.cudnn.rnn.fp32_precision = "ieee"
    before = convolutions.fp32_precision, products.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    with full_float32(nn.Linear(1, 1)):
        assert (convolutions.fp32_precision, products.fp32_precision) == ("ieee", "ieee")
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert interface == "newer" or torch.backends.cudnn.allow_tf32 is False  # it can be read
    assert (convolutions.fp32_precision, products.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision) == before
    assert before[0] == "tf32"
