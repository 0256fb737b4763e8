"""The file to which sweeps add the Records of their runs."""

from collections.abc import Iterable
from pathlib import Path

from advmoe.config import RunConfig, differences, from_dict
from advmoe.errors import UserError
from advmoe.evaluation.record import Record
from advmoe.evaluation.record_file import RECORD, checked_record, read_json, read_record
from advmoe.files import JsonObject, write_json
from advmoe.locks import turn
from advmoe.runs.status import RunStatus
from advmoe.sweep.plan import Planned


def check_records(path: Path | None, runs: Iterable[Planned]) -> None:
    """Raises UserError if the file at `path` cannot be read, or has one of these runs with other settings."""
    configs = {run.name: run.config for run in runs}
    for _, record in _recorded(path):
        if record.run in configs and (changed := differences(_settings(record), configs[record.run])):
            raise UserError(f"{path}: has another run {record.run} ({changed[0]}); give --records another file")


def write_records(path: Path, runs: Iterable[RunStatus], keep_images: bool) -> int:
    """Add the Records of the runs that are evaluated to those in the file, to which other sweeps may add at the same time. A Record
    there is replaced only by one of the same run that is not older. Returns the number of Records that the file then has.
    """
    done = [read_record(run.path / RECORD) for run in runs if run.is_evaluated]
    with turn(path.with_name(f".{path.name}.lock")):
        recorded = _recorded(path)
        entries = [entry for entry, _ in recorded]
        for record in done:
            content = (record if keep_images else record.without_images()).to_json()
            number = next((number for number, (_, old) in enumerate(recorded) if _is_same_run(old, record)), None)
            if number is None:
                entries.append(content)
            elif recorded[number][1].time <= record.time:
                entries[number] = content
        if entries != [entry for entry, _ in recorded]:
            write_json(path, entries, indent=1)
    return len(entries)


def _recorded(path: Path | None) -> list[tuple[JsonObject, Record]]:
    """The entries of the file of Records, as they are and checked. Raises UserError if it contains anything else."""
    entries = read_json(path) if path is not None and path.exists() else []
    if not isinstance(entries, list):
        raise UserError(f"{path}: is no list of Records")
    return [(entry, checked_record(entry, f"{path}, entry {number}")) for number, entry in enumerate(entries, 1)]


def _settings(record: Record) -> RunConfig:
    return from_dict(record.config.model_dump(), f"Record of {record.run}")


def _is_same_run(old: Record, new: Record) -> bool:
    if (old.run, old.fingerprint) != (new.run, new.fingerprint):
        return False
    return not differences(_settings(old), _settings(new))
