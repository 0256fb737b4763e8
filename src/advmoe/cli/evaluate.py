"""`advmoe evaluate`."""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

from advmoe import distributed
from advmoe.attacks import Norm
from advmoe.attacks.presets import PRESETS, ROUTING_BUDGET, resolve
from advmoe.cli.display import EvaluationProgress
from advmoe.cli.parsing import Flag, console, device, parse
from advmoe.config import Fraction, RunConfig, RuntimeConfig
from advmoe.data import Splits, load_dataset
from advmoe.errors import UserError
from advmoe.evaluation.record_file import write_record_file
from advmoe.evaluation.robustbench import model_info
from advmoe.evaluation.store import SHARD_SIZE, forget, shard_count
from advmoe.evaluation.target import EvaluationOptions
from advmoe.files import write_json
from advmoe.models import Classifier
from advmoe.reports.tables import evaluation_lines, record_table
from advmoe.runs.evaluate import Subject, subject
from advmoe.training.start import autocast


def _costs(preset: str, what: str) -> Any:
    """Help of a preset's flag, with its budget."""
    return tyro.conf.arg(help=f"{what}. Costs {PRESETS[preset].budget}; {ROUTING_BUDGET}.")


@dataclass(frozen=True)
class EvaluateArguments:
    """Measure what a trained network withstands at worst, on the test set, and write RUN/record.json; for a file NAME.safetensors,
    NAME.record.json beside it."""

    run: tyro.conf.Positional[Path]
    """The folder of a run, a file written by advmoe.save_file, or a name on the hub (owner/name)."""
    quick: Annotated[Flag, _costs("quick", "SA, PGD, APGD on the margin and a short attack on the routing (the default)")] = False
    standard: Annotated[Flag, _costs("standard", "AutoAttack, margin and route-aware attacks, pathways, all self-checks")] = False
    full: Annotated[Flag, _costs("full", "the same and far more of it")] = False
    attacks: tuple[str, ...] = ()
    """Instead of a preset: names of attacks, autoattack, autoattack_plus or autoattack_rand."""
    norm: Norm = "Linf"
    """Norm of the ball."""
    epsilon: Fraction | None = None
    """Radius of the ball; by default the one the network was trained for, which L2 has none of."""
    transfer: Path | None = None
    """Another run, on the same data, to transfer attacks from (the small dense network's, say)."""
    data_dir: str | None = None
    """Where the data lies now, if not where it was trained on."""
    limit_test: int | None = None
    """Attack this many test images, balanced over the classes."""
    seed: int = 0
    """Seed of the attacks' random draws."""
    shard_size: int = SHARD_SIZE
    """Images attacked at once; results are kept after every attack on a shard."""
    processes: int = 1
    """Share the shards out over this many processes (and CUDA devices, where there are several)."""
    part: tuple[int, int] | None = None
    """Run only every k-th shard from the i-th on (two numbers, i from 0); without it, what other parts left is collected."""
    fresh: Flag = False
    """Forget earlier results in RUN/evaluation."""
    save_adversarial: Flag = False
    """Write the adversarial images to RUN/evaluation/adversarial."""
    keep_images: Flag = False
    """Keep the gallery's test images in RUN/record.json, so that they go wherever the Record goes; without it they lie in
    RUN/gallery.json, for reports on this machine."""
    robustbench: Path | None = None
    """Write a RobustBench model_info file."""
    json: Flag = False
    """Print the Record as JSON."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        for name in ("limit_test", "shard_size", "processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        if self.quick + self.standard + self.full + bool(self.attacks) > 1:
            raise UserError("--quick, --standard, --full and --attacks exclude each other")
        if self.part is not None and not 0 <= self.part[0] < self.part[1]:
            raise UserError(f"part must be i k with 0 <= i < k, not {self.part[0]} {self.part[1]}")
        if self.part is not None and (self.processes > 1 or self.fresh):
            raise UserError("--part excludes --processes, and --fresh, which would forget what other parts left")
        if self.norm == "L2" and self.epsilon is None:
            raise UserError("--norm L2 needs an --epsilon of its own (0.5 is usual for 32x32 images)")

    @property
    def preset(self) -> str | tuple[str, ...]:
        """What to run: a preset's name or attacks."""
        return self.attacks or ("standard" if self.standard else "full" if self.full else "quick")


def run(words: list[str]) -> None:
    arguments = parse(EvaluateArguments, "evaluate", words)
    resolve(arguments.preset)  # before --fresh could forget anything
    with distributed.process_group(device(arguments.runtime)):
        if distributed.world_size() > 1 and (arguments.part is not None or arguments.processes > 1):
            raise UserError("torchrun shares the shards out itself: leave out --part and --processes")
        _evaluate(arguments, words)


