"""Networks with hooks, computed weights and wrappers: converted exactly, or refused with the name of the module."""

import re
import types

import pytest
import torch
from computed_weights import COMPUTED
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from advmoe.errors import UserError
from advmoe.moe import convert

X = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), *head)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", COMPUTED)
def test_computed_weights_are_baked_in_and_the_model_keeps_them(name, training):
    model = network()
    for index in (0, 2, 6):
        COMPUTED[name](model[index])
    model(X).sum().backward()  # afterwards some of these hold tensors that deepcopy refuses
    model.eval()
    with torch.no_grad():
        expected, kinds = model(X), [type(layer) for layer in model]
        keys = list(model.state_dict())
        moe = convert(model.train(training), 2, 1.0, example_input=X)
        assert moe.training == training
        torch.testing.assert_close(moe.eval()(X), expected)
        assert not [key for key in moe.state_dict() if re.search("orig|mask|_g$|_v$|parametrizations", key)]
        torch.testing.assert_close(model.eval()(X), expected)
    assert (list(model.state_dict()), [type(layer) for layer in model]) == (keys, kinds)
    assert convert(model, 2, 0.5, example_input=X)(X).shape == (4, 5)


WRAPPED = {"DataParallel": nn.DataParallel, "AveragedModel": AveragedModel, "compile": lambda m: torch.compile(m, backend="eager")}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_are_removed(name):
    torch.testing.assert_close(convert(WRAPPED[name](network()), 2, 1.0, example_input=X)(X), network()(X))


def hooked(register, index=None):
    model = network()
    getattr(model if index is None else model[index], register)(lambda *inputs: None)
    return model


def replaced():
    model = network()
    model[1].forward = lambda x: F.relu(x - 0.5)
    return model


def patched():
    model = network()
    model[2]._conv_forward = types.MethodType(lambda self, x, weight, bias: F.conv2d(x, 2 * weight, bias, padding=1), model[2])
    return model


REFUSED = {
    "Sequential: its forward pre-hook (hooked.<locals>.<lambda>)": lambda: hooked("register_forward_pre_hook"),
    "2: its forward hook": lambda: hooked("register_forward_hook", 2),
    "6: its backward hook": lambda: hooked("register_full_backward_hook", 6),
    "6: its backward pre-hook": lambda: hooked("register_full_backward_pre_hook", 6),
    "1: its replaced method forward()": replaced,
    "2: its replaced method _conv_forward()": patched,
    "RecursiveScriptModule: is compiled to TorchScript": lambda: torch.jit.script(network()),
    "0.weight: has no shape yet": lambda: nn.Sequential(nn.LazyConv2d(8, 3), *network()[1:]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("message", REFUSED)
def test_what_conversion_would_lose_is_refused(message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        convert(REFUSED[message](), example_input=X)
    assert "\n" not in str(caught.value)


class DiffersWhenTraced(nn.Module):
    """Computes something else when it is traced."""

    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, x):
        return self.network(x) * (1 if isinstance(x, torch.fx.Proxy) else 2)


def test_a_traced_form_with_other_logits_is_refused():
    with pytest.raises(UserError, match="DiffersWhenTraced: its traced form differs from the model by"):
        convert(DiffersWhenTraced(), example_input=X)


def test_converting_changes_neither_the_images_nor_the_models_mode():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network()

        def forward(self, x):
            return self.network(x.sub_(0.5).div_(0.25))

    x, model = X.clone(), InPlace()
    model.network[1].eval()
    convert(model, example_input=x)
    assert torch.equal(x, X)
    assert model.training
    assert not model.network[1].training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    x = X.to(dtype)
    assert convert(network().to(dtype), 2, 0.5, example_input=x)(x).dtype == dtype
