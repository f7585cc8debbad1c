"""Datasets from tables: CSV files, and objects of torchvision and Hugging Face."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from pictures import save_image, sort_by_class
from PIL import Image
from torch.utils.data import ConcatDataset, Subset
from torchvision.datasets import FakeData, ImageFolder

from era_s10.datasets.cifar10 import CIFAR10
from era_s10.datasets.generic import MyDataSet
from era_s10.datasets.mnist import MNIST
from era_s10.images import read_image
from era_s10.objects import read_huggingface, read_torchvision
from era_s10.tables import read_csv, read_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*are also training images")
COLORS = {"red": (200, 30, 30), "blue": (30, 30, 200), "green": (30, 160, 30)}


@pytest.fixture
def photos(tmp_path) -> Path:  # folder with images in photos/
    "Write ten noisy images of each color, all of different sizes, in several formats."
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    for name, color in COLORS.items():
        for i in range(10):
            shape = (*rng.integers(20, 70, 2), 3)
            pixels = np.clip(color + rng.normal(0, 15, shape), 0, 255).astype(np.uint8)
            suffix = ("png", "jpg", "bmp")[i % 3]
            save_image(folder / f"photos/{name}{i}.{suffix}", pixels)
    return folder


def listed(folder: Path) -> list[tuple[str, str]]:  # path and label of each image
    "List the images of `photos`."
    paths = sorted((folder / "photos").iterdir())
    return [(f"photos/{p.name}", p.stem.rstrip("0123456789")) for p in paths]


def write(
    path: Path, rows: list, header: tuple = ("path", "label"), **options
) -> Path:  # the path
    "Write a CSV file with the standard module."
    encoding = options.pop("encoding", "utf-8")
    text = io.StringIO(newline="")
    csv.writer(text, **options).writerows([header, *rows])
    path.write_bytes(text.getvalue().encode(encoding))
    return path


# ---------------------------------------------------------------- CSV files


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_of_every_dialect_give_the_same_images(
    encoding, delimiter, quoting, end, photos
):
    rows = listed(photos)
    expected = read_csv(write(photos / "plain.csv", rows))
    options = {"delimiter": delimiter, "quoting": quoting, "lineterminator": end}
    table = write(photos / "table.csv", rows, encoding=encoding, **options)
    found = read_csv(table)
    assert found.classes == ("blue", "green", "red")
    for name in ("x_train", "y_train", "x_test", "y_test"):
        assert np.array_equal(getattr(found, name), getattr(expected, name))


SEPARATORS = {
    "semicolon": ("sep=;\n", ";"),
    "capitals and Windows": ("SEP=;\r\n", ";"),
    "comma": ("sep=,\n", ","),
    "tab": ("sep=\t\n", "\t"),
    "tab by name": ("sep=\\t\n", "\t"),
    "bar": ("sep=|\n", "|"),
    "in quotes": ('"sep=;"\n', ";"),
    "saved again": ("sep=;,,\n", ";"),
    "other than most": ("sep=;\n", ";"),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("case", SEPARATORS)
def test_a_line_above_the_header_names_the_separator(case, encoding, photos):
    line, separator = SEPARATORS[case]
    header = (
        ("path", "label") if case != "other than most" else ("path", "label", ",,,")
    )
    rows = [(*row, "")[: len(header)] for row in listed(photos)]
    table = write(
        photos / "t.csv", rows, header, delimiter=separator, encoding=encoding
    )
    text = table.read_bytes().decode(encoding)
    table.write_bytes((line + text).encode(encoding))
    found = read_rows(table)
    assert [row.path for row in found] == [photos / path for path, _ in listed(photos)]
    assert found[0].line == 3
    table.write_bytes((line + text + "a").encode(encoding))
    with pytest.raises(ValueError, match=f"line {len(found) + 3}: has 1 column"):
        read_rows(table)


@pytest.mark.parametrize(
    "header",
    [("PATH", " Label "), ("file_name", "class"), ("Filename", "Category"), ("image", "label")],
)  # fmt: skip
def test_headers_in_any_case_with_common_names(header, photos):
    rows = listed(photos)
    found = read_csv(write(photos / "table.csv", rows, header))
    assert found.classes == ("blue", "green", "red")


def test_other_columns_and_empty_lines_are_ignored(photos):
    rows = [("x, y", i, path, label) for i, (path, label) in enumerate(listed(photos))]
    rows.insert(3, ("", "", "", ""))
    table = write(photos / "table.csv", rows, ("note", "id", "path", "label"))
    assert len(read_rows(table)) == 30


def test_quoted_names_with_separators_quotes_and_line_ends(photos):
    odd = ['a,b "c".png', "d;e.png", "f\ng.png", "ü 漢.png"]
    plain, rows = (
        listed(photos)[:3],
        [(f"photos/{name}", "odd, or not") for name in odd],
    )
    for path, _ in rows:
        Image.new("RGB", (9, 9)).save(photos / path)
    found = read_rows(write(photos / "table.csv", [*rows, *plain]))
    assert [row.path.name for row in found[:4]] == odd
    assert found[0].label == "odd, or not"


def test_images_are_those_of_the_files_at_any_size_and_fit(photos):
    table = write(photos / "table.csv", listed(photos))
    for size, fit in ((32, "crop"), ((24, 40), "pad"), (48, "stretch")):
        found = MyDataSet(table, size=size, fit=fit)
        path = read_csv(table, size, fit).file_of("test", 2)
        assert np.array_equal(found.x_test[2], read_image(path, 3, size, fit))
        pair = size if isinstance(size, tuple) else (size, size)
        assert found.x_train.shape[1:3] == pair


def test_paths_are_relative_to_the_table(photos, tmp_path, monkeypatch):
    (photos / "tables").mkdir()
    rows = [(f"../{path}", label) for path, label in listed(photos)]
    table = write(photos / "tables" / "labels.csv", rows)
    absolute = [(str(photos / path), label) for path, label in listed(photos)]
    elsewhere = write(tmp_path / "absolute.csv", absolute)
    backslashes = [(path.replace("/", "\\"), label) for path, label in listed(photos)]
    windows = write(photos / "windows.csv", backslashes)
    monkeypatch.chdir(tmp_path)
    found = [MyDataSet(path) for path in (table, elsewhere, windows)]
    found.append(MyDataSet("data/tables/labels.csv"))
    monkeypatch.setenv("HOME", str(photos))
    home = [(f"~/{path}", label) for path, label in listed(photos)]
    found.append(MyDataSet(write(tmp_path / "home.csv", home)))
    assert all(one.fingerprints == found[0].fingerprints for one in found)


@pytest.mark.parametrize("suffix", [".csv", ".CSV", ".tsv", ".txt"])
def test_a_path_and_from_csv_give_the_same_dataset(suffix, photos):
    table = write(photos / f"labels{suffix}", listed(photos), delimiter="\t")
    by_path = MyDataSet(table, batch_size=8, validation=0.25)
    by_name = MyDataSet.from_csv(table, batch_size=8, validation=0.25)
    assert by_path.fingerprints == by_name.fingerprints
    assert by_name.data_dir == table
    assert str(by_path) == str(by_name)
    x, _ = next(iter(by_name.train_loader))
    assert x.shape == (8, 3, 32, 32)


def test_a_table_with_any_suffix_by_from_csv(photos):
    table = write(photos / "labels.data", listed(photos))
    assert len(MyDataSet.from_csv(table).classes) == 3


NAMES = [
    ("train", "val", "test"),
    ("Training", "valid", "TESTING"),
    ("TRAIN", "validation", "Test"),
]


@pytest.mark.parametrize("names", NAMES)
def test_splits_by_name_in_any_case(names, photos):
    rows = [(*row, names[i % 3]) for i, row in enumerate(listed(photos))]
    found = read_csv(write(photos / "table.csv", rows, ("path", "label", "split")))
    assert (len(found.y_train), found.validation, len(found.y_test)) == (20, 10, 10)
    assert len(found.notes) == 1  # on the sizes
    aside = [found.file_of("train", i).name for i in range(10, 20)]
    assert aside == [Path(row[0]).name for row in rows if row[2] == names[1]]


def test_training_and_validation_images_only(photos):
    rows = [(*row, ("train", "val")[i % 2]) for i, row in enumerate(listed(photos))]
    found = read_csv(write(photos / "table.csv", rows, ("path", "label", "split")))
    assert (len(found.y_train), found.validation, len(found.y_test)) == (15, 0, 15)
    assert "validation images are the test set" in found.notes[1]


@pytest.mark.parametrize("header", [("path", "label"), ("path", "label", "split")])
def test_without_a_split_a_fifth_of_each_class_is_for_testing(header, photos):
    rows = [(*row, "")[: len(header)] for row in listed(photos)]
    table = write(photos / "table.csv", rows, header)
    found = read_csv(table)
    assert np.bincount(found.y_train).tolist() == [8, 8, 8]
    assert np.bincount(found.y_test).tolist() == [2, 2, 2]
    assert "20% of each class is the test set (seed 0)" in found.notes[1]
    assert not {p for p, _ in found.files["train"]} & {
        p for p, _ in found.files["test"]
    }
    for seed in (0, 1):  # all runs of a study are tested on the same images
        assert np.array_equal(MyDataSet(table, seed=seed).x_test, found.x_test)


def test_the_split_is_that_of_the_same_images_in_folders(photos, tmp_path):
    images = [(photos / path, label) for path, label in listed(photos)]
    sort_by_class(tmp_path / "sorted", images)
    found = MyDataSet(write(photos / "labels.csv", listed(photos)))
    assert found.fingerprints == MyDataSet(tmp_path / "sorted").fingerprints


def test_a_class_of_one_image_stays_in_training(photos):
    rows = [
        row for row in listed(photos) if row[1] != "red" or row[0].endswith("0.png")
    ]
    found = read_csv(write(photos / "table.csv", rows))
    assert np.bincount(found.y_train).tolist() == [8, 8, 1]
    assert np.bincount(found.y_test).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (("1", "2", "10"), ("1", "2", "10")),
        (("0", "1", "2"), ("0", "1", "2")),
        (("-1", "+1", "x"), ("-1", "+1", "x")),
        (("save $5 #1", "_{x}", "猫"), ("_{x}", "save $5 #1", "猫")),
    ],
)
def test_labels_become_sorted_class_names(labels, classes, photos):
    names = dict(zip(COLORS, labels, strict=True))
    rows = [(path, names[label]) for path, label in listed(photos)]
    assert read_csv(write(photos / "table.csv", rows)).classes == classes


GOOD = "photos/red0.png,red\n"
WRONG = {
    "empty file": ("", "has no rows"),
    "header only": ("path,label\n", "has no rows"),
    "no header": (
        GOOD,
        "first line must name the columns path and label (got photos/red0",
    ),
    "no label column": ("path,colour\n" + GOOD, "(got path, colour)"),
    "no path column": ("name,label\n" + GOOD, "(got name, label)"),
    "column twice": ("path,label,Label\nphotos/red0.png,a,b\n", "'label' occurs twice"),
    "too many columns": ("path,label\n" + GOOD[:-1] + ",x\n", "line 2: has 3 columns"),
    "too few columns": (
        "path,label\n" + GOOD + "photos/red1.jpg\n",
        "line 3: has 1 col",
    ),
    "open quote": ('path,label\n"photos/red0.png,red\n', "check the quotes"),
    "text after quote": ('path,label\n"photos/red0.png"x,red\n', "check the quotes"),
    "empty path": ("path,label\n,red\n", "line 2: the path is empty"),
    "empty label": ("path,label\nphotos/red0.png, \n", "line 2: the label is empty"),
    "unknown split": ("path,label,split\nphotos/red0.png,red,holdout\n", "'holdout'"),
    "some empty splits": (
        "path,label,split\nphotos/red0.png,red,train\nphotos/red1.jpg,red,\n",
        "line 3: the split is empty",
    ),
    "no training images": (
        "path,label,split\nphotos/red0.png,red,test\n",
        "no training",
    ),
    "no test images": (
        "path,label,split\nphotos/red0.png,red,train\n",
        "no test images",
    ),
    "missing file": ("path,label\nphotos/red99.png,red\n", "not found (1 of 1"),
    "missing files": (
        "path,label\nphotos/red0.png,red\na.png,x\nb.png,x\n",
        "line 3: image",
    ),
    "address": ("path,label\nhttps://example.org/a.png,red\n", "is an address"),
    "row twice": (
        "path,label\n" + GOOD + GOOD,
        "line 3: red0.png is also in line 2; rem",
    ),
    "same file, other path": (
        "path,label\n" + GOOD + "photos/../photos/red0.png,red\n",
        "line 3: red0.png is also in line 2; rem",
    ),
    "same file, other label": (
        "path,label\n" + GOOD + "photos/red0.png,blue\n",
        "with a different label",
    ),
    "same file in train and test": (
        "path,label,split\nphotos/red0.png,red,train\nphotos/red0.png,red,test\n",
        "with a different split",
    ),
    "unknown label in test": (
        "path,label,split\nphotos/red0.png,red,train\nphotos/blue0.png,blue,test\n",
        "test images have the label 'blue', but no training image has it",
    ),
    "one image": (
        "path,label\n" + GOOD,
        "each class has one image",
    ),
    "folder as path": ("path,label\nphotos,red\n" + GOOD, "photos"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_in_a_table_is_one_sentence(case, photos):
    text, words = WRONG[case]
    (photos / "labels.csv").write_text(text, encoding="utf-8")
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        read_csv(photos / "labels.csv")
    message = str(raised.value)
    assert words in message
    assert "\n" not in message
    assert str(photos) in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("path,label\nphotos/red0.png,größe\n".encode("cp1252"), "not a text in UTF-8"),
        (b"PK\x03\x04\x14\x00\x06\x00\x08\xff\xfe", "not a text in UTF-8"),  # .xlsx
        ("path,label\n".encode("utf-16-le"), "not a text"),
        (b"path,label\na\x00b,red\n", "not a text"),
    ],
    ids=["cp1252", "spreadsheet", "UTF-16 without a mark", "zero byte"],
)
def test_a_file_that_is_not_a_text_is_refused(content, words, photos):
    (photos / "labels.csv").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        MyDataSet(photos / "labels.csv")


def test_damaged_images_are_named(photos):
    (photos / "photos/red0.png").write_text("milk, bread")
    table = write(photos / "table.csv", listed(photos))
    with pytest.raises(ValueError, match=r"red0\.png"):
        MyDataSet(table)


def test_images_of_different_sizes_as_stored_are_refused(photos):
    table = write(photos / "table.csv", listed(photos))
    with pytest.raises(ValueError, match="set size"):
        MyDataSet(table, size=None)
    for path, _ in listed(photos):
        Image.new("RGB", (20, 16)).save(photos / path)
    assert MyDataSet(table, size=None).x_train.shape[1:] == (16, 20, 3)


def test_a_missing_table_is_named(photos):
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        MyDataSet(photos / "none.csv")
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        MyDataSet.from_csv(photos / "none.csv")


def test_subclasses_inherit_the_constructors(photos):
    class Flipped(MyDataSet):
        mean, std = (0.5,), (0.25,)  # grayscale

        def default_augmentation(self) -> list:
            import albumentations as A

            return [A.HorizontalFlip(p=0.5)]

    table = write(photos / "labels.csv", listed(photos))
    found = Flipped.from_csv(table)
    assert type(found) is Flipped
    assert found.x_train.shape[1:] == (32, 32, 1)
    assert len(found.augmentation) == 1
    copied = found.with_classes(["a", "b", "c"])
    assert copied.classes == ("a", "b", "c")


# ---------------------------------------------------------------- torchvision


def test_torchvision_folders_give_the_images_of_the_files(photos, tmp_path):
    images = [(photos / path, label) for path, label in listed(photos)]
    sort_by_class(tmp_path / "sorted", images)
    data = ImageFolder(tmp_path / "sorted")
    found = MyDataSet.from_torchvision(data, size=24, fit="pad")
    table = write(photos / "labels.csv", listed(photos))
    expected = MyDataSet(table, size=24, fit="pad")
    assert found.fingerprints == expected.fingerprints
    assert found.classes == expected.classes
    assert found.data_dir is None
    two = MyDataSet.from_torchvision(
        Subset(data, range(20)), Subset(data, range(20, 30))
    )
    assert (len(two.y_train), len(two.y_test)) == (20, 10)
    assert two.classes == ("blue", "green", "red")
    joined = ConcatDataset([Subset(data, range(10)), Subset(data, range(10, 20))])
    assert len(read_torchvision(joined, Subset(data, range(20, 30))).y_train) == 20


@pytest.mark.parametrize("missing", ["a", "b"])
def test_classes_of_torchvision_datasets_are_matched_by_name(tmp_path, missing):
    for part, shade in (("train", 0), ("test", 1)):
        for i, name in enumerate("abc"):
            if part == "train" or name != missing:
                picture = Image.new("RGB", (8, 8), (80 * i + shade,) * 3)
                for k in range(2):
                    save_image(tmp_path / part / name / f"{k}.png", picture)
    train, test = (ImageFolder(tmp_path / part) for part in ("train", "test"))
    source = read_torchvision(train, test, size=None)
    assert source.classes == ("a", "b", "c")
    shades = (source.x_test[:, 0, 0, 0].astype(int) - 1) // 80
    assert source.y_test.tolist() == shades.tolist()
    (tmp_path / "test" / "d").mkdir()
    picture.save(tmp_path / "test" / "d" / "0.png")
    four = ImageFolder(tmp_path / "test")
    with pytest.raises(ValueError, match="test images have the label 'd', but the"):
        read_torchvision(train, four)
    with pytest.raises(
        ValueError, match="joins datasets whose lists of classes differ"
    ):
        read_torchvision(ConcatDataset([train, Subset(four, range(2))]))


def test_classes_of_hugging_face_datasets_are_matched_by_name():
    def part(names: tuple[str, ...], labels: list[int]) -> Table:
        rows = [{"picture": Image.new("L", (8, 8), 9), "kind": y} for y in labels]
        return Table(rows, picture=IMAGE, kind=ClassLabel(*names))

    train = part(("dark", "bright"), [0, 1, 0, 1])
    source = read_huggingface(train, part(("bright", "dark"), [0, 0, 1]))
    assert source.classes == ("dark", "bright")
    assert source.y_test.tolist() == [1, 1, 0]
    with pytest.raises(ValueError, match="test images have the label 'red'"):
        read_huggingface(train, part(("dark", "red"), [1]))
    with pytest.raises(ValueError, match="-1 marks images without a label"):
        read_huggingface(train, part(("bright", "dark"), [0, -1]))
    with pytest.raises(ValueError, match="test: image 1: has the label 2, but there"):
        read_huggingface(train, part(("bright", "dark"), [0, 2]))


@pytest.mark.parametrize("names", [("cat", "CAT"), ("caf\u00e9", "cafe\u0301")])
def test_labels_that_look_the_same(tmp_path, names):
    rows = ["path,label"]
    for i in range(8):
        Image.new("L", (8, 8), i).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{(*names, 'dog', 'dog')[i % 4]}")
    (tmp_path / "t.csv").write_text("\n".join(rows), encoding="utf-8")
    if names[0] == "cat":
        with pytest.warns(UserWarning, match="some labels differ only in case"):
            assert len(read_csv(tmp_path / "t.csv").classes) == 3
    else:
        assert len(read_csv(tmp_path / "t.csv").classes) == 2


def test_a_torchvision_dataset_without_class_names():
    data = FakeData(size=24, image_size=(3, 20, 30), num_classes=3, random_offset=0)
    found = read_torchvision(data)
    assert found.classes == ("0", "1", "2")
    assert found.x_train.shape[1:] == (32, 32, 3)


class Pairs(list):
    "Pairs of an image and a label."


GRAY = np.zeros((9, 9), np.uint8)
PIL_IMAGE = Image.fromarray(GRAY)


@pytest.mark.parametrize(
    "image",
    [GRAY, GRAY[..., None], np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9, 4), np.uint8), PIL_IMAGE, PIL_IMAGE.convert("RGBA"), PIL_IMAGE.convert("P"), PIL_IMAGE.convert("CMYK"), PIL_IMAGE.convert("I;16")],
    ids=["gray array", "gray array of three axes", "RGB array", "RGBA array", "L", "RGBA", "P", "CMYK", "I;16"],
)  # fmt: skip
@pytest.mark.parametrize("label", [3, np.int64(3), "three"])
def test_images_and_labels_of_many_kinds(image, label):
    found = read_torchvision(Pairs([(image, label)] * 6))
    assert found.x_train.shape == (5, 32, 32, 3)
    assert found.classes == (str(label),)


def test_tensors_are_labels():
    import torch

    found = read_torchvision(
        Pairs([(PIL_IMAGE, torch.tensor(i % 2)) for i in range(8)])
    )
    assert found.classes == ("0", "1")


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([], "train: has no images"),
        ([PIL_IMAGE], "item 0 must be a pair"),
        ([(PIL_IMAGE, 1, 2)], "item 0 must be a pair"),
        ([(PIL_IMAGE, [1, 2])], "its label must be an integer"),
        ([(PIL_IMAGE, 0.5)], "its label must be an integer"),
        ([(PIL_IMAGE, None)], "its label must be an integer"),
        ([(np.zeros((9, 9)), 1)], "image 0: must be a PIL image or a uint8 array"),
        ([(np.zeros((3, 9, 9), np.uint8), 1)], "image 0: must be a PIL image"),
        ([("photo.png", 1)], "image 0: must be a PIL image"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_an_image_with_a_label_is_refused(items, words):
    with pytest.raises(ValueError, match=words):
        read_torchvision(Pairs(items))


def test_objects_of_other_kinds_are_refused():
    for wrong in (3, iter([]), None):
        with pytest.raises(ValueError, match="train must be a dataset with a length"):
            MyDataSet.from_torchvision(wrong)


def test_transforms_are_refused_also_inside_a_subset():
    from torchvision.transforms import RandomCrop, ToTensor

    data = FakeData(size=8, num_classes=2, transform=ToTensor())
    with pytest.raises(ValueError, match="its transform must be None"):
        MyDataSet.from_torchvision(data)
    data.transform = RandomCrop(8)
    with pytest.raises(ValueError, match="test: its transform must be None"):
        plain = FakeData(size=8, num_classes=2)
        MyDataSet.from_torchvision(plain, Subset(data, range(4)))


def test_the_constructor_of_a_named_dataset_reads_the_object():
    data = FakeData(size=20, image_size=(3, 32, 32), num_classes=2)
    found = CIFAR10.from_torchvision(data)
    assert found.mean == CIFAR10.mean
    assert len(found.augmentation) == 5
    assert MNIST.from_torchvision(data).x_train.shape[1:] == (32, 32, 1)


def test_options_are_checked_and_passed_on():
    data = FakeData(size=20, num_classes=2)
    found = MyDataSet.from_torchvision(data, batch_size=4, validation=0.25, seed=7)
    assert (found.batch_size, found.seed, found.validation) == (4, 7, 0.25)
    assert len(found.validation_indices) == 4
    with pytest.raises(ValueError, match="batch_size"):
        MyDataSet.from_torchvision(data, batch_size=0)
    with pytest.raises(TypeError, match="batchsize"):
        MyDataSet.from_torchvision(data, batchsize=4)


# ---------------------------------------------------------------- Hugging Face


class ClassLabel:
    "Stands in for `datasets.ClassLabel`."

    def __init__(self, *names: str) -> None:
        self.names = [*names]


class Table(list):
    "Stands in for `datasets.Dataset`: rows, and the types of their columns."

    def __init__(self, rows: list, **features) -> None:
        super().__init__(rows)
        self.features = features


Value = type("Value", (), {})
IMAGE = type("Image", (), {})()


def table(count: int = 10, shift: int = 0, **extra) -> Table:
    "Make a table of gray images with two classes."
    rows = [
        {
            "id": i,
            "picture": Image.new("L", (20, 30), 100 * ((i + shift) % 2)),
            "kind": (i + shift) % 2,
            **{name: row for name, (_, row) in extra.items()},
        }
        for i in range(count)
    ]
    more = {name: feature for name, (feature, _) in extra.items()}
    kinds = {"id": Value(), "picture": IMAGE, "kind": ClassLabel("dark", "bright")}
    return Table(rows, **kinds, **more)


def test_columns_are_found_by_their_types():
    found = MyDataSet.from_huggingface(table(), size=16)
    assert found.classes == ("dark", "bright")
    assert found.x_train.shape == (8, 16, 16, 3)
    assert (found.x_train.max((1, 2, 3)) // 100 == found.y_train).all()


def test_all_parts_at_once_or_one_by_one():
    parts = {"train": table(10), "validation": table(4), "test": table(6)}
    found = read_huggingface(parts)
    assert (len(found.y_train), found.validation, len(found.y_test)) == (14, 4, 6)
    found = read_huggingface(table(10), table(6))
    assert (len(found.y_train), found.validation, len(found.y_test)) == (10, 0, 6)
    found = read_huggingface({"train": table(10), "valid": table(4)})
    assert (len(found.y_train), found.validation, len(found.y_test)) == (10, 0, 4)


def test_columns_by_name():
    two = table(10, other=(ClassLabel("a", "b", "c"), 2), thumb=(IMAGE, PIL_IMAGE))
    with pytest.raises(ValueError, match=r"image: set it to one of the columns"):
        read_huggingface(two)
    with pytest.raises(ValueError, match=r"label: set it to one of the columns"):
        read_huggingface(two, image="thumb")
    found = read_huggingface(two, image="thumb", label="other")
    assert found.classes == ("a", "b", "c")
    assert (found.y_train == 2).all()


def test_labels_that_are_text_or_integers():
    rows = [{"image": PIL_IMAGE, "label": ("yes", "no")[i % 2]} for i in range(10)]
    found = read_huggingface(Table(rows, image=IMAGE, label=Value()))
    assert found.classes == ("no", "yes")
    rows = [{"image": PIL_IMAGE, "labels": i % 2 + 1} for i in range(10)]
    found = read_huggingface(Table(rows, image=IMAGE, labels=Value()))
    assert found.classes == ("1", "2")


def test_images_that_are_not_decoded(tmp_path):
    PIL_IMAGE.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    for stored in (
        {"bytes": content, "path": None},
        {"bytes": None, "path": str(tmp_path / "a.png")},
    ):
        rows = [{"image": stored, "label": i % 2} for i in range(10)]
        found = read_huggingface(Table(rows, image=IMAGE, label=Value()))
        assert found.x_train.shape == (8, 32, 32, 3)


def test_stored_bytes_are_read_like_files(tmp_path):
    deep = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64
    Image.fromarray(deep).save(tmp_path / "deep.png")
    content = (tmp_path / "deep.png").read_bytes()
    rows = [{"image": {"bytes": content}, "label": i % 2} for i in range(10)]
    found = read_huggingface(Table(rows, image=IMAGE, label=Value()))
    assert np.array_equal(found.x_train[0], read_image(tmp_path / "deep.png"))
    for damaged, reason in (
        (content[:-30], "can't be read"),
        (b"\0\0\0\x18ftypheic" + bytes(100), "pillow-heif"),
        (b"PK\x03\x04" + bytes(100), "a ZIP archive"),
    ):
        rows[3] = {"image": {"bytes": damaged}, "label": 1}
        with pytest.raises(ValueError, match=f"train: image 3: .*{reason}"):
            read_huggingface(Table(rows, image=IMAGE, label=Value()))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: read_huggingface([1, 2]), "train must be a Hugging Face dataset"),
        (lambda: read_huggingface({"train": 3}), "train must be a Hugging Face dataset"),
        (lambda: read_huggingface({"train": table(), "extra": table()}), "'extra'"),
        (lambda: read_huggingface({"train": table()}, table()), "test: must be None"),
        (lambda: read_huggingface(table(), image="photo"), "no column 'photo'"),
        (lambda: read_huggingface(Table([], image=IMAGE, label=Value())), "no images"),
        (lambda: read_huggingface({"test": table()}), "no training images"),
        (lambda: read_huggingface(table(), Table([{"picture": PIL_IMAGE, "kind": -1}], picture=IMAGE, kind=ClassLabel("dark", "bright"))), "-1 marks images without a label"),
    ],
    ids=["list", "number", "unknown split", "two tests", "no column", "empty", "only test", "unlabeled"],
)  # fmt: skip
def test_tables_that_do_not_fit_are_refused(call, words):
    with pytest.raises(ValueError) as raised:
        call()
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_package_of_hugging_face(photos):
    datasets = pytest.importorskip("datasets")
    names = [*COLORS]
    content = {
        "image": [str(photos / path) for path, _ in listed(photos)],
        "label": [names.index(label) for _, label in listed(photos)],
    }
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    data = datasets.Dataset.from_dict(content, features=features)
    found = MyDataSet.from_huggingface(data)
    expected = MyDataSet(write(photos / "labels.csv", listed(photos)))
    pixels = [sorted(map(bytes, [*d.x_train, *d.x_test])) for d in (found, expected)]
    assert pixels[0] == pixels[1]
    assert found.classes == tuple(names)
    split = data.train_test_split(0.3, seed=0, stratify_by_column="label")
    both = MyDataSet.from_huggingface(split)
    assert (len(both.y_train), len(both.y_test)) == (21, 9)
    raw = data.cast_column("image", datasets.Image(decode=False))
    assert read_huggingface(raw).x_train.shape == found.x_train.shape
    with pytest.raises(ValueError, match="leave out transforms and formats"):
        MyDataSet.from_huggingface(data.with_format("torch"))
    stream = read_huggingface(data.to_iterable_dataset())
    assert len(stream.y_train) == 24


# ---------------------------------------------------------------- commands


def test_a_table_through_the_commands(photos, tmp_path, monkeypatch, capsys):
    from era_s10.cli import evaluate, reopen, train

    monkeypatch.chdir(tmp_path)
    write(photos / "labels.csv", listed(photos))
    options = {
        "width": 8,
        "epochs": 1,
        "batch_size": 8,
        "max_lr": 0.01,
        "offline": True,
    }
    train("data/labels.csv", folder="run", device="cpu", **options)
    assert "labels.csv" in capsys.readouterr().out
    again = reopen(Path("run"), {}).dataset
    assert again.fingerprints == MyDataSet(photos / "labels.csv").fingerprints
    evaluate("run")
    assert "accuracy" in capsys.readouterr().out
    photos.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="set --data_dir"):
        evaluate("run")
    evaluate("run", data_dir="moved/labels.csv")
