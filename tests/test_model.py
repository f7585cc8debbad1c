"""The model: its summary table, line by line, its parameters, and images of other sizes."""

import copy
import io
import re

import pytest
import torch
import torchinfo
from torch import fx, nn

from era_s10.model import Model

# depth, class name, number at that depth, output shape, parameters
Row = tuple[int, str, int, tuple[int, ...], int]


def blocks(width: int) -> list[tuple[int, int, int, bool, bool]]:
    "Return input channels, output channels, output size, pooling and skip connection of each block."
    return [
        (3, width, 32, False, False),
        (width, 2 * width, 16, True, True),
        (2 * width, 4 * width, 8, True, False),
        (4 * width, 8 * width, 4, True, True),
    ]


def expected_rows(
    width: int = 64, batch_size: int = 512, classes: int = 10
) -> list[Row]:
    "Return the expected rows of the table, in order."
    rows, counts = [], {}

    def row(depth: int, name: str, *shape: int, parameters: int = 0) -> None:
        counts[depth] = counts.get(depth, 0) + 1
        rows.append((depth, name, counts[depth], (batch_size, *shape), parameters))

    def conv_layer(
        depth: int, fan_in: int, fan_out: int, side: int, pool: bool
    ) -> None:
        full = side * 2 if pool else side
        row(depth, "ConvLayer", fan_out, side, side)
        row(depth + 1, "Sequential", fan_out, side, side)
        row(depth + 2, "Conv2d", fan_out, full, full, parameters=9 * fan_in * fan_out)
        if pool:
            row(depth + 2, "MaxPool2d", fan_out, side, side)
        row(depth + 2, "BatchNorm2d", fan_out, side, side, parameters=2 * fan_out)
        row(depth + 2, "ReLU", fan_out, side, side)
        row(depth + 2, "Dropout", fan_out, side, side)

    row(0, "Model", classes)
    row(1, "Sequential", classes)
    for fan_in, fan_out, side, pool, residual in blocks(width):
        row(2, "CustomLayer", fan_out, side, side)
        conv_layer(3, fan_in, fan_out, side, pool)
        if residual:
            row(3, "Sequential", fan_out, side, side)
            conv_layer(4, fan_out, fan_out, side, False)
            conv_layer(4, fan_out, fan_out, side, False)
    row(2, "MaxPool2d", 8 * width, 1, 1)
    row(2, "Flatten", 8 * width)
    row(2, "Linear", classes, parameters=8 * width * classes + classes)
    return rows


LINE = re.compile(
    r"((?:│    )*)(?:[├└]─)?(\w+)(?:: (\d+)-(\d+))?\s+\[([\d, ]+)\]\s+(\S+)\s+(\S+)"
)


def rows_of(table: str) -> list[tuple[Row, str]]:
    "Parse the rows of a table, each with its percentage."
    found = []
    for line in table.splitlines():
        match = LINE.fullmatch(line.rstrip())
        if match:
            bars, name, depth, number, shape, count, percent = match.groups()
            assert len(bars) == 5 * max(0, int(depth or 0) - 1)
            parameters = 0 if count == "--" else int(count.replace(",", ""))
            shape = tuple(int(n) for n in shape.split(","))
            found.append(
                ((int(depth or 0), name, int(number or 1), shape, parameters), percent)
            )
    return found


def table_of(model: Model, batch_size: int = 512) -> str:
    "Return the table of the original design, computed on the meta device."
    statistics = torchinfo.summary(
        model.to("meta"),
        (batch_size, 3, 32, 32),
        depth=10,
        col_names=("output_size", "num_params", "params_percent"),
        row_settings=("depth",),
        device="meta",
        verbose=0,
    )
    return str(statistics)


@pytest.fixture(scope="module")
def table() -> str:
    "Return the table of the model at its default width."
    return table_of(Model())


def test_table_rows(table):
    found = rows_of(table)
    assert [row for row, _ in found] == expected_rows()
    for (*_, parameters), percent in found:
        assert percent == (
            f"{100 * parameters / 6_573_130:.2f}%" if parameters else "--"
        )


