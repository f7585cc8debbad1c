"""Random numbers: each one is a function of the seed, the epoch and the index of the sample."""

import itertools
import json
import random
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from pictures import Photographs, digest, make_data, needs_cifar10
from project import run_python
from scipy import stats
from torch import Tensor

from era_s10.augment import import_albumentations
from era_s10.datasets.cifar10 import cifar10_augmentation
from era_s10.datasets.generic import MyDataSet
from era_s10.model import Model
from era_s10.sources import Source
from era_s10.utils import set_seed

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

KINDS = ["digits", "photographs", pytest.param("cifar10", marks=needs_cifar10)]
ERRORS = 4  # allowed error of an estimate, in standard errors
P_VALUE = 1e-4  # a chi-square test fails below this p-value
BACKENDS = ("batched", "albumentations")


@pytest.fixture(
    params=["batched", pytest.param("albumentations", marks=pytest.mark.slow)],
    autouse=True,
    scope="module",
)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    "Run all tests of this file with each backend as the default of the data sets."
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(MyDataSet.__init__.__kwdefaults__, "backend", request.param)
        yield request.param


def epoch_of(
    dataset: MyDataSet,
    epoch: int,
) -> tuple[Tensor, Tensor]:  # all images and labels, in the order of the epoch
    "Read one epoch from the training loader."
    dataset.set_epoch(epoch)
    x, y = zip(*dataset.train_loader, strict=True)
    return torch.cat(x), torch.cat(y)


def epoch_digest(dataset: MyDataSet, epoch: int) -> str:
    "Return a digest of one epoch's pixels and labels."
    return digest(epoch_of(dataset, epoch))


# ---------------------------------------------------------------- workers, batches, processes


