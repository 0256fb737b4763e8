"""The snapshot in a Record: MoE layers, loads by class, accuracy against epsilon, and images with their routes.

All predictions are those of the network itself in float32. The same network, images and seed give the same snapshot.
"""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from advmoe.attacks import frozen
from advmoe.attacks.job import Job
from advmoe.attacks.presets import Preset
from advmoe.attacks.registry import ATTACKS
from advmoe.attacks.surrogate import route_of
from advmoe.data.images import balanced
from advmoe.evaluation.precision import full_float32
from advmoe.evaluation.record_snapshot import EpsilonCurve, GalleryImage, GalleryStep, Layer, View
from advmoe.evaluation.shards import Worker
from advmoe.evaluation.store import Shard
from advmoe.evaluation.target import EvaluationOptions, Target
from advmoe.models import Classifier, fused

GALLERY_IMAGES = 8
GALLERY_ATTACK = "pgd_50"
GALLERY_STEPS = (0.25, 0.5, 1.5, 2.0)  # times the evaluation's epsilon, in addition to 0 and 1
CURVE_IMAGES = 200
CURVE_ATTACK = "pgd_10"
CURVE_EPSILONS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 4.0)  # times the evaluation's epsilon


class Snapshot(NamedTuple):
    """The fields of a Record that this module computes."""

    layers: Sequence[Layer] = ()
    load_by_class: Sequence[list[list[int]]] = ()
    epsilon_curve: EpsilonCurve | None = None
    gallery: Sequence[GalleryImage] = ()


def snapshot(model: Classifier, x: Tensor, y: Tensor, correct: Sequence[int], options: EvaluationOptions) -> Snapshot:
    """The snapshot on images x [n, C, H, W] in [0, 1] with labels y [n]. Its gallery is empty if the images are neither grey nor
    RGB.

    `correct` are the rows that the network classifies correctly. The attacks use the noise that `evaluate` draws with the same
    options.
    """
    with frozen(model), full_float32(model):
        routed, classes = bool(model.moe_layers()), model.num_classes
        target = Target(
            model, fused(model), x, y, classes, routed, options.epsilon, options.norm, options.seed, batch_size=options.batch_size
        )
        shown = torch.tensor(gallery_rows(y.tolist(), correct) if x.shape[1] in (1, 3) else [], dtype=torch.int64)
        return Snapshot(
            layers(model, x[:1]),
            load_by_class(target) if routed else (),
            epsilon_curve(target, balanced(y.cpu(), CURVE_IMAGES).split(options.batch_size)),
            [image for rows in shown.split(options.batch_size) for image in gallery(target, rows.tolist())],
        )


@torch.no_grad()
def layers(model: Classifier, x: Tensor) -> list[Layer]:
    """The MoE layers in order; empty for a dense network. `size` is the output's [h, w] for images like x [1, C, H, W]."""
    names = {layer: name for name, layer in model.named_modules()}
    sizes: dict[nn.Module, list[int]] = {}
    stages: dict[nn.Module, int] = {}
    begun: list[nn.Module] = []  # routers of stages

    def keep(layer: nn.Module, _: object, output: tuple[Tensor, object]) -> None:
        sizes[layer] = list(output[0].shape[2:])
        if begun:
            stages[layer] = len(begun) - 1

    with ExitStack() as stack:
        for router in model.stage_routers:
            stack.enter_context(router.register_forward_hook(lambda router, *_: begun.append(router)))
        for layer in model.moe_layers():
            stack.enter_context(layer.register_forward_hook(keep))
        model(x)
    return [
        Layer(
            name=names[layer], in_channels=layer.in_channels, width=layer.width, size=sizes[layer], experts=layer.num_experts,
            stage=stages.get(layer),
        )
        for layer in model.moe_layers()
    ]  # fmt: skip


@torch.no_grad()
def load_by_class(target: Target) -> list[list[list[int]]]:
    """The number of images of each class that each expert gets: [L][classes][N]. L is the number of routers."""
    parts = [target.model.forward_routed(part)[1] for part in target.x.split(target.batch_size)]
    routes, y, classes = torch.cat([route_of(routings) for routings in parts]), target.y, target.num_classes
    counts = []
    for layer, routing in enumerate(parts[0]):
        experts = routing.logits.shape[1]
        pairs = torch.bincount(y * experts + routes[:, layer], minlength=classes * experts)
        counts.append(pairs.view(classes, experts).tolist())
    return counts


