"""Estimates how long the runs of a sweep will take.

A few iterations and attack steps of each distinct network and method are timed on random images of the data's size, and multiplied
by the numbers of iterations and steps of the run. Other load can only make them slower, so the shortest time of several, of this
call and of earlier ones, is used. If the same network was trained or evaluated before, the times of those runs are used instead.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from advmoe.attacks import BatchDraws, evaluation_pgd, frozen, pgd
from advmoe.attacks.presets import resolve
from advmoe.attacks.registry import ATTACKS
from advmoe.config import DataConfig, RunConfig, RuntimeConfig, to_dict
from advmoe.data import Counts, Images, ImageSpec, Splits, count_images
from advmoe.evaluation.routing import FIXED_ATTACK
from advmoe.evaluation.snapshot import CURVE_ATTACK, CURVE_EPSILONS, CURVE_IMAGES
from advmoe.files import json_object, write_json
from advmoe.models import compact, fused
from advmoe.recipes import method_traits
from advmoe.runs.cost import estimate
from advmoe.runs.status import RunStatus, read_run
from advmoe.training.interrupts import Stopped
from advmoe.training.loop import train
from advmoe.training.methods import METHODS
from advmoe.training.observers import Observer
from advmoe.training.start import network
from advmoe.training.validation import VALIDATION_STEPS

MAX_BATCH = 32  # images in a batch timed on the CPU; with 8, overhead doubles the time per image of a narrow routed network
MAX_GMACS = 4.0  # of such a batch; but at least two images, for batch norm
ITERATIONS = 4  # the first one is a warm-up and is not timed
MIN_SECONDS = 0.3  # timing goes on until this has passed
ATTACK_STEPS = 2
SURVIVOR_SHARE = 0.5  # assumed share of the images that earlier attacks did not break
ROUTING_PASSES_PER_EXPERT = 10 + SURVIVOR_SHARE * ATTACKS[FIXED_ATTACK].passes  # an image, for the routing figures at PGD-50
CURVE_PASSES = len(CURVE_EPSILONS) * ATTACKS[CURVE_ATTACK].passes  # an image, for at most CURVE_IMAGES images


@dataclass(frozen=True)
class Timings:
    """Mean seconds of earlier runs: of an epoch with its validation, by the number of its phase (from 0), and of an evaluation,
    None if there was none."""

    epochs: Mapping[int, float] = field(default_factory=dict)
    evaluation: float | None = None


UNKNOWN = Timings()


@dataclass(frozen=True)
class Pace:
    """Seconds per image: of an iteration in each phase, and of one step of an attack."""

    phases: tuple[float, ...]
    step: float


Sizes = Mapping[DataConfig, Counts]


def sizes(data: Iterable[DataConfig]) -> Sizes:
    """The number of images of each distinct data set. Raises UserError as `count_images`."""
    return {config: count_images(config) for config in dict.fromkeys(data)}


def same_but_seed(config: RunConfig) -> RunConfig:
    """The configuration without seed, number of epochs, location of the data, number of the device and time between checkpoints,
    so that runs of the same speed compare equal."""
    data, device = config.data.replace(data_dir=None, workers=None), config.runtime.device.partition(":")[0]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    runtime = config.runtime.replace(device=device, save_minutes=RuntimeConfig().save_minutes)
    return config.replace(seed=0, data=data, training=config.training.replace(epochs=1), runtime=runtime)


def timings(folders: Iterable[Path], preset: str | Sequence[str]) -> dict[RunConfig, Timings]:
    """Times of the runs in `folders`, by `same_but_seed` of their configurations. Only evaluations by `preset` count."""
    groups: dict[RunConfig, list[RunStatus]] = {}
    for status in map(read_run, folders):
        if status.config is not None:
            groups.setdefault(same_but_seed(status.config), []).append(status)
    attacks = frozenset(resolve(preset).attacks)
    return {key: _timings(runs, attacks) for key, runs in groups.items()}


def _timings(runs: Sequence[RunStatus], attacks: frozenset[str]) -> Timings:
    phases: dict[int, list[float]] = {}
    for run in runs:
        for phase, seconds in run.phase_seconds().items():
            phases.setdefault(phase, []).extend(seconds)
    evaluations = [duration for run in runs if (duration := run.evaluation_seconds(attacks)) is not None]
    return Timings({phase: mean(seconds) for phase, seconds in phases.items()}, mean(evaluations) if evaluations else None)


class Probe:
    """Times each distinct network and method once. The JSON file `cache` keeps the shortest times of all calls.

    If `retime` is false, a network that is in the file is not timed again. `report` is called with the name of what is timed.
    """

    def __init__(
        self,
        device: torch.device,
        cache: Path | None = None,
        report: Callable[[str], None] = lambda what: None,
        retime: bool = True,
    ) -> None:
        self.device, self.cache, self.report, self.retime = device, cache, report, retime
        self.paces: dict[str, Pace] = {}

    def pace(self, config: RunConfig, spec: ImageSpec) -> Pace:
        """The pace of a run's network and method. Raises UserError if they cannot be built."""
        key = self._key(config, spec)
        if key not in self.paces:
            cache = (json_object(self.cache) or {}) if self.cache is not None else {}
            earlier = _pace(cache.get(key), len(METHODS[config.method].phases))
            if earlier is not None and not self.retime:
                return self.paces.setdefault(key, earlier)
            self.report(f"{config.model.backbone} {config.method} r {config.model.model_scale:g}")
            pace = measure(config, spec, self.device)
            if earlier is not None:
                pace = Pace(tuple(map(min, pace.phases, earlier.phases)), min(pace.step, earlier.step))
            self.paces[key] = pace
            if self.cache is not None:
                write_json(self.cache, {**cache, key: asdict(self.paces[key])}, indent=1)
        return self.paces[key]

    def _key(self, config: RunConfig, spec: ImageSpec) -> str:
        """A digest of everything that the pace may depend on."""
        tree = to_dict(config.replace(seed=0, training=config.training.replace(epochs=1)))
        where = [str(self.device), torch.get_num_threads(), spec.shape, len(spec.classes)]
        del tree["data"], tree["runtime"]["device"], tree["runtime"]["threads"]
        return hashlib.sha256(json.dumps([tree, where], sort_keys=True).encode()).hexdigest()[:16]


