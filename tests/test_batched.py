"""The batched backend: it makes the pixels of albumentations, from the sample's own random numbers."""

import itertools

import numpy as np
import pytest
import torch
from pictures import Photographs, make_data, needs_cifar10
from torch import Tensor

from era_s10.augment import (
    AUGMENTATIONS,
    SeededPipeline,
    import_albumentations,
    make_augmentation,
    needs_stored_pixels,
    sample_keys,
)
from era_s10.batched import BatchedPipeline, pack_pixels
from era_s10.datasets.cifar10 import cifar10_augmentation
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


@pytest.fixture(scope="module")
def photos_one_by_one() -> Photographs:
    "Return the same dataset with the backend that runs every transform."
    return Photographs(backend="albumentations")


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


# ---------------------------------------------------------------- augmentation by name


class Sized(MyDataSet):
    "Twelve images of random pixels in one size."

    shape = (40, 64, 3)

    def load(self) -> Source:
        "Draw the pixels."
        x = np.random.default_rng(0).integers(0, 256, (12, *self.shape), dtype=np.uint8)
        return Source(x, np.arange(12) % 2, x, np.arange(12) % 2, classes=("a", "b"))


class SizedGray(Sized):
    "Twelve grayscale images of an odd size."

    shape = (33, 35, 1)


def apply_drawn(image: np.ndarray, transform, drawn: list) -> np.ndarray:
    "Apply a transform of albumentations with the random numbers of the batched backend."
    if isinstance(transform, A.PadIfNeeded):
        return A.Compose([transform])(image=image)["image"]
    if isinstance(transform, A.RandomCrop):
        (top, left), (height, width) = drawn, (transform.height, transform.width)
        window = (left, top, left + width, top + height)
        return transform.apply(image, crop_coords=window, pad_params=None)
    if isinstance(transform, A.CoarseDropout):
        top, left, _applied = drawn
        height, width = transform.hole_height_range[0], transform.hole_width_range[0]
        box = np.array([[left, top, left + width, top + height]])
        return transform.apply(image.copy(), box, seed=0)
    return transform.apply(image) if np.all(drawn) else image


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("kind", [Sized, SizedGray])
def test_a_named_augmentation_gives_the_same_pixels_in_both_backends(kind, name):
    dataset = kind(augmentation=name)
    assert dataset.backend == "batched"
    indices = torch.arange(12)
    size = dataset.shape[:2]
    pipeline = BatchedPipeline(dataset.augmentation, dataset.mean, dataset.std, size)
    drawn = pipeline.draw(0, 3, indices)
    found = batch_of(dataset, dataset.augmentation, indices, drawn)
    for i in range(12):
        image = normalized(dataset, i).reshape(dataset.shape)
        for transform, values in zip(dataset.augmentation, drawn, strict=True):
            image = apply_drawn(image, transform, values[i].tolist())
        assert_close(found[i], image.reshape(dataset.shape))
    slow = kind(augmentation=name, backend="albumentations")
    assert slow.sample(5, 3)[0].shape == dataset.sample(5, 3)[0].shape
    assert torch.equal(
        slow.sample(5, 3)[0],
        kind(augmentation=name, backend="albumentations").sample(5, 3)[0],
    )


@pytest.mark.parametrize(("side", "pad", "hole"), [(32, 4, 8), (64, 8, 16), (224, 28, 56), (33, 4, 8)])  # fmt: skip
def test_shift_and_cutout_are_in_proportion_to_the_image(side, pad, hole):
    _gray, padding, crop, _flip, cutout = make_augmentation("cifar10", (side, 2 * side))
    assert (padding.min_height, crop.height) == (side + 2 * pad, side)
    assert padding.min_width - crop.width in (4 * pad, 4 * pad + 2)  # rounded
    assert cutout.hole_height_range == (hole, hole)


def test_the_augmentation_of_cifar10_by_name_is_the_one_of_the_dataset():
    assert repr(make_augmentation("cifar10")) == repr(cifar10_augmentation())
    by_name = Digits(limit=20, augmentation="cifar10")
    by_list = Digits(limit=20, augmentation=cifar10_augmentation())
    i = int(by_name.train_indices[0])
    assert torch.equal(by_name.sample(i, 2)[0], by_list.sample(i, 2)[0])


# ---------------------------------------------------------------- transforms before Normalize

