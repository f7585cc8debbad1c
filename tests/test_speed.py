"The fast network: in experiments, commands and files."

import signal

import numpy as np
import pytest
import torch
from pictures import needs_cifar10
from PIL import Image
from project import ROOT

from era_s10 import cli, cli_inference, preflight
from era_s10.backprop import Experiment
from era_s10.datasets.cifar10 import CIFAR10HeldOut
from era_s10.datasets.digits import Digits
from era_s10.model import MODELS, Model, load_pretrained, model_class
from era_s10.processes import tensor_digest
from era_s10.recipe import RECIPES, make_config
from era_s10.run_folder import load_run
from era_s10.speed import FastModel
from era_s10.steps import shrink
from era_s10.study import read_records, summarize
from era_s10.utils import set_seed


def experiment(folder=None, recipe="fast", **changes) -> Experiment:
    "Return an experiment with a small fast network on a few digits."
    set_seed(0)
    config = make_config(recipe, **{"epochs": 2, "device": "cpu", **changes})
    return Experiment(FastModel(8), Digits(batch_size=64, limit=256), config, folder)


def digest(one: Experiment) -> str:
    return tensor_digest(one.model.state_dict())


@pytest.mark.parametrize("small", [0.0, 0.5])
@pytest.mark.parametrize("stop", [2, 4, 7])
def test_a_run_resumes_bit_for_bit(stop, small, tmp_path):
    unbroken = experiment(small_images=small)
    unbroken.run()
    broken = experiment(tmp_path / "run", small_images=small)
    step = broken.train.step

    def interrupted(*batch):
        if broken.train.steps == stop:
            raise KeyboardInterrupt
        return step(*batch)

    broken.train.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    again = experiment(tmp_path / "run", small_images=small)
    again.resume()
    assert again.train.steps == 8
    assert digest(again) == digest(unbroken)
    assert digest(broken) != digest(unbroken)


SHARES = {
    0.0: 0,
    0.1: 0,
    0.125: 1,
    0.5: 2,
    0.625: 3,
    0.67: 3,
    1.0: 4,
}  # small epochs of four


@pytest.mark.parametrize("share", SHARES)
def test_the_first_epochs_train_on_smaller_images_and_tests_on_full_ones(share):
    one = experiment(epochs=4, small_images=share)
    sizes = {True: [], False: []}
    one.model.register_forward_pre_hook(
        lambda model, args: sizes[model.training].append(args[0].shape[-1])
    )
    one.run()
    per_epoch = sizes[True][::4]  # 256 images in batches of 64
    assert per_epoch == [24] * SHARES[share] + [32] * (4 - SHARES[share])
    assert set(sizes[False]) == {32}


def sizes_of(one: Experiment) -> list[int]:
    "Return a list to which each training step appends the width of its images."
    found, step = [], one.train.step

    def recorded(x, *rest):
        found.append(x.shape[-1])
        return step(x, *rest)

    one.train.step = recorded
    return found


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("recipe", ["fast", "modern"])  # with an EMA
def test_smaller_images_work_with_every_kind_of_step(recipe, parts):
    how = {"small_images": 0.5, "parts": parts, "max_lr": 0.02}
    one = experiment(recipe=recipe, **how)
    sizes = sizes_of(one)
    history = one.run()
    assert sizes == [24] * 4 + [32] * 4
    assert np.isfinite([e["train_loss"] for e in history]).all()
    assert digest(one) != digest(other := experiment(recipe=recipe, parts=parts))
    assert other.train.small_epochs == 0


