"""The cost of a configuration's network: counted on the network, or estimated quickly from the shapes of its layers.

For at_sparse it is the cost of the compact network, without the masked channels, because that network is evaluated.
"""

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch

from advmoe.config import DataConfig, ModelConfig, RunConfig
from advmoe.data import ImageSpec, lookup_dataset
from advmoe.errors import lookup
from advmoe.evaluation.cost import Cost, cost, layer_macs, layer_params, layer_positions
from advmoe.models import NoSuchForm, build_model, compact
from advmoe.moe import DenseKind, MaskedKind, MoEKind
from advmoe.training.methods import METHODS
from advmoe.training.start import network

NARROW = 20  # the smallest width with which every layer of every backbone has a channel at scale 0.5


class Estimate(NamedTuple):
    """Parameters, and ideal GMACs of one image."""

    params: int
    gmacs: float


def profile(config: RunConfig) -> Cost:
    """The cost of the configuration's network, with its layers. Raises UserError if it names something that does not exist."""
    spec = image_spec(config)
    return cost(compact(network(config, spec)), spec.shape)


def estimate(config: RunConfig) -> Estimate:
    """The same parameters and ideal GMACs, computed without allocating weights. Raises UserError as `profile`."""
    kind = lookup(METHODS, config.method, "method").kind(config.model)
    if isinstance(kind, MaskedKind):
        kind = DenseKind(kind.scale)
    shapes = ModelConfig(backbone=config.model.backbone, width=config.model.width, stem=config.model.stem)
    return _estimate(shapes, kind, image_spec(config))


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
    """The ImageSpec of the configured data set. Raises UserError if the data set is unknown."""
    return _spec(config.data)


@cache
def _spec(data: DataConfig) -> ImageSpec:
    """Cached, because for a folder of images all of them are read."""
    return lookup_dataset(data.dataset).spec(data)


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
