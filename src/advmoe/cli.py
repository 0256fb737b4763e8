"""argv to one function call; nothing else knows about argv."""

import contextlib
import errno
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import tyro
from rich.console import Console

from advmoe import __version__
from advmoe.attacks import Norm
from advmoe.config import Fraction, RunConfig, RuntimeConfig, load_yaml
from advmoe.data import Splits, load_dataset
from advmoe.data_commands import DataCheckArguments, DataGetArguments, check, get
from advmoe.demo import demo
from advmoe.errors import UserError, lookup
from advmoe.evaluation.cost import cost
from advmoe.evaluation.evaluate import fresh, resolve
from advmoe.evaluation.record import evaluate_run, model_info
from advmoe.evaluation.shards import SHARD_SIZE, shard_count
from advmoe.evaluation.suite import PRESETS, ROUTING_BUDGET
from advmoe.files import write_json
from advmoe.models import Classifier
from advmoe.profile import dense_estimate, profile
from advmoe.progress import EvaluationProgress, TrainingProgress
from advmoe.recipes import GRAMMAR, RECIPES, recipe
from advmoe.reports.costs import (
    chosen_recipes,
    cost_lines,
    cost_row,
    judged_cells,
    judged_lines,
    judged_rows,
    recipe_lines,
    recipe_rows,
)
from advmoe.reports.tables import evaluation_lines, record_table
from advmoe.training.checkpoint import Checkpoint, RunFolder
from advmoe.training.loop import autocast, best_network, network, train
from advmoe.training.methods import METHODS

Arguments = TypeVar("Arguments")
Flag = tyro.conf.FlagCreatePairsOff[bool]
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
    layers: Flag = False
    """Print each layer, too."""
    paper: Flag = False
    """Instead of a recipe: the cost columns of the paper's tables beside the counts; cells that cannot be right are marked."""
    json: bool = False
    """Print JSON instead of lines."""

    def __post_init__(self) -> None:
        if self.paper and (self.layers or self.source != Source() or self.run != RunConfig()):
            raise UserError("--paper takes no recipe and no other setting: it counts every cell of the paper's tables")


def _costs(preset: str, what: str) -> Any:
    """Help of a preset's flag, with its budget."""
    return tyro.conf.arg(help=f"{what}. Costs {PRESETS[preset].budget}; {ROUTING_BUDGET}.")


