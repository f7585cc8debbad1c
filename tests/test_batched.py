"""What guards the batched backend: its pixels are albumentations' own, its draws the sample's alone."""

import itertools

import numpy as np
import pytest
import torch
from pictures import Photographs, make_data, needs_cifar10
from torch import Tensor

from era_s10.augment import import_albumentations
from era_s10.batched import BatchedPipeline, pack_pixels
from era_s10.datasets.digits import Digits
from era_s10.datasets.generic import MyDataSet
from era_s10.datasets.mnist import MNIST
from era_s10.sources import Source

A = import_albumentations()
REFLECT, CONSTANT = 4, 0  # cv2.BORDER_REFLECT_101, cv2.BORDER_CONSTANT


def batch_of(
    dataset: MyDataSet,
    transforms: list,
    indices: Tensor,  # (n,) int64
    drawn: list[Tensor],  # what each transform needs
) -> np.ndarray:  # (n, h, w, C)
    "Do to stored images what was drawn."
    pipeline = BatchedPipeline(
        transforms, dataset.mean, dataset.std, dataset.x_train.shape[1:3]
    )
    pixels = pack_pixels(torch.from_numpy(dataset.x_train))
    return pipeline.apply(pixels, indices, drawn).permute(0, 2, 3, 1).numpy()


def normalised(dataset: MyDataSet, index: int) -> np.ndarray:  # (H, W, C) float32
    "Normalise a stored image with albumentations."
    return A.Normalize(dataset.mean, dataset.std).apply(dataset.x_train[index])


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    "Check that two images agree to 1e-5."
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5


@pytest.fixture(scope="module")
def photos() -> Photographs:
    "Tiles of photographs under CIFAR-10's normalisation."
    return Photographs()


FIVE = torch.tensor([0, 7, 41, 7, 419])  # one of them twice


def test_normalise(photos):
    found = batch_of(photos, [], FIVE, [])
    for image, index in zip(found, FIVE.tolist(), strict=True):
        assert_close(image, normalised(photos, index))


def test_gray(photos):
    gray = torch.tensor([True, False, True, True, False])
    transform = A.ToGray(p=0.2)
    for image, index, turned in zip(
        batch_of(photos, [transform], FIVE, [gray]),
        FIVE.tolist(),
        gray.tolist(),
        strict=True,
    ):
        expected = normalised(photos, index)
        assert_close(image, transform.apply(expected) if turned else expected)


@pytest.mark.parametrize("border", [REFLECT, CONSTANT])
@pytest.mark.parametrize(
    ("height", "width"), [(40, 40), (33, 32), (37, 60), (20, 20), (63, 63)]
)
def test_pad(photos, border, height, width):
    transform = A.PadIfNeeded(height, width, border_mode=border, fill=[0.5, -1.0, 2.0])
    found = batch_of(photos, [transform], FIVE, [torch.zeros(5, 0)])
    for image, index in zip(found, FIVE.tolist(), strict=True):
        assert_close(
            image, A.Compose([transform])(image=normalised(photos, index))["image"]
        )


CORNERS = list(itertools.product((0, 3, 8), (0, 5, 8)))


def test_crop_at_every_edge(photos):
    pad, crop = A.PadIfNeeded(40, 40, border_mode=REFLECT), A.RandomCrop(32, 32)
    indices = torch.arange(len(CORNERS))
    found = batch_of(
        photos, [pad, crop], indices, [torch.zeros(9, 0), torch.tensor(CORNERS)]
    )
    for image, index, (top, left) in zip(found, indices.tolist(), CORNERS, strict=True):
        padded = A.Compose([pad])(image=normalised(photos, index))["image"]
        window = (left, top, left + 32, top + 32)
        assert_close(image, crop.apply(padded, crop_coords=window, pad_params=None))


@pytest.mark.parametrize("kind", [A.HorizontalFlip, A.VerticalFlip])
def test_flip(photos, kind):
    flip = torch.tensor([[True], [False], [True], [False], [False]])
    found = batch_of(photos, [kind(p=0.5)], FIVE, [flip])
    for image, index, turned in zip(
        found, FIVE.tolist(), flip[:, 0].tolist(), strict=True
    ):
        expected = normalised(photos, index)
        assert_close(image, kind().apply(expected) if turned else expected)


@pytest.mark.parametrize("fill", [0, 1.5, (0.1, 0.2, 0.3)])
@pytest.mark.parametrize("share", [1, 0.5])
def test_hole_at_every_edge(photos, fill, share):
    transform = A.CoarseDropout((1, 1), (8, 8), (5, 5), fill=fill, p=share)
    places = [
        (0, 0, 1),
        (24, 27, 1),
        (0, 27, 1),
        (24, 0, 1),
        (11, 13, 1),
        (11, 13, share == 1),
    ]
    indices = torch.arange(len(places))
    found = batch_of(photos, [transform], indices, [torch.tensor(places).long()])
    for image, index, (top, left, hit) in zip(
        found, indices.tolist(), places, strict=True
    ):
        expected = normalised(photos, index)
        holes = np.array([[left, top, left + 5, top + 8]])
        assert_close(
            image, transform.apply(expected.copy(), holes, seed=0) if hit else expected
        )


