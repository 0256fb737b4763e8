"""Invented Records in the form that `advmoe evaluate` writes; their figures follow from method, model scale and seed."""

import base64
import copy
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from advmoe import migrations
from advmoe.attacks.presets import PRESETS
from advmoe.attacks.registry import ATTACKS
from advmoe.config import AttackConfig, DataConfig, ModelConfig, RunConfig, TrainingConfig, to_dict
from advmoe.evaluation.record import SCHEMA, Record
from advmoe.evaluation.record_evaluation import AttackTotals
from advmoe.evaluation.record_file import checked_record

CLASSES = ["T-shirt", "trouser", "pullover", "dress"]
ROBUST = {"standard": 3.0, "at_dense": 50.0, "at_small_dense": 46.0, "at_sparse": 45.0, "at_moe": 43.0, "advmoe": 49.0}
ROUTED = ("at_moe", "advmoe")
UNSCALED = ("standard", "at_dense")  # methods without a model scale
MULTIPLES = (0, 0.25, 0.5, 1, 1.5, 2, 4)
STEPS = (0.25, 0.5, 1.5, 2)


ADDED = ("run", "history", "classes", "layers", "load_by_class", "epsilon_curve", "gallery")  # by schema 2


def record(*arguments: Any, **fields: Any) -> Record:
    """The Record of `content`."""
    return sound(content(*arguments, **fields))


def sound(content: dict[str, Any]) -> Record:
    """The Record of a content in which no part is garbled."""
    return Record.model_validate(migrations.record(content, SCHEMA))


def quick(record: Record) -> Record:
    """Change the Record to one of the preset quick."""
    record.evaluation.attacks = {name: AttackTotals(attacked=1, broken=0, seconds=1.0) for name in PRESETS["quick"].attacks}
    return record