def epsilon_curve(target: Target, shards: Sequence[Tensor]) -> EpsilonCurve:
    """Accuracy in percent of the shards' rows under CURVE_ATTACK at CURVE_EPSILONS times the target's epsilon; at 0, clean."""
    count, epsilons = sum(len(rows) for rows in shards), [factor * target.epsilon for factor in CURVE_EPSILONS]
    robust = [sum(_num_robust(replace(target, epsilon=epsilon), rows.tolist()) for rows in shards) for epsilon in epsilons]
    accuracies = [100 * number / count for number in robust]
    return EpsilonCurve(attack=CURVE_ATTACK, images=count, epsilons=epsilons, ra=accuracies)


def _num_robust(target: Target, rows: list[int]) -> int:
    """The number of `rows` that are classified correctly under CURVE_ATTACK. The attack runs as in an evaluation."""
    attacks = (CURVE_ATTACK,) if target.epsilon > 0 else ()
    shard = Shard(rows=rows)
    Worker(target, shard).run(Preset({"ra": attacks}, ()))
    return len(shard.correct or []) - len(shard.broken(attacks))


def gallery_rows(labels: Sequence[int], correct: Sequence[int]) -> list[int]:
    """The rows for the gallery: one of each class before a second of any class, correctly classified ones first."""
    right, taken, keys = set(correct), Counter[int](), {}
    for row in sorted(range(len(labels)), key=lambda row: row not in right):
        label = labels[row]
        keys[row] = taken[label], row not in right, label
        taken[label] += 1
    return sorted(keys, key=keys.__getitem__)[:GALLERY_IMAGES]


def gallery(target: Target, rows: Sequence[int]) -> list[GalleryImage]:
    """Each row's image, clean and under GALLERY_ATTACK at epsilon and at GALLERY_STEPS times epsilon, with the predictions.

    `prediction` is a class number and `confidence` its softmax probability, both computed from the float32 pixels. `png` contains
    the pixels rounded to 8 bits. It is for display only: the rounded image may not fool the network.
    """
    row_index = torch.as_tensor(rows, dtype=torch.int64, device=target.x.device)
    x, y = target.x[row_index], target.y[row_index]

    def attacked(epsilon: float) -> list[View]:
        job = Job(target.model, x, y, rows, epsilon, target.norm, target.seed, 0, target.num_classes)
        return _views(target.model, ATTACKS[GALLERY_ATTACK].run(job))

    epsilons = [factor * target.epsilon for factor in GALLERY_STEPS] if target.epsilon > 0 else []
    steps = [[GalleryStep(epsilon=epsilon, **dict(view)) for view in attacked(epsilon)] for epsilon in epsilons]
    columns = zip(rows, y.tolist(), _views(target.model, x), attacked(target.epsilon), strict=True)
    return [
        GalleryImage(
            row=row, label=label, clean=before, adversarial=after, attack=GALLERY_ATTACK, steps=[step[index] for step in steps]
        )
        for index, (row, label, before, after) in enumerate(columns)
    ]


@torch.no_grad()
def _views(model: Classifier, x: Tensor) -> list[View]:
    """Images [B, C, H, W] with the predictions and routes of `model`."""
    logits, routings = model.forward_routed(x)
    confidences, predictions = logits.softmax(dim=1).max(dim=1)
    routes = route_of(routings).tolist() if routings else [None] * len(x)
    columns = zip(x, predictions.tolist(), confidences.tolist(), routes, strict=True)
    return [
        View(png=png(image), prediction=prediction, confidence=confidence, route=route)
        for image, prediction, confidence, route in columns
    ]


def png(image: Tensor) -> str:
    """A grey or RGB image [C, H, W] in [0, 1] as an 8-bit PNG in base64."""
    pixels = (255 * image).round().to(torch.uint8).cpu()
    drawing = Image.fromarray((pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).numpy())
    file = io.BytesIO()
    drawing.save(file, format="png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()
