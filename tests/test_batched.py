"""The batched backend: it makes the pixels of albumentations, from the sample's own random numbers."""

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
    drawn: list[Tensor],  # random parameters of each transform
) -> np.ndarray:  # images (n, h, w, C), float32
    "Apply transforms with given random parameters to stored images."
    pipeline = BatchedPipeline(
        transforms, dataset.mean, dataset.std, dataset.x_train.shape[1:3]
    )
    pixels = pack_pixels(torch.from_numpy(dataset.x_train))
    return pipeline.apply(pixels, indices, drawn).permute(0, 2, 3, 1).numpy()


def normalized(dataset: MyDataSet, index: int) -> np.ndarray:  # (H, W, C) float32
    "Normalize a stored image with albumentations."
    return A.Normalize(dataset.mean, dataset.std).apply(dataset.x_train[index])


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    "Check that two images agree to 1e-5."
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5


@pytest.fixture(scope="module")
def photos() -> Photographs:
    "Return tiles of photographs with CIFAR-10's normalization."
    return Photographs()


FIVE = torch.tensor([0, 7, 41, 7, 419])  # indices, one of them repeated


def test_normalize(photos):
    found = batch_of(photos, [], FIVE, [])
    for image, index in zip(found, FIVE.tolist(), strict=True):
        assert_close(image, normalized(photos, index))


def test_grayscale(photos):
    gray = torch.tensor([True, False, True, True, False])
    transform = A.ToGray(p=0.2)
    found = batch_of(photos, [transform], FIVE, [gray])
    for image, index, applied in zip(found, FIVE.tolist(), gray.tolist(), strict=True):
        expected = normalized(photos, index)
        assert_close(image, transform.apply(expected) if applied else expected)


@pytest.mark.parametrize("border", [REFLECT, CONSTANT])
@pytest.mark.parametrize(
    ("height", "width"), [(40, 40), (33, 32), (37, 60), (20, 20), (63, 63)]
)
def test_pad(photos, border, height, width):
    transform = A.PadIfNeeded(height, width, border_mode=border, fill=[0.5, -1.0, 2.0])
    found = batch_of(photos, [transform], FIVE, [torch.zeros(5, 0)])
    for image, index in zip(found, FIVE.tolist(), strict=True):
        assert_close(
            image, A.Compose([transform])(image=normalized(photos, index))["image"]
        )


CORNERS = list(itertools.product((0, 3, 8), (0, 5, 8)))


def test_crop_at_each_edge(photos):
    pad, crop = A.PadIfNeeded(40, 40, border_mode=REFLECT), A.RandomCrop(32, 32)
    indices = torch.arange(len(CORNERS))
    found = batch_of(
        photos, [pad, crop], indices, [torch.zeros(9, 0), torch.tensor(CORNERS)]
    )
    for image, index, (top, left) in zip(found, indices.tolist(), CORNERS, strict=True):
        padded = A.Compose([pad])(image=normalized(photos, index))["image"]
        window = (left, top, left + 32, top + 32)
        assert_close(image, crop.apply(padded, crop_coords=window, pad_params=None))


@pytest.mark.parametrize("kind", [A.HorizontalFlip, A.VerticalFlip])
def test_flip(photos, kind):
    flip = torch.tensor([[True], [False], [True], [False], [False]])
    found = batch_of(photos, [kind(p=0.5)], FIVE, [flip])
    for image, index, applied in zip(
        found, FIVE.tolist(), flip[:, 0].tolist(), strict=True
    ):
        expected = normalized(photos, index)
        assert_close(image, kind().apply(expected) if applied else expected)


@pytest.mark.parametrize("fill", [0, 1.5, (0.1, 0.2, 0.3)])
@pytest.mark.parametrize("p", [1, 0.5])
def test_cutout_at_each_edge(photos, fill, p):
    transform = A.CoarseDropout((1, 1), (8, 8), (5, 5), fill=fill, p=p)
    cutouts = [
        (0, 0, 1),
        (24, 27, 1),
        (0, 27, 1),
        (24, 0, 1),
        (11, 13, 1),
        (11, 13, p == 1),
    ]
    indices = torch.arange(len(cutouts))
    found = batch_of(photos, [transform], indices, [torch.tensor(cutouts).long()])
    for image, index, (top, left, applied) in zip(
        found, indices.tolist(), cutouts, strict=True
    ):
        expected = normalized(photos, index)
        if applied:
            box = np.array([[left, top, left + 5, top + 8]])
            expected = transform.apply(expected.copy(), box, seed=0)
        assert_close(image, expected)


