"""The snapshot in a Record: layers, loads and curves compared with slow counts, images with the evaluation's attack."""

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from image_specs import image_spec
from records import decoded

from advmoe.attacks import ImageDraws, Pgd, derive_seed, frozen, pgd
from advmoe.data.images import balanced
from advmoe.evaluation import ATTACKS, EvaluationOptions, evaluate
from advmoe.evaluation.snapshot import CURVE_EPSILONS, GALLERY_ATTACK, GALLERY_STEPS, gallery_rows, png, snapshot
from advmoe.models.resnet import ResNet
from advmoe.moe import DenseKind, MoEKind

CLASSES = 3
COUNT = 30
EPSILON = 0.02


def options(epsilon, norm, seed, shard_size):
    return EvaluationOptions(epsilon, norm, seed=seed, shard_size=shard_size)


def network(kind, seed=0):
    """Random filters and routers, so that every layer routes images to several experts."""
    torch.manual_seed(seed)
    model = ResNet(kind, image_spec(CLASSES, [0.5], [0.25]), blocks=(1, 1), width=4, stem="cifar")
    with torch.no_grad():
        for layer in model.moe_layers():
            layer.filters.normal_(std=0.3)
        model.train()(images())
        model.classifier.bias -= model.eval()(images()).mean(dim=0)
    return model.eval()


