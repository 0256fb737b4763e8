"""Recipes: name -> RunConfig."""

from dataclasses import replace

from advmoe.config import AttackConfig, DataConfig, ModelConfig, RunConfig, TrainingConfig
from advmoe.errors import lookup

METHOD_NAMES = ("standard", "at_dense", "at_small_dense", "at_moe", "advmoe")

DEMO = RunConfig(
    model=ModelConfig(width=16),
    data=DataConfig(dataset="fashion-mnist", crop_padding=2, flip=True),
    attack=AttackConfig(epsilon=0.1, step_size=0.1 * 5 / 8, num_steps=2),
    training=TrainingConfig(epochs=5, batch_size=64),
)


def _recipes() -> dict[str, RunConfig]:
    named = {}
    for method in METHOD_NAMES:
        named[f"demo-{method}"] = replace(DEMO, method=method)
        named[f"cifar10-resnet18-{method}"] = RunConfig(method=method)
    return named


RECIPES = _recipes()


def recipe(name: str) -> RunConfig:
    """The configuration of a recipe. Raises UserError, with the nearest names, where there is none of that name."""
    return lookup(RECIPES, name, "recipe")
