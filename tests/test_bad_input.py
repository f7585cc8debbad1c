"""Invalid input: the error names it in one line, before a model is trained or a file is written."""

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
from project import ROOT, contents, run_python
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
    "An invalid call, and the words that its error message must contain."

    name: str
    call: Callable[[Path], object]  # takes a temporary folder, the working directory
    words: tuple[str, ...]  # words of the message
    error: type[Exception] | tuple[type[Exception], ...] = ValueError
    prepare: Callable[[Path], object] = lambda folder: None  # writes files first


def check(case: Case, folder: Path) -> None:
    "Check the error message of a call, and that it writes no file and draws no random number."
    case.prepare(folder)
    before = {name: (folder / name).stat().st_mtime_ns for name in files(folder)}
    state = torch.get_rng_state()
    with pytest.raises(case.error) as raised:
        case.call(folder)
    assert type(raised.value) is not UnboundLocalError
    text = str(raised.value)
    assert text.strip()
    assert "\n" not in text
    assert len(text) < 600
    for word in case.words:
        assert word in text, text
    after = {name: (folder / name).stat().st_mtime_ns for name in files(folder)}
    assert after == before
    assert torch.equal(torch.get_rng_state(), state)


def cases(*listed: Case) -> pytest.MarkDecorator:
    "Return a decorator that runs a test once for each case."
    return pytest.mark.parametrize("case", listed, ids=[case.name for case in listed])


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    "Return a temporary folder, which is also the working directory."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ERA_S10_DATA", raising=False)
    return tmp_path


# ---------------------------------------------------------------- arguments of a data set


def digits(**options) -> Callable[[Path], Digits]:
    "Return a call that makes Digits with some options."
    return lambda folder: Digits(**options)


def with_transforms(*names: str) -> Callable[[Path], Digits]:
    "Return a call that makes Digits with some transforms of albumentations."

    def call(folder: Path) -> Digits:
        A = import_albumentations()
        kinds = {"Normalize": A.Normalize, "ToTensorV2": A.pytorch.ToTensorV2}
        return Digits(augmentation=[kinds[name]() for name in names])

    return call


@cases(
    Case("zero batch size", digits(batch_size=0), ("batch_size", "0")),
    Case("negative batch size", digits(batch_size=-3), ("batch_size", "-3")),
    Case("fractional batch size", digits(batch_size=2.5), ("batch_size", "2.5")),
    Case("string as batch size", digits(batch_size="8"), ("batch_size", "'8'")),
    Case("True as batch size", digits(batch_size=True), ("batch_size", "True")),
    Case("None as batch size", digits(batch_size=None), ("batch_size", "None")),
    Case("negative workers", digits(workers=-1), ("workers", "-1")),
    Case("string as workers", digits(workers="two"), ("workers", "two")),
    Case("negative seed", digits(seed=-1), ("seed", "-1")),
    Case("fractional seed", digits(seed=0.5), ("seed", "0.5")),
    Case("None as seed", digits(seed=None), ("seed", "None")),
    Case("validation fraction of 1", digits(validation=1.0), ("validation", "1.0")),
    Case("validation as a count", digits(validation=200), ("validation", "200")),
    Case("negative validation", digits(validation=-0.1), ("validation", "-0.1")),
    Case("validation NaN", digits(validation=float("nan")), ("validation", "nan")),
    Case("string as validation", digits(validation="some"), ("validation", "some")),
    Case("None as validation", digits(validation=None), ("validation", "None")),
    Case("tiny validation", digits(validation=1e-6), ("validation", "1e-06")),
    Case("zero limit", digits(limit=0), ("limit", "0")),
    Case("limit above the number of images", digits(limit=1438), ("1438", "1437")),
    Case("fractional limit", digits(limit=0.5), ("limit", "0.5")),
    Case(
        "string as transform", digits(augmentation=["flip"]), ("augmentation", "flip")
    ),
    Case("number as augmentation", digits(augmentation=7), ("augmentation", "7")),
    Case("function as transform", digits(augmentation=[abs]), ("augmentation", "abs")),
    Case(
        "second Normalize", with_transforms("Normalize"), ("augmentation", "Normalize")
    ),
    Case(
        "second ToTensorV2",
        with_transforms("ToTensorV2"),
        ("augmentation", "ToTensorV2"),
    ),
    Case("negative epoch", lambda f: Digits().set_epoch(-1), ("epoch", "-1")),
    Case("fractional epoch", lambda f: Digits().set_epoch(0.5), ("epoch", "0.5")),
    Case(
        "sample of a negative epoch", lambda f: Digits().sample(0, -1), ("epoch", "-1")
    ),
    Case(
        "sample index out of range",
        lambda f: Digits().sample(1437, 0),
        ("1437", "1436"),
        IndexError,
    ),
    Case("zero examples", lambda f: Digits().show_examples(0), ("n must", "0")),
    Case("no data_dir", lambda f: MyDataSet(), ("data_dir",)),
)
def test_data_set_arguments(case, folder):
    check(case, folder)


