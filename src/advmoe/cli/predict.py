"""`advmoe predict`."""

import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from advmoe.cli.arguments.predict import PredictArguments
from advmoe.cli.device import set_up_device
from advmoe.errors import UserError, printable
from advmoe.runs.load import load
from advmoe.runs.loaded import Loaded
from advmoe.runs.predict import FilePrediction, images_in, predict
from advmoe.wording import number_of

COLUMNS = ("image", "class", "confidence", "pathway", "note")


def run(arguments: PredictArguments) -> None:
    model = load(arguments.run, set_up_device(arguments.runtime.config))
    write = _print_json if arguments.json else _print_csv if arguments.csv else _print_table
    unreadable: list[Path] = []
    write(model, _readable(arguments, model, unreadable))
    failed = [str(path) for path in unreadable if path in arguments.images]  # those in folders were only looked at
    if failed:
        raise UserError(f"{failed[0]}: {len(failed)} of {len(arguments.images)} given paths could not be read")


def _readable(arguments: PredictArguments, model: Loaded, unreadable: list[Path]) -> Iterator[FilePrediction]:
    """The predictions; files that are not images are reported on stderr, and added to `unreadable`. Raises UserError if there is no
    image at all."""
    count = 0
    single = len(arguments.images) == 1 and not os.path.isdir(arguments.images[0])
    for result in predict(model, images_in(arguments.images), arguments.batch_size):
        if isinstance(result, FilePrediction):
            count += 1
            yield result
        elif single:
            raise UserError(result.reason)
        else:
            unreadable.append(result.image)
            print(f"advmoe: {result.reason}", file=sys.stderr)
    if not count:
        names, files = ", ".join(map(str, arguments.images)), number_of(len(unreadable), "file")
        raise UserError(f"{names}: none of {files} could be read as an image" if unreadable else f"{names}: contains no file")


def pathway(route: Sequence[int]) -> str:
    """'0-1-1-0'; '' without experts."""
    return "-".join(map(str, route))


def _print_table(model: Loaded, rows: Iterator[FilePrediction]) -> None:
    """Aligned lines; the image is last, because the lengths of the names are not known beforehand."""
    width = max(len("class"), *(len(printable(name)) for name in model.classes))
    for number, row in enumerate(rows):
        route = pathway(row.pathway)
        if number == 0:
            print(f"{'class':{width}}  confidence  {'pathway':{max(7, len(route))}}  image")
        line = f"{printable(row.name):{width}}  {row.confidence:10.4f}  {route:7}  {printable(str(row.image))}"
        print(line + (f"  ({row.note})" if row.note else ""))


def _print_json(model: Loaded, rows: Iterator[FilePrediction]) -> None:
    """A list, written row by row."""
    separator = "["
    for row in rows:
        values = (str(row.image), row.name, row.confidence, list(row.pathway), row.note)
        print(separator, json.dumps(dict(zip(COLUMNS, values, strict=True))), sep="\n", end="")
        separator = ","
    print("\n]")


def _print_csv(model: Loaded, rows: Iterator[FilePrediction]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    for number, row in enumerate(rows):
        if number == 0:
            writer.writerow(COLUMNS)
        writer.writerow([row.image, row.name, row.confidence, pathway(row.pathway), row.note])
