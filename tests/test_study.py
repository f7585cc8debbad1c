"Studies of several runs: cut off and gone on with, and what their figures claim."

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from project import ROOT, command

from era_s10 import cli, study
from era_s10.backprop import Experiment, Test
from era_s10.datasets.digits import Digits
from era_s10.model import Model
from era_s10.recipe import RECIPES, make_config
from era_s10.study import (
    ablation,
    check_alike,
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
from era_s10.weights import load_pretrained, pretrained_names, read_model_card

COMMAND = command(
    "era_s10_study", "--dataset", "digits", "--recipe", "modern", "--width", "4"
)
COMMAND += [
    "--epochs",
    "4",
    "--runs",
    "2",
    "--folder",
    "study",
    "--checkpoint_steps",
    "23",
]
OF_THE_MOMENT = ("seconds", "finished", "history")


def lasting(folder: Path) -> list[dict]:  # Of a study
    "Return what its lines say, but for the times."
    records = read_records(folder / "runs.jsonl")
    for record in records:
        record["epochs told"] = [
            {k: v for k, v in epoch.items() if k != "seconds"}
            for epoch in record["history"]
        ]
        for name in OF_THE_MOMENT:
            del record[name]
    return records


@pytest.fixture(scope="module")
def is_complete(tmp_path_factory) -> Path:
    "Return the folder of a study that nothing disturbed."
    place = tmp_path_factory.mktemp("whole")
    done = subprocess.run(COMMAND, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return place / "study"


@pytest.mark.parametrize(
    ("sign", "end"),
    [
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow),
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_a_study_that_was_cut_off_goes_on_to_the_same_figures(
    sign, end, whole, tmp_path
):
    epochs = {
        "seed-0": 3,
        "seed-1": 2,
    }  # cut off in the first run, and again in the second
    told = []
    for name, number in epochs.items():
        process = subprocess.Popen(
            COMMAND,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        history = tmp_path / "study" / name / "history.jsonl"
        while process.poll() is None:
            if history.exists() and len(history.read_text().splitlines()) >= number:
                process.send_signal(sign)
                break
            time.sleep(0.01)
        out, errors = process.communicate()
        assert process.returncode == end, errors
        assert "Traceback" not in errors
        assert ("the same command goes on" in errors) == (sign != signal.SIGKILL)
        told.append(out)
    done = subprocess.run(COMMAND, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    second, last = told[1].split("seed    1")[0], done.stdout
    for out, first in ((second, 4), (last, 3)):  # what had been done is not done again
        assert re.findall(r"epoch +(\d+)/4", out)[0] in (str(first), str(first - 1)), (
            out
        )
    assert lasting(tmp_path / "study") == lasting(whole)
    weights = [folder / "weights.safetensors" for folder in (whole, tmp_path / "study")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
def test_a_folder_of_another_study_is_refused(whole):
    before = (whole / "runs.jsonl").read_bytes()
    for option, word in (
        (["--changes", '{"label_smoothing": 0.1}'], "another recipe"),
        (["--width", "5"], "another net"),
        (["--batch_size", "32"], "another batch_size"),
        (["--runs", "3"], "threads was"),
    ):
        other = "2" if torch.get_num_threads() == 1 else "1"
        environment = (
            {**os.environ, "OMP_NUM_THREADS": other} if "--runs" in option else None
        )
        done = subprocess.run(
            [*COMMAND, *option],
            cwd=whole.parent,
            capture_output=True,
            text=True,
            env=environment,
        )
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert word in done.stderr
    assert (whole / "runs.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_run_goes_on_with_other_threads_only_if_asked_and_never_with_another_recipe(
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
    assert [line.split()[0] for line in record["accepted"]] == ["threads"]
    assert "seed 0 was cut off; when it went on: threads was" in done.stdout
    config = json.loads((tmp_path / "study" / "seed-0" / "config.json").read_text())
    assert (config["threads"], config["run"]["accepted"]) == (other, record["accepted"])
    card = json.loads((tmp_path / "study" / "card.json").read_text())
    assert card["accepted"] == record["accepted"]


@pytest.fixture(scope="module")
def ran() -> Experiment:
    "Return an experiment that has run to its end."
    set_seed(0)
    config = make_config("modern", epochs=1)
    experiment = Experiment(Model(width=4), Digits(batch_size=64), config)
    experiment.run()
    return experiment


def changed(
    record: dict, name: str, value
) -> dict:  # The name's parts have dots between
    "Return a record in which one value is another."
    record = copy.deepcopy(record)
    *path, last = name.split(".")
    place = record
    for part in path:
        place = place[part]
    place[last] = value
    return record


@pytest.mark.parametrize(
    ("name", "value", "strictly", "allow_mismatch"),
    [
        ("config.label_smoothing", 0.1, "another recipe", "another recipe"),
        ("numerics.precision", "bf16", "another numerics", "another numerics"),
        ("model.arguments.width", 5, "another net", "another net"),
        ("dataset.batch_size", 32, "another batch_size", "another batch_size"),
        ("threads", 99, "threads was 99", None),
        ("machine.device", "a GPU", "device was 'a GPU'", None),
        ("machine.versions.torch", "1.0", "versions.torch was '1.0'", None),
        ("config.compile", True, "compile was True", None),
        (
            "machine.versions.albumentations",
            "1.0",
            None,
            None,
        ),  # the batched backend draws
        ("config.precision", "fp32", None, None),  # as it was without being told
        ("config.channels_last", True, None, None),
        ("config.device", "cpu", None, None),
        ("dataset.seed", 7, None, None),
        ("machine.cpu", "another", None, None),
    ],
)
def test_what_makes_another_study(name, value, strictly, anyway, ran):
    record = changed(run_record(ran), name, value)
    for strict, words in ((True, strictly), (False, anyway)):
        if words is None:
            check_alike(ran, [record], strict)
        else:
            with pytest.raises(ValueError, match=re.escape(words)):
                check_alike(ran, [record], strict)


def test_on_an_accelerator_the_processor_may_have_any_number_of_cores(ran, monkeypatch):
    record = changed(run_record(ran), "machine.device", "a GPU")
    real = study.describe_machine
    monkeypatch.setattr(
        study, "describe_machine", lambda device: real() | {"device": "a GPU"}
    )
    check_alike(ran, [record | {"threads": 99}])
    with pytest.raises(ValueError, match=r"versions\.torch"):
        check_alike(ran, [changed(record, "machine.versions.torch", "1.0")])


def test_what_can_be_compared_and_drawn(ran):
    record = run_record(ran)
    better = record | {"test_accuracy": record["test_accuracy"] + 1}
    groups = {"one": [better], "base": [record, better]}
    (row,) = ablation(groups, "base")
    assert (row["change"], row["verdict"]) == ("one", "too few runs to tell")
    (marker,) = [
        line for line in plot_ablation([row]).axes[0].lines if line.get_marker() == "o"
    ]
    assert marker.get_markerfacecolor() == "white"
    early = changed(
        record, "plan.epochs", 2
    )  # met its target in the first of two epochs
    late = early | {"epochs": 2, "history": record["history"] * 2}
    assert results_table({"both": [early, late]})[0]["epochs"] == 2
    assert len(plot_runs({"both": [early, late]}).axes[0].lines) == 3
    fewer = changed(record, "dataset.images.train", 100)
    foreign = changed(record, "dataset.fingerprints.test", "0")
    for call, words in (
        (
            lambda: ablation(groups, "none"),
            "there are no runs of 'none'; there are one, base",
        ),
        (
            lambda: ablation({"base": [record], "empty": []}, "base"),
            "'empty' has no runs",
        ),
        (
            lambda: ablation({"base": [record], "few": [fewer]}, "base"),
            "runs of the same data",
        ),
        (lambda: results_table({"mixed": [record, late]}), "several widths or lengths"),
        (lambda: compare([foreign], [record]), "only runs with the same test images"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


@pytest.mark.slow
def test_a_study_can_be_evaluated(whole, tmp_path):
    evaluate = command("era_s10_evaluate", str(whole))
    done = subprocess.run(evaluate, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = re.findall(r"(\d+\.\d\d) %", done.stdout)
    assert figures[-2] == figures[-1]  # measured, and on its card
    shutil.copytree(whole, tmp_path / "taken")
    (tmp_path / "taken" / "confusion.png").unlink()
    (tmp_path / "taken" / "confusion.png").mkdir()
    taken = command("era_s10_evaluate", str(tmp_path / "taken"))
    taken = subprocess.run(taken, capture_output=True, text=True)
    assert (taken.returncode, taken.stderr.count("\n")) == (2, 1), taken.stderr
    before = sorted(whole.iterdir())
    few = np.zeros((4, 8, 8, 3), np.uint8)
    labels = np.array([0, 1, 0, 1])
    np.savez(
        tmp_path / "few.npz", x_train=few, y_train=labels, x_test=few, y_test=labels
    )
    other = [*evaluate, "--dataset", str(tmp_path / "few.npz")]
    other = subprocess.run(other, capture_output=True, text=True)
    assert "has other classes" in other.stderr
    assert other.returncode == 2
    assert sorted(whole.iterdir()) == before


def test_other_images_are_normalised_as_the_nets_own(whole, tmp_path):
    digits = Digits(batch_size=64)
    dark = {part: getattr(digits, part) // 2 for part in ("x_train", "x_test")}
    np.savez(
        tmp_path / "dark.npz", y_train=digits.y_train, y_test=digits.y_test, **dark
    )
    evaluate = command(
        "era_s10_evaluate", str(whole), "--dataset", str(tmp_path / "dark.npz")
    )
    done = subprocess.run(evaluate, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = float(re.search(r"accuracy (\d+\.\d\d) %", done.stdout)[1])
    digits.x_test = dark["x_test"]  # with the mean and the deviation of the bright ones
    net = load_pretrained(whole / "weights.safetensors", whole / "card.json")
    assert said == pytest.approx(Test(net, digits)()[1], abs=0.01)


def test_classes_without_names_take_the_nets():
    own = {"classes": list("abcdefghij"), "mean": [0.3], "std": [0.4]}
    images = Digits()
    cli._make_fit(images, own, "digits")
    assert (list(images.classes), images.mean, images.std) == (
        own["classes"],
        (0.3,),
        (0.4,),
    )
    images.classes = tuple("klmnopqrst")
    cli._make_fit(
        images, {"classes": list("0123456789")}, "digits"
    )  # a net without names
    assert "".join(images.classes) == "klmnopqrst"
    for classes in (own["classes"], ["a", "b"]):
        with pytest.raises(ValueError, match="digits has other classes"):
            cli._make_fit(images, {"classes": classes}, "digits")


@pytest.mark.parametrize(
    "lost", ["", pytest.param("weights.safetensors", marks=pytest.mark.slow)]
)
def test_weights_that_are_gone_are_told_with_the_way_out(lost, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "study")
    seed = median_record(read_records(whole / "runs.jsonl"))["seed"]
    place = tmp_path / "study" / f"seed-{seed}"
    (place / lost).unlink() if lost else shutil.rmtree(place)
    done = subprocess.run(COMMAND, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"a line of seed {seed}: take out that line and the folder" in done.stderr


def test_a_long_recipe_has_a_folder_all_the_same():
    config = make_config(
        "era", **{k: v for k, v in vars(RECIPES["modern"]).items() if k != "recipe"}
    )
    assert len(config.recipe) > 200
    name = cli._study_folder("digits", config, 4).name
    assert len(name) < 150
    assert name != cli._study_folder("digits", replace(config, max_lr=0.3), 4).name


@pytest.mark.slow
def test_a_study_is_reported_whole_however_many_runs_are_asked_for(tmp_path):
    for runs in ("2", "1"):
        done = subprocess.run(
            [*COMMAND, "--epochs", "1", "--runs", runs],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "(n = 2)" in done.stdout
    assert json.loads((tmp_path / "study" / "card.json").read_text())["runs"]["n"] == 2


def test_a_line_holds_all_that_makes_it_repeatable(whole):
    for record in read_records(whole / "runs.jsonl"):
        assert record["config"]["optimizer"] == "SGD"
        assert record["dataset"]["fingerprints"] == Digits.checksums
        assert len(record["history"]) == record["epochs"] == 4
        assert record["history"][-1]["test_accuracy"] == record["test_accuracy"]
        assert record["seconds"] == pytest.approx(
            sum(e["seconds"] for e in record["history"])
        )
        assert {"cpu", "device", "versions"} <= record["machine"].keys()
        assert len(record["code"]["sources"]) == 32
        assert str(whole.parent) not in json.dumps(record)


# ---------------------------------------------------------------- what is published

STUDIES = sorted((ROOT / "nbs" / "results").rglob("*runs.jsonl"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.parent.name)
def test_published_lines_are_whole_and_alike(path):
    records = read_records(path)
    assert records
    seeds = [record["seed"] for record in records]
    assert len(set(seeds)) == len(seeds)
    for record in records:
        for part in ("config", "model", "numerics", "threads"):
            assert record[part] == records[0][part]
        for part in ("device", "versions"):
            assert record["machine"][part] == records[0]["machine"][part]
        assert {**record["dataset"], "seed": 0} == {**records[0]["dataset"], "seed": 0}
        assert record["history"][-1]["test_accuracy"] == record["test_accuracy"]
        assert record["dataset"]["limit"] is None
    assert "/root" not in path.read_text() and "/home" not in path.read_text()


@pytest.mark.parametrize("name", pretrained_names())
def test_the_weights_that_ship_are_the_median_run_of_a_published_study(name):
    card = read_model_card(name)
    found = [
        record
        for path in STUDIES
        for record in read_records(path)
        if record["finished"] == card["finished"]
    ]
    assert len(found) == 1
    assert (
        abs(found[0]["test_accuracy"] - card["test_accuracy"]) < 0.1
    )  # 16 bits, and 32
    for field in ("config", "seed", "dataset", "code", "machine", "plan"):
        assert found[0][field] == card[field], field
    (study,) = (
        read_records(path) for path in STUDIES if found[0] in read_records(path)
    )
    assert median_record(study)["seed"] == card["seed"]
    for field, value in card["runs"].items():
        assert summarize(study)[field] == value, field


def test_the_home_pages_figures_are_those_of_the_lines():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \|(.*)\|$", text, flags=re.MULTILINE)
    assert rows
    studies = {path.parent.name: read_records(path) for path in STUDIES}
    for name, cells in rows:
        figures = re.findall(r"(\d+\.\d\d)(?: ± (\d+\.\d\d))? %", cells)
        names = ("test_accuracy", "test_accuracy_tta2", "test_accuracy_tta6")
        assert len(figures) == 3, (name, figures)
        for field, (mean, sd) in zip(names, figures, strict=True):
            found = summarize(studies[name], field)
            assert mean == f"{found['mean']:.2f}", (name, field)
            assert sd == (f"{found['sd']:.2f}" if found["n"] > 1 else ""), (name, field)
        assert f"| {len(studies[name])} |" in cells, name


# ---------------------------------------------------------------- wrong options

WRONG = {
    "no run": (cli.study, {"runs": 0}, "runs must be"),
    "an unknown recipe": (
        cli.study,
        {"recipe": "bets"},
        "era, page, modern, modern-no-cutout",
    ),
    "an unknown field": (cli.study, {"changes": {"lr": 1}}, "no field 'lr'"),
    "a field of another kind": (
        cli.study,
        {"changes": {"drop_transforms": None}},
        "drop_transforms",
    ),
    "the length told twice": (
        cli.study,
        {"changes": {"epochs": 2}},
        "epochs is told twice",
    ),
    "a name as a field": (cli.study, {"changes": {"name": "era"}}, "no field 'name'"),
    "options that are none": (
        cli.study,
        {"changes": {"optimizer_options": 5}},
        "optimizer_options must be",
    ),
    "the decay told twice": (
        cli.train,
        {
            "dataset": "digits",
            "weight_decay": 0.1,
            "changes": {"optimizer_options": {"weight_decay": 0.2}},
        },
        "weight_decay is told twice",
    ),
    "the decay as an option of the optimizer": (
        cli.train,
        {
            "dataset": "digits",
            "weight_decay": 0.1,
            "optimizer_options": {"weight_decay": 0.2},
        },
        "weight_decay is told twice",
    ),
    "the momentum told twice": (
        cli.train,
        {
            "dataset": "digits",
            "optimizer_options": {"momentum": 0.5},
            "changes": {"optimizer_options": {"momentum": 0.8}},
        },
        "momentum is told twice",
    ),
    "a field told twice": (
        cli.study,
        {"changes": {"precision": "bf16"}, "precision": "fp32"},
        "precision is told twice",
    ),
    "a transform that there is not": (
        cli.study,
        {"changes": {"drop_transforms": ["Gray"]}},
        "'Gray'",
    ),
    "a share of everything": (cli.study, {"changes": {"ema_span": 1}}, "ema_span"),
    "no such data": (cli.study, {"dataset": "imagenet"}, "'imagenet'"),
    "neither a run nor a net": (cli.evaluate, {"tta": 2}, "--pretrained"),
    "a run and a net": (
        cli.evaluate,
        {"folder": "x", "pretrained": "cifar10"},
        "--pretrained",
    ),
    "a net on other data": (
        cli.evaluate,
        {"pretrained": "cifar10", "dataset": "digits"},
        "leave --dataset out",
    ),
    "a net that there is not": (
        cli.evaluate,
        {"pretrained": "runs/x"},
        "no trained net 'runs/x'",
    ),
    "a wrong number of views": (cli.predict, {"files": ["x"], "tta": 4}, "views are 1"),
    "no classes to be shown": (cli.predict, {"files": ["x"], "top": 0}, "top"),
    "a recipe for training": (
        cli.train,
        {"dataset": "digits", "recipe": "bets"},
        "'bets'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_told_in_one_line(name, tmp_path, monkeypatch, capsys):
    command, options, words = WRONG[name]
    monkeypatch.chdir(tmp_path)
    if command is cli.study:
        options = {"dataset": "digits", "epochs": 1, **options}
    with pytest.raises(SystemExit) as ended:
        command(**options)
    said = capsys.readouterr().err
    assert (ended.value.code, said.count("\n")) == (2, 1), said
    assert words in said
    assert not any(tmp_path.iterdir())


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
    ],
)  # fmt: skip
def test_the_options_of_a_command_become_its_recipe(
    options, expected, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    made = []

    class Enough(Exception):
        pass

    def stop(model, dataset, config, *others):
        made.append(config)
        raise Enough

    monkeypatch.setattr(cli, "Experiment", stop)
    with pytest.raises(Enough):
        cli.train(dataset="digits", **options)
    for name, value in expected.items():
        assert getattr(made[0], name) == value, name
