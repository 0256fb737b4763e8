"""`advmoe watch`."""

import contextlib
import time
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live

from advmoe.cli.arguments.watch import WatchArguments
from advmoe.cli.streams import console
from advmoe.errors import UserError
from advmoe.watch import statuses, watch_view

OFF_TERMINAL = 240  # columns where there is no terminal: programs that read the lines get all columns


def run(arguments: WatchArguments) -> None:
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