@pytest.mark.parametrize(
    ("stop", "longer", "expected"),
    [  # 4 steps an epoch; the first of two epochs is small, then 3 of 6 would be
        (8, 6, [24] * 4 + [32] * 20),  # after the end: does not return to small ones
        (6, 6, [24] * 4 + [32] * 20),  # in a full epoch
        (2, 6, [24] * 12 + [32] * 12),  # in a small epoch: the share of the new length
    ],
)
def test_a_lengthened_run_does_not_return_to_smaller_images(
    stop, longer, expected, tmp_path
):
    first = experiment(tmp_path / "run", small_images=0.5)
    sizes, step = sizes_of(first), first.train.step

    def interrupted(*batch):
        if first.train.steps == stop - 1 < 7:
            signal.raise_signal(signal.SIGINT)  # after this step
        return step(*batch)

    first.train.step = interrupted
    if stop < 8:
        with pytest.raises(KeyboardInterrupt):
            first.run()
    else:
        first.run()
    again = experiment(tmp_path / "run", small_images=0.5)
    more = sizes_of(again)
    again.resume(epochs=longer)
    assert sizes + more == expected
    assert again.plan.small_epochs == expected.count(24) // 4


def test_shrinking_is_linear_interpolation():
    x = torch.arange(32.0).expand(2, 3, 48, 32)  # a ramp from left to right
    small = shrink(x)
    assert small.shape == (2, 3, 36, 24)
    centers = (torch.arange(24) + 0.5) * 4 / 3 - 0.5
    assert torch.allclose(small[1, 2, 7, 1:-1], centers[1:-1], atol=0.02)
    x = torch.rand(4, 3, 33, 47)
    assert shrink(x).shape == (4, 3, 24, 35)
    assert torch.equal(shrink(x)[2:], shrink(x[2:]))  # as parts and processes need


