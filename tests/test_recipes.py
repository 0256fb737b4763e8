from dataclasses import replace

import pytest
import torch
from refusal import refusal
from small_backbone import SMALL, SMALL_RESNET, SMALLEST

from advmoe.config import RunConfig, differences
from advmoe.config.choices import BACKBONES, METHOD_TRAITS
from advmoe.data import DATASETS
from advmoe.errors import UserError
from advmoe.models import MODELS, build_model
from advmoe.paper import printed_cells
from advmoe.recipes import RECIPES, recipe
from advmoe.runs.cost import NARROW, image_spec
from advmoe.training.methods import METHODS, traits
from advmoe.training.start import network

PAPER_METHODS = ("at_dense", "at_small_dense", "at_sparse", "at_moe", "advmoe")


def test_lists_every_cell_of_the_papers_tables() -> None:
    for cell in printed_cells():
        config = RECIPES[cell.recipe]
        assert (config.data.dataset, config.model.backbone, config.method) == (cell.dataset, cell.model, cell.method)
        assert config.attack.num_steps == cell.attack_steps
        assert cell.method == "at_dense" or config.model.model_scale == cell.model_scale


def test_lists_every_backbone_data_set_and_method_with_2_and_10_steps() -> None:
    nets = ("resnet18", "wrn28_10", "vgg16_bn")
    pairs = [(data, net) for data in ("cifar10", "cifar100", "tinyimagenet", "imagenet") for net in nets]
    pairs += [(data, "densenet40") for data in ("cifar10", "cifar100", "tinyimagenet")] + [("imagenet", "densenet121")]
    listed = {(c.data.dataset, c.model.backbone, c.method, c.attack.num_steps) for c in RECIPES.values() if c.model.width is None}
    expected = {(data, net, method, steps) for data, net in pairs for method in PAPER_METHODS for steps in (2, 10)}
    assert listed == expected | {(data, net, "standard", 2) for data, net in pairs}


def test_table_a2_has_its_scales_on_both_data_sets() -> None:
    scaled = {(c.data.dataset, c.model.backbone, c.method, c.model.model_scale) for c in RECIPES.values()}
    expected = {
        (data, net, method, scale)
        for data in ("cifar10", "cifar100")
        for net in ("resnet18", "wrn28_10")
        for method in PAPER_METHODS[1:]
        for scale in (0.2, 0.8)
    }
    assert {entry for entry in scaled if entry[3] != 0.5} == expected


def test_a_name_describes_its_configuration() -> None:
    for name, config in RECIPES.items():
        assert recipe(name) == config, name
        dataset, model, method = ("demo", "", config.method) if name.startswith("demo-") else name.split("-")[:3]
        assert dataset in ("demo", config.data.dataset), name
        assert model in ("", config.model.backbone), name
        assert config.method == method, name


def test_names_and_traits_without_torch_are_those_of_the_code() -> None:
    assert [name for name in MODELS if name not in (SMALL, SMALLEST, SMALL_RESNET)] == list(BACKBONES)
    assert {name: traits(method) for name, method in METHODS.items()} == METHOD_TRAITS


def test_added_methods_and_backbones_make_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "mine", MODELS["resnet18"])
    monkeypatch.setitem(METHODS, "added", METHODS["at_small_dense"])
    assert recipe("cifar10-mine-added-r0.2").model.model_scale == 0.2
    with pytest.raises(UserError, match="sets the number of experts, and added has none"):
        recipe("cifar10-mine-added-n4")
    monkeypatch.setitem(METHODS, "added", replace(METHODS["at_small_dense"], loss="pgd_at"))
    assert recipe("cifar10-mine-added-steps10").attack.num_steps == 10
    with pytest.raises(UserError, match="sets the robust loss, which added fixes"):
        recipe("cifar10-mine-added-pgd_at")


def test_an_added_data_set_makes_recipes_with_the_default_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stripes", "cifar10-jpeg"):  # the second begins with the name of another data set
        monkeypatch.setitem(DATASETS, name, DATASETS["fashion-mnist"])
        config = recipe(f"{name}-resnet18-advmoe-n4")
        assert (config.data.dataset, config.model.backbone, config.model.num_experts) == (name, "resnet18", 4)
        assert config.replace(data=RunConfig().data) == RunConfig(model=config.model)
    with pytest.raises(UserError, match="no dataset 'stripe', did you mean stripes"):
        recipe("stripe-resnet18-advmoe")


