"""The cost of a configuration's network: counted on the network, or estimated quickly from the shapes of its layers.

at_sparse is counted as the compact network that its masks leave, since that is what is evaluated.
"""

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch

from advmoe.config import DataConfig, ModelConfig, RunConfig
from advmoe.data import DATASETS, ImageSpec
from advmoe.errors import lookup
from advmoe.evaluation.cost import Cost, cost, layer_macs, layer_params, layer_positions
from advmoe.models import NoSuchForm, build_model, compact
from advmoe.moe import DenseKind, MaskedKind, MoEKind
from advmoe.training.methods import METHODS
from advmoe.training.start import network

NARROW = 20  # the least width whose half still gives every layer of every backbone a channel


class Estimate(NamedTuple):
    """Parameters, and ideal GMACs of one image."""

    params: int
    gmacs: float


def profile(config: RunConfig) -> Cost:
    """The cost of the configuration's network, with its layers. Raises UserError if it names something that does not exist."""
    spec = image_spec(config)
    return cost(compact(network(config, spec)), spec.shape)


def estimate(config: RunConfig) -> Estimate:
    """The same parameters and ideal GMACs, without a weight in memory. Raises UserError as `profile`."""
    kind = lookup(METHODS, config.method, "method").kind(config.model)
    if isinstance(kind, MaskedKind):
        kind = DenseKind(kind.scale)
    return _estimate(_shape_fields(config.model), kind, image_spec(config))


def dense_estimate(config: RunConfig) -> Estimate:
    """The cost of the dense network, which the others are compared with."""
    try:
        return estimate(config.replace(method="at_dense"))
    except NoSuchForm:
        dense = dense_cost(config, image_spec(config))
        return Estimate(dense.params, dense.gmacs_ideal)


def dense_cost(config: RunConfig, spec: ImageSpec) -> Cost:
    """The dense network's cost, counted. A backbone without a dense form is counted with one full expert and without routers."""
    try:
        return cost(network(config.replace(method="at_dense"), spec), spec.shape)
    except NoSuchForm:
        with torch.random.fork_rng(devices=[]):
            single = cost(build_model(config.model, MoEKind(1.0, num_experts=1), spec), spec.shape)
        layers = tuple(layer for layer in single.layers if "router" not in layer.name.split("."))
        return Cost(
            sum(layer.params for layer in layers), sum(layer.gmacs_ideal for layer in layers),
            sum(layer.gmacs_executed for layer in layers), layers,
        )  # fmt: skip


def image_spec(config: RunConfig) -> ImageSpec:
    """What is known of the configured data set's images. Raises UserError on an unknown data set."""
    return _spec(config.data)


@cache
def _spec(data: DataConfig) -> ImageSpec:
    """A folder of images is read as a whole for its means and deviations: once in a process."""
    return lookup(DATASETS, data.dataset, "dataset").spec(data)


def _shape_fields(model: ModelConfig) -> ModelConfig:
    """The fields that the shapes of a network's layers depend on."""
    return ModelConfig(backbone=model.backbone, width=model.width, stem=model.stem)


@cache
def _estimate(model: ModelConfig, kind: DenseKind, spec: ImageSpec) -> Estimate:
    with torch.device("meta"):
        shapes = build_model(model, kind, spec)
    narrow = replace(spec, classes=("one",))
    macs = layer_macs(shapes, _positions(model.replace(width=NARROW), replace(kind, scale=0.5), narrow))
    return Estimate(sum(layer_params(shapes).values()), sum(macs.values()) / 1e9)


@cache
def _positions(model: ModelConfig, kind: DenseKind, spec: ImageSpec) -> dict[str, int]:
    """The number of positions at which each layer is computed. It does not depend on the width, so it is counted on a narrow
    network. At a scale below 1 that has every layer of a wider one, and perhaps one more shortcut."""
    with torch.random.fork_rng(devices=[]):
        return layer_positions(build_model(model, kind, spec), spec.shape)