# ---------------------------------------------------------------- files


def npz(**changed) -> Callable[[Path], None]:
    "Return a call that writes cifar10.npz with some arrays replaced, or removed if None."

    def write(folder: Path) -> None:
        names = ("x_train", "y_train", "x_test", "y_test")
        arrays = dict(zip(names, small_cifar10(), strict=True)) | changed
        np.savez(
            folder / "cifar10.npz", **{n: a for n, a in arrays.items() if a is not None}
        )

    return write


def changed_labels(position: int, label: int) -> np.ndarray:
    "Return the training labels with one label replaced."
    labels = small_cifar10()[1].astype(np.int64)
    labels[position] = label
    return labels


def truncated(name: str, fraction: float) -> Callable[[Path], None]:
    "Return a call that writes cifar10.npz or the batches and truncates one file."

    def write(folder: Path) -> None:
        write_npz(folder / "cifar10.npz", *small_cifar10())
        if name != "cifar10.npz":
            write_batches(folder, *small_cifar10())
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(fraction * len(content))])

    return write


def tree(change: Callable[[Path], object]) -> Callable[[Path], None]:
    "Return a call that writes image folders and changes something in them."

    def write(folder: Path) -> None:
        write_tree(folder / "cifar10", *small_cifar10())
        change(folder / "cifar10")

    return write