def test_no_two_recipes_are_the_same_run() -> None:
    assert len(set(RECIPES.values())) == len(RECIPES)


def one_of_each_network() -> list[str]:
    """The first recipe of each distinct network: data set, model, and the kind that the method makes of it."""
    networks: dict[object, str] = {}
    for name, config in RECIPES.items():
        networks.setdefault((config.data.dataset, config.model, METHODS[config.method].kind(config.model)), name)
    return list(networks.values())


@pytest.mark.parametrize("name", one_of_each_network())
def test_builds_its_network(name: str) -> None:
    config = recipe(name)
    spec = image_spec(config)
    with torch.device("meta"):
        model = build_model(config.model, METHODS[config.method].kind(config.model), spec)
    assert model.classifier.out_features == len(spec.classes) == CLASSES[config.data.dataset]
    assert bool(model.moe_layers()) == (config.method in ("at_moe", "advmoe"))
    assert bool(model.mask_parameters()) == (config.method == "at_sparse")


CLASSES = {"fashion-mnist": 10, "cifar10": 10, "cifar100": 100, "tinyimagenet": 200, "imagenet": 1000}
SIDES = {"cifar10": 32, "cifar100": 32, "tinyimagenet": 64, "imagenet": 224}


@pytest.mark.parametrize("dataset", SIDES)
@pytest.mark.parametrize("model", ["resnet18", "wrn28_10", "vgg16_bn", "densenet40", "densenet121"])
def test_narrow_networks_take_their_data_sets_images(dataset: str, model: str) -> None:
    config = recipe(f"{dataset}-{model}-advmoe")
    spec = DATASETS[dataset].spec(config.data)
    assert spec.shape == (3, SIDES[dataset], SIDES[dataset])
    net = network(config.replace(model=config.model.replace(width=NARROW)), spec).eval()
    with torch.no_grad():
        logits = net(torch.rand(1, *spec.shape))
    assert logits.shape == (1, CLASSES[dataset])
    assert logits.isfinite().all()


@pytest.mark.parametrize("family", ["demo", "cifar10-resnet18", "imagenet-densenet121"])
def test_recipes_of_a_family_differ_in_method_alone(family: str) -> None:
    configs = [recipe(f"{family}-{method}") for method in METHODS]
    assert {config.method for config in configs} == set(METHODS)
    assert len({config.replace(method="") for config in configs}) == 1


def sgd(config: RunConfig) -> tuple[float, float, float, int, int]:
    training = config.training
    return training.lr, training.momentum, training.weight_decay, training.epochs, training.batch_size


def attack(config: RunConfig) -> tuple[float, int, float]:
    """In 255ths of the pixel range."""
    return 255 * config.attack.epsilon, config.attack.num_steps, 255 * config.attack.step


def test_appendix_b_on_cifar10() -> None:
    config = recipe("cifar10-resnet18-advmoe")
    assert sgd(config) == (0.1, 0.9, 5e-4, 100, 128)
    assert attack(config) == pytest.approx((8, 2, 5))
    assert (config.model.num_experts, config.model.model_scale, config.model.width, config.model.stem) == (2, 0.5, None, "cifar")
    assert (config.training.loss, config.training.beta, config.training.tied_share) == ("trades", 6, 0)


def test_appendix_b_on_imagenet() -> None:
    config = recipe("imagenet-wrn28_10-at_moe")
    assert sgd(config) == (0.1, 0.9, 5e-4, 100, 512)
    assert attack(config) == pytest.approx((4, 2, 2.5))
    assert config.model.stem == "imagenet"


def test_appendix_b_on_tinyimagenet() -> None:
    config = recipe("tinyimagenet-densenet40-at_sparse")
    assert sgd(config) == (0.1, 0.9, 5e-4, 100, 128)
    assert len(METHODS[config.method].phases) == 2  # 100 epochs of masks, 100 of weights
    assert attack(config) == pytest.approx((8, 2, 5))
    assert config.model.stem == "cifar"


def test_table_a1_takes_ten_steps_of_2() -> None:
    assert attack(recipe("cifar10-wrn28_10-at_dense-steps10")) == pytest.approx((8, 10, 2))


