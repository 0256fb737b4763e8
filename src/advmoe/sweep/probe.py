"""How long runs will take, from a few real iterations and attack steps of each distinct network and method.

The images are random ones of the data's size, the batch on the CPU is a small one. Whatever else a machine does only adds to
what is timed, so the least of several times counts, of this probe and of earlier ones. It is multiplied by the counts of the run;
where runs of the same network have been trained or evaluated, what they took stands instead (`advmoe.sweep.past`).
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import torch

from advmoe.attacks import BatchDraws, Pgd, frozen, pgd
from advmoe.attacks.presets import resolve
from advmoe.attacks.registry import ATTACKS
from advmoe.config import DataConfig, RunConfig, to_dict
from advmoe.data import Images, ImageSpec, Splits, load_dataset
from advmoe.files import write_json
from advmoe.models import compact, fused
from advmoe.moe import MoEKind
from advmoe.runs.cost import estimate
from advmoe.sweep.past import Past
from advmoe.training.loop import VALIDATION_STEPS, train
from advmoe.training.methods import METHODS
from advmoe.training.start import network

BATCH = 8  # images of a probe's batch on the CPU, where time goes with their number
WORK = 4.0  # GMACs that a batch there may have; no fewer than two images, for batch norm
ITERATIONS = 4  # of which the first warms up and is not counted
ENOUGH = 1.0  # seconds after which no more are timed than these
ATTACK_STEPS = 2
STANDING = 0.5  # share of the images that an attack on survivors meets
ROUTES, ROUTES_EXPERT = 50, 10  # of the routing figures, and for each expert
CURVE = 70  # of the accuracy at other epsilons, on at most CURVE_IMAGES
CURVE_IMAGES = 200
UNKNOWN = Past()


@dataclass(frozen=True)
class Pace:
    """Seconds for one image: of an iteration in each phase, of an attack's step."""

    phases: tuple[float, ...]
    step: float


@dataclass(frozen=True)
class Counts:
    """Images of a data set's three parts."""

    train: int
    val: int
    test: int


Sizes = Mapping[DataConfig, Counts]


def sizes(data: Iterable[DataConfig]) -> Sizes:
    """How many images each distinct data set has. Raises UserError where one cannot be read."""
    parts = {config: load_dataset(config) for config in dict.fromkeys(data)}
    return {config: Counts(len(found.train), len(found.val), len(found.test)) for config, found in parts.items()}


class Probe:
    """Times each distinct network and method once. The JSON file `kept` holds the least of all probes with the same threads."""

    def __init__(self, device: torch.device, kept: Path | None = None, told: Callable[[str], None] = lambda what: None) -> None:
        self.device, self.kept, self.told = device, kept, told
        self.known: dict[str, Pace] = {}

    def pace(self, config: RunConfig, spec: ImageSpec) -> Pace:
        """The pace of a run's network and method. Raises UserError where they cannot be had."""
        key = self._key(config, spec)
        if key not in self.known:
            self.told(f"{config.model.backbone} {config.method} r {config.model.model_scale:g}")
            self.known[key] = measure(config, spec, self.device)
            if self.kept is not None:
                kept = _read(self.kept)
                self.known[key] = _least(self.known[key], kept.get(key))
                write_json(self.kept, {**kept, key: asdict(self.known[key])}, indent=1)
        return self.known[key]

    def _key(self, config: RunConfig, spec: ImageSpec) -> str:
        """All that the pace may depend on, as a digest."""
        tree = to_dict(replace(config, seed=0, training=replace(config.training, epochs=1)))
        where = [str(self.device), torch.get_num_threads(), spec.shape, len(spec.classes)]
        del tree["data"], tree["runtime"]["device"], tree["runtime"]["threads"]
        return hashlib.sha256(json.dumps([tree, where], sort_keys=True).encode()).hexdigest()[:16]


def measure(config: RunConfig, spec: ImageSpec, device: torch.device) -> Pace:
    """Time a few iterations of every phase by `train` itself, and a short attack."""
    size = config.training.batch_size
    if device.type != "cuda":
        size = min(size, BATCH, max(2, int(WORK / estimate(config).gmacs)))
    small = replace(config, training=replace(config.training, epochs=1, batch_size=size, tied_share=0.0, init_from=None))
    splits, started = _random(spec, size * ITERATIONS, 2).to(device), time.perf_counter()
    rounds: list[list[float]] = []
    while not rounds or time.perf_counter() - started < ENOUGH:
        clock = _Clock()
        with tempfile.TemporaryDirectory() as folder:
            train(small, splits, Path(folder) / "probe", clock)
        rounds.append([min(seconds) / size for seconds in clock.phases])
    return Pace(tuple(map(min, zip(*rounds, strict=True))), _attack(small, spec, size, device))


