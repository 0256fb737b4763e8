"""The running statistics of batch norms and routers."""

from contextlib import suppress

import pytest
import torch
from torch import nn

from advmoe.config import DataConfig
from advmoe.data import load_dataset
from advmoe.moe import convert
from advmoe.training.checkpoint import RunFolder
from advmoe.training.loop import train
from advmoe.training.start import best_network, network
from advmoe.training.statistics import calibrate, calibrate_routers, kept_statistics


@pytest.fixture(scope="module")
def fashion_mnist():
    """Enough embedded images for a calibration and its check."""
    return load_dataset(DataConfig(dataset="fashion-mnist", limit_train=1200, limit_test=20))


@pytest.mark.parametrize("seeds", [pytest.param(range(1), id="one"), pytest.param(range(1, 10), id="more", marks=pytest.mark.slow)])
@pytest.mark.parametrize("norms", ["shared", "per_expert"])
@pytest.mark.parametrize("routers", ["per_layer", "per_stage", "per_network"])
def test_no_calibrated_network_is_collapsed(routers, norms, seeds, tiny, fashion_mnist):
    """After calibration, each of two experts of every layer gets at least a tenth of the images."""
    for seed in seeds:
        config = tiny(backbone="resnet18", seed=seed, width=16, routers=routers, norms=norms, batch_size=64)
        model = network(config, fashion_mnist.spec)
        calibrate(model, config, fashion_mnist.train)
        assert not model.training
        with torch.no_grad():
            _, routings = model.forward_routed(fashion_mnist.train[torch.arange(400)].pixels())
        least = [torch.bincount(routing.experts, minlength=2).min().item() / 400 for routing in routings]
        assert min(least) >= 0.1, (seed, least)


@pytest.mark.parametrize("routers", ["per_layer", "per_stage", "per_network"])
def test_calibration_replaces_all_earlier_statistics(routers, tiny, splits):
    config = tiny(routers=routers)
    model = network(config, splits.spec)
    calibrate(model, config, splits.train)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    for _ in range(3):
        model(splits.train[torch.arange(20)].pixels())
    calibrate(model, config, splits.train)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_calibration_recomputes_every_batch_norm_of_a_converted_network_and_keeps_its_momentum(tiny, splits):
    config, images = tiny(batch_size=4), splits.train[torch.arange(4)].pixels()
    layers = [nn.Conv2d(images.shape[1], 4, 3, padding=1), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU()]
    layers += [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=None), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = convert(
        nn.Sequential(*layers, nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=0.01), nn.Linear(4, 3)), example_input=images
    )
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    calibrate(model, config, splits.train)
    assert sorted(str(norm.momentum) for norm in norms) == ["0.01", "0.3", "None"]
    assert all(norm.running_mean.any() and norm.running_var.ne(1).any() for norm in norms)


@pytest.mark.parametrize("ema", [0.0, 0.5])
@pytest.mark.parametrize("routers", ["per_layer", "per_stage", "per_network"])
def test_plain_statistics_of_routers_are_those_of_images_that_are_not_augmented(routers, ema, tiny, splits, tmp_path):
    config = tiny(epochs=1, tied_share=0.0, routers=routers, router_statistics="plain", ema=ema)
    train(config, splits, tmp_path / "run")
    model = best_network(RunFolder(tmp_path / "run").best(), config, splits)
    after = {name: value.clone() for name, value in model.named_buffers()}
    calibrate_routers(model, config, splits.train)
    assert all(torch.equal(value, after[name]) for name, value in model.named_buffers())
    train(config.replace(training=config.training.replace(router_statistics="augmented")), splits, tmp_path / "augmented")
    tracked = RunFolder(tmp_path / "augmented").latest().model_state()
    changed = {name for name, value in model.named_buffers() if not torch.equal(value, tracked[name])}
    assert changed
    assert all("router" in name for name in changed)


def test_statistics_are_kept_after_an_error_too():
    norm = nn.BatchNorm2d(3)
    with suppress(KeyboardInterrupt), kept_statistics(norm):
        norm(torch.rand(4, 3, 2, 2))
        assert norm.num_batches_tracked == 1
        raise KeyboardInterrupt
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_mean, torch.zeros(3))