def _evaluate(arguments: EvaluateArguments, words: list[str]) -> None:
    network, config, splits = _trained(arguments.run, arguments)
    transfer, store = _transfer(arguments, splits), network.store
    if arguments.robustbench is not None and not arguments.robustbench.absolute().parent.is_dir():
        raise UserError(f"{arguments.robustbench.parent}: no such folder for the RobustBench file")
    if arguments.fresh:
        distributed.on_rank_zero(lambda: forget(store))
    shards = shard_count(len(splits.test), arguments.shard_size)
    with EvaluationProgress(Console(stderr=True, quiet=distributed.rank() > 0), config.method, shards, log=True) as progress:
        progress.stored(store)
        if arguments.processes > 1:
            _share_out([word for word in words if word != "--fresh"], arguments, lambda: progress.stored(store))
        options = EvaluationOptions(
            config.attack.epsilon if arguments.epsilon is None else arguments.epsilon, arguments.norm, arguments.preset,
            arguments.seed, arguments.shard_size, transfer=transfer,
            bf16_search=autocast(config.replace(runtime=arguments.runtime), splits.test.labels.device) is not None,
            save_adversarial=arguments.save_adversarial, progress=progress.attacked,
        )  # fmt: skip
        evaluated = partial(network.evaluate, config, splits, dispatch=arguments.runtime.dispatch)
        if distributed.world_size() > 1:
            evaluated(replace(options, part=(distributed.rank(), distributed.world_size())))
        distributed.barrier()
        if distributed.rank() > 0:
            return
        record = evaluated(replace(options, part=arguments.part or (0, 1)))
    if arguments.part is not None:
        return
    write_record_file(network.record, record, arguments.keep_images)
    if arguments.robustbench is not None:
        write_json(arguments.robustbench, model_info(record), indent=2)
    if arguments.json:
        print(json.dumps((record if arguments.keep_images else record.without_images()).to_json()))
        return
    title = f"{splits.name}, {len(splits.test)} test images, {arguments.norm} epsilon {record.epsilon:.4g}"
    console().print(record_table([record], title))
    for line in evaluation_lines(record.evaluation):
        console().print(line, highlight=False, soft_wrap=True)


def _trained(run: Path, arguments: EvaluateArguments) -> tuple[Subject, RunConfig, Splits]:
    """A trained network, its configuration as it is evaluated here, and its data. Raises UserError where it was trained on other
    data."""
    network, place = subject(run), device(arguments.runtime)
    config = network.trained.config
    data = config.data.replace(data_dir=arguments.data_dir or config.data.data_dir)
    data = data.replace(limit_test=arguments.limit_test or config.data.limit_test)
    for name in network.damaged:
        epoch = network.trained.epoch
        print(f"warning: {run}: checkpoint {name} is cut short or altered; epoch {epoch} is evaluated", file=sys.stderr)
    splits = load_dataset(data).to(place)
    network.check(splits, run, data.data_dir or data.dataset)
    return network, config.replace(data=data), splits


def _transfer(arguments: EvaluateArguments, splits: Splits) -> Classifier | None:
    """The network to transfer attacks from, if any. Raises UserError where it knows other images."""
    if arguments.transfer is None:
        return None
    source, config, own = _trained(arguments.transfer, arguments)
    if own.fingerprint != splits.fingerprint:
        raise UserError(f"{arguments.transfer}: was trained on other data than {arguments.run}; attacks do not transfer from it")
    model = source.network(config, own)
    model.set_dispatch(arguments.runtime.dispatch)
    return model


def _share_out(words: list[str], arguments: EvaluateArguments, look: Callable[[], None]) -> None:
    """Run the shards in processes of their own; their results lie in the run's folder afterwards. `look` is called now and then."""
    count, devices = arguments.processes, torch.cuda.device_count()
    threads = arguments.runtime.threads or max(1, torch.get_num_threads() // count)
    command = [sys.executable, "-m", "advmoe", "evaluate", *words, "--processes", "1", "--threads", str(threads)]
    with contextlib.ExitStack() as stack:
        workers = []
        for number in range(count):
            cuda = ["--device", f"cuda:{number % devices}"] if devices > 1 and arguments.runtime.device == "auto" else []
            part = ["--part", str(number), str(count)]
            said = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen([*command, *part, *cuda], stdout=subprocess.DEVNULL, stderr=said)
            stack.callback(process.terminate)  # where this process is stopped, so are they; done ones do not mind
            workers.append((process, said))
        while any(process.poll() is None for process, _ in workers):
            look()
            time.sleep(0.5)
        for process, said in workers:
            if process.returncode:
                said.seek(0)
                reason = " ".join(said.read().strip().splitlines()[-1:])
                raise UserError(reason.removeprefix("advmoe: error: ") or "a worker process was killed")
