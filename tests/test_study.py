"Tests of studies: interrupted and resumed, the statistics, and the options of the commands."

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from pictures import files, small_cifar10, write_npz
from PIL import Image
from project import ROOT, command

from era_s10 import cli, cli_inference, cli_study, study_folder
from era_s10.backprop import Experiment, Test
from era_s10.cpu import bf16_instructions
from era_s10.datasets.digits import Digits
from era_s10.model import Model, load_pretrained
from era_s10.options import Options
from era_s10.recipe import RECIPES, make_config
from era_s10.run_folder import save_figures
from era_s10.study import (
    RunRecord,
    ablation,
    check_same_study,
    compare,
    median_record,
    plot_ablation,
    plot_runs,
    read_records,
    results_table,
    run_record,
    summarize,
)
from era_s10.utils import set_seed
from era_s10.weights import pretrained_names, read_model_card

CPU_PRECISION = "bf16" if bf16_instructions() else "fp32"  # the default
OPTIONS = (
    "--dataset digits --recipe modern --width 4 --epochs 4 --runs 2 --folder study "
    "--checkpoint_steps 23"
)
COMMAND = command("era_s10_study", *OPTIONS.split())
STUDIES = sorted((ROOT / "nbs" / "results").rglob("*runs.jsonl"))  # published