@pytest.mark.parametrize("share", [-0.1, 1.1, None, "half", float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=r"^small_images must be at least 0 and at"):
        make_config("fast", small_images=share)


def test_a_model_that_needs_the_full_size_is_refused():
    config = make_config("era", small_images=0.5, device="cpu")
    with pytest.raises(
        ValueError, match=r"^small_images: the model can't .* 3x24x24 .* leave"
    ):
        Experiment(Model(4), Digits(batch_size=64, limit=256), config)


@pytest.mark.parametrize(("share", "seconds"), [(0.0, 80), (0.5, 60), (1.0, 40)])
def test_the_estimate_of_an_epoch_is_a_mean_over_sizes(share, seconds, monkeypatch):
    one, budgets = experiment(small_images=share), []

    def fixed(work, budget):
        "Count 20 seconds for a full batch, 10 for a smaller one, 0 for a test."
        budgets.append(budget)
        next(work)
        return {32: 20, 24: 10}[sizes.pop()] if sizes else 0

    sizes = []
    one.model.register_forward_pre_hook(
        lambda model, args: sizes.append(args[0].shape[-1]) if model.training else None
    )
    # the hook is copied with the model, and its list is not
    monkeypatch.setattr(preflight, "seconds_per_batch", fixed)
    assert one.estimate_epoch(budget=4.0) == seconds  # 4 batches
    assert sum(budgets[:-1]) == 4.0 and len(budgets) == 2 + (share == 0.5)


def test_a_share_that_has_no_effect_is_reported():
    message = "small_images: less than half of an epoch"
    assert message in experiment(epochs=4, small_images=0.1).unused
    assert message not in experiment(epochs=4, small_images=0.2).unused
    assert message not in experiment(epochs=4).unused


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    first, same = experiment(), experiment()
    first.run(), same.run()
    assert digest(first) == digest(same)
    other = experiment()
    other.dataset.seed = 1
    other.run()
    assert digest(other) != digest(first)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_it_and_its_first_layer_whitens(recipe):
    one = experiment(recipe=recipe, max_lr=0.02, epochs=1)
    weight = one.model.net[0].weight
    assert torch.equal(weight[:12], -weight[12:])  # fitted, not random
    before = weight.clone()
    history = one.run()
    assert history[-1]["train_loss"] < 2.5
    assert torch.equal(one.model.net[0].weight, before)


def test_a_trained_network_keeps_its_first_layer():
    one = experiment()
    one.run()
    one.model.net[0].weight.mul_(2)
    before = one.model.net[0].weight.clone()
    Experiment(one.model, one.dataset, make_config("fast", device="cpu"))
    assert torch.equal(one.model.net[0].weight, before)


def test_muon_trains_the_other_model_too():
    set_seed(0)
    options = {"normalize": True, "momentum": 0.6, "ns_steps": 3}
    how = {"optimizer": "Muon", "optimizer_options": options, "max_lr": 0.02}
    config = make_config("page", **how, epochs=2, device="cpu")
    data = Digits(batch_size=64, limit=256)
    history = Experiment(Model(4), data, config).run()
    assert history[-1]["train_loss"] < history[0]["train_loss"]


def test_commands_train_evaluate_and_predict_with_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--model", "fast", "--dataset", "digits", "--width", "8"]
    small += ["--device", "cpu", "--epochs"]
    cli.train.main([*small, "2", "--folder", "run"])
    assert "FastModel of width 8" in capsys.readouterr().out
    model, history, settings = load_run("run")
    assert type(model) is FastModel and settings.recipe["recipe"] == "fast"
    cli.train.main(["--resume", "run", "--epochs", "3"])
    cli_inference.evaluate.main(["run", "--device", "cpu"])
    assert "recorded, without TTA" in capsys.readouterr().out
    cli.study.main([*small, "1", "--runs", "1"])
    (study,) = (tmp_path / "results").iterdir()
    assert study.name == "digits-fast-width8-1-epochs-fast"
    trained = load_pretrained(study / "weights.safetensors", study / "card.json")
    assert type(trained) is FastModel and trained.arguments["width"] == 8
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save("black.png")
    cli_inference.predict.main(["black.png", "--weights", str(study)])
    assert capsys.readouterr().out.splitlines()[-1].startswith("black.png ")


def test_models_are_found_by_name_and_by_class():
    assert model_class("era") is Model and model_class("fast") is FastModel
    for kind in (Model, FastModel):
        name = f"{kind.__module__}.{kind.__qualname__}"
        assert name in MODELS.values() and model_class(name) is kind
    with pytest.raises(ValueError, match=r"^unknown model 'slow'; choose one of era, "):
        model_class("slow")


WRONG = {
    "--recipe fast": "--recipe: fast is for --model fast",
    "--recipe fast --model era": "--recipe: fast is for --model fast",
    "--model slow": "unknown model 'slow'; choose one of era, fast",
    "--model fast --dropout 0.1": "--dropout: has no effect with --model fast",
    "--model fast --width 0": "width must be",
    '--model fast --changes {"dropout":0.1}': "dropout: recipe",
    '--optimizer Muon --optimizer_options {"momentum":2}': "momentum must be",
    '--optimizer Muon --optimizer_options {"betas":2}': "Muon can't take",
    '--changes {"crop_padding":-1}': "crop_padding must be",
    '--changes {"small_images":2}': "small_images must be",
    '--model era --changes {"small_images":0.5}': "small_images: the model",
}


@pytest.mark.parametrize("options", WRONG)
def test_wrong_options_are_refused_in_one_line(options, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.train.main(["--dataset", "digits", *options.split()])
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert WRONG[options] in last, last


@needs_cifar10
@pytest.mark.slow
def test_two_epochs_on_5000_images_are_as_accurate_as_recorded():
    records = read_records(ROOT / "nbs/results/fast-5000-images/runs.jsonl")
    found, first = summarize(records), records[0]
    assert found["n"] == 5
    set_seed(5)
    config = make_config("fast", epochs=2, device="cpu")
    assert first.config["optimizer_options"] == config.optimizer_options
    data = CIFAR10HeldOut(batch_size=250, limit=5000, seed=5)
    assert data.fingerprints["test"] == first.fingerprints["test"]
    history = Experiment(FastModel(), data, config).run()
    accuracy, floor = history[-1]["test_accuracy"], found["mean"] - 3 * found["sd"]
    assert accuracy >= floor > 60, f"{accuracy:.2f}% of held-out images"
