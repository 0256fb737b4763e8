"""From words on the command line to dataclasses, and what many commands take."""

import contextlib
import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro
from rich.console import Console

from advmoe.config import RunConfig, RuntimeConfig, load_yaml
from advmoe.distributed import local_device
from advmoe.errors import UserError
from advmoe.moe import check_dispatch
from advmoe.recipes import recipe
from advmoe.training.checkpoint import RunFolder

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


def configured(words: list[str]) -> RunConfig:
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


def parse(kind: type[Arguments], command: str, words: list[str], default: Arguments | None = None) -> Arguments:
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
    text = re.sub(r"\[/?bold\]", "", " ".join(lines))
    parts = [part.strip() for part in re.split(r"[^\w\s]{8,}", text) if part.strip()]
    hint = next((part for part in parts[1:] if part.startswith("Perhaps you meant")), "")
    names = re.findall(r"--[a-z][a-z-]*", hint)
    return _last_reason(" ".join(parts[0].split())) + (f"; did you mean {names[0]}?" if names else "")


def _last_reason(text: str) -> str:
    """Of a field that may be None or something else: why it is not something else."""
    flag, several, reasons = text.partition(": no type matching ")
    last = re.split(r" - (?:<class [^>]*>|tuple\[[^]]*]|typing[.].*]): ", reasons)[-1]
    return f"{flag}: {last}" if several else text


def device(runtime: RuntimeConfig) -> torch.device:
    """The device to run on, with the thread count set. Raises UserError where it is not there or cannot do what is asked."""
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    if runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is first used
        torch.use_deterministic_algorithms(True)
    name = ("cuda" if torch.cuda.is_available() else "cpu") if runtime.device == "auto" else runtime.device
    try:
        found = local_device(torch.device(name))
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device '{name}' is not to be had here: {str(error).splitlines()[0]}") from None
    check_dispatch(runtime.dispatch, found)
    return found


def console() -> Console:
    return Console(soft_wrap=False)
