"""Runs in several processes at their edges: before training, after its end, and what they leave behind."""

import pytest
import torch

from era_s10.processes import Group


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