def images():
    return torch.rand(COUNT, 1, 12, 12, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def labelled(model):
    """x, y with every fifth label wrong, and the rows that the network classifies correctly."""
    x = images()
    y = model(x).argmax(dim=1)
    y[::5] = (y[::5] + 1) % CLASSES
    return x, y, [row for row in range(COUNT) if row % 5]


@pytest.fixture(scope="module")
def routed():
    return network(MoEKind(0.5, num_experts=3))


@pytest.fixture(scope="module")
def routed_snapshot(routed):
    """With the package's attacks instead of the fewer ones of tests/conftest.py."""
    x, y, correct = labelled(routed)
    names = {"GALLERY_ATTACK": GALLERY_ATTACK, "GALLERY_STEPS": GALLERY_STEPS, "CURVE_EPSILONS": CURVE_EPSILONS}
    with patch.multiple("advmoe.evaluation.snapshot", **names):
        return snapshot(routed, x, y, correct, options(EPSILON, "Linf", 3, 7))


def test_layers_are_the_networks(routed, routed_snapshot):
    assert [layer.name for layer in routed_snapshot.layers] == [
        name for name, module in routed.named_modules() if any(module is layer for layer in routed.moe_layers())
    ]
    by_name = dict(routed.named_modules())
    for layer in routed_snapshot.layers:
        module = by_name[layer.name]
        assert (layer.in_channels, layer.width, layer.experts) == (module.in_channels, module.width, 3)
    assert routed_snapshot.layers[0].size == [12, 12]
    assert routed_snapshot.layers[-1].size == [6, 6]


def test_loads_are_counted_one_image_at_a_time(routed, routed_snapshot):
    x, y, _ = labelled(routed)
    counts = np.zeros((len(routed.moe_layers()), CLASSES, 3), dtype=int)
    for row in range(COUNT):
        _, routings = routed.forward_routed(x[row : row + 1])
        for layer, routing in enumerate(routings):
            counts[layer, y[row], routing.experts.item()] += 1
    assert routed_snapshot.load_by_class == counts.tolist()
    assert counts.sum(axis=1).min() < COUNT < 3 * counts.sum(axis=1).max()  # neither all to one expert nor equal loads


def test_loads_sum_to_the_evaluations(routed, routed_snapshot):
    x, y, _ = labelled(routed)
    load = evaluate(routed, x, y, epsilon=EPSILON, preset=("pgd_50",)).routing.load
    assert [[sum(column) for column in zip(*layer, strict=True)] for layer in routed_snapshot.load_by_class] == load


def test_a_network_with_one_router_has_one_row_of_loads_and_routes():
    model = network(MoEKind(0.5, num_experts=2, routers="per_network"))
    x, y, correct = labelled(model)
    result = snapshot(model, x, y, correct, options(EPSILON, "Linf", 0, 64))
    assert np.array(result.load_by_class).shape == (1, CLASSES, 2)
    assert len(result.layers) == len(model.moe_layers()) > 1
    assert len(result.gallery[0].clean.route) == 1


def test_a_network_with_a_router_for_each_stage_has_their_loads_and_routes():
    model = network(MoEKind(0.5, num_experts=2, routers="per_stage"))
    x, y, correct = labelled(model)
    result = snapshot(model, x, y, correct, options(EPSILON, "Linf", 0, 64))
    stages = [layer.stage for layer in result.layers]
    assert stages == sorted(stages)
    assert list(dict.fromkeys(stages)) == list(range(len(model.stage_routers)))
    assert len(model.moe_layers()) == len(stages) > len(model.stage_routers) > 1
    assert len(result.load_by_class) == len(result.gallery[0].clean.route) == len(model.stage_routers)
    assert result.gallery[0].fits([], result.layers)
    assert not result.gallery[0].fits([], result.layers[:1])
    result.gallery[0].clean.route.append(0)
    assert not result.gallery[0].fits([], result.layers)


def test_a_dense_network_has_no_routes():
    model = network(DenseKind())
    x, y, correct = labelled(model)
    result = snapshot(model, x, y, correct, options(EPSILON, "L2", 0, 64))
    assert result.layers == []
    assert result.load_by_class == ()
    assert {getattr(entry, side).route for entry in result.gallery for side in ("clean", "adversarial")} == {None}


def test_the_curve_starts_at_clean_accuracy_and_agrees_with_the_evaluation(routed, routed_snapshot):
    x, y, correct = labelled(routed)
    curve = routed_snapshot.epsilon_curve
    assert curve.epsilons == pytest.approx([0, 0.005, 0.01, 0.02, 0.03, 0.04, 0.08])
    assert (curve.attack, curve.images) == ("pgd_10", COUNT)
    assert curve.ra[0] == pytest.approx(100 * len(correct) / COUNT)
    for number in (3, 5):
        evaluation = evaluate(routed, x, y, epsilon=curve.epsilons[number], preset=("pgd_10",), seed=3)
        assert curve.ra[number] == evaluation.figures["ra_10"]
    assert curve.ra[0] > curve.ra[3] > curve.ra[-1]


def test_the_curve_is_computed_on_a_balanced_part_of_the_images(routed, monkeypatch):
    monkeypatch.setattr("advmoe.evaluation.snapshot.CURVE_IMAGES", 9)
    x = images()
    y = torch.arange(COUNT) // 10
    correct = (routed(x).argmax(dim=1) == y).nonzero()[:, 0].tolist()
    curve = snapshot(routed, x, y, correct, options(0.0, "Linf", 0, 64)).epsilon_curve
    assert curve.images == 9
    assert set(curve.epsilons) == {0.0}
    rows = balanced(y, 9)
    assert y[rows].bincount().tolist() == [3, 3, 3]
    assert curve.ra == [100 * len(set(rows.tolist()) & set(correct)) / 9] * len(curve.epsilons)


def test_the_gallery_shows_the_evaluations_attack(routed, routed_snapshot):
    x, y, correct = labelled(routed)
    assert [entry.row for entry in routed_snapshot.gallery] == gallery_rows(y.tolist(), correct)
    for entry in routed_snapshot.gallery:
        row = entry.row
        z, label = x[row : row + 1], y[row : row + 1]
        with frozen(routed):
            z_adv = pgd(routed, z, label, Pgd(EPSILON, EPSILON / 4, 50), ImageDraws(derive_seed(3, 0), [row]))
        assert (entry.label, entry.attack) == (label.item(), "pgd_50")
        assert [step.epsilon for step in entry.steps] == [factor * EPSILON for factor in GALLERY_STEPS]
        with frozen(routed):
            radius = entry.steps[-1].epsilon
            z_far = pgd(routed, z, label, Pgd(radius, radius / 4, 50), ImageDraws(derive_seed(3, 0), [row]))
        for view, image in ((entry.clean, z), (entry.adversarial, z_adv), (entry.steps[-1], z_far)):
            logits, routings = routed.forward_routed(image)
            assert view.prediction == logits.argmax().item()
            assert view.confidence == pytest.approx(logits.softmax(dim=1).max().item(), abs=1e-3)
            assert view.route == [routing.experts.item() for routing in routings]
            assert np.abs(decoded(view.png) - 255 * image[0, 0].numpy()).max() <= 0.51
    assert any(entry.clean.prediction != entry.adversarial.prediction for entry in routed_snapshot.gallery)


def test_the_snapshot_depends_on_the_seed_and_not_on_the_shards(routed):
    x, y, correct = labelled(routed)
    first, again, other_shards, other_seed = (
        snapshot(routed, x, y, correct, options(EPSILON, "Linf", seed, size)) for seed, size in ((3, 7), (3, 7), (3, 64), (4, 7))
    )
    assert first == again == other_shards
    assert other_seed.gallery != first.gallery


def test_the_snapshot_does_not_change_the_network(routed):
    x, y, correct = labelled(routed)
    before = {name: value.clone() for name, value in routed.state_dict().items()}
    routed.train()
    snapshot(routed, x, y, correct, options(EPSILON, "Linf", 3, 7))
    assert routed.training
    routed.eval()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in routed.parameters())
    assert all(torch.equal(value, before[name]) for name, value in routed.state_dict().items())