def test_suffixes_set_one_field_each() -> None:
    plain = recipe("cifar100-vgg16_bn-at_moe")
    every = recipe("cifar100-vgg16_bn-at_moe-r0.25-n4-steps10-pgd_at")
    assert (every.model.model_scale, every.model.num_experts, every.attack.num_steps, every.training.loss) == (
        0.25,
        4,
        10,
        "pgd_at",
    )
    model = every.model.replace(model_scale=0.5, num_experts=2)
    restored = every.replace(model=model, attack=every.attack.replace(num_steps=2), training=every.training.replace(loss="trades"))
    assert restored == plain
    assert recipe("cifar100-vgg16_bn-at_moe-n4") == plain.replace(model=plain.model.replace(num_experts=4))
    assert recipe("cifar100-vgg16_bn-at_moe-pgd_at") == plain.replace(training=plain.training.replace(loss="pgd_at"))


def test_the_official_variant_is_composed_of_options() -> None:
    plain, variant = recipe("cifar10-resnet18-advmoe"), recipe("cifar10-resnet18-advmoe-official")
    assert (variant.model.routers, variant.model.bank, variant.model.norms) == ("per_network", "disjoint", "shared")
    training = variant.training
    assert (training.level_batches, training.router_loss, training.router_target) == ("same", "target", "label_mod_n")
    assert (training.router_target_weight, training.router_consistency) == (6, 6)
    assert variant.attack == plain.attack
    assert recipe("cifar10-resnet18-advmoe-pgd_at-official").training.router_consistency == 0  # it compares with clean images


def test_plus_adds_the_ingredients_that_a_recipe_can_use() -> None:
    plain, variant = recipe("cifar10-resnet18-advmoe-r0.8-n1-steps10"), recipe("cifar10-resnet18-advmoe-r0.8-n1-steps10-plus")
    assert differences(variant, plain) == [
        "model.activation: silu, not relu", "training.tied_share: 0.5, not 0.0", "training.ema: 0.995, not 0.0",
    ]  # fmt: skip
    assert recipe("cifar10-resnet18-at_small_dense-plus").training.tied_share == 0
    assert recipe("cifar10-resnet18-advmoe-official-plus").training.router_loss == "target"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("demo-advmo", "did you mean demo-advmoe or "),
        ("demo", "there is demo-advmoe, "),
        ("cifar10-resnet18-advme", "unknown method 'advme': did you mean advmoe?"),
        ("cifar10-resnet81-advmoe", "unknown backbone 'resnet81': did you mean resnet18 or densenet121?"),
        ("cifr10-resnet18-advmoe", "no dataset 'cifr10', did you mean cifar10 or cifar100?"),
        ("zzz", "no dataset 'zzz', there is cifar10, cifar100, "),
        ("", "no dataset '', there is cifar10, cifar100, "),
        ("cifar10-resnet18", "a name is DATASET-BACKBONE-METHOD[-rSCALE][-nEXPERTS][-steps10][-pgd_at][-official][-plus]"),
        ("cifar10-resnet18-at_dense-r0.5", "'-r0.5' sets the model scale, and at_dense has none"),
        ("cifar10-resnet18-at_dense-n2", "'-n2' sets the number of experts, and at_dense has none"),
        ("cifar10-resnet18-at_sparse-r0.2-n4", "'-r0.2-n4' sets the number of experts, and at_sparse has none"),
        ("cifar10-resnet18-at_small_dense-n2", "'-n2' sets the number of experts, and at_small_dense has none"),
        ("cifar10-resnet18-standard-steps10", "'-steps10' sets the training attack, and standard has none"),
        ("cifar10-resnet18-standard-pgd_at", "'-pgd_at' sets the robust loss, and standard has none"),
        ("cifar10-resnet18-advmoe-n4-r0.2", "'-n4-r0.2' is not of the form [-rSCALE][-nEXPERTS][-steps10][-pgd_at]"),
        ("cifar10-resnet18-at_moe-official", "'-official' sets the routers' level, and at_moe has none"),
        ("cifar10-resnet18-advmoe-steps7", "'-steps7' is not of the form "),
        ("cifar10-resnet18-advmoe-", "'-' is not of the form "),
        ("cifar10-resnet18-advmoe-r1.5", "model_scale must be in (0, 1], not 1.5"),
        ("cifar10-resnet18-advmoe-n0", "num_experts must be in [1, 1000], not 0"),
    ],
)
def test_the_error_of_an_unknown_name_says_what_is_wrong_and_suggests_others(name: str, message: str) -> None:
    assert refusal(recipe, name).startswith(f"unknown recipe '{name}': {message}")
