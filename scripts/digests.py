"""Write era_s10/digests.npz, the digests of all images of CIFAR-10 and MNIST, from verified copies.

ERA_S10_DATA=~/data python scripts/digests.py
"""

from pathlib import Path

import numpy as np

from era_s10.datasets import CIFAR10, MNIST
from era_s10.sources import fingerprint, image_digests

TARGET = Path(__file__).parents[1] / "era_s10" / "digests.npz"


def main() -> None:
    """Read the datasets, check them against their fingerprints, and write the digests."""
    arrays = {}
    for kind in (CIFAR10, MNIST):
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
            arrays[f"{kind.__name__.lower()}_{part}"] = np.sort(image_digests(x, y))
    np.savez(TARGET, **arrays)
    print({name: array.shape for name, array in arrays.items()}, TARGET.stat().st_size)


if __name__ == "__main__":
    main()
