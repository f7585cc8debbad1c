"""Draw the pictures that no notebook draws: nbs/images/augmented.png and nbs/images/social.png.

ERA_S10_DATA=~/data python scripts/pictures.py
"""

from pathlib import Path

import numpy as np

from era_s10 import CIFAR10
from era_s10.plots import plot_style

IMAGES = Path(__file__).resolve().parent.parent / "nbs" / "images"


def draw_augmented(dataset: CIFAR10) -> None:
    """Draw eight training images, as stored and as augmented in two epochs."""
    figure = dataset.show_examples(8, epochs=(0, 1))
    figure.savefig(IMAGES / "augmented.png", dpi=200)


def draw_social(dataset: CIFAR10) -> None:
    """Draw the preview that social networks show for a link: 1200 by 630 pixels."""
    with plot_style() as plt:
        figure = plt.figure(figsize=(12, 6.3), facecolor="#17324d", layout="none")
        figure.text(0.05, 0.8, "era_s10", color="white", fontsize=54, weight="bold")
        line = "Train, understand and teach image classification"
        figure.text(0.05, 0.69, line, color="#6ec1a8", fontsize=24)
        for row, epochs in enumerate((None, 0, 1)):
            for column, index in enumerate(range(40, 52)):
                axes = figure.add_axes(
                    (0.05 + 0.0755 * column, 0.43 - 0.19 * row, 0.07, 0.175)
                )
                if epochs is None:
                    image = dataset.x_train[index]
                else:
                    x = dataset.denormalize(dataset.sample(index, epochs)[0])
                    image = np.clip(x.permute(1, 2, 0).numpy(), 0, 1)
                axes.imshow(image, interpolation="nearest")
                axes.axis("off")
        figure.savefig(IMAGES / "social.png", dpi=100)


if __name__ == "__main__":
    cifar10 = CIFAR10()
    draw_augmented(cifar10)
    draw_social(cifar10)