def test_all_transforms_match_albumentations_given_the_same_random_numbers(photos):
    pipeline = BatchedPipeline(photos.augmentation, photos.mean, photos.std, (32, 32))
    indices = torch.arange(400)
    drawn = pipeline.draw(3, 5, indices)
    pixels = pack_pixels(torch.from_numpy(photos.x_train))
    found = pipeline.apply(pixels, indices, drawn).permute(0, 2, 3, 1).numpy()
    to_gray, pad, crop, mirror, dropout = photos.augmentation
    gray, _, corner, flip, cutout = (values.tolist() for values in drawn)
    extremes = {(0, 0), (8, 8), (0, 8), (8, 0)}
    assert {tuple(c) for c in corner} >= extremes  # the sample covers all corners
    for i in range(400):
        image = normalized(photos, i)
        image = to_gray.apply(image) if gray[i] else image
        image = A.Compose([pad])(image=image)["image"]
        top, left = corner[i]
        window = (left, top, left + 32, top + 32)
        image = crop.apply(image, crop_coords=window, pad_params=None)
        image = mirror.apply(image) if flip[i][0] else image
        top, left, _applied = cutout[i]
        box = np.array([[left, top, left + 8, top + 8]])
        assert_close(found[i], dropout.apply(image.copy(), box, seed=0))


class GrayDigits(MNIST):
    "Digits as grayscale images of one channel, with MNIST's augmentation."

    def load(self) -> Source:
        "Return the first channel of 50 digits."
        digits = Digits()
        x, y = digits.x_train[:50, ..., :1], digits.y_train[:50]
        return Source(x, y, x, y, classes=digits.classes)


@pytest.mark.parametrize("make", [Digits, GrayDigits])
def test_shifted_digits_are_padded_with_background(make):
    dataset = make(backend="batched")
    pad, crop = dataset.augmentation
    corners = torch.tensor([(0, 0), (4, 4), (0, 4), (2, 1)])
    drawn = [torch.zeros(4, 0), corners]
    found = batch_of(dataset, dataset.augmentation, torch.arange(4), drawn)
    for i, (top, left) in enumerate(corners.tolist()):
        padded = A.Compose([pad])(image=normalized(dataset, i))["image"]
        window = (left, top, left + 32, top + 32)
        expected = crop.apply(padded, crop_coords=window, pad_params=None)
        assert_close(found[i], expected.reshape(found[i].shape))


KINDS = ["digits", "photographs", pytest.param("cifar10", marks=needs_cifar10)]


@pytest.mark.parametrize("kind", KINDS)
def test_default_augmentations_use_the_batched_backend(kind):
    assert make_data(kind).backend == "batched"


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_image_equals_the_same_image_in_a_batch(kind):
    dataset = make_data(kind)
    images, labels = dataset.train_loader.dataset[3, dataset.train_indices]
    for position in (0, 1, 57, len(labels) - 1):
        image, label = dataset.sample(int(dataset.train_indices[position]), 3)
        assert torch.equal(image, images[position])
        assert label == labels[position]


def test_threads_and_order_do_not_change_the_pixels(photos):
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    samples, threads = photos.train_loader.dataset, torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        in_order, _ = samples[2, torch.arange(400)]
        torch.set_num_threads(2)
        shuffled, _ = samples[2, order]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(in_order[order], shuffled)


def test_batches_share_no_memory(photos):
    samples = photos.train_loader.dataset
    first, _ = samples[0, torch.arange(10)]
    second, _ = samples[0, torch.arange(10)]
    first.zero_()
    assert torch.equal(samples[0, torch.arange(10)][0], second)
    assert photos.x_train.any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_same_bits_as_the_cpu(photos):
    expected, _ = photos.train_loader.dataset[4, torch.arange(400)]
    on_cuda = Photographs().to("cuda")
    x, y = on_cuda.train_loader.dataset[4, torch.arange(400)]
    assert x.device.type == y.device.type == "cuda"
    assert torch.equal(x.cpu(), expected)
    assert torch.equal(on_cuda.sample(7, 4)[0], photos.sample(7, 4)[0])


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (A.ToGray(p=1), r"ToGray only with three channels \(got 1\)"),
        (
            A.CoarseDropout((1, 1), (8, 8), (8, 8), fill=(1, 2, 3)),
            r"CoarseDropout only with one fill value, or one per channel \(got 3\)",
        ),
        (
            A.PadIfNeeded(40, 40, fill=[1, 2, 3]),
            r"PadIfNeeded only with one fill value, or one per channel \(got 3\)",
        ),
    ],
)
def test_three_channel_transforms_are_rejected_for_one_channel(transform, message):
    with pytest.raises(ValueError, match=message):
        GrayDigits(augmentation=[transform], backend="batched")


def test_grayscale_after_a_flip():
    x = torch.from_numpy(Digits(limit=20, batch_size=20).x_train[:16]) // 2
    x[..., 1:] *= 0
    flip, gray = A.HorizontalFlip(p=0.5), A.ToGray(p=0.5)
    results = []
    for transforms in ([flip, gray], [gray, flip]):
        pipeline = BatchedPipeline(transforms, (0.0,) * 3, (1.0,) * 3, (32, 32))
        drawn = pipeline.draw(0, 0, torch.arange(16))
        results.append(pipeline.apply(pack_pixels(x), torch.arange(16), drawn))
    assert torch.equal(*results)