@dataclass(frozen=True)
class EvaluateArguments:
    """Measure what a trained network withstands at worst, on the test set, and write RUN/record.json."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    quick: Annotated[Flag, _costs("quick", "SA, PGD and a short attack on the routing (the default)")] = False
    standard: Annotated[Flag, _costs("standard", "AutoAttack, route-aware attacks and all self-checks")] = False
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
    """Attack this many test pictures, balanced over the classes."""
    seed: int = 0
    """Seed of the attacks' random draws."""
    shard_size: int = SHARD_SIZE
    """Pictures attacked at once; results are kept after every attack on a shard."""
    processes: int = 1
    """Share the shards out over this many processes (and CUDA devices, where there are several)."""
    part: tuple[int, int] | None = None
    """Run only every k-th shard from the i-th on (two numbers, i from 0); without it, what other parts left is collected."""
    fresh: Flag = False
    """Forget earlier results in RUN/evaluation."""
    save_adversarial: Flag = False
    """Write the adversarial pictures to RUN/evaluation/adversarial."""
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
            raise UserError("--norm L2 needs an --epsilon of its own (0.5 is usual for 32x32 pictures)")

    @property
    def preset(self) -> str | tuple[str, ...]:
        """What to run: a preset's name or attacks."""
        return self.attacks or ("standard" if self.standard else "full" if self.full else "quick")


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
    """List the recipes: settings, parameters and GMACs."""

    part: tyro.conf.Positional[str] = ""
    """Only those with this in their names."""
    json: Flag = False
    """Print JSON, with the whole configurations, instead of lines."""


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
    except (UserError, OSError, torch.OutOfMemoryError, MemoryError) as error:
        return _complain(_in_words(error))
    except KeyboardInterrupt:
        print(f"interrupted; {GO_ON.get(words[0], 'nothing was changed')}", file=sys.stderr)
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
    resolve(arguments.preset)  # before --fresh could forget anything
    config, splits, model, checkpoint = _trained(arguments.run, arguments)
    transfer = _transfer(arguments, splits)
    store = arguments.run / "evaluation"
    if arguments.robustbench is not None and not arguments.robustbench.absolute().parent.is_dir():
        raise UserError(f"{arguments.robustbench.parent}: no such folder for the RobustBench file")
    if arguments.fresh:
        fresh(store)
    dense = cost(network(replace(config, method="at_dense"), splits.spec), splits.spec.shape)
    shards = shard_count(len(splits.test), arguments.shard_size)
    with EvaluationProgress(Console(stderr=True), config.method, shards, log=True) as progress:
        progress.stored(store)
        if arguments.processes > 1:
            _share_out([word for word in words if word != "--fresh"], arguments, lambda: progress.stored(store))
        record = evaluate_run(
            model, config, splits, dense, epoch=checkpoint.epoch, train_seconds=checkpoint.train_seconds,
            seed=arguments.seed, epsilon=arguments.epsilon, norm=arguments.norm, preset=arguments.preset,
            shard_size=arguments.shard_size, store=store, part=arguments.part or (0, 1), transfer=transfer,
            bf16_search=autocast(replace(config, runtime=arguments.runtime), splits.test.labels.device) is not None,
            save_adversarial=arguments.save_adversarial, told=progress.told,
        )  # fmt: skip
    if arguments.part is not None:
        return
    write_json(arguments.run / "record.json", record, indent=1)
    if arguments.robustbench is not None:
        write_json(arguments.robustbench, model_info(record), indent=2)
    if arguments.json:
        print(json.dumps(record))
        return
    title = f"{splits.name}, {len(splits.test)} test pictures, {arguments.norm} epsilon {record['epsilon']:.4g}"
    _console().print(record_table([record], title))
    for line in evaluation_lines(record["evaluation"]):
        _console().print(line, highlight=False, soft_wrap=True)


def _trained(run: Path, arguments: EvaluateArguments) -> tuple[RunConfig, Splits, Classifier, Checkpoint]:
    """A run's configuration as it is evaluated here, its data, the network of its best epoch, and that checkpoint."""
    folder, device = RunFolder(run), _device(arguments.runtime)
    config, best = folder.config(), folder.best()
    data = replace(config.data, data_dir=arguments.data_dir or config.data.data_dir)
    data = replace(data, limit_test=arguments.limit_test or config.data.limit_test)
    config = replace(config, data=data)
    for name in folder.damaged():
        print(f"warning: {run}: checkpoint {name} is cut short or altered; epoch {best.epoch} is evaluated", file=sys.stderr)
    splits = load_dataset(data).to(device)
    if splits.fingerprint != best.fingerprint:
        place = data.data_dir or data.dataset
        raise UserError(f"{place}: fingerprint {splits.fingerprint}, but {run} was trained on {best.fingerprint}")
    return config, splits, best_network(run, config, splits)[0], best


def _transfer(arguments: EvaluateArguments, splits: Splits) -> Classifier | None:
    """The network to transfer attacks from, if any. Raises UserError where it knows other pictures."""
    if arguments.transfer is None:
        return None
    _, own, model, _ = _trained(arguments.transfer, arguments)
    if own.fingerprint != splits.fingerprint:
        raise UserError(f"{arguments.transfer}: was trained on other data than {arguments.run}; attacks do not transfer from it")
    return model


