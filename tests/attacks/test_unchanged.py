"""An attack that changes a network is reported, and the network is restored."""

import re

import pytest
import torch
from image_specs import image_spec
from torch import nn

from advmoe.attacks.registry import ATTACKS, Attack
from advmoe.errors import UserError
from advmoe.evaluation import evaluate
from advmoe.models.resnet import ResNet
from advmoe.moe import MoEKind

pytestmark = pytest.mark.usefixtures("registries")
X = torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def network(channels=1):
    torch.manual_seed(0)
    layers = nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    return nn.Sequential(*layers).eval()


def attack_that(change, model=None):
    """An attack that calls `change` with `model`, or else with the network that it attacks."""

    def run(job):
        change(job.predict if model is None else model)
        return job.x

    return Attack(run)


def double(model):
    next(model.parameters()).data.mul_(2)


def change_in_inference_mode(model):
    with torch.inference_mode():
        next(model.parameters()).add_(1)


def run_in_train_mode(model):
    model.train()
    model(X)
    model.eval()


def leave_in_train_mode(model):
    model.train()
    model(X)


def replace_a_weight(model):
    model[0].weight = nn.Parameter(2 * model[0].weight.detach())


def replace_a_layer(model):
    model[1] = nn.Identity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: next(model.parameters()).add_(1), "changed 0.weight of the network: it must leave weights"),
        (double, "changed 0.weight of the network"),
        (change_in_inference_mode, "changed 0.weight of the network"),
        (lambda model: model.double(), "changed 0.bias, 0.weight, 1.bias and others of the network"),
        (run_in_train_mode, "changed 1.num_batches_tracked, 1.running_mean, 1.running_var of the network"),
        (leave_in_train_mode, "left the network in another mode"),
        (replace_a_weight, "changed 0.weight of the network"),
        (replace_a_layer, "changed 1.bias, 1.num_batches_tracked, 1.running_mean and others of the network"),
        (lambda model: model[1].register_buffer("more", torch.ones(1), persistent=False), "changed 1.more of the network"),
    ],
)
def test_an_attack_that_changes_the_network_is_named_and_the_network_restored(change, message):
    model = network()
    y, before = model(X).argmax(dim=1), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ATTACKS["bad"] = attack_that(change)
    with pytest.raises(UserError, match=f"^attack 'bad' {re.escape(message)}"):
        evaluate(model, X, y, epsilon=0.01, preset=["pgd_10", "bad"])
    assert not any(module.training for module in model.modules())
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [name for name, _ in model.named_buffers() if name not in before] == []


def test_the_faster_copy_the_judge_and_the_network_to_transfer_from_are_compared():
    judge = ResNet(MoEKind(0.5, num_experts=2), image_spec(3), blocks=(1,), width=4, stem="cifar").eval()
    source = network(channels=3)

    def double_both(job):
        double(judge)
        double(source)
        return job.x

    x = torch.rand(2, 3, 32, 32)
    y, before = judge(x).argmax(dim=1), [next(model.parameters()).clone() for model in (judge, source)]
    for change in (attack_that(double), attack_that(double, judge), attack_that(double, source), Attack(double_both)):
        ATTACKS["bad"] = change
        with pytest.raises(UserError, match=r"attack 'bad' changed \S+ of the network"):
            evaluate(judge, x, y, epsilon=0.01, preset=["bad"], transfer=source)
    assert all(torch.equal(next(model.parameters()), tensor) for model, tensor in zip((judge, source), before, strict=True))


def test_an_attack_may_restore_what_it_changes_and_flags_are_restored_for_it():
    def double_for_a_while(model):
        before = model[0].weight.clone()
        double(model)
        model[0].weight.data.copy_(before)
        model.requires_grad_(True)

    def note_flags(model):
        flags.extend(parameter.requires_grad for parameter in model.parameters())

    model, flags = network(), []
    ATTACKS["careless"], ATTACKS["watch"] = attack_that(double_for_a_while), attack_that(note_flags)
    result = evaluate(model, X, model(X).argmax(dim=1), epsilon=0.01, preset=["careless", "watch"])
    assert result.worst == 100
    assert flags == [False] * 6
    assert all(parameter.requires_grad for parameter in model.parameters())


class Counting(nn.Module):
    """Counts its passes, in place and by a new tensor, adds up its pixels with a graph, and has a NaN that does not matter."""

    def __init__(self):
        super().__init__()
        self.inner = network()
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("images", torch.zeros(()))
        self.register_buffer("pixels", torch.zeros(()))
        self.register_buffer("unused", torch.tensor([torch.nan]).expand(2))

    def forward(self, x):
        self.passes += 1
        self.images = self.images + len(x)
        self.pixels += x.sum()
        return self.inner(x)


class Uncopied(Counting):
    def __deepcopy__(self, memo):
        raise TypeError("cannot pickle a lock")


@pytest.mark.parametrize("kind", [Counting, Uncopied])
def test_a_buffer_that_every_forward_pass_changes_is_not_blamed_on_an_attack(kind):
    model, y = kind().eval(), network()(X).argmax(dim=1)
    ATTACKS["looks"] = attack_that(lambda model: model(X))
    result = evaluate(model, X, y, epsilon=0.1, preset=["pgd_10", "apgd_ce", "looks"])
    assert result.broken == {**evaluate(network(), X, y, epsilon=0.1, preset=["pgd_10", "apgd_ce"]).broken, "looks": []}
    ATTACKS["bad"] = attack_that(lambda model: double(model.inner))
    with pytest.raises(UserError, match=r"attack 'bad' changed inner\.0\.weight of the network"):
        evaluate(model, X, y, epsilon=0.001, preset=["bad"])
