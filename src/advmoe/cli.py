"""argv to one function call; nothing else knows about argv."""

import contextlib
import errno
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro
from rich.console import Console

from advmoe import __version__
from advmoe.config import RunConfig, RuntimeConfig, load_yaml
from advmoe.data import DATASETS, load_dataset
from advmoe.demo import demo
from advmoe.errors import UserError, lookup
from advmoe.evaluation.cost import cost
from advmoe.evaluation.evaluate import evaluate
from advmoe.evaluation.record import write_json
from advmoe.progress import TrainingProgress, attack_progress
from advmoe.recipes import RECIPES, recipe
from advmoe.reports.tables import record_table
from advmoe.training.checkpoint import RunFolder
from advmoe.training.loop import best_network, network, train
from advmoe.training.methods import METHODS

Arguments = TypeVar("Arguments")
Flat: Any = tyro.conf.OmitArgPrefixes  # every field a plain flag: names are unique across the sections


@dataclass(frozen=True)
class Source:
    """Where a run's configuration comes from."""

    recipe: str | None = None
    """Name of a recipe (`advmoe recipes` lists them)."""
    config: Path | None = None
    """YAML file with the configuration, as a run's folder holds one."""


@dataclass(frozen=True)
class TrainArguments:
    """Train a network from a recipe, a configuration file, or where a run left off; any field can be overridden."""

    source: Source
    run: RunConfig
    out: Path
    """The run's folder: made if missing."""
    resume: bool = False
    """Go on from the folder's last checkpoint."""


@dataclass(frozen=True)
class ProfileArguments:
    """Print parameters and GMACs (multiply-accumulates of one picture) of a recipe's network."""

    source: Source
    run: RunConfig
    json: bool = False
    """Print one JSON object instead of lines."""


@dataclass(frozen=True)
class EvaluateArguments:
    """Measure what a trained network withstands, on the test set, and write RUN/record.json."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    data_dir: str | None = None
    """Where the data lies now, if not where it was trained on."""
    limit_test: int | None = None
    """Attack this many test pictures, balanced over the classes."""
    batch_size: int = 128
    """Pictures attacked at once; changes no result."""
    seed: int = 0
    """Seed of the attacks' noise."""
    json: bool = False
    """Print the Record as JSON."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


@dataclass(frozen=True)
class DemoArguments:
    """Train and evaluate four methods on embedded pictures: a few minutes on two cores."""

    out: Path = Path("demo")
    """Folder for runs, records.json and figures."""
    seed: int = 0
    """Seed of the four runs."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


