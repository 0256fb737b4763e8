"""Recipes: name -> RunConfig. Every cell of the paper's tables, the same for its other backbones and data sets, and the demo.

A name is DATASET-BACKBONE-METHOD, then, in this order and only where they differ from r = 0.5, N = 2, 2 attack steps and TRADES:
-rSCALE, -nEXPERTS, -steps10, -pgd_at, -official (the public code's variant), -plus (ingredients beyond the paper, `PLUS`). Any such
name is a recipe.
RECIPES lists the named cells.
"""

import re
from importlib import import_module
from typing import Any

from advmoe.config import AttackConfig, DataConfig, ModelConfig, RunConfig, TrainingConfig
from advmoe.config.choices import BACKBONES, METHOD_TRAITS, MethodTraits
from advmoe.errors import UserError, lookup, nearest

GRAMMAR = "DATASET-BACKBONE-METHOD[-rSCALE][-nEXPERTS][-steps10][-pgd_at][-official][-plus]"
SUFFIXES = re.compile(
    r"(?:-r(?P<scale>\d+(?:\.\d+)?))?(?:-n(?P<experts>\d+))?(?P<steps>-steps10)?(?P<pgd_at>-pgd_at)?(?P<official>-official)?"
    r"(?P<plus>-plus)?"
)
DEMO = RunConfig(
    model=ModelConfig(width=16),
    data=DataConfig(dataset="fashion-mnist", crop_padding=2, limit_train=2000, limit_test=300),
    attack=AttackConfig(epsilon=0.1),
    training=TrainingConfig(epochs=6, batch_size=64, lr=0.05, tied_share=0.67),
)
BASES = {  # the settings of the paper's appendix B; RunConfig's defaults are CIFAR's
    **{name: RunConfig(data=DataConfig(dataset=name)) for name in ("cifar10", "cifar100", "tinyimagenet", "folder")},
    "imagenet": RunConfig(
        model=ModelConfig(stem="imagenet"), data=DataConfig(dataset="imagenet"),
        attack=AttackConfig(epsilon=4 / 255), training=TrainingConfig(batch_size=512),
    ),
    "fashion-mnist": RunConfig(data=DEMO.data.replace(limit_train=None, limit_test=None), attack=DEMO.attack),
}  # fmt: skip
PAPER_DATASETS = ("cifar10", "cifar100", "tinyimagenet", "imagenet")
PLUS: dict[str, dict[str, Any]] = {  # the suffix -plus, by section; `plus` omits what a recipe cannot use
    "model": {"activation": "silu"},
    "training": {"ema": 0.995, "tied_share": 0.5},
}
A2_DATASETS, A2_BACKBONES = ("cifar10", "cifar100"), ("resnet18", "wrn28_10")
DEMOS = {f"demo-{method}": DEMO.replace(method=method) for method in METHOD_TRAITS} | {
    "demo-at_moe-n1": DEMO.replace(method="at_moe", model=DEMO.model.replace(num_experts=1))  # the control of demo-advmoe
}


def recipe(name: str) -> RunConfig:
    """The configuration of a recipe. Raises UserError, with similar names, if the name is unknown."""
    if name in DEMOS:
        return DEMOS[name]
    try:
        return _parsed(name)
    except UserError as error:
        raise UserError(f"unknown recipe '{name}': {error}") from None


def _parsed(name: str) -> RunConfig:
    dataset = _dataset(name)
    backbone, _, rest = name.removeprefix(f"{dataset}-").partition("-")
    method, dash, suffixes = rest.partition("-")
    if not method:
        raise UserError(f"a name is {GRAMMAR}")
    if backbone not in BACKBONES:
        lookup(import_module("advmoe.models").MODELS, backbone, "backbone")
    base = (BASES.get(dataset) or RunConfig(data=DataConfig(dataset=dataset))).replace(method=method)
    return _with_suffixes(base.replace(model=base.model.replace(backbone=backbone)), method_traits(method), dash + suffixes)


def _dataset(name: str) -> str:
    """The data set that a recipe's name begins with, built in or added by a user. Raises UserError if there is none."""
    for known in BASES:
        if name.startswith(tuple(f"{known}-{backbone}-" for backbone in BACKBONES)):
            return known
    known_names: list[str] = list(import_module("advmoe.data").DATASETS)  # imports torch, which built-in names do not need
    dataset = max((known for known in known_names if name.startswith(f"{known}-")), key=len, default=None)
    if dataset is None:
        named = name.partition("-")[0]
        raise UserError(nearest(name, list(DEMOS)) if named == "demo" else f"no dataset '{named}', {nearest(named, known_names)}")
    return dataset


