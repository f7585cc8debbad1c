"Studies of several runs: cut off and gone on with, and what their figures claim."

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from project import ROOT

from era_s10.datasets import Digits
from era_s10.model import pretrained_names, read_card
from era_s10.study import read_records, summarise

COMMAND = ["era_s10_results", "--dataset", "digits", "--recipe", "best", "--width", "4"]
COMMAND += ["--epochs", "4", "--runs", "2", "--folder", "study"]
OF_THE_MOMENT = ("seconds", "finished", "history")


def lasting(folder: Path) -> list[dict]:  # Of a study
    "Return what its lines say, but for the times."
    records = read_records(folder / "runs.jsonl")
    for record in records:
        record["epochs told"] = [
            {k: v for k, v in epoch.items() if k != "seconds"} for epoch in record["history"]
        ]
        for name in OF_THE_MOMENT:
            del record[name]
    return records


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    "Return the folder of a study that nothing disturbed."
    place = tmp_path_factory.mktemp("whole")
    done = subprocess.run(COMMAND, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return place / "study"


@pytest.mark.parametrize(
    ("sign", "end"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_study_that_was_cut_off_goes_on_to_the_same_figures(sign, end, whole, tmp_path):
    epochs = {"seed-0": 3, "seed-1": 2}  # cut off in the first run, and again in the second
    for name, number in epochs.items():
        process = subprocess.Popen(
            COMMAND, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        history = tmp_path / "study" / name / "history.jsonl"
        while process.poll() is None:
            if history.exists() and len(history.read_text().splitlines()) >= number:
                process.send_signal(sign)
                break
            time.sleep(0.01)
        _out, errors = process.communicate()
        assert process.returncode == end, errors
        assert "Traceback" not in errors
    done = subprocess.run(COMMAND, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert lasting(tmp_path / "study") == lasting(whole)
    weights = [folder / "weights.safetensors" for folder in (whole, tmp_path / "study")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_folder_of_another_study_is_refused(whole):
    before = (whole / "runs.jsonl").read_bytes()
    for option, word in (
        (["--changes", '{"label_smoothing": 0.1}'], "another recipe"),
        (["--width", "5"], "another net"),
        (["--batch_size", "32"], "another batch size"),
    ):
        command = [*COMMAND, *option, "--runs", "3"]
        done = subprocess.run(command, cwd=whole.parent, capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert word in done.stderr
    assert (whole / "runs.jsonl").read_bytes() == before


def test_a_line_holds_all_that_makes_it_repeatable(whole):
    for record in read_records(whole / "runs.jsonl"):
        assert record["config"]["optimizer"] == "SGD"
        assert record["dataset"]["fingerprints"] == Digits.published
        assert len(record["history"]) == record["epochs"] == 4
        assert record["history"][-1]["test_accuracy"] == record["test_accuracy"]
        assert record["seconds"] == pytest.approx(sum(e["seconds"] for e in record["history"]))
        assert {"cpu", "device", "versions"} <= record["machine"].keys()
        assert len(record["sources"]) == 32
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
        assert record["config"] == records[0]["config"]
        assert record["history"][-1]["test_accuracy"] == record["test_accuracy"]
        assert record["dataset"]["limit"] is None
    assert "/root" not in path.read_text() and "/home" not in path.read_text()


@pytest.mark.parametrize("name", pretrained_names())
def test_the_weights_that_ship_are_the_median_run_of_a_published_study(name):
    card = read_card(name)
    found = [
        record
        for path in STUDIES
        for record in read_records(path)
        if record["finished"] == card["finished"]
    ]
    assert len(found) == 1
    assert abs(found[0]["test_accuracy"] - card["test_accuracy"]) < 0.1  # 16 bits, and 32
    assert found[0]["config"] == card["config"]


def test_the_home_pages_means_are_those_of_the_lines():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.findall(r"\((\S+runs\.jsonl)\)", text)
    told = re.findall(r"(\d\d\.\d\d) ± (\d\.\d\d) %", text)
    means = set()
    for path in STUDIES:
        found = summarise(read_records(path))
        means.add((f"{found['mean']:.2f}", f"{found['sd']:.2f}"))
    assert told or table is not None
    assert set(told) <= means, set(told) - means
