"""`advmoe models`. It only reads Records, so it does not import torch."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from advmoe import networks
from advmoe.cli.arguments.models import ModelsArguments
from advmoe.evaluation.record import Record
from advmoe.evaluation.record_file import read_record

COLUMNS = ("name", "method", "data", "network", "GMACs", "SA", "RA-worst", "size")
NUMBERS = ("GMACs", "SA", "RA-worst", "size")
NOTE = '"At most": AutoAttack was not run.'
USE = "To use one: advmoe predict NAME photo.png; in Python: advmoe.load(NAME)."


def run(arguments: ModelsArguments) -> None:
    rows = [(name, read_record(networks.record_file(name))) for name in networks.names()]
    if arguments.json:
        print(json.dumps([_facts(*row) for row in rows]))
    elif not rows:
        print(f"No networks: {networks.in_words()}.")
    else:
        print(*_table([_cells(*row) for row in rows]), sep="\n")
        bounds = [NOTE] if any(record.ra_worst is None for _, record in rows) else []
        print("", f"Percent of test images, size in MB. {USE}", *bounds, sep="\n")


def _facts(name: str, record: Record) -> dict[str, Any]:
    weights, model = networks.weights(name), record.config.model
    return {
        "name": name, "method": record.method, "data": record.dataset, "backbone": record.backbone, "width": model.width,
        "gmacs": record.gmacs, "sa": record.sa, "ra_worst": record.ra_worst, "ra_worst_quick": record.ra_worst_quick,
        "epsilon": record.epsilon, "test_images": record.test_images, "params": record.params,
        "bytes": weights.stat().st_size if weights.is_file() else None, "file": str(weights),
    }  # fmt: skip


def _cells(name: str, record: Record) -> tuple[str, ...]:
    facts = _facts(name, record)
    width = f", width {facts['width']}" if facts["width"] is not None else ""
    size = "not installed" if facts["bytes"] is None else f"{facts['bytes'] / 1e6:.1f}"
    worst = f"{'at most ' if record.ra_worst is None else ''}{record.worst:.1f}"
    accuracies = f"{record.gmacs:.4f}", f"{record.sa:.1f}", worst
    return name, record.method, record.dataset, f"{record.backbone}{width}", *accuracies, size


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Aligned lines, numbers to the right."""
    lines = [COLUMNS, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = zip(COLUMNS, line, widths, strict=True)
        yield "  ".join(text.rjust(width) if name in NUMBERS else text.ljust(width) for name, text, width in cells).rstrip()
