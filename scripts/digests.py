"""Write era_s10/digests.npz, the digests of all images of CIFAR-10, MNIST and Fashion-MNIST, from verified copies.

ERA_S10_DATA=~/data python scripts/digests.py
"""

from pathlib import Path

import numpy as np

from era_s10.datasets.cifar10 import CIFAR10
from era_s10.datasets.mnist import MNIST
from era_s10.datasets.more import FashionMNIST
from era_s10.sources import fingerprint, image_digests

TARGET = Path(__file__).parents[1] / "era_s10" / "digests.npz"
DATASETS = {"cifar10": CIFAR10, MNIST.key: MNIST, FashionMNIST.key: FashionMNIST}


def main() -> None:
    """Read the datasets, check them against their fingerprints, and write the digests."""
    arrays = {}
    for name, kind in DATASETS.items():
        data = type(kind.__name__, (kind,), {"checksums": None})()
        parts = {
            "train": (data.x_train, data.y_train),
            "test": (data.x_test, data.y_test),
        }
        for part, (x, y) in parts.items():
            if fingerprint(x, y) != kind.checksums[part]:
                raise SystemExit(
                    f"{data.origin}: these are not the published {part} images"
                )
            arrays[f"{name}_{part}"] = np.sort(image_digests(x, y))
    np.savez(TARGET, **arrays)
    print({name: array.shape for name, array in arrays.items()}, TARGET.stat().st_size)


if __name__ == "__main__":
    main()