def test_table_totals(table):
    totals = dict(
        line.rsplit(": ", 1)
        for line in table.splitlines()
        if re.match(r"\w.*: [\d.,]+$", line)
    )
    assert totals == {
        "Total params": "6,573,130",
        "Trainable params": "6,573,130",
        "Non-trainable params": "0",
        "Total mult-adds (Units.GIGABYTES)": "194.18",
        "Input size (MB)": "6.29",
        "Forward/backward pass size (MB)": "2382.41",
        "Params size (MB)": "26.29",
        "Estimated Total Size (MB)": "2414.99",
    }
    rules = [line for line in table.splitlines() if set(line) == {"="}]
    assert len(rules) == 5
    assert len(rules[0]) == 125


def test_zero_dropout_keeps_the_dropout_rows(table):
    assert table_of(Model(dropout=0.0)) == table


@pytest.mark.parametrize("width", [1, 8, 16])
def test_width_scales_every_layer(width):
    assert [row for row, _ in rows_of(table_of(Model(width), 7))] == expected_rows(
        width, 7
    )


def test_summary_shows_the_table_and_leaves_the_model_unchanged(capsys):
    model = Model(4)
    model.net[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    text = str(model.summary(batch_size=3))
    assert [row for row, _ in rows_of(text)] == expected_rows(4, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(module._forward_hooks for module in model.modules())


def test_input_channels_and_classes():
    x = torch.rand(2, 1, 32, 32)
    assert Model(2, in_channels=1, classes=7)(x).shape == (2, 7)


# ---------------------------------------------------------------- images of other sizes


def former(model: Model) -> Model:
    "Return a copy with the pools of the original design, which fit 32x32 pixels only."
    other = copy.deepcopy(model)
    for layer in other.modules():
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = False
    other.net[4] = nn.MaxPool2d(4)
    return other


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
def test_the_bits_at_32x32_are_those_of_the_original_design(layout, training):
    torch.manual_seed(0)
    model = Model(8).train(training).to(memory_format=layout)
    found = []
    for one in (model, former(model)):
        torch.manual_seed(1)
        x = torch.randn(6, 3, 32, 32).requires_grad_()
        logits = one(x)
        logits.square().sum().backward()
        grads = [x.grad, *(p.grad for p in one.parameters())]
        found.append([logits, *grads, *one.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert list(model.state_dict()) == list(former(model).state_dict())


SIZES = [(32, 32), (33, 33), (32, 100), (40, 64), (63, 35), (224, 224)]


@pytest.mark.parametrize("size", SIZES)
def test_images_of_any_size_are_classified_by_the_maximum_of_each_feature(size):
    torch.manual_seed(0)
    model = Model(2, classes=3).eval()
    x = torch.randn(2, 3, *size)
    features = model.net[:4](x)
    assert features.shape == (2, 16, *(-(-side // 8) for side in size))
    expected = model.net[6](features.amax((2, 3)))
    assert torch.allclose(model(x), expected, atol=1e-6)
    model.train()(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "shape",
    [(2, 3, 31, 32), (2, 3, 32, 8), (2, 3, 1, 1), (2, 1, 64, 64), (3, 64, 64), (2, 3)],
)
def test_smaller_images_and_other_shapes_are_refused_in_one_sentence(shape):
    with pytest.raises(ValueError, match=r"x must have shape \(N, 3, H, W\)") as raised:
        Model(2)(torch.zeros(shape))
    assert "\n" not in str(raised.value)
    assert str(shape) in str(raised.value)


def test_a_model_can_be_traced_exported_and_pickled():
    model, x = Model(2).eval(), torch.randn(2, 3, 40, 64)
    expected = model(x)
    assert torch.equal(fx.symbolic_trace(model)(x), expected)
    exported = torch.export.export(model, (x,)).module()
    assert torch.allclose(exported(x), expected, atol=1e-6)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)


@pytest.mark.slow
def test_a_compiled_model_accepts_several_sizes():
    model = Model(2).eval()
    compiled = torch.compile(model)
    for size in ((32, 32), (33, 40)):
        x = torch.randn(2, 3, *size)
        assert torch.allclose(compiled(x), model(x), atol=1e-5)


def test_the_summary_of_another_size():
    rows = [row for row, _ in rows_of(str(Model(2).summary(3, size=(40, 64))))]
    assert (2, "MaxPool2d", 5, (3, 16, 1, 1), 0) in rows
    assert (2, "CustomLayer", 4, (3, 16, 5, 8), 0) in rows
