"""Add a trained network to the package: src/advmoe/networks/NAME.safetensors in float16, its Record and its model card.

    python scripts/package_network.py RUN NAME [flags of advmoe evaluate]
    python scripts/package_network.py runs/cifar10/advmoe cifar10-w32 --standard --limit-test 500 --data-dir data

The file is evaluated, so the Record is that of the rounded weights. Repeat the command to continue an evaluation that was stopped.
"""

import shutil
import sys
from pathlib import Path

from advmoe import networks
from advmoe.cli.arguments.evaluate import read
from advmoe.cli.main import main as advmoe
from advmoe.errors import UserError
from advmoe.evaluation.record_file import gallery_path
from advmoe.files import drafted, write_atomically
from advmoe.reports.model_card import model_card
from advmoe.runs.load import load, save_file


def write_weights(run: Path, path: Path) -> None:
    """Write the file of the run's best epoch. Raises UserError, and leaves an earlier file, if it is too large."""
    with drafted(path) as draft:
        save_file(load(run), draft, half=True)
        size = draft.stat().st_size
        if size > networks.MAX_FILE:
            raise UserError(f"{run}: takes {size:,} bytes in float16; a network of the package may have {networks.MAX_FILE:,}")


def write_card(name: str) -> None:
    """Write NAME.md from the file and its Record."""
    model = load(networks.weights(name))
    assert model.record is not None  # just evaluated
    write_atomically(networks.FOLDER / f"{name}.md", model_card(model.record, name, model.classes, model.input_size))


def main(run: Path, name: str, *flags: str) -> int:
    """Write all three files. Returns the exit status of the evaluation. Raises UserError for flags that give no record.json."""
    path = networks.weights(name)
    options = read([str(path), *flags])
    if options.part or options.name or options.test_set:
        raise UserError("--part, --name and --test-set give no Record of the package's network")
    write_weights(run, path)
    status = advmoe(["evaluate", str(path), *flags])
    if status == 0:
        shutil.rmtree(path.with_name(f"{name}.evaluation"))
        gallery_path(networks.record_file(name)).unlink(missing_ok=True)
        write_card(name)
    return status


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
    except UserError as error:
        sys.exit(str(error))
