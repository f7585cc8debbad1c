"""Runs in several processes at their edges: before training, after its end, and what they leave behind."""

import re

import pytest
import torch

from era_s10 import cli
from era_s10.processes import Group
from era_s10.resume import _MACHINE


@pytest.fixture
def current_gpu(monkeypatch) -> list:
    "Let torch report four GPUs; return the list of devices that became the current one."
    chosen: list = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_only_a_process_that_trains_makes_its_gpu_the_current_one(current_gpu):
    gpus = [torch.device("cuda", i) for i in range(4)]
    for name in (None, "cuda"):
        Group(0, 2, 0, 2).check_device(name, gpus[0])
    with pytest.raises(ValueError, match="can't share cuda:3"):
        Group(0, 8, 0, 8).check_device(None, gpus[3])
    assert Group(3, 4, 3, 4).device("cpu") == torch.device("cpu")
    assert Group().device("cuda") == torch.device("cuda")
    assert not current_gpu
    assert Group(3, 4, 3, 4).device(None) == gpus[3]
    assert current_gpu == [gpus[3]]


def help_of(command: str, option: str, capsys) -> str:
    "Return the help of an option of a command in one line."
    with pytest.raises(SystemExit):
        getattr(cli, command).main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    return re.search(rf" --{option} ([a-z, ]+)", text)[1]


def test_the_help_names_all_that_may_be_accepted(capsys):
    named = help_of("train", "allow_mismatch", capsys)
    kinds = {name.strip(" .").removeprefix("recipe.") for name in _MACHINE}
    assert not [kind for kind in kinds - {"compile"} if kind not in named], named
    named = help_of("study", "allow_mismatch", capsys)
    for kind in ("versions", "device", "threads", "compil"):
        assert kind in named, named