@pytest.mark.parametrize("kind", KINDS)
def test_workers_and_batch_size_do_not_change_the_pixels(kind):
    expected = [epoch_digest(make_data(kind), epoch) for epoch in (0, 1)]
    for workers, batch_size in ((0, 7), (1, 512), (2, 32), (4, 64)):
        dataset = make_data(kind, workers=workers, batch_size=batch_size)
        assert [epoch_digest(dataset, epoch) for epoch in (0, 1)] == expected, (
            workers,
            batch_size,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_sample_returns_the_images_of_the_loader(kind):
    dataset = make_data(kind, workers=2, batch_size=100, seed=5)
    x, y = epoch_of(dataset, 3)
    dataset.set_epoch(3)
    order = torch.cat([torch.as_tensor(i) for _, i in dataset.train_loader.sampler])
    assert sorted(order.tolist()) == dataset.train_indices.tolist()
    other = make_data(kind, seed=5)
    for position in (0, 1, 57, 399):
        image, label = other.sample(int(order[position]), 3)
        assert torch.equal(image, x[position])
        assert label == y[position]


def test_albumentations_backend_is_reproducible(backend):
    "A short version for the default run; the slow tests repeat this file with albumentations."
    options = {"backend": "albumentations", "seed": 5}
    dataset = make_data("photographs", workers=2, batch_size=100, **options)
    x, y = epoch_of(dataset, 3)
    assert digest((x, y)) == epoch_digest(
        make_data("photographs", batch_size=7, **options), 3
    )
    assert digest((x, y)) != epoch_digest(make_data("photographs", **options), 2)
    dataset.set_epoch(3)
    order = torch.cat([torch.as_tensor(i) for _, i in dataset.train_loader.sampler])
    image, label = make_data("photographs", **options).sample(int(order[57]), 3)
    assert torch.equal(image, x[57])
    assert label == y[57]


PROCESS = """
import json, sys
sys.path.insert(0, "tests")
from pictures import make_data
from test_randomness import epoch_digest
print(json.dumps([
    epoch_digest(make_data(kind, workers=workers, backend="BACKEND"), 1) for kind, workers in CASES
]))
"""


@pytest.mark.slow
def test_pixels_are_the_same_in_a_second_process(backend):
    cases = [("digits", 0), ("photographs", 0), ("photographs", 2)]
    expected = [epoch_digest(make_data(kind), 1) for kind, _ in cases]
    code = PROCESS.replace("CASES", repr(cases)).replace("BACKEND", backend)
    done = run_python(code, PYTHONHASHSEED="1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


@pytest.mark.slow
def test_pixels_are_the_same_in_a_spawned_worker():
    dataset = make_data("photographs", workers=1, batch_size=64)
    dataset.train_loader.multiprocessing_context = "spawn"
    assert epoch_digest(dataset, 1) == epoch_digest(make_data("photographs"), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_differ_between_epochs_and_seeds(kind):
    dataset = make_data(kind)
    indices = dataset.train_indices[:100].tolist()
    first = [dataset.sample(i, 0)[0] for i in indices]
    for other, epoch in ((dataset, 1), (make_data(kind, limit=None, seed=1), 0)):
        same = sum(
            torch.equal(a, other.sample(i, epoch)[0])
            for a, i in zip(first, indices, strict=True)
        )
        assert same <= 2


def test_each_pass_over_the_loader_is_the_next_epoch():
    dataset = make_data("photographs")
    passes = [digest(itertools.chain(*dataset.train_loader)) for _ in range(3)]
    assert len(set(passes)) == 3
    dataset.set_epoch(1)
    assert [digest(itertools.chain(*dataset.train_loader)) for _ in range(2)] == passes[
        1:
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_global_random_state_does_not_change_the_pixels(kind):
    expected = epoch_digest(make_data(kind), 0)
    for workers in (0, 2):
        random.seed(workers)
        np.random.seed(workers)
        torch.manual_seed(workers)
        dataset = make_data(kind, workers=workers)
        random.random(), np.random.random(3), torch.rand(5)
        assert epoch_digest(dataset, 0) == expected
        random.random(), np.random.random(), torch.rand(1)
        assert epoch_digest(dataset, 0) == expected


def test_data_sets_that_share_transforms_are_independent():
    expected = [epoch_digest(make_data("photographs", seed=seed), 0) for seed in (1, 2)]
    shared = cifar10_augmentation()
    first, second = (
        make_data("photographs", seed=s, augmentation=shared, batch_size=16)
        for s in (1, 2)
    )
    compose = import_albumentations().Compose(shared, seed=3)
    found = ([], [])
    for a, b in zip(first.train_loader, second.train_loader, strict=True):
        compose(image=first.x_train[0])
        found[0].append(a)
        found[1].append(b)
    for batches, expected_digest in zip(found, expected, strict=True):
        x, y = zip(*batches, strict=True)
        assert digest([torch.cat(x), torch.cat(y)]) == expected_digest


# ---------------------------------------------------------------- distributions, read back from the pixels


def marked_image() -> np.ndarray:  # (32, 32, 3) uint8
    "Make an image in which each pixel encodes its row and column, in color and in grayscale."
    rows, columns = np.mgrid[:32, :32]
    return np.stack(
        [20 + 7 * rows, 20 + 6 * columns, np.full_like(rows, 250)], -1
    ).astype(np.uint8)


class Marked(MyDataSet):
    "Copies of the marked image; the label of each copy is its index."

    mean, std = (0.0,) * 3, (1.0,) * 3
    n = 4000

    def load(self) -> Source:
        "Return the copies."
        x, y = np.broadcast_to(marked_image(), (self.n, 32, 32, 3)), np.arange(self.n)
        return Source(x, y, x[:1], y[:1], classes=tuple(map(str, y)))

    def default_augmentation(self) -> list:
        "Return CIFAR-10's augmentation."
        return cifar10_augmentation()


class Many(Marked):
    "25,000 copies: 50,000 samples in two epochs."

    n = 25_000


def decode(
    x: Tensor,  # the marked image, augmented (N, 3, 32, 32)
) -> dict[str, np.ndarray]:  # each random parameter, by its name (N,)
    "Recover the random parameters from the pixels, and check that they explain each pixel."
    x = x.permute(0, 2, 3, 1).numpy().astype(np.float64) * 255
    to_gray = np.array([0.299, 0.587, 0.114])
    source = marked_image().astype(np.float64)
    cutout = (x == 0).all(-1)
    assert (cutout.sum((1, 2)) == 64).all()
    top, left = cutout.any(2).argmax(1), cutout.any(1).argmax(1)
    gray = (np.ptp(x, axis=-1) < 1e-3).all((1, 2))

    # a pair of neighboring pixels outside the cutout: at most one of two pairs is covered
    pair = np.where(cutout[:, 12, 12:14].any(1), 21, 12)
    columns = []
    for step in (0, 1):
        pixel = x[np.arange(len(x)), 12, pair + step]
        gray_table = (source @ to_gray).reshape(-1)
        nearest = np.abs(pixel[:, :1] - gray_table).argmin(1)
        row = np.where(gray, nearest // 32, np.rint((pixel[:, 0] - 20) / 7)).astype(int)
        columns.append(
            np.where(gray, nearest % 32, np.rint((pixel[:, 1] - 20) / 6)).astype(int)
        )
    flip = columns[1] < columns[0]
    crop_row = row - 12 + 4
    crop_column = columns[0] - np.where(flip, 31 - pair, pair) + 4

    reflected = np.pad(np.arange(32), 4, mode="reflect")
    rows = reflected[crop_row[:, None] + np.arange(32)]
    columns = reflected[crop_column[:, None] + np.arange(32)]
    columns = np.where(flip[:, None], columns[:, ::-1], columns)
    expected = source[rows[:, :, None], columns[:, None, :]]
    expected = np.where(
        gray[:, None, None, None], (expected @ to_gray)[..., None], expected
    )
    square = np.zeros_like(cutout)
    for i in range(len(x)):
        square[i, top[i] : top[i] + 8, left[i] : left[i] + 8] = True
    expected[square] = 0
    assert np.abs(x - expected).max() < 1e-2
    return {
        "gray": gray, "flip": flip, "crop row": crop_row, "crop column": crop_column,
        "cutout row": top, "cutout column": left,
    }  # fmt: skip


@cache
def draws_of(backend: str) -> list[dict[str, np.ndarray]]:
    "Return the random parameters of two epochs, by sample index; raise on any warning."
    import_albumentations()
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = Many(backend=backend, batch_size=1000)
        for epoch in (0, 1):
            dataset.set_epoch(epoch)
            parts, labels = zip(
                *((decode(x), y) for x, y in dataset.train_loader), strict=True
            )
            order = torch.cat(labels).argsort().numpy()
            found.append(
                {n: np.concatenate([p[n] for p in parts])[order] for n in parts[0]}
            )
    return found


@pytest.fixture(scope="module")
def draws(backend) -> list[dict[str, np.ndarray]]:
    "Return the random parameters of two epochs."
    return draws_of(backend)


@pytest.fixture(scope="module")
def pooled(draws) -> dict[str, np.ndarray]:
    "Return the random parameters of both epochs, concatenated."
    return {name: np.concatenate([epoch[name] for epoch in draws]) for name in draws[0]}


def has_probability(
    events: np.ndarray,  # which samples have the event (N,) bool
    p: float,  # expected probability
) -> bool:
    "Check that the frequency of an event is within a few standard errors of its probability."
    return abs(events.mean() - p) < ERRORS * np.sqrt(p * (1 - p) / len(events))


def test_probability_of_grayscale_and_flip(pooled):
    assert has_probability(pooled["gray"], 0.2)
    assert has_probability(pooled["flip"], 0.5)


def test_crops_and_cutouts_are_uniform(pooled):
    crops = np.bincount(9 * pooled["crop row"] + pooled["crop column"], minlength=81)
    cutouts = np.bincount(
        25 * pooled["cutout row"] + pooled["cutout column"], minlength=625
    )
    assert len(crops) == 81
    assert len(cutouts) == 625
    for counts in (crops, cutouts):
        assert stats.chisquare(counts).pvalue > P_VALUE
    for name in ("crop row", "crop column", "cutout row", "cutout column"):
        assert stats.chisquare(np.bincount(pooled[name])).pvalue > P_VALUE, name


@pytest.mark.slow
def test_backends_draw_from_the_same_distributions():
    found = [
        {
            name: np.concatenate([epoch[name] for epoch in draws_of(backend)])
            for name in NAMES
        }
        for backend in BACKENDS
    ]
    assert [len(draws["gray"]) for draws in found] == [50_000, 50_000]
    pairs = ("crop row", "crop column", 9), ("cutout row", "cutout column", 25)
    for row, column, side in pairs:
        for draws in found:
            draws[f"{row} and column"] = draws[row] * side + draws[column]
    for name in found[0]:
        bins = int(max(draws[name].max() for draws in found)) + 1
        table = np.stack(
            [np.bincount(draws[name].astype(int), minlength=bins) for draws in found]
        )
        assert stats.chi2_contingency(table).pvalue > P_VALUE, name


def test_flip_and_grayscale_are_independent(pooled):
    assert has_probability(pooled["flip"][pooled["gray"]], 0.5)
    assert has_probability(pooled["flip"][~pooled["gray"]], 0.5)
    assert has_probability(pooled["gray"][pooled["flip"]], 0.2)


NAMES = ("gray", "flip", "crop row", "crop column", "cutout row", "cutout column")


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(NAMES, 2)))
def test_parameters_of_a_sample_are_independent(pooled, one, other):
    a, b = pooled[one].astype(float), pooled[other].astype(float)
    assert abs(np.corrcoef(a, b)[0, 1]) < ERRORS / np.sqrt(len(a))
    table = np.zeros((int(a.max()) + 1, int(b.max()) + 1))
    np.add.at(table, (a.astype(int), b.astype(int)), 1)
    assert stats.chi2_contingency(table).pvalue > P_VALUE


@pytest.mark.parametrize("name", NAMES)
def test_samples_and_epochs_are_independent(draws, name):
    first, second = (epoch[name].astype(float) for epoch in draws)
    for a, b in ((first, second), (first[:-1], first[1:]), (first[:-1], second[1:])):
        assert abs(np.corrcoef(a, b)[0, 1]) < ERRORS / np.sqrt(len(a))


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_do_not_repeat_each_other(workers):
    dataset = Marked(workers=workers, batch_size=64, limit=512)
    batches = [x for x, _ in dataset.train_loader]
    assert len({digest([x]) for x in batches}) == len(batches)
    distinct = {digest([image]) for x in batches for image in x}
    assert len(distinct) >= 508  # a few repeats occur by chance
    for a, b in itertools.pairwise(batches):
        assert sum(torch.equal(i, j) for i, j in zip(a, b, strict=True)) <= 1


# ---------------------------------------------------------------- order


def orders(**options) -> list[list[int]]:
    "Return the order of the samples in three epochs; the labels of `Marked` are its indices."
    dataset = Marked(augmentation=[], **options)
    return [epoch_of(dataset, epoch)[1].tolist() for epoch in range(3)]


def test_order_depends_only_on_seed_and_epoch():
    expected = orders()
    assert all(sorted(order) == list(range(Marked.n)) for order in expected)
    for a, b in itertools.combinations([*expected, *orders(seed=1)], 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < ERRORS / np.sqrt(Marked.n)
        assert sum(i == j for i, j in zip(a, b, strict=True)) < 10
    torch.manual_seed(9)
    assert orders(batch_size=37, workers=2) == expected


class Paired(Marked):
    "Copies of the marked image; two of each class, so that one may be set aside."

    def load(self) -> Source:
        "Return the copies."
        source = super().load()
        return replace(source, y_train=source.y_train // 2)


@pytest.mark.parametrize("subset", [{"limit": 700}, {"validation": 0.3}])
def test_a_subset_keeps_order_and_pixels(subset):
    kind = Paired if "validation" in subset else Marked
    complete, part = kind(), kind(**subset)
    chosen = set(part.train_indices.tolist())
    assert 0 < len(chosen) < kind.n
    orders = []
    for dataset in (complete, part):
        dataset.set_epoch(1)
        batches = list(dataset.train_loader.sampler)
        orders.append([int(i) for _, indices in batches for i in indices])
    kept = torch.tensor([i in chosen for i in orders[0]])
    assert orders[1] == [i for i in orders[0] if i in chosen]
    (x, y), (all_x, all_y) = epoch_of(part, 1), epoch_of(complete, 1)
    assert torch.equal(y, all_y[kept])
    assert torch.equal(x, all_x[kept])


def test_validation_and_test_images_are_not_augmented():
    dataset = Photographs(validation=0.2)
    mean, std = (np.array(values, np.float32) for values in (dataset.mean, dataset.std))
    images_of = {
        "validation": dataset.x_train[dataset.validation_indices],
        "test": dataset.x_test,
    }
    for part, images in images_of.items():
        x = torch.cat([x for x, _ in getattr(dataset, f"{part}_loader")])
        expected = torch.from_numpy((images / np.float32(255) - mean) / std)
        expected = expected.permute(0, 3, 1, 2)
        torch.testing.assert_close(x, expected, atol=1e-5, rtol=0)


# ---------------------------------------------------------------- weights and dropout


def weights(model: torch.nn.Module) -> Iterable[Tensor]:
    "Return parameters and buffers."
    return model.state_dict().values()


def test_initial_weights_depend_only_on_the_seed():
    found = []
    for seed in (0, 1, 0):
        torch.rand(seed + 3)
        set_seed(seed)
        found.append(digest(weights(Model(4))))
    assert found[0] == found[2] != found[1]


TRAINING = """
import random, sys
sys.path.insert(0, "tests")
import numpy, torch
from era_s10.backprop import Experiment
from era_s10.model import Model
from era_s10.recipe import Config
from era_s10.utils import set_seed
from pictures import digest, make_data
from test_randomness import weights

set_seed(3)
model = Model(2, dropout=0.3)
dataset = make_data("digits", limit=100, batch_size=32, workers=WORKERS, backend="BACKEND")
experiment = Experiment(model, dataset, Config(max_lr=0.01, device="cpu"))
for module in (random, numpy.random):  # the global random state must not matter
    module.seed(GLOBAL_SEED)
torch.manual_seed(GLOBAL_SEED)
history = experiment.run(epochs=2)
print()
print("ends", digest(weights(model)), [[r["train_loss"], r["test_loss"]] for r in history])
"""


def test_a_run_repeats_bit_for_bit_in_a_different_process(backend):
    training = TRAINING.replace("BACKEND", backend)
    codes = [
        training.replace("WORKERS", str(workers)).replace("GLOBAL_SEED", str(seed))
        for workers, seed in ((0, 1), (2, 7))
    ]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(partial(run_python, OMP_NUM_THREADS="1"), codes))
    found = [process.stdout.rpartition("ends")[2] for process in done]
    assert found[0], done[0].stderr
    assert found[0] == found[1], done[1].stderr