def _with_suffixes(base: RunConfig, traits: MethodTraits, text: str) -> RunConfig:
    match = SUFFIXES.fullmatch(text)
    if match is None:
        raise UserError(f"'{text}' is not of the form {GRAMMAR.removeprefix('DATASET-BACKBONE-METHOD')}")
    for suffix, (setting, has) in zip(match.groups(), _settings(traits).items(), strict=True):
        if suffix and not has:
            fixed = setting == "robust loss" and traits.attacked
            reason = f"which {base.method} fixes" if fixed else f"and {base.method} has none"
            raise UserError(f"'{text}' sets the {setting}, {reason}")
    model = base.model.replace(
        model_scale=float(match["scale"] or base.model.model_scale),
        num_experts=int(match["experts"] or base.model.num_experts),
    )
    attack = base.attack.replace(num_steps=10 if match["steps"] else base.attack.num_steps)
    training = base.training.replace(loss="pgd_at" if match["pgd_at"] else base.training.loss)
    config = base.replace(model=model, attack=attack, training=training)
    config = official(config) if match["official"] else config
    return plus(config) if match["plus"] else config


def official(config: RunConfig) -> RunConfig:
    """The variant of the paper's public code: disjoint experts under shared norms, and one network router that learns the label
    modulo N and consistency alone, on the same batch as the experts. The loss pgd_at has no clean images, so it has no consistency.
    """
    model = config.model.replace(routers="per_network", bank="disjoint", norms="shared")
    training = config.training.replace(
        level_batches="same", router_loss="target", router_target="label_mod_n", router_target_weight=6.0,
        router_consistency=0.0 if config.training.loss == "pgd_at" else 6.0,
    )  # fmt: skip
    return config.replace(model=model, training=training)


def plus(config: RunConfig) -> RunConfig:
    """With ingredients beyond the paper, `PLUS`: those that did not clearly lower RA-worst in short runs
    (docs/ingredients.md). Without routers nothing is tied."""
    training = dict(PLUS["training"])
    if not method_traits(config.method).routed:
        del training["tied_share"]
    return config.replace(model=config.model.replace(**PLUS["model"]), training=config.training.replace(**training))


def _settings(traits: MethodTraits) -> dict[str, bool]:
    """What each suffix sets, and whether the method has such a thing."""
    return {
        "model scale": traits.scaled, "number of experts": traits.routed, "training attack": traits.attacked,
        "robust loss": traits.attacked and not traits.fixed_loss, "routers' level": traits.two_levels, "ingredients": True,
    }  # fmt: skip


def method_traits(method: str) -> MethodTraits:
    """What a recipe must know about a method, built in or added by a user. Raises UserError if it is unknown."""
    if method in METHOD_TRAITS:
        return METHOD_TRAITS[method]
    methods = import_module("advmoe.training.methods")  # imports torch, which recipes of built-in methods do not need
    traits: MethodTraits = methods.traits(methods.lookup_method(method))
    return traits


def _names() -> list[str]:
    """The named cells: every backbone, data set and method, also with -steps10, -plus and -official where the method has them, and
    table A2's other scales."""
    return [
        f"{dataset}-{backbone}-{method}{suffix}"
        for dataset in PAPER_DATASETS
        for backbone in ("resnet18", "wrn28_10", "vgg16_bn", "densenet121" if dataset == "imagenet" else "densenet40")
        for method in METHOD_TRAITS
        for suffix in _suffixes(method, dataset in A2_DATASETS and backbone in A2_BACKBONES)
    ]


def _suffixes(method: str, in_table_a2: bool) -> list[str]:
    has = _settings(METHOD_TRAITS[method])
    scales = ["-r0.2", "-r0.8"] if in_table_a2 and has["model scale"] else []
    attacked = ["-steps10", "-plus"] if has["training attack"] else []
    return ["", *scales, *attacked, *(["-official"] if has["routers' level"] else [])]


RECIPES = DEMOS | {name: recipe(name) for name in _names()}