def test_all_together_is_what_albumentations_makes_of_the_same_draws(photos):
    pipeline = BatchedPipeline(photos.augmentation, photos.mean, photos.std, (32, 32))
    indices = torch.arange(400)
    drawn = pipeline.draw(3, 5, indices)
    pixels = pack_pixels(torch.from_numpy(photos.x_train))
    found = pipeline.apply(pixels, indices, drawn).permute(0, 2, 3, 1).numpy()
    to_gray, pad, crop, mirror, dropout = photos.augmentation
    gray, _, corner, flip, hole = (values.tolist() for values in drawn)
    assert {tuple(c) for c in corner} >= {
        (0, 0),
        (8, 8),
        (0, 8),
        (8, 0),
    }  # the edges occur
    for i in range(400):
        image = normalised(photos, i)
        image = to_gray.apply(image) if gray[i] else image
        image = A.Compose([pad])(image=image)["image"]
        top, left = corner[i]
        window = (left, top, left + 32, top + 32)
        image = crop.apply(image, crop_coords=window, pad_params=None)
        image = mirror.apply(image) if flip[i][0] else image
        top, left, _hit = hole[i]
        square = np.array([[left, top, left + 8, top + 8]])
        assert_close(found[i], dropout.apply(image.copy(), square, seed=0))


class GraySquares(MNIST):
    "Gray images of one channel, under MNIST's augmentation."

    def load(self) -> Source:
        "Take the digits' first channel."
        digits = Digits()
        x, y = digits.x_train[:50, ..., :1], digits.y_train[:50]
        return Source(x, y, x, y, classes=digits.classes)


@pytest.mark.parametrize("make", [Digits, GraySquares])
def test_the_shift_of_the_digits_fills_with_background(make):
    dataset = make(backend="batched")
    pad, crop = dataset.augmentation
    corners = torch.tensor([(0, 0), (4, 4), (0, 4), (2, 1)])
    drawn = [torch.zeros(4, 0), corners]
    found = batch_of(dataset, dataset.augmentation, torch.arange(4), drawn)
    for i, (top, left) in enumerate(corners.tolist()):
        padded = A.Compose([pad])(image=normalised(dataset, i))["image"]
        window = (left, top, left + 32, top + 32)
        expected = crop.apply(padded, crop_coords=window, pad_params=None)
        assert_close(found[i], expected.reshape(found[i].shape))


KINDS = ["digits", "photographs", pytest.param("cifar10", marks=needs_cifar10)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_augmentations_are_batched_by_default(kind):
    assert make_data(kind).backend == "batched"


@pytest.mark.parametrize("kind", KINDS)
def test_one_image_alone_is_what_it_is_among_others(kind):
    dataset = make_data(kind)
    together, labels = dataset.train_loader.dataset[3, dataset.train_indices]
    for position in (0, 1, 57, len(labels) - 1):
        image, label = dataset.sample(int(dataset.train_indices[position]), 3)
        assert torch.equal(image, together[position])
        assert label == labels[position]


def test_neither_threads_nor_order_change_a_bit(photos):
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    samples, before = photos.train_loader.dataset, torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, _ = samples[2, torch.arange(400)]
        torch.set_num_threads(2)
        two, _ = samples[2, order]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[order], two)


def test_a_batch_is_nobody_elses(photos):
    samples = photos.train_loader.dataset
    first, _ = samples[0, torch.arange(10)]
    again, _ = samples[0, torch.arange(10)]
    first.zero_()
    assert torch.equal(samples[0, torch.arange(10)][0], again)
    assert photos.x_train.any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_an_accelerator_gives_the_same_bits(photos):
    here, _ = photos.train_loader.dataset[4, torch.arange(400)]
    there = Photographs().to("cuda")
    x, y = there.train_loader.dataset[4, torch.arange(400)]
    assert x.device.type == y.device.type == "cuda"
    assert torch.equal(x.cpu(), here)
    assert torch.equal(there.sample(7, 4)[0], photos.sample(7, 4)[0])


def test_one_channel_is_not_turned_gray_nor_filled_with_three():
    for transform, limit in (
        (A.ToGray(p=1), "three channels"),
        (
            A.CoarseDropout((1, 1), (8, 8), (8, 8), fill=(1, 2, 3)),
            "a fill for each channel",
        ),
        (A.PadIfNeeded(40, 40, fill=[1, 2, 3]), "a fill for each channel"),
    ):
        with pytest.raises(ValueError, match=limit):
            GraySquares(augmentation=[transform], backend="batched")


def test_gray_may_come_after_a_flip():
    import albumentations as A

    x = torch.from_numpy(Digits(limit=20, batch_size=20).x_train[:16]) // 2
    x[..., 1:] *= 0
    flip, gray = A.HorizontalFlip(p=0.5), A.ToGray(p=0.5)
    made = []
    for transforms in ([flip, gray], [gray, flip]):
        pipeline = BatchedPipeline(transforms, (0.0,) * 3, (1.0,) * 3, (32, 32))
        drawn = pipeline.draw(0, 0, torch.arange(16))
        made.append(pipeline.apply(pack_pixels(x), torch.arange(16), drawn))
    assert torch.equal(*made)