PIXEL_TRANSFORMS = [
    A.AutoContrast(p=1),
    A.CLAHE(p=1),
    A.ColorJitter(p=1),
    A.CoarseDropout(fill="random", p=1),
    A.Equalize(p=1),
    A.GaussNoise(p=1),
    A.GaussianBlur(p=1),
    A.HueSaturationValue(p=1),
    A.ImageCompression(p=1),
    A.InvertImg(p=1),
    A.MedianBlur(p=1),
    A.PixelDropout(drop_value=None, p=1),
    A.Posterize(p=1),
    A.RandomBrightnessContrast(p=1),
    A.RandomGamma(p=1),
    A.RGBShift(p=1),
    A.SaltAndPepper(p=1),
    A.Sharpen(p=1),
    A.Solarize(p=1),
    A.ToGray(method="from_lab", p=1),
    A.OneOf([A.ColorJitter(p=1), A.GaussNoise(p=1)], p=1),
    A.Sequential([A.Posterize(p=1), A.Rotate(p=1)], p=1),
]


@pytest.mark.parametrize("transform", PIXEL_TRANSFORMS, ids=lambda t: type(t).__name__)
def test_a_pixel_transform_sees_the_stored_pixels(photos_one_by_one, transform):
    flip = A.HorizontalFlip(p=1)
    dataset = photos_one_by_one.with_augmentation([flip, transform])
    assert [type(t) for t in dataset.train_transforms.transforms] == [
        type(transform), A.Normalize, A.HorizontalFlip, A.pytorch.ToTensorV2,
    ]  # fmt: skip
    pipeline = SeededPipeline(A.Compose([transform]))
    for i in (0, 7, 41):
        key = sample_keys(dataset.seed, 2, torch.tensor([i]))[0]
        pixels = pipeline(dataset.x_train[i], key)
        assert pixels.dtype == np.uint8
        expected = A.Normalize(dataset.mean, dataset.std).apply(pixels)[:, ::-1]
        assert_close(dataset.sample(i, 2)[0].permute(1, 2, 0).numpy(), expected)


AFTER = [A.ToGray(p=1), A.ChannelShuffle(p=1), A.ChannelDropout(p=1), A.Blur(p=1), A.Rotate(p=1), A.CoarseDropout(p=1), A.GridDropout(p=1), A.Affine(p=1), A.RandomGridShuffle(p=1)]  # fmt: skip


@pytest.mark.parametrize("transform", AFTER, ids=lambda t: type(t).__name__)
def test_other_transforms_still_see_normalized_pixels(photos_one_by_one, transform):
    dataset = photos_one_by_one.with_augmentation([transform])
    normalize = A.Normalize(dataset.mean, dataset.std)
    to_tensor = A.pytorch.ToTensorV2()
    pipeline = SeededPipeline(A.Compose([normalize, transform, to_tensor]))
    for i in (0, 41):
        key = sample_keys(dataset.seed, 2, torch.tensor([i]))[0]
        assert torch.equal(dataset.sample(i, 2)[0], pipeline(dataset.x_train[i], key))


def in_range(transform, scale: float, shift: float) -> np.ndarray:
    "Transform the same image in another range of values, and convert the result back."
    x = np.random.default_rng(0).random((32, 32, 3), dtype=np.float32)
    x = (scale * x + shift).astype(np.float32)
    return (A.Compose([transform], seed=3)(image=x)["image"] - shift) / scale


def pixel_transforms() -> list:
    "Return one transform of each class of albumentations that changes only pixels."
    import inspect

    found = []
    for kind in vars(A).values():
        if inspect.isclass(kind) and issubclass(kind, A.ImageOnlyTransform):
            try:
                found.append(kind(p=1))
            except (TypeError, ValueError):  # it needs arguments
                continue
    return found


def test_each_pixel_transform_after_normalize_works_in_any_range():
    kept = [t for t in pixel_transforms() if not needs_stored_pixels(t)]
    names = {type(t).__name__ for t in kept}
    assert {"ToGray", "ChannelShuffle", "Blur"} <= names
    for transform in kept:
        if not isinstance(transform, A.ChannelDropout):  # 0 is the mean color
            found = in_range(transform, 4, -2), in_range(transform, 1, 0)
            assert np.abs(found[0] - found[1]).max() < 1e-5, transform
    assert sum(needs_stored_pixels(t) for t in pixel_transforms()) > 40
