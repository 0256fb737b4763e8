"""Records of a file or below a folder, one for each cell and seed."""

import logging
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from advmoe.errors import UserError
from advmoe.evaluation.record import Record
from advmoe.evaluation.record_file import checked_record, read_json, with_gallery
from advmoe.files import walk
from advmoe.reports.cell import CELL_FIELDS, Cell, cell_of
from advmoe.reports.settings import differing, epochs_trained, settings
from advmoe.training.methods import METHODS

logger = logging.getLogger("advmoe")
RecordFile = tuple[Path, Record]


def collect(runs: Path) -> list[Record]:
    """The Records of a JSON file or below a folder, ordered by cell and seed.

    Below a folder, reads every record.json, and every other JSON file outside of run folders that holds a Record or a list of
    Records. There is one warning for each file that is skipped because it is broken or holds no Record, and one for each Record
    with a damaged part that is dropped. If runs of one cell have different settings, or the same seed twice, the newest run and
    those with its settings are kept, with a warning for each other. A run that was evaluated before its end counts as older than
    all that were not. There is also a warning for each method that is not registered here. Raises UserError if there is no Record.
    """
    if not runs.exists():
        raise UserError(f"{runs}: does not exist")
    pairs = [pair for path in ([runs] if runs.is_file() else _files(runs)) for pair in _read(path)]
    if not pairs:
        raise UserError(f"{runs}: holds no Record; advmoe evaluate RUN writes one, RUN/record.json")
    once = {record.model_dump_json(): (path, record) for path, record in reversed(pairs)}  # copies of a Record are one
    cells: dict[Cell, list[RecordFile]] = defaultdict(list)
    for path, record in sorted(once.values(), key=lambda pair: (epochs_trained(pair[1]) == "all", pair[1].time), reverse=True):
        cells[cell_of(record)].append((path, record))
    for method in sorted({cell.method for cell in cells} - set(METHODS)):
        logger.warning(
            "method '%s' is not registered here, so its runs are listed with a model scale and a number of experts, even if it has "
            "none; ADVMOE_EXTENSION=SCRIPT.py loads the script that registers it", method,
        )  # fmt: skip
    return [record for cell in sorted(cells, key=_order) for record in _of_one_setting(cell, cells[cell])]


def _files(folder: Path) -> Iterator[Path]:
    """Of a run's folder only record.json is read, not its checkpoints. Neither are the results of evaluations (the folders with
    key.json) and, beside a Record, its images (gallery.json)."""
    for parent, folders, names in walk(folder):
        is_run, is_store = "config.yaml" in names, "key.json" in names
        images = {name.removesuffix("record.json") + "gallery.json" for name in names if name.endswith("record.json")}
        folders[:] = [] if is_run or is_store else [name for name in folders if not name.startswith(".")]
        for name in [] if is_store else sorted(set(names) - images):
            of_records = "record.json" if "record.json" in names else ".json"  # a hub's folder, too, has other JSON files
            if name == "record.json" or (not is_run and name.endswith(of_records) and not name.startswith(".")):
                yield Path(parent, name)


def _read(path: Path) -> list[RecordFile]:
    """The Records of a file, with one warning if the file or entries of it cannot be read."""
    try:
        tree = with_gallery(read_json(path), path)
    except UserError as error:
        logger.warning("left out, %s", error)
        return []
    several = isinstance(tree, list)
    entries = [(f"{path}, entry {number}", entry) for number, entry in enumerate(tree, 1)] if several else [(str(path), tree)]
    records, reasons = [], []
    for where, entry in entries:
        try:
            records.append((path, checked_record(entry, where)))
        except UserError as error:
            reasons.append(str(error))
    if reasons or not records:
        logger.warning("left out, %s", "; ".join(reasons) or f"{path}: an empty list")
    return records


def _of_one_setting(cell: Cell, runs: list[RecordFile]) -> list[Record]:
    """One run for each seed, with the settings of the first run; `runs` are sorted, the newest first."""
    first, first_settings = runs[0][0], settings(runs[0][1])
    others: dict[tuple[Path, str], list[int]] = defaultdict(list)
    by_seed: dict[int, RecordFile] = {}
    for path, record in runs:
        difference = differing(settings(record), first_settings)
        if difference:
            others[path, difference].append(record.seed)
        elif record.seed not in by_seed:
            by_seed[record.seed] = path, record
        elif record.evaluation != by_seed[record.seed][1].evaluation:
            newer = by_seed[record.seed][0]
            logger.warning("left out, %s: seed %d of %s: %s holds a newer run of it", path, record.seed, cell.words, newer)
    for (path, difference), seeds in others.items():
        numbers = ", ".join(str(seed) for seed in sorted(set(seeds)))
        reason = f"other settings than the run in {first} ({difference})"
        logger.warning("left out, %s: seed %s of %s: %s", path, numbers, cell.words, reason)
    return [by_seed[seed][1] for seed in sorted(by_seed)]


def _order(cell: Cell) -> tuple[Any, ...]:
    """Sort key: by setting, then by method in the order of METHODS, then by rising scale."""
    methods = list(METHODS)
    rank = methods.index(cell.method) if cell.method in METHODS else len(methods)
    values = [0 if getattr(cell, name) is None else getattr(cell, name) for name in CELL_FIELDS]
    by_name = dict(zip(CELL_FIELDS, values, strict=True)) | {"method": (rank, cell.method)}
    last = ("method", "model_scale", "num_experts", "variant", "ingredients", "choice")
    return tuple(by_name[name] for name in (*(name for name in CELL_FIELDS if name not in last), *last))