def content(
    method: str = "advmoe", seed: int = 0, model_scale: float = 0.5, *, num_experts: int = 2, depth: int = 8, epochs: int = 6,
    **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    """The JSON of one Record; `changes` replace or add top-level fields, and a field set to `...` is left out."""
    config = RunConfig(
        method=method, seed=seed, model=ModelConfig(width=16, model_scale=model_scale, num_experts=num_experts),
        data=DataConfig(dataset="fashion-mnist", limit_train=2000, limit_test=300), attack=AttackConfig(epsilon=0.1),
        training=TrainingConfig(epochs=epochs),
    )  # fmt: skip
    scale = 1.0 if method in UNSCALED else model_scale
    worst = ROBUST[method] + 10 * (scale - 0.5) + 0.5 * seed
    above = {"sa": 30, "ra_10": 4, "ra_20": 3, "ra_50": 2, "ra_aa": 0.5, "ra_worst": 0}
    figures = {name: worst + points for name, points in above.items()}
    routed = depth if method in ROUTED else 0
    fields: dict[str, Any] = {
        "schema": 3, "run": f"{method}-r{model_scale:g}-seed{seed}", "method": method, "backbone": "resnet18",
        "dataset": "fashion-mnist", "sa": figures["sa"], "ra": {n: figures[f"ra_{n}"] for n in ("10", "20", "50")},
        "ra_aa": figures["ra_aa"], "ra_worst": worst, "epsilon": 0.1, "norm": "Linf",
        "gmacs": 0.04 * scale**2, "gmacs_executed": 0.04 * scale**2, "gmacs_dense": 0.04, "reduction": 100 * (1 - scale**2),
        "params": 700_000, "epoch": epochs, "train_images": 1960, "test_images": 300, "fingerprint": "0123456789abcdef" * 4,
        "seed": seed, "attack_seed": 0, "config": to_dict(config), "train_seconds": 95.0, "evaluate_seconds": 41.5,
        "evaluation": evaluation(figures, routed, num_experts), "advmoe": "0.1.0", "commit": "b999d11c95c2007955cc1da9",
        "versions": {"python": "3.11.7", "torch": "2.13.0", "numpy": "2.4.6"},
        "hardware": {"cpu": "a processor", "cores": 2, "threads": 1, "gpu": None}, "time": f"2026-11-22T21:42:{seed:02}+00:00",
        "history": history(figures, epochs * (2 if method == "at_sparse" else 1), epochs),
        "layers": [
            {"name": f"stage{1 + index // 4}.{index}", "in_channels": 16, "width": 16, "size": [28, 28], "experts": num_experts}
            for index in range(routed)
        ],
        "classes": list(CLASSES), "load_by_class": loads(routed, num_experts) if routed else None,
        "epsilon_curve": {
            "attack": "pgd_10", "images": 200, "epsilons": [0.1 * m for m in MULTIPLES],
            "ra": [max(0.0, figures["sa"] - 26 * m) for m in MULTIPLES],
        },
        "gallery": gallery(routed, num_experts),
    }  # fmt: skip
    return {name: value for name, value in (fields | changes).items() if value is not ...}


def old_content(method: str = "advmoe", seed: int = 0, **changes: Any) -> dict[str, Any]:
    """The JSON of a Record of schema 1, which lacks all that schema 2 added and has an evaluation's figures beside its fields."""
    record = content(method, seed, **({"schema": 1} | dict.fromkeys(ADDED, ...) | changes))
    evaluated = record["evaluation"]
    return record | {"evaluation": {name: value for name, value in evaluated.items() if name != "figures"} | evaluated["figures"]}


def old_record(*arguments: Any, **changes: Any) -> Record:
    """The Record of `old_content`."""
    return sound(old_content(*arguments, **changes))


def with_settings(record: Record, section: str, **fields: Any) -> Record:
    """The Record with other values in a section of its configuration."""
    for name, value in fields.items():
        setattr(getattr(record.config, section), name, value)
    return record


def attacked(run: Record, *attacks: str) -> Record:
    """The Record with these attacks as the only ones, in their present versions."""
    ran = {name: AttackTotals(attacked=1, broken=0, seconds=1.0, version=ATTACKS[name].version) for name in attacks}
    return run.model_copy(update={"evaluation": run.evaluation.model_copy(update={"attacks": ran})})


def runs(seeds: Sequence[int] = (0, 1), **figures: float) -> list[Record]:
    """Runs of every method on 10,000 test images; `figures`: method -> its RA (PGD-50) and SA."""
    return [
        record(method, seed, test_images=10_000, ra={"50": value + 0.1 * seed}, sa=value + 0.1 * seed, ra_worst=value - 2)
        for method, value in figures.items()
        for seed in seeds
    ]


def evaluation(figures: dict[str, float], routed: int, num_experts: int) -> dict[str, Any]:
    """The field `evaluation`."""
    routing = {
        "ra_router": 60.0, "ra_expert": 52.0, "flip_rate": 80.0, "overlap": [75.0] * routed,
        "load": [[300 // num_experts] * num_experts] * routed, "load_adv": [[300 // num_experts] * num_experts] * routed,
        "fixed_expert_sa": [40.0] * num_experts, "fixed_expert_ra": [20.0] * num_experts,
    }  # fmt: skip
    checks = [
        {"number": 1, "name": "same image, same answer", "status": "pass", "detail": "logits differ by 4.8e-07"},
        {"number": 5, "name": "RA-AA near RA-worst", "status": "fail", "detail": "RA-AA is 0.50 points above RA-worst"},
        {"number": 4, "name": "Square adds nothing", "status": "skipped", "detail": "AutoAttack was not run"},
    ]
    return {
        "images": 300, "figures": figures, "complete": True,
        "intervals": {name: [max(0.0, v - 5), min(100.0, v + 5)] for name, v in figures.items()},
        "attacks": {"pgd_50": {"attacked": 240, "broken": 80, "seconds": 12.5}}, "left_out": {},
        "routing": routing if routed else None, "checks": checks,
    }  # fmt: skip


def history(figures: dict[str, float], epochs: int, phase_epochs: int) -> list[dict[str, Any]]:
    """Accuracies that approach the final ones, one row an epoch."""
    shares = [1 - 0.6**epoch for epoch in range(1, epochs + 1)]
    return [
        {
            "epoch": number + 1, "phase": 1 + number // phase_epochs, "val_sa": figures["sa"] * share,
            "val_ra": figures["ra_10"] * share, "loss": 2.5 - share, "lr": 0.05,
        }
        for number, share in enumerate(shares)
    ]  # fmt: skip


def loads(layers: int, num_experts: int) -> list[list[list[int]]]:
    """[L][classes][N] counts; in layer l, expert (label + l) % N takes most images of a class."""
    return [
        [[60 if (label + layer) % num_experts == expert else 15 for expert in range(num_experts)] for label in range(len(CLASSES))]
        for layer in range(layers)
    ]


def gallery(routed: int, num_experts: int) -> list[dict[str, Any]]:
    """One image a class; under attack every third layer takes the next expert."""
    return [
        {
            "row": 7 * label, "label": label, "attack": "pgd_50",
            "clean": _view(label, label, 0.93, [(label + layer) % num_experts for layer in range(routed)]),
            "adversarial": _attacked(label, 1, routed, num_experts),
            "steps": [{"epsilon": 0.1 * times, **_attacked(label, times, routed, num_experts)} for times in STEPS],
        }
        for label in range(len(CLASSES))
    ]  # fmt: skip


def _attacked(label: int, times: float, routed: int, num_experts: int) -> dict[str, Any]:
    """At `times` the epsilon: from 1 on, another class, and every third layer takes the next expert."""
    fooled = times >= 1
    route = [(label + layer + (fooled and layer % 3 == 1)) % num_experts for layer in range(routed)]
    return _view(label, (label + fooled) % len(CLASSES), 0.61, route, noise=int(40 * times))


def _view(label: int, prediction: int, confidence: float, route: list[int], noise: int = 0) -> dict[str, Any]:
    return {"png": png(label, noise), "prediction": prediction, "confidence": confidence, "route": route or None}


def png(label: int, noise: int = 0) -> str:
    """A 28 x 28 grey image as base64: a disc as wide as its label is high, under noise."""
    rng = np.random.default_rng(label)
    rows, columns = np.mgrid[:28, :28]
    disc = 190.0 * ((rows - 14) ** 2 + (columns - 14) ** 2 < (5 + 2 * label) ** 2)
    pixels = np.clip(disc + rng.integers(-noise, noise + 1, disc.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def decoded(image: str) -> np.ndarray:
    """The pixels of an image in a Record, as floats from 0 to 255."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))).astype(float)


def write(path: Path, content: Any) -> None:
    """Write a text, or JSON, to a file in a folder that need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def changed(section: str, method: str = "advmoe", seed: int = 0, **fields: Any) -> dict[str, Any]:
    """The content of a Record of a run whose configuration has other `fields` in a section."""
    changed_content = copy.deepcopy(content(method, seed))
    changed_content["config"][section] |= fields
    return changed_content


def changed_record(*arguments: Any, **fields: Any) -> Record:
    """The Record with the content `changed`."""
    return checked_record(changed(*arguments, **fields), "a changed Record")
