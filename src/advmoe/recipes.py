"""Recipes: name -> RunConfig."""

from dataclasses import replace

from advmoe.config import AttackConfig, DataConfig, ModelConfig, RunConfig, TrainingConfig
from advmoe.errors import lookup
from advmoe.training.methods import METHODS

DEMO = RunConfig(
    model=ModelConfig(width=16),
    data=DataConfig(dataset="fashion-mnist", crop_padding=2, limit_train=2000, limit_test=300),
    attack=AttackConfig(epsilon=0.1),
    training=TrainingConfig(epochs=6, batch_size=64, lr=0.05, tied_share=0.67),
)


def _recipes() -> dict[str, RunConfig]:
    named = {}
    for method in METHODS:
        named[f"demo-{method}"] = replace(DEMO, method=method)
        named[f"cifar10-resnet18-{method}"] = RunConfig(method=method)
    return named


RECIPES = _recipes()


def recipe(name: str) -> RunConfig:
    """The configuration of a recipe. Raises UserError, with the nearest names, where there is none of that name."""
    return lookup(RECIPES, name, "recipe")