@pytest.mark.parametrize(
    ("labels", "correct", "rows"),
    [
        ([0, 0, 1, 1, 2], [1, 2, 3], [1, 2, 4, 3, 0]),  # one image of each class, correct ones first; then second ones
        (list(range(10)), [9, 3], [3, 9, 0, 1, 2, 4, 5, 6]),
        ([1], [], [0]),
    ],
)
def test_the_gallery_has_one_image_of_each_class_and_correct_ones_first(labels, correct, rows):
    assert gallery_rows(labels, correct) == rows


def test_images_that_are_neither_grey_nor_rgb_are_in_no_gallery():
    model = ResNet(MoEKind(0.5), image_spec(CLASSES, [0.5] * 5, [0.25] * 5), blocks=(1,), width=4, stem="cifar").eval()
    x = torch.rand(4, 5, 12, 12)
    result = snapshot(model, x, model(x).argmax(dim=1), range(4), options(EPSILON, "Linf", 0, 64))
    assert not result.gallery
    assert result.load_by_class


def test_no_pass_of_the_gallery_has_more_images_than_a_batch(routed, routed_snapshot, monkeypatch):
    sizes, run = [], ATTACKS[GALLERY_ATTACK].run
    monkeypatch.setitem(
        ATTACKS, GALLERY_ATTACK, replace(ATTACKS[GALLERY_ATTACK], run=lambda job: (sizes.append(len(job.x)), run(job))[1])
    )
    x, y, correct = labelled(routed)
    result = snapshot(routed, x, y, correct, replace(options(EPSILON, "Linf", 3, 7), batch_size=2))
    assert set(sizes) <= {1, 2}
    assert [image.row for image in result.gallery] == [image.row for image in routed_snapshot.gallery]


def test_png_in_colour_and_grey():
    colours = torch.tensor([[0, 128, 255], [10, 20, 30], [255, 0, 1]]).view(3, 1, 3) / 255
    assert decoded(png(colours)).tolist() == [[[0, 10, 255], [128, 20, 0], [255, 30, 1]]]
    assert decoded(png(colours[:1])).tolist() == [[0, 128, 255]]
