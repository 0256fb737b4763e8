"""bfloat16 compared with float32: the loss in AdvMoE training of the demo, and the time of a ResNet-18 iteration. About 15 minutes.

For each seed, both precisions train one after the other. Times are wall time and processor time; other programs change the latter
less.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from advmoe.benchmark import variants
from advmoe.benchmark.rows import Ratio, Row, compare
from advmoe.benchmark.setup import Setup
from advmoe.benchmark.timing import wait_for
from advmoe.config import Precision, RunConfig, RuntimeConfig
from advmoe.data import Splits, load_dataset
from advmoe.recipes import recipe
from advmoe.training.loop import train

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
RATIO: Ratio = ("float32", "bfloat16", None)
SEEDS, EPOCHS = 3, 4


def measure(setup: Setup) -> Iterator[Row]:
    """Losses and times of the demo, then times of ResNet-18."""
    yield from demo(setup)
    yield from resnet18(setup)


def demo(setup: Setup) -> Iterator[Row]:
    """The mean loss of each epoch over seeds, the difference of the precisions, and the deviation over seeds."""
    config = recipe("demo-advmoe")
    training = config.training.replace(epochs=1 if setup.quick else EPOCHS)
    data = config.data.replace(limit_train=200 if setup.quick else config.data.limit_train)
    model = config.model.replace(width=4 if setup.quick else config.model.width)
    config = config.replace(training=training, data=data, model=model)
    splits = load_dataset(config.data).to(setup.device)
    losses: dict[str, list[list[float]]] = {precision: [] for precision in PRECISIONS}
    seconds: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    for seed in range(2 if setup.quick else SEEDS):
        for precision in PRECISIONS:
            run = config.replace(seed=seed, runtime=RuntimeConfig(precision=precision))
            before = time.process_time()
            losses[precision].append(epoch_losses(run, splits))
            seconds[precision].append(time.process_time() - before)
    yield from loss_rows(losses)
    yield from compare("precision", "demo, processor time of a run", "s", seconds, [RATIO])


def epoch_losses(config: RunConfig, splits: Splits) -> list[float]:
    """Train a run; return the mean training loss of each epoch."""
    with tempfile.TemporaryDirectory() as folder:
        history = train(config, splits, Path(folder) / "run")
    return [float(row["loss"]) for row in history]


def loss_rows(losses: Mapping[str, Sequence[Sequence[float]]]) -> Iterator[Row]:
    """Rows of losses [precision][seed][epoch]."""
    for epoch, by_seed in enumerate(zip(*(zip(*rows, strict=True) for rows in losses.values()), strict=True), 1):
        case = f"demo, mean loss of epoch {epoch}"
        for precision, values in zip(losses, by_seed, strict=True):
            spread = (min(values), max(values))
            yield Row(suite="precision", case=case, what=precision, value=mean(values), unit="loss", spread=spread)
        gap = abs(mean(by_seed[0]) - mean(by_seed[1]))
        yield Row(suite="precision", case=case, what="gap between precisions", value=gap, unit="loss")
        deviation = mean(stdev(values) for values in by_seed)
        yield Row(suite="precision", case=case, what="deviation between seeds", value=deviation, unit="loss")


def resnet18(setup: Setup) -> Iterator[Row]:
    """Wall and processor time of AdvMoE iterations, which run in turn."""
    config = variants.configuration("AdvMoE", setup.scale)
    runs = {"float32": config, "bfloat16": variants.bf16(config)}
    calls = {name: variants.iteration(run, setup.scale.side, setup.device) for name, run in runs.items()}
    wall, processor = ({name: list[float]() for name in calls} for _ in range(2))
    for number in range(setup.rounds(3) + 1):
        for name, call in calls.items():
            elapsed = both_clocks(call, setup)
            if number > 0:  # the first round warms up
                wall[name].append(elapsed[0])
                processor[name].append(elapsed[1])
    case = f"iteration, ResNet-18, batch {setup.scale.training_batch}"
    yield from compare("precision", f"{case}, wall time", "s", wall, [RATIO])
    yield from compare("precision", f"{case}, processor time", "s", processor, [RATIO])


def both_clocks(call: Callable[[], object], setup: Setup) -> tuple[float, float]:
    """Wall and processor seconds of a call."""
    wall, processor = time.perf_counter(), time.process_time()
    call()
    wait_for(setup.device)
    return time.perf_counter() - wall, time.process_time() - processor