def _share_out(words: list[str], arguments: EvaluateArguments, look: Callable[[], None]) -> None:
    """Run the shards in processes of their own; their results lie in the run's folder afterwards. `look` is called now and then."""
    count, devices = arguments.processes, torch.cuda.device_count()
    threads = arguments.runtime.threads or max(1, torch.get_num_threads() // count)
    command = [sys.executable, "-m", "advmoe", "evaluate", *words, "--processes", "1", "--threads", str(threads)]
    with contextlib.ExitStack() as stack:
        workers = []
        for number in range(count):
            device = ["--device", f"cuda:{number % devices}"] if devices > 1 and arguments.runtime.device == "auto" else []
            part = ["--part", str(number), str(count)]
            said = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen([*command, *part, *device], stdout=subprocess.DEVNULL, stderr=said)
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


def _profile(words: list[str]) -> None:
    run = RunConfig() if "--paper" in words else _configured(words)
    arguments = _parse(ProfileArguments, "profile", words, ProfileArguments(source=Source(), run=run))
    if arguments.paper:
        judged = judged_cells()
        print(json.dumps(judged_rows(judged)) if arguments.json else "\n".join(judged_lines(judged)))
        return
    own, dense = profile(arguments.run), dense_estimate(arguments.run)
    if arguments.json:
        print(json.dumps(cost_row(own, dense, arguments.layers)))
        return
    print(*cost_lines(own, dense, arguments.layers), sep="\n")
    if arguments.run.method == "at_sparse":
        print("counted without the masked channels: the compact network is what is evaluated")


def _demo(words: list[str]) -> None:
    arguments = _parse(DemoArguments, "demo", words)
    demo(arguments.out, _console(), arguments.runtime, _device(arguments.runtime), arguments.seed)


def _recipes(words: list[str]) -> None:
    arguments = _parse(RecipesArguments, "recipes", words)
    chosen = chosen_recipes(RECIPES, arguments.part)
    if arguments.json:
        print(json.dumps(recipe_rows(chosen)))
        return
    print(*recipe_lines(chosen), "", f"Any {GRAMMAR} is a recipe, listed or not.", sep="\n")


def _data(words: list[str]) -> None:
    """Fetch a data set (get), or read one and say what it holds (check)."""
    if not words or words[0] in ("-h", "--help"):
        print(_data_overview())
        return
    kind, run = lookup(DATA_COMMANDS, words[0], "data command")
    run(_parse(kind, f"data {words[0]}", words[1:]))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": _demo,
    "train": _train,
    "evaluate": _evaluate,
    "profile": _profile,
    "recipes": _recipes,
    "data": _data,
}
DATA_COMMANDS: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "get": (DataGetArguments, get),
    "check": (DataCheckArguments, check),
}
GO_ON = {
    "train": "the same command with --resume goes on from the last checkpoint",
    "evaluate": "the same command (without --fresh) goes on where it stopped",
    "demo": "the same command goes on where it stopped",
    "data": "the same command goes on where it stopped",
}
DOCUMENTED = (DemoArguments, TrainArguments, EvaluateArguments, ProfileArguments, RecipesArguments, _data)


def _overview() -> str:
    lines = ["usage: advmoe COMMAND ...    (advmoe COMMAND --help tells more)", ""]
    lines += [f"  {name:9} {kind.__doc__}" for name, kind in zip(COMMANDS, DOCUMENTED, strict=True)]
    return "\n".join([*lines, "", "Start with: advmoe demo"])


def _data_overview() -> str:
    lines = [f"  {name:9} {kind.__doc__}" for name, (kind, _) in DATA_COMMANDS.items()]
    return "\n".join(["usage: advmoe data COMMAND ...    (advmoe data COMMAND --help tells more)", "", *lines])


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


def _in_words(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out of memory: use a smaller batch size, or evaluate with a smaller --shard-size"
    if not isinstance(error, OSError):
        return str(error)
    place = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"{place}no space left on the disk; what was saved before is whole, and the run can go on from there"
    return f"{place}{error.strerror or error}"


def _complain(message: str) -> int:
    print(f"advmoe: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
