"""What guards the way in: wrong input is named in one sentence, before anything is trained or written."""

import gzip
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import (
    files,
    python2_pickle,
    small_cifar10,
    write_batches,
    write_npz,
    write_tree,
)
from project import ROOT, run_python
from torch import nn

from era_s10.augment import import_albumentations
from era_s10.backprop import Experiment
from era_s10.datasets.cifar10 import CIFAR10
from era_s10.datasets.digits import Digits
from era_s10.datasets.generic import MyDataSet
from era_s10.datasets.mnist import MNIST
from era_s10.model import Model
from era_s10.recipe import Config
from era_s10.results import plot_history
from era_s10.run_folder import History, draw_misclassified
from era_s10.utils import get_device, set_seed
from era_s10.weights import load_weights, save_weights

pytestmark = pytest.mark.usefixtures("any_images")


@dataclass
class Case:
    "A wrong call, and what its message must name."

    name: str
    call: Callable[
        [Path], object
    ]  # Given a folder of its own, which is the current one too
    named: tuple[str, ...]  # What the message names
    kind: type[Exception] = ValueError
    prepare: Callable[[Path], object] = lambda folder: (
        None
    )  # Puts files into the folder


def check(case: Case, folder: Path) -> None:
    "Make the call, look at its message, and see that nothing was written or drawn."
    case.prepare(folder)
    before = {name: (folder / name).stat().st_mtime_ns for name in files(folder)}
    state = torch.get_rng_state()
    with pytest.raises(case.kind) as raised:
        case.call(folder)
    assert type(raised.value) is not UnboundLocalError
    text = str(raised.value)
    assert text.strip()
    assert "\n" not in text
    assert len(text) < 600
    for named in case.named:
        assert named in text, text
    assert {
        name: (folder / name).stat().st_mtime_ns for name in files(folder)
    } == before
    assert torch.equal(torch.get_rng_state(), state)


def cases(*listed: Case) -> pytest.MarkDecorator:
    "Make a test of each case."
    return pytest.mark.parametrize("case", listed, ids=[case.name for case in listed])


@pytest.fixture
def here(monkeypatch, tmp_path) -> Path:
    "A folder of this test, and the current one."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ERA_S10_DATA", raising=False)
    return tmp_path


# ---------------------------------------------------------------- arguments of a data set


def digits(**options) -> Callable[[Path], Digits]:
    "Return a call that makes the digits with some options."
    return lambda folder: Digits(**options)


def with_transforms(*names: str) -> Callable[[Path], Digits]:
    "Return a call that makes the digits with some transforms of albumentations."

    def call(folder: Path) -> Digits:
        A = import_albumentations()
        kinds = {"Normalize": A.Normalize, "ToTensorV2": A.pytorch.ToTensorV2}
        return Digits(augmentation=[kinds[name]() for name in names])

    return call


