"""`advmoe watch`."""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console, RenderableType
from rich.live import Live

from advmoe.cli.parsing import Flag, console, parse
from advmoe.errors import UserError
from advmoe.watch import statuses, watch_view

OFF_TERMINAL = 240  # columns: programs that read the lines get all of them


@dataclass(frozen=True)
class WatchArguments:
    """Show running and finished runs below a folder until Ctrl-C; off a terminal, once."""

    folder: tyro.conf.Positional[Path]
    """A run's folder, or one that holds runs, at any depth."""
    once: Flag = False
    """Print the table once and end."""
    interval: float = 5.0
    """Seconds between updates."""

    def __post_init__(self) -> None:
        if not 0.1 <= self.interval <= 86400:
            raise UserError(f"interval must be 0.1 to 86400 seconds, not {self.interval:g}")


def run(words: list[str]) -> None:
    arguments = parse(WatchArguments, "watch", words)
    folder, terminal = arguments.folder, console()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if arguments.once or not terminal.is_terminal:
        if not (runs := statuses(folder)):
            raise UserError(f"{folder}: holds no run (no config.yaml in it or below)")
        wide = terminal if terminal.is_terminal else Console(width=OFF_TERMINAL)
        wide.print(watch_view(runs, folder, wide))
        return
    with contextlib.suppress(KeyboardInterrupt):  # ends the view
        _live(folder, terminal, arguments.interval)


def _live(folder: Path, terminal: Console, interval: float) -> None:
    with Live(_view(folder, terminal), console=terminal, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            live.update(_view(folder, terminal), refresh=True)


def _view(folder: Path, terminal: Console) -> RenderableType:
    runs = statuses(folder)
    return watch_view(runs, folder, terminal) if runs else f"no run below {folder} yet"
