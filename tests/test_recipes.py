import pytest
import torch

from advmoe.data import DATASETS
from advmoe.errors import UserError
from advmoe.recipes import RECIPES, recipe
from advmoe.training.loop import network
from advmoe.training.methods import METHODS


def test_every_method_has_its_demo_and_its_cell_of_the_paper() -> None:
    assert set(METHODS) == set(METHODS)
    assert set(RECIPES) == {f"{family}-{method}" for family in ("demo", "cifar10-resnet18") for method in METHODS}


@pytest.mark.parametrize("name", RECIPES)
def test_name_says_method_and_data(name: str) -> None:
    config = recipe(name)
    assert name.endswith(f"-{config.method}")
    assert config.data.dataset == ("fashion-mnist" if name.startswith("demo-") else "cifar10")


@pytest.mark.parametrize("name", RECIPES)
def test_builds_a_network_for_its_data(name: str) -> None:
    config = recipe(name)
    spec = DATASETS[config.data.dataset].spec
    model = network(config, spec).eval()
    with torch.no_grad():
        logits = model(torch.rand(2, *spec.shape))
    assert logits.shape == (2, len(spec.classes))
    assert logits.isfinite().all()


@pytest.mark.parametrize("family", ["demo", "cifar10-resnet18"])
def test_recipes_of_a_family_differ_in_method_alone(family: str) -> None:
    changed = {recipe(f"{family}-{method}").method for method in METHODS}
    rest = [(r.model, r.data, r.attack, r.training, r.seed) for r in (recipe(f"{family}-{method}") for method in METHODS)]
    assert changed == set(METHODS)
    assert all(one == rest[0] for one in rest)


def test_cifar10_recipes_are_the_papers() -> None:
    config = recipe("cifar10-resnet18-advmoe")
    assert (config.model.num_experts, config.model.model_scale, config.model.width) == (2, 0.5, 64)
    assert (config.attack.epsilon, config.attack.step, config.attack.num_steps) == (8 / 255, pytest.approx(5 / 255), 2)
    assert (config.training.epochs, config.training.batch_size, config.training.lr) == (100, 128, 0.1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("demo-advmo", "unknown recipe 'demo-advmo': did you mean demo-advmoe or "),
        ("cifar10-resnet18-advme", "unknown recipe 'cifar10-resnet18-advme': did you mean cifar10-resnet18-advmoe"),
        ("zzz", "unknown recipe 'zzz': there is cifar10-resnet18-advmoe, "),
        ("", "unknown recipe '': there is cifar10-resnet18-advmoe, "),
    ],
)
def test_unknown_names_give_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe(name)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value).splitlines()) == 1
