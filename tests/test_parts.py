"""Batches in parts: gradient accumulation in a fixed order, and batch norm over a part."""

import pytest
import torch
from torch import Tensor, nn

from era_s10.backprop import Experiment
from era_s10.datasets.digits import Digits
from era_s10.model import Model
from era_s10.parts import PartNorms, TreeSum, accumulate
from era_s10.recipe import Config
from era_s10.steps import TrainingStep
from era_s10.utils import set_seed


def plain_model() -> nn.Module:
    "Return a model without batch norm and dropout."
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(900, 10)
    )


def batch(images: int) -> tuple[Tensor, Tensor]:
    "Return random images and labels."
    return torch.randn(images, 3, 32, 32), torch.arange(images) % 10


def gradient(model: nn.Module, parts: int, images: int, precision="fp32") -> Tensor:
    "Return the gradient of a batch as one vector."
    torch.manual_seed(0)
    x, y = batch(images)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = TrainingStep(model.train(), optimizer, parts=parts, precision=precision)
    step.step(x, y)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("images", [64, 61, 5])
@pytest.mark.parametrize("parts", [2, 4, 7, 16])
def test_without_batch_norm_the_parts_learn_what_the_batch_learns(parts, images):
    torch.manual_seed(1)
    model = plain_model()
    whole = gradient(model, 1, images)
    found = gradient(model, parts, images)
    assert (found - whole).norm() < 1e-5 * whole.norm()
    assert (gradient(model, 1, images - 1) - whole).norm() > 1e-2 * whole.norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_batch_norm_normalizes_a_part(precision):
    torch.manual_seed(1)
    model = Model(2)
    whole, found = (gradient(model, parts, 64, precision) for parts in (1, 8))
    assert (found - whole).norm() > 0.1 * whole.norm()
    assert torch.equal(gradient(model, 8, 64, precision), found)


def test_fp16_learns_in_parts():
    losses = {}
    for parts in (1, 4):
        torch.manual_seed(0)
        model, (x, y) = plain_model(), batch(32)
        adam = torch.optim.Adam(model.parameters(), lr=0.01)
        step = TrainingStep(model, adam, parts=parts, precision="fp16")
        losses[parts] = [step.step(x, y)[0].item() for _ in range(8)]
    assert losses[4] == pytest.approx(losses[1], rel=0.05)
    assert losses[4][-1] < 0.8 * losses[4][0]


def test_half_of_the_parts_is_half_of_the_tree():
    torch.manual_seed(1)
    model, (x, y) = Model(2).train(), batch(64)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0

    def backward(part: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(images)
        loss = nn.functional.cross_entropy(logits, labels)
        loss.backward()
        return loss, logits

    def sums(rows: slice, parts: int) -> list[Tensor]:
        accumulate(model, x[rows], y[rows], range(parts), backward)
        found = [p.grad * len(y[rows]) for p in model.parameters()]  # exact
        model.zero_grad()
        return found

    together = TreeSum()
    together.add(sums(slice(0, 32), 4))
    together.add(sums(slice(32, 64), 4))
    halves, whole = together.total(), sums(slice(0, 64), 8)
    assert all(torch.equal(a, b) for a, b in zip(halves, whole, strict=True))
    thirds = TreeSum()
    for rows in (
        slice(0, 24),
        slice(24, 48),
        slice(48, 64),
    ):  # not branches of the tree
        thirds.add(sums(rows, (rows.stop - rows.start) // 8))
    pairs = zip(thirds.total(), whole, strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_move_once_to_the_mean_of_the_parts(momentum):
    layer, (x, _) = nn.BatchNorm2d(3, momentum=momentum), batch(10)
    sizes, totals = [4, 3, 3], TreeSum()
    with PartNorms(layer) as norms:
        for part in x.split(sizes):
            layer(part)
            totals.add([len(part) * s for s in norms.statistics()])
        norms.means = [total / len(x) for total in totals.total()]
    pieces = list(zip(sizes, x.split(sizes), strict=True))
    mean = sum(n * part.mean((0, 2, 3)) for n, part in pieces) / 10
    variance = sum(n * part.var((0, 2, 3)) for n, part in pieces) / 10
    share = 1 if momentum is None else momentum
    torch.testing.assert_close(layer.running_mean, share * mean)
    torch.testing.assert_close(layer.running_var, 1 - share + share * variance)
    assert layer.num_batches_tracked == 1 and layer.momentum == momentum


def test_dropout_differs_between_the_parts_of_a_step():
    masks = []

    class Seen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                masks.append(nn.functional.dropout(torch.ones(64), 0.5) > 0)
            return x

    def run(parts: int) -> list[Tensor]:
        set_seed(0)
        masks.clear()
        model = nn.Sequential(Seen(), plain_model())
        data = Digits(limit=64, batch_size=32)
        config = Config(max_lr=0.01, epochs=1, device="cpu", parts=parts)
        experiment = Experiment(model, data, config)
        masks.clear()  # of the checks
        experiment.run()
        return list(masks)

    whole, parts, again = run(1), run(2), run(2)
    assert [len(found) for found in (whole, parts)] == [2, 4]
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    different = {tuple(mask.tolist()) for mask in (*whole, *parts)}
    assert len(different) == 6


def test_one_part_is_the_plain_step():
    def run(**options) -> list[Tensor]:
        set_seed(0)
        data = Digits(limit=100, batch_size=32)
        config = Config(max_lr=0.01, epochs=1, device="cpu", dropout=0.1, **options)
        experiment = Experiment(Model(2), data, config)
        experiment.run()
        return [value.clone() for value in experiment.model.state_dict().values()]

    one, default, four = run(parts=1), run(), run(parts=4)
    assert all(torch.equal(a, b) for a, b in zip(one, default, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, four, strict=True))


def test_more_parts_than_images_are_refused():
    config = Config(max_lr=0.01, epochs=1, device="cpu", parts=33)
    with pytest.raises(ValueError, match=r"at most as many parts \(got 33\)"):
        Experiment(plain_model(), Digits(limit=64, batch_size=32), config)


def test_a_part_with_one_image_is_refused_if_the_model_cannot_learn_from_it():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10), nn.BatchNorm1d(10))
    data = Digits(limit=66, batch_size=32)  # the last batch has two images
    config = Config(max_lr=0.01, epochs=1, device="cpu", parts=2)
    with pytest.raises(ValueError, match="2 images in 2 parts leave one for a part"):
        Experiment(model, data, config)
    Experiment(model, Digits(limit=64, batch_size=32), config)
