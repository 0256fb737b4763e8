"""Make src/advmoe/data/embedded/fashion-mnist.npz from the full Fashion-MNIST.

    apt-get install dataset-fashion-mnist
    python scripts/make_embedded_data.py /usr/share/datasets/fashion-mnist

Training and validation images come from the official training set, test images from the official test set. Each
part has the same number of images of every class, drawn with a fixed seed.
"""

import gzip
import sys
from pathlib import Path

import numpy as np

from advmoe.files import drafted

PARTS = {"train": ("train", 600), "val": ("train", 30), "test": ("t10k", 100)}  # source and images of each class
TARGET = Path(__file__).parents[1] / "src/advmoe/data/embedded/fashion-mnist.npz"


def read_idx(path: Path, header: int) -> np.ndarray:
    """The bytes of an IDX file after its header."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.uint8, offset=header)


def main(folder: Path) -> None:
    """Write the subset."""
    random = np.random.default_rng(2017)
    arrays: dict[str, np.ndarray] = {}
    taken: dict[str, set[int]] = {"train": set(), "t10k": set()}
    for part, (source, count) in PARTS.items():
        images = read_idx(folder / f"{source}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        labels = read_idx(folder / f"{source}-labels-idx1-ubyte.gz", 8)
        remaining = [np.setdiff1d(np.flatnonzero(labels == number), list(taken[source])) for number in range(10)]
        rows = random.permutation(np.concatenate([random.choice(rows, count, replace=False) for rows in remaining]))
        taken[source] |= set(rows.tolist())
        arrays |= {f"{part}_images": images[rows], f"{part}_labels": labels[rows]}
    with drafted(TARGET) as draft, draft.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    print(f"{TARGET.name}: {TARGET.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