@cases(
    Case("no images in a batch", digits(batch_size=0), ("batch_size", "0")),
    Case("fewer", digits(batch_size=-3), ("batch_size", "-3")),
    Case("half an image", digits(batch_size=2.5), ("batch_size", "2.5")),
    Case("a batch in words", digits(batch_size="8"), ("batch_size", "'8'")),
    Case("a batch of True", digits(batch_size=True), ("batch_size", "True")),
    Case("a batch of None", digits(batch_size=None), ("batch_size", "None")),
    Case("fewer than no workers", digits(workers=-1), ("workers", "-1")),
    Case("workers in words", digits(workers="two"), ("workers", "two")),
    Case("a negative seed", digits(seed=-1), ("seed", "-1")),
    Case("a broken seed", digits(seed=0.5), ("seed", "0.5")),
    Case("no seed", digits(seed=None), ("seed", "None")),
    Case("all for validation", digits(validation=1.0), ("validation", "1.0")),
    Case("images for validation", digits(validation=200), ("validation", "200")),
    Case("less than none", digits(validation=-0.1), ("validation", "-0.1")),
    Case("validation by nan", digits(validation=float("nan")), ("validation", "nan")),
    Case("validation in words", digits(validation="some"), ("validation", "some")),
    Case("validation None", digits(validation=None), ("validation", "None")),
    Case("too small a share", digits(validation=1e-6), ("validation", "1e-06")),
    Case("no images", digits(limit=0), ("limit", "0")),
    Case("more than there are", digits(limit=1438), ("1438", "1437")),
    Case("half the images", digits(limit=0.5), ("limit", "0.5")),
    Case(
        "a transform in words", digits(augmentation=["flip"]), ("augmentation", "flip")
    ),
    Case("one transform, no list", digits(augmentation=7), ("augmentation", "7")),
    Case("a function", digits(augmentation=[abs]), ("augmentation", "abs")),
    Case(
        "normalised twice", with_transforms("Normalize"), ("augmentation", "Normalize")
    ),
    Case(
        "a tensor twice", with_transforms("ToTensorV2"), ("augmentation", "ToTensorV2")
    ),
    Case("a negative epoch", lambda f: Digits().set_epoch(-1), ("epoch", "-1")),
    Case("half an epoch", lambda f: Digits().set_epoch(0.5), ("epoch", "0.5")),
    Case(
        "a sample of a negative epoch",
        lambda f: Digits().sample(0, -1),
        ("epoch", "-1"),
    ),
    Case(
        "a sample that is not there",
        lambda f: Digits().sample(1437, 0),
        ("1437", "1436"),
        IndexError,
    ),
    Case("no examples", lambda f: Digits().show_examples(0), ("n must", "0")),
    Case("a data set without a place", lambda f: MyDataSet(), ("data_dir",)),
)
def test_arguments_of_a_data_set(case, here):
    check(case, here)


# ---------------------------------------------------------------- files


def npz(**changed) -> Callable[[Path], None]:
    "Return a call that writes cifar10.npz with some arrays changed, or left out if None."

    def write(folder: Path) -> None:
        names = ("x_train", "y_train", "x_test", "y_test")
        arrays = dict(zip(names, small_cifar10(), strict=True)) | changed
        np.savez(
            folder / "cifar10.npz", **{n: a for n, a in arrays.items() if a is not None}
        )

    return write


def changed_labels(position: int, label: int) -> np.ndarray:
    "Return training labels with one changed."
    labels = small_cifar10()[1].astype(np.int64)
    labels[position] = label
    return labels


def cut(name: str, share: float) -> Callable[[Path], None]:
    "Return a call that writes cifar10.npz or the batches and cuts one file off."

    def write(folder: Path) -> None:
        write_npz(folder / "cifar10.npz", *small_cifar10())
        if name != "cifar10.npz":
            write_batches(folder, *small_cifar10())
        held = (folder / name).read_bytes()
        (folder / name).write_bytes(held[: int(share * len(held))])

    return write


def tree(change: Callable[[Path], object]) -> Callable[[Path], None]:
    "Return a call that writes an image tree and changes something in it."

    def write(folder: Path) -> None:
        write_tree(folder / "cifar10", *small_cifar10())
        change(folder / "cifar10")

    return write