@dataclass(frozen=True)
class RecipesArguments:
    """List the recipes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; give its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(f"advmoe {__version__}, torch {torch.__version__}")
        return 0
    try:
        lookup(COMMANDS, words[0], "command")(words[1:])
        return 0
    except UserError as error:
        return _complain(str(error))
    except OSError as error:
        return _complain(_os_error(error))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint (train: with --resume)", file=sys.stderr)
        return 130


def _train(words: list[str]) -> None:
    default = TrainArguments(source=Source(), run=_configured(words), out=tyro.MISSING)
    arguments = _parse(TrainArguments, "train", words, default)
    config, console = arguments.run, _console()
    device = _device(config.runtime)
    lookup(METHODS, config.method, "method")
    splits = load_dataset(config.data)
    with TrainingProgress(console, config.method, _epochs(config)) as progress:
        history = train(config, splits.to(device), arguments.out, progress, resume=arguments.resume)
    best = RunFolder(arguments.out).best()
    row = history[best.epoch - 1]
    console.print(
        f"finished: {len(history)} epochs; best is epoch {best.epoch}, held-out SA {row['val_sa']:.1f} RA {row['val_ra']:.1f}\n"
        f"next: advmoe evaluate {arguments.out}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _evaluate(words: list[str]) -> None:
    arguments = _parse(EvaluateArguments, "evaluate", words)
    if arguments.batch_size < 1 or (arguments.limit_test is not None and arguments.limit_test < 1):
        raise UserError("batch-size and limit-test must be at least 1")
    folder, device = RunFolder(arguments.run), _device(arguments.runtime)
    config = folder.config()
    checkpoint = folder.best()
    data = replace(config.data, data_dir=arguments.data_dir or config.data.data_dir)
    data = replace(data, limit_test=arguments.limit_test or config.data.limit_test)
    config = replace(config, data=data, runtime=arguments.runtime)
    splits = load_dataset(data).to(device)
    if splits.fingerprint != checkpoint.fingerprint:
        raise UserError(f"{data.data_dir}: fingerprint {splits.fingerprint}, trained on {checkpoint.fingerprint}")
    model, epoch = best_network(arguments.run, config, splits)
    dense = cost(network(replace(config, method="at_dense"), splits.spec), splits.spec.shape)
    seconds = sum(row["train_seconds"] for row in checkpoint.history)
    with attack_progress(Console(stderr=True)) as progress:
        record = evaluate(
            model, config, splits, dense, epoch=epoch, train_seconds=seconds,
            seed=arguments.seed, batch_size=arguments.batch_size, stage=progress.stage,
        )  # fmt: skip
    write_json(arguments.run / "record.json", record)
    if arguments.json:
        print(json.dumps(record))
    else:
        _console().print(record_table([record], f"{splits.name}, {len(splits.test)} test pictures"))


def _profile(words: list[str]) -> None:
    arguments = _parse(ProfileArguments, "profile", words, ProfileArguments(source=Source(), run=_configured(words)))
    config = arguments.run
    spec = lookup(DATASETS, config.data.dataset, "dataset").spec
    own = cost(network(config, spec), spec.shape)
    dense = cost(network(replace(config, method="at_dense"), spec), spec.shape)
    figures = {"params": own.params, "gmacs_ideal": own.gmacs_ideal, "gmacs_executed": own.gmacs_executed}
    figures["gmacs_dense"] = dense.gmacs_ideal
    if arguments.json:
        print(json.dumps(figures))
        return
    print(f"parameters       {own.params:,}")
    for name in ("ideal", "executed", "dense"):
        print(f"GMACs, {name:9} {figures[f'gmacs_{name}']:.6f}")
    print(f"against dense    {-100 * (1 - own.gmacs_ideal / dense.gmacs_ideal):+.1f} %")


def _demo(words: list[str]) -> None:
    arguments = _parse(DemoArguments, "demo", words)
    demo(arguments.out, _console(), arguments.runtime, _device(arguments.runtime), arguments.seed)


def _recipes(words: list[str]) -> None:
    _parse(RecipesArguments, "recipes", words)
    for name, config in RECIPES.items():
        epochs, data = config.training.epochs, config.data.dataset
        print(f"{name:32} {config.method:15} {config.model.backbone} on {data}, {epochs} epochs")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": _demo,
    "train": _train,
    "evaluate": _evaluate,
    "profile": _profile,
    "recipes": _recipes,
}
DOCUMENTED = (DemoArguments, TrainArguments, EvaluateArguments, ProfileArguments, RecipesArguments)


def _overview() -> str:
    lines = ["usage: advmoe COMMAND ...    (advmoe COMMAND --help tells more)", ""]
    lines += [f"  {name:9} {kind.__doc__}" for name, kind in zip(COMMANDS, DOCUMENTED, strict=True)]
    return "\n".join([*lines, "", "Start with: advmoe demo"])


def _configured(words: list[str]) -> RunConfig:
    """The configuration that --recipe, --config or an existing --out names, before overrides."""

    @dataclass(frozen=True)
    class First:
        source: Source
        out: Path | None = None

    quiet = [word for word in words if word not in ("-h", "--help")]
    first, _ = _tyro(lambda: tyro.cli(First, args=quiet, config=(Flat,), return_unknown_args=True, add_help=False), "")
    source: Source = first.source
    if source.recipe is not None and source.config is not None:
        raise UserError("--recipe and --config exclude each other")
    if source.recipe is not None:
        return recipe(source.recipe)
    if source.config is not None:
        return load_yaml(source.config)
    if first.out is not None and RunFolder(first.out).config_path.exists():
        return RunFolder(first.out).config()
    if len(quiet) == len(words):
        raise UserError("give --recipe NAME (advmoe recipes lists them) or --config FILE.yaml")
    return RunConfig()


def _parse(kind: type[Arguments], command: str, words: list[str], default: Arguments | None = None) -> Arguments:
    prog = f"advmoe {command}"
    options: dict[str, Any] = {} if default is None else {"default": default}
    parsed: Arguments = _tyro(lambda: tyro.cli(kind, args=words, prog=prog, config=(Flat,), **options), prog)
    return parsed


def _tyro(parse: Callable[[], Any], prog: str) -> Any:
    """Parse; what the parser complains of in a box becomes a UserError of one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse()
    except SystemExit as stop:
        if not stop.code:
            raise
    raise UserError(_one_line(said.getvalue()) + (f" (see {prog} --help)" if prog else ""))


def _one_line(box: str) -> str:
    """The first paragraph of the parser's box, with the nearest flag where it names one."""
    lines = [line.strip(" │|") for line in box.splitlines()[1:]]  # the first holds the title in the frame
    parts = [part.strip() for part in re.split(r"[^\w\s]{8,}", " ".join(lines)) if part.strip()]
    hint = next((part for part in parts[1:] if part.startswith("Perhaps you meant")), "")
    names = re.findall(r"--[a-z][a-z-]*", hint)
    return " ".join(parts[0].split()) + (f"; did you mean {names[0]}?" if names else "")


def _device(runtime: RuntimeConfig) -> torch.device:
    """The device to run on, with the thread count set. Raises UserError where there is no such device."""
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    if runtime.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(runtime.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device '{runtime.device}' is not to be had here: {str(error).splitlines()[0]}") from None
    return device


def _epochs(config: RunConfig) -> int:
    return config.training.epochs * len(METHODS[config.method].phases)


def _console() -> Console:
    return Console(soft_wrap=False)


def _os_error(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"{place}no space left on the disk; what was saved before is whole, --resume goes on from there"
    return f"{place}{error.strerror or error}"


def _complain(message: str) -> int:
    print(f"advmoe: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
