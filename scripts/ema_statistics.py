"""Compare the averaged running statistics of a run with `ema` with statistics that are computed anew on training images.

    python scripts/ema_statistics.py RUN DATA_DIR > results/evaluation/ema_statistics.json

Prints SA and RA-10, in percent of the test images, with both kinds of statistics. The attack has the same random starts as in
`advmoe evaluate`, so the figures of the averaged statistics are those of the run's Record.
"""

import json
import sys
from pathlib import Path

from advmoe.data import Source, load_dataset
from advmoe.evaluation import evaluate
from advmoe.models import Classifier
from advmoe.runs.load import load
from advmoe.training.statistics import calibrate


def figures(network: Classifier, images: Source, epsilon: float) -> dict[str, float]:
    """SA and RA-10 on `images`."""
    evaluation = evaluate(network, images.pixels(), images.labels, epsilon=epsilon, preset=["pgd_10"])
    return {"sa": round(evaluation.sa, 2), "ra_10": round(evaluation.figures["ra_10"], 2)}


def main(run: Path, data_dir: str) -> None:
    """Print the figures as JSON."""
    model = load(run)
    network, config = model.network, model.config
    data = load_dataset(config.data.replace(data_dir=data_dir))
    averaged = figures(network, data.test, config.attack.epsilon)
    calibrate(network, config, data.train)
    computed_anew = figures(network, data.test, config.attack.epsilon)
    content = {"run": run.name, "test_images": len(data.test), "averaged": averaged, "computed_anew": computed_anew}
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