def measure(config: RunConfig, spec: ImageSpec, device: torch.device) -> Pace:
    """Time a few iterations of every phase, run by `train`, and a short attack."""
    size = config.training.batch_size
    if device.type != "cuda":
        size = min(size, MAX_BATCH, max(2, int(MAX_GMACS / estimate(config).gmacs)))
    # at rate 0 random images cannot make it diverge; the run to start from, or the teacher, may be in this sweep, not trained yet;
    # the target `confusion` needs two epochs, and costs as much as `label_mod_n`
    target = "label_mod_n" if config.training.router_target == "confusion" else config.training.router_target
    training = config.training.replace(
        epochs=1, batch_size=size, tied_share=0.0, tied_statistics="own", router_warmup=0.0, lr=0.0, router_lr=0.0,
        router_schedule="phase", init_from=None, teacher=None, router_target=target,
    )  # fmt: skip
    small = config.replace(training=training)
    splits, started = _random(spec, size * ITERATIONS, 2).to(device), time.perf_counter()
    rounds: list[list[float]] = []
    while not rounds or time.perf_counter() - started < MIN_SECONDS:
        clock = _Clock()
        with tempfile.TemporaryDirectory() as folder:
            try:
                train(small, splits, Path(folder) / "probe", clock)
            except Stopped as error:
                raise Stopped(error.number, "while the speed was measured, before any run was continued") from None
        rounds.append([min(seconds) / size for seconds in clock.phases])
    return Pace(tuple(map(min, zip(*rounds, strict=True))), _attack(small, spec, size, device))


def training_seconds(config: RunConfig, counts: Counts, pace: Pace, done: int = 0, earlier: Timings = UNKNOWN) -> float:
    """Seconds of the epochs after the first `done`, over all phases, with their validation."""
    validation = counts.val * (VALIDATION_STEPS + 1) * pace.step
    phases = [earlier.epochs.get(number, counts.train * phase + validation) for number, phase in enumerate(pace.phases)]
    return sum([seconds for seconds in phases for _ in range(config.training.epochs)][done:])


def evaluation_seconds(config: RunConfig, counts: Counts, pace: Pace, preset: str | Sequence[str]) -> float:
    """Seconds of an evaluation, if the network is right on all clean images and every attack but the first of each figure runs on
    SURVIVOR_SHARE of them. It takes less if the network is wrong on many clean images."""
    chosen, routed = resolve(preset), method_traits(config.method).routed
    steps = chosen.passes(routed=routed, survivor_share=SURVIVOR_SHARE)
    if routed and "pgd_50" in chosen.attacks:
        steps += ROUTING_PASSES_PER_EXPERT * config.model.num_experts
    return pace.step * (counts.test * steps + CURVE_PASSES * min(counts.test, CURVE_IMAGES))


class _Clock(Observer):
    """Records the seconds of every iteration but the first, for each phase."""

    def __init__(self) -> None:
        self.phases: list[list[float]] = []
        self.last = 0.0

    def iteration(self, epoch: int, done: int, total: int, sums: Mapping[str, torch.Tensor], images: int) -> None:
        for value in sums.values():
            value.sum().item()  # waits for the device
        now = time.perf_counter()
        if done == 1:
            self.phases.append([])
        else:
            self.phases[-1].append(now - self.last)
        self.last = now


def _attack(config: RunConfig, spec: ImageSpec, size: int, device: torch.device) -> float:
    """Seconds of one attack step on one image, through the hard gate of the fused network, as evaluations do."""
    model = fused(compact(network(config, spec)).to(device).eval())
    images = _random(spec, size, 1).train.to(device)
    settings, draws = evaluation_pgd(config.attack.epsilon, ATTACK_STEPS), BatchDraws(torch.Generator(device))
    seconds: list[float] = []
    with frozen(model):
        while len(seconds) < ITERATIONS or sum(seconds) < MIN_SECONDS:
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


def _pace(entry: Any, phases: int) -> Pace | None:
    """The pace in an entry of the cache file; None if the entry is damaged."""
    try:
        pace = Pace(tuple(float(phase) for phase in entry["phases"]), float(entry["step"]))
    except (TypeError, KeyError, ValueError):
        return None
    valid = len(pace.phases) == phases and all(0 < seconds < inf for seconds in (*pace.phases, pace.step))
    return pace if valid else None
