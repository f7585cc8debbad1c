"""What guards the one rule of chance: every draw is a function of (seed, epoch, sample index)."""

import itertools
import json
import random
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
ERRORS = 4  # Standard errors that an estimate may be off
P_VALUE = 1e-4  # A chi-square test fails below it
EXECUTORS = ("batched", "albumentations")


@pytest.fixture(
    params=["batched", pytest.param("albumentations", marks=pytest.mark.slow)],
    autouse=True,
    scope="module",
)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    "Let the data sets of this file have each backend in turn."
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(MyDataSet.__init__.__kwdefaults__, "backend", request.param)
        yield request.param


def epoch_of(
    dataset: MyDataSet,
    epoch: int,
) -> tuple[Tensor, Tensor]:  # x and y of the whole epoch, in its order
    "Read one epoch through the loader."
    dataset.set_epoch(epoch)
    x, y = zip(*dataset.train_loader, strict=True)
    return torch.cat(x), torch.cat(y)


def epoch_digest(dataset: MyDataSet, epoch: int) -> str:
    "Digest one epoch's pixels and labels."
    return digest(epoch_of(dataset, epoch))


# ---------------------------------------------------------------- workers, batches, processes


@pytest.mark.parametrize("kind", KINDS)
def test_neither_workers_nor_batches_change_a_pixel(kind):
    expected = [epoch_digest(make_data(kind), epoch) for epoch in (0, 1)]
    for workers, batch_size in ((0, 7), (1, 512), (2, 32), (4, 64)):
        dataset = make_data(kind, workers=workers, batch_size=batch_size)
        assert [epoch_digest(dataset, epoch) for epoch in (0, 1)] == expected, (
            workers,
            batch_size,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_each_pixel_is_what_sample_says(kind):
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


def test_albumentations_keep_the_rule_too(backend):
    "In short: all other tests of this file are repeated with them where there is time."
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
    epoch_digest(make_data(kind, workers=workers, backend="EXECUTOR"), 1) for kind, workers in CASES
]))
"""


def test_a_second_process_gives_the_same_pixels(backend):
    cases = [("digits", 0), ("photographs", 0), ("photographs", 2)]
    expected = [epoch_digest(make_data(kind), 1) for kind, _ in cases]
    code = PROCESS.replace("CASES", repr(cases)).replace("EXECUTOR", backend)
    done = run_python(code, PYTHONHASHSEED="1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


def test_a_worker_that_starts_from_nothing_gives_the_same_pixels():
    dataset = make_data("photographs", workers=1, batch_size=64)
    dataset.train_loader.multiprocessing_context = "spawn"
    assert epoch_digest(dataset, 1) == epoch_digest(make_data("photographs"), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_and_seeds_differ(kind):
    dataset = make_data(kind)
    indices = dataset.train_indices[:100].tolist()
    first = [dataset.sample(i, 0)[0] for i in indices]
    for other, epoch in ((dataset, 1), (make_data(kind, limit=None, seed=1), 0)):
        same = sum(
            torch.equal(a, other.sample(i, epoch)[0])
            for a, i in zip(first, indices, strict=True)
        )
        assert same <= 2


def test_each_pass_is_the_next_epoch():
    dataset = make_data("photographs")
    passes = [digest(itertools.chain(*dataset.train_loader)) for _ in range(3)]
    assert len(set(passes)) == 3
    dataset.set_epoch(1)
    assert [digest(itertools.chain(*dataset.train_loader)) for _ in range(2)] == passes[
        1:
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_random_numbers_of_the_user_change_nothing(kind):
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


def test_a_shared_list_of_transforms_is_not_disturbed():
    expected = [epoch_digest(make_data("photographs", seed=seed), 0) for seed in (1, 2)]
    shared = cifar10_augmentation()
    first, second = (
        make_data("photographs", seed=s, augmentation=shared, batch_size=16)
        for s in (1, 2)
    )
    compose = import_albumentations().Compose(shared, seed=3)
    got = ([], [])
    for a, b in zip(first.train_loader, second.train_loader, strict=True):
        compose(image=first.x_train[0])
        got[0].append(a)
        got[1].append(b)
    for batches, digested in zip(got, expected, strict=True):
        x, y = zip(*batches, strict=True)
        assert digest([torch.cat(x), torch.cat(y)]) == digested


# ---------------------------------------------------------------- a marked image


def marked_image() -> np.ndarray:  # (32, 32, 3) uint8
    "Make an image whose every pixel tells its row and column, in colour and in gray."
    rows, columns = np.mgrid[:32, :32]
    return np.stack(
        [20 + 7 * rows, 20 + 6 * columns, np.full_like(rows, 250)], -1
    ).astype(np.uint8)


class Marked(MyDataSet):
    "The same marked image many times; each label is its own index."

    mean, std = (0.0,) * 3, (1.0,) * 3
    n = 4000

    def load(self) -> Source:
        "Repeat the image."
        x, y = np.broadcast_to(marked_image(), (self.n, 32, 32, 3)), np.arange(self.n)
        return Source(x, y, x[:1], y[:1], classes=tuple(map(str, y)))

    def default_augmentation(self) -> list:
        "Return CIFAR-10's."
        return cifar10_augmentation()


class Many(Marked):
    "Enough of them for 50,000 draws in two epochs."

    n = 25_000


def decode(
    x: Tensor,  # (N, 3, 32, 32), the marked image augmented
) -> dict[
    str, np.ndarray
]:  # What was drawn for each; the hole is found as the pixels of value 0
    "Read the draws back from the pixels, and check that they explain every one of them."
    x = x.permute(0, 2, 3, 1).numpy().astype(np.float64) * 255
    to_gray = np.array([0.299, 0.587, 0.114])
    source = marked_image().astype(np.float64)
    hole = (x == 0).all(-1)
    assert (hole.sum((1, 2)) == 64).all()
    top, left = hole.any(2).argmax(1), hole.any(1).argmax(1)
    gray = (np.ptp(x, axis=-1) < 1e-3).all((1, 2))

    # Two pairs of neighbours, too far apart for one hole to touch both
    pair = np.where(hole[:, 12, 12:14].any(1), 21, 12)
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
    square = np.zeros_like(hole)
    for i in range(len(x)):
        square[i, top[i] : top[i] + 8, left[i] : left[i] + 8] = True
    expected[square] = 0
    assert np.abs(x - expected).max() < 1e-2
    return {
        "gray": gray, "flip": flip, "crop row": crop_row, "crop column": crop_column,
        "hole row": top, "hole column": left,
    }  # fmt: skip


@cache
def drawn_by(backend: str) -> list[dict[str, np.ndarray]]:
    "Draw two epochs through the loader, by sample index; a warning of albumentations is an error."
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
    "The draws of two epochs."
    return drawn_by(backend)


@pytest.fixture(scope="module")
def pooled(draws) -> dict[str, np.ndarray]:
    "The draws of both epochs, one after the other."
    return {name: np.concatenate([epoch[name] for epoch in draws]) for name in draws[0]}


def share_is(
    events: np.ndarray,  # (N,) of bool
    share: float,
) -> bool:
    "Whether the share of events is right, within its standard errors."
    return abs(events.mean() - share) < ERRORS * np.sqrt(
        share * (1 - share) / len(events)
    )


def test_gray_and_flip_come_at_their_rates(pooled):
    assert share_is(pooled["gray"], 0.2)
    assert share_is(pooled["flip"], 0.5)


def test_every_crop_and_every_hole_is_as_likely_as_any_other(pooled):
    crops = np.bincount(9 * pooled["crop row"] + pooled["crop column"], minlength=81)
    holes = np.bincount(25 * pooled["hole row"] + pooled["hole column"], minlength=625)
    assert len(crops) == 81
    assert len(holes) == 625
    for counts in (crops, holes):
        assert stats.chisquare(counts).pvalue > P_VALUE
    for name in ("crop row", "crop column", "hole row", "hole column"):
        assert stats.chisquare(np.bincount(pooled[name])).pvalue > P_VALUE, name


@pytest.mark.slow
def test_the_two_executors_agree_on_every_rate():
    one, other = (
        {
            name: np.concatenate([epoch[name] for epoch in drawn_by(which)])
            for name in NAMES
        }
        for which in EXECUTORS
    )
    assert len(one["gray"]) == len(other["gray"]) == 50_000
    pairs = ("crop row", "crop column", 9), ("hole row", "hole column", 25)
    for row, column, side in pairs:
        for which in (one, other):
            which[f"{row} and column"] = which[row] * side + which[column]
    for name in one:
        bins = int(max(one[name].max(), other[name].max())) + 1
        table = np.stack(
            [
                np.bincount(which[name].astype(int), minlength=bins)
                for which in (one, other)
            ]
        )
        assert stats.chi2_contingency(table).pvalue > P_VALUE, name


def test_flip_is_as_likely_in_gray_as_in_colour(pooled):
    assert share_is(pooled["flip"][pooled["gray"]], 0.5)
    assert share_is(pooled["flip"][~pooled["gray"]], 0.5)
    assert share_is(pooled["gray"][pooled["flip"]], 0.2)


NAMES = ("gray", "flip", "crop row", "crop column", "hole row", "hole column")


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(NAMES, 2)))
def test_the_draws_of_a_sample_are_independent(pooled, one, other):
    a, b = pooled[one].astype(float), pooled[other].astype(float)
    assert abs(np.corrcoef(a, b)[0, 1]) < ERRORS / np.sqrt(len(a))
    table = np.zeros((int(a.max()) + 1, int(b.max()) + 1))
    np.add.at(table, (a.astype(int), b.astype(int)), 1)
    assert stats.chi2_contingency(table).pvalue > P_VALUE


@pytest.mark.parametrize("name", NAMES)
def test_the_draws_of_samples_and_of_epochs_are_independent(draws, name):
    first, second = (epoch[name].astype(float) for epoch in draws)
    for a, b in ((first, second), (first[:-1], first[1:]), (first[:-1], second[1:])):
        assert abs(np.corrcoef(a, b)[0, 1]) < ERRORS / np.sqrt(len(a))


@pytest.mark.parametrize("workers", [2, 4])
def test_two_workers_never_repeat_each_other(workers):
    dataset = Marked(workers=workers, batch_size=64, limit=512)
    batches = [x for x, _ in dataset.train_loader]
    assert len({digest([x]) for x in batches}) == len(batches)
    assert (
        len({digest([image]) for x in batches for image in x}) >= 508
    )  # Chance repeats one in two
    for a, b in itertools.pairwise(batches):
        assert sum(torch.equal(i, j) for i, j in zip(a, b, strict=True)) <= 1


# ---------------------------------------------------------------- order


def orders(**options) -> list[list[int]]:
    "Read the order of three epochs through the loader of a data set whose labels are its indices."
    dataset = Marked(augmentation=[], **options)
    return [epoch_of(dataset, epoch)[1].tolist() for epoch in range(3)]


def test_the_order_depends_on_seed_and_epoch_alone():
    expected = orders()
    assert all(sorted(order) == list(range(Marked.n)) for order in expected)
    for a, b in itertools.combinations([*expected, *orders(seed=1)], 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < ERRORS / np.sqrt(Marked.n)
        assert sum(i == j for i, j in zip(a, b, strict=True)) < 10
    torch.manual_seed(9)
    assert orders(batch_size=37, workers=2) == expected


@pytest.mark.parametrize("subset", [{"limit": 700}, {"validation": 0.3}])
def test_a_subset_keeps_the_order_and_the_pixels_of_the_whole(subset):
    whole, part = Marked(), Marked(**subset)
    chosen = set(part.train_indices.tolist())
    assert 0 < len(chosen) < Marked.n
    x, y = epoch_of(part, 1)
    all_x, all_y = epoch_of(whole, 1)
    kept = torch.tensor([label in chosen for label in all_y.tolist()])
    assert torch.equal(y, all_y[kept])
    assert torch.equal(x, all_x[kept])


def test_validation_and_test_images_are_not_augmented():
    dataset = Photographs(validation=0.2)
    mean, std = (np.array(values, np.float32) for values in (dataset.mean, dataset.std))
    held = {
        "validation": dataset.x_train[dataset.validation_indices],
        "test": dataset.x_test,
    }
    for part, images in held.items():
        x = torch.cat([x for x, _ in getattr(dataset, f"{part}_loader")])
        by_hand = torch.from_numpy((images / np.float32(255) - mean) / std).permute(
            0, 3, 1, 2
        )
        torch.testing.assert_close(x, by_hand, atol=1e-5, rtol=0)


# ---------------------------------------------------------------- weights and dropout


def weights(model: torch.nn.Module) -> Iterable[Tensor]:
    "List parameters and buffers."
    return model.state_dict().values()


def test_the_seed_decides_the_initial_weights():
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
dataset = make_data("digits", limit=100, batch_size=32, workers=WORKERS, backend="EXECUTOR")
experiment = Experiment(model, dataset, Config(max_lr=0.01, device="cpu"))
for module in (random, numpy.random):  # what a user may draw, or not
    module.seed(CHANCE)
torch.manual_seed(CHANCE)
history = experiment.run(epochs=2)
print()
print("ends", digest(weights(model)), [[r["train_loss"], r["test_loss"]] for r in history])
"""


def test_a_whole_run_repeats_to_the_last_bit_in_another_process(backend):
    training = TRAINING.replace("EXECUTOR", backend)
    codes = [
        training.replace("WORKERS", str(workers)).replace("CHANCE", str(chance))
        for workers, chance in ((0, 1), (2, 7))
    ]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(partial(run_python, OMP_NUM_THREADS="1"), codes))
    found = [process.stdout.rpartition("ends")[2] for process in done]
    assert found[0], done[0].stderr
    assert found[0] == found[1], done[1].stderr