def training_seconds(config: RunConfig, counts: Counts, pace: Pace, done: int = 0, earlier: Past = UNKNOWN) -> float:
    """Seconds of the epochs after the first `done`, over all phases, with their look at the held-out part."""
    validation = counts.val * (VALIDATION_STEPS + 1) * pace.step
    phases = [earlier.epochs.get(number, counts.train * phase + validation) for number, phase in enumerate(pace.phases)]
    return sum([seconds for seconds in phases for _ in range(config.training.epochs)][done:])


def evaluation_seconds(config: RunConfig, counts: Counts, pace: Pace, preset: str | Sequence[str]) -> float:
    """Seconds of an evaluation of a network that is always right, in which every attack but the first of each figure meets the
    share STANDING: less where the network errs on many clean images."""
    chosen, routed = resolve(preset), isinstance(METHODS[config.method].kind(config.model), MoEKind)
    figures = list(chosen.figures.values())
    able = ("", "routing") if routed else ("",)
    passes = {name: ATTACKS[name].passes for name in chosen.attacks if ATTACKS[name].needs in able}
    steps = sum(passes[names[0]] + STANDING * sum(passes[name] for name in names[1:]) for names in figures)
    steps += STANDING * sum(passes.get(name, 0) for name in chosen.survivors)
    steps += ROUTES + ROUTES_EXPERT * config.model.num_experts if routed else 0
    return pace.step * (counts.test * steps + CURVE * min(counts.test, CURVE_IMAGES))


class _Clock:
    """A training Listener that keeps the seconds of every iteration but the first, phase by phase."""

    def __init__(self) -> None:
        self.phases: list[list[float]] = []
        self.last = 0.0

    def iteration(self, epoch: int, done: int, total: int, sums: Mapping[str, torch.Tensor], images: int) -> None:
        for value in sums.values():
            value.sum().item()  # waits for a device that works on its own
        now = time.perf_counter()
        if done == 1:
            self.phases.append([])
        else:
            self.phases[-1].append(now - self.last)
        self.last = now

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Not looked at."""

    def note(self, text: str) -> None:
        """Of random images: tells nothing."""


def _attack(config: RunConfig, spec: ImageSpec, size: int, device: torch.device) -> float:
    """Seconds of one step's one image, as evaluations attack: through the hard gate, on the fused twin."""
    model = fused(compact(network(config, spec)).to(device).eval())
    images = _random(spec, size, 1).train.to(device)
    settings, draws = Pgd(config.attack.epsilon, config.attack.epsilon / 4, ATTACK_STEPS), BatchDraws(torch.Generator(device))
    seconds: list[float] = []
    with frozen(model):
        while len(seconds) < ITERATIONS or sum(seconds) < ENOUGH:
            started = time.perf_counter()
            pgd(model, images.pixels(), images.labels, settings, draws).sum().item()
            seconds.append(time.perf_counter() - started)
    return min(seconds[1:]) / (ATTACK_STEPS * size)


def _random(spec: ImageSpec, count: int, held_out: int) -> Splits:
    generator = torch.Generator().manual_seed(0)

    def part(images: int) -> Images:
        raw = torch.randint(0, 256, (images, *spec.shape), dtype=torch.uint8, generator=generator)
        return Images(raw, torch.randint(0, len(spec.classes), (images,), generator=generator))

    return Splits("random", spec, "random", part(count), part(held_out), part(1))


def _least(pace: Pace, kept: Any) -> Pace:
    """The lesser times of a pace and one from the file, which counts only where it is whole."""
    try:
        phases, step = [float(phase) for phase in kept["phases"]], float(kept["step"])
    except (TypeError, KeyError, ValueError):
        return pace
    if len(phases) != len(pace.phases) or not all(0 < seconds < inf for seconds in (*phases, step)):
        return pace
    return Pace(tuple(map(min, pace.phases, phases)), min(pace.step, step))


def _read(path: Path) -> dict[str, Any]:
    """What earlier probes found; a file that is none is made anew."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}
