"""Compare the averaged running statistics of a run with `ema` with statistics that are computed anew on training images.

    python scripts/ema_statistics.py RUN [DATA_DIR]

Prints SA and RA-10 on the test images for both.
"""

import sys
from pathlib import Path

from advmoe.attacks import Pgd
from advmoe.data import load_dataset
from advmoe.evaluation.accuracy import accuracy, correct_flags, evaluation_step, robust_flags
from advmoe.runs.load import load
from advmoe.training.start import calibrate


def main(run: Path, data_dir: str | None = None) -> None:
    """Print one line for each kind of statistics."""
    model = load(run)
    config = model.config
    data = load_dataset(config.data if data_dir is None else config.data.replace(data_dir=data_dir))
    attack = Pgd(config.attack.epsilon, evaluation_step(config.attack.epsilon), 10)
    for statistics in ("averaged", "computed anew"):
        if statistics == "computed anew":
            calibrate(model.network, config, data.train)
        sa = accuracy(correct_flags(model.network, data.test))
        ra = accuracy(robust_flags(model.network, data.test, attack))
        print(f"{statistics}: SA {sa:.1f}, RA-10 {ra:.1f} ({len(data.test)} test images)")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