def truncate_image(root: Path) -> None:
    "Truncate a PNG file to half of its size."
    path = sorted((root / "train" / "cat").iterdir())[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    path.rename(path.with_name("half.png"))


def add_larger_image(root: Path) -> None:
    "Add an image that is larger than the others."
    from PIL import Image

    Image.new("RGB", (40, 36)).save(root / "test" / "dog" / "larger.png")


def batch(**changed) -> Callable[[Path], None]:
    "Return a call that writes the official batches and replaces entries of one of them."

    def write(folder: Path) -> None:
        batch_folder = write_batches(folder, *small_cifar10())
        content = {b"data": np.zeros((12, 3072), np.uint8), b"labels": [0] * 12}
        content |= {name.encode(): value for name, value in changed.items()}
        content = {name: value for name, value in content.items() if value is not None}
        (batch_folder / "data_batch_2").write_bytes(python2_pickle(content))

    return write


def mnist(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    "Return a call that writes MNIST's four files and changes one of them."

    def write(folder: Path) -> None:
        for kind, shape in (("images-idx3", (3, 28, 28)), ("labels-idx1", (3,))):
            raw = (
                bytes([0, 0, 8, len(shape)])
                + np.array(shape, ">u4").tobytes()
                + bytes(np.prod(shape))
            )
            for part in ("train", "t10k"):
                (folder / f"{part}-{kind}-ubyte").write_bytes(raw)
        path = folder / name
        source = path.with_name(name.removesuffix(".gz"))
        raw = source.read_bytes()
        source.unlink()
        path.write_bytes(change(raw))

    return write


TEXT = "not an image"
X, Y = small_cifar10()[:2]
OBJECTS = np.array([None] * 60, dtype=object)
NPZ = ("cifar10.npz",)


def load_cifar10(folder: Path) -> CIFAR10:
    "Load CIFAR-10 from a folder."
    return CIFAR10(folder)


@cases(
    Case("missing folder", lambda f: CIFAR10(f / "missing"), ("missing", "data_dir"), FileNotFoundError),
    Case("empty folder", load_cifar10, ("cifar10.npz", "Digits"), FileNotFoundError),
    Case("missing npz", lambda f: MyDataSet(f / "a.npz"), ("a.npz",), FileNotFoundError),
    Case(
        "file as a parent folder", lambda f: CIFAR10(f / "file" / "x"), ("file",), OSError,
        lambda f: (f / "file").write_text(TEXT),
    ),
    Case(
        "text file", lambda f: CIFAR10(f / "file"), ("file", ".npz"), ValueError,
        lambda f: (f / "file").write_text(TEXT),
    ),
    Case(
        "text as npz", load_cifar10, NPZ, ValueError,
        lambda f: (f / "cifar10.npz").write_text(TEXT),
    ),
    Case("truncated npz", load_cifar10, NPZ, ValueError, truncated("cifar10.npz", 0.7)),
    Case("empty npz", load_cifar10, NPZ, ValueError, truncated("cifar10.npz", 0)),
    Case("missing array", load_cifar10, (*NPZ, "y_test", "x_train"), ValueError, npz(y_test=None)),
    Case(
        "unknown array names", load_cifar10, (*NPZ, "x_train", "images"), ValueError,
        lambda f: np.savez(f / "cifar10.npz", images=X, labels=Y),
    ),
    Case("objects as images", load_cifar10, NPZ, ValueError, npz(x_train=OBJECTS)),
    Case("objects as labels", load_cifar10, NPZ, ValueError, npz(y_train=OBJECTS)),
    Case("float images", load_cifar10, (*NPZ, "float64", "uint8"), ValueError, npz(x_train=X / 255)),
    Case("flat images", load_cifar10, (*NPZ, "(60, 3072)"), ValueError, npz(x_train=X.reshape(60, -1))),
    Case("channels first", load_cifar10, (*NPZ, "32"), ValueError, npz(x_train=X.transpose(0, 3, 1, 2))),
    Case("four channels", load_cifar10, (*NPZ, "4)"), ValueError, npz(x_train=np.zeros((60, 32, 32, 4), np.uint8))),
    Case("zero images", load_cifar10, (*NPZ, "(0, 32, 32, 3)"), ValueError, npz(x_train=X[:0], y_train=Y[:0])),
    Case("too few labels", load_cifar10, (*NPZ, "60", "(59,)"), ValueError, npz(y_train=Y[:59])),
    Case("one-hot labels", load_cifar10, (*NPZ, "(60, 10)"), ValueError, npz(y_train=np.eye(10, dtype=int)[Y])),
    Case("float labels", load_cifar10, (*NPZ, "float64"), ValueError, npz(y_train=Y / 2)),
    Case("label too high", load_cifar10, (*NPZ, "10", "0..9"), ValueError, npz(y_train=changed_labels(7, 10))),
    Case("negative label", load_cifar10, (*NPZ, "-1", "0..9"), ValueError, npz(y_train=changed_labels(7, -1))),
    Case(
        "negative label, no class names", lambda f: MyDataSet(f / "cifar10.npz"), (*NPZ, "-1"), ValueError,
        npz(y_train=changed_labels(7, -1)),
    ),
    Case(
        "string labels, no class names", lambda f: MyDataSet(f / "cifar10.npz"), (*NPZ, "labels"), ValueError,
        npz(y_train=np.array(["cat"] * 60)),
    ),
    Case("different sizes of training and test images", load_cifar10, (*NPZ, "(32, 32, 3)", "(28, 28, 3)"), ValueError, npz(x_test=np.zeros((20, 28, 28, 3), np.uint8))),
    Case(
        "wrong image size", load_cifar10, (*NPZ, "32x32"), ValueError,
        npz(x_train=X[:, 2:-2, 2:-2], x_test=X[:20, 2:-2, 2:-2]),
    ),
    Case("text as image", load_cifar10, ("text.png",), ValueError, tree(lambda r: (r / "train" / "cat" / "text.png").write_text(TEXT))),
    Case("other file in an image folder", load_cifar10, ("notes.pdf",), ValueError, tree(lambda r: (r / "test" / "cat" / "notes.pdf").write_text(TEXT))),
    Case("empty image file", load_cifar10, ("empty.png",), ValueError, tree(lambda r: (r / "train" / "cat" / "empty.png").write_bytes(b""))),
    Case("truncated image", load_cifar10, ("half.png",), ValueError, tree(truncate_image)),
    Case("image of a different size", load_cifar10, ("larger.png", "32x32"), ValueError, tree(add_larger_image)),
    Case("archive among the images", load_cifar10, ("inner.zip", "archive"), ValueError, tree(lambda r: (r / "train" / "cat" / "inner.zip").write_text(TEXT))),
    Case("missing class folder", load_cifar10, ("train", "cat"), ValueError, tree(lambda r: shutil.rmtree(r / "train" / "cat"))),
    Case("extra class folder", load_cifar10, ("test", "zebra"), ValueError, tree(lambda r: (r / "test" / "zebra").mkdir())),
    Case("no test folder", load_cifar10, ("cifar10", "test"), FileNotFoundError, tree(lambda r: shutil.rmtree(r / "test"))),
    Case(
        "empty class folders", lambda f: MyDataSet(f), ("train", "images"), ValueError,
        lambda f: [(f / part / "cat").mkdir(parents=True) for part in ("train", "test")],
    ),
    Case(
        "no class folders", lambda f: MyDataSet(f), ("train",), ValueError,
        lambda f: [(f / part).mkdir() for part in ("train", "test")],
    ),
    Case("missing batch", load_cifar10, ("data_batch_2",), FileNotFoundError, lambda f: (write_batches(f, *small_cifar10()) / "data_batch_2").unlink()),
    Case("missing meta file", load_cifar10, ("batches.meta",), FileNotFoundError, lambda f: (write_batches(f, *small_cifar10()) / "batches.meta").unlink()),
    Case("truncated batch", load_cifar10, ("data_batch_3",), ValueError, truncated("cifar-10-batches-py/data_batch_3", 0.9)),
    Case("batch without labels", load_cifar10, ("data_batch_2",), ValueError, batch(labels=None)),
    Case("batch with too few labels", load_cifar10, ("data_batch_2",), ValueError, batch(labels=[0] * 11)),
    Case("batch with a label too high", load_cifar10, ("99",), ValueError, batch(labels=[0] * 11 + [99])),
    Case("batch with short rows", load_cifar10, ("data_batch_2", "3,072"), ValueError, batch(data=np.zeros((12, 784), np.uint8))),
    Case("no MNIST", lambda f: MNIST(f), ("MNIST", "Digits"), FileNotFoundError),
    Case("truncated MNIST file", lambda f: MNIST(f), ("train-images-idx3-ubyte", "truncated"), ValueError, mnist("train-images-idx3-ubyte", lambda raw: raw[:-1])),
    Case("MNIST file not in IDX format", lambda f: MNIST(f), ("t10k-labels-idx1-ubyte", "IDX"), ValueError, mnist("t10k-labels-idx1-ubyte", lambda raw: b"<html>" + raw)),
    Case("truncated MNIST gzip", lambda f: MNIST(f), ("t10k-images-idx3-ubyte.gz", "gzip"), ValueError, mnist("t10k-images-idx3-ubyte.gz", lambda raw: gzip.compress(raw)[:-9])),
    Case("damaged MNIST gzip", lambda f: MNIST(f), ("t10k-images-idx3-ubyte.gz", "gzip"), ValueError, mnist("t10k-images-idx3-ubyte.gz", lambda raw: gzip.compress(raw)[:12] + b"\xff" * 9)),
    Case("MNIST label too high", lambda f: MNIST(f), ("10", "0..9"), ValueError, mnist("train-labels-idx1-ubyte", lambda raw: raw[:-1] + b"\x0a")),
    Case(
        "missing MNIST file", lambda f: MNIST(f), ("t10k-labels-idx1-ubyte",), FileNotFoundError,
        lambda f: (mnist("train-labels-idx1-ubyte", bytes)(f), (f / "t10k-labels-idx1-ubyte").unlink()),
    ),
)  # fmt: skip
def test_files(case, folder):
    check(case, folder)


def test_environment_variable_with_a_missing_folder(folder, monkeypatch):
    monkeypatch.setenv("ERA_S10_DATA", str(folder / "missing"))
    words = ("ERA_S10_DATA", "missing")
    check(Case("", lambda f: CIFAR10(), words, FileNotFoundError), folder)


UNREADABLE = """
import os
from pathlib import Path
import numpy, PIL.Image
from era_s10.datasets.cifar10 import CIFAR10
if os.geteuid() == 0:
    os.seteuid(65534)  # root may read all files
try:
    CIFAR10(Path(os.environ["FOLDER"]))
except (OSError, ValueError) as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no POSIX permissions")
@pytest.mark.parametrize("locked", ["folder", "folder/cifar10.npz"])
def test_files_without_read_permission(locked):
    import tempfile

    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        write_npz(Path(parent, "folder", "cifar10.npz"), *small_cifar10())
        os.chmod(Path(parent, locked), 0)
        done = run_python(UNREADABLE, ROOT, FOLDER=str(Path(parent, "folder")))
        os.chmod(Path(parent, "folder"), 0o755)
    assert done.returncode == 0, done.stderr
    assert locked in done.stdout
    assert done.stdout.count("\n") == 1


def test_a_pickle_that_calls_a_function_is_rejected(folder):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(folder / "made by the pickle"),)

    import pickle

    batch_folder = write_batches(folder, *small_cifar10())
    content = {b"data": Malicious(), b"labels": []}
    (batch_folder / "data_batch_4").write_bytes(pickle.dumps(content, 2))
    check(Case("", load_cifar10, ("data_batch_4", "mkdir")), folder)


# ---------------------------------------------------------------- recipes, models, devices


def config(**options) -> Callable[[Path], Config]:
    "Return a call that makes a recipe."
    return lambda folder: Config(**options)


def model(**options) -> Callable[[Path], Model]:
    "Return a call that makes a model."
    return lambda folder: Model(**options)


NAN, INF = float("nan"), float("inf")


@cases(
    Case("unknown device", lambda f: get_device("tpu"), ("tpu", "cpu")),
    Case("missing device", lambda f: get_device("cuda:64"), ("cuda:64", "cpu")),
    Case("number as device", lambda f: get_device(7), ("7", "cpu")),
    Case("negative seed", lambda f: set_seed(-1), ("-1", "4294967295")),
    Case("seed too large", lambda f: set_seed(2**32), ("4294967296", "4294967295")),
    Case("fractional seed", lambda f: set_seed(1.5), ("1.5",)),
    Case("unknown optimizer", config(optimizer="Adamm"), ("Adamm", "Adam,", "SGD")),
    Case("optimizer in lower case", config(optimizer="sgd"), ("sgd", "SGD")),
    Case("optimizer that needs a closure", config(optimizer="LBFGS"), ("LBFGS", "SGD")),
    Case("None as optimizer", config(optimizer=None), ("None", "SGD")),
    Case("unknown schedule", config(schedule="OneCycle"), ("OneCycle", "OneCycleLR")),
    Case("schedule that needs a loss", config(schedule="ReduceLROnPlateau"), ("Plateau", "OneCycleLR")),
    Case("zero epochs", config(epochs=0), ("epochs", "0")),
    Case("negative epochs", config(epochs=-2), ("epochs", "-2")),
    Case("fractional epochs", config(epochs=1.5), ("epochs", "1.5")),
    Case("string as epochs", config(epochs="3"), ("epochs", "'3'")),
    Case("True as epochs", config(epochs=True), ("epochs", "True")),
    Case("zero learning rate", config(max_lr=0), ("max_lr", "0")),
    Case("negative learning rate", config(max_lr=-0.1), ("max_lr", "-0.1")),
    Case("learning rate NaN", config(max_lr=NAN), ("max_lr", "nan")),
    Case("infinite learning rate", config(max_lr=INF), ("max_lr", "inf")),
    Case("string as learning rate", config(max_lr="0.1"), ("max_lr", "'0.1'")),
    Case("too few steps in the learning rate search", config(lr_find_steps=9), ("lr_find_steps", "9", "10")),
    Case("learning rate search up to 0", config(lr_find_end=0), ("lr_find_end", "0")),
    Case("zero target patience", config(target_patience=0), ("target_patience", "0")),
    Case("number as compile", config(compile=1), ("compile", "True, False", "(got 1)")),
    Case("number as alternate_flip", config(alternate_flip=0), ("alternate_flip", "(got 0)")),
    Case("number as channels_last", config(channels_last=1.0), ("channels_last", "(got 1.0)")),
    Case("zero width", model(width=0), ("width", "0")),
    Case("fractional width", model(width=0.5), ("width", "0.5")),
    Case("zero classes", model(classes=0), ("classes", "0")),
    Case("zero channels", model(in_channels=0), ("in_channels", "0")),
    Case("dropout of 1", model(dropout=1.0), ("dropout", "1.0")),
    Case("negative dropout", model(dropout=-0.1), ("dropout", "-0.1")),
    Case("dropout NaN", model(dropout=NAN), ("dropout", "nan")),
    Case("string as dropout", model(dropout="some"), ("dropout", "some")),
    Case("images of 24x24", lambda f: Model(2)(torch.zeros(2, 3, 24, 24)), ("(N, 3, H, W)", "at least 32", "(2, 3, 24, 24)")),
    Case("images of 64x24", lambda f: Model(2)(torch.zeros(2, 3, 64, 24)), ("(N, 3, H, W)", "(2, 3, 64, 24)")),
    Case("grayscale images", lambda f: Model(2)(torch.zeros(2, 1, 32, 32)), ("(N, 3, H, W)", "(2, 1, 32, 32)")),
    Case("image without a batch axis", lambda f: Model(2)(torch.zeros(3, 32, 32)), ("(N, 3, H, W)", "(got (3, 32, 32))")),
    Case("missing weights", lambda f: load_weights(Model(2), f / "w"), ("w",), FileNotFoundError),
    Case(
        "text as weights", lambda f: load_weights(Model(2), f / "w"), ("/w", "safetensors"), ValueError,
        lambda f: (f / "w").write_text(TEXT),
    ),
    Case(
        "weights of a different width", lambda f: load_weights(Model(2), f / "w"), ("/w", "weights do not fit this model"), ValueError,
        lambda f: save_weights(Model(3), f / "w"),
    ),
    Case(
        "truncated history", lambda f: History.from_jsonl(f / "h"), ("/h", "line 2"), ValueError,
        lambda f: (f / "h").write_text('{"epoch": 1}\n{"epoch"'),
    ),
)  # fmt: skip
def test_recipes_models_and_devices(case, folder, torch_state):
    check(case, folder)


@pytest.fixture
def torch_state(monkeypatch) -> None:
    "Let `check` see a constant random state, since a new model draws its weights."
    state = torch.get_rng_state()
    monkeypatch.setattr(torch, "get_rng_state", lambda: state)


# ---------------------------------------------------------------- experiments


def experiment(
    make_model: Callable[[], nn.Module] = lambda: Model(2),
    run: dict | None = None,  # arguments of Experiment.run
    **options,  # fields of Config
) -> Callable[[Path], None]:
    "Return a call that runs an experiment, and checks that its model is unchanged."

    def call(folder: Path) -> None:
        with torch.random.fork_rng(devices=()):
            model = make_model()
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
    "Use a transform that the batched backend does not support."
    A = import_albumentations()
    return Digits(limit=20, augmentation=[A.Rotate()], backend="batched")


class Pair(Model):
    "A model that returns its logits and its input."

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, x):
        return super().forward(x), x


class Auxiliary(Model):
    "A model with a different output in training mode, as GoogLeNet has."

    def __init__(self, output: Callable) -> None:
        super().__init__(2)
        self.output = output

    def forward(self, x):
        logits = super().forward(x)
        return self.output(logits) if self.training else logits


def auxiliary(output: Callable) -> Callable[[Path], None]:
    "Return a call that runs a model whose output in training mode is a function of its logits."
    return experiment(lambda: Auxiliary(output))


class SwitchesToEvaluation(Model):
    "A model that ends its training mode in its forward pass."

    def forward(self, x):
        self.net[0].eval()
        return super().forward(x)


class Unused(Model):
    "A frozen model with a further layer, which it does not use."

    def __init__(self) -> None:
        super().__init__(2)
        self.requires_grad_(False)
        self.unused = nn.Linear(1, 1)


class Asserting(nn.Linear):
    "A model that asserts the size of its images, as vision transformers do."

    def forward(self, x):
        torch._assert(x.shape[-1] == 224, "Wrong image width!\nExpected 224.")


def on_meta() -> Model:
    "Return a model without values."
    with torch.device("meta"):
        return Model(2)


def smallest_maps() -> nn.Module:
    "Return a model with a batch norm on feature maps of 1x1."
    layers = nn.Conv2d(3, 4, 32), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 10)
    return nn.Sequential(*layers)


def batches(
    make_model: Callable[[], nn.Module], **options
) -> Callable[[Path], Experiment]:
    "Return a call that makes an experiment on Digits with some options."

    def call(folder: Path) -> Experiment:
        with torch.random.fork_rng(devices=()):
            model = make_model()
        return Experiment(model, Digits(**options), Config(device="cpu"), "run")

    return call


def resnet18() -> nn.Module:
    "Return torchvision's ResNet-18 for ten classes."
    from torchvision.models import resnet18

    return resnet18(num_classes=10)


class WithoutSource(MyDataSet):
    "A data set whose `load` returns arrays."

    def load(self):
        return np.zeros((2, 32, 32, 3), np.uint8), [0, 1]


@cases(
    Case("unknown device", experiment(device="tpu"), ("tpu", "cpu")),
    Case("unknown optimizer option", experiment(optimizer_options={"speed": 3}), ("Adam", "speed")),
    Case("invalid optimizer option", experiment(optimizer_options={"weight_decay": -1}), ("weight_decay", "-1")),
    Case("unknown schedule option", experiment(schedule_options={"speed": 3}), ("OneCycleLR", "speed")),
    Case("invalid schedule option", experiment(schedule_options={"pct_start": 7}), ("OneCycleLR", "pct_start")),
    Case("missing schedule option", experiment(schedule="StepLR"), ("StepLR", "step_size")),
    Case("zero step size", experiment(schedule="StepLR", schedule_options={"step_size": 0}), ("StepLR", "step_size")),
    Case("schedule shorter than the run", experiment(schedule_options={"total_steps": 4}, epochs=3), ("OneCycleLR", "'total_steps': 4", "6 steps")),
    Case("schedule shorter than the requested run", experiment(schedule_options={"total_steps": 4}, run={"epochs": 3}), ("OneCycleLR", "'total_steps': 4", "6 steps")),
    Case("zero div_factor", experiment(schedule_options={"div_factor": 0}), ("OneCycleLR", "div_factor")),
    Case("list as optimizer options", experiment(optimizer_options=[1]), ("optimizer_options", "[1]")),
    Case("model that returns a tuple", experiment(lambda: Pair()), ("(1, 10)", "tuple")),
    Case("M1: tuple in training mode", auxiliary(lambda y: (y, y)), ("training mode", "(2, 10)", "tuple")),
    Case("M1: dictionary in training mode", auxiliary(lambda y: {"out": y}), ("training mode", "dict")),
    Case("M1: more logits in training mode", auxiliary(lambda y: y.repeat(1, 2)), ("training mode", "(2, 20)")),
    Case("M1: None in training mode", auxiliary(lambda y: None), ("training mode", "NoneType")),
    Case("M1: classes in training mode", auxiliary(lambda y: y.round().long()), ("must be floats", "int64")),
    Case("M1: detached logits", auxiliary(lambda y: y.detach()), ("requires a gradient",)),
    Case("M1: error in training mode", auxiliary(lambda y: y.missing), ("can't learn from 2 images", "missing")),
    Case("M1: error in the backward pass", auxiliary(lambda y: y.exp().add_(y.exp().mul_(2).exp_()).sqrt_()), ("can't learn", "inplace")),
    Case("M1: evaluation mode within a step", experiment(lambda: SwitchesToEvaluation(2)), ("switches net.0", "evaluation mode")),
    Case("M2: last batch of one", batches(smallest_maps, limit=65, batch_size=64), ("65 images in batches of 64", "batch_size=63", "limit=64")),
    Case("M2: last batch of one, ResNet-18", batches(resnet18, limit=65, batch_size=64), ("65 images in batches of 64", "more than 1 value per channel", "batch_size=63")),
    Case("M2: last batch of one beside validation images", batches(smallest_maps, limit=81, batch_size=64, validation=0.2), ("65 images", "batch_size=63")),
    Case("M2: batches of one", batches(smallest_maps, limit=7, batch_size=1), ("the batch size is 1", "batch_size=4")),
    Case("M2: a single image", batches(smallest_maps, limit=1), ("one training image",)),
    Case("M3: all parameters frozen", experiment(lambda: Model(2).requires_grad_(False)), ("frozen", "net.0.layer.layers.0.weight", "requires_grad")),
    Case("M3: no parameters", experiment(nn.Flatten), ("no parameters",)),
    Case("M3: only an unused layer is not frozen", experiment(lambda: Unused()), ("requires a gradient",)),
    Case("parameters in float16", experiment(lambda: Model(2).half()), ("float16", "precision")),
    Case("parameters in bfloat16", experiment(lambda: Model(2).bfloat16()), ("bfloat16", "precision")),
    Case("parameters in float64", experiment(lambda: Model(2).double()), ("3x32x32", "model.float()")),
    Case("model without values", batches(on_meta), ("net.0.layer.layers.0.weight", "meta")),
    Case("model that asserts", experiment(lambda: Asserting(1, 1)), ("3x32x32", "Wrong image width! Expected 224.")),
    Case("model for flat images", experiment(lambda: nn.Linear(7, 10)), ("3x32x32",)),
    Case("list as data set", lambda f: Experiment(nn.Identity(), [1, 2], Config(device="cpu")), ("MyDataSet", "[1, 2]")),
    Case("load that returns arrays", lambda f: WithoutSource(), ("Source", "tuple")),
    Case("negative number of misclassified images", lambda f: draw_misclassified(Digits(limit=20), np.zeros(360, int), -1), ("n", "-1")),
    Case("empty history", lambda f: plot_history(History()), ("empty",)),
    Case("unknown backend", lambda f: Digits(limit=20, backend="gpu"), ("backend", "'gpu'")),
    Case("unknown precision", config(precision="fp8"), ("precision", "fp8", "bf16")),
    Case("transform without batched support", lambda f: rotated(), ("batched", "Rotate")),
    Case("fractional sample index", lambda f: Digits(limit=20).sample(1.5, 0), ("index", "1.5")),
    Case("too few classes", experiment(lambda: Model(2, classes=7)), ("(1, 10)", "(1, 7)")),
    Case("too few channels", experiment(lambda: Model(2, in_channels=1)), ("(N, 1, H, W)", "3x32x32")),
    Case("model that returns feature maps", experiment(lambda: nn.Conv2d(3, 10, 1)), ("(1, 10)", "32")),
    Case("zero epochs", experiment(run={"epochs": 0}), ("epochs", "0")),
    Case("fractional epochs", experiment(run={"epochs": 0.5}), ("epochs", "0.5")),
    Case("target above 100", experiment(run={"target": 101}), ("target", "101")),
    Case("zero target", experiment(run={"target": 0}), ("target", "0")),
    Case("negative target", experiment(run={"target": -1}), ("target", "-1")),
    Case("target NaN", experiment(run={"target": NAN}), ("target", "nan")),
    Case("string as target", experiment(run={"target": "90"}), ("target", "90")),
    Case(
        "folder with a run", experiment(), ("run",), FileExistsError,
        lambda f: ((f / "run").mkdir(), (f / "run" / "config.json").write_text("{}")),
    ),
    Case(
        "file as folder", experiment(), ("run",), (OSError, ValueError),
        lambda f: (f / "run").write_text("an existing file"),
    ),
)  # fmt: skip
def test_experiments(case, folder):
    check(case, folder)


def test_a_warmup_of_a_tenth_of_the_run_is_accepted(folder):
    dataset = Digits(limit=40, batch_size=20)  # 10% of 10 steps, OneCycleLR fails
    config = Config(schedule_options={"pct_start": 0.1}, max_lr=0.01, epochs=2)
    assert len(Experiment(Model(2), dataset, config).run()) == 2


def test_a_run_is_not_lengthened_beyond_its_schedule(folder):
    config = Config(schedule_options={"total_steps": 4}, max_lr=0.01, epochs=2)

    def make() -> Experiment:
        dataset = Digits(limit=40, batch_size=20)
        return Experiment(Model(2), dataset, config, folder / "run")

    make().run()
    before = contents(folder)
    with pytest.raises(ValueError, match="in a run of 6 steps"):
        make().resume(epochs=3)
    assert contents(folder) == before


def test_a_model_for_a_different_image_size_is_rejected(folder):
    x = np.zeros((20, 24, 24, 3), np.uint8)
    np.savez(
        "small.npz",
        x_train=x,
        y_train=np.arange(20) % 10,
        x_test=x,
        y_test=np.arange(20) % 10,
    )
    model = Model(2)
    words = ("(N, 3, H, W)", "3x24x24")
    case = Case("", lambda f: Experiment(model, MyDataSet("small.npz")), words)
    check(case, folder)


def test_a_transform_that_changes_the_image_size_is_rejected(folder):
    A = import_albumentations()
    model = Model(2)
    modes = [module.training for module in model.modules()]
    dataset = Digits(
        limit=40,
        batch_size=20,
        augmentation=[A.CenterCrop(24, 24)],
        backend="albumentations",
    )
    with pytest.raises(ValueError, match="3x24x24"):
        Experiment(
            model, dataset, Config(max_lr=0.01, epochs=1, device="cpu"), "run"
        ).run()
    assert files(folder) == []
    assert [module.training for module in model.modules()] == modes