def cut_image(root: Path) -> None:
    "Cut a PNG file off in its middle."
    path = sorted((root / "train" / "cat").iterdir())[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    path.rename(path.with_name("cut.png"))


def larger_image(root: Path) -> None:
    "Put a larger image among the others."
    from PIL import Image

    Image.new("RGB", (40, 36)).save(root / "test" / "dog" / "larger.png")


def batch(**changed) -> Callable[[Path], None]:
    "Return a call that writes the official batches, one of them with other entries."

    def write(folder: Path) -> None:
        place = write_batches(folder, *small_cifar10())
        content = {b"data": np.zeros((12, 3072), np.uint8), b"labels": [0] * 12}
        content |= {name.encode(): value for name, value in changed.items()}
        content = {name: value for name, value in content.items() if value is not None}
        (place / "data_batch_2").write_bytes(python2_pickle(content))

    return write


def mnist(part: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    "Return a call that writes MNIST's four files, one of them changed."

    def write(folder: Path) -> None:
        for name, shape in (("images-idx3", (3, 28, 28)), ("labels-idx1", (3,))):
            raw = (
                bytes([0, 0, 8, len(shape)])
                + np.array(shape, ">u4").tobytes()
                + bytes(np.prod(shape))
            )
            for half in ("train", "t10k"):
                (folder / f"{half}-{name}-ubyte").write_bytes(raw)
        path = folder / part
        source = path.with_name(part.removesuffix(".gz"))
        raw = source.read_bytes()
        source.unlink()
        path.write_bytes(change(raw))

    return write


WORDS = "not an image"
X, Y = small_cifar10()[:2]
OBJECTS = np.array([None] * 60, dtype=object)
NPZ = ("cifar10.npz",)


def load_cifar10(folder: Path) -> CIFAR10:
    "Read CIFAR-10 from the folder."
    return CIFAR10(folder)


@cases(
    Case("a missing folder", lambda f: CIFAR10(f / "nix"), ("nix", "data_dir"), FileNotFoundError),
    Case("an empty folder", load_cifar10, ("cifar10.npz", "Digits"), FileNotFoundError),
    Case("a missing npz", lambda f: MyDataSet(f / "a.npz"), ("a.npz",), FileNotFoundError),
    Case(
        "a path through a file", lambda f: CIFAR10(f / "file" / "x"), ("file",), OSError,
        lambda f: (f / "file").write_text(WORDS),
    ),
    Case(
        "a file of words", lambda f: CIFAR10(f / "file"), ("file", ".npz"), ValueError,
        lambda f: (f / "file").write_text(WORDS),
    ),
    Case(
        "an npz of words", load_cifar10, NPZ, ValueError,
        lambda f: (f / "cifar10.npz").write_text(WORDS),
    ),
    Case("an npz cut off", load_cifar10, NPZ, ValueError, cut("cifar10.npz", 0.7)),
    Case("an empty npz", load_cifar10, NPZ, ValueError, cut("cifar10.npz", 0)),
    Case("a missing array", load_cifar10, (*NPZ, "y_test", "x_train"), ValueError, npz(y_test=None)),
    Case(
        "other names", load_cifar10, (*NPZ, "x_train", "images"), ValueError,
        lambda f: np.savez(f / "cifar10.npz", images=X, labels=Y),
    ),
    Case("objects as images", load_cifar10, NPZ, ValueError, npz(x_train=OBJECTS)),
    Case("objects as labels", load_cifar10, NPZ, ValueError, npz(y_train=OBJECTS)),
    Case("floats", load_cifar10, (*NPZ, "float64", "uint8"), ValueError, npz(x_train=X / 255)),
    Case("two axes", load_cifar10, (*NPZ, "(60, 3072)"), ValueError, npz(x_train=X.reshape(60, -1))),
    Case("channels first", load_cifar10, (*NPZ, "32"), ValueError, npz(x_train=X.transpose(0, 3, 1, 2))),
    Case("four channels", load_cifar10, (*NPZ, "4)"), ValueError, npz(x_train=np.zeros((60, 32, 32, 4), np.uint8))),
    Case("no images", load_cifar10, (*NPZ, "(0, 32, 32, 3)"), ValueError, npz(x_train=X[:0], y_train=Y[:0])),
    Case("too few labels", load_cifar10, (*NPZ, "60", "(59,)"), ValueError, npz(y_train=Y[:59])),
    Case("labels one-hot", load_cifar10, (*NPZ, "(60, 10)"), ValueError, npz(y_train=np.eye(10, dtype=int)[Y])),
    Case("broken labels", load_cifar10, (*NPZ, "float64"), ValueError, npz(y_train=Y / 2)),
    Case("a label too high", load_cifar10, (*NPZ, "10", "0..9"), ValueError, npz(y_train=changed_labels(7, 10))),
    Case("a label below 0", load_cifar10, (*NPZ, "-1", "0..9"), ValueError, npz(y_train=changed_labels(7, -1))),
    Case(
        "a label below 0, no classes", lambda f: MyDataSet(f / "cifar10.npz"), (*NPZ, "-1"), ValueError,
        npz(y_train=changed_labels(7, -1)),
    ),
    Case(
        "labels of text, no classes", lambda f: MyDataSet(f / "cifar10.npz"), (*NPZ, "labels"), ValueError,
        npz(y_train=np.array(["cat"] * 60)),
    ),
    Case("two sizes", load_cifar10, (*NPZ, "(32, 32, 3)", "(28, 28, 3)"), ValueError, npz(x_test=np.zeros((20, 28, 28, 3), np.uint8))),
    Case(
        "another size", load_cifar10, (*NPZ, "32x32"), ValueError,
        npz(x_train=X[:, 2:-2, 2:-2], x_test=X[:20, 2:-2, 2:-2]),
    ),
    Case("words under the name of an image", load_cifar10, ("words.png",), ValueError, tree(lambda r: (r / "train" / "cat" / "words.png").write_text(WORDS))),
    Case("a file that is no image", load_cifar10, ("notes.txt",), ValueError, tree(lambda r: (r / "test" / "cat" / "notes.txt").write_text(WORDS))),
    Case("an empty image file", load_cifar10, ("empty.png",), ValueError, tree(lambda r: (r / "train" / "cat" / "empty.png").write_bytes(b""))),
    Case("an image cut off", load_cifar10, ("cut.png",), ValueError, tree(cut_image)),
    Case("an image of another size", load_cifar10, ("larger.png", "32x32"), ValueError, tree(larger_image)),
    Case("a folder among the images", load_cifar10, ("inner",), ValueError, tree(lambda r: (r / "train" / "cat" / "inner").mkdir())),
    Case("a class too few", load_cifar10, ("train", "cat"), ValueError, tree(lambda r: shutil.rmtree(r / "train" / "cat"))),
    Case("a class too many", load_cifar10, ("test", "zebra"), ValueError, tree(lambda r: (r / "test" / "zebra").mkdir())),
    Case("no test folder", load_cifar10, ("cifar10", "test"), FileNotFoundError, tree(lambda r: shutil.rmtree(r / "test"))),
    Case(
        "class folders without images", lambda f: MyDataSet(f), ("train", "images"), ValueError,
        lambda f: [(f / part / "cat").mkdir(parents=True) for part in ("train", "test")],
    ),
    Case(
        "no class folders", lambda f: MyDataSet(f), ("train",), ValueError,
        lambda f: [(f / part).mkdir() for part in ("train", "test")],
    ),
    Case("a missing batch", load_cifar10, ("data_batch_2",), FileNotFoundError, lambda f: (write_batches(f, *small_cifar10()) / "data_batch_2").unlink()),
    Case("a missing meta file", load_cifar10, ("batches.meta",), FileNotFoundError, lambda f: (write_batches(f, *small_cifar10()) / "batches.meta").unlink()),
    Case("a batch cut off", load_cifar10, ("data_batch_3",), ValueError, cut("cifar-10-batches-py/data_batch_3", 0.9)),
    Case("a batch without labels", load_cifar10, ("data_batch_2",), ValueError, batch(labels=None)),
    Case("a batch with a label too few", load_cifar10, ("data_batch_2",), ValueError, batch(labels=[0] * 11)),
    Case("a batch with a label too high", load_cifar10, ("99",), ValueError, batch(labels=[0] * 11 + [99])),
    Case("a batch of short rows", load_cifar10, ("data_batch_2", "3,072"), ValueError, batch(data=np.zeros((12, 784), np.uint8))),
    Case("no MNIST", lambda f: MNIST(f), ("MNIST", "Digits"), FileNotFoundError),
    Case("MNIST cut off", lambda f: MNIST(f), ("train-images-idx3-ubyte", "truncated"), ValueError, mnist("train-images-idx3-ubyte", lambda raw: raw[:-1])),
    Case("MNIST not IDX", lambda f: MNIST(f), ("t10k-labels-idx1-ubyte", "IDX"), ValueError, mnist("t10k-labels-idx1-ubyte", lambda raw: b"<html>" + raw)),
    Case("MNIST's gzip cut off", lambda f: MNIST(f), ("t10k-images-idx3-ubyte.gz", "gzip"), ValueError, mnist("t10k-images-idx3-ubyte.gz", lambda raw: gzip.compress(raw)[:-9])),
    Case("MNIST's gzip damaged", lambda f: MNIST(f), ("t10k-images-idx3-ubyte.gz", "gzip"), ValueError, mnist("t10k-images-idx3-ubyte.gz", lambda raw: gzip.compress(raw)[:12] + b"\xff" * 9)),
    Case("MNIST's label too high", lambda f: MNIST(f), ("10", "0..9"), ValueError, mnist("train-labels-idx1-ubyte", lambda raw: raw[:-1] + b"\x0a")),
    Case(
        "MNIST with a file missing", lambda f: MNIST(f), ("t10k-labels-idx1-ubyte",), FileNotFoundError,
        lambda f: (mnist("train-labels-idx1-ubyte", bytes)(f), (f / "t10k-labels-idx1-ubyte").unlink()),
    ),
)  # fmt: skip
def test_files(case, here):
    check(case, here)


def test_the_variable_may_name_a_missing_folder(here, monkeypatch):
    monkeypatch.setenv("ERA_S10_DATA", str(here / "nix"))
    check(
        Case("", lambda f: CIFAR10(), ("ERA_S10_DATA", "nix"), FileNotFoundError), here
    )


UNREADABLE = """
import os, sys
from pathlib import Path
import numpy, PIL.Image
from era_s10.datasets.cifar10 import CIFAR10
folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(os.environ["PLACE"])
if os.geteuid() == 0:
    os.seteuid(65534)  # The administrator may read everything
try:
    CIFAR10(folder)
except (OSError, ValueError) as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="rights are another matter there")
@pytest.mark.parametrize("locked", ["folder", "folder/cifar10.npz"])
def test_what_may_not_be_read_is_named(locked):
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        write_npz(Path(place, "folder", "cifar10.npz"), *small_cifar10())
        os.chmod(Path(place, locked), 0)
        done = run_python(UNREADABLE, ROOT, PLACE=str(Path(place, "folder")))
        os.chmod(Path(place, "folder"), 0o755)
    assert done.returncode == 0, done.stderr
    assert locked in done.stdout
    assert done.stdout.count("\n") == 1


def test_a_pickle_that_would_call_something_is_refused(here):
    class Intruder:
        def __reduce__(self):
            return os.mkdir, (str(here / "made by the pickle"),)

    import pickle

    place = write_batches(here, *small_cifar10())
    (place / "data_batch_4").write_bytes(
        pickle.dumps({b"data": Intruder(), b"labels": []}, 2)
    )
    check(Case("", load_cifar10, ("data_batch_4", "mkdir")), here)


# ---------------------------------------------------------------- recipes, nets, devices


def config(**options) -> Callable[[Path], Config]:
    "Return a call that makes a recipe."
    return lambda folder: Config(**options)


def model(**options) -> Callable[[Path], Model]:
    "Return a call that makes a net."
    return lambda folder: Model(**options)


NAN, INF = float("nan"), float("inf")


@cases(
    Case("a device that is none", lambda f: get_device("tpu"), ("tpu", "cpu")),
    Case("a device that is not here", lambda f: get_device("cuda:64"), ("cuda:64", "cpu")),
    Case("a device of numbers", lambda f: get_device(7), ("7", "cpu")),
    Case("a negative seed", lambda f: set_seed(-1), ("-1", "4294967295")),
    Case("too large a seed", lambda f: set_seed(2**32), ("4294967296", "4294967295")),
    Case("a broken seed", lambda f: set_seed(1.5), ("1.5",)),
    Case("an unknown optimizer", config(optimizer="Adamm"), ("Adamm", "Adam,", "SGD")),
    Case("an optimizer in small letters", config(optimizer="sgd"), ("sgd", "SGD")),
    Case("an optimizer of several passes", config(optimizer="LBFGS"), ("LBFGS", "SGD")),
    Case("no optimizer", config(optimizer=None), ("None", "SGD")),
    Case("an unknown schedule", config(schedule="OneCycle"), ("OneCycle", "OneCycleLR")),
    Case("a schedule that needs a loss", config(schedule="ReduceLROnPlateau"), ("Plateau", "OneCycleLR")),
    Case("no epochs", config(epochs=0), ("epochs", "0")),
    Case("fewer", config(epochs=-2), ("epochs", "-2")),
    Case("half an epoch", config(epochs=1.5), ("epochs", "1.5")),
    Case("epochs in words", config(epochs="3"), ("epochs", "'3'")),
    Case("epochs True", config(epochs=True), ("epochs", "True")),
    Case("no rate", config(max_lr=0), ("max_lr", "0")),
    Case("a negative rate", config(max_lr=-0.1), ("max_lr", "-0.1")),
    Case("a rate that is no number", config(max_lr=NAN), ("max_lr", "nan")),
    Case("an endless rate", config(max_lr=INF), ("max_lr", "inf")),
    Case("a rate in words", config(max_lr="0.1"), ("max_lr", "'0.1'")),
    Case("a short search", config(lr_find_steps=9), ("lr_find_steps", "9", "10")),
    Case("a search to nothing", config(lr_find_end=0), ("lr_find_end", "0")),
    Case("a target of no epochs", config(target_patience=0), ("target_patience", "0")),
    Case("no width", model(width=0), ("width", "0")),
    Case("half a width", model(width=0.5), ("width", "0.5")),
    Case("no classes", model(classes=0), ("classes", "0")),
    Case("no channels", model(in_channels=0), ("in_channels", "0")),
    Case("a dropout of everything", model(dropout=1.0), ("dropout", "1.0")),
    Case("a negative dropout", model(dropout=-0.1), ("dropout", "-0.1")),
    Case("a dropout that is no number", model(dropout=NAN), ("dropout", "nan")),
    Case("a dropout in words", model(dropout="some"), ("dropout", "some")),
    Case("an image of 24x24", lambda f: Model(2)(torch.zeros(2, 3, 24, 24)), ("3x32x32", "3x24x24")),
    Case("an image of 64x64", lambda f: Model(2)(torch.zeros(2, 3, 64, 64)), ("3x32x32", "3x64x64")),
    Case("a gray image", lambda f: Model(2)(torch.zeros(2, 1, 32, 32)), ("3x32x32", "1x32x32")),
    Case("one image alone", lambda f: Model(2)(torch.zeros(3, 32, 32)), ("3x32x32", "32x32")),
    Case("missing weights", lambda f: load_weights(Model(2), f / "w"), ("w",), FileNotFoundError),
    Case(
        "weights that are none", lambda f: load_weights(Model(2), f / "w"), ("/w", "safetensors"), ValueError,
        lambda f: (f / "w").write_text(WORDS),
    ),
    Case(
        "another net's weights", lambda f: load_weights(Model(2), f / "w"), ("/w", "another net"), ValueError,
        lambda f: save_weights(Model(3), f / "w"),
    ),
    Case(
        "a history cut off", lambda f: History.from_jsonl(f / "h"), ("/h", "line 2"), ValueError,
        lambda f: (f / "h").write_text('{"epoch": 1}\n{"epoch"'),
    ),
)  # fmt: skip
def test_recipes_nets_and_devices(case, here, torch_state):
    check(case, here)


@pytest.fixture
def torch_state(monkeypatch) -> None:
    "Making a net draws its weights, which is no fault: let `check` see the same state."
    state = torch.get_rng_state()
    monkeypatch.setattr(torch, "get_rng_state", lambda: state)


# ---------------------------------------------------------------- experiments


def experiment(
    net: Callable[[], nn.Module] = lambda: Model(2), run: dict | None = None, **options
):
    "Return a call that makes an experiment and runs it, and checks that the net has learned nothing."

    def call(folder: Path) -> None:
        with torch.random.fork_rng(devices=()):
            model = net()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        dataset = Digits(limit=40, batch_size=20)
        recipe = Config(**{"max_lr": 0.01, "epochs": 1, "device": "cpu", **options})
        try:
            with torch.random.fork_rng(devices=()):
                Experiment(model, dataset, recipe, folder / "run").run(**(run or {}))
        finally:
            after = model.state_dict()
            assert all(
                torch.equal(value, after[name]) for name, value in before.items()
            )
            assert all(parameter.grad is None for parameter in model.parameters())

    return call


def rotated() -> Digits:
    "Ask for what the batched backend does not know."
    A = import_albumentations()
    return Digits(limit=20, augmentation=[A.Rotate()], backend="batched")


class Pair(Model):
    "A net that returns its logits and something else."

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, x):
        return super().forward(x), x


class Loose(MyDataSet):
    "A data set whose `load` returns arrays."

    def load(self):
        return np.zeros((2, 32, 32, 3), np.uint8), [0, 1]


@cases(
    Case("a device that is none", experiment(device="tpu"), ("tpu", "cpu")),
    Case("an option that is not", experiment(optimizer_options={"speed": 3}), ("Adam", "speed")),
    Case("a wrong option", experiment(optimizer_options={"weight_decay": -1}), ("weight_decay", "-1")),
    Case("a schedule's option that is not", experiment(schedule_options={"speed": 3}), ("OneCycleLR", "speed")),
    Case("a schedule's wrong option", experiment(schedule_options={"pct_start": 7}), ("OneCycleLR", "pct_start")),
    Case("a schedule that lacks an option", experiment(schedule="StepLR"), ("StepLR", "step_size")),
    Case("a schedule that divides by its step size", experiment(schedule="StepLR", schedule_options={"step_size": 0}), ("StepLR", "step_size")),
    Case("a schedule that divides by nothing", experiment(schedule_options={"div_factor": 0}), ("OneCycleLR", "div_factor")),
    Case("options that are a list", experiment(optimizer_options=[1]), ("optimizer_options", "[1]")),
    Case("a net that gives two things", experiment(lambda: Pair()), ("(1, 10)", "tuple")),
    Case("a net for flat images", experiment(lambda: nn.Linear(7, 10)), ("3x32x32",)),
    Case("no data set", lambda f: Experiment(nn.Identity(), [1, 2], Config(device="cpu")), ("MyDataSet", "[1, 2]")),
    Case("a load that gives arrays", lambda f: Loose(), ("Source", "tuple")),
    Case("no mistakes to draw", lambda f: draw_misclassified(Digits(limit=20), np.zeros(360, int), -1), ("n", "-1")),
    Case("a history of nothing", lambda f: plot_history(History()), ("empty",)),
    Case("an backend that is none", lambda f: Digits(limit=20, backend="gpu"), ("backend", "'gpu'")),
    Case("a precision that is none", config(precision="fp8"), ("precision", "fp8", "bf16")),
    Case("a transform that is not batched", lambda f: rotated(), ("batched", "Rotate")),
    Case("half an index", lambda f: Digits(limit=20).sample(1.5, 0), ("index", "1.5")),
    Case("too few classes", experiment(lambda: Model(2, classes=7)), ("(1, 10)", "(1, 7)")),
    Case("too few channels", experiment(lambda: Model(2, in_channels=1)), ("1x32x32", "3x32x32")),
    Case("a net without logits", experiment(lambda: nn.Conv2d(3, 10, 1)), ("(1, 10)", "32")),
    Case("no epochs", experiment(run={"epochs": 0}), ("epochs", "0")),
    Case("half an epoch", experiment(run={"epochs": 0.5}), ("epochs", "0.5")),
    Case("a target above 100", experiment(run={"target": 101}), ("target", "101")),
    Case("a target of nothing", experiment(run={"target": 0}), ("target", "0")),
    Case("a negative target", experiment(run={"target": -1}), ("target", "-1")),
    Case("a target that is no number", experiment(run={"target": NAN}), ("target", "nan")),
    Case("a target in words", experiment(run={"target": "90"}), ("target", "90")),
    Case(
        "a folder that holds a run", experiment(), ("run",), FileExistsError,
        lambda f: ((f / "run").mkdir(), (f / "run" / "config.json").write_text("{}")),
    ),
    Case(
        "a file for a folder", experiment(), ("run",), (OSError, ValueError),
        lambda f: (f / "run").write_text("here first"),
    ),
)  # fmt: skip
def test_experiments(case, here):
    check(case, here)


def test_a_net_for_another_size_is_refused_by_name(here):
    x = np.zeros((20, 24, 24, 3), np.uint8)
    np.savez(
        "small.npz",
        x_train=x,
        y_train=np.arange(20) % 10,
        x_test=x,
        y_test=np.arange(20) % 10,
    )
    case = Case(
        "", lambda f: Experiment(net, MyDataSet("small.npz")), ("3x32x32", "3x24x24")
    )
    net = Model(2)
    check(case, here)


def test_a_transform_that_changes_the_size_is_refused(here):
    A = import_albumentations()
    net = Model(2)
    modes = [module.training for module in net.modules()]
    dataset = Digits(
        limit=40,
        batch_size=20,
        augmentation=[A.CenterCrop(24, 24)],
        backend="albumentations",
    )
    with pytest.raises(ValueError, match="3x24x24"):
        Experiment(
            net, dataset, Config(max_lr=0.01, epochs=1, device="cpu"), "run"
        ).run()
    assert files(here) == []
    assert [module.training for module in net.modules()] == modes