def without_times(
    folder: Path,  # folder of a study
) -> list[RunRecord]:  # its records, without times
    "Read the records of a study, and remove what differs between equal studies."
    records = read_records(folder / "runs.jsonl")
    for record in records:
        for epoch in record.history:
            del epoch["seconds"]
    return [replace(record, seconds=0.0, finished="") for record in records]


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    "Return the folder of a study that was not interrupted."
    parent = tmp_path_factory.mktemp("complete")
    done = subprocess.run(COMMAND, cwd=parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return parent / "study"


@pytest.mark.parametrize(
    ("number", "status"),
    [
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_study_has_the_same_results_as_an_uninterrupted_one(
    number, status, complete, tmp_path
):
    # interrupted in the first run, and again in the second
    interrupt_after = {"seed-0": 3, "seed-1": 2}  # epochs
    outputs = []
    for name, epochs in interrupt_after.items():
        process = subprocess.Popen(
            COMMAND,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        history = tmp_path / "study" / name / "history.jsonl"
        while process.poll() is None:
            if history.exists() and len(history.read_text().splitlines()) >= epochs:
                process.send_signal(number)
                break
            time.sleep(0.01)
        out, errors = process.communicate()
        assert process.returncode == status, errors
        assert "Traceback" not in errors
        hint = "stopped; the same command continues"
        assert (hint in errors) == (number != signal.SIGKILL)
        outputs.append(out)
    done = subprocess.run(COMMAND, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    second, last = outputs[1].split("seed    1")[0], done.stdout
    for out, first in ((second, 4), (last, 3)):  # finished epochs are not repeated
        printed = int(re.findall(r"epoch +(\d+)/4", out)[0])
        assert printed in (first, first - 1), out
    study = tmp_path / "study"
    assert without_times(study) == without_times(complete)
    weights = [folder / "weights.safetensors" for folder in (complete, study)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
def test_a_folder_with_a_different_study_gives_an_error(complete):
    before = (complete / "runs.jsonl").read_bytes()
    for option, message in (
        (
            ["--changes", '{"label_smoothing": 0.1}'],
            "recipe.label_smoothing was 0.2 and is 0.1",
        ),
        (["--width", "5"], "model.arguments.width was 4 and is 5"),
        (["--batch_size", "32"], "dataset.batch_size was 64 and is 32"),
        (["--runs", "3"], "threads was"),
    ):
        other = "2" if torch.get_num_threads() == 1 else "1"
        environment = (
            {**os.environ, "OMP_NUM_THREADS": other} if "--runs" in option else None
        )
        done = subprocess.run(
            [*COMMAND, *option],
            cwd=complete.parent,
            capture_output=True,
            text=True,
            env=environment,
        )
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert message in done.stderr
    assert (complete / "runs.jsonl").read_bytes() == before


@pytest.mark.slow
def test_resuming_with_other_threads_needs_an_option_and_another_recipe_fails(
    tmp_path,
):
    one_run = [*COMMAND, "--runs", "1"]
    process = subprocess.Popen(one_run, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    history = tmp_path / "study" / "seed-0" / "history.jsonl"
    while process.poll() is None and not (history.exists() and history.read_text()):
        time.sleep(0.01)
    process.terminate()
    process.communicate()
    assert process.returncode == 143
    other = 1 if torch.get_num_threads() > 1 else 2
    threads = {**os.environ, "OMP_NUM_THREADS": str(other)}
    for options, words, absent in (
        ([], "threads was", "--changes"),
        (
            ["--changes", '{"label_smoothing": 0.0}', "--allow_mismatch"],
            "label_smoothing was 0.2",
            "threads",
        ),
    ):
        done = subprocess.run(
            [*one_run, *options],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=threads,
        )
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
        assert absent not in done.stderr
    done = subprocess.run(
        [*one_run, "--allow_mismatch"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=threads,
    )
    assert done.returncode == 0, done.stderr
    (record,) = read_records(tmp_path / "study" / "runs.jsonl")
    assert [line.split()[0] for line in record.accepted] == ["threads"]
    assert "seed 0 was resumed with: threads was" in done.stdout
    config = json.loads((tmp_path / "study" / "seed-0" / "config.json").read_text())
    assert (config["threads"], config["run"]["accepted"]) == (other, record.accepted)
    card = read_model_card(tmp_path / "study" / "card.json")
    assert card.accepted == record.accepted


@pytest.fixture(scope="module")
def finished_run() -> Experiment:
    "Return an experiment whose run has ended."
    set_seed(0)
    config = make_config("modern", epochs=1, device="cpu")
    experiment = Experiment(Model(width=4), Digits(batch_size=64), config)
    experiment.run()
    return experiment


def changed(
    record: RunRecord,  # record of a run; not changed
    name: str,  # dotted name of a value
    value: object,  # new value
) -> RunRecord:
    "Return a copy of a record with one value changed."
    content = copy.deepcopy(record.to_dict())
    *path, last = name.split(".")
    inner = content
    for part in path:
        inner = inner[part]
    inner[last] = value
    return RunRecord.from_dict(content)


@pytest.mark.parametrize(
    ("name", "value", "strict_error", "lenient_error"),
    [
        (
            "config.label_smoothing",
            0.1,
            *["recipe.label_smoothing was 0.1 and is 0.2"] * 2,
        ),
        (
            "numerics.precision",
            "fp16",
            *["numerics.precision was 'fp16' and is "] * 2,
        ),
        ("model.arguments.width", 5, *["model.arguments.width was 5 and is 4"] * 2),
        ("dataset.batch_size", 32, *["dataset.batch_size was 32 and is 64"] * 2),
        ("threads", 99, "threads was 99", None),
        ("machine.device", "a GPU", "device was 'a GPU'", None),
        ("machine.versions.torch", "1.0", "versions.torch was '1.0'", None),
        ("config.compile", True, "compile was True", None),
        # the batched backend does not use albumentations
        ("machine.versions.albumentations", "1.0", None, None),
        ("config.precision", CPU_PRECISION, None, None),
        ("config.channels_last", True, None, None),
        ("config.device", None, None, None),
        ("dataset.seed", 7, None, None),
        ("machine.cpu", "another", None, None),
    ],
)
def test_differences_that_make_a_different_study(
    name, value, strict_error, lenient_error, finished_run
):
    record = changed(run_record(finished_run), name, value)
    for strict, message in ((True, strict_error), (False, lenient_error)):
        if message is None:
            check_same_study(finished_run, [record], strict)
        else:
            with pytest.raises(ValueError, match=re.escape(message)):
                check_same_study(finished_run, [record], strict)


def test_runs_on_a_gpu_may_have_any_number_of_threads(finished_run, monkeypatch):
    record = changed(run_record(finished_run), "machine.device", "a GPU")
    real = study_folder.describe_machine
    monkeypatch.setattr(
        study_folder, "describe_machine", lambda device: real() | {"device": "a GPU"}
    )
    check_same_study(finished_run, [replace(record, threads=99)])
    with pytest.raises(ValueError, match=r"versions\.torch"):
        check_same_study(
            finished_run, [changed(record, "machine.versions.torch", "1.0")]
        )


def test_time_axis_of_a_plot_has_labels_that_do_not_overlap(finished_run):
    record = run_record(finished_run)

    def study(seconds: float) -> list:
        "Return two runs whose single epoch takes this long."
        epoch = record.history[-1] | {"seconds": seconds}
        return [replace(record, history=[epoch])] * 2

    for longest in (9, 900, 9e4, 9e6):
        figure = plot_runs({"short": study(0.5), "long": study(longest)})
        figure.draw_without_rendering()
        (left, right), axis = figure.axes[0].get_xlim(), figure.axes[0].xaxis
        labels = [
            tick.label1.get_window_extent()
            for tick in axis.get_major_ticks()
            if left <= tick.get_loc() <= right and tick.label1.get_text()
        ]
        assert len(labels) > 2
        labels.sort(key=lambda box: box.x0)
        for one, other in pairwise(labels):
            assert one.x1 < other.x0, longest


def test_a_single_run_is_not_called_the_highest_mean(finished_run):
    record = run_record(finished_run)
    better = replace(record, test_accuracy=record.test_accuracy + 1)
    for groups, best in (
        ({"one": [better], "two": [record, record]}, "mean of several runs: two, "),
        ({"one": [better], "other": [record]}, "mean: one, "),
        ({"one": [better] * 2, "other": [record] * 2}, "mean: one, "),
    ):
        title = plot_runs(groups).axes[0].get_title("left")
        assert title.startswith(f"Highest {best}")


def test_comparisons_and_figures_of_studies(finished_run):
    record = run_record(finished_run)
    better = replace(record, test_accuracy=record.test_accuracy + 1)
    groups = {"one": [better], "base": [record, better]}
    (row,) = ablation(groups, "base")
    assert (row["change"], row["verdict"]) == ("one", "too few runs to tell")
    (marker,) = [
        line for line in plot_ablation([row]).axes[0].lines if line.get_marker() == "o"
    ]
    assert marker.get_markerfacecolor() == "white"
    # reached its target in the first of two epochs
    early = changed(record, "plan.epochs", 2)
    late = replace(early, epochs=2, history=record.history * 2)
    assert results_table({"both": [early, late]})[0]["epochs"] == 2
    lines = plot_runs({"both": [early, late]}).axes[0].lines
    # two runs, the guide to the label, and the mean
    assert sorted(line.get_linewidth() for line in lines) == [0.6, 0.6, 0.8, 2]
    fewer = changed(record, "dataset.images.train", 100)
    other_images = changed(record, "dataset.fingerprints.test", "0")
    for call, message in (
        (
            lambda: ablation(groups, "none"),
            "unknown group 'none'; choose one of one, base",
        ),
        (
            lambda: ablation({"base": [record], "empty": []}, "base"),
            "'empty' has no runs",
        ),
        (
            lambda: ablation({"base": [record], "few": [fewer]}, "base"),
            "runs must have the same data, model and epochs",
        ),
        (
            lambda: results_table({"mixed": [record, late]}),
            "several models, widths or lengths",
        ),
        (
            lambda: compare([other_images], [record]),
            "runs must have the same test images",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


@pytest.mark.slow
def test_evaluate_reproduces_the_accuracy_of_a_study(complete, tmp_path):
    evaluate = command("era_s10_evaluate", str(complete))
    done = subprocess.run(evaluate, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = re.findall(r"(\d+\.\d\d)%", done.stdout)
    assert figures[-2] == figures[-1]  # measured, and recorded on the model card
    shutil.copytree(complete, tmp_path / "copy")
    figure = tmp_path / "copy" / "confusion.png"
    figure.unlink()
    figure.mkdir()  # so that the figure cannot be written
    failed = command("era_s10_evaluate", str(tmp_path / "copy"))
    failed = subprocess.run(failed, capture_output=True, text=True)
    assert (failed.returncode, failed.stderr.count("\n")) == (0, 1), failed.stderr
    assert "warning:" in failed.stderr and "confusion.png" in failed.stderr
    assert "accuracy" in failed.stdout and "per_class.png" in failed.stdout
    before = sorted(complete.iterdir())
    few = np.zeros((4, 8, 8, 3), np.uint8)
    labels = np.array([0, 1, 0, 1])
    np.savez(
        tmp_path / "few.npz", x_train=few, y_train=labels, x_test=few, y_test=labels
    )
    other = [*evaluate, "--dataset", str(tmp_path / "few.npz")]
    other = subprocess.run(other, capture_output=True, text=True)
    assert "its classes differ from the model's" in other.stderr
    assert other.returncode == 2
    assert sorted(complete.iterdir()) == before


@pytest.mark.slow
def test_other_images_are_normalized_like_the_training_images(
    complete, tmp_path, capsys
):
    digits = Digits(batch_size=64)
    dark = {part: getattr(digits, part) // 2 for part in ("x_train", "x_test")}
    np.savez(
        tmp_path / "dark.npz", y_train=digits.y_train, y_test=digits.y_test, **dark
    )
    evaluate = cli_inference.evaluate
    evaluate.main([str(complete), "--dataset", str(tmp_path / "dark.npz")])
    out = capsys.readouterr().out
    accuracy = float(re.search(r"accuracy (\d+\.\d\d)%", out)[1])
    digits.x_test = dark["x_test"]  # with mean and std of the original images
    model = load_pretrained(complete / "weights.safetensors", complete / "card.json")
    assert accuracy == pytest.approx(Test(model, digits)()[1], abs=0.01)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:  # folder with a run, a study and photos.npz
    "Train a run and a study on images of the user's own."
    folder = tmp_path_factory.mktemp("photos")
    digits = Digits()
    few = {name: getattr(digits, name)[:40] for name in ("x_train", "x_test")}
    labels = {name: getattr(digits, name)[:40] for name in ("y_train", "y_test")}
    np.savez(folder / "photos.npz", **few, **labels)
    options = {"dataset": str(folder / "photos.npz"), "width": 2, "epochs": 1}
    cli.train(**options, max_lr=0.01, folder=str(folder / "run"))
    cli.study("page", runs=1, **options, folder=str(folder / "study"))
    return folder


@pytest.mark.parametrize("kind", ["run", "study"])
def test_evaluate_finds_the_data_of_a_run(kind, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli_inference.evaluate(str(photos / kind))
    out = capsys.readouterr().out
    figures = re.findall(r"(\d+\.\d\d)%", out)
    assert figures[-2] == figures[-1]  # measured and recorded
    copy, moved = tmp_path / kind, tmp_path / "moved.npz"
    shutil.copytree(photos / kind, copy)
    for path in copy.rglob("config.json"):  # as if the data had been moved
        path.write_text(path.read_text().replace("/photos.npz", "/old.npz"))
    shutil.copy(photos / "photos.npz", moved)
    with pytest.raises(FileNotFoundError, match=r"no longer at .*; set --data_dir"):
        cli_inference.evaluate(str(copy))
    with pytest.raises(FileNotFoundError, match="--data_dir: nowhere not found"):
        cli_inference.evaluate(str(copy), data_dir="nowhere")
    cli_inference.evaluate.main([str(copy), "--data_dir", str(moved)])
    assert re.findall(r"(\d+\.\d\d)%", capsys.readouterr().out) == figures
    shutil.rmtree(copy / "seed-0", ignore_errors=True)
    if kind == "study":  # without the folders of its runs
        with pytest.raises(FileNotFoundError, match="no record of its data, which"):
            cli_inference.evaluate(str(copy))
        cli_inference.evaluate(str(copy), data_dir=str(moved))


@pytest.mark.slow
def test_evaluate_finds_a_known_dataset_where_the_run_found_it(
    any_images, tmp_path, capsys
):
    places = tmp_path / "one", tmp_path / "two"
    for place in places:
        place.mkdir()
    write_npz(places[0] / "cifar10.npz", *small_cifar10())
    options = {"width": 2, "epochs": 1, "max_lr": 0.01, "offline": True}
    run = str(tmp_path / "run")
    cli.train("cifar10", data_dir=str(places[0]), folder=run, **options)
    cli_inference.evaluate(run)
    (places[0] / "cifar10.npz").rename(places[1] / "cifar10.npz")
    places[0].rmdir()
    with pytest.raises(FileNotFoundError, match=r"one; set --data_dir"):
        cli_inference.evaluate(run)
    cli_inference.evaluate(run, data_dir=str(places[1]))
    finished = capsys.readouterr().out
    assert finished.count("recorded, without TTA") == 2
    assert "on other test images" not in finished


def test_a_table_is_evaluated_with_the_size_and_the_classes_of_the_run(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    generator, rows = np.random.default_rng(0), ["path,label,split"]
    for i in range(24):
        pixels = generator.integers(0, 255, (40, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{'ab'[i % 2]},{'test' if i > 17 else 'train'}")
    Path("t.csv").write_text("\n".join(rows))
    options = {"width": 2, "epochs": 1, "max_lr": 0.01, "batch_size": 9}
    cli.train("t.csv", size="48x64", fit="pad", folder="run", **options)
    capsys.readouterr()
    cli_inference.evaluate("run")
    out = capsys.readouterr().out
    assert "padded to 48x64" in out and "other test images" not in out
    one = [line for line in rows if not line.endswith("a,test")]
    Path("one.csv").write_text("\n".join(one))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli_inference.evaluate("run", dataset="one.csv")
    assert re.search(r"a +no test images", capsys.readouterr().out)
    Image.fromarray(pixels).save(tmp_path / "c.png")
    Path("t.csv").write_text("\n".join([*rows, "c.png,c,train"]))
    with pytest.raises(
        ValueError, match=r"data have changed \(were a, b; are a, b, c\)"
    ):
        cli.train(resume="run", epochs=2)


def test_evaluate_says_that_the_test_images_have_changed(any_images, tmp_path, capsys):
    arrays = small_cifar10()
    write_npz(tmp_path / "cifar10.npz", *arrays)
    options = {"width": 2, "epochs": 1, "max_lr": 0.01, "offline": True}
    run = str(tmp_path / "run")
    cli.train("cifar10", data_dir=str(tmp_path), folder=run, **options)
    other = tmp_path / "other"
    other.mkdir()
    write_npz(other / "cifar10.npz", *arrays[:2], 255 - arrays[2], arrays[3])
    capsys.readouterr()
    cli_inference.evaluate(run, data_dir=str(other))
    assert re.search(r"TTA: \d+\.\d\d%, on other test images", capsys.readouterr().out)


def test_workers_also_prepare_the_batches_of_a_pretrained_model(monkeypatch):
    class Stop(Exception):
        pass

    def stop(data_dir, batch_size, workers, **options):
        raise Stop(f"{workers} workers")

    monkeypatch.setattr(cli_inference, "CIFAR10", stop)
    with pytest.raises(Stop, match="3 workers"):
        cli_inference.evaluate(pretrained="cifar10-width16", workers=3)


def test_evaluate_refuses_a_folder_for_data_that_need_none(complete):
    message = "--data_dir: has no effect with the dataset 'digits'; leave it out"
    with pytest.raises(ValueError, match=message):
        cli_inference.evaluate(str(complete), data_dir=str(complete))


def test_numbered_classes_need_the_names_of_the_model():
    def trained(classes, mean=None):
        std = mean and [0.4] * 3
        return SimpleNamespace(classes=list(classes), mean=mean, std=std)

    settings = trained("abcdefghij", [0.3] * 3)
    digits = Digits()
    before = digits.classes, digits.mean, digits.std
    with pytest.raises(ValueError, match=r"digits: its classes differ.*--classes"):
        cli_inference.match_training(digits, settings, "digits")
    images = cli_inference.match_training(digits, settings, "digits", "abcdefghij")
    assert list(images.classes) == settings.classes
    assert (images.mean, images.std) == ((0.3,) * 3, (0.4,) * 3)
    assert (digits.classes, digits.mean, digits.std) == before  # images is a copy
    named = digits.with_classes(tuple("klmnopqrst"))
    for classes in (settings.classes, ["a", "b"], "0123456789"):
        with pytest.raises(ValueError, match="digits: its classes differ"):
            cli_inference.match_training(named, trained(classes), "digits")


@pytest.mark.parametrize(
    "missing", ["", pytest.param("weights.safetensors", marks=pytest.mark.slow)]
)
def test_missing_weights_give_an_error_that_says_what_to_do(
    missing, complete, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(complete, tmp_path / "study")
    seed = median_record(read_records(complete / "runs.jsonl")).seed
    run = tmp_path / "study" / f"seed-{seed}"
    (run / missing).unlink() if missing else shutil.rmtree(run)
    with pytest.raises(SystemExit) as ended:
        cli.study.main(OPTIONS.split())
    message = f"a record of seed {seed}; remove that record and the folder"
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_folder_of_a_long_recipe_has_a_short_unique_name():
    changes = {k: v for k, v in vars(RECIPES["modern"]).items() if k != "recipe"}
    del changes["epochs"]
    assert len(make_config("era", **changes).recipe) > 200
    names = [
        cli_study._study_folder(Options(dataset="digits", changes=c)).name
        for c in (changes, {**changes, "max_lr": 0.3})
    ]
    assert len(names[0]) < 150
    assert names[0] != names[1]


@pytest.mark.slow
def test_a_study_reports_all_its_runs_even_if_fewer_are_requested(tmp_path):
    for runs in ("2", "1"):
        done = subprocess.run(
            [*COMMAND, "--epochs", "1", "--runs", runs],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "(n = 2)" in done.stdout
    assert read_model_card(tmp_path / "study" / "card.json").runs["n"] == 2


def test_a_record_contains_everything_that_reproduces_its_run(complete):
    for record in read_records(complete / "runs.jsonl"):
        assert record.config["optimizer"] == "SGD"
        assert record.fingerprints == Digits.checksums
        assert len(record.history) == record.epochs == 4
        assert record.history[-1]["test_accuracy"] == record.test_accuracy
        assert record.seconds == pytest.approx(
            sum(e["seconds"] for e in record.history)
        )
        assert {"cpu", "device", "versions"} <= record.machine.keys()
        assert len(record.code["sources"]) == 32
        assert str(complete.parent) not in json.dumps(record.to_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: line.pop("seed"), "seed is missing"),
        (lambda line: line.update(epochs="6"), "epochs must be int (got '6')"),
        (lambda line: line.update(sead=0), "unknown field 'sead'"),
        (lambda line: line["machine"].pop("device"), "machine.device is missing"),
    ],
)
def test_a_wrong_record_is_reported_with_file_line_and_field(change, message, tmp_path):
    lines = [json.loads(line) for line in STUDIES[0].read_text().splitlines()[:2]]
    change(lines[1])
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    message = f"{path}: line 2: not a RunRecord: {message}"
    with pytest.raises(ValueError, match=re.escape(message)):
        read_records(path)


# ---------------------------------------------------------------- published results


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.parent.name)
def test_published_records_are_complete_and_have_the_same_settings(path):
    records = read_records(path)
    few = re.search(r"(\d+)-images", path.parent.name)  # a study of fewer images
    limit = int(few[1]) if few else None
    assert records
    seeds = [record.seed for record in records]
    assert len(set(seeds)) == len(seeds)
    for record in records:
        for part in ("config", "model", "numerics", "threads"):
            assert getattr(record, part) == getattr(records[0], part)
        for part in ("device", "versions"):
            assert record.machine[part] == records[0].machine[part]
        assert {**record.dataset, "seed": 0} == {**records[0].dataset, "seed": 0}
        assert record.history[-1]["test_accuracy"] == record.test_accuracy
        assert record.dataset["limit"] == limit
    assert "/root" not in path.read_text() and "/home" not in path.read_text()


@pytest.mark.parametrize("name", pretrained_names())
def test_pretrained_weights_are_the_median_run_of_a_published_study(name):
    card = read_model_card(name)
    found = [
        record
        for path in STUDIES
        for record in read_records(path)
        if record.finished == card.finished
    ]
    assert len(found) == 1
    # the weights of the model card are stored in fp16
    assert abs(found[0].test_accuracy - card.test_accuracy) < 0.1
    for field in ("config", "seed", "dataset", "code", "machine", "plan"):
        assert getattr(found[0], field) == getattr(card, field), field
    (study,) = (
        read_records(path) for path in STUDIES if found[0] in read_records(path)
    )
    assert median_record(study).seed == card.seed
    for field, value in card.runs.items():
        assert summarize(study)[field] == value, field


def test_the_numbers_in_the_readme_match_the_records():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \|(.*)\|$", text, flags=re.MULTILINE)
    assert rows
    studies = {path.parent.name: read_records(path) for path in STUDIES}
    for name, cells in rows:
        figures = re.findall(r"(\d+\.\d\d)(?: ± (\d+\.\d\d))?%", cells)
        names = ("test_accuracy", "test_accuracy_tta2", "test_accuracy_tta6")
        assert len(figures) == 3, (name, figures)
        for field, (mean, sd) in zip(names, figures, strict=True):
            found = summarize(studies[name], field)
            assert mean == f"{found['mean']:.2f}", (name, field)
            assert sd == (f"{found['sd']:.2f}" if found["n"] > 1 else ""), (name, field)
        assert f"| {len(studies[name])} |" in cells, name


# ---------------------------------------------------------------- wrong options

WRONG = {
    "zero runs": (cli.study, {"runs": 0}, "runs must be"),
    "an unknown recipe": (
        cli.study,
        {"recipe": "bets"},
        "era, page, modern, modern-no-cutout",
    ),
    "an unknown field": (cli.study, {"changes": {"lr": 1}}, "unknown field 'lr'"),
    "a value of the wrong type": (
        cli.study,
        {"changes": {"drop_transforms": None}},
        "drop_transforms",
    ),
    "epochs set twice": (
        cli.study,
        {"changes": {"epochs": 2}},
        "epochs is set twice",
    ),
    "the name of a recipe as a field": (
        cli.study,
        {"changes": {"name": "era"}},
        "unknown field 'name'",
    ),
    "optimizer options that are not an object": (
        cli.study,
        {"changes": {"optimizer_options": 5}},
        "optimizer_options must be",
    ),
    "weight decay set twice": (
        cli.train,
        {
            "dataset": "digits",
            "weight_decay": 0.1,
            "changes": {"optimizer_options": {"weight_decay": 0.2}},
        },
        "weight_decay is set twice",
    ),
    "weight decay also as an option of the optimizer": (
        cli.train,
        {
            "dataset": "digits",
            "weight_decay": 0.1,
            "optimizer_options": {"weight_decay": 0.2},
        },
        "weight_decay is set twice",
    ),
    "momentum set twice": (
        cli.train,
        {
            "dataset": "digits",
            "optimizer_options": {"momentum": 0.5},
            "changes": {"optimizer_options": {"momentum": 0.8}},
        },
        "momentum is set twice",
    ),
    "precision set twice": (
        cli.study,
        {"changes": {"precision": "bf16"}, "precision": "fp32"},
        "precision is set twice",
    ),
    "an unknown transform": (
        cli.study,
        {"changes": {"drop_transforms": ["Gray"]}},
        "'Gray'",
    ),
    "an EMA span of 1": (cli.study, {"changes": {"ema_span": 1}}, "ema_span"),
    "an unknown dataset": (cli.study, {"dataset": "imagenet"}, "'imagenet'"),
    "neither a run nor a pretrained model": (
        cli_inference.evaluate,
        {"tta": 2},
        "--pretrained",
    ),
    "both a run and a pretrained model": (
        cli_inference.evaluate,
        {"folder": "x", "pretrained": "cifar10"},
        "--pretrained",
    ),
    "a pretrained model on other data": (
        cli_inference.evaluate,
        {"pretrained": "cifar10", "dataset": "digits"},
        "--dataset: --pretrained is measured on CIFAR-10; leave it out",
    ),
    "an unknown pretrained model": (
        cli_inference.evaluate,
        {"pretrained": "runs/x"},
        "unknown trained model 'runs/x'",
    ),
    "a wrong number of TTA views": (
        cli_inference.predict,
        {"files": ["x"], "tta": 4},
        "tta must be 1, 2 or 6",
    ),
    "zero classes to show": (cli_inference.predict, {"files": ["x"], "top": 0}, "top"),
    "a data folder for data that need none": (
        cli.train,
        {"dataset": "digits", "data_dir": "photos"},
        "--data_dir: has no effect with the dataset 'digits'; leave it out",
    ),
    "a data folder for a path": (
        cli.train,
        {"dataset": str(ROOT / "tests"), "data_dir": "photos"},
        "--data_dir: has no effect with the dataset",
    ),
    "a data folder for a study of digits": (
        cli.study,
        {"data_dir": "photos"},
        "--data_dir: has no effect with the dataset 'digits'; leave it out",
    ),
    "a data folder for the learning rate of digits": (
        cli.lr_find,
        {"dataset": "digits", "data_dir": "photos"},
        "--data_dir: has no effect with the dataset 'digits'; leave it out",
    ),
    "a mismatch without a run to resume": (
        cli.train,
        {"dataset": "digits", "allow_mismatch": True},
        "--allow_mismatch: has no effect without --resume; leave it out",
    ),
    "patience without a target": (
        cli.train,
        {"dataset": "digits", "target_patience": 2},
        "--target_patience: has no effect without --target; leave it out",
    ),
    "a number of classes for JSON": (
        cli_inference.predict,
        {"files": ["x"], "json_lines": True, "top": 2},
        "--top: has no effect with --json_lines; leave it out",
    ),
    "a figure in an unknown format": (
        cli.lr_find,
        {"dataset": "digits", "figure": "lr.doc"},
        "lr.doc: not a format for figures; end the name in one of .avif, .eps,",
    ),
    "a figure without a format": (
        cli.lr_find,
        {"dataset": "digits", "figure": "lr"},
        "lr: not a format for figures",
    ),
    "a schedule shorter than the run": (
        cli.train,
        {"dataset": "digits", "schedule_options": {"total_steps": 100}},
        "in a run of 345 steps (Tried to step 101 times.",
    ),
    "an unknown recipe for training": (
        cli.train,
        {"dataset": "digits", "recipe": "bets"},
        "'bets'",
    ),
}


def as_arguments(
    command: Callable,  # function of a command
    options: dict,  # its arguments
) -> list[str]:  # the same, as on a command line
    "Return command-line arguments."
    arguments = []
    for name, value in options.items():
        if name in ("files", "folder") and command is not cli.study:  # positional
            arguments += value if isinstance(value, list) else [value]
        else:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            arguments += [f"--{name}"] if value is True else [f"--{name}", text]
    return arguments


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_give_a_one_line_error(name, tmp_path, monkeypatch, capsys):
    command, options, message = WRONG[name]
    monkeypatch.chdir(tmp_path)
    if command is cli.study:
        options = {"dataset": "digits", "epochs": 1, **options}
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        command(**options)
    with pytest.raises(SystemExit) as ended:
        command.main(as_arguments(command, options))
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n")) == (2, 1), error
    assert error.startswith(f"era_s10_{command.__name__}: error: ")
    assert message in error
    assert not any(tmp_path.iterdir())


FORMATS = {
    "png": b"\x89PNG", "PDF": b"%PDF", "svg": b"<?xml", "svgz": b"\x1f\x8b", "eps": b"%!PS", "jpg": b"\xff\xd8",
    "webp": b"RIFF", "tif": b"II*",
}  # fmt: skip


def test_figures_have_the_format_that_their_suffix_names(tmp_path):
    for suffix, start in FORMATS.items():
        save_figures(tmp_path, {"one": Figure((1, 1))}, f".{suffix}")
        assert (tmp_path / f"one.{suffix}").read_bytes().startswith(start), suffix
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"one\.pgf: not a format"):
        save_figures(tmp_path, {"one": Figure((1, 1))}, ".pgf")
    assert files(tmp_path) == before


def test_the_plot_of_the_learning_rate_has_the_format_of_its_name(tmp_path):
    cli.lr_find("digits", steps=10, figure=str(tmp_path / "lr.pdf"))
    assert (tmp_path / "lr.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"optimizer": "SGD"}, {"optimizer_options": {}, "max_lr": None}),
        ({"optimizer": "SGD", "optimizer_options": {"momentum": 0.5}}, {"optimizer_options": {"momentum": 0.5}}),
        ({"weight_decay": 0.1}, {"optimizer_options": {"weight_decay": 0.1}}),
        ({"recipe": "modern", "optimizer": "Adam"}, {"optimizer_options": {}, "max_lr": None}),
        ({"recipe": "modern", "weight_decay": 0.1}, {"optimizer_options": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}}),
        ({"recipe": "modern", "schedule": "CosineAnnealingLR"}, {"schedule_options": {}, "max_lr": 0.4}),
        ({"recipe": "modern", "max_lr": 0.2}, {"max_lr": 0.2}),
        ({"recipe": "modern", "changes": {"epochs": 2}}, {"epochs": 2}),
        ({"changes": {"optimizer": "SGD", "optimizer_options": {"momentum": 0.9}}}, {"optimizer_options": {"momentum": 0.9}}),
        ({"changes": {"target_patience": 5}}, {"target_patience": 5}),
        ({"target": 99.0, "target_patience": 5}, {"target_patience": 5}),
    ],
)  # fmt: skip
def test_options_of_a_command_change_its_recipe(
    options, expected, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    configs = []

    class Stop(Exception):
        pass

    def stop(model, dataset, config, *others):
        configs.append(config)
        raise Stop

    monkeypatch.setattr("era_s10.options.Experiment", stop)
    with pytest.raises(Stop):
        cli.train(dataset="digits", **options)
    for name, value in expected.items():
        assert getattr(configs[0], name) == value, name
